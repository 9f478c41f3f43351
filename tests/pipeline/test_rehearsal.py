"""Before anything is written, images of every validation or test set go through networks and metrics."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.data.resize import imresize
from kdsr.pipeline.rehearsal import LARGEST, _Image

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(options: Options) -> list[str]:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return ["-opt", "run.yml"]


def refused(entry: Any, options: Options, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of a refusal, which writes nothing."""
    before = set(Path().rglob("*"))
    assert entry.main([*write(options), *words]) == 2
    assert set(Path().rglob("*")) - before <= {Path("run.yml")}
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdsr: error")]


def test_set(options: Options) -> Options:
    """The options of a test of random weights on the validation set."""
    options = copy.deepcopy(options)
    torch.manual_seed(2)
    torch.save({"params": build_network(dict(options["network_g"])).state_dict()}, "student.pth")
    options["path"] = {"pretrain_network_g": "student.pth"}
    options["datasets"] = {"test_1": options["datasets"]["val"]}
    return {key: value for key, value in options.items() if key not in ("train", "logger")}


test_set.__test__ = False  # type: ignore[attr-defined]


def with_small_image(options: Options, photos: Path, side: int, key: str = "val") -> None:
    """Gives the set an image of side×side LQ pixels, which is not the first one."""
    for root, source, factor in (("dataroot_gt", "GT", 4), ("dataroot_lq", "LR_x4", 1)):
        folder = Path(key, source).absolute()
        folder.mkdir(parents=True)
        for path in (photos / source).iterdir():
            (folder / path.name).symlink_to(path)
        image = cv2.imread(str(photos / source / "cat.png"))[: side * factor, : side * factor]
        assert cv2.imwrite(str(folder / "small.png"), image)
        options["datasets"][key][root] = str(folder)


