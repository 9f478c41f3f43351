"""``kdsr bench step``."""

from __future__ import annotations

import json
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
from kdsr.tools import bench, step_floor, step_parts
from kdsr.tools.bench_options import Device, prepare
from kdsr.tools.step_clock import REST, Clock, Memory


class RecordingClock(Clock):
    order: list[str]

    def switch(self, part: str) -> str:
        self.order.append(part)
        return super().switch(part)


def one_step(step_file: Path, clock: Clock | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(prepare(step_file))
    model.feed_data({"lq": torch.rand(1, 3, 16, 16), "gt": torch.rand(1, 3, 32, 32)})
    if clock is None:
        model.optimize_parameters(1)
    else:
        with step_parts.watched(model, clock):
            model.optimize_parameters(1)
    return model.net_g.state_dict()


def test_every_part_of_a_step_is_attributed_in_its_turn(step_file: Path):
    clock = RecordingClock(Memory(torch.device("cpu")))
    clock.order = []
    one_step(step_file, clock)
    assert clock.order == [
        step_parts.TEACHER,
        REST,
        "history model",
        REST,
        step_parts.STUDENT,
        REST,
        "VQGAN",
        REST,
        step_parts.WITH_GRADIENT.format("VQGAN"),  # features
        REST,  # l_cl
        step_parts.WITH_GRADIENT.format("VQGAN"),  # codes
        REST,
        "VQGAN",
        REST,  # l_ce
        step_parts.WITH_GRADIENT.format("VQGAN"),  # backward
        step_parts.STUDENT,  # backward
        REST,  # the update
    ]


def test_parts_of_slkd(step_file: Path):
    """Both teachers, the adapters and the extractors; after the losses' backward pass comes the student's."""
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
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
    step_file.write_text(yaml.safe_dump(options), encoding="utf-8")
    model = build_model(prepare(step_file))
    images = {"lq": torch.rand(1, 3, 32, 32), "gt": torch.rand(1, 3, 32, 32)}
    clock = RecordingClock(Memory(torch.device("cpu")))
    clock.order = []
    with step_parts.watched(model, clock):
        model.feed_data(images)
        model.optimize_parameters(1)
    order = [part for part in clock.order if part != REST]
    scenes, edges = "NaturalSceneLoss (feature loss)", "EdgeTextureLoss (feature loss)"
    assert order == [
        step_parts.TEACHER, "teacher B", step_parts.STUDENT, step_parts.ADAPTERS, step_parts.ADAPTERS, scenes, edges,
        step_parts.ADAPTERS, step_parts.STUDENT,  # backward
    ]  # fmt: skip
    table = step_parts.summary(step_parts.measure(model, images, warmup=0, repeat=1)[0])
    shown = [step_parts.STUDENT, step_parts.TEACHER, "teacher B", scenes, edges, step_parts.ADAPTERS, REST]
    assert list(table.index) == [*shown, "sum of the parts", "whole step"]


def test_watching_changes_nothing(step_file: Path):
    watched = one_step(step_file, Clock(Memory(torch.device("cpu"))))
    plain = one_step(step_file, None)
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


def test_command_prints_every_part_and_writes_the_table(step_file: Path, tmp_path: Path):
    out = tmp_path / "new" / "table.md"
    arguments = [
        "step",
        "-opt",
        str(step_file),
        "--repeat",
        "2",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
        "--json",
        str(tmp_path / "values.json"),
        "--floor",
    ]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["bench", *arguments])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    table = out.read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    rows = [line.split("|")[1].strip() for line in lines]
    assert rows[1:] == [
        step_parts.STUDENT,
        step_parts.TEACHER,
        "history model",
        "VQGAN",
        step_parts.WITH_GRADIENT.format("VQGAN"),
        REST,
        "sum of the parts",
        "whole step",
        "part alone, at its best",
        step_parts.TEACHER,
        "history model",
        step_parts.STUDENT,
        "VQGAN",
        step_parts.WITH_GRADIENT.format("VQGAN"),
        "VQGAN, codes with gradient, forward and backward",
        "VQGAN, codes",
        step_floor.UPDATE,
        "floor",
        "whole step",
        "step ÷ floor",
    ]
    assert table in result.output
    values = json.loads((tmp_path / "values.json").read_text(encoding="utf-8"))
    assert [row["images"] for row in values["floor"]] == [1, 3, 1, 4, 1, 1, 1, None]
    parts = {row["part"]: row["gflop"] for row in values["parts"]}
    assert parts["VQGAN"] > parts["history model"] > 0


