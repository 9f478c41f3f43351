"""A warning about a teacher that is worse than no network, and none about a better one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdsr import train as train_entry
from kdsr.models.evaluation import ImageResult
from kdsr.models.teacher_check import teacher_warnings

Options = dict[str, Any]
RLFN = {"type": "RLFN", "upscale": 4}


def log_of(name: str) -> str:
    (log,) = Path(f"experiments/{name}").glob("train_*.log")
    return log.read_text("utf-8")


@pytest.fixture
def rlfn_options(
    run_options: Options, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Options:
    """A published ×4 RLFN as the teacher; Set5 to validate on."""
    monkeypatch.chdir(tmp_path)
    data = shared / "data"
    run_options["network_t"] = dict(RLFN)
    run_options["path"]["pretrain_network_t"] = str(data / "weights/RLFN/rlfn_x4.pth")
    run_options["path"]["param_key_t"] = None
    run_options["datasets"]["val"].update(
        name="Set5", dataroot_gt=str(data / "Set5/GT_x4"), dataroot_lq=str(data / "Set5/LR_x4")
    )
    run_options["train"].update(
        total_iter=1, logits_opt={"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    )
    return run_options


def train(options: Options) -> str:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 0
    return log_of(options["name"])


@pytest.mark.parametrize("measured", [pytest.param(True, marks=pytest.mark.slow), False])
def test_published_weights_with_the_wrong_range(rlfn_options: Options, measured: bool) -> None:
    """RLFN's are for images in [0, 255]; with 1 it gives 27.66 dB where bicubic interpolation gives 28.40."""
    rlfn_options["val"]["teacher"] = measured  # else the images of the rehearsal serve
    message = "THE TEACHER IS WORSE THAN BICUBIC INTERPOLATION on Set5"
    rlfn_options["network_t"]["img_range"] = 1.0
    log = train(rlfn_options | {"name": "wrong"})
    assert log.count(message) == 1 and "network_t.img_range" in log and "val.teacher_check" in log
    assert message not in train(rlfn_options | {"name": "right", "network_t": dict(RLFN)})
    rlfn_options["val"]["teacher_check"] = False
    assert message not in train(rlfn_options | {"name": "meant"})
    if measured:
        assert "(5 images): psnr 27.6" in log and "(bicubic 28.4" in log
        assert "# psnr: 27.6" in log
        with open("experiments/right/metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["iteration"] == "0"]
        means = [
            np.mean([float(row["value"]) for row in rows if row["network"] == network])
            for network in ("baseline", "teacher")
        ]
        assert means == pytest.approx([28.41, 32.24], abs=0.03)


@pytest.mark.parametrize("swapped", [True, False])
def test_ground_truth_and_input_swapped_at_scale_1(
    run_options: Options, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: bool
) -> None:
    """A teacher that removes an offset adds one to what has none. The folders' names say nothing."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder).mkdir()
    for path in (photos / "GT").iterdir():
        image = cv2.imread(str(path))
        cv2.imwrite(f"one/{path.name}", image)
        cv2.imwrite(f"two/{path.name}", np.clip(image.astype(int) + 20, 0, 255).astype(np.uint8))
    roots = (
        {"dataroot_gt": "two", "dataroot_lq": "one"}
        if swapped
        else {"dataroot_gt": "one", "dataroot_lq": "two"}
    )
    for dataset in run_options["datasets"].values():
        dataset.update(roots)

    @ARCH_REGISTRY.register()
    class Shift(nn.Conv2d):
        def __init__(self, by: float) -> None:
            super().__init__(3, 3, 1)
            with torch.no_grad():
                self.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
                self.bias.fill_(by / 255)

    torch.save({"params": Shift(-19.0).state_dict()}, "teacher.pth")
    run_options.update(
        scale=1, network_g={"type": "Shift", "by": -9.0}, network_t={"type": "Shift", "by": 0.0}
    )
    run_options["path"]["pretrain_network_t"] = "teacher.pth"
    run_options["train"]["total_iter"] = 1
    try:
        log = train(run_options)
    finally:
        ARCH_REGISTRY._obj_map.pop("Shift")
    assert ("THE TEACHER IS WORSE THAN ITS INPUT" in log) == swapped


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=5),
    st.sampled_from(["higher", "lower", None]),
    st.booleans(),
)
def test_means_are_compared_in_the_direction_of_the_metric(
    values: list[tuple[float, float]], better: str | None, checked: bool
) -> None:
    metric = {"type": "calculate_psnr", "crop_border": 0, **({"better": better} if better else {})}
    opt = {"scale": 2, "val": {"metrics": {"m": metric}, "teacher_check": checked}}
    results = [ImageResult(i, str(i), {"m": own}, {"m": base}) for i, (own, base) in enumerate(values)]
    # one that has no baseline does not count
    results.append(ImageResult(99, "x", {"m": -1e6 if better != "lower" else 1e6}))
    own, base = np.mean(values, axis=0)
    worse = own > base if better == "lower" else own < base
    assert len(teacher_warnings({"set": results}, opt)) == int(worse and checked)


def test_metrics_without_reference_and_sets_without_metrics_say_nothing() -> None:
    opt = {"val": {"metrics": {"m": {"type": "calculate_niqe", "crop_border": 0}}}}
    assert teacher_warnings({"set": [ImageResult(0, "a", {"m": 1.0}, {"m": 9.0})]}, opt) == []
    assert teacher_warnings({"set": []}, {"val": None}) == []
