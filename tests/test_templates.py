"""Every option file that ships: loads, passes the check, and runs two steps (or a test) at reduced sizes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.distill.tap_options import tap_pairs
from kdsr.distill.taps import module_names
from kdsr.models.builder import CosineAnnealingRestartCyclicLR
from kdsr.options.check import check
from kdsr.options.compose import Pieces
from kdsr.options.files import interpolate, load, merge, parse_yaml
from small_networks import SMALL

ROOT = Path(__file__).resolve().parents[1] / "options"
TRAIN = sorted((ROOT / "train").glob("*.yml"))
TEST = sorted((ROOT / "test").glob("*.yml"))

# the teacher (and any other network) is a little wider than the student
WIDER = {
    "SwinIR": {"embed_dim": 12},
    "RCAN": {"num_block": 2},
    "EDSR": {"num_feat": 12},
    "RLFN": {"num_blocks": 2},
    "NAFNet": {"width": 12},
    "NAFNetLocal": {"width": 12},
    "Restormer": {"dim": 16},
    "PReNet": {"num_block": 2},
    "SpandrelNet": {"parameters:feature_channels": 12},
}
SMALL_BLOCK = {"EDSR": "body.0", "RCAN": "body.0", "SwinIR": "layers.0"}
LOGGED = {"pixel_opt": "l_pix", "logits_opt": "l_ts", "lcr_opt": "l_lcr", "cl_opt": "l_cl", "ce_opt": "l_ce",
          "vq_opt": "l_codebook", "gan_opt": "l_g_gan", "facd_opt": "l_facd", "nc_opt": "l_nc", "et_opt": "l_et",
          "kl_opt": "l_kl", "fitnet_opt": "l_fitnet", "at_opt": "l_at", "fakd_opt": "l_fakd", "rkd_opt": "l_rkd",
          "csd_opt": "l_csd", "fm_opt": "l_fm", "fm_aux_opt": "l_fm_aux", "bm_opt": "l_bm",
          "neg_opt": "l_neg", "wavelet_opt": "l_wavelet"}  # fmt: skip


def reductions(options: dict[str, Any], photos: Path, weights: Path) -> Iterator[str]:
    """Overrides that make a template small and point it at test data; every other option stays its own."""
    scale = options["scale"]
    for name, dataset in options["datasets"].items():
        if name.endswith(("_2", "_3", "_4", "_5")):  # one set tells as much as five
            yield f"datasets:{name}=null"
            continue
        for key, folder in (("dataroot_gt", "GT"), ("dataroot_lq", "GT" if scale == 1 else f"LR_x{scale}")):
            if key in dataset:
                yield f"datasets:{name}:{key}={photos / folder}"
        yield f"datasets:{name}:io_backend:type=disk"
        if name == "train":
            # a multiple of the scale, of the VQGAN's 16, and SwinIR's windows of 8 in LQ pixels
            yield f"datasets:train:gt_size={48 if scale == 3 else 32}"
            yield "datasets:train:num_worker_per_gpu=0"
            samples = (
                3 if (options.get("train") or {}).get("rkd_opt") else 2
            )  # two have no relations to learn
            yield f"datasets:train:batch_size_per_gpu={samples}"
            yield "datasets:train:dataset_enlarge_ratio=1"
            yield "datasets:train:progressive=null"
    for key, network in options.items():
        if key.startswith("network_") and isinstance(network, dict):
            wider = WIDER.get(network["type"], {}) if key != "network_g" else {}
            for name, value in {**SMALL[network["type"]], **wider}.items():
                yield f"{key}:{name}={value}"
    for key, value in (options.get("path") or {}).items():
        if key.startswith("pretrain_network_") and value:
            yield f"path:{key}={weights / key}.pth"
    if init := (options.get("path") or {}).get("init_from"):
        yield f"path:init_from={weights / Path(init).name}"
    for index, pair in enumerate((options.get("train") or {}).get("taps") or ()):
        for role, name in pair.items():
            if re.fullmatch(
                r"body\.\d+", name
            ):  # of full depth; a share of the body (body.1/3) is there at any
                yield f"train:taps:{index}:{role}=body.0"
    if (options.get("train") or {}).get("blocks"):
        block = SMALL_BLOCK[options["network_g"]["type"]]  # there is one alone, and each may be named once
        yield f"train:blocks=[{{student: {block}, teacher: {block}}}]"
    if "train" in options:
        if options["train"].get("csd_negatives"):
            yield "train:csd_negatives=1"
        yield "train:total_iter=2"
        yield "logger:print_freq=1"
        yield "logger:use_tb_logger=false"
        if options["train"].get("gan_start"):
            yield "train:gan_start=0"  # the discriminator is to join within the two steps


def write_weights(options: dict[str, Any]) -> None:
    for key, file in (options.get("path") or {}).items():
        if key.startswith("pretrain_network_") and file:
            state = build_network(options[key.removeprefix("pretrain_")]).state_dict()
            torch.save({"params": state, "state_dict": state}, file)
    if init := (options.get("path") or {}).get("init_from"):
        torch.save({"params": build_network(options["network_g"]).state_dict()}, init)


@pytest.fixture
def small(
    request: pytest.FixtureRequest, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str], dict[str, Any]]:
    """A template, the overrides that reduce it, and the options that come of both; its weights are written."""
    monkeypatch.chdir(tmp_path)
    overrides = list(reductions(load(request.param), photos, tmp_path))
    options = load(request.param, overrides)
    torch.manual_seed(1)
    write_weights(options)
    return request.param, overrides, options


def ids(file: Path) -> str:
    return file.stem


PIECES = Pieces(ROOT)
CHOICES = {choice.name: choice for choice in PIECES.choices()}


def composed(name: str, folder: Path) -> dict[str, Any]:
    """The options of the file of this name that ``kdsr new`` writes."""
    file = folder / f"{name}.yml"
    file.write_text(PIECES.compose(CHOICES[name]).text(file, ROOT))
    return load(file)


@pytest.mark.parametrize("small", [*TRAIN, *TEST], ids=ids, indirect=True)
def test_passes_the_check(small: tuple[Path, list[str], dict[str, Any]]) -> None:
    file, _, options = small
    assert check(options, file.parent.name == "train") == []


@pytest.mark.parametrize("file", [*TRAIN, *TEST], ids=ids)
def test_as_it_ships_only_files_can_be_missing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing lies here
    found = check(load(file), file.parent.name == "train")
    assert [problem for problem in found if "there is no" not in problem] == []


def test_all_that_kdsr_new_composes_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks that are quickly built; those of full size are checked with the templates above."""
    monkeypatch.chdir(tmp_path)
    problems = {}
    for choice in CHOICES.values():
        recipe = PIECES.compose(choice)
        options: dict[str, Any] = {}
        for piece, _ in recipe.pieces:
            options = merge(options, PIECES.read(piece))
        options = merge(
            options, parse_yaml("\n".join([f"name: {recipe.name}", *recipe.settings]), recipe.name)
        )
        options = interpolate(options, recipe.name)
        for network in (options[key] for key in ("network_g", "network_t") if options.get(key)):
            network |= {key: value for key, value in SMALL[network["type"]].items() if ":" not in key}
        found = [problem for problem in check(options, True) if "there is no" not in problem]
        problems |= {recipe.name: found} if found else {}
    assert problems == {}


