"""Training patches: cut from decoded images, collated as whole numbers, converted to float on the device."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import torch
from basicsr.data.transforms import augment
from basicsr.utils import bgr2ycbcr, img2tensor
from torch import Tensor
from torch.utils.data import default_collate

from kdsr.data.image_files import Pixels

IMAGES = ("lq", "gt")  # keys of the images in an item or batch
FLIPS = "flips"  # key of the flips that the device makes: horizontal, vertical, transposition
_WHITE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def crop_together(images: Sequence[Pixels], side: int, scale: int) -> list[Pixels]:
    """Copies of the same random square of several images, drawn as BasicSR's ``paired_random_crop`` does.

    Args:
        images: The LQ image, then any number of images ``scale`` times as large.
        side: Side of the LQ patch.
        scale: Of the other images.

    Raises:
        ValueError: The sizes do not match, or LQ is smaller than the patch.
    """
    height, width = images[0].values.shape[:2]
    factors = [1] + [scale] * (len(images) - 1)
    for image, factor in zip(images, factors, strict=True):
        if image.values.shape[:2] != (height * factor, width * factor):
            raise ValueError(f"{image.values.shape[:2]} is not {scale} times {(height, width)}")
    if min(height, width) < side:
        raise ValueError(f"LQ {(height, width)} is smaller than the patch {side}")
    top, left = random.randint(0, height - side), random.randint(0, width - side)
    rows, columns = (
        [slice(start * factor, (start + side) * factor) for factor in factors] for start in (top, left)
    )
    return [
        image._replace(values=image.values[place].copy())
        for image, place in zip(images, zip(rows, columns, strict=True), strict=True)
    ]


def draw_flips(hflip: bool, rotation: bool) -> tuple[bool, bool, bool]:
    """Whether to flip horizontally, to flip vertically, and to transpose; with the draws of BasicSR's ``augment``."""
    return augment([], hflip, rotation, return_status=True)[1]


def flip(patches: Sequence[Pixels], flips: tuple[bool, bool, bool]) -> list[Pixels]:
    """Flips and transposes patches, all alike."""
    horizontal, vertical, transposed = flips
    changed = []
    for patch in patches:
        values = patch.values
        if horizontal or vertical:
            values = cv2.flip(values, -1 if horizontal and vertical else int(horizontal))
        if transposed:
            values = cv2.transpose(values)  # a view would be copied slowly
        changed.append(patch._replace(values=values.reshape(*values.shape[:2], -1)))
    return changed


def as_tensors(patches: Sequence[Pixels], opt: Mapping[str, Any], whole: bool = False) -> list[Tensor]:
    """(H, W, C), BGR -> (C, H, W), RGB or Y (``color: y``), normalised by ``mean`` and ``std``.

    With ``whole`` they stay whole numbers where :func:`to_device` can convert them.
    """
    mean, std, luma = opt.get("mean"), opt.get("std"), opt.get("color") == "y"
    whole = whole and not luma and mean is None and std is None
    arrays = [
        patch.values if whole and patch.white == 2 ** (8 * patch.values.itemsize) - 1 else patch.as_float()
        for patch in patches
    ]
    if luma:
        arrays = [bgr2ycbcr(array, y_only=True)[..., None] for array in arrays]
    tensors = img2tensor(arrays, bgr2rgb=True, float32=False)
    if mean is not None or std is not None:
        from torchvision.transforms.functional import normalize  # takes as long to import as torch

        tensors = [normalize(tensor, mean, std) for tensor in tensors]
    return tensors


def collate(items: list[Any]) -> Any:
    """torch's ``default_collate``; images of unequal depth become float32 first."""
    for key in IMAGES if isinstance(items[0], dict) else ():
        if len({item[key].dtype for item in items if isinstance(item.get(key), Tensor)}) > 1:
            items = [{**item, key: _as_float(item[key])} for item in items]
    return default_collate(items)


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves the images of a batch to the device, then converts them to float32 in [0, 1] and flips them there.

    The values are those that BasicSR computes on the CPU, to the bit. A float image is only moved.
    """
    if not isinstance(batch, dict):
        return batch
    flips = batch.pop(FLIPS, None)
    for key in IMAGES:
        if isinstance(image := batch.get(key), Tensor):
            image = _as_float(image.to(device, non_blocking=True))
            if flips is not None:
                image = _flipped(image, flips.to(device, non_blocking=True))
            batch[key] = image
    return batch


def _as_float(image: Tensor) -> Tensor:
    white = _WHITE.get(image.dtype)
    if white is None:
        return image
    # A tensor on the device: by a Python number CUDA multiplies with its rounded reciprocal.
    return image.float().div_(torch.full((), white, device=image.device))


def _flipped(images: Tensor, flips: Tensor) -> Tensor:
    """(B, C, N, N) with (B, 3) flips; without a synchronisation with the host."""
    changes = (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2).contiguous())
    for index, change in enumerate(changes):
        images = torch.where(flips[:, index].view(-1, 1, 1, 1), change(images), images)
    return images
