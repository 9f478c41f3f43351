"""Pairs by name: BasicSR's own result for any names, folders kept, and an LMDB's subset."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from basicsr.data import data_util
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.data.checks import check_dataset
from kdsr.data.pairing import keep_listed, paired_paths_from_folder, paired_paths_from_meta_info_file
from kdsr.prepare.pair_writer import write_lmdb

KEYS = ["lq", "gt"]
STEMS = st.text(alphabet="abx0._-é", min_size=1, max_size=6)
FILES = (
    st.tuples(STEMS, st.sampled_from([".png", ".jpg", ""]))
    .map("".join)
    .filter(lambda n: n not in (".", ".."))
)
FOLDERS = st.sampled_from(["", "seq1/", "seq2/", "seq1/deep/"])
TEMPLATES = st.sampled_from(["{}", "{}x4", "lq_{}", "{0}.{0}"])


def write(root: Path, names: list[str]) -> str:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def result(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except AssertionError as error:
        return str(error)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    names=st.lists(FILES, unique=True, max_size=8),
    template=TEMPLATES,
    lost=st.booleans(),
    more=st.lists(FILES, max_size=2),
)
def test_folders_pair_as_in_basicsr(names: list[str], template: str, lost: bool, more: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        partners = [f"{template.format(Path(name).stem)}{Path(name).suffix}" for name in names]
        gt = write(Path(root, "GT"), names)
        lq = write(Path(root, "LQ"), partners[lost:] + more)
        expected, found = (
            result(pair, [lq, gt], KEYS, template)
            for pair in (data_util.paired_paths_from_folder, paired_paths_from_folder)
        )
        if isinstance(expected, list):  # in the order of the file system
            expected.sort(key=lambda paths: paths["gt_path"])
        assert found == expected


@settings(deadline=None, derandomize=True, max_examples=40)
@given(names=st.lists(FILES, min_size=1, max_size=8), template=TEMPLATES)
def test_a_list_of_names_pairs_as_in_basicsr(names: list[str], template: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        listing = Path(root, "list.txt")
        listing.write_text("".join(f"{name} (480,480,3)\n" for name in names), encoding="utf-8")
        arguments = ([f"{root}/LQ", f"{root}/GT"], KEYS, str(listing), template)
        assert paired_paths_from_meta_info_file(*arguments) == data_util.paired_paths_from_meta_info_file(
            *arguments
        )


def write_image(file: Path, side: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.zeros((side, side, 3), np.uint8))


def listed(root: Path, names: list[str], lq_names: list[str], template: str) -> dict[str, Any]:
    """Options of a paired set of scale 2 whose GT images are in a list."""
    for name, partner in zip(names, lq_names, strict=True):
        write_image(root / "GT" / name, 16)
        write_image(root / "LQ" / partner, 8)
    (root / "list.txt").write_text("".join(f"{name} (16,16,3)\n" for name in names))
    return {
        "name": "pairs", "type": "PairedImageDataset", "dataroot_gt": str(root / "GT"),
        "dataroot_lq": str(root / "LQ"), "io_backend": {"type": "disk"}, "gt_size": 16, "filename_tmpl": template,
        "meta_info_file": str(root / "list.txt"),
    }  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    places=st.lists(
        st.tuples(FOLDERS, st.sampled_from(["0001", "0002", "a.b"])), unique=True, min_size=1, max_size=6
    ),
    template=TEMPLATES,
)
def test_names_with_folders_are_found_in_the_same_folders(
    places: list[tuple[str, str]], template: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        names = [f"{folder}{stem}.png" for folder, stem in places]
        partners = [f"{folder}{template.format(stem)}.png" for folder, stem in places]
        opt = listed(Path(root), names, partners, template)
        assert check_dataset(opt, 2, "train") == []
        pairs = paired_paths_from_meta_info_file(
            [opt["dataroot_lq"], opt["dataroot_gt"]], KEYS, opt["meta_info_file"], template
        )
        assert [pair["gt_path"] for pair in pairs] == [f"{root}/GT/{name}" for name in names]
        assert [pair["lq_path"] for pair in pairs] == [f"{root}/LQ/{partner}" for partner in partners]
        Path(root, "LQ", partners[-1]).unlink()
        (problem,) = check_dataset(opt, 2, "train")
        assert problem.startswith("dataroot_lq: ") and partners[-1] in problem


def test_lq_images_without_the_folders_of_the_gt_images(tmp_path: Path) -> None:
    """As in BasicSR, if the names without folders are unique."""
    opt = listed(tmp_path, ["seq1/a.png", "seq2/b.png"], ["a.png", "b.png"], "{}")
    assert check_dataset(opt, 2, "train") == []
    arguments = ([opt["dataroot_lq"], opt["dataroot_gt"]], KEYS, opt["meta_info_file"], "{}")
    assert paired_paths_from_meta_info_file(*arguments) == data_util.paired_paths_from_meta_info_file(
        *arguments
    )
    opt = listed(tmp_path / "same", ["seq1/a.png", "seq2/a.png"], ["a.png", "a.png"], "{}")
    (problem,) = check_dataset(opt, 2, "train")
    assert "would be the partner of seq1/a.png and of seq2/a.png" in problem


def test_a_single_image_may_be_listed_with_its_folder(tmp_path: Path) -> None:
    opt = listed(tmp_path, ["seq1/a.png"], ["seq1/a.png"], "{}")
    single = {**opt, "type": "SingleImageDataset"}
    assert check_dataset(single, 2, "val") == []
    (tmp_path / "list.txt").write_text("seq1/b.png (16,16,3)\n")
    (problem,) = check_dataset(single, 2, "val")
    assert problem == f"meta_info_file: {tmp_path}/LQ has no seq1/b.png"


@pytest.mark.parametrize("template", ["x4", "", "{:.0}", "{:.1}"])
def test_a_template_that_loses_the_name(tmp_path: Path, template: str) -> None:
    """All GT images would silently share a partner."""
    opt = listed(tmp_path, ["a.png", "b.png"], ["a.png", "b.png"], "{}")
    for file in ("x4.png", ".png"):
        write_image(tmp_path / "LQ" / file, 8)
    (problem,) = check_dataset({**opt, "filename_tmpl": template}, 2, "train")
    assert problem.startswith("filename_tmpl: ")


class _Set:
    """A stand-in for BasicSR's data sets with ``paths`` only."""

    def __init__(self, paths: list[Any]) -> None:
        self.paths = paths


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.sets(st.sampled_from("abcde")), st.booleans())
def test_a_list_selects_a_part_of_an_lmdb(wanted: set[str], paired: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        listing = Path(root, "list.txt")
        listing.write_text("".join(f"{name}.png (16,16,3)\n" for name in sorted(wanted)))
        opt = {"io_backend": {"type": "lmdb"}, "meta_info_file": str(listing)}
        dataset = _Set([{"lq_path": key, "gt_path": key} if paired else key for key in "abcde"])
        keep_listed(dataset, opt)
        kept = [path["gt_path"] if paired else path for path in dataset.paths]
        assert kept == sorted(wanted)


def test_a_list_for_an_lmdb_is_checked(tmp_path: Path) -> None:
    opt = listed(tmp_path, ["a.png", "b.png", "c.png"], ["a.png", "b.png", "c.png"], "{}")
    for key, side in (("dataroot_gt", 16), ("dataroot_lq", 8)):
        target = Path(opt[key]).with_suffix(".lmdb")
        write_lmdb(Path(opt[key]), target, dict.fromkeys("abc", (side, side, 3)))
        opt[key] = str(target)
    opt["io_backend"] = {"type": "lmdb"}
    assert check_dataset(opt, 2, "train") == []
    Path(opt["meta_info_file"]).write_text("b.png (16,16,3)\n")
    assert check_dataset(opt, 2, "train") == []
    Path(opt["meta_info_file"]).write_text("b.png (16,16,3)\nd.png (16,16,3)\n")
    (problem,) = check_dataset(opt, 2, "train")
    assert problem == f"meta_info_file: {opt['dataroot_gt']} has no d"
    (problem,) = check_dataset({**opt, "meta_info_file": None, "filename_tmpl": "{}x2"}, 2, "train")
    assert problem.startswith("filename_tmpl: '{}x2' is for folders")
