"""Weights by file: a student written as safetensors is tested, and used as a teacher, like its .pth."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from basicsr.archs import build_network

from kdsr import test as test_entry
from kdsr import train as train_entry

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(entry: Any, options: Options) -> int:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return entry.main(["-opt", "run.yml"])


@pytest.mark.parametrize("ema", [0.9, 0])
def test_students_are_written_as_safetensors_on_request(run_options: Options, ema: float) -> None:
    run_options["train"].update(ema_decay=ema)
    run_options["logger"].update(
        save_safetensors=True,
        save_checkpoint_freq=1,
        keep_last=2,
        save_best={"set": "held_out", "metric": "psnr"},
    )
    run_options["val"]["val_freq"] = 2
    assert run(train_entry, run_options) == 0
    models = Path("experiments/run/models")
    names = {"net_g_2", "net_g_3", "net_g_best", "net_g_latest"}
    assert {file.name for file in models.iterdir()} == {
        f"{n}.{end}" for n in names for end in ("pth", "safetensors")
    }
    key = "params_ema" if ema else "params"
    for name in names:
        weights = torch.load(models / f"{name}.pth", weights_only=True)[key]
        with safetensors.safe_open(models / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            assert set(file.keys()) == set(weights)
            assert all(torch.equal(file.get_tensor(entry), value) for entry, value in weights.items())
        assert json.loads(metadata["network"]) == run_options["network_g"]
        assert (metadata["format"], metadata["weights"]) == ("pt", key)
        assert int(metadata["iteration"]) in (2, 3)


def test_nothing_of_the_kind_without_the_request(run_options: Options) -> None:
    assert run(train_entry, run_options) == 0
    assert not list(Path("experiments").rglob("*.safetensors"))


def test_a_test_reads_it_as_it_reads_the_pth(run_options: Options) -> None:
    run_options["logger"]["save_safetensors"] = True
    run_options["train"]["optim_g"]["lr"] = 0.01
    assert run(train_entry, run_options) == 0
    values, pixels = {}, {}
    for end in ("pth", "safetensors"):
        tested = {key: run_options[key] for key in ("model_type", "scale", "num_gpu", "network_g")} | {
            "name": end,
            "datasets": {"test_1": run_options["datasets"]["val"]},
            "path": {"pretrain_network_g": f"experiments/run/models/net_g_latest.{end}"},
            "val": run_options["val"] | {"save_img": True},
        }
        del tested["val"]["val_freq"]
        assert run(test_entry, tested) == 0
        with open(f"results/{end}/metrics.csv", newline="", encoding="utf-8") as file:
            values[end] = [(row["image"], row["value"]) for row in csv.DictReader(file)]
        pixels[end] = [file.read_bytes() for file in sorted(Path(f"results/{end}").rglob("*.png"))]
    assert len(values["pth"]) == len(pixels["pth"]) == 4
    assert values["pth"] == values["safetensors"] and pixels["pth"] == pixels["safetensors"]


def test_a_teacher_and_a_start_may_be_safetensors(dckd_options: Options) -> None:
    """With the default keys; the run is that of the same weights as .pth."""
    from kdsr.runtime.checkpoint import save_safetensors

    path = dckd_options["path"]
    student = build_network(dckd_options["network_g"]).state_dict()
    torch.save(student, "start.pth")
    path["init_from"] = "start.pth"
    assert run(train_entry, dckd_options | {"name": "pth"}) == 0
    for key, file in (("pretrain_network_t", "params"), ("pretrain_network_vqgan", "state_dict")):
        save_safetensors(torch.load(path[key], weights_only=True)[file], f"{key}.safetensors", {})
        path[key] = f"{key}.safetensors"
    save_safetensors(student, "start.safetensors", {})
    path["init_from"] = "start.safetensors"
    assert run(train_entry, dckd_options | {"name": "flat"}) == 0
    first, second = (
        torch.load(f"experiments/{name}/models/net_g_latest.pth", weights_only=True)["params"]
        for name in ("pth", "flat")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_torn_file_is_refused_before_anything_is_written(
    dckd_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("teacher.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    dckd_options["path"]["pretrain_network_t"] = "teacher.safetensors"
    assert run(train_entry, dckd_options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kdsr: error: path.pretrain_network_t: teacher.safetensors: cannot be read")
    assert not Path("experiments").exists()
