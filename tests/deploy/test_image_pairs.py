"""The images of a distillation: found, paired, held out and written."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kdsr.data.resize import imresize
from kdsr.deploy.image_pairs import Pair, find, hold_out, read_bgr, samples, write
from kdsr.runtime.errors import OptionError

ONE = {"images": None, "gt": None, "lq": None, "no_gt": False}


def picture(file: Path, height: int = 40, width: int = 48, seed: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(abs(hash(str(file))) if seed is None else seed)
    cv2.imwrite(str(file), random.integers(0, 255, (height, width, 3), dtype=np.uint8))
    return file


def names(pairs: list[Pair]) -> list[str]:
    return [pair.file.name for pair in pairs]


def nothing(image: np.ndarray) -> np.ndarray:
    raise AssertionError("the teacher is not needed")


def test_lq_images_are_made_and_some_are_held_out(tmp_path: Path) -> None:
    for index in range(25):
        picture(tmp_path / f"photos/{index:02}.png")
    picture(tmp_path / "photos/below/tiny.png", 20, 90)
    found = find(tmp_path / "photos", None, None, False, scale=2, patch=32)
    assert found.made and found.has_gt and len(found.val) == 2 and len(found.train) == 23
    assert names([Pair(None, file) for file in found.left_out]) == ["tiny.png"]
    assert not set(names(found.train)) & set(names(found.val))
    write(found, tmp_path / "out/data", nothing)
    for part, pairs, ending in (("train", found.train, "_s001"), ("val", found.val, "")):
        assert sorted(file.name for file in (tmp_path / "out/data" / part / "GT").iterdir()) == [
            f"{pair.file.stem}{ending}.png" for pair in pairs
        ]
        for pair in pairs:
            folder, name = tmp_path / "out/data" / part, f"{pair.file.stem}{ending}.png"
            gt, lq = (cv2.imread(str(folder / kind / name)) for kind in ("GT", "LQ"))
            assert np.array_equal(gt, cv2.imread(str(pair.file)))
            assert np.array_equal(lq, imresize(gt, 0.5))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


def test_pairs_are_linked_under_equal_names(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"gt/a/{index}.png", 40, 40)
        picture(tmp_path / f"lq/{index}x2.bmp", 20, 20)
    found = find(None, tmp_path / "gt", tmp_path / "lq", False, scale=2, patch=32)
    assert not found.made and found.has_gt
    write(found, tmp_path / "data", nothing)
    for part, pairs in (("train", found.train), ("val", found.val)):
        for pair in pairs:
            assert pair.lq is not None and pair.gt is not None
            for kind, file in (("GT", pair.gt), ("LQ", pair.lq)):
                link = tmp_path / "data" / part / kind / pair.file.name
                assert link.resolve() == file.resolve()


def test_without_ground_truth_the_teacher_stands_in(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"lq/{index}.bmp", 20, 20)
    for given in ({"images": tmp_path / "lq", "no_gt": True}, {"lq": tmp_path / "lq"}):
        found = find(**{**ONE, **given}, scale=2, patch=32)
        assert not found.has_gt and not found.made
        write(found, tmp_path / "data", lambda image: imresize(image, 2))
        (made,) = (tmp_path / "data/val/teacher").iterdir()
        assert made.name == found.val[0].file.name
        assert np.array_equal(read_bgr(made), imresize(read_bgr(found.val[0].file), 2))
    assert find(tmp_path / "lq", None, None, False, scale=1, patch=16).has_gt is False


def test_copies_and_sub_images_stay_together(tmp_path: Path) -> None:
    pairs = [Pair(None, picture(tmp_path / f"{index:03}.png")) for index in range(40)]
    pairs += [
        Pair(None, picture(tmp_path / f"photo{index}_s00{part}.png"))
        for index in range(9)
        for part in range(3)
    ]
    pairs += [Pair(None, picture(tmp_path / f"copy{index}.png", seed=index)) for index in range(20)]
    pairs += [Pair(None, picture(tmp_path / f"other{index}.png", seed=index)) for index in range(20)]
    train, val = hold_out(pairs)
    assert sorted(train + val) == sorted(pairs) and len({pair.file.stem[:4] for pair in val}) > 2
    contents = [{pair.file.read_bytes() for pair in part} for part in (train, val)]
    assert not contents[0] & contents[1]
    stems = [{pair.file.stem.partition("_s")[0] for pair in part} for part in (train, val)]
    assert not stems[0] & stems[1]


def test_samples_of_pairs_show_the_same_part(tmp_path: Path) -> None:
    for index in range(2):
        lq = picture(tmp_path / f"lq/{index}.png", 101, 87)
        gt = np.repeat(np.repeat(cv2.imread(str(lq)), 3, 0), 3, 1)
        (tmp_path / "gt").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"gt/{index}.png"), gt)
    ((lq_part, gt_part),) = samples(
        find(None, tmp_path / "gt", tmp_path / "lq", False, scale=3, patch=30), side=20
    )
    assert gt_part is not None and lq_part.shape == (20, 20, 3)
    assert np.array_equal(gt_part[::3, ::3], lq_part)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --images FOLDER"),
        ({"images": "photos", "lq": "photos"}, "give --images FOLDER"),
        ({"gt": "photos"}, "give --images FOLDER"),
        ({"gt": "photos", "lq": "photos", "no_gt": True}, "give --images FOLDER"),
        ({"images": "none"}, "--images: There is no folder"),
        ({"images": "empty"}, "--images: There is no image in"),
        ({"images": "small"}, "--images: 3 images, 3 of them smaller than a training patch"),
        ({"images": "one"}, "--images: 1 images"),
        ({"images": "damaged"}, "--images: Cannot read image .*damaged/a.png"),
        ({"gt": "photos", "lq": "photos"}, "the teacher's scale is 2"),
        ({"gt": "photos", "lq": "one"}, "has no LQ image of its name"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, given: dict[str, object], message: str) -> None:
    for index in range(3):
        picture(tmp_path / f"photos/{index}.png")
        picture(tmp_path / f"small/{index}.png", 20, 20)
    picture(tmp_path / "one/0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"no image")
    folders = {key: tmp_path / value if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(OptionError, match=message):
        find(**{**ONE, **folders}, scale=2, patch=32)


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"photos/{index}.png")
    found = find(tmp_path / "photos", None, None, False, scale=2, patch=32)
    found.train[0].file.write_bytes(b"damaged now")
    with pytest.raises(OptionError, match="damaged or not an image"):
        write(found, tmp_path / "out/data", nothing)
    assert not list((tmp_path / "out").iterdir())