@pytest.mark.parametrize("small", TRAIN, ids=ids, indirect=True)
def test_trains_two_steps(small: tuple[Path, list[str], dict[str, Any]]) -> None:
    file, overrides, options = small
    assert train_entry.main(["-opt", str(file), "--force_yml", *overrides]) == 0

    run = Path("experiments") / options["name"]
    saved = torch.load(run / "models" / "net_g_latest.pth", weights_only=True)
    fresh = build_network(options["network_g"])
    fresh.load_state_dict(saved["params"])
    assert all(torch.isfinite(parameter).all() for parameter in fresh.parameters())
    assert ("params_ema" in saved) == (options["train"].get("ema_decay", 0) > 0)

    log = next(run.glob("train_*.log")).read_text()
    assert re.findall(r"iter: +(\d+), lr", log) == ["1", "2"]
    for key, name in LOGGED.items():
        assert bool(re.search(rf"\b{name}: [0-9.e+-]+ ", log)) == bool(options["train"].get(key)), name

    with open(run / "metrics.csv", newline="") as rows:
        networks = {row["network"] for row in csv.DictReader(rows)}
    teacher = {"teacher"} if options["val"].get("teacher") else set()
    assert networks - {"baseline"} == {"student"} | teacher

    resolved = load(run / file.name)  # runs alone
    assert check(resolved, True) == []
    assert {key: resolved[key] for key in options} == options


