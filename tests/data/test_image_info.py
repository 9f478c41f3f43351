"""Headers of images, and the pixels of every data set, against the written values."""

from __future__ import annotations

import io
import itertools
import struct
import tempfile
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import basicsr.test
import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset
from basicsr.utils import imfrombytes as basicsr_imfrombytes
from basicsr.utils.lmdb_util import LmdbMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from kdsr.data.checks import check_dataset
from kdsr.data.image_files import UnreadableImage, decode_color, read_image
from kdsr.data.image_info import UnfitImage, probe
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.pipeline import seam

Pixels = NDArray[Any]
TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes().removeprefix(b"Exif\0\0")


def with_chunk(png: bytes, name: bytes, content: bytes, late: bool = False) -> bytes:
    """A PNG with an additional chunk, after IHDR or before IEND."""
    at = len(png) - 12 if late else 33
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:at] + chunk + png[at:]


def with_orientation(tiff: bytes, orientation: int) -> bytes:
    """A little-endian TIFF with a new directory at its end that has the tag."""
    (at,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, at)
    entries = [tiff[at + 2 + 12 * number :][:12] for number in range(count)]
    entries = [entry for entry in entries if entry[:2] != struct.pack("<H", 274)]
    entries.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory


def lossless(form: str, pixels: Pixels, orientation: int) -> bytes:
    if form == "webp":
        image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
        image.save(file := io.BytesIO(), "WEBP", lossless=True, exact=True, exif=exif(orientation))
        return file.getvalue()
    ending = ".png" if form.endswith("png") else f".{form}"
    content = cv2.imencode(ending, pixels)[1].tobytes()
    if ending == ".png":
        return with_chunk(content, b"eXIf", exif(orientation), late=form == "late_png")
    return with_orientation(content, orientation) if form == "tif" else content


