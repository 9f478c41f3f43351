"""check_dataset: problems of a data set's files."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data import build_dataset

from kdsr.data import image_roots
from kdsr.data.checks import check_dataset
from kdsr.prepare.pair_writer import write_lmdb


def write(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    root.mkdir(exist_ok=True)
    for name, size in sizes.items():
        cv2.imwrite(str(root / f"{name}.png"), np.zeros((*size, 3), np.uint8))


@pytest.fixture
def opt(tmp_path: Path) -> dict[str, Any]:
    """Three pairs at scale 2."""
    write(tmp_path / "GT", dict.fromkeys("abc", (20, 24)))
    write(tmp_path / "LQ", dict.fromkeys("abc", (10, 12)))
    return {
        "name": "pairs", "type": "PairedImageDataset", "dataroot_gt": str(tmp_path / "GT"),
        "dataroot_lq": str(tmp_path / "LQ"), "io_backend": {"type": "disk"}, "gt_size": 16,
        "use_hflip": True, "use_rot": True,
    }  # fmt: skip


def to_lmdb(opt: dict[str, Any]) -> dict[str, Any]:
    """The same pairs as LMDBs."""
    made = opt | {"io_backend": {"type": "lmdb"}}
    for key in ("dataroot_gt", "dataroot_lq"):
        folder = Path(opt[key])
        target = folder.with_suffix(".lmdb")
        shapes = {file.stem: cv2.imread(str(file)).shape for file in folder.iterdir()}
        write_lmdb(folder, target, shapes)
        made[key] = str(target)
    return made


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize("phase", ["train", "val"])
def test_a_valid_set(opt: dict[str, Any], phase: str) -> None:
    assert check_dataset(opt, 2, phase) == []
    assert check_dataset(opt | {"phase": phase}, 2) == []
    assert check_dataset(to_lmdb(opt), 2, phase) == []
    assert len(build_dataset(opt | {"phase": phase, "scale": 2})) == 3  # BasicSR thinks so, too


def test_missing_and_empty_folder(opt: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    problems = check_dataset(
        opt | {"dataroot_gt": "absent", "dataroot_lq": str(tmp_path / "empty")}, 2, "train"
    )
    assert problems == [
        "dataroot_gt: there is no folder absent", f"dataroot_lq: there is no image in {tmp_path / 'empty'}",
    ]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [
    (lambda root: (root / "meta_info.txt").unlink(), "has no meta_info.txt"),
    (lambda root: (root / "data.mdb").unlink(), "has no data.mdb"),
    (lambda root: (root / "meta_info.txt").write_text(""), "is empty"),
    (shutil.rmtree, "there is no LMDB"),
])  # fmt: skip
def test_incomplete_lmdb(opt: dict[str, Any], damage: Any, message: str) -> None:
    opt = to_lmdb(opt)
    damage(Path(opt["dataroot_lq"]))
    problem = only(check_dataset(opt, 2, "train"))
    assert problem.startswith("dataroot_lq: ") and message in problem and opt["dataroot_lq"] in problem


def test_backend_and_name_disagree(opt: dict[str, Any]) -> None:
    problems = check_dataset(opt | {"io_backend": {"type": "lmdb"}}, 2, "val")
    assert len(problems) == 2 and all("must end in .lmdb" in problem for problem in problems)
    problems = check_dataset(to_lmdb(opt) | {"io_backend": {"type": "disk"}}, 2, "val")
    assert len(problems) == 2 and all("set io_backend.type: lmdb" in problem for problem in problems)


@pytest.mark.parametrize("lmdb", [False, True])
def test_names_that_do_not_pair(opt: dict[str, Any], tmp_path: Path, lmdb: bool) -> None:
    (tmp_path / "LQ" / "b.png").rename(tmp_path / "LQ" / "z.png")
    made = to_lmdb(opt) if lmdb else opt
    assert "LQ" in (problem := only(check_dataset(made, 2, "train"))) and "has no b" in problem


def test_counts_that_do_not_pair(opt: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "GT" / "b.png").unlink()
    assert "GT has no counterpart of b.png" in only(check_dataset(opt, 2, "train"))


def test_filename_template(opt: dict[str, Any], tmp_path: Path) -> None:
    for file in list((tmp_path / "LQ").iterdir()):
        file.rename(file.with_stem(f"{file.stem}x2"))
    assert "has no a.png, b.png, c.png" in only(check_dataset(opt, 2, "train"))
    assert check_dataset(opt | {"filename_tmpl": "{}x2"}, 2, "train") == []


@pytest.mark.parametrize("template", ["{}{}", "{name}", "{", "{0.absent}", "", None])
def test_invalid_filename_template(opt: dict[str, Any], template: Any) -> None:
    problem = only(check_dataset(opt | {"filename_tmpl": template}, 2, "train"))
    assert problem.startswith(f"filename_tmpl: {template!r} must be like")


def test_empty_lists(opt: dict[str, Any], tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("\n")
    made = opt | {"meta_info_file": str(listing)}
    assert only(check_dataset(made, 2, "train")) == f"meta_info_file: {listing} names no image"
    listing.write_bytes("grün.png".encode("latin-1"))
    assert only(check_dataset(made, 2, "train")) == f"meta_info_file: cannot read {listing}: not UTF-8 text"
    made = to_lmdb(opt)
    (Path(made["dataroot_lq"]) / "meta_info.txt").write_bytes(b"\xff.png (10,12,3) 1\n")
    problem = only(check_dataset(made, 2, "train"))
    assert problem.startswith("dataroot_lq: cannot read") and problem.endswith("not UTF-8 text")


def test_header_with_too_many_pixels(opt: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "LQ" / "a.png"
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)
    problem = f"dataroot_lq: cannot read image {file}: 60000x60000 pixels are more than OpenCV decodes"
    assert only(check_dataset(opt, 2, "val")) == problem


@pytest.mark.parametrize("multiple", [0, -4])
def test_multiple_of(tmp_path: Path, multiple: int) -> None:
    write(tmp_path / "GT", {"a": (20, 24)})
    folder = {"type": "ImageFolderDataset", "dataroot_gt": str(tmp_path / "GT"), "multiple_of": multiple}
    assert only(check_dataset(folder, 1, "val")).startswith(f"multiple_of: {multiple} must be")
    assert check_dataset(folder | {"multiple_of": 4}, 1, "val") == []


def test_meta_info_file(opt: dict[str, Any], tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    opt["meta_info_file"] = str(listing)
    assert "cannot read" in check_dataset(opt, 2, "train")[0]
    (tmp_path / "LQ" / "c.png").unlink()
    listing.write_text("a.png (20,24,3)\nb.png (20,24,3)\n")
    assert check_dataset(opt, 2, "train") == []
    listing.write_text("a.png (20,24,3)\nq.png (20,24,3)\n")
    assert only(check_dataset(opt, 2, "train")) == f"meta_info_file: {tmp_path / 'GT'} has no q.png"


@pytest.mark.parametrize("lmdb", [False, True])
def test_sizes_that_do_not_match_the_scale(opt: dict[str, Any], tmp_path: Path, lmdb: bool) -> None:
    write(tmp_path / "GT", {"b": (21, 24), "c": (22, 24)})
    made = to_lmdb(opt) if lmdb else opt
    train, val = only(check_dataset(made, 2, "train")), only(check_dataset(made, 2, "val"))
    assert "b" in train and "(21x24) do not match scale 2; 1 more pairs" in train
    assert "(22x24) do not match scale 2" in val and "more" not in val  # one pixel more is cropped


def test_unreadable_image(opt: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "LQ" / "a.png").write_bytes(b"no image")
    assert only(check_dataset(opt, 2, "val")) == f"dataroot_lq: cannot read image {tmp_path / 'LQ' / 'a.png'}"


def test_patch(opt: dict[str, Any], tmp_path: Path) -> None:
    assert "gt_size: 22 is larger than" in only(check_dataset(opt | {"gt_size": 22}, 2, "train"))
    assert only(check_dataset(opt | {"gt_size": 15}, 2, "train")).endswith(
        "15 is not a multiple of the scale 2"
    )
    assert check_dataset(opt | {"gt_size": 22}, 2, "val") == []
    write(tmp_path / "GT", {"b": (12, 24)})
    write(tmp_path / "LQ", {"b": (6, 12)})
    assert f"{tmp_path / 'GT' / 'b.png'} (12x24);" in only(check_dataset(opt, 2, "train"))


def test_exif_orientation_counts(opt: dict[str, Any], tmp_path: Path) -> None:
    """A rotated photograph has the decoded size, not the stored one."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for folder, size in (("GT", (20, 24)), ("LQ", (10, 12))):
        shutil.rmtree(tmp_path / folder)
        (tmp_path / folder).mkdir()
        Image.new("RGB", size).save(
            tmp_path / folder / "a.jpg", exif=exif if folder == "GT" else Image.Exif()
        )
    assert cv2.imread(str(tmp_path / "GT" / "a.jpg")).shape == (20, 24, 3)
    assert "(20x24) do not match" in only(check_dataset(opt, 2, "val"))


