"""Networks of spandrel's architectures from options, without a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SPAN import SPAN

from kdsr.options.check import check
from kdsr.runtime.errors import OptionError
from small_runs import run

SPAN_PARAMETERS = {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 4}
Options = dict[str, Any]


def network(**changes: Any) -> Options:
    return {"type": "SpandrelNet", "architecture": "SPAN", "parameters": {**SPAN_PARAMETERS, **changes}}


@pytest.mark.parametrize(
    ("architecture", "made", "parameters"),
    [("SPAN", SPAN, SPAN_PARAMETERS), ("SAFMN", SAFMN, {"dim": 12, "n_blocks": 1, "upscaling_factor": 2})],
)
def test_it_is_the_architectures_own(architecture: str, made: Any, parameters: Options) -> None:
    """The same weights from the same seed, the same output, and nothing drawn on the way."""
    options = {"type": "SpandrelNet", "architecture": architecture, "parameters": parameters}
    torch.manual_seed(3)
    net = build_network(copy.deepcopy(options))
    after = torch.rand(1)
    torch.manual_seed(3)
    own = made(**parameters)
    assert torch.equal(after, torch.rand(1))
    assert isinstance(net, made) and net.facts.scale in (2, 4)
    weights = own.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    images = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(net.eval()(images), own.eval()(images))


def test_its_checkpoint_is_one_of_spandrels(tmp_path: Path) -> None:
    net = build_network(network()).eval()
    file = tmp_path / "span.pth"
    torch.save({"params": net.state_dict()}, file)
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(
        build_network({"type": "Spandrel", "path": str(file)}).eval()(images), net(images)
    )
    assert net.notes == ()


def test_what_weights_do_not_tell_is_noted() -> None:
    net = build_network(network(img_range=1.0))
    assert net.img_range == 1.0
    (note,) = net.notes
    assert note.startswith("weights do not tell img_range;")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (network(feature_chanels=8), "parameters.feature_chanels: SPAN has no such parameter; did you mean"),
        (network(feature_channels="x"), "parameters: SPAN cannot be built: TypeError"),
        ({"type": "SpandrelNet", "architecture": "SPAN"}, "parameters.num_in_ch: is required by SPAN"),
        (
            {"type": "SpandrelNet", "architecture": "SPANN"},
            "architecture: spandrel does not know 'SPANN'; did you mean SPAN",
        ),
        ({"type": "SpandrelNet", "architecture": "PLKSR"}, "architecture: PLKSR has several classes"),
        (
            {"type": "SpandrelNet", "architecture": "DRUNet", "parameters": {"in_nc": 4, "out_nc": 3}},
            "architecture: DRUNet needs the level of the noise",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_named(options: Options, message: str, run_options: Options) -> None:
    run_options["network_g"] = options
    assert any(problem.startswith(f"network_g.{message}") for problem in check(run_options, True))
    with pytest.raises(OptionError) as caught:
        build_network(copy.deepcopy(options))
    assert any(message in problem for problem in caught.value.problems)


def test_scale_and_missing_architecture_are_checked(run_options: Options) -> None:
    run_options["network_g"] = network(upscale=2)
    message = "network_g.parameters: this is a network of scale 2 (SPAN), but scale is 4"
    assert check(run_options, True) == [message]
    run_options["network_g"] = {"type": "SpandrelNet"}
    assert "network_g.architecture: is required by SpandrelNet" in check(run_options, True)


def test_a_run_with_features_of_span(
    run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options.update(network_g=network(), network_t=network(feature_channels=12))
    torch.save({"params": build_network(network(feature_channels=12)).state_dict()}, "teacher.pth")
    run_options["path"]["pretrain_network_t"] = "teacher.pth"
    run_options["train"].update(
        fakd_opt={"type": "AffinityLoss"},
        taps=[{"student": name, "teacher": name} for name in ("block_2", "block_4", "conv_cat")],
    )
    assert run(run_options) == 0
