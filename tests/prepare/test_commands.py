"""``kdsr data``: the commands, on small real photographs."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from basicsr.data import build_dataset
from PIL import Image
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.data.checks import check_dataset
from kdsr.data.image_files import list_images
from kdsr.data.resize import imresize
from kdsr.prepare.pair_writer import Photograph, write_pairs
from kdsr.prepare.sample import SOURCES
from kdsr.prepare.sub_images import Cutting
from kdsr.runtime.errors import DataError, OptionError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def paired(root: Path, gt: str, lq: str, phase: str, scale: int, size: int = 48) -> dict[str, Any]:
    backend = "lmdb" if gt.endswith(".lmdb") else "disk"
    return {
        "name": "made", "type": "PairedImageDataset", "dataroot_gt": str(root / gt),
        "dataroot_lq": str(root / lq), "io_backend": {"type": backend}, "phase": phase, "scale": scale,
        "gt_size": size, "use_hflip": True, "use_rot": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "sample"
    assert "written" in run("sample", "--out", root)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three photographs, one of them grey and in a subfolder, one smaller than the others."""
    root = tmp_path / "SRC_HR"
    (root / "more").mkdir(parents=True)
    cv2.imwrite(str(root / "cat.png"), skimage.data.chelsea()[:150, :173, ::-1])
    cv2.imwrite(str(root / "more" / "camera.png"), skimage.data.camera()[100:200, 100:200])
    cv2.imwrite(str(root / "cup.jpg"), skimage.data.coffee()[:50, :90, ::-1])
    (root / "SOURCE.txt").write_text("no image")
    return root


def test_sample_is_what_the_templates_read(sample: Path) -> None:
    for split in ("train", "val"):
        for scale in (2, 3, 4):
            for ending in ("", ".lmdb"):
                opt = paired(sample / split, f"GT{ending}", f"LR_x{scale}{ending}", split, scale, 192)
                assert check_dataset(opt, scale) == []
                dataset = build_dataset(opt)
                assert len(dataset) == {"train": 48, "val": 3}[split]
                item = dataset[len(dataset) - 1]
                assert item["gt"].shape[1:] == tuple(scale * side for side in item["lq"].shape[1:])


