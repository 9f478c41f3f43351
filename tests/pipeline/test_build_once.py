"""A run builds each network once and reads each file once; the rehearsal of its first step leaves no trace in it."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR

from kdsr.archs.vqgan_arch import VQGAN
from kdsr.pipeline import preflight, session
from kdsr.pipeline.rehearsal import ValidationRehearsal
from small_runs import run

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _counted(original: Any, width: str, counts: Counter[str]) -> Any:
    @functools.wraps(original)  # the option check asks for the parameters
    def init(self: Any, **options: Any) -> None:
        counts[f"{type(self).__name__} {options[width]}"] += 1
        original(self, **options)

    return init


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each network was built, by its type and width."""
    counts: Counter[str] = Counter()
    for kind, width in ((EDSR, "num_feat"), (VQGAN, "embed_dim")):
        monkeypatch.setattr(kind, "__init__", _counted(kind.__init__, width, counts))
    return counts


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often torch has loaded each file, by its name."""
    counts: Counter[str] = Counter()
    load = torch.load

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        counts[Path(getattr(file, "name", file)).name] += 1
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", counted)
    return counts


def test_each_network_is_built_once_and_each_checkpoint_read_once(
    dckd_options: Options, built: Counter[str], read: Counter[str]
) -> None:
    dckd_options["val"]["teacher"] = True
    dckd_options["logger"]["save_checkpoint_freq"] = 2
    assert run(dckd_options) == 0
    assert built == {"EDSR 8": 1, "EDSR 12": 1, "VQGAN 8": 1}
    assert read == {"teacher.pth": 1, "vqgan.ckpt": 1}
    for counts in (built, read):
        counts.clear()
    dckd_options["train"]["total_iter"] = 4
    assert run(dckd_options, "--auto_resume") == 0
    assert built == {"EDSR 8": 1, "EDSR 12": 1, "VQGAN 8": 1}
    assert read == {"teacher.pth": 1, "vqgan.ckpt": 1, "2.state": 1}


def test_a_model_of_basicsrs_is_built_once(
    run_options: Options, built: Counter[str], read: Counter[str]
) -> None:
    run_options["model_type"] = "SRModel"
    run_options["train"]["ema_decay"] = 0
    assert run(run_options) == 0
    assert built == {"EDSR 8": 1}
    run_options.update(name="second", path={"pretrain_network_g": "experiments/run/models/net_g_latest.pth"})
    assert run(run_options) == 0
    assert built == {"EDSR 8": 2} and read == {"net_g_latest.pth": 1}


def test_all_checkpoints_at_fault_are_reported_at_once(
    dckd_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"params": {"a": torch.ones(2)}}, tmp_path / "teacher.pth")
    (tmp_path / "vqgan.ckpt").write_bytes(b"PK\x03\x04")
    assert run(dckd_options) == 2
    error = capsys.readouterr().err
    assert "path.pretrain_network_t: " in error and "path.pretrain_network_vqgan: " in error
    assert not Path("experiments").exists()


def slkd(options: Options) -> Options:
    l1 = options["train"]["pixel_opt"]
    for key in ("cl_opt", "ce_opt", "lcr_opt"):
        del options["train"][key]
    del options["network_vqgan"], options["network_his"]
    options["path"] = {key: value for key, value in options["path"].items() if "vqgan" not in key}
    options["train"].update(fitnet_opt={"type": "FitNetLoss"}, logits_opt=l1)
    options["train"]["taps"] = [{"student": "body.0", "teacher": "body.1"}]
    return options | {"model_type": "KDModel"}


def adversarial(options: Options) -> Options:
    """BasicSR's own model with a discriminator."""
    options = {
        key: options[key] for key in options if not key.startswith(("network_t", "network_vq", "network_h"))
    }
    options.update(model_type="ESRGANModel", path={})
    options["network_d"] = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 8}
    train = {
        key: options["train"][key] for key in ("optim_g", "scheduler", "total_iter", "pixel_opt", "ema_decay")
    }
    train["optim_d"] = dict(train["optim_g"])
    train["gan_opt"] = {
        "type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "fake_label_val": 0.0, "loss_weight": 0.1,
    }  # fmt: skip
    train.update(net_d_iters=1, net_d_init_iters=0)
    options["train"] = train
    return options


@pytest.mark.parametrize("gt_size", [64, 96])  # 96: the rehearsal makes its step on a corner
@pytest.mark.parametrize("change", [None, slkd, adversarial])
def test_a_run_with_a_rehearsal_ends_in_the_same_bits_as_one_without(
    dckd_options: Options, change: Any, gt_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = change(dckd_options) if change else dckd_options
    options["datasets"]["train"]["gt_size"] = gt_size
    options["train"]["warmup_iter"] = 2
    options["logger"]["save_checkpoint_freq"] = 2
    steps: list[int] = []
    first_step = preflight._first_step

    def counted(model: Any, opt: Options, batch: Any) -> None:
        steps.append(batch["gt"].shape[-1])
        first_step(model, opt, batch)

    monkeypatch.setattr(preflight, "_first_step", counted)
    assert run(copy.deepcopy(options) | {"name": "with"}) == 0
    assert steps == [64]
    monkeypatch.setattr(session, "rehearse", lambda *_: None)
    monkeypatch.setattr(ValidationRehearsal, "try_model", lambda *_: None)
    assert run(copy.deepcopy(options) | {"name": "without"}) == 0
    for file in ("models/net_g_latest.pth", "training_states/2.state"):
        one, other = (
            torch.load(f"experiments/{name}/{file}", weights_only=True) for name in ("with", "without")
        )
        assert flat(one) == flat(other)


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """The values of nested dicts and lists by their places, tensors as bytes; without what names the run."""
    if isinstance(value, torch.Tensor):
        return {place: value.numpy().tobytes()}
    if isinstance(value, dict):
        named = {key: below for key, below in value.items() if key not in ("options", "fingerprints", "run")}
        return {
            where: v for key, below in named.items() for where, v in flat(below, f"{place}.{key}").items()
        }
    if isinstance(value, (list, tuple)):
        return {where: v for i, below in enumerate(value) for where, v in flat(below, f"{place}.{i}").items()}
    return {place: value}