GREY = {
    "type": "SRVGGNetCompact",
    "num_in_ch": 1,
    "num_out_ch": 1,
    "num_feat": 4,
    "num_conv": 1,
    "upscale": 4,
}


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
@pytest.mark.parametrize("grey_network", [True, False])
def test_channels_that_the_network_does_not_take(
    run_options: Options, model: str, grey_network: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of one channel and a colour set, and the reverse."""
    run_options["model_type"] = model
    if grey_network:
        run_options["network_g"] = dict(GREY)
    else:
        run_options["network_g"] = {**GREY, "num_in_ch": 3, "num_out_ch": 3}
        run_options["datasets"]["val"]["color"] = "y"
    (line,) = refused(test_entry, test_set(run_options), capsys)
    cure = "set datasets.test_1.color: y" if grey_network else "remove datasets.test_1.color"
    assert cure in line and "astronaut.png" in line and "network_g (SRVGGNetCompact)" in line


def test_channels_that_only_the_output_shows(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """EDSR subtracts the mean of three channels, and so makes three of one."""
    run_options["datasets"]["val"]["color"] = "y"
    (line,) = refused(test_entry, test_set(run_options), capsys)
    assert "has 3 channels, the ground truth has 1; remove datasets.test_1.color" in line


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
@pytest.mark.parametrize("entry", [train_entry, test_entry])
def test_all_problems_of_all_sets_and_metrics_at_once(
    run_options: Options, photos: Path, entry: Any, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smallest image is not the first one; the sets and the metrics fail each for themselves."""
    run_options["model_type"] = model
    run_options["datasets"]["val_2"] = {**run_options["datasets"]["val"], "name": "again"}
    with_small_image(run_options, photos, 4, "val")
    with_small_image(run_options, photos, 2, "val_2")
    run_options["val"]["metrics"]["ssim"] = {"type": "calculate_ssim", "crop_border": 4}
    if entry is test_entry:
        datasets = {key.replace("val", "test"): run_options["datasets"][key] for key in ("val", "val_2")}
        run_options = test_set(run_options) | {"datasets": datasets}
    lines = refused(entry, run_options, capsys)
    found = sorted(line.split(": ")[2] for line in lines)
    assert found == ["val.metrics.psnr", "val.metrics.ssim", "val.metrics.ssim"]
    assert all("small.png" in line for line in lines)
    assert sum("8×8 pixels" in line and "again" in line for line in lines) == 2
    assert sum("16×16 pixels" in line and "SSIM needs 11×11" in line for line in lines) == 1


def test_niqe_of_small_images_without_ground_truth(
    run_options: Options, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["datasets"]["val"] = {
        "name": "mine", "type": "SingleImageDataset", "dataroot_lq": str(photos / "LR_x4"),
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    run_options["val"]["metrics"] = {"niqe": {"type": "calculate_niqe", "crop_border": 0}}
    (line,) = refused(train_entry, run_options, capsys)
    assert "val.metrics.niqe" in line and "astronaut.png of mine" in line and "NIQE needs 96×192" in line
    run_options["datasets"]["val"]["dataroot_lq"] = str(photos / "GT")
    assert train_entry.main(write(run_options)) == 0
    with open("experiments/run/metrics.csv", newline="", encoding="utf-8") as file:
        networks = [row["network"] for row in csv.DictReader(file)]
    assert networks == ["baseline"] * 4 + ["student"] * 4


@pytest.mark.parametrize("role", ["network_g", "network_t"])
def test_weights_that_are_not_finite(
    run_options: Options, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One NaN in the weights of what is tested, or of a teacher, blackens pictures or spoils them."""
    network = (
        run_options["network_g"] if role == "network_g" else {**run_options["network_g"], "num_block": 2}
    )
    weights = build_network(dict(network)).state_dict()
    weights["conv_last.bias"][1] = float("nan")
    torch.save({"params": weights}, "nan.pth")
    if role == "network_g":
        options = test_set(run_options)
        options["path"]["pretrain_network_g"] = "nan.pth"
        (line,) = refused(test_entry, options, capsys)
    else:
        run_options["network_t"] = network
        run_options["path"]["pretrain_network_t"] = "nan.pth"
        (line,) = refused(train_entry, run_options, capsys)
    assert f"output of {role} (EDSR) is not finite" in line and "astronaut.png" in line


def test_a_metric_that_fails_on_the_restored_image_alone_refuses_nothing(run_options: Options) -> None:
    """What an untrained student makes of an image may have no NIQE: black has none. Training is to change that."""
    run_options["datasets"]["val"]["dataroot_lq"] = run_options["datasets"]["val"]["dataroot_gt"]
    run_options["datasets"]["val"]["type"] = "LQImageDataset"
    del run_options["datasets"]["val"]["dataroot_gt"]
    run_options["val"]["metrics"] = {"niqe": {"type": "calculate_niqe", "crop_border": 0}}
    weights = {
        name: torch.zeros_like(value)
        for name, value in build_network(dict(run_options["network_g"])).state_dict().items()
    }
    weights["conv_last.bias"] -= 9.0
    torch.save({"params": weights}, "black.pth")
    run_options["path"]["pretrain_network_g"] = "black.pth"
    run_options["train"]["total_iter"] = 2
    # the validation after the training names the image, and the state is there for another metric
    run_options["val"]["val_freq"] = 1
    assert train_entry.main(write(run_options)) == 1
    assert Path("experiments/run/training_states/1.state").is_file()
    assert not Path("experiments/run/metrics.csv").exists()
    del run_options["val"]["metrics"]
    assert train_entry.main([*write(run_options), "--auto_resume"]) == 0


def test_the_rehearsal_changes_no_bit_of_the_training(run_options: Options) -> None:
    """The same training with validation sets and without them."""
    assert train_entry.main([*write(run_options | {"name": "with"})]) == 0
    del run_options["datasets"]["val"]
    assert train_entry.main([*write(run_options | {"name": "without"})]) == 0
    one, other = (
        torch.load(f"experiments/{name}/models/net_g_latest.pth", weights_only=True)["params"]
        for name in ("with", "without")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 2, 4]))
def test_of_a_large_image_a_corner_is_restored(height: int, width: int, scale: int) -> None:
    lq = torch.zeros(1).expand(1, 3, height, width)
    gt = torch.zeros(1).expand(1, 3, height * scale, width * scale)
    data = {"lq": lq, "gt": gt, "lq_path": ["a.png"]}
    dataset = nn.Module()
    dataset.opt = {"name": "set"}
    opt = {"scale": scale, "val": {}}
    patch = _Image(opt, "val", dataset, data, 0).patch()
    rows, columns = patch["lq"].shape[-2:]
    assert rows * columns <= LARGEST and patch["gt"].shape[-2:] == (rows * scale, columns * scale)
    assert min(rows, columns) == min(height, width, 128)  # what depends on the shorter side shows
    assert (rows, columns) == (height, width) or rows * columns > 0.9 * LARGEST


# -------------------------------------------------------------------------------------------- tests without weights


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
def test_a_test_needs_weights(run_options: Options, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = test_set(run_options) | {"model_type": model, "path": {}}
    (line,) = refused(test_entry, options, capsys)
    assert "path.pretrain_network_g: missing" in line and "--random-weights" in line
    assert test_entry.main([*write(options), "--random-weights"]) == 0
    (log,) = Path("results/run").glob("*.log")
    assert "WARNING: path.pretrain_network_g: missing" in log.read_text("utf-8")


def test_a_network_without_parameters_needs_none(run_options: Options) -> None:
    @ARCH_REGISTRY.register()
    class Enlarged(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x, scale_factor=4, mode="bicubic")

    try:
        options = test_set(run_options) | {"path": {}, "network_g": {"type": "Enlarged"}}
        assert test_entry.main(write(options)) == 0
        (log,) = Path("results/run").glob("*.log")
        assert "WARNING" not in log.read_text("utf-8")
    finally:
        ARCH_REGISTRY._obj_map.pop("Enlarged")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("of_all", "the output of network_g for an image depends on the other images of its batch"),
        ("of_one", "network_g fails on two images at once"),
        ("of_each", None),
    ],
)
def test_a_network_that_mixes_the_images_of_a_batch(
    run_options: Options, capsys: pytest.CaptureFixture[str], kind: str, problem: str | None
) -> None:
    class Levelled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind == "of_one":
                assert len(x) == 1
            level = x.mean() if kind == "of_all" else x.mean((1, 2, 3), keepdim=True)
            return nn.functional.interpolate(x - level + 0.5, scale_factor=4)

    ARCH_REGISTRY._obj_map["Levelled"] = Levelled
    try:
        options = test_set(run_options) | {"path": {}, "network_g": {"type": "Levelled"}}
        options["val"]["batch_size"] = 4
        if problem is None:
            assert test_entry.main(write(options)) == 0
            return
        (line,) = refused(test_entry, options, capsys)
        assert f"val.batch_size: {problem}" in line and "set it to 1" in line
        options["val"]["batch_size"] = 1
        assert test_entry.main(write(options)) == 0
    finally:
        del ARCH_REGISTRY._obj_map["Levelled"]


def test_training_has_no_flag_for_random_weights(run_options: Options) -> None:
    with pytest.raises(SystemExit):
        train_entry.main([*write(run_options), "--random-weights"])


# -------------------------------------------------------------------------------------------------- normalised sets


@pytest.mark.parametrize("tile", [{}, {"tile": 16, "tile_overlap": 8, "self_ensemble": True}])
def test_a_normalised_test_gives_what_one_without_gives(
    run_options: Options, photos: Path, tile: Options
) -> None:
    """A network that undoes the normalisation, works on images and normalises its output."""
    mean, std = [0.4, 0.5, 0.3], [0.2, 0.3, 0.25]

    @ARCH_REGISTRY.register()
    class Normalised(nn.Module):
        def __init__(self, shift: list, factor: list) -> None:
            super().__init__()
            self.shift, self.factor = (torch.tensor(values).view(1, -1, 1, 1) for values in (shift, factor))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            image = nn.functional.interpolate(x * self.factor + self.shift, scale_factor=4)
            return (image - self.shift) / self.factor

    values, pictures = [], []
    try:
        for name, given in (("plain", ([0.0] * 3, [1.0] * 3)), ("normalised", (mean, std))):
            options = test_set(run_options) | {"path": {}, "name": name}
            options["network_g"] = {"type": "Normalised", "shift": given[0], "factor": given[1]}
            if name == "normalised":
                options["datasets"]["test_1"].update(mean=mean, std=std)
            options["val"].update(save_img=True, **tile)
            assert test_entry.main(write(options)) == 0
            with open(f"results/{name}/metrics.csv", newline="", encoding="utf-8") as file:
                values.append([float(row["value"]) for row in csv.DictReader(file)])
            files = sorted(Path(f"results/{name}/visualization").rglob("*.png"))
            pictures.append(np.stack([cv2.imread(str(path)).astype(int) for path in files]))
    finally:
        ARCH_REGISTRY._obj_map.pop("Normalised")
    assert values[1] == pytest.approx(values[0], abs=1e-3)
    assert np.abs(pictures[1] - pictures[0]).max() <= 1
    bicubic = imresize(cv2.imread(str(photos / "LR_x4/cat.png")), 4)
    assert np.abs(pictures[1][1] - bicubic).mean() < 20  # the picture of a cat, and not of normalised values


@pytest.mark.parametrize("entry", [train_entry, test_entry])
def test_the_metrics_of_a_foreign_model_are_tried(
    run_options: Options, photos: Path, entry: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """How it restores images is not known, whether its metrics fail on the smallest one is."""
    with_small_image(run_options, photos, 4)
    run_options["val"]["metrics"]["ssim"] = {"type": "calculate_ssim", "crop_border": 4}
    options = run_options if entry is train_entry else test_set(run_options)
    options["model_type"] = "ForeignModel"
    MODEL_REGISTRY._obj_map["ForeignModel"] = type("ForeignModel", (SRModel,), {})
    try:
        (line,) = refused(entry, options, capsys)
        del options["val"]["metrics"]["ssim"]
        assert entry.main(write(options)) == 0
    finally:
        del MODEL_REGISTRY._obj_map["ForeignModel"]
    assert "val.metrics.ssim: calculate_ssim cannot measure" in line and "small.png" in line


class _FailingSet(PairedImageDataset):
    def __getitem__(self, index: int) -> Options:
        raise TypeError("no such crop")


class _NamelessSet(PairedImageDataset):
    def __getitem__(self, index: int) -> Options:
        return {key: value for key, value in super().__getitem__(index).items() if key != "lq_path"}


@pytest.mark.parametrize("entry", [train_entry, test_entry])
@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (_FailingSet, "_FailingSet fails at its first images: TypeError: no such crop"),
        (_NamelessSet, "_NamelessSet gives items without lq_path"),
    ],
)
def test_a_set_of_ones_own_is_named_when_it_fails(
    run_options: Options, entry: Any, cls: type, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run_options if entry is train_entry else test_set(run_options)
    key = "val" if entry is train_entry else "test_1"
    options["datasets"][key]["type"] = cls.__name__
    DATASET_REGISTRY._obj_map[cls.__name__] = cls
    try:
        (line,) = refused(entry, options, capsys)
    finally:
        del DATASET_REGISTRY._obj_map[cls.__name__]
    assert f"datasets.{key}: {problem}" in line
