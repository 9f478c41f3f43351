"""Values of declared keys: each one means what it says, or is refused with the key's name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from basicsr.utils.registry import METRIC_REGISTRY, MODEL_REGISTRY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdsr.models.image_metrics import better_of, calculate_metric
from kdsr.models.trainer import LoopInterface
from kdsr.options.check import check
from kdsr.options.check_data import keys_of_dataset
from kdsr.options.model_keys import ModelKeys, readers_of
from kdsr.options.parse import parse_options
from kdsr.options.stock import STOCK_METRICS
from kdsr.runtime.declarations import Option, check_value
from kdsr.runtime.distributed import DistOptions
from kdsr.runtime.precision import PrecisionOptions
from small_runs import problems_after

Options = dict[str, Any]
MODELS = [model for _, model in MODEL_REGISTRY if issubclass(model, LoopInterface)]
QUICK = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=30,
)


def flat(declared: Mapping[str, Option], place: str) -> Iterator[tuple[str, Option]]:
    for key, wanted in declared.items():
        here = f"{place}.{key}" if place else key
        if wanted.section is not None and dict in wanted.kinds:
            yield from flat(wanted.section.declared(), here)
        else:
            yield here, wanted


def declared() -> dict[str, Option]:
    """Every declared option, by its place in an option file."""
    keys = ModelKeys(MODEL_REGISTRY.get("DCKDModel"))
    sections = {
        "": {key: wanted for key, wanted in keys.top.items() if key != "num_gpu"},
        "train": keys.train,
        "val": keys.val,
        "logger": keys.logger,
        "dist_params": DistOptions.declared(),
        "precision": PrecisionOptions.declared(),
        "datasets.train": keys_of_dataset("PairedImageDataset"),
        "val.metrics.psnr": STOCK_METRICS["calculate_psnr"].declared(),
    }
    return dict(pair for place, table in sections.items() for pair in flat(table, place))


DECLARED = declared()
WORDS = {place: allowed for place, allowed in DECLARED.items() if allowed.choices}
NUMBERS = {
    place: allowed
    for place, allowed in DECLARED.items()
    if int in allowed.kinds and bool not in allowed.kinds
}


def names(problems: list[str], place: str) -> bool:
    return any(problem.startswith(f"{place}: ") for problem in problems)


def test_the_keys_that_are_known_to_be_misread_are_among_them() -> None:
    assert {"datasets.train.color", "datasets.train.prefetch_mode", "precision.amp"} <= WORDS.keys()
    assert {"logger.print_freq", "val.val_freq", "logger.keep_last", "train.ema_decay"} <= NUMBERS.keys()


@QUICK
@given(place=st.sampled_from(sorted(WORDS)), other=st.text(min_size=1, max_size=8), case=st.booleans())
def test_other_words_are_refused(run_options: Options, place: str, other: str, case: bool) -> None:
    word = WORDS[place].choices[0].swapcase() if case else other
    found = problems_after(run_options, {place: word})
    assert names(found, place) == (word not in WORDS[place].choices)
    if case and len(word) > 1:
        assert any(f"did you mean {WORDS[place].choices[0]}" in problem for problem in found)


@QUICK
@given(
    place=st.sampled_from(sorted(NUMBERS)),
    value=st.integers(-3, 3) | st.floats(-3, 3) | st.just(float("inf")),
)
def test_numbers_out_of_bounds_are_refused(run_options: Options, place: str, value: float) -> None:
    allowed = NUMBERS[place]
    inside = allowed.lowest <= value <= allowed.highest and allowed.above < value < allowed.below
    whole = float in allowed.kinds or float(value).is_integer()
    problems: list[str] = []
    assert check_value(value, allowed, place, problems) == (not problems) == (inside and whole)
    if problems:
        assert names(problems, place) and names(problems_after(run_options, {place: value}), place)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("datasets.train.color", "GS", "color: 'GS' is neither y nor rgb nor null"),
        ("datasets.train.color", "Y", "color: 'Y' is neither y nor rgb nor null; did you mean y?"),
        ("datasets.train.color", "gray", "color: 'gray' is neither y nor rgb nor null"),
        ("datasets.train.color", "y", "datasets.val.color: is rgb, but datasets.train is y"),
        ("datasets.train.mean", [0.5, 0.5, 0.5], "datasets.train.std: is required by mean"),
        ("datasets.train.std", [1, 1], "datasets.train.std: 2 values for images of 3 channels"),
        ("datasets.train.std", [1, 0, 1], "datasets.train.std.1: 0 is not above 0"),
        ("datasets.train.std", [1, "x", 1], "datasets.train.std.1: expected a number"),
        ("datasets.train.use_shuffle", False, "use_shuffle: training sets are always shuffled"),
        ("datasets.train.dataset_enlarge_ratio", 0.5, "0.5 would omit the same images in every epoch"),
        ("datasets.train.io_backend.type", "LMDB", "'LMDB' is neither disk nor lmdb; did you mean lmdb?"),
        ("datasets.train.io_backend.db_paths", ["x"], "io_backend.db_paths: is set by the data set"),
        ("datasets.train.io_backend.client_keys", ["lq", "gt"], "io_backend.client_keys: is for LMDBs only"),
        ("datasets.train.filename_tmpl", "x4", "filename_tmpl: 'x4' must be like"),
        ("datasets.train.progressive", [{"after": float("inf")}], "progressive.0.after: expected a whole number, "),
        ("datasets.train_2", {"name": "more"}, "datasets.train_2: training knows sets named train or val, val_NAME"),
        ("datasets.val.name", "../x", "datasets.val.name: '../x' becomes part of the name of a file"),
        ("name", "..", "name: '..' is not the name of a new folder"),
        ("scale", float("inf"), "scale: expected a whole number or null, got inf"),
        ("save_img", True, "save_img: has no effect here; set val.save_img"),
        ("crop_border", 8, "crop_border: has no effect here; set val.metrics.NAME.crop_border"),
        ("suffix", "x4", "suffix: has no effect here; set val.suffix"),
        ("val.suffix", "a/b", "val.suffix: 'a/b' becomes part of the name of a file"),
        ("val", {"val_freq": 1, "multiple_of": 4, "window_size": 8}, "val.window_size: 8 is another name of val.mul"),
        ("val.metrics.psnr.better", "lower", "better: higher values of calculate_psnr are better"),
        ("val.metrics.psnr.input_order", "CHW", "input_order: 'CHW' is not HWC"),
        ("val.metrics.psnr.crop_border", True, "crop_border: expected a whole number, got True"),
        ("val.metrics.psnr.crop_border", -1, "val.metrics.psnr.crop_border: -1 is below 0"),
        ("train.ema_decay", 1, "train.ema_decay: 1 is not below 1"),
        ("train.scheduler.milestones", [1.5], "train.scheduler.milestones.0: expected a whole number, got 1.5"),
        ("train.scheduler.milestones", [-1], "train.scheduler.milestones.0: -1 is below 1"),
        ("train.scheduler.gamma", -0.5, "train.scheduler.gamma: -0.5 is not above 0"),
        ("train.scheduler.restart_weights", [-1], "train.scheduler.restart_weights.0: -1 is below 0"),
        ("path.ignore_resume_networks", ["network_G"], "there is no 'network_G'; did you mean network_g?"),
        ("path.ignore_resume_networks", "network_g", "network_g is always restored from the training state"),
        ("path.pretrain_network_his", "x.pth", "pretrain_network_his: has no effect, network_his is a copy"),
        ("path.param_key_tb", "params", "path.param_key_tb: has no effect, there is no network_tb"),
        ("logger.wandb", {"resume_id": "1"}, "logger.wandb.resume_id: has no effect without logger.wandb.project"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(
    dckd_options: Options, place: str, value: Any, message: str
) -> None:
    found = problems_after(dckd_options, {place: value})
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("datasets.train.color", "rgb"),
        ("datasets.train.color", None),
        ("datasets.train.use_shuffle", True),
        ("datasets.train.io_backend.type", "disk"),
        ("datasets.train.mean", None),
        ("save_img", False),
        ("crop_border", 4),  # as in val.metrics
        ("val.metrics.psnr.better", "higher"),
        ("train.scheduler.milestones", [5e3, 250000]),
        ("path.ignore_resume_networks", ["network_t"]),
        ("network_tb", None),
    ],
)
def test_what_is_read_is_taken(dckd_options: Options, place: str, value: Any) -> None:
    assert problems_after(dckd_options, {place: value}) == []


def test_all_sets_may_be_of_the_y_channel(run_options: Options) -> None:
    changes = {f"datasets.{name}.{key}": value for name in ("train", "val")
               for key, value in {"color": "y", "mean": [0.5], "std": [0.5]}.items()}  # fmt: skip
    assert problems_after(run_options, changes) == []


# -------------------------------------------------------------------------- what only other keys make use of


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_readers_are_keys_that_the_model_has(model: type) -> None:
    keys = ModelKeys(model)
    for key, readers in readers_of(model).items():
        assert readers <= keys.train.keys()
        assert key in keys.train or key.removeprefix("network_") in keys.networks


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"train.gate": "soft"}, "train.gate: has no effect without train.facd_opt"),
        ({"train.csd_negatives": 1}, "train.csd_negatives: has no effect without train.csd_opt"),
        (
            {"train.taps": {"student": ["body.0"], "teacher": ["body.0"]}},
            "train.taps: has no effect without",
        ),
        ({"train.cl_opt": ...}, "train.num_neg: has no effect without train.cl_opt"),
        ({"train.cl_opt": None}, None),  # switched off for a run
        ({"train.gate": "soft", "train.facd_opt": None}, None),
        ({}, None),
    ],
)
def test_what_nothing_reads_is_a_warning(dckd_options: Options, changes: Options, warned: str | None) -> None:
    dckd_options["train"]["ema_decay"] = 0  # of which there would be a warning too
    changed = copy.deepcopy(dckd_options)
    for place, value in changes.items():
        section, key = place.split(".")
        changed[section].pop(key, None)
        if value is not ...:
            changed[section][key] = value
    warnings: list[str] = []
    assert check(changed, True, warnings) == []
    assert any(warned in warning for warning in warnings) if warned else warnings == []


def test_teacher_b_without_its_term_is_a_warning(dckd_options: Options) -> None:
    dckd_options["network_tb"] = dict(dckd_options["network_t"])
    warnings: list[str] = []
    check(dckd_options, True, warnings)
    assert "network_tb: has no effect without train.et_opt" in warnings


# ------------------------------------------------------------------------------------------ numbers as YAML gives them


def test_whole_floats_are_counts_wherever_a_number_counts(
    run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    run_options["val"].update(tile=64.0, tile_overlap=8.0, multiple_of=2.0)
    run_options["dist_params"] = {"port": 29500.0}
    run_options["logger"]["keep_last"] = 2.0
    run_options["datasets"]["train"].update(gt_size=64.0, num_prefetch_queue=1.0)
    Path("run.yml").write_text(yaml.safe_dump(run_options))
    opt, _ = parse_options(str(tmp_path), True, ["-opt", "run.yml"])
    for section, key in (
        *((opt["val"], key) for key in ("tile", "tile_overlap", "multiple_of")),
        (opt["dist_params"], "port"),
        (opt["logger"], "keep_last"),
        *((opt["datasets"]["train"], key) for key in ("gt_size", "num_prefetch_queue")),
    ):
        assert type(section[key]) is int, key


# ------------------------------------------------------------------------------------------------- which way is better


@pytest.fixture
def own_metrics() -> Iterator[None]:
    def without_a_word(img: Any, img2: Any) -> float:
        return 1.0

    def my_error(img: Any, img2: Any) -> float:
        return float(abs(img.astype(float) - img2).mean())

    my_error.better = "lower"  # type: ignore[attr-defined]
    METRIC_REGISTRY._obj_map.update(without_a_word=without_a_word, my_error=my_error)
    yield
    for name in ("without_a_word", "my_error"):
        del METRIC_REGISTRY._obj_map[name]


def test_the_direction_of_a_metric(own_metrics: None) -> None:
    directions = {
        "calculate_psnr": "higher",
        "calculate_ssim": "higher",
        "calculate_niqe": "lower",
        "my_error": "lower",
    }
    assert {kind: better_of({"type": kind}) for kind in directions} == directions
    assert better_of({"type": "without_a_word"}) is None
    assert better_of({"type": "without_a_word", "better": "lower"}) == "lower"
    assert calculate_metric({"img": 1, "img2": 2}, {"type": "without_a_word", "better": "lower"}) == 1.0


def test_a_metric_that_does_not_say_which_way_is_better(run_options: Options, own_metrics: None) -> None:
    run_options["val"]["metrics"]["mine"] = {"type": "without_a_word"}
    warnings: list[str] = []
    assert check(run_options, True, warnings) == []
    assert [warning for warning in warnings if "ema_decay" not in warning] == [
        "val.metrics.mine.better: not given, and without_a_word does not declare it; set higher or lower "
        "(higher is assumed)"
    ]
    run_options["logger"]["save_best"] = {"set": "held_out", "metric": "mine"}
    assert check(run_options, True) == [
        "val.metrics.mine.better: is required by logger.save_best.metric; give higher or lower"
    ]
    run_options["val"]["metrics"]["mine"]["better"] = "lower"
    run_options["train"]["ema_decay"] = 0
    assert check(run_options, True, warnings := []) == warnings == []


def test_the_best_checkpoint_is_not_judged_on_a_set_without_gt(run_options: Options) -> None:
    run_options["logger"]["save_best"] = {"set": "held_out", "metric": "psnr"}
    assert check(run_options, True) == []
    val = run_options["datasets"]["val"]
    run_options["datasets"]["val"] = {
        "name": "held_out", "type": "LQImageDataset", "dataroot_lq": val["dataroot_lq"],
    }  # fmt: skip
    assert "logger.save_best.metric: calculate_psnr needs GT, which the set held_out does not have" in check(
        run_options, True
    )