@pytest.mark.parametrize("small", TEST, ids=ids, indirect=True)
def test_tests(small: tuple[Path, list[str], dict[str, Any]]) -> None:
    file, overrides, options = small
    assert test_entry.main(["-opt", str(file), "--force_yml", *overrides]) == 0
    run = Path("results") / options["name"]
    with open(run / "metrics.csv", newline="") as rows:
        values = [float(row["value"]) for row in csv.DictReader(rows) if row["metric"] == "psnr"]
    assert len(values) == 4 and all(0 < value < 60 for value in values)
    assert len(list((run / "visualization").rglob("*.png"))) == 4


def parameters(network: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in build_network(network).parameters())


BENCHMARKS = {  # sets, and whether the papers measure the Y channel
    "GoPro": (["GoPro"], False),
    "Rain13K": (["Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"], True),
    "RESIDE": (["SOTS_indoor", "SOTS_outdoor"], False),
    "noise25": (["CBSD68", "Kodak24", "McMaster", "Urban100"], False),
}


@pytest.mark.parametrize("task", BENCHMARKS)
@pytest.mark.parametrize("backbone", ["NAFNet", "Restormer"])
def test_benchmarks_are_the_papers(backbone: str, task: str, tmp_path: Path) -> None:
    sets, luma = BENCHMARKS[task]
    teacher, student = (load(ROOT / f"test/{prefix}{backbone}_{task}.yml") for prefix in ("", "DCKD_"))
    trained = composed(f"DCKD_{backbone}_{task}", tmp_path)
    assert [dataset["name"] for dataset in teacher["datasets"].values()] == sets
    for options in (teacher, student):
        metrics = options["val"]["metrics"]
        assert {name: (m["crop_border"], m["test_y_channel"]) for name, m in metrics.items()} == {
            "psnr": (0, luma),
            "ssim": (0, luma),
        }
    if (backbone, task) == ("NAFNet", "GoPro"):  # which its authors measure with local statistics
        assert teacher["network_g"]["type"] == student["network_g"]["type"] == "NAFNetLocal"
    assert teacher["network_g"] == trained["network_t"]
    assert teacher["path"]["pretrain_network_g"] == trained["path"]["pretrain_network_t"]
    assert student["network_g"] == trained["network_g"]
    assert student["path"]["pretrain_network_g"] == f"experiments/{trained['name']}/models/net_g_latest.pth"


@pytest.mark.parametrize(
    ("backbone", "teacher", "student"),
    [
        ("SwinIR_x4", 11.9e6, 1.2e6),
        ("RCAN_x4", 15.6e6, 5.2e6),
        ("EDSR_x4", 43.1e6, 2.7e6),
        ("RLFN_x4", 0.544e6, 0.054e6),
        ("NAFNet_GoPro", 17.1e6, 2.7e6),
        ("Restormer_Rain13K", 26.1e6, 3.8e6),
    ],
)
def test_sizes_are_the_papers(backbone: str, teacher: float, student: float) -> None:
    options = load(ROOT / f"train/DCKD_{backbone}.yml")
    assert parameters(options["network_t"]) == pytest.approx(teacher, rel=0.01)
    assert parameters(options["network_g"]) == pytest.approx(student, rel=0.03)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("backbone", ["SwinIR", "RCAN", "EDSR"])
