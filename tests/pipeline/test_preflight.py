"""What is tried before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY

from kdsr import train as train_entry


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(options: dict[str, Any], override: str, capsys: pytest.CaptureFixture[str]) -> str:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml", "--force_yml", override]) == 2
    assert [path.name for path in Path().iterdir()] == ["run.yml"]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network_g:num_feat=1000000", "network_g: its weights"),
        ("network_g:num_block=100000", "network_g: more than 20,000 layers"),
        (
            "val:metrics:psnr:crop_border=-1.5",
            "val.metrics.psnr.crop_border: expected a whole number, got -1.5",
        ),
        ("val:metrics:psnr:crop_border=48", "nothing is left of 96×96 pixels without crop_border 48"),
        ("val:metrics:psnr:input_order=XYZ", "val.metrics.psnr.input_order: 'XYZ' is not HWC"),
        (
            "datasets:train:num_worker_per_gpu=100000",
            "datasets.train.num_worker_per_gpu: 100000 is above 256",
        ),
        (
            "datasets:train:dataset_enlarge_ratio=.inf",
            "datasets.train.dataset_enlarge_ratio: inf is not finite",
        ),
        ("train:optim_g:lr=.nan", "nan"),
        ("train:optim_g:lr=fast", "train.optim_g.lr: expected a number, got the text 'fast'"),
        (
            "train:pixel_opt={type: ContrasLoss}",
            "train.pixel_opt.type: ContrasLoss does not compare two batches of images (TypeError: ",
        ),
        ("logger:wandb={project: mine}", "logger.use_tb_logger: must be true for logger.wandb.project"),
    ],
)
def test_slipped_numbers_cost_a_line_and_no_machine(
    run_options: dict[str, Any], override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(run_options, override, capsys)


def test_a_teacher_that_is_larger_than_the_machine(
    dckd_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml", "--force_yml", "network_t:num_feat=1000000"]) == 2
    assert "network_t: its weights need more than" in capsys.readouterr().err
    assert not Path("experiments").exists()


NETWORKS = """
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 48, 1), nn.PixelShuffle(4))

@ARCH_REGISTRY.register()
class Unbuilt(Base):
    def __init__(self):
        raise ValueError("no numbers")

@ARCH_REGISTRY.register()
class Failing(Base):
    def forward(self, x):
        raise TypeError("no such size")

@ARCH_REGISTRY.register()
class Listing(Base):
    def forward(self, x):
        return [self.body(x)]

@ARCH_REGISTRY.register()
class Untrained(nn.Module):
    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=4)
"""


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("Unbuilt", "network_g: Unbuilt cannot be built: ValueError: no numbers ({file}, line 13)"),
        (
            "Failing",
            "the first step fails: TypeError: no such size ({file}, line 18)",
        ),
        ("Listing", "network_g: Listing gives a list; expected one tensor, the images"),
        ("Untrained", "network_g: Untrained has no parameters to train"),
    ],
)
def test_a_network_of_ones_own_that_does_not_work(
    run_options: dict[str, Any],
    network: str,
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the option, or the line of the user's own file."""
    file = tmp_path_factory.mktemp("mine") / "preflight_networks.py"
    file.write_text(NETWORKS, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    run_options.update(import_path=[str(file.parent)], import_modules=["preflight_networks"])
    try:
        error = refused(run_options, f"network_g={{type: {network}}}", capsys)
    finally:
        for name in ("Unbuilt", "Failing", "Listing", "Untrained"):
            ARCH_REGISTRY._obj_map.pop(name, None)
        sys.modules.pop("preflight_networks", None)
    # above it may be lines of a log that another test has left open
    assert error.splitlines()[-1] == f"kdsr: error: {message.format(file=file)}"


DATA = """
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from kdsr.data.dataset_options import PairedImageOptions

class Base(PairedImageDataset):
    options = PairedImageOptions

@DATASET_REGISTRY.register()
class RaisingSet(Base):
    def __getitem__(self, index):
        raise TypeError("no such crop")

@DATASET_REGISTRY.register()
class UnevenSet(Base):
    def __getitem__(self, index):
        return {"lq": torch.zeros(3, 8 + index, 8), "gt": torch.zeros(3, 32, 32)}

@DATASET_REGISTRY.register()
class TupleSet(Base):
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), torch.zeros(3, 32, 32)

@DATASET_REGISTRY.register()
class OtherKeysSet(Base):
    def __getitem__(self, index):
        return {"input": torch.zeros(3, 8, 8), "target": torch.zeros(3, 32, 32)}
"""


@pytest.fixture
def _own_sets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_sets.py").write_text(DATA)
    before = dict(DATASET_REGISTRY._obj_map)
    yield
    DATASET_REGISTRY._obj_map.clear()
    DATASET_REGISTRY._obj_map.update(before)
    sys.modules.pop("own_sets", None)


@pytest.mark.usefixtures("_own_sets")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RaisingSet", "RaisingSet fails at its first images: TypeError: no such crop ("),
        ("UnevenSet", "UnevenSet fails at its first images: RuntimeError: "),
        ("TupleSet", "TupleSet gives items that KDModel cannot take: a list; expected a dict"),
        (
            "OtherKeysSet",
            "OtherKeysSet gives items that KDModel cannot take: the keys input, target; expected",
        ),
    ],
)
def test_data_that_fail_are_not_taken_for_the_model(
    run_options: dict[str, Any], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["import_modules"] = "own_sets"
    run_options["datasets"]["train"]["type"] = kind
    Path("run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 2
    error = capsys.readouterr().err
    assert f"kdsr: error: datasets.train: {message}" in error and "cannot be built" not in error
    assert not Path("experiments").exists()