@st.composite
def images(draw: st.DrawFn) -> tuple[bytes, Pixels, int, bool, str]:
    """A random file; its upright BGR pixels, bits, whether it has alpha, its extension."""
    form = draw(st.sampled_from(["png", "late_png", "tif", "ppm", "webp"]))
    bits = 8 if form == "webp" else draw(st.sampled_from([8, 16]))
    channels = draw(st.sampled_from({"ppm": [3], "webp": [3]}.get(form, [1, 3, 4])))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    orientation = 1 if form == "ppm" else draw(st.sampled_from(range(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    pixels = rng.integers(0, 1 << bits, (height, width, channels), np.uint16).astype(f"uint{bits}")
    upright = TURNS[orientation](pixels[..., :3] if channels > 1 else np.repeat(pixels, 3, axis=2))
    content = lossless(form, pixels[..., 0] if channels == 1 else pixels, orientation)
    return content, upright, bits, channels == 4, form.removeprefix("late_")


@settings(deadline=None, derandomize=True, max_examples=250)
@given(images())
def test_header_and_pixels_are_those_of_the_file(made: tuple[bytes, Pixels, int, bool, str]) -> None:
    content, upright, bits, has_alpha, form = made
    info = probe(content)
    assert info.size == upright.shape[:2]
    assert (info.bits, info.white) == (bits, (1 << bits) - 1)
    assert info.losses == (("alpha",) if has_alpha else ())
    decoded = decode_color(content, "")
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, upright.astype(np.float32) / np.float32(info.white))
    if bits == 8:  # the bits of runs that there were before
        assert np.array_equal(decoded, basicsr_imfrombytes(content, float32=True))


@pytest.fixture(scope="module")
def data_seam() -> Iterator[None]:
    with seam._replaced(basicsr.test, {}, None):  # type: ignore[arg-type]
        yield


@pytest.mark.usefixtures("data_seam")
@settings(deadline=None, derandomize=True, max_examples=40)
@given(images())
def test_every_data_set_gives_the_pixels_of_the_file(made: tuple[bytes, Pixels, int, bool, str]) -> None:
    content, upright, bits, has_alpha, form = made
    expected = upright[..., ::-1].astype(np.float32) / np.float32((1 << bits) - 1)
    with tempfile.TemporaryDirectory() as root:
        folder, database = Path(root, "images"), Path(root, "images.lmdb")
        folder.mkdir()
        (folder / f"a.{form}").write_bytes(content)
        maker = LmdbMaker(str(database), map_size=2**20)
        maker.put(content, "a", (*upright.shape[:2], 3))
        maker.close()
        for kind, place in itertools.product(
            ("PairedImageDataset", "SingleImageDataset", "LQImageDataset", "ImageFolderDataset"),
            (folder, database),
        ):
            opt = {
                "name": "s", "type": kind, "phase": "val", "scale": 1, "dataroot_gt": str(place),
                "dataroot_lq": str(place), "io_backend": {"type": "lmdb" if place == database else "disk"},
            }  # fmt: skip
            found: list[str] = []
            assert check_dataset(opt, 1, "val", found) == []
            assert any("alpha" in text for text in found) or not has_alpha or form == "tif", found
            assert any("8 bits" in text for text in found) == (bits > 8) or form == "tif", found
            item = SeededDataset(build_dataset(opt))[0]
            for role in ("lq", "gt"):
                assert role not in item or np.array_equal(item[role].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("white", [1, 15, 100, 255, 1023, 4095, 65535])
def test_netpbm_values_are_those_of_their_white(white: int, plain: bool) -> None:
    """12-bit sensor data with a correct header; OpenCV returns the stored values."""
    values = np.linspace(0, white, 12).astype(int)
    body = (
        (" ".join(map(str, values)) + "\n").encode()
        if plain
        else values.astype(">u2" if white > 255 else "u1").tobytes()
    )
    content = f"P{2 if plain else 5}\n4 3\n{white}\n".encode() + body
    assert probe(content).bits == white.bit_length()
    np.testing.assert_allclose(
        decode_color(content, "")[..., 0].ravel(), values / white, atol=1 / 255 if plain else 1e-6
    )


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_avif(bits: int) -> None:
    flags = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    content = cv2.imencode(".avif", np.full((64, 64, 3), (1 << bits) - 1, np.uint16), flags)[1].tobytes()
    assert probe(content).bits == bits
    np.testing.assert_allclose(decode_color(content, ""), 1, atol=1e-2)


@pytest.mark.parametrize("limit", [1, 100, 1 << 30])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_pillows_limit_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, limit: int
) -> None:
    photograph = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3))
    file = tmp_path / "image"
    photograph.save(file, form, exif=b"Exif\0\0" + exif(6))
    before = read_image(file)
    assert before.shape[:2] == probe(file).size == (60, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(file).size == (60, 40) and np.array_equal(read_image(file), before)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_large_images_are_not_decoded() -> None:
    small = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
    header = struct.pack(">II", 20000, 10000) + small[24:29]
    large = small[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small[33:]
    tracemalloc.start()
    assert probe(with_chunk(large, b"eXIf", exif(6))).size == (20000, 10000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.slow
def test_a_real_image_of_182_megapixels(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    Image.new("1", (14000, 13000)).save(file, exif=b"Exif\0\0" + exif(6))
    assert probe(file).size == read_image(file).shape == (14000, 13000)


@pytest.mark.parametrize(("values", "ending"), [
    (np.ones((4, 4, 3), np.float32), ".tif"), (np.ones((4, 4), np.float64), ".tif"),
    (np.ones((4, 4), np.float32), ".hdr"), (np.ones((4, 4, 3), np.float32), ".pfm"),
])  # fmt: skip
def test_floating_point_images_are_refused_before_and_in_the_run(
    tmp_path: Path, values: Pixels, ending: str
) -> None:
    file = tmp_path / f"a{ending}"
    assert cv2.imwrite(str(file), values)
    opt = {"type": "SingleImageDataset", "dataroot_lq": str(tmp_path), "io_backend": {"type": "disk"}}
    (problem,) = check_dataset(opt, 1, "test")
    assert problem.startswith(f"dataroot_lq: cannot read image {file}")
    with pytest.raises(UnreadableImage, match="a"):
        decode_color(file.read_bytes(), "a")
    with pytest.raises(OSError, match="convert it|not an image|damaged"):
        probe(file)


def test_signed_tiff_is_refused() -> None:
    content = cv2.imencode(".tif", np.zeros((4, 4), np.int16))[1].tobytes()
    with pytest.raises(UnfitImage, match="signed values of 16 bits are not supported"):
        probe(content)
    with pytest.raises(UnreadableImage, match="Cannot read image a: values of type int16"):
        decode_color(content, "a")


@pytest.mark.parametrize(("name", "save", "loss"), [
    ("a.png", {"mode": "RGBA"}, "has an alpha channel"), ("a.png", {"mode": "LA"}, "has an alpha channel"),
    ("a.png", {"mode": "P", "transparency": 1}, "has an alpha channel"),
    ("a.tif", {"mode": "RGB", "frames": True}, "has more than one frame"),
    ("a.gif", {"mode": "RGB", "frames": True}, "has more than one frame"),
    ("a.png", {"mode": "RGB", "frames": True}, "has more than one frame"),
    ("a.jpg", {"mode": "CMYK"}, "has CMYK colours"), ("a.tif", {"mode": "CMYK"}, "has CMYK colours"),
    ("a.jpg", {"mode": "RGB"}, ""), ("a.png", {"mode": "L"}, ""), ("a.png", {"mode": "1"}, ""),
    ("a.avif", {"mode": "RGB", "exif": b"Exif\0\0" + exif(6)}, "has an orientation that is not applied"),
])  # fmt: skip
def test_losses_are_reported_once(tmp_path: Path, name: str, save: dict[str, Any], loss: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    save = dict(save)
    first, second = (Image.fromarray(image).convert("RGB") for image in (noise, 255 - noise))
    mode, frames = save.pop("mode"), save.pop("frames", False)
    more = {"save_all": True, "append_images": [second.convert(mode)]} if frames else {}
    first.convert(mode).save(tmp_path / name, **save, **more)
    opt = {"type": "SingleImageDataset", "dataroot_lq": str(tmp_path), "io_backend": {"type": "disk"}}
    found: list[str] = []
    assert check_dataset(opt, 1, "test", found) == []
    if loss:
        assert (
            len(found) == 1
            and found[0].startswith(f"dataroot_lq: 1 image {loss}")
            and found[0].endswith(name)
        )
    else:
        assert found == []