@pytest.mark.parametrize("method", ["DCKD", "Logits", "Scratch"])
def test_schedule_and_weights_are_the_papers(method: str, backbone: str, scale: int, tmp_path: Path) -> None:
    options = composed(f"{method}_{backbone}_x{scale}", tmp_path)
    train, data = options["train"], options["datasets"]["train"]
    assert options["scale"] == scale
    assert data["gt_size"] == 48 * scale and data["batch_size_per_gpu"] == 16
    assert data["dataroot_lq"].endswith(f"X{scale}_sub")
    assert (train["optim_g"]["type"], train["optim_g"]["lr"]) == ("Adam", 1e-4)
    assert train["scheduler"] == {"type": "MultiStepLR", "milestones": [100000, 200000], "gamma": 0.1}
    assert train["total_iter"] == 250000
    assert all(
        metric["test_y_channel"] and metric["crop_border"] == scale
        for metric in options["val"]["metrics"].values()
    )
    weights = {key: value["loss_weight"] for key, value in train.items() if key.endswith("_opt")}
    expected = {"pixel_opt": 1.0}
    if method != "Scratch":
        expected |= {"logits_opt": 1.0}
        assert options["path"]["pretrain_network_t"].endswith(f"x{scale}.pth")
    if method == "DCKD":
        expected |= {"cl_opt": 0.1, "ce_opt": 0.001}
        assert train["num_neg"] == 5 and train["clean_negative"] is False
        assert train["history_source"] == "student" and train["update_decay"] == 0.1
        assert train["ce_opt"]["variant"] == "equation_9"
    assert weights == expected
    assert bool(options["network_t"]) == (method != "Scratch")


@pytest.mark.parametrize("backbone", ["SwinIR", "RCAN", "EDSR"])
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("AT", {"pixel_opt": 1.0, "at_opt": 0.217}),
        ("FAKD", {"pixel_opt": 0.5, "logits_opt": 0.5, "fakd_opt": 0.0392}),
        ("CSD", {"pixel_opt": 1.0, "csd_opt": 0.784}),
    ],
)
def test_weights_of_the_rivals_are_the_papers(
    method: str, weights: dict[str, float], backbone: str, tmp_path: Path
) -> None:
    train = composed(f"{method}_{backbone}_x4", tmp_path)["train"]
    assert {key: value["loss_weight"] for key, value in train.items() if key.endswith("_opt")} == weights


@pytest.mark.parametrize("method", ["DCKD", "Scratch"])
@pytest.mark.parametrize(
    ("backbone", "decay", "betas"), [("NAFNet", 1e-3, [0.9, 0.9]), ("Restormer", 1e-4, [0.9, 0.999])]
)
def test_nafnet_and_restormer_train_as_by_their_authors(
    method: str, backbone: str, decay: float, betas: list[float], tmp_path: Path
) -> None:
    train = composed(f"{method}_{backbone}_GoPro", tmp_path)["train"]
    assert train["clip_grad_norm"] == 0.01 and not train.get("ema_decay")
    assert (train["optim_g"]["weight_decay"], train["optim_g"]["betas"]) == (decay, betas)
    psnr = (method, backbone) == ("Scratch", "NAFNet")  # with a teacher L1, as the DCKD paper states
    assert train["pixel_opt"] == {
        "type": "PSNRLoss" if psnr else "L1Loss",
        "loss_weight": 1.0,
        "reduction": "mean",
    }
    assert "mixing_augs" not in train


def test_restormers_learning_rates_and_mixup_are_its_authors(tmp_path: Path) -> None:
    train = composed("Logits_Restormer_noise25", tmp_path)["train"]
    assert train["mixing_augs"] == {"mixup": True, "mixup_beta": 1.2, "use_identity": True}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train["optim_g"]["lr"])
    settings = {key: value for key, value in train["scheduler"].items() if key != "type"}
    scheduler = CosineAnnealingRestartCyclicLR(optimizer, **settings)
    # 3e-4 for 92k iterations; half of a cosine after 104k more; then 1e-6
    for iteration, rate in {0: 3e-4, 91999: 3e-4, 92000: 3e-4, 196000: 1.505e-4, 300000: 1e-6}.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr() == pytest.approx([rate])


