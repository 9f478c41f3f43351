"""docs/architecture.md: how few files a step runs through, and how few classes a model descends from."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from basicsr.models import build_model
from basicsr.models.sr_model import SRModel

import kdsr
from kdsr.models.dckd_model import DCKDModel
from kdsr.models.kd_model import KDModel
from kdsr.models.vqgan_model import VQGANModel
from kdsr.tools.bench_options import prepare

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(kdsr.__file__).parent
SMALL = [
    *(f"network_{key}:{change}" for key in "gt" for change in ("depths=[1]", "num_heads=[2]", "embed_dim=8")),
    "network_vqgan:ddconfig:ch=32",
    "network_vqgan:ddconfig:ch_mult=[1, 1, 1, 1, 1]",
    "datasets:train:gt_size=64",
]


def files_of_a_step(model: Any, iteration: int) -> set[str]:
    """The files of the package whose functions run in a training step."""
    files = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in file.parents:
            files.add(file.relative_to(PACKAGE).as_posix())

    batch = {"lq": torch.rand(2, 3, 16, 16), "gt": torch.rand(2, 3, 64, 64)}
    sys.setprofile(note)
    try:
        model.feed_data(batch)
        model.optimize_parameters(iteration)
    finally:
        sys.setprofile(None)
    return files


def test_a_step_of_dckd_runs_through_the_files_that_the_page_lists() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in listed] == [*range(1, len(listed) + 1)]
    assert len(listed) <= 12 and f"runs through {len(listed)} files" in page
    model = build_model(prepare(ROOT / "options/train/DCKD_SwinIR_x4.yml", [*SMALL, "train:step=1"]))
    assert files_of_a_step(model, 1) == {file for _, file in listed}


def test_a_preset_is_two_steps_from_basicsr() -> None:
    assert DCKDModel.__bases__ == (KDModel,)
    assert SRModel in KDModel.__bases__ and SRModel in VQGANModel.__bases__