def test_sample_lmdb_holds_the_files(sample: Path) -> None:
    import lmdb

    folder = sample / "train" / "LR_x3"
    files = sorted(folder.iterdir())
    lines = Path(f"{folder}.lmdb", "meta_info.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [file.name for file in files]
    with lmdb.open(f"{folder}.lmdb", readonly=True, lock=False) as env, env.begin() as transaction:
        assert env.stat()["entries"] == len(files)
        for file in files:
            assert transaction.get(file.stem.encode()) == file.read_bytes()


def test_sample_keeps_the_stereo_pair_together() -> None:
    sides = {source.split for source in SOURCES if source.name.startswith("motorcycle")}
    assert len(sides) == 1
    assert {source.split for source in SOURCES} == {"train", "val"}


def test_sample_needs_the_wheel_only() -> None:
    shipped = {str(file) for file in importlib.metadata.files("scikit-image") or ()}
    assert {f"skimage/data/{source.file}" for source in SOURCES} <= shipped


def runs(images: list[np.ndarray], length: int = 12) -> np.ndarray:
    """A number for every horizontal run of pixels, equal for equal runs."""
    weights = np.random.default_rng(0).integers(1, 2**63, (length, 3), dtype=np.uint64) | 1
    numbers = []
    for image in images:
        width = image.shape[1] - length + 1
        total = np.zeros((image.shape[0], width), np.uint64)
        for offset, channel in np.ndindex(weights.shape):
            total += image[:, offset : offset + width, channel] * weights[offset, channel]
        numbers.append(total.ravel())
    return np.unique(np.concatenate(numbers))


def test_no_validation_pixels_in_the_training_set(sample: Path) -> None:
    train, val = (
        [cv2.imread(str(file)).astype(np.uint64) for file in sorted((sample / split / "GT").iterdir())]
        for split in ("train", "val")
    )
    train_runs = runs(train)
    views = [view for image in val for view in (image, image[:, ::-1], image.swapaxes(0, 1))]
    assert np.intersect1d(runs(views), train_runs, assume_unique=True).size == 0
    # the measure sees an overlap where there is one
    part = runs([train[4][100:150, 100:150]])
    assert np.intersect1d(part, train_runs, assume_unique=True).size == part.size


def test_sample_is_made_once(sample: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in sample.rglob("*")}
    assert "already complete" in run("sample", "--out", sample)
    assert {file: file.stat().st_mtime_ns for file in sample.rglob("*")} == before
    assert [path.name for path in sample.parent.iterdir()] == ["sample"]  # no temporary folder is left


def test_damaged_sample_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "sample"
    run("sample", "--out", root, "--scales", "4")
    victim = root / "val" / "LR_x4" / "coffee.png"
    good = victim.read_bytes()
    victim.write_bytes(good[:-1])
    assert "written" in run("sample", "--out", root, "--scales", "4")
    assert victim.read_bytes() == good
    assert "written" in run("sample", "--out", root, "--scales", "2")  # another request
    assert not victim.exists() and (root / "val" / "LR_x2.lmdb" / "data.mdb").is_file()
    assert json.loads((root / "manifest.json").read_text())["request"]["scales"] == [2]


def test_sample_does_not_replace_other_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="was not made by this command"):
        run("sample", "--out", tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_sample_refuses_scales_that_do_not_divide_its_sub_images(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"crop 240: .* a multiple of 28 for scales 4, 7"):
        run("sample", "--out", tmp_path / "sample", "--scales", "4,7")
    assert list(tmp_path.iterdir()) == []


def test_sample_states_origin_and_terms(sample: Path) -> None:
    text = (sample / "README.md").read_text()
    assert all(source.file in text and source.terms in text for source in SOURCES)


def test_whole_images(source: Path, tmp_path: Path) -> None:
    output = run("sr", source, tmp_path / "out", "--scales", "2, 3", "--workers", 2)
    assert "3 pairs of 3 images in GT, LR_x2, LR_x3" in output
    gt, lq = (cv2.imread(str(tmp_path / "out" / name / "cat.png"), -1) for name in ("GT", "LR_x3"))
    np.testing.assert_array_equal(gt, cv2.imread(str(source / "cat.png"))[:150, :168])
    np.testing.assert_array_equal(lq, imresize(gt, 1 / 3))
    assert cv2.imread(str(tmp_path / "out" / "LR_x2" / "camera.png"), -1).shape == (48, 48)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["GT", "LR_x2", "LR_x3"]


def test_benchmark_layout(source: Path, tmp_path: Path) -> None:
    run("sr", source, tmp_path / "Set", "--scales", "4", "--layout", "benchmark")
    assert cv2.imread(str(tmp_path / "Set" / "GTmod12" / "cat.png")).shape == (144, 168, 3)
    assert check_dataset(paired(tmp_path / "Set", "GTmod12", "LRbicx4", "val", 4), 4) == []


def test_div2k_layout_with_sub_images_and_lmdb(source: Path, tmp_path: Path) -> None:
    arguments = ["--crop", 48, "--step", 24, "--thresh", 24, "--layout", "div2k", "--lmdb", "--workers", 1]
    run("sr", source, tmp_path, "--scales", "2,4", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "SRC_HR", "SRC_HR_sub", "SRC_HR_sub.lmdb", "SRC_LR_bicubic", "SRC_LR_bicubic_X2_sub.lmdb",
        "SRC_LR_bicubic_X4_sub.lmdb"]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "SRC_LR_bicubic").iterdir()) == ["X2_sub", "X4_sub"]
    names = sorted(path.name for path in (tmp_path / "SRC_HR_sub").iterdir())
    # 148x172 gives 5x6, 100x100 3x3 (a rest of 4 is left out), 48x88 1x2
    assert len(names) == 30 + 9 + 2 and names[-1] == "cup_s002.png"
    for scale in (2, 4):
        disk = paired(tmp_path, "SRC_HR_sub", f"SRC_LR_bicubic/X{scale}_sub", "train", scale)
        database = paired(tmp_path, "SRC_HR_sub.lmdb", f"SRC_LR_bicubic_X{scale}_sub.lmdb", "train", scale)
        for opt in (disk, database):
            assert check_dataset(opt, scale) == [] and len(build_dataset(opt)) == len(names)


def test_div2k_layout_is_named_after_the_link(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "NEW_HR").symlink_to(source)
    run("sr", tmp_path / "NEW_HR", tmp_path / "out", "--scales", "4", "--layout", "div2k")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["NEW_HR_whole", "NEW_LR_bicubic"]
    monkeypatch.chdir(source)
    run("sr", ".", tmp_path / "out2", "--scales", "4", "--layout", "div2k")
    assert (tmp_path / "out2" / "SRC_HR_whole").is_dir()


