"""``kdsr data teacher-cache``: stored outputs, found again after a kill, refused where they would be wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.archs.edsr_arch import EDSR
from basicsr.data import build_dataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from torch.utils.data import DataLoader, default_collate
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.data.lmdb_client import stored_keys
from kdsr.data.patches import to_device
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.data.stored_outputs import KEY, View
from kdsr.models import builder
from kdsr.models.cached_teacher import cache_folder, name_teacher_images
from kdsr.models.kd_model import KDModel
from kdsr.runtime.errors import DataError, KdsrError, OptionError
from small_runs import complete, problems_after, run
from spandrel_files import plain, write

Options = dict[str, Any]
OUTPUTS = {"type": "Outputs", "path": "."}
ROUNDING = {"uint8": 0.5 / 255, "uint16": 0.5 / 65535, "float16": 2.0**-11}


@pytest.fixture
def cached(teacher_options: Options) -> Options:
    """Logits of a teacher whose output is the input, repeated and filtered, in the range [0, 1]."""
    weights = torch.load("teacher.pth")["params"]
    weights["conv_last.weight"] *= 0.05
    torch.save({"params": weights}, "teacher.pth")
    teacher_options["train"].update(
        teacher_cache="cache", logits_opt={"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    )
    return teacher_options


def make(options: Options, *flags: str) -> str:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    result = CliRunner().invoke(app, ["data", "teacher-cache", "-opt", "run.yml", *flags])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def stored(options: Options) -> list[str]:
    root = Path(cache_folder(options))
    if (root / "images.lmdb").exists():
        return sorted(stored_keys(str(root / "images.lmdb")))
    return sorted(str(file.relative_to(root)) for file in root.rglob("*.*") if file.suffix != ".json")


def training_set(options: Options, seed: int = 5) -> SeededDataset:
    opt = copy.deepcopy(options)
    name_teacher_images(opt)
    return SeededDataset(build_dataset({**opt["datasets"]["train"], "phase": "train", "scale": 4}), seed)


def teacher_of(options: Options) -> torch.nn.Module:
    net = build_network(copy.deepcopy(options["network_t"])).eval()
    net.load_state_dict(torch.load("teacher.pth")["params"])
    return net


@pytest.mark.parametrize(
    ("depth", "lmdb"), [("uint8", False), ("uint16", True), ("float16", False), ("float16", True)]
)
def test_patches_are_cut_from_the_outputs_for_whole_flipped_images(
    depth: str, lmdb: bool, cached: Options
) -> None:
    make(cached, "--depth", depth, *(["--lmdb"] if lmdb else []))
    assert len(stored(cached)) == 4 * 8
    dataset, plain = training_set(cached), SeededDataset(build_dataset_of(cached), 5)
    net = teacher_of(cached)
    found: set[str] = set()
    for position in range(40):
        item, without = dataset[1, position], plain[1, position]
        assert set(item) == {"lq", "gt", "lq_path", "gt_path", KEY}
        assert torch.equal(item["lq"], without["lq"]) and torch.equal(item["gt"], without["gt"])
        whole = torch.from_numpy(cv2.imread(item["lq_path"])[..., ::-1].copy()).permute(2, 0, 1).float() / 255
        view, top, left = place_of(item["lq"], whole)
        flipped = view.of(whole)[None].contiguous()
        with torch.no_grad():
            expected = net(flipped)[0]
        if depth != "float16":
            expected = expected.clamp(0, 1)
        expected = expected[:, 4 * top : 4 * top + 64, 4 * left : 4 * left + 64]
        assert (item[KEY] - expected).abs().max() <= ROUNDING[depth] * 1.01 + 1e-6
        found.add(view.name)
    assert len(found) == 8


def build_dataset_of(options: Options) -> Any:
    return build_dataset({**copy.deepcopy(options["datasets"]["train"]), "phase": "train", "scale": 4})


def place_of(patch: torch.Tensor, whole: torch.Tensor) -> tuple[View, int, int]:
    """The flip and the position in the flipped image of a patch of noise or of a photograph."""
    for flags in np.ndindex(2, 2, 2):
        view = View(*map(bool, flags))
        image = view.of(whole)
        for top in range(image.shape[1] - patch.shape[1] + 1):
            for left in range(image.shape[2] - patch.shape[2] + 1):
                if torch.equal(image[:, top : top + patch.shape[1], left : left + patch.shape[2]], patch):
                    return view, top, left
    raise AssertionError("the patch is not a part of the image")


@pytest.mark.parametrize("settings", [{}, {"cache": "ram"}, {"flips_on_device": True}])
def test_the_patch_of_the_output_is_that_of_the_ground_truth_to_the_bit(
    settings: Options, cached: Options, photos: Path, tmp_path: Path
) -> None:
    """With the ground truth as the outputs of another program both keys have the same values."""
    cached["datasets"]["train"].update(settings)
    database = tmp_path / "outputs.lmdb"
    names = sorted(file.name for file in (photos / "GT").iterdir())
    make_lmdb_from_imgs(str(photos / "GT"), str(database), names, [Path(name).stem for name in names])
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for name in names:
        np.save(arrays / f"{Path(name).stem}.npy", cv2.imread(str(photos / "GT" / name))[..., ::-1])
    del cached["train"]["teacher_cache"], cached["path"]["pretrain_network_t"]
    for root in (photos / "GT", database, arrays):
        cached["network_t"] = {"type": "Outputs", "path": str(root), "flips": True}
        dataset = training_set(cached)
        positions = [(2, position, size) for position in range(12) for size in (64, 32)]
        for workers in (0, 2):
            for size in (64, 32):
                sampler = [position for position in positions if position[2] == size]
                for batch in DataLoader(dataset, 3, sampler=sampler, num_workers=workers):
                    to_device(batch, torch.device("cpu"))
                    assert batch[KEY].shape == (3, 3, size, size) and torch.equal(batch[KEY], batch["gt"])


def test_normalised_sets_and_sets_without_ground_truth(cached: Options, photos: Path) -> None:
    del cached["train"]["teacher_cache"]
    cached["network_t"] = {"type": "Outputs", "path": str(photos / "GT"), "flips": True}
    gt = training_set(cached)[0, 3]["gt"]
    train = cached["datasets"]["train"]
    train.update(mean=[0.4, 0.5, 0.6], std=[0.5, 0.25, 2.0])
    item = training_set(cached)[0, 3]
    assert torch.equal(item[KEY], item["gt"]) and not torch.equal(item["gt"], gt)
    alone = {"name": "lq", "type": "LQImageDataset", "gt_size": 64, "dataroot_lq": train["dataroot_lq"]}
    cached["datasets"]["train"] = alone  # flips by default
    assert torch.equal(training_set(cached)[0, 3][KEY], gt)


def test_losses_are_those_of_the_live_teacher_away_from_borders(cached: Options) -> None:
    """The output of the patch alone has other values at its border, for the network sees zeros beyond it."""
    make(cached, "--depth", "float16")
    batch = default_collate([training_set(cached)[0, position] for position in range(4)])
    model = KDModel(complete(cached))
    live_options = copy.deepcopy(cached)
    del live_options["train"]["teacher_cache"]
    live = KDModel(complete(live_options))
    live.net_g.load_state_dict(model.net_g.state_dict())
    for one in (model, live):
        one.feed_data({key: value for key, value in batch.items() if one is model or key != KEY})
        one.compute_gradients(1)
    inner = slice(4 * 7, -4 * 7)  # seven 3×3 convolutions at the size of the LQ images or above
    from_cache, from_net = (one.step.teacher_output[..., inner, inner] for one in (model, live))
    assert (from_cache - from_net).abs().max() <= 2.0**-11
    ours, theirs = (
        (one.step.output - one.step.teacher_output)[..., inner, inner].abs().mean() for one in (model, live)
    )
    assert abs(ours - theirs) <= 2.0**-11
    assert not torch.equal(model.step.teacher_output[..., :4, :], live.step.teacher_output[..., :4, :])


def test_a_run_neither_builds_nor_runs_the_teacher(cached: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    make(cached)
    cached["network_t"]["num_block"] = 3  # another number of blocks than the student's
    net = build_network(copy.deepcopy(cached["network_t"]))
    torch.save({"params": net.state_dict()}, "teacher.pth")
    make(cached)
    assert len(list(Path("cache").iterdir())) == 2
    passes: list[int] = []
    built: list[int] = []

    def seen(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, EDSR):
            passes.append(len(module.body))

    def counted(options: Options) -> torch.nn.Module:
        built.append(options["num_block"])
        return build_network(options)

    monkeypatch.setattr(builder, "build_network", counted)
    cached["val"]["teacher"] = True
    with torch.nn.modules.module.register_module_forward_pre_hook(seen):
        assert run(cached) == 0
        assert set(passes) == set(built) == {1}
        cached["train"]["teacher_cache"] = None
        assert run(cached) == 0
        assert set(passes) == set(built) == {1, 3}
    (run_with_cache,) = Path("experiments").glob("run_archived_*")
    log = next(run_with_cache.glob("*.log")).read_text()
    assert "l_ts" in log and "Validation of the teacher, photos, training images" in log
    rows = (run_with_cache / "metrics.csv").read_text()
    assert rows.count("photos, training images") == 8  # four images, each with its baseline


def test_a_second_run_makes_only_what_is_missing(cached: Options) -> None:
    assert "32 made now" in make(cached)
    before = {name: os.stat(Path(cache_folder(cached), name)).st_mtime_ns for name in stored(cached)}
    gone = Path(cache_folder(cached), stored(cached)[5])
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(OptionError, match=f"has no .*{gone.name.split('.')[0]}"):
        training_set(cached)
    assert "1 made now" in make(cached)
    assert gone.read_bytes() == content
    after = {name: os.stat(Path(cache_folder(cached), name)).st_mtime_ns for name in stored(cached)}
    assert {name for name in before if before[name] != after[name]} == {stored(cached)[5]}


@pytest.mark.parametrize("lmdb", [False, True])
def test_a_changed_image_has_new_outputs(lmdb: bool, cached: Options, photos: Path, tmp_path: Path) -> None:
    lq = tmp_path / "LQ"
    lq.mkdir()
    for file in (photos / "LR_x4").iterdir():
        (lq / file.name).write_bytes(file.read_bytes())
    cached["datasets"]["train"]["dataroot_lq"] = str(lq)
    flags = ["--lmdb"] if lmdb else []
    make(cached, *flags)
    image = cv2.imread(str(lq / "cat.png"))
    cv2.imwrite(str(lq / "cat.png"), 255 - image)
    with pytest.raises(OptionError, match=r"cat\.png has changed since"):
        training_set(cached)
    assert "8 made now" in make(cached, *flags)
    assert len(stored(cached)) == 32
    training_set(cached)


@pytest.mark.parametrize("lmdb", [False, True])
def test_killed_and_started_again(lmdb: bool, cached: Options) -> None:
    flags = ["--lmdb"] if lmdb else []
    make(cached, *flags)
    wanted = contents(cached)
    for _ in range(2):
        remove(cached)
        command = [sys.executable, "-c", SLOW_COMMAND, "data", "teacher-cache", "-opt", "run.yml", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not made(cached) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < len(stored(cached)) < 32
        output = make(cached, *flags)
        assert int(output.split(" made now")[0].split()[-1]) < 32
        assert contents(cached) == wanted


SLOW_COMMAND = """
import time, kdsr.tools.teacher_cache as tool
encode = tool.encode
tool.encode = lambda *args: time.sleep(0.05) or encode(*args)
from kdsr.cli import main
main()
"""


def made(options: Options) -> bool:
    try:
        return len(stored(options)) > 2
    except (OSError, DataError):  # not there yet
        return False


def remove(options: Options) -> None:
    for folder, _, files in os.walk(cache_folder(options), topdown=False):
        for file in files:
            os.unlink(os.path.join(folder, file))
        os.rmdir(folder)


def contents(options: Options) -> dict[str, bytes]:
    root = Path(cache_folder(options))
    if not (root / "images.lmdb").exists():
        return {name: (root / name).read_bytes() for name in stored(options)}
    from kdsr.data.lmdb_client import first_bytes

    return first_bytes(str(root / "images.lmdb"), stored(options), 2**30)  # type: ignore[return-value]


def test_tiles_give_the_whole_image_where_they_overlap_enough(cached: Options) -> None:
    make(cached, "--depth", "float16")
    whole = contents(cached)
    remove(cached)
    make(cached, "--depth", "float16", "--tile", "20", "--overlap", "14")
    for name, content in contents(cached).items():
        ours, theirs = (
            np.frombuffer(one[128:], np.float16).astype(np.float32) for one in (content, whole[name])
        )
        assert np.abs(ours - theirs).max() <= 2.0**-11


def test_other_settings_and_another_teacher(cached: Options) -> None:
    make(cached)
    settings = json.loads(Path(cache_folder(cached), "settings.json").read_text())
    assert settings == {"depth": "uint8", "lmdb": False, "tile": 256, "overlap": 32}
    with pytest.raises(OptionError, match="its outputs have depth uint8; give the same options"):
        make(cached, "--depth", "uint16")
    weights = torch.load("teacher.pth")["params"]
    weights["conv_first.bias"][0] += 1
    torch.save({"params": weights}, "teacher.pth")
    with pytest.raises(
        OptionError, match=r"train.teacher_cache: there is no cache/.*this teacher with these weights"
    ):
        training_set(cached)


def test_a_set_that_flips_needs_flipped_views(cached: Options) -> None:
    train = cached["datasets"]["train"]
    train.update(use_hflip=False, use_rot=False)
    make(cached)
    assert len(stored(cached)) == 4 and stored(cached)[0].startswith("plain/astronaut.")
    train["use_hflip"] = True
    with pytest.raises(OptionError, match=r"no outputs of flipped images \(h\)"):
        training_set(cached)
    assert "4 made now" in make(cached)
    training_set(cached)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.lcr_opt": {"type": "L1Loss"}}, "train.lcr_opt: needs the teacher itself"),
        ({"train.zoom_in_opt": {"type": "L1Loss"}}, "train.zoom_in_opt: needs the teacher itself"),
        ({"train.fakd_opt": {"type": "AffinityLoss"}, "train.taps": [{"student": "body.0", "teacher": "body.0"}]},
         "train.fakd_opt: needs the teacher itself"),
        ({"train.facd_opt": {"type": "FACDLoss"}, "train.taps": [{"student": "body.0", "teacher": "body.0"}]},
         "train.facd_opt: needs the teacher itself"),
        ({"train.mixing_augs": {"mixup": True}}, "train.mixing_augs.mixup: "),
        ({"path.init_from": "teacher"}, "path.init_from: teacher: "),
        ({"datasets.train.type": "RealESRGANDataset"}, "datasets.train.type: RealESRGANDataset: "),
        ({"datasets.train.color": "y", "datasets.val.color": "y"}, "datasets.train.color: y: "),
        ({"network_t": OUTPUTS}, "train.teacher_cache: network_t is a folder of outputs itself"),
        ({"network_t": ..., "path": {}}, "train.teacher_cache: there is no teacher"),
        ({"network_t": {**OUTPUTS, "path": "none"}, "train.teacher_cache": ...}, "network_t.path: there is no"),
        ({"network_t": OUTPUTS, "train.teacher_cache": ..., "path": {}}, "network_t.flips: "),
        ({"network_t": OUTPUTS, "train.teacher_cache": ...}, "path.pretrain_network_t: has no effect"),
        ({"network_g": OUTPUTS}, "network_g: Outputs is no network"),
        ({"train.teacher_cache": 3}, "train.teacher_cache: "),
    ],
)  # fmt: skip
def test_where_stored_outputs_are_refused(changes: Options, expected: str, cached: Options) -> None:
    problems = problems_after(cached, changes)
    assert [problem for problem in problems if problem.startswith(expected)], problems


def test_the_same_options_without_stored_outputs_are_accepted(cached: Options) -> None:
    assert problems_after(cached, {}) == []
    assert problems_after(cached, {"train.teacher_cache": ..., "train.lcr_opt": {"type": "L1Loss"}}) == []


def test_several_teachers(cached: Options) -> None:
    second = {**cached["network_t"], "num_block": 1}
    torch.save({"params": build_network(copy.deepcopy(second)).state_dict()}, "second.pth")
    cached["network_t"] = [cached["network_t"], second]
    cached["path"] = {"pretrain_network_t": ["teacher.pth", "second.pth"]}
    make(cached, "--depth", "float16")
    folder = cache_folder(cached)
    cached["train"]["teacher_weights"] = [1, 2]
    assert cache_folder(cached) != folder
    make(cached, "--depth", "float16")
    assert run(cached) == 0
    cached["network_t"][1] = {"type": "Outputs", "path": "."}
    assert any("network_t.1: Outputs is no network" in problem for problem in problems_after(cached, {}))


def test_a_term_that_asks_for_more_than_it_declares(cached: Options) -> None:
    make(cached)
    model = KDModel(complete(cached))
    model.feed_data(default_collate([training_set(cached)[0, 0]]))
    term = model.terms["logits_opt"]
    term.prepare = lambda step: step.show_teacher("other", step.lq)  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="a term uses the teacher itself"):
        model.compute_gradients(1)


# ------------------------------------------------------------------------------------- outputs of other programs


@pytest.fixture
def outputs(cached: Options, photos: Path, tmp_path: Path) -> Options:
    """The ground truth, a little darker, as the outputs of another program."""
    (tmp_path / "outputs").mkdir()
    for file in (photos / "GT").iterdir():
        image = cv2.imread(str(file))
        assert cv2.imwrite(str(tmp_path / "outputs" / f"{file.stem}.bmp"), np.maximum(image, 2) - 2)
    del cached["train"]["teacher_cache"], cached["path"]["pretrain_network_t"]
    cached["network_t"] = {"type": "Outputs", "path": "outputs"}
    cached["datasets"]["train"].update(use_hflip=False, use_rot=False)
    return cached


def test_images_of_another_program_teach(outputs: Options) -> None:
    assert run(outputs) == 0
    log = next(Path("experiments/run").glob("*.log")).read_text()
    assert "Validation of the teacher, photos, training images" in log and "l_ts" in log
    assert "THE TEACHER IS WORSE" not in log


def test_images_that_are_worse_than_bicubic_are_reported(outputs: Options) -> None:
    for file in Path("outputs").iterdir():
        cv2.imwrite(str(file), 255 - cv2.imread(str(file)))
    assert run(outputs) == 0
    log = next(Path("experiments/run").glob("*.log")).read_text()
    assert "THE TEACHER IS WORSE THAN BICUBIC INTERPOLATION on photos, training images (4 images)" in log


def test_missing_images_and_wrong_sizes_are_named_before_the_run(
    outputs: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = Path("outputs/cat.bmp")
    image = cv2.imread(str(cat))
    cv2.imwrite(str(cat), image[:-1])
    assert run(outputs) == 2
    assert "cat.bmp is 95×96×3, expected 96×96×3" in capsys.readouterr().err
    cat.unlink()
    assert run(outputs) == 2
    assert "network_t.path: outputs has no cat, which datasets.train needs" in capsys.readouterr().err
    assert not Path("experiments").exists()


def test_a_resumed_run_notices_other_outputs(outputs: Options, capsys: pytest.CaptureFixture[str]) -> None:
    outputs["logger"]["save_checkpoint_freq"] = 2
    assert run(outputs) == 0
    outputs["train"]["total_iter"] = 4
    Path("outputs/cat.bmp").write_bytes(Path("outputs/cat.bmp").read_bytes() + b"\0")
    assert run(outputs, "--auto_resume") == 2
    assert "network_t.path: the weights have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"teacher_cache": None}, [], "train.teacher_cache: missing in run.yml"),
        ({}, ["--overlap", "256"], "--overlap: 256 leaves nothing of tiles of 256"),
        ({"lcr_opt": {"type": "L1Loss"}}, [], "train.lcr_opt: needs the teacher itself"),
    ],
)
def test_what_the_command_refuses(changes: Options, flags: list[str], expected: str, cached: Options) -> None:
    cached["train"].update(changes)
    with pytest.raises(OptionError, match=expected):
        make(cached, *flags)
    assert not Path("cache").exists()


# ------------------------------------------------------------------------------------ a file and a folder of images


def make_of_folder(*words: str) -> str:
    result = CliRunner().invoke(app, ["data", "teacher-cache", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", ["own", "spandrel"])
@pytest.mark.parametrize("depth", ["uint8", "float16"])
def test_outputs_of_a_file_for_a_folder(
    kind: str, depth: str, outputs: Options, photos: Path, tmp_path: Path
) -> None:
    scale, lq = (4, photos / "LR_x4") if kind == "own" else (2, tmp_path / "LQ")
    if kind == "spandrel":
        write("SAFMN", tmp_path / "teacher.pth")
        (lq / "below").mkdir(parents=True)
        for index, file in enumerate(sorted((photos / "LR_x4").iterdir())):
            (lq / ("below" if index % 2 else ".") / file.name).write_bytes(file.read_bytes())
    assert "4 images; 4 made now" in make_of_folder("teacher.pth", str(lq), "-o", "made", "--depth", depth)
    ending = ".png" if depth == "uint8" else ".npy"
    names = {file.relative_to(lq).with_suffix(ending) for file in lq.rglob("*.png")}
    assert {file.relative_to("made") for file in Path("made").rglob("*.*") if file.suffix != ".json"} == names
    net = plain("teacher.pth").model if kind == "spandrel" else teacher_of(outputs | {"network_t": TEACHER})
    for file in lq.rglob("*.png"):
        whole = torch.from_numpy(cv2.imread(str(file))[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            expected = net(whole)[0].permute(1, 2, 0).numpy()
        path = str(Path("made") / file.relative_to(lq).with_suffix(ending))
        found = np.load(path) if depth == "float16" else cv2.imread(path)[..., ::-1] / 255
        expected = expected if depth == "float16" else expected.clip(0, 1)
        assert found.shape == tuple(scale * side for side in whole.shape[2:]) + (3,)
        np.testing.assert_allclose(found, expected, atol=ROUNDING[depth] * 1.01 + 1e-6, rtol=1e-3)
    if kind == "own":
        outputs["network_t"]["path"] = "made"
        assert run(outputs) == 0


TEACHER = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 12, "num_block": 2, "upscale": 4}


def test_a_second_call_for_a_folder_makes_what_is_missing_or_older(outputs: Options, photos: Path) -> None:
    lq = Path("LQ")
    lq.mkdir()
    for file in (photos / "LR_x4").iterdir():
        (lq / file.name).write_bytes(file.read_bytes())
    words = ("teacher.pth", "LQ", "-o", "made")
    make_of_folder(*words)
    first = {file.name: file.read_bytes() for file in Path("made").glob("*.png")}
    Path("made/cat.png").unlink()
    assert "4 images; 1 made now" in make_of_folder(*words)
    assert {file.name: file.read_bytes() for file in Path("made").glob("*.png")} == first
    later = os.path.getmtime("made/cat.png") + 10
    cv2.imwrite("LQ/cat.png", 255 - cv2.imread("LQ/cat.png"))
    os.utime("LQ/cat.png", (later, later))
    assert "4 images; 1 made now" in make_of_folder(*words)
    assert Path("made/cat.png").read_bytes() != first["cat.png"]
    weights = torch.load("teacher.pth")["params"]
    torch.save({"params": {name: value * 1.01 for name, value in weights.items()}}, "teacher.pth")
    with pytest.raises(OptionError, match="made: its outputs have teacher "):
        make_of_folder(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give either -opt FILE, or TEACHER FOLDER -o OUT"),
        (("teacher.pth", "LQ"), "give either -opt FILE"),
        (("teacher.pth", "LQ", "-o", "made", "-opt", "run.yml"), "give either -opt FILE"),
        (("none.pth", "LQ", "-o", "made"), "none.pth"),
        (("run.yml", "LQ", "-o", "made"), "run.yml"),
        (("strange.pth", "LQ", "-o", "made"), "strange.pth"),
        (("teacher.pth", "nowhere", "-o", "made"), "nowhere"),
        (("teacher.pth", "empty", "-o", "made"), "empty"),
        (("teacher.pth", "LQ", "-o", "LQ/made"), "-o: LQ/made is in LQ"),
        (("teacher.pth", "LQ", "-o", "made", "--lmdb"), "--lmdb: only works with -opt FILE"),
        (("teacher.pth", "twice", "-o", "made"), "twice: "),
    ],
)
def test_what_the_command_refuses_of_a_folder(
    words: tuple[str, ...], expected: str, outputs: Options, photos: Path
) -> None:
    Path("run.yml").write_text("name: run\n", encoding="utf-8")
    torch.save({"params": {"odd.weight": torch.zeros(3)}}, "strange.pth")
    for folder in ("LQ", "twice", "empty"):
        Path(folder).mkdir()
    image = (photos / "LR_x4" / "cat.png").read_bytes()
    for file in ("LQ/cat.png", "twice/cat.png", "twice/cat.bmp"):
        Path(file).write_bytes(image)
    with pytest.raises(KdsrError, match=re.escape(expected)) as error:
        make_of_folder(*words)
    assert len(error.value.problems) <= 2
    assert not Path("made").exists() and not Path("LQ/made").exists()
