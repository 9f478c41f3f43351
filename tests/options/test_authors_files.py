"""The option files of NAFNet and Restormer run as they are; their arithmetic is that of their code."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from basicsr.archs import build_network

from authors_files import NAFNET_TESTS, NAFNET_TRAINING, RESTORMER, changed
from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.models.builder import Builder
from kdsr.models.restoration_model import ImageRestorationModel
from kdsr.options.authors import translate
from kdsr.options.check import check
from kdsr.options.early import misspelt
from kdsr.options.files import load
from kdsr.prepare.pair_writer import write_lmdb
from small_runs import complete

Options = dict[str, Any]
TRAINING = NAFNET_TRAINING | RESTORMER


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GT/ and LQ/: two photographs of 256×256 pixels, and blurred ones; both also as LMDBs."""
    root = tmp_path_factory.mktemp("authors")
    photos = {"astronaut": skimage.data.astronaut()[:256, :256], "coffee": skimage.data.coffee()[:256, :256]}
    for folder in ("GT", "LQ"):
        (root / folder).mkdir()
        for name, image in photos.items():
            pixels = np.ascontiguousarray(image[..., ::-1])
            pixels = cv2.GaussianBlur(pixels, (5, 5), 2) if folder == "LQ" else pixels
            assert cv2.imwrite(str(root / folder / f"{name}.png"), pixels)
        write_lmdb(root / folder, root / f"{folder}.lmdb", dict.fromkeys(photos, (256, 256, 3)))
    return root


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_files(options: Options, images: Path) -> Options:
    """The options; what they name is there afterwards."""
    for dataset in options["datasets"].values():
        for key, folder in (("dataroot_gt", "GT"), ("dataroot_lq", "LQ")):
            root = Path(dataset[key])
            if dataset[key] != "none" and not root.exists():
                root.parent.mkdir(parents=True, exist_ok=True)
                root.symlink_to(images / (folder + root.suffix))
    weights = options["path"]["pretrain_network_g"]
    if weights:
        Path(weights).parent.mkdir(parents=True)
        torch.save({"params": build_network(copy.deepcopy(options["network_g"])).state_dict()}, weights)
    return options