def test_batches_of_an_iteration_are_counted(step_file: Path, tmp_path: Path):
    """``--batch`` is that of a pass; images, operations and parts are those of all passes."""
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    options["train"].update(accumulate=2)
    step_file.write_text(yaml.safe_dump(options), encoding="utf-8")
    found = {}
    threads = torch.get_num_threads()
    try:
        for batches in (1, 2):
            json_file = tmp_path / f"{batches}.json"
            arguments = ["-opt", str(step_file), "--force_yml", f"train:accumulate={batches}", "--batch", "2"]
            arguments += ["--repeat", "1", "--warmup", "0", "--threads", "1", "--json", str(json_file)]
            result = CliRunner().invoke(app, ["bench", "step", *arguments, *(["--floor"] * (batches - 1))])
            assert result.exit_code == 0, result.output
            found[batches] = json.loads(json_file.read_text(encoding="utf-8"))
    finally:
        torch.set_num_threads(threads)
    assert "2 batches of 2, 32×32 ground truth" in result.output
    assert [(each["batch"], each["images"]) for each in found.values()] == [(2, 2), (2, 4)]
    one, two = ({row["part"]: row["gflop"] for row in each["parts"]} for each in found.values())
    for part in one.keys() - {REST}:  # degradations are drawn
        assert two[part] == 2 * one[part] > 0, part
    networks = [row for row in found[2]["floor"] if row["images"]]
    assert [row["images"] for row in networks] == [4, 12, 4, 16, 4, 4, 4]
    assert all(row["chunk"] <= row["images"] // 2 for row in networks)


def test_the_parts_of_each_batch_take_their_turn(step_file: Path):
    def order(batches: int) -> list[str]:
        model = build_model(prepare(step_file, [f"train:accumulate={batches}"]))
        clock = RecordingClock(Memory(torch.device("cpu")))
        clock.order = []
        with step_parts.watched(model, clock):
            model.feed_data({"lq": torch.rand(batches, 3, 16, 16), "gt": torch.rand(batches, 3, 32, 32)})
            model.optimize_parameters(1)
        return clock.order

    assert order(3) == order(1) * 3


def test_wrong_options_are_refused(step_file: Path):
    with pytest.raises(OptionError, match="ema_deca"):
        prepare(step_file, ["train:ema_deca=0.5"])


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
def test_sizes_that_do_not_fit_are_refused(step_file: Path, override: str, message: str):
    with pytest.raises(OptionError, match=message):
        prepare(step_file, ["datasets:train:gt_size=36", override])


def test_models_with_other_parts_are_refused():
    small = Path(__file__).resolve().parents[2] / "options" / "train" / "VQGAN_f16_small.yml"
    with pytest.raises(OptionError, match="KDModel and its presets, not VQGANModel"):
        prepare(small)


@pytest.mark.parametrize(
    ("term", "loss"), [("rkd_opt", "RKDLoss"), ("facd_opt", "FACDLoss")]
)  # one is refused by the options, one at its first step
def test_losses_that_need_more_than_one_image_say_how_to_give_them(step_file: Path, term: str, loss: str):
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    options["datasets"]["train"]["batch_size_per_gpu"] = 16
    options["train"].update({term: {"type": loss}, "taps": [{"student": "body.0", "teacher": "body.0"}]})
    step_file.write_text(yaml.safe_dump(options), encoding="utf-8")
    arguments = ["step", "-opt", str(step_file), "--repeat", "1", "--warmup", "0", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert isinstance(result.exception, OptionError)
        assert "batch_size_per_gpu" in str(result.exception) and "(here: --batch)" in str(result.exception)
        assert CliRunner().invoke(app, ["bench", *arguments, "--batch", "3"]).exit_code == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(step_file: Path):
    with pytest.raises(OptionError, match="--device cuda: torch finds no GPU"):
        prepare(step_file, device=Device.cuda)


@pytest.mark.parametrize("wrong", [["--device", "tpu"], ["--threads", "0"]])
def test_wrong_arguments_are_refused(step_file: Path, wrong: list[str]):
    result = CliRunner().invoke(app, ["bench", "step", "-opt", str(step_file), *wrong])
    assert result.exit_code == 2, "a usage error; an OptionError would be 1 here"


def test_unknown_memory(tmp_path: Path):
    memory = Memory(torch.device("cpu"), tmp_path)
    memory.start()
    assert math.isnan(memory.peak())
    measured = pd.DataFrame(
        [(0, step_parts.STUDENT, 1.0, 2.0, memory.peak())],
        columns=["step", "part", "seconds", "gflop", "peak_mib"],
    )
    assert step_parts.summary(measured)["peak MiB"].tolist() == ["–", "", "–"]
    assert "not measured" in bench.memory_note(Device.cpu, memory.peak())