def test_large_sets_are_sampled(opt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_roots, "MOST_FILES", 2)
    write(tmp_path / "LQ", {"c": (3, 3)})
    assert check_dataset(opt, 2, "val") == []  # a and b are checked
    write(tmp_path / "LQ", {"b": (3, 3)})
    assert "b.png" in only(check_dataset(opt, 2, "val"))


def test_single_and_folder_sets(opt: dict[str, Any], tmp_path: Path) -> None:
    single = {"type": "SingleImageDataset", "dataroot_lq": opt["dataroot_lq"], "io_backend": {"type": "disk"}}
    assert check_dataset(single, 4, "test") == []
    assert "there is no folder x" in only(check_dataset(single | {"dataroot_lq": "x"}, 4, "test"))
    folder = {"type": "ImageFolderDataset", "dataroot_gt": str(tmp_path), "gt_size": 10}
    assert check_dataset(folder, 1, "train") == []  # recursive
    assert "gt_size: 11 is larger than" in only(check_dataset(folder | {"gt_size": 11}, 1, "train"))
    assert "gt_size: is required" in only(check_dataset(folder | {"gt_size": None}, 1, "train"))
    assert check_dataset({"type": "VideoTestDataset", "dataroot_gt": "x"}, 1, "val") == []


def damage(opt: dict[str, Any], *names: str) -> None:
    """Removes LQ images: the key in an LMDB, the content on disk."""
    root = Path(opt["dataroot_lq"])
    for name in names:
        if root.suffix == ".lmdb":
            with lmdb.open(str(root), map_size=2**20) as env, env.begin(write=True) as writing:
                writing.delete(name.encode())
        else:
            (root / f"{name}.png").write_bytes(b"no image")


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_unreadable_images_are_warnings_where_they_are_skipped(opt: dict[str, Any], backend: str) -> None:
    made = to_lmdb(opt) if backend == "lmdb" else opt
    damage(made, "b")
    skipping = made | {"on_bad_image": "skip"}
    shown = f"{made['dataroot_lq']}: b" if backend == "lmdb" else f"{made['dataroot_lq']}/b.png"
    for options, phase in ((made, "train"), (made, "val"), (skipping, "val")):
        warnings: list[str] = []
        problem = only(check_dataset(options, 2, phase, warnings))
        assert problem.startswith(f"dataroot_lq: cannot read image {shown}") and not warnings
        assert ("which its meta_info.txt names" in problem) == (backend == "lmdb")
    assert check_dataset(skipping, 2, "train", warnings) == []
    assert only(warnings).startswith(f"dataroot_lq: cannot read image {shown}; on_bad_image: skip")
    damage(made, "a", "c")
    assert "cannot read image" in only(check_dataset(skipping, 2, "train", [])), "nothing is left to train on"


