"""Image files: pixels and sizes of turned photographs."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from kdsr.data.image_files import image_size, read_image

PHOTOGRAPH = skimage.data.chelsea()[:40, :64]


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, ending: str, grey: bool) -> None:
    """Pixels as Pillow turns them and sizes as OpenCV's own loader and ours state them."""
    image = Image.fromarray(PHOTOGRAPH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    (image.convert("L") if grey else image).save(path, exif=exif)
    pixels = read_image(path)
    with Image.open(io.BytesIO(path.read_bytes())) as file:  # a mapped grey TIFF would be turned twice
        expected = np.asarray(ImageOps.exif_transpose(file))
    if expected.ndim == 3:
        expected = expected[..., ::-1]
    elif pixels.ndim == 3:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (16 if ending in ("jpg", "webp") else 0)
    loaded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)  # as BasicSR does
    assert image_size(path) == pixels.shape[:2] == loaded.shape[:2]
