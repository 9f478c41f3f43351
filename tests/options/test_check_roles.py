"""Folders that look swapped; normalisation that cannot be, or differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.options.check import check
from kdsr.options.check_roles import swap_warning
from kdsr.options.files import load

ROOT = Path(__file__).resolve().parents[2]
QUICK = settings(deadline=None, derandomize=True, max_examples=200)
CLEAN = ["GT", "gt", "target", "targets", "clean", "sharp", "norain", "clear", "groundtruth", "HQ", "gt_sub"]
DEGRADED = ["LQ", "input", "rain", "rainy", "blur", "noisy25", "hazy", "lq", "inputs", "noise_15", "low"]
NEUTRAL = [
    "datasets",
    "Rain13K",
    "GoPro",
    "train",
    "test",
    "Test100",
    "blurset",
    "a",
    "b7",
    "photos",
    "RESIDE-IN",
]


def folders(role: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(role)


@QUICK
@given(
    st.lists(folders(NEUTRAL + CLEAN + DEGRADED), max_size=4),
    folders(CLEAN), folders(DEGRADED), st.lists(folders(NEUTRAL), max_size=2), st.sampled_from([None, 1]),
)  # fmt: skip
def test_roles_follow_from_the_folders_that_differ(
    common: list[str], clean: str, degraded: str, below: list[str], scale: int | None
) -> None:
    """Whatever the folders above are called, the right way round says nothing and the wrong one names both keys."""
    gt, lq = ("/".join([*common, name, *below]) for name in (clean, degraded))
    assert swap_warning({"dataroot_gt": gt, "dataroot_lq": lq}, "datasets.train", scale) is None
    message = swap_warning({"dataroot_gt": lq, "dataroot_lq": gt}, "datasets.train", scale)
    assert (
        message is not None
        and f"datasets.train.dataroot_gt: {lq}" in message
        and f"datasets.train.dataroot_lq: {gt}" in message
    )
    assert swap_warning({"dataroot_gt": lq, "dataroot_lq": gt}, "datasets.train", 2) is None  # the sizes tell


@QUICK
@given(st.lists(folders(NEUTRAL), min_size=1, max_size=4), st.lists(folders(NEUTRAL), min_size=1, max_size=4))
def test_names_that_say_nothing_raise_no_alarm(one: list[str], other: list[str]) -> None:
    assert swap_warning({"dataroot_gt": "/".join(one), "dataroot_lq": "/".join(other)}, "p", 1) is None


@pytest.mark.parametrize(
    ("gt", "lq"),
    [
        ("UIEB/reference-890", "UIEB/raw-890"),
        ("enhanced", "original"),
        ("level/low_noise", "level/high_noise"),  # noise of either kind
        ("same/folder", "same/folder"),
    ],
)
def test_names_that_mean_either_raise_no_alarm(gt: str, lq: str) -> None:
    assert swap_warning({"dataroot_gt": gt, "dataroot_lq": lq}, "p", 1) is None


@pytest.mark.parametrize("file", sorted(ROOT.glob("options/t*/*.yml")), ids=lambda path: path.stem)
def test_no_shipped_file_raises_an_alarm(file: Path) -> None:
    options = load(str(file))
    for key, dataset in (options.get("datasets") or {}).items():
        for scale in (1, options.get("scale")):
            assert dataset is None or swap_warning(dataset, key, scale) is None


def test_the_warning_is_the_option_checks(run_options: dict[str, Any], tmp_path: Path) -> None:
    run_options.update(scale=1, network_g={"type": "PReNet"})
    run_options["train"]["ema_decay"] = 0
    photos = Path(run_options["datasets"]["val"]["dataroot_gt"])
    for name in ("rain", "norain"):
        (tmp_path / name).symlink_to(photos)
    for dataset in run_options["datasets"].values():
        dataset.update(dataroot_gt=str(tmp_path / "rain"), dataroot_lq=str(tmp_path / "norain"))
    assert check(run_options, True, warnings := []) == []
    assert [line.split(".dataroot_gt")[0] for line in warnings] == ["datasets.train", "datasets.val"]


def test_normalisation_that_differs_between_the_sets(run_options: dict[str, Any]) -> None:
    given = {"mean": [0.5] * 3, "std": [1.0] * 3}
    run_options["train"]["ema_decay"] = 0
    run_options["datasets"]["train"].update(given)
    assert check(run_options, True, warnings := []) == []
    assert len(warnings) == 1 and warnings[0].startswith("datasets.val.mean, std: differ from datasets.train")
    run_options["datasets"]["val"].update(given)
    assert check(run_options, True, warnings := []) == [] == warnings
    run_options["model_type"] = "SRModel"
    assert check(run_options, True, warnings := []) == []
    assert len(warnings) == 1 and "SRModel measures and saves normalised images" in warnings[0]