def test_other_problems_stay_problems_where_bad_images_are_skipped(
    opt: dict[str, Any], tmp_path: Path
) -> None:
    skipping = opt | {"on_bad_image": "skip"}
    write(tmp_path / "LQ", {"b": (9, 12)})
    assert "do not match scale" in only(check_dataset(skipping, 2, "train"))
    (tmp_path / "LQ" / "b.png").unlink()
    assert "has no b.png" in only(check_dataset(skipping, 2, "train"))


def test_truncated_lmdb(opt: dict[str, Any]) -> None:
    made = to_lmdb(opt)
    data = Path(made["dataroot_gt"], "data.mdb")
    data.write_bytes(data.read_bytes()[:-5000])
    assert only(check_dataset(made, 2, "val")).startswith(
        f"dataroot_gt: The LMDB {made['dataroot_gt']} is truncated"
    )
    data.write_bytes(b"rubbish" * 3000)
    assert only(check_dataset(made, 2, "val")).startswith("dataroot_gt: Cannot open the LMDB")


@pytest.mark.parametrize("line", ["", "   ", "no name of a file", "d (20,24,3) 1"])
def test_line_of_meta_info_without_an_image(opt: dict[str, Any], line: str) -> None:
    made = to_lmdb(opt)
    meta = Path(made["dataroot_lq"], "meta_info.txt")
    meta.write_text(f"{meta.read_text()}{line}\n")
    assert "dataroot_lq: line 4 of" in only(check_dataset(made, 2, "train"))


def test_empty_line_of_meta_info_file(opt: dict[str, Any], tmp_path: Path) -> None:
    """BasicSR would read the folder as an image."""
    (tmp_path / "names.txt").write_text("a.png (20,24,3)\n\nb.png (20,24,3)\n")
    listing = opt | {"meta_info_file": str(tmp_path / "names.txt")}
    assert only(check_dataset(listing, 2, "train")).startswith("meta_info_file: line 2 of")


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.mkdir ['{0}']\n", "__import__('os').mkdir('{0}').png\n", "$(mkdir {0}).png (1,1,3) 1\n",
    "{{x.__class__.__init__.__globals__}}.png\n",
])  # fmt: skip
def test_lists_of_names_are_text(opt: dict[str, Any], tmp_path: Path, text: str) -> None:
    """Code in a list of names is not run; a missing name is an error."""
    target = tmp_path / "ran"
    names = text.format(target)
    (tmp_path / "names.txt").write_text(names)
    assert check_dataset(opt | {"meta_info_file": str(tmp_path / "names.txt")}, 2, "train")
    made = to_lmdb(opt)
    Path(made["dataroot_gt"], "meta_info.txt").write_text(names)
    assert check_dataset(made, 2, "train")
    assert not target.exists()


