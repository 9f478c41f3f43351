"""``kdsr bench scale``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools.bench_options import Device, StepSize
from kdsr.tools.bench_scale import settings_of
from kdsr.tools.step_pairs import Setting


def base(file: Path) -> Setting:
    return Setting("as given", str(file), ("datasets:train:batch_size_per_gpu=2",), Device.cpu, 1)


def test_a_row_for_each_value(step_file: Path) -> None:
    words = [
        "datasets:train:batch_size_per_gpu=1|4",
        "network_t={type: MSRResNet, upscale: 2}",
        "train:accumulate=3",
    ]
    settings = settings_of(base(step_file), words)
    assert [setting.name for setting in settings] == [
        "as given", "datasets:train:batch_size_per_gpu=1", "datasets:train:batch_size_per_gpu=4", words[1], words[2],
    ]  # fmt: skip
    assert [StepSize.of(setting.options).images for setting in settings] == [2, 1, 4, 2, 6]
    assert settings[3].options["network_t"]["type"] == "MSRResNet"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train:num_neg", "--vary: 'train:num_neg': give KEY:KEY=VALUE|VALUE|..."),
        ("train:num_neg=1|-1", "train.num_neg: -1 is below 0"),
        ("train:num_negs=1", "num_negs"),
        ("datasets:train:gt_size=33", "gt_size: 33 is not a multiple of the scale 2"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_measured(
    step_file: Path, word: str, message: str
) -> None:
    with pytest.raises(OptionError, match=message.replace("|", r"\|").replace("...", "")):
        settings_of(base(step_file), [word])


@pytest.mark.slow
def test_the_command_measures_settings_and_processes(step_file: Path, tmp_path: Path) -> None:
    options = yaml.safe_load(step_file.read_text(encoding="utf-8"))
    options["train"] = {
        key: value for key, value in options["train"].items() if key not in ("cl_opt", "ce_opt")
    }
    options["train"].pop("num_neg")
    for key in ("network_his", "network_vqgan"):
        del options[key]
    step_file.write_text(yaml.safe_dump({**options, "model_type": "KDModel"}), encoding="utf-8")
    values, table = tmp_path / "values.json", tmp_path / "table.md"
    arguments = ["-opt", str(step_file), "--vary", "datasets:train:batch_size_per_gpu=4", "--processes", "2"]
    arguments += ["--repeat", "2", "--warmup", "1", "--json", str(values), "--out", str(table)]
    result = CliRunner().invoke(app, ["bench", "scale", *arguments])
    assert result.exit_code == 0, result.output
    assert table.read_text(encoding="utf-8") in result.output
    found = json.loads(values.read_text(encoding="utf-8"))
    assert [cost["images"] for cost in found["costs"]] == [1, 4]
    names = ["1 process", "2 processes, each alone", "2 processes, DDP"]
    assert [cost["name"] for cost in found["processes"]] == names
    assert all(f"| {name}" in result.output for name in names)
    for cost in [*found["costs"], *found["processes"]]:
        assert len(cost["seconds"]) == 2 and min(cost["seconds"]) > 0 and cost["peak"] > 50
    one, both = found["processes"][0], found["processes"][2]
    assert both["efficiency"] == pytest.approx(sum(one["seconds"]) / sum(both["seconds"]))
    assert found["all_reduce"]["size"] > 0 and len(found["all_reduce"]["seconds"]) == 2