@pytest.mark.parametrize(("crop", "step"), [(36, 12), (48, 24), (12, 12)])
def test_default_step_fits_the_scales(source: Path, tmp_path: Path, crop: int, step: int) -> None:
    run("sr", source, tmp_path / "default", "--crop", crop)
    run("sr", source, tmp_path / "stated", "--crop", crop, "--step", step)
    default, stated = (
        {path.name: path.read_bytes() for path in (tmp_path / out / "GT").iterdir()}
        for out in ("default", "stated")
    )
    assert default == stated


def test_workers_do_not_change_the_result(source: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(
            "sr",
            source,
            tmp_path / str(workers),
            "--scales",
            "4",
            "--crop",
            48,
            "--lmdb",
            "--workers",
            workers,
        )
    one, three = (
        {path.relative_to(tmp_path / workers).as_posix(): path.read_bytes()
         for path in (tmp_path / workers).rglob("*") if path.is_file() and path.name != "lock.mdb"}
        for workers in ("1", "3")
    )  # fmt: skip
    assert one == three and "GT.lmdb/data.mdb" in one


def test_small_images_are_kept_or_left_out(source: Path, tmp_path: Path) -> None:
    run("sr", source, tmp_path / "all", "--scales", "4", "--crop", 96)
    assert cv2.imread(str(tmp_path / "all" / "GT" / "cup_s001.png")).shape == (48, 88, 3)
    output = run("sr", source, tmp_path / "some", "--scales", "4", "--crop", 96, "--min-size", 96)
    assert "left out 1 images below 96 pixels: cup" in output
    assert not (tmp_path / "some" / "GT" / "cup_s001.png").exists()
    with pytest.raises(DataError, match="None of the 3 images has sides of 500 pixels"):
        run("sr", source, tmp_path / "none", "--scales", "4", "--min-size", 500)
    assert list((tmp_path / "none").iterdir()) == []
    with pytest.raises(DataError, match="None of the 3 images has sides of 211 pixels"):
        run("sr", source, tmp_path / "none", "--scales", "211")
    assert "left out 1 images below 53 pixels: cup" in run("sr", source, tmp_path / "53", "--scales", "53")


def test_several_sources(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    cv2.imwrite(str(other / "rocket.png"), skimage.data.rocket()[:60, :60])
    assert "4 pairs of 4 images" in run("sr", source, other, tmp_path / "out", "--scales", "4")
    (other / "rocket.png").rename(other / "cat.png")
    with pytest.raises(DataError, match=r"cat.png and .*cat.png would both become cat"):
        run("sr", source, other, tmp_path / "out2", "--scales", "4")


def test_existing_output_needs_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("sr", source, out, "--scales", "4")
    (out / "GT" / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="exists already; add --force"):
        run("sr", source, out, "--scales", "4")
    assert (out / "GT" / "mine.txt").exists()
    run("sr", source, out, "--scales", "4", "--force")
    assert sorted(path.name for path in (out / "GT").iterdir()) == ["camera.png", "cat.png", "cup.png"]
    assert sorted(path.name for path in out.iterdir()) == ["GT", "LR_x4"]


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("place", [".", "GT", "GT/more", "LR_x4.lmdb"])
def test_originals_are_never_a_target(source: Path, tmp_path: Path, force: list[str], place: str) -> None:
    """SRC contains a target, is one, or is inside one."""
    out = tmp_path / "out"
    originals = out / place
    shutil.copytree(source, originals)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match="would overwrite the originals"):
        run("sr", originals, out, "--scales", "4", "--lmdb", *force)
    (tmp_path / "link").symlink_to(originals)
    with pytest.raises(OptionError, match="would overwrite the originals"):
        run("sr", tmp_path / "link", out, "--scales", "4", "--lmdb", *force)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_photographs_are_never_in_a_target(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "out" / "GT")
    photographs = [Photograph("cat", tmp_path / "out" / "GT" / "cat.png")]
    with pytest.raises(OptionError, match="would overwrite the originals"):
        write_pairs(photographs, Cutting((4,), 4), tmp_path / "out", {1: "GT", 4: "LR_x4"}, force=True)
    assert (tmp_path / "out" / "GT" / "cat.png").is_file()


def test_an_interrupted_run_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (source / "zebra.png").write_bytes(b"no image")
    for workers in (1, 2):
        with pytest.raises(DataError, match="Cannot read image .*zebra.png"):
            run("sr", source, tmp_path / "out", "--scales", "4", "--workers", workers)
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((40, 40, 3), np.uint16), "16 bits per channel"),
    (np.zeros((40, 40, 4), np.uint8), "partly transparent"),
])  # fmt: skip
def test_unsupported_images_are_named(source: Path, tmp_path: Path, image: np.ndarray, message: str) -> None:
    cv2.imwrite(str(source / "bad.png"), image)
    with pytest.raises(DataError, match=rf"bad.png (has|is) {message}"):
        run("sr", source, tmp_path / "out")


