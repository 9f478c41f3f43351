"""``kdsr bench step --vs``: pairs of steps, and the order of work of DCKD's release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools.bench_options import Device
from kdsr.tools.machine import vector_extensions
from kdsr.tools.step_floor import chunk_sizes
from kdsr.tools.step_pairs import Setting

BATCH = {"lq": torch.rand(2, 3, 16, 16), "gt": torch.rand(2, 3, 32, 32)}


def setting(file: Path, device: Device = Device.cpu) -> Setting:
    return Setting("as given", str(file), (), device, 1)


def change(file: Path, **train: Any) -> None:
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    options["train"].update(train)
    file.write_text(yaml.safe_dump(options), encoding="utf-8")


def losses_of_three_steps(setting: Setting) -> list[dict[str, float]]:
    side, found = setting.side(), []
    for iteration in (1, 2, 3):
        side.step(BATCH, iteration)
        found.append(side.losses())
    return found


@pytest.mark.parametrize("variant", ["released", "equation_9"])
@pytest.mark.parametrize("ratio", ["batch", "image"])
def test_the_releases_order_of_work_gives_the_same_losses(step_file: Path, variant: str, ratio: str) -> None:
    """With random draws, every loss, and a history model that changes."""
    contrast = {"type": "ContrasLoss", "loss_weight": 0.1, "weights": [0.5, 1.0], "ratio": ratio}
    change(
        step_file,
        lcr_opt={"type": "L1Loss"},
        cl_opt=contrast,
        ce_opt={"type": "CELoss", "loss_weight": 0.001, "variant": variant},
        gaussian_noise_prob=1.0,
        step=2,
    )
    ours = setting(step_file)
    for given, plain in zip(
        losses_of_three_steps(ours), losses_of_three_steps(ours.versus(["plain"])), strict=True
    ):
        assert list(plain) == ["l_pix", "l_ts", "l_lcr", "l_cl", "l_ce"]
        assert given == pytest.approx(plain, rel=1e-4)


def test_the_command_compares_pairs(step_file: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    arguments = ["step", "-opt", str(step_file), "--threads", "1", "--pairs", "3", "--warmup", "0"]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(
            app, ["bench", *arguments, "--vs", "train:vqgan_chunk=1", "--json", str(values)]
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "second ÷ first" in result.output
    found = json.loads(values.read_text(encoding="utf-8"))["vs"]
    assert found["settings"] == ["as given", "train:vqgan_chunk=1"]
    assert len(found["seconds"]) == len(found["ratio"]["each"]) == 3
    assert all(loss["relative_difference"] < 1e-5 for loss in found["first_losses"].values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["plian"], "--vs: 'plian': give KEY:KEY=VALUE, once or more, or only plain or srmodel"),
        (["plain", "train:vqgan_chunk=1"], "--vs: 'plain'"),
    ],
)
def test_other_values_are_refused(step_file: Path, values: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        setting(step_file).versus(values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("train:vqgan_chunks=1", "vqgan_chunks"),
        ("datasets:train:gt_size=16", "both settings get the same images"),
        ("train:accumulate=2", "both settings get the same images"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(step_file: Path, value: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "step", "-opt", str(step_file), "--vs", value])
    assert isinstance(result.exception, OptionError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"cl_opt": None, "ce_opt": None}, "neither train.cl_opt nor train.ce_opt"),
        ({"fft_opt": {"type": "FFTLoss"}}, "has no train.fft_opt"),
        ({"accumulate": 2}, "has no train.accumulate"),
    ],
)
def test_plain_is_for_dckd_only(step_file: Path, train: dict[str, Any], message: str) -> None:
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    options["model_type"] = "KDModel"
    step_file.write_text(yaml.safe_dump(options), encoding="utf-8")
    change(step_file, **train)
    with pytest.raises(OptionError, match=message) as error:
        setting(step_file).versus(["plain"])
    assert len(error.value.problems) == 1


def test_srmodel_has_one_batch_per_update(step_file: Path) -> None:
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    step_file.write_text(yaml.safe_dump({**options, "model_type": "KDModel"}), encoding="utf-8")
    change(step_file, cl_opt=None, ce_opt=None, pixel_opt=None, accumulate=2)
    with pytest.raises(OptionError, match="has no train.accumulate"):
        setting(step_file).versus(["srmodel"])


def test_chunk_sizes() -> None:
    assert chunk_sizes(6) == [1, 2, 3, 4, 5, 6]
    assert chunk_sizes(20) == [1, 2, 4, 8, 16, 20]


def test_onednn_limits_the_vector_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = vector_extensions()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert vector_extensions() == [name for name in everything if name == "avx2"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(step_file: Path) -> None:
    ours = setting(step_file, Device.cuda)
    given, plain = losses_of_three_steps(ours), losses_of_three_steps(ours.versus(["plain"]))
    assert given[0] == pytest.approx(plain[0], rel=1e-2)  # TF32 is off in the second only


def test_the_same_images_in_more_batches(step_file: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    options = ["--batch", "2", "--vs", "train:accumulate=2", "--vs", "datasets:train:batch_size_per_gpu=1"]
    arguments = ["-opt", str(step_file), "--threads", "1", "--pairs", "1", "--warmup", "0", *options]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["bench", "step", *arguments, "--json", str(values)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    losses = json.loads(values.read_text(encoding="utf-8"))["vs"]["first_losses"]
    assert {"l_pix", "l_ts"} <= losses.keys()
    assert all(losses[name]["relative_difference"] < 1e-5 for name in ("l_pix", "l_ts"))


def test_srmodel_beside_a_kdmodel(step_file: Path) -> None:
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    kept = ("pixel_opt", "optim_g", "scheduler", "total_iter", "warmup_iter", "ema_decay")
    options["train"] = {key: options["train"][key] for key in kept}
    options["train"]["logits_opt"] = options["train"].pop("pixel_opt")
    step_file.write_text(yaml.safe_dump({**options, "model_type": "KDModel"}), encoding="utf-8")
    both = setting(step_file), setting(step_file).versus(["srmodel"])
    assert losses_of_three_steps(both[0])[0].keys() == {"l_ts"}
    assert losses_of_three_steps(both[1])[0].keys() == {"l_pix"}
