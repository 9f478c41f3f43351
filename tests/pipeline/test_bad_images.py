"""Complete runs with bad training images, and their log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.pipeline.bad_images import ReplacedImages

from basicsr.utils import get_root_logger  # isort: skip (after kdsr, which makes basicsr importable)

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bad(run_options: Options, photos: Path, tmp_path: Path) -> Options:
    """A run whose training set has one image with only a valid header, and one empty file."""
    for folder in ("GT", "LR_x4"):
        shutil.copytree(photos / folder, tmp_path / "bad" / folder)
    half = tmp_path / "bad" / "LR_x4" / "cat.png"
    half.write_bytes(half.read_bytes()[:80] + bytes(300))
    (tmp_path / "bad" / "GT" / "rocket.png").write_bytes(b"")
    run_options["datasets"]["train"].update(
        dataroot_gt=str(tmp_path / "bad/GT"), dataroot_lq=str(tmp_path / "bad/LR_x4"), on_bad_image="skip",
        dataset_enlarge_ratio=2, batch_size_per_gpu=2,
    )  # fmt: skip
    run_options["logger"]["save_checkpoint_freq"] = 3
    run_options["train"]["total_iter"] = 6
    return run_options


def run(options: Options, *flags: str, name: str = "run") -> int:
    Path("run.yml").write_text(yaml.safe_dump(options | {"name": name}), encoding="utf-8")
    return train_entry.main(["-opt", "run.yml", *flags])


def state(name: str, iteration: int = 6) -> Options:
    return torch.load(f"experiments/{name}/training_states/{iteration}.state", weights_only=True)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_a_run_continues_and_logs_the_skipped_images(
    bad: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bad) == 0
    assert "datasets.train.dataroot_gt: cannot read image" in capsys.readouterr().err, "found before the run"
    (file,) = Path("experiments/run").glob("train_run_*.log")
    log = file.read_text()
    found = re.findall(r"Skipped unreadable image (\S+) \((\d) so far\)", log)
    assert sorted(path for path, _ in found) == [
        f"{tmp_path}/bad/GT/rocket.png", f"{tmp_path}/bad/LR_x4/cat.png",
    ]  # fmt: skip
    assert [count for _, count in found] == ["1", "2"]
    # 8 positions an epoch, 4 of them bad; the second epoch of the six iterations ends with the run
    assert "4 items of the last epoch replaced unreadable images (4 items and 2 images" in log


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_workers_and_a_resume_change_nothing(bad: Options, tmp_path: Path, backend: str) -> None:
    train = bad["datasets"]["train"]
    if backend == "lmdb":
        to_lmdb(train, tmp_path)
    assert run(bad, name="alone") == 0
    train["num_worker_per_gpu"] = 3
    assert run(bad, name="workers") == 0
    bad["train"]["total_iter"] = 3
    assert run(bad, name="parted") == 0
    bad["train"]["total_iter"] = 6
    assert run(bad, "--auto_resume", name="parted") == 0
    for name in ("workers", "parted"):
        for key in ("networks", "optimizers"):
            assert same(state("alone")[key], state(name)[key]), (name, key)


def to_lmdb(train: Options, tmp_path: Path) -> None:
    """The training set as LMDBs, with one missing key and one value that is not an image."""
    import lmdb

    for key in ("dataroot_gt", "dataroot_lq"):
        folder = Path(train[key])
        whole = sorted(path for path in folder.iterdir() if path.stem not in ("rocket", "cat"))
        target = tmp_path / f"{folder.name}.lmdb"
        make_lmdb_from_imgs(
            str(folder), str(target), [path.name for path in whole], [path.stem for path in whole],
            map_size=2**22,
        )  # fmt: skip
        with lmdb.open(str(target), map_size=2**22) as env, env.begin(write=True) as writing:
            writing.put(b"cat", b"rubbish")
        size = "(96,96,3)" if key == "dataroot_gt" else "(24,24,3)"
        with (target / "meta_info.txt").open("a") as meta:
            meta.writelines(f"{name}.png {size} 1\n" for name in ("cat", "rocket"))
        train[key] = str(target)
    train["io_backend"] = {"type": "lmdb"}


def test_lmdb_with_bad_values(bad: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_lmdb(bad["datasets"]["train"], tmp_path)
    assert run(bad, "--force_yml", "train:total_iter=4") == 0
    error = capsys.readouterr().err
    assert f"cannot read image {tmp_path}/GT.lmdb: rocket" in error
    assert f"Skipped unreadable image {tmp_path}/LR_x4.lmdb: cat (" in error
    bad["datasets"]["train"]["on_bad_image"] = "stop"
    assert run(bad) == 2
    assert "datasets.train.dataroot_gt: cannot read image" in capsys.readouterr().err


def test_a_set_without_a_readable_image_is_refused(
    bad: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("astronaut", "coffee"):
        file = tmp_path / "bad" / "LR_x4" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:80] + bytes(300))  # the headers are sound
    assert run(bad) == 1
    assert "all 4 training images cannot be read; the first: " in capsys.readouterr().err
    assert not Path("experiments").exists()


@pytest.mark.parametrize("value", ["sikp", "skip"])
def test_option_is_checked(bad: Options, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad["datasets"]["val" if value == "skip" else "train"]["on_bad_image"] = value
    assert run(bad) == 2
    expected = {
        "skip": "datasets.val.on_bad_image: only a training set can skip",
        "sikp": "datasets.train.on_bad_image: 'sikp' is neither stop nor skip",
    }
    assert expected[value] in capsys.readouterr().err


def test_validation_stops_at_a_bad_image(
    bad: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad" / "GT" / "rocket.png").write_bytes((tmp_path / "bad/GT/coffee.png").read_bytes())
    for key in ("dataroot_gt", "dataroot_lq"):
        bad["datasets"]["val"][key] = bad["datasets"]["train"][key]
    assert run(bad) == 1
    assert f"Cannot read image {tmp_path}/bad/LR_x4/cat.png" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("place", ["train", "train, two workers", "val", "test"])
def test_value_of_an_lmdb_that_is_no_image_stops_with_its_key(
    bad: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """The LMDB has the key, so that the damage shows only when the image is read."""
    import lmdb

    train = bad["datasets"]["train"]
    del train["on_bad_image"]
    sound = {key: bad["datasets"]["val"][key] for key in ("dataroot_gt", "dataroot_lq")}
    to_lmdb(train, tmp_path)
    with lmdb.open(f"{tmp_path}/GT.lmdb", map_size=2**22) as gt, gt.begin(write=True) as writing:
        writing.put(b"rocket", b"rubbish")
        if "workers" in place:  # beyond the two images of the rehearsal, which loads them itself
            writing.put(b"cat", writing.get(b"astronaut"))
    with lmdb.open(f"{tmp_path}/LR_x4.lmdb", map_size=2**22) as lq, lq.begin(write=True) as writing:
        writing.put(b"rocket", writing.get(b"astronaut"))
        writing.put(b"cat", writing.get(b"astronaut"))
    train.update(batch_size_per_gpu=4, num_worker_per_gpu=2 if "workers" in place else 0)
    entry, options = train_entry, bad
    if not place.startswith("train"):
        damaged = {key: train[key] for key in sound}
        train.update(sound, io_backend={"type": "disk"})
        bad["datasets"]["val"].update(damaged, io_backend={"type": "lmdb"})
    if place == "test":
        entry = test_entry
        kept = {key: bad[key] for key in ("model_type", "scale", "num_gpu", "network_g")}
        options = kept | {
            "datasets": {"test": bad["datasets"]["val"]},
            "val": {"metrics": bad["val"]["metrics"]},
        }
    Path("run.yml").write_text(yaml.safe_dump(options | {"name": "run"}), encoding="utf-8")
    assert entry.main(["-opt", "run.yml", *(["--random-weights"] if place == "test" else [])]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"kdsr: error: Cannot read image {tmp_path}/GT.lmdb: (cat|rocket): it is damaged or not an image \(7 bytes\)",
        last,
    )


def test_batches_without_notes_and_the_end_of_an_epoch() -> None:
    replaced = ReplacedImages()
    batch = {"lq": torch.zeros(2), "lq_path": ["a", "b"]}
    replaced.collect(batch)
    replaced.collect(None)
    assert set(batch) == {"lq", "lq_path"} and replaced.count == 0


def test_each_path_is_logged_once_and_the_note_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(get_root_logger(), "warning", messages.append)
    replaced = ReplacedImages()
    for notes in (["", "a.png", "a.png\nb.png"], ["b.png", "", ""]):
        batch: dict[str, Any] = {"lq": torch.zeros(3), "replaced": notes}
        replaced.collect(batch)
        assert list(batch) == ["lq"]
    replaced.begin_epoch()
    replaced.begin_epoch()
    assert messages == [
        "Skipped unreadable image a.png (1 so far)",
        "Skipped unreadable image b.png (2 so far)",
        "3 items of the last epoch replaced unreadable images "
        "(3 items and 2 images since the start of this process)",
    ]


@pytest.mark.slow
def test_each_rank_reports_its_images(bad: Options) -> None:
    """Two processes give the bits of one, and the second one's images are reported too."""
    Path("run.yml").write_text(yaml.safe_dump(bad), encoding="utf-8")
    script = Path(train_entry.__file__)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", str(script),
         "-opt", "run.yml", "--launcher", "pytorch", "--force_yml", "datasets:train:batch_size_per_gpu=1"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    paths = set(re.findall(r"Skipped unreadable image (\S+)", done.stderr))
    assert {Path(path).name for path in paths} == {"rocket.png", "cat.png"}
    assert re.search(r"Warning: rank 1: Skipped unreadable image", done.stderr)
