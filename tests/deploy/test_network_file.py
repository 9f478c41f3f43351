"""A network is opened from its file alone, whatever the file says of itself, and fits or is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.models import build_model

from kdsr import train as train_entry
from kdsr.deploy.network_file import open_network
from kdsr.runtime.checkpoint import save_safetensors
from kdsr.runtime.errors import CheckpointError, OptionError

Options = dict[str, Any]
EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2,
        "res_scale": 0.1}  # fmt: skip
LATEST = Path("experiments/run/models/net_g_latest.pth")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(file: str = "net.pth", options: Options = EDSR, **more: Any) -> dict[str, torch.Tensor]:
    """Writes a checkpoint; returns its weights."""
    weights = dict(build_network(copy.deepcopy(options)).state_dict())
    torch.save({"params": weights, **more}, file)
    return weights


def of_run(run_options: Options) -> None:
    run_options["logger"]["save_safetensors"] = True
    Path("run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 0


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_a_student_needs_nothing_but_its_file(run_options: Options, end: str) -> None:
    run_options["network_g"]["res_scale"] = 0.3  # which no tensor tells
    of_run(run_options)
    file = Path(f"alone.{end}")
    file.write_bytes(LATEST.with_suffix(f".{end}").read_bytes())
    opened = open_network(file)
    assert opened.options == run_options["network_g"] and "described in the file" in opened.source
    assert (opened.scale, opened.channels_in, opened.channels_out, opened.multiple_of) == (4, 3, 3, 1)
    assert opened.notes[0] == "run: run"
    weights = torch.load(LATEST, weights_only=True)["params_ema"]
    assert all(torch.equal(value, weights[name]) for name, value in opened.net.state_dict().items())
    assert not opened.net.training and not any(value.requires_grad for value in opened.net.parameters())


def test_stock_basicsr_reads_the_file_as_before(run_options: Options) -> None:
    of_run(run_options)
    stock = {
        "model_type": "SRModel", "num_gpu": 0, "dist": False, "is_train": False, "scale": 4,
        "network_g": run_options["network_g"],
        "path": {"pretrain_network_g": str(LATEST), "param_key_g": "params_ema", "strict_load_g": True},
    }  # fmt: skip
    model = build_model(stock)
    ours = open_network(LATEST).net.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.net_g.state_dict().items())


def test_the_run_beside_an_older_file_and_the_given_option_file_tell(run_options: Options) -> None:
    run_options["network_g"]["res_scale"] = 0.3
    of_run(run_options)
    older = {key: value for key, value in torch.load(LATEST).items() if key.startswith("params")}
    torch.save(older, LATEST.with_name("older.pth"))
    torch.save(older, "moved.pth")
    for file, opt in ((LATEST.with_name("older.pth"), None), (Path("moved.pth"), "run.yml")):
        opened = open_network(file, opt)
        assert opened.net.body[0].res_scale == 0.3 and "network_g of " in opened.source
    assert "recognised by its tensors" in open_network("moved.pth").source


def test_an_option_file_may_name_the_file_as_its_teacher() -> None:
    saved()
    network_g = EDSR | {"num_feat": 4}
    Path("o.yml").write_text(
        yaml.safe_dump({"network_g": network_g, "network_t": EDSR, "path": {"pretrain_network_t": "net.pth"}})
    )
    assert "network_t of o.yml" in open_network("net.pth", "o.yml").source


@pytest.mark.parametrize(
    "options",
    [
        EDSR,
        EDSR | {"upscale": 3, "num_block": 2},
        {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 2, "upscale": 4},
        {
            "type": "SRVGGNetCompact",
            "num_in_ch": 1,
            "num_out_ch": 1,
            "num_feat": 8,
            "num_conv": 1,
            "upscale": 2,
        },
    ],
)
def test_bare_weights_are_recognised(options: Options) -> None:
    weights = saved(options=options)
    opened = open_network("net.pth")
    assert all(torch.equal(value, weights[name]) for name, value in opened.net.state_dict().items())
    assert opened.scale == options["upscale"] and opened.channels_in == options.get("num_in_ch", 3)


def test_spandrel_recognises_the_rest() -> None:
    saved(options={"type": "SpandrelNet", "architecture": "SPAN",
                   "parameters": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2}})  # fmt: skip
    opened = open_network("net.pth")
    assert opened.options == {"type": "Spandrel", "path": "net.pth"} and opened.scale == 2


def test_what_is_described_but_does_not_fit_is_passed_over() -> None:
    saved(network={"type": "NetworkOfAnAbsentModule", "width": 3})
    assert "recognised by its tensors" in open_network("net.pth").source
    saved(network=EDSR | {"num_feat": 16})
    assert open_network("net.pth").options["num_feat"] == 8  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Path("net.pth").write_bytes(b"no checkpoint"), "net.pth"),
        (lambda: torch.save({"params": {"a.weight": torch.zeros(3, 3)}}, "net.pth"), "--opt FILE"),
        (lambda: torch.save({"optimizers": [], "networks": {}, "iter": 3}, "net.pth"), "state of a training"),
        (lambda: save_safetensors({"a": torch.zeros(2)}, "net.pth", {"network": "{torn"}), "--opt FILE"),
        (
            lambda: (
                saved(options=EDSR, network={"type": "Missing"})
                and torch.save({"params": {"x": torch.ones(2)}, "network": {"type": "Missing"}}, "net.pth")
            ),
            "'Missing' is not known",
        ),
    ],
)
def test_files_that_are_refused(make: Any, message: str) -> None:
    make()
    with pytest.raises(CheckpointError, match=message):
        open_network("net.pth")


def test_a_missing_file() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_network("net.pth")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (EDSR | {"num_feat": 16}, "does not fit"),
        (EDSR | {"num_fet": 8}, "num_fet"),
        (EDSR | {"type": "EDRS"}, "EDSR"),
        (None, "has no network_g"),
    ],
)
def test_an_option_file_of_another_network_is_refused(network: Options | None, message: str) -> None:
    saved()
    Path("o.yml").write_text(
        yaml.safe_dump({"name": "x", "network_g": network} if network else {"name": "x"})
    )
    with pytest.raises((CheckpointError, OptionError), match=message):
        open_network("net.pth", "o.yml")


def test_a_missing_device() -> None:
    saved()
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="no GPU"):
            open_network("net.pth", device="cuda")
    with pytest.raises(OptionError, match="no device"):
        open_network("net.pth", device="toaster")