def test_the_release_is_the_releases() -> None:
    options = load(ROOT / "train/DCKD_SwinIR_x4_release.yml")
    train = options["train"]
    weights = {key: value["loss_weight"] for key, value in train.items() if key.endswith("_opt")}
    assert weights == {"pixel_opt": 1.0, "logits_opt": 1.0, "lcr_opt": 1.0, "cl_opt": 0.1, "ce_opt": 0.001}
    assert train["ce_opt"]["variant"] == "released"
    assert (train["num_neg"], train["clean_negative"]) == (4, True)
    assert (train["history_source"], train["update_decay"], train["ema_decay"]) == ("ema", 0.1, 0.999)
    assert train["scheduler"]["milestones"] == [train["total_iter"]] == [250000]
    probabilities = ("gaussian_noise_prob", "gray_noise_prob", "gaussian_blur_prob", "resize_prob")
    assert [train[key] for key in probabilities] == [1.0, 0.5, 0, 0]
    assert train["noisy"] == {"prob": 0.5}
    assert options["network_vqgan"]["input_range"] == [0, 1]
    assert options["val"]["window_size"] == 8


def test_both_mistakes_of_a_template_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "train/Scratch_EDSR_x4.yml"
    flags = ["network_g:num_feats=8", "train:optim_g:lrr=1"]
    assert train_entry.main(["-opt", str(file), "--force_yml", *flags]) == 2
    error = capsys.readouterr().err
    assert "network_g.num_feats" in error and "train.optim_g.lrr" in error


TAPPED = [
    name
    for name, choice in CHOICES.items()
    if choice.method in ("FAKD", "FACD", "MiPKD", "SLKD")
    and (choice.data, choice.scale) in (("DIV2K", 4), ("Rain13K", 1))
]


@pytest.mark.parametrize("name", [*TAPPED, "SLKD_NAFNet_demo_sample_rain"])
def test_the_taps_are_there_at_full_size(name: str, tmp_path: Path) -> None:
    options = composed(name, tmp_path)
    for key, teacher in (("taps", "t"), ("blocks", "t"), ("encoder_taps", "t"), ("decoder_taps", "tb")):
        pairs = tap_pairs(options["train"][key]) if options["train"].get(key) else []
        networks = {
            "student": options["network_g"],
            "teacher": options.get(f"network_{teacher}", options.get("network_t")),
        }
        for role, network in networks.items() if pairs else ():
            counts = network["type"] == "SwinIR"  # with values, while it is built
            with torch.device("cpu" if counts else "meta"):
                net = build_network(network)
            module_names(net, [getattr(pair, role) for pair in pairs], f"train.{key}.{role}")


PUBLISHED = {
    ("taps", "EDSR"): ["body.9", "body.20", "conv_after_body"],  # FAKD's release
    ("taps", "RCAN"): ["body.2", "body.6", "conv_after_body"],  # likewise
    ("blocks", "EDSR"): ["body.10", "body.21", "body.31"],
    ("blocks", "RCAN"): ["body.2", "body.5", "body.9"],
}


@pytest.mark.parametrize(("kind", "backbone"), PUBLISHED)
def test_the_pieces_name_the_published_modules_at_the_papers_depth(kind: str, backbone: str) -> None:
    networks = load(ROOT / f"_base_/backbones/{backbone}.yml", ["scale=4"])
    pairs = tap_pairs(load(ROOT / f"_base_/{kind}/{backbone}.yml")["train"][kind])
    for role, key in (("student", "network_g"), ("teacher", "network_t")):
        with torch.device("meta"):
            net = build_network(networks[key])
        assert module_names(net, [getattr(pair, role) for pair in pairs], kind) == PUBLISHED[kind, backbone]