def warned(opt: dict[str, Any], phase: str = "val") -> list[str]:
    found: list[str] = []
    assert check_dataset(opt, 2, phase, found) == []
    return found


def test_skipped_files_are_named(opt: dict[str, Any], tmp_path: Path) -> None:
    assert warned(opt) == []
    root = tmp_path / "LQ"
    single = {"type": "SingleImageDataset", "dataroot_lq": str(root), "io_backend": {"type": "disk"}}
    write(root / "seq1", {"d": (10, 12)})
    (root / "nowhere.png").symlink_to("absent.png")
    text = f"dataroot_lq: left out of {root} (2; folders, or broken links): nowhere.png, seq1"
    assert warned(single) == warned(opt) == [text]
    listing = tmp_path / "list.txt"
    listing.write_text("a.png\nseq1/d.png\n")
    assert warned(single | {"meta_info_file": str(listing)}) == []  # what is listed is what is wanted
    nested = single | {"type": "LQImageDataset"}
    (root / "seq1" / "e").write_bytes((root / "a.png").read_bytes())
    (root / "notes.txt").write_text("no image")
    assert warned(nested) == [
        f"dataroot_lq: left out of {root} (3; files without an image's ending, or broken links): "
        "notes.txt, nowhere.png, seq1/e; seq1/e can be decoded: give such files an image's ending"
    ]
    assert len(build_dataset(nested | {"name": "n", "phase": "val", "scale": 2})) == 4


def test_losses_of_a_sampled_set(
    opt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        cv2.imwrite(str(tmp_path / "LQ" / f"{name}.png"), np.zeros((10, 12, 4), np.uint16))
    text = "dataroot_lq: 3 images have an alpha channel, which is dropped: a.png, b.png, c.png"
    depth = "more than 8 bits per channel, all of which are read; results have 8"
    assert warned(opt, "train") == [text]
    assert warned(opt) == [text, f"dataroot_lq: 3 images have {depth}: a.png, b.png, c.png"]
    monkeypatch.setattr(image_roots, "MOST_FILES", 2)
    sampled = "dataroot_lq: 2 images of the 2 checked have an alpha channel, which is dropped: a.png, b.png"
    assert warned(opt, "train") == [sampled]
    assert warned(to_lmdb(opt), "train") == [sampled.replace(".png", "")]


def test_unsupported_images_have_a_reason(opt: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "LQ" / "b.png"
    file.write_bytes(cv2.imencode(".tif", np.zeros((10, 12), np.int16))[1].tobytes())
    problem = f"dataroot_lq: cannot read image {file}: signed values of 16 bits are not supported"
    assert only(check_dataset(opt, 2, "train")).startswith(problem)
    found = warned(opt | {"on_bad_image": "skip"}, "train")
    assert only(found).startswith(problem) and only(found).endswith("skip replaces them in training")


def test_two_gt_images_of_one_lq_image(opt: dict[str, Any], tmp_path: Path) -> None:
    """LQ images without subfolders are found by the GT image's file name."""
    write(tmp_path / "GT" / "seq1", {"a": (20, 24)})
    listing = tmp_path / "list.txt"
    listing.write_text("a.png\nb.png\nseq1/a.png\n")
    listed = opt | {"meta_info_file": str(listing)}
    assert "would be the partner of a.png and of seq1/a.png" in only(check_dataset(listed, 2, "train"))
    listing.write_text("seq1/a.png\nb.png\n")
    assert check_dataset(listed, 2, "train") == []
    assert len(build_dataset(listed | {"phase": "train", "scale": 2})) == 2


def test_names_of_results_are_text(opt: dict[str, Any], tmp_path: Path) -> None:
    single = {
        "type": "SingleImageDataset",
        "dataroot_lq": str(tmp_path / "LQ"),
        "io_backend": {"type": "disk"},
    }
    os.rename(tmp_path / "LQ" / "a.png", os.fsencode(tmp_path / "LQ") + b"/\xff.png")
    assert "'\\udcff.png': rename it" in only(check_dataset(single, 2, "test"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_cannot_be_listed(opt: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "LQ" / "closed"
    folder.mkdir(mode=0)
    nested = {"type": "LQImageDataset", "dataroot_lq": str(tmp_path / "LQ")}
    assert (
        only(check_dataset(nested, 2, "test"))
        == f"dataroot_lq: Cannot list folder {folder}: Permission denied"
    )
    folder.chmod(0o700)