def write(options: Options) -> str:
    Path("file.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return "file.yml"


def small(options: Options) -> Options:
    """Two steps of a small network on small patches."""
    train = options["datasets"]["train"]
    sizes: Options = {"batch_size_per_gpu": 2, "gt_size": 64, "num_worker_per_gpu": 0}
    if "iters" in train:
        sizes |= {"iters": [1, 5], "gt_sizes": [32, 64], "mini_batch_sizes": [2, 1]}
    network = {"width": 4, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]}
    if options["network_g"]["type"] == "Restormer":
        network = {"dim": 4, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
    return changed(
        options,
        {f"datasets.train.{key}": value for key, value in sizes.items()}
        | {f"network_g.{key}": value for key, value in network.items()}
        | {"train.total_iter": 2, "val.val_freq": 2, "logger.print_freq": 1},
    )


@pytest.mark.parametrize("name", [*TRAINING, *NAFNET_TESTS])
def test_every_file_passes_the_check(name: str, images: Path) -> None:
    """Unchanged, but for the weights that a test reads."""
    options = copy.deepcopy((TRAINING | NAFNET_TESTS)[name])
    weights = options["path"]["pretrain_network_g"]
    if weights:
        Path(weights).parent.mkdir(parents=True)
        Path(weights).touch()
    options["path"]["pretrain_network_g"] = None
    file = write(with_files(options, images))
    assert misspelt(["-opt", file], name in TRAINING) == []
    read = load(file)
    read["path"]["pretrain_network_g"] = weights
    warnings: list[str] = []
    assert translate(read, warnings) == []
    assert check(read, name in TRAINING, warnings) == []
    accepted = ["val.use_image"] if options["val"].get("use_image") is False else []
    assert [warning.split(":")[0] for warning in warnings] == accepted


@pytest.mark.parametrize(
    "name",
    [
        "train/GoPro/width32",
        "train/SIDD/width64",
        "Deraining_Restormer",
        "RealDenoising_Restormer",
        "GaussianColorDenoising_Restormer",
        "GaussianGrayDenoising_RestormerSigma15",
    ],
)
def test_training(name: str, images: Path) -> None:
    options = with_files(small(TRAINING[name]), images)
    assert train_entry.main(["-opt", write(options)]) == 0
    folder = Path("experiments", options["name"])
    saved = torch.load(folder / "models/net_g_latest.pth", weights_only=True)
    assert "params" in saved and "params_ema" not in saved  # no moving average
    log = next(folder.glob("train_*.log")).read_text()
    assert re.findall(r"iter: +(\d+), lr", log) == ["1", "2"]
    assert "grad_norm: " in log and log.count("# psnr: ") >= 1
    assert load(folder / "file.yml")["train"]["clip_grad_norm"] == 0.01


def test_testing(images: Path) -> None:
    options = changed(
        NAFNET_TESTS["test/GoPro/width32"],
        {"network_g.width": 4, "network_g.enc_blk_nums": [1, 1], "network_g.dec_blk_nums": [1, 1]},
    )
    assert test_entry.main(["-opt", write(with_files(options, images))]) == 0
    names = sorted(path.name for path in Path("results").rglob("*.png"))
    assert names == [f"{image}_{options['name']}.png" for image in ("astronaut", "coffee")]


def test_baseline_networks_are_not_known(images: Path) -> None:
    options = with_files(copy.deepcopy(NAFNET_TRAINING["train/SIDD/width32"]), images)
    options["network_g"] = {**options["network_g"], "type": "Baseline", "dw_expand": 1, "ffn_expand": 2}
    translate(options, [])
    problems = check(options, True)
    assert len(problems) == 1 and problems[0].startswith("network_g.type: 'Baseline' is not known")


# -------------------------------------------------------------------------------------------------------- translation


def test_stages_become_progressive() -> None:
    options = copy.deepcopy(RESTORMER["Deraining_Restormer"])
    assert translate(options, []) == []
    train = options["datasets"]["train"]
    assert (train["gt_size"], train["batch_size_per_gpu"]) == (128, 8)
    assert train["progressive"] == [
        {"after": 92000, "gt_size": 160, "batch_size_per_gpu": 5},
        {"after": 156000, "gt_size": 192, "batch_size_per_gpu": 4},
        {"after": 204000, "gt_size": 256, "batch_size_per_gpu": 2},
        {"after": 240000, "gt_size": 320, "batch_size_per_gpu": 1},
        {"after": 276000, "gt_size": 384, "batch_size_per_gpu": 1},
    ]
    assert (train["use_hflip"], train["use_rot"]) == (True, True)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Deraining_Restormer", {"datasets.train.iters": [1]}, "datasets.train: iters, gt_sizes, mini"),
        ("Deraining_Restormer", {"datasets.train.gt_sizes": ...}, "datasets.train: iters, gt_sizes, mini"),
        ("Deraining_Restormer", {"datasets.train.use_rot": False}, "datasets.train.geometric_augs: is another name of"),
        ("train/SIDD/width32", {"datasets.train.use_hflip": True}, "datasets.train.use_flip: is another name of"),
        (
            "train/SIDD/width32",
            {"train.use_grad_clip": False, "train.clip_grad_norm": 1},
            "train.use_grad_clip: false contradicts",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_reported(name: str, changes: Options, problem: str) -> None:
    problems = translate(changed(TRAINING[name], changes), [])
    assert len(problems) == 1 and problems[0].startswith(problem)


@pytest.mark.parametrize(
    "wrong", [{"gt_size": "large"}, {"batch_size_per_gpu": None}, {"type": ["Dataset_PairedImage"]}]
)
def test_what_is_no_number_or_name_is_left_to_the_check(wrong: Options) -> None:
    options = changed(
        TRAINING["Deraining_Restormer"], {f"datasets.train.{key}": value for key, value in wrong.items()}
    )
    assert translate(options, []) == []
    assert options["datasets"]["train"]["iters"]


def test_what_has_no_equal_is_named() -> None:
    options = changed(
        NAFNET_TESTS["test/SIDD/width32"], {"val.grids": True, "val.rgb2bgr": False, "val.crop_size_h": 256}
    )
    warnings: list[str] = []
    assert translate(options, warnings) == []
    assert [warning.split(":")[0] for warning in warnings] == ["val.grids", "val.use_image", "val.rgb2bgr"]


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("ImageRestorationModel", {}, 0.01),
        ("ImageRestorationModel", {"use_grad_clip": False}, None),
        ("ImageRestorationModel", {"clip_grad_norm": 0.5}, 0.5),
        ("ImageCleanModel", {}, None),
        ("KDModel", {"use_grad_clip": True}, 0.01),
        ("DCKDModel", {"use_grad_clip": True}, 0.01),
    ],
)
def test_clipping_from_the_options(model: str, given: Options, expected: float | None) -> None:
    options = {"model_type": model, "train": {"total_iter": 1, **given}}
    assert translate(options, []) == []
    assert options["train"].get("clip_grad_norm") == expected and "use_grad_clip" not in options["train"]
    assert translate(options, []) == []  # as a run's resolved options, read again
    assert options["train"].get("clip_grad_norm") == expected


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_the_gradient_is_clipped() -> None:
    options = small(NAFNET_TRAINING["train/GoPro/width32"])
    options["train"]["optim_g"] = {"type": "SGD", "lr": 1.0}
    translate(options, [])
    torch.manual_seed(0)
    model = ImageRestorationModel(complete(options))
    before = [parameter.detach().clone() for parameter in model.net_g.parameters()]
    model.feed_data({key: torch.rand(2, 3, 64, 64) for key in ("lq", "gt")})
    model.optimize_parameters(1)
    moved = [now.detach() - then for now, then in zip(model.net_g.parameters(), before, strict=True)]
    assert torch.cat([step.flatten() for step in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert model.get_current_log()["grad_norm"] > 1  # the norm before


def rates(scheduler: Options, lr: float, count: int = 10) -> list[float]:
    """The learning rates of the first iterations, as BasicSR's loop steps them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    (schedule,) = Builder({"train": {"scheduler": scheduler}}, torch.device("cpu")).schedulers([optimizer])
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(1, count):
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_true_cosine() -> None:
    found = rates({"type": "TrueCosineAnnealingLR", "T_max": 9, "eta_min": 0.1}, 1.1)
    # 0.1 + (1 + cos(20° k)) / 2
    expected = [
        1.1,
        1.0698463104,
        0.9830222216,
        0.85,
        0.6868240888,
        0.5131759112,
        0.35,
        0.2169777784,
        0.1301536896,
        0.1,
    ]
    assert found == pytest.approx(expected, abs=1e-9)


def test_cyclic_cosine() -> None:
    cycles = {"periods": [3, 6], "restart_weights": [1, 0.5], "eta_mins": [1.0, 0.1]}
    found = rates({"type": "CosineAnnealingRestartCyclicLR", **cycles}, 1.0)
    # constant, then 0.1 + 0.5 * 0.45 * (1 + cos(30° k))
    half = math.sqrt(3) / 2
    expected = [0.1 + 0.225 * (1 + cosine) for cosine in (half, 0.5, 0, -0.5, -half, -1)]
    assert found == pytest.approx([1.0] * 4 + expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "problem"),
    [
        ({"type": "TrueCosineAnnealingLR"}, "train.scheduler.T_max: is required by TrueCosineAnnealingLR"),
        (
            {"type": "CosineAnnealingRestartCyclicLR", "periods": [1, 9], "restart_weights": [1, 1]},
            "train.scheduler.eta_mins: 1 values for 2 periods",
        ),
        (
            {"type": "CosineAnnealingRestartCyclicLR", "periods": [1]},
            "train.scheduler.periods: sum to 1 iterations, train.total_iter is 3",
        ),
    ],
)
def test_schedules_that_cannot_be(run_options: Options, scheduler: Options, problem: str) -> None:
    run_options["train"]["scheduler"] = scheduler
    assert check(run_options, True) == [problem]


def test_models_of_basicsr_do_not_know_these_schedules(run_options: Options) -> None:
    run_options["model_type"] = "SRModel"
    run_options["train"]["scheduler"] = {"type": "TrueCosineAnnealingLR", "T_max": 9}
    assert any("'TrueCosineAnnealingLR' is not known" in problem for problem in check(run_options, True))
