"""Small sets of GT/LQ pairs, and loaders of them as a training makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data import build_dataloader, build_dataset

from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset

Options = Callable[..., dict[str, Any]]
SCALE = 2


def write_pair(root: Path, name: str, gt: tuple[int, int], lq: tuple[int, int], value: int) -> None:
    """Writes a GT/LQ pair of noise, so that every crop is its own."""
    rng = np.random.default_rng(value)
    for folder, size in (("GT", gt), ("LQ", lq)):
        (root / folder).mkdir(exist_ok=True)
        cv2.imwrite(str(root / folder / f"{name}.png"), rng.integers(0, 256, (*size, 3), np.uint8))


def loader(opt: dict[str, Any], seed: int = 1, epoch: int = 0, ratio: int = 3) -> Any:
    dataset = SeededDataset(build_dataset(opt), seed)
    sampler = PositionSampler(dataset, 1, 0, ratio)
    sampler.set_epoch(epoch)
    return build_dataloader(dataset, opt, num_gpu=0, sampler=sampler, seed=seed)


def batches(opt: dict[str, Any], **kwargs: Any) -> list[torch.Tensor]:
    return [torch.cat([b["gt"].flatten(1), b["lq"].flatten(1)], dim=1) for b in loader(opt, **kwargs)]
