"""``kdsr bench step``."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from basicsr.models import build_model
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools import bench
from small_networks import small_vqgan

_NET = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "upscale": 2}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    l1 = {"type": "L1Loss", "loss_weight": 1.0}
    options = {
        "name": "tiny",
        "model_type": "DCKDModel",
        "scale": 2,
        "num_gpu": "auto",
        "manual_seed": 3,
        "datasets": {
            "train": {
                "name": "none",
                "type": "PairedImageDataset",
                "dataroot_gt": "nowhere",
                "dataroot_lq": "nowhere",
                "io_backend": {"type": "disk"},
                "gt_size": 32,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 1,
            }
        },
        "network_g": {**_NET, "num_block": 1},
        "network_t": {**_NET, "num_block": 2},
        "network_his": True,
        "network_vqgan": small_vqgan(2),
        "path": {"pretrain_network_t": "nowhere/teacher.pth"},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [10], "gamma": 0.5},
            "total_iter": 10,
            "warmup_iter": -1,
            "pixel_opt": l1,
            "logits_opt": l1,
            "cl_opt": {"type": "ContrasLoss", "loss_weight": 0.1, "weights": [0.5, 1.0]},
            "ce_opt": {"type": "CELoss", "loss_weight": 0.001},
            "num_neg": 2,
        },
    }
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


class RecordingClock(bench.Clock):
    order: list[str]

    def switch(self, part: str) -> str:
        self.order.append(part)
        return super().switch(part)


def one_step(file: Path, clock: bench.Clock | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(bench.prepare(file))
    model.feed_data({"lq": torch.rand(1, 3, 16, 16), "gt": torch.rand(1, 3, 32, 32)})
    if clock is None:
        model.optimize_parameters(1)
    else:
        with bench.watched(model, clock):
            model.optimize_parameters(1)
    return model.net_g.state_dict()


def test_every_part_of_a_step_is_attributed_in_its_turn(file: Path):
    clock = RecordingClock(bench.Memory(torch.device("cpu")))
    clock.order = []
    one_step(file, clock)
    assert clock.order == [
        bench.TEACHER,
        bench.REST,
        "history model",
        bench.REST,
        bench.STUDENT,
        bench.REST,
        "VQGAN",
        bench.REST,
        bench.WITH_GRADIENT.format("VQGAN"),  # forward
        bench.REST,  # the losses
        bench.WITH_GRADIENT.format("VQGAN"),  # backward
        bench.STUDENT,  # backward
        bench.REST,  # the update
    ]


def test_parts_of_slkd(file: Path):
    """Both teachers, the adapters and the extractors; after the losses' backward pass comes the student's."""
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    network = {"type": "NAFNet", "width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1], "middle_blk_num": 1}
    for key in ("network_his", "network_vqgan"):
        options.pop(key)
    options.update(model_type="SLKDModel", scale=1, network_g=network)
    options.update(network_t={**network, "width": 12}, network_tb={**network, "width": 12})
    l1 = options["train"]["pixel_opt"]
    options["train"] = {
        key: options["train"][key]
        for key in ("optim_g", "scheduler", "total_iter", "warmup_iter", "ema_decay")
    } | {
        "pixel_opt": l1,
        "nc_opt": {"type": "NaturalSceneLoss"},
        "et_opt": {"type": "EdgeTextureLoss"},
        "encoder_taps": [{"student": "encoders.0", "teacher": "encoders.0"}],
        "decoder_taps": [{"student": "decoders.0", "teacher": "decoders.0"}],
    }
    options["val"] = None
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    model = build_model(bench.prepare(file))
    images = {"lq": torch.rand(1, 3, 32, 32), "gt": torch.rand(1, 3, 32, 32)}
    clock = RecordingClock(bench.Memory(torch.device("cpu")))
    clock.order = []
    with bench.watched(model, clock):
        model.feed_data(images)
        model.optimize_parameters(1)
    order = [part for part in clock.order if part != bench.REST]
    scenes, edges = "NaturalSceneLoss (feature loss)", "EdgeTextureLoss (feature loss)"
    assert order == [
        bench.TEACHER, "teacher B", bench.STUDENT, bench.ADAPTERS, bench.ADAPTERS, scenes, edges,  # forward
        bench.ADAPTERS, bench.STUDENT,  # backward
    ]  # fmt: skip
    table = bench.summary(bench.measure(model, images, warmup=0, repeat=1)[0])
    shown = [bench.STUDENT, bench.TEACHER, "teacher B", scenes, edges, bench.ADAPTERS, bench.REST]
    assert list(table.index) == [*shown, "sum of the parts", "whole step"]


def test_watching_changes_nothing(file: Path):
    watched = one_step(file, bench.Clock(bench.Memory(torch.device("cpu"))))
    plain = one_step(file, None)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


def test_command_prints_every_part_and_writes_the_table(file: Path, tmp_path: Path):
    out = tmp_path / "new" / "table.md"
    arguments = [
        "step",
        "-opt",
        str(file),
        "--repeat",
        "2",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["bench", *arguments])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    table = out.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        bench.STUDENT,
        bench.TEACHER,
        "history model",
        "VQGAN",
        bench.WITH_GRADIENT.format("VQGAN"),
        bench.REST,
        "sum of the parts",
        "whole step",
    ]
    assert table in result.output


def test_wrong_options_are_refused(file: Path):
    with pytest.raises(OptionError, match="ema_deca"):
        bench.prepare(file, ["train:ema_deca=0.5"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("datasets:train:gt_size=33", "gt_size: 33 is not a multiple of the scale 2"),
        ("datasets:train:gt_size=-2", "gt_size: must be a number of pixels, not -2"),
        ("datasets:train:gt_size=~", "gt_size: is required"),
        ("datasets:train=7", "gt_size: is required"),
        ("scale=two", "scale: expected a"),
        ("network_vqgan:ddconfig:ch_mult=[1,1,1,1]", "gt_size: 36 is not a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(file: Path, override: str, message: str):
    with pytest.raises(OptionError, match=message):
        bench.prepare(file, ["datasets:train:gt_size=36", override])


def test_models_with_other_parts_are_refused():
    small = Path(__file__).resolve().parents[2] / "options" / "train" / "VQGAN_f16_small.yml"
    with pytest.raises(OptionError, match="KDModel and its presets, not VQGANModel"):
        bench.prepare(small)


@pytest.mark.parametrize(
    ("term", "loss"), [("rkd_opt", "RKDLoss"), ("facd_opt", "FACDLoss")]
)  # one is refused by the options, one at its first step
def test_losses_that_need_more_than_one_image_say_how_to_give_them(file: Path, term: str, loss: str):
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    options["datasets"]["train"]["batch_size_per_gpu"] = 16
    options["train"].update({term: {"type": loss}, "taps": [{"student": "body.0", "teacher": "body.0"}]})
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    arguments = ["step", "-opt", str(file), "--repeat", "1", "--warmup", "0", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert isinstance(result.exception, OptionError)
        assert "batch_size_per_gpu" in str(result.exception) and "(here: --batch)" in str(result.exception)
        assert CliRunner().invoke(app, ["bench", *arguments, "--batch", "3"]).exit_code == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(file: Path):
    with pytest.raises(OptionError, match="--device cuda: torch finds no GPU"):
        bench.prepare(file, device=bench.Device.cuda)


@pytest.mark.parametrize("wrong", [["--device", "tpu"], ["--threads", "0"]])
def test_wrong_arguments_are_refused(file: Path, wrong: list[str]):
    result = CliRunner().invoke(app, ["bench", "step", "-opt", str(file), *wrong])
    assert result.exit_code == 2, "a usage error; an OptionError would be 1 here"


def test_unknown_memory(tmp_path: Path):
    memory = bench.Memory(torch.device("cpu"), tmp_path)
    memory.start()
    assert math.isnan(memory.peak())
    measured = pd.DataFrame(
        [(0, bench.STUDENT, 1.0, memory.peak())], columns=["step", "part", "seconds", "peak_mib"]
    )
    assert bench.summary(measured)["peak MiB"].tolist() == ["–", "", "–"]
    assert "not measured" in bench.memory_note(bench.Device.cpu, memory.peak())