@pytest.mark.parametrize("name", ["two.dots.png", "with space.png", "grün.png"])
def test_names_that_an_lmdb_cannot_hold(source: Path, tmp_path: Path, name: str) -> None:
    (source / "cat.png").rename(source / name)
    with pytest.raises(DataError, match="rename it"):
        run("sr", source, tmp_path / "out", "--lmdb")
    run("sr", source, tmp_path / "out", "--scales", "2")  # folders can have such names
    opt = paired(tmp_path / "out", "GT", "LR_x2", "val", 2)
    assert check_dataset(opt, 2) == []
    assert str(tmp_path / "out" / "GT" / name) in {item["gt_path"] for item in build_dataset(opt)}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--scales", "4,x"], "--scales '4,x'"),
    (["--scales", "1"], "--scales '1'"),
    (["--crop", 50], "crop 50: must be 0 .* or a multiple of 12"),
    (["--crop", 48, "--step", 10], "step 10"),
    (["--crop", 48, "--layout", "benchmark"], "are not cut"),
])  # fmt: skip
def test_wrong_arguments(source: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run("sr", source, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_empty_and_missing_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is no image in .*empty"):
        run("sr", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="There is no folder .*absent"):
        run("sr", tmp_path / "absent", tmp_path / "out")


def braces(text: str) -> list[str]:
    """Expands ``a/{b,c}`` as a shell does."""
    found = re.search(r"{([^{}]*)}", text)
    if found is None:
        return [text]
    parts = [text[: found.start()] + word + text[found.end() :] for word in found[1].split(",")]
    return [name for part in parts for name in braces(part)]


def test_commands_of_the_data_readme_make_what_the_templates_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "datasets" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^kdsr data (.+)$", text, flags=re.MULTILINE)
    commands = [command for command in found if not re.search("--kernels|--depth", command)]
    assert len(commands) == 22
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate(commands):
        words = command.split()
        for folder in [word for word in words if word.startswith("datasets/")][:-1]:
            if Path(folder).exists():
                continue
            shutil.copytree(source, folder)
            for file in list_images(folder):  # several sources of one command have names of their own
                file.rename(file.with_stem(f"{file.stem}{number}{Path(folder).name}"))
        if "--min-size" in words:  # the photographs here are smaller than the real ones
            words[words.index("--min-size") + 1] = "90"
        run(*words)
    root_option = re.compile(r"dataroot_(?:gt|lq): *(datasets/(?:[^\s#,{}$]|\$\{\w+\})+)")
    wanted = {
        value.replace("${scale}", str(scale))
        for file in (root / "options").rglob("*.yml")
        for value in root_option.findall(file.read_text(encoding="utf-8"))
        for scale in (2, 3, 4)
    }
    assert len(wanted) > 10
    published = {name for layout in re.findall(r"`(datasets/[^`]*{[^`]*)`", text) for name in braces(layout)}
    assert "datasets/Rain13K/test/Rain100L/input" in published
    assert [folder for folder in sorted(wanted - published) if not Path(folder).is_dir()] == []


def test_images_are_checked_before_any_is_written(source: Path, tmp_path: Path) -> None:
    """Other bit depths are refused at once; skipped files and losses are printed."""
    photograph = Image.fromarray(skimage.data.chelsea()[:100, :100])
    photograph.convert("CMYK").save(source / "print.jpg")
    photograph.save(source / "more" / "unnamed", "PNG")
    output = run("sr", source, tmp_path / "out", "--scales", "2")
    assert f"left out of {source} (2;" in output
    assert "SOURCE.txt, more/unnamed; more/unnamed can be decoded" in output.replace("\n", "")
    assert "1 image has CMYK colours" in output
    for name in ("z1", "z2"):
        cv2.imwrite(str(source / f"{name}.png"), np.zeros((100, 100), np.uint16))
    with pytest.raises(
        DataError, match=r"z1.png has 16 bits per channel \(and 1 more\); convert it to 8 bits"
    ):
        run("sr", source, tmp_path / "deep", "--scales", "2")
    assert not (tmp_path / "deep").exists()
