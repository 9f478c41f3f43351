"""Image files: pixels and sizes of rotated photographs, file trees, names of results."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kdsr.data.checks import check_dataset
from kdsr.data.image_files import list_folder, list_images, read_image
from kdsr.data.image_info import probe
from kdsr.data.image_roots import result_name

PHOTOGRAPH = skimage.data.chelsea()[:40, :64]


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, ending: str, grey: bool) -> None:
    """Pixels as rotated by Pillow, sizes as in OpenCV's loader."""
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
    assert probe(path).size == pixels.shape[:2] == loaded.shape[:2]


SEGMENT = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=8
).filter(lambda text: not text.startswith(".") and len(text.encode()) < 60)
ENDING = st.sampled_from((".png", ".PNG", ".jpg", ".jp2", ".txt", "", ".tar.gz"))
TREES = st.dictionaries(
    st.lists(SEGMENT, min_size=1, max_size=3).map("/".join), ENDING, min_size=1, max_size=8
)


def grow(root: Path, tree: dict[str, str], content: bytes) -> set[str]:
    """Writes files and returns their relative paths, without those in conflict with another."""
    written = set()
    for stem, ending in tree.items():
        file = root / f"{stem}{ending}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
        written.add(str(file.relative_to(root)))
    return written


@settings(deadline=None, derandomize=True, max_examples=40)
@given(TREES, TREES, SEGMENT)
def test_every_file_of_a_tree_is_listed_or_left_out(
    here: dict[str, str], there: dict[str, str], link: str
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, other = Path(place, "root"), Path(place, "other")
        root.mkdir(), other.mkdir()
        expected, behind = grow(root, here, b"x"), grow(other, there, b"x")
        (other / "back").symlink_to(root)  # must not be followed for ever
        if not (root / link).exists():
            (root / link).symlink_to(other)
            expected |= {f"{link}/{name}" for name in behind if not name.startswith("back/")}
        (root / ".hidden.png").write_bytes(b"x")
        (root / "dead link.png").symlink_to(Path(place, "nowhere"))
        (root / "loop.png").symlink_to(root / "loop.png")
        listing = list_folder(root)
        assert not set(listing.images) & set(listing.left_out)
        assert {*listing.images, *listing.left_out} == expected | {"dead link.png", "loop.png"}
        assert set(listing.images) == {
            name for name in expected if Path(name).suffix.lower() in (".png", ".jpg", ".jp2")
        }
        flat = list_folder(root, recursive=False)
        assert set(flat.images) == {name for name in expected if "/" not in name}
        names = {name.split("/")[0] for name in expected} | {"dead link.png", "loop.png"}
        assert {*flat.images, *flat.left_out} == names


@settings(deadline=None, derandomize=True, max_examples=80)
@given(TREES)
def test_results_have_the_names_of_their_files(tree: dict[str, str]) -> None:
    tree = {stem: ".png" for stem in tree}
    image = cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1].tobytes()
    with tempfile.TemporaryDirectory() as root:
        written = grow(Path(root), tree, image)
        opt = {"type": "LQImageDataset", "dataroot_lq": f"{root}/", "io_backend": {"type": "disk"}}
        assert check_dataset(opt, 1, "test") == []
        paths = [str(path) for path in list_images(root)]
        assert {f"{result_name(path, opt['dataroot_lq'])}.png" for path in paths} == written
        assert [Path(result_name(path, root)).name for path in paths] == [Path(path).stem for path in paths]
        again = Path(root, sorted(written)[0]).with_suffix(".jpg")  # the same name with another ending
        again.write_bytes(image)
        (problem,) = check_dataset(opt, 1, "test")
        assert str(again) in problem and str(again.with_suffix(".png")) in problem
        assert check_dataset(opt | {"gt_size": 1}, 1, "train") == []


@pytest.mark.parametrize(("path", "root", "name"), [
    ("/data/a.png", "/data", "a"), ("/data/a.b.png", "/data", "a.b"), ("/data/s/a.png", "/data/", "s/a"),
    ("data/../data/s/a.png", "data", "s/a"), ("/else/s/a.png", "/data", "a"), ("/database/a.png", "/data", "a"),
    ("/data//s/./a.png", "/data", "s/a"), ("/a.png", "/", "a"), ("/data", "/data", "image"),
    ("/", "x.lmdb", "image"), ("item 3", "/data", "item 3"), ("/data/s/a.png", None, "a"),
    ("a", "x.lmdb", "a"), ("s/a", "x.lmdb", "s/a"),
    ("/etc/a", "x.lmdb", "etc/a"), ("../../a", "x.lmdb", "a"),
])  # fmt: skip
def test_result_name(path: str, root: str | None, name: str) -> None:
    assert result_name(path, root) == name
