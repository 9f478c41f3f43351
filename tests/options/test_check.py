"""The option check: everything at once, nearest names, nothing that stock BasicSR or DCKD's release reads refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.options.check import check
from kdsr.options.parse import parse_options
from kdsr.options.signatures import check_call
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest
from small_runs import problems_after


def test_a_run_that_is_right_has_no_problems(run_options: dict[str, Any]) -> None:
    before = copy.deepcopy(run_options)
    assert check(run_options, True) == []
    assert run_options == before


def test_dckd_has_no_problems(dckd_options: dict[str, Any]) -> None:
    assert check(dckd_options, True) == []


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        # names
        ("scal", 4, "scal: unknown key; did you mean scale?"),
        ("model_type", "DCKDModle", "model_type: the text 'DCKDModle' is not known; did you mean DCKDModel?"),
        ("network_x", {"type": "EDSR"}, "network_x: unknown key; did you mean network_"),
        ("train.optim_g.lrr", 1, "train.optim_g.lrr: Adam has no such parameter; did you mean lr?"),
        ("train.optim_g.type", "Adm", "train.optim_g.type: 'Adm' is not known; did you mean Adam"),
        ("train.mum_neg", 3, "train.mum_neg: unknown key; did you mean num_neg?"),
        ("train.noisy", {"prop": 0.5}, "train.noisy.prop: unknown key; did you mean prob?"),
        ("train.scheduler.gama", 0.5, "train.scheduler.gama: MultiStepLR has no such parameter"),
        ("train.scheduler.type", "Cosine", "train.scheduler.type: 'Cosine' is not known; "),
        ("train.cl_opt.type", "ContrastLoss", "'ContrastLoss' is not known; did you mean ContrasLoss?"),
        ("train.cl_opt.wieghts", [1], "train.cl_opt.wieghts: ContrasLoss has no such parameter; did you mean"),
        ("train.pixel_opt.type", "l1loss", "train.pixel_opt.type: 'l1loss' is not known; did you mean L1Loss?"),
        ("network_g.num_feats", 8, "network_g.num_feats: EDSR has no such parameter; did you mean num_feat?"),
        ("network_t.type", "EDRS", "network_t.type: 'EDRS' is not known; did you mean EDVR or EDSR?"),
        ("network_vqgan.n_embd", 8, "network_vqgan.n_embd: VQGAN has no such parameter; did you mean n_embed?"),
        ("path.pretrain_network_T", "x", "path.pretrain_network_T: unknown key; did you mean pretrain_network_t"),
        ("path.params_key_t", "x", "path.params_key_t: unknown key; did you mean param_key_t"),
        ("logger.print_frq", 3, "logger.print_frq: unknown key; did you mean print_freq?"),
        ("logger.wandb", {"projct": 1}, "logger.wandb.projct: unknown key; did you mean project?"),
        ("val.metric", {}, "val.metric: unknown key; did you mean metrics?"),
        ("val.metrics.psnr.crop_boder", 4, "val.metrics.psnr.crop_boder: calculate_psnr has no such parameter"),
        ("val.metrics.psnr.type", "psnr", "val.metrics.psnr.type: 'psnr' is not known; "),
        ("val.metrics.psnr.better", "more", "'more' is neither higher nor lower"),
        ("datasets.train.gt_sise", 8, "datasets.train.gt_sise: unknown key; did you mean gt_size or gt_sizes?"),
        ("datasets.train.type", "PairedDataset", "'PairedDataset' is not known; did you mean PairedImageDataset or"),
        ("datasets.train.io_backend.type", "dsik", "'dsik' is neither disk nor lmdb; did you mean disk?"),
        ("datasets.test", {"name": "x"}, "datasets.test: training knows sets named train"),
        ("precision", {"ampp": "bf16"}, "precision.ampp: unknown key; did you mean amp?"),
        ("dist_params", {"backnd": "gloo"}, "dist_params.backnd: unknown key; did you mean backend?"),
        # kinds
        ("scale", "four", "scale: expected a whole number or null, got the text 'four'"),
        ("name", 3, "name: expected text, got 3"),
        ("network_g.num_feat", "64", "network_g.num_feat: expected a whole number, got the text '64'"),
        ("network_vqgan.n_embed", 16.5, "network_vqgan.n_embed: expected a whole number, got 16.5"),
        ("train.ema_decay", "high", "train.ema_decay: expected a number, got the text 'high'"),
        ("train.total_iter", 10.5, "train.total_iter: expected a whole number, got 10.5"),
        ("train", [1], "train: expected a section or null, got [1]"),
        ("datasets.train.use_rot", "yes", "datasets.train.use_rot: expected true or false, got the text 'yes'"),
        ("network_t", "EDSR", "network_t: expected a section or a list or null, got the text 'EDSR'"),
        ("num_gpu", "all", "num_gpu: 'all' is neither auto nor a number of GPUs"),
        ("num_gpu", -1, "num_gpu: -1 is neither auto nor a number of GPUs"),
        # values
        ("train.total_iter", 0, "train.total_iter: 0 is below 1"),
        ("val.val_freq", 0, "val.val_freq: 0 is below 1"),
        ("val.tile", 0, "val.tile: 0 is below 1"),
        ("val.tile", 1.5, "val.tile: expected a whole number or null, got 1.5"),
        ("val.tile_overlap", -1, "val.tile_overlap: -1 is below 0"),
        ("val", {"val_freq": 9, "tile": 64, "tile_overlap": 64}, "val.tile_overlap: 64 leaves nothing of tiles of 64"),
        ("val.self_ensemble", "x8", "val.self_ensemble: expected true or false, got the text 'x8'"),
        ("datasets.train.batch_size_per_gpu", 0, "datasets.train.batch_size_per_gpu: 0 is below 1"),
        ("datasets.train.dataset_enlarge_ratio", 0, "dataset_enlarge_ratio: 0 is not above 0"),
        ("datasets.train.prefetch_mode", "gpu", "prefetch_mode: 'gpu' is neither cpu nor cuda nor null"),
        ("datasets.val_2", {"name": "held_out"}, "datasets.val_2.name: held_out is also the name of datasets.val"),
        ("train.scheduler.milestones", "x", "train.scheduler.milestones: expected a list, got the text 'x'"),
        ("train.scheduler.milestones", ["x"], "train.scheduler.milestones.0: expected a whole number"),
        ("train.scheduler.restarts", [0, 5], "restart_weights: 1 values for 2 restarts"),
        # what must be there
        ("name", ..., "name: is required"),
        ("model_type", ..., "model_type: is required"),
        ("network_g", ..., "network_g: is required"),
        ("datasets", ..., "datasets: is required"),
        ("datasets.train", ..., "datasets.train: is required"),
        ("train", ..., "train: is required"),
        ("train.total_iter", ..., "train.total_iter: is required"),
        ("train.optim_g.type", ..., "train.optim_g.type: is required"),
        ("train.optim_g.lr", ..., "train.optim_g.lr: is required"),
        ("train.scheduler.milestones", ..., "train.scheduler.milestones: is required by MultiStepLR"),
        ("network_g.num_in_ch", ..., "network_g.num_in_ch: is required by EDSR"),
        ("val.val_freq", ..., "val.val_freq: is required"),
        ("val.metrics.psnr.crop_border", ..., "crop_border: is required by calculate_psnr"),
        ("datasets.train.gt_size", ..., "datasets.train.gt_size: is required"),
        ("datasets.train.io_backend", ..., "datasets.train.io_backend: is required"),
        ("datasets.val.dataroot_lq", ..., "datasets.val.dataroot_lq: is required"),
        # files
        ("path.pretrain_network_t", "no/t.pth", "path.pretrain_network_t: there is no file no/t.pth (relative to"),
        ("path.pretrain_network_vqgan", "/no/v", "path.pretrain_network_vqgan: there is no file /no/v"),
        ("path.resume_state", "5.state", "path.resume_state: there is no file 5.state"),
        ("path.init_from", "x2.pth", "path.init_from: there is no file x2.pth"),
        # sizes
        ("datasets.train.gt_size", 66, "datasets.train.gt_size: 66 is not a multiple of the scale 4"),
        ("datasets.train.gt_size", 72, "datasets.train.gt_size: 72 is not a multiple of 16, which network_vqgan needs"),
        ("network_t.upscale", 2, "network_t.upscale: is 2, but scale is 4"),
        ("scale", 2, "network_g.upscale: is 4, but scale is 2"),
    ],
)  # fmt: skip
def test_each_problem_is_named(dckd_options: dict[str, Any], place: str, value: Any, message: str) -> None:
    found = problems_after(dckd_options, {place: value})
    assert any(message in problem for problem in found), found


def test_copies_ahead_need_pinned_memory(dckd_options: dict[str, Any]) -> None:
    ahead = {"datasets.train.prefetch_mode": "cuda"}
    assert problems_after(dckd_options, ahead) == []
    found = problems_after(dckd_options, {**ahead, "datasets.train.pin_memory": False})
    assert found == ["datasets.train.pin_memory: must be true for prefetch_mode: cuda"]


def test_all_problems_at_once(dckd_options: dict[str, Any]) -> None:
    wrong = {
        "nmae": "x",
        "train.optim_g.lrr": 1,
        "train.cl_opt.type": "ContrastLoss",
        "network_g.num_feats": 3,
        "path.pretrain_network_t": "gone.pth",
        "datasets.val.typ": "x",
        "val.metrics.psnr.crop": 1,
        "train.num_neg": -1,  # found by the model class
    }
    found = problems_after(dckd_options, wrong)
    assert len(found) == len(wrong), found
    for place in (
        "nmae",
        "lrr",
        "cl_opt.type",
        "num_feats",
        "pretrain_network_t",
        "val.typ",
        "crop",
        "num_neg",
    ):
        assert sum(place in problem.split(";")[0] for problem in found) >= 1, (place, found)


def test_problems_reach_the_user_as_one_error_with_a_line_each(
    dckd_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    dckd_options["nmae"] = "x"
    dckd_options["train"]["optim_g"]["lrr"] = 1
    (tmp_path / "a.yml").write_text(yaml.safe_dump(dckd_options))
    with pytest.raises(OptionError) as caught:
        parse_options(str(tmp_path), True, ["-opt", "a.yml"])
    assert len(caught.value.problems) == 2 == len(str(caught.value).splitlines())
    assert caught.value.exit_code == 2


def test_swinir_patches(dckd_options: dict[str, Any]) -> None:
    swinir = {"type": "SwinIR", "upscale": 4, "img_size": 48, "window_size": 8, "upsampler": "pixelshuffle"}
    changes = {"network_g": swinir, "datasets.train.gt_size": 64}
    assert problems_after(dckd_options, changes) == []
    changes["datasets.train.gt_size"] = 80
    assert problems_after(dckd_options, changes) == [
        "datasets.train.gt_size: 80 gives LQ patches of 20, but network_g takes multiples of its window_size 8"
    ]
    swinir["embed_dims"] = 60  # SwinIR's **kwargs would swallow it
    assert "network_g.embed_dims: SwinIR has no such parameter; did you mean embed_dim?" in problems_after(
        dckd_options, changes
    )


@pytest.mark.parametrize(
    ("network", "patch", "multiple"),
    [
        ({"type": "NAFNet", "width": 4, "enc_blk_nums": [1, 1, 1], "dec_blk_nums": [1, 1, 1]}, 60, 8),
        ({"type": "NAFNet", "width": 4, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}, 60, None),
        ({"type": "Restormer", "dim": 8}, 60, 8),
        ({"type": "Restormer", "dim": 8}, 64, None),
        ({"type": "PReNet"}, 61, None),
    ],
    ids=["NAFNet", "NAFNet-fits", "Restormer", "Restormer-fits", "PReNet"],
)
@pytest.mark.parametrize("key", ["network_g", "network_t"])
def test_patches_of_networks_that_declare_a_multiple(
    run_options: dict[str, Any], key: str, network: dict[str, Any], patch: int, multiple: int | None
) -> None:
    other = {"type": "PReNet"}
    changes = {"scale": 1, "network_g": other, "network_t": other, "datasets.train.gt_size": patch}
    found = problems_after(run_options, {**changes, key: network})
    assert [problem for problem in found if "gt_size" in problem] == [
        f"datasets.train.gt_size: {patch} gives LQ patches of {patch}, but {key} ({network['type']}) takes "
        f"multiples of {multiple}"
        for _ in range(multiple is not None)
    ]


def test_cosine_periods_must_last_as_long_as_the_run(run_options: dict[str, Any]) -> None:
    cosine = {"type": "CosineAnnealingRestartLR", "periods": [2], "restart_weights": [1], "eta_min": 1e-7}
    assert problems_after(run_options, {"train.scheduler": cosine, "train.total_iter": 3}) == []
    found = problems_after(run_options, {"train.scheduler": cosine, "train.total_iter": 4})
    assert found == ["train.scheduler.periods: sum to 2 iterations, train.total_iter is 4"]


def test_optimizers_are_torchs(run_options: dict[str, Any]) -> None:
    for name in ("AdamW", "SGD", "Lion"):
        found = problems_after(
            run_options, {"train.optim_g": {"type": name, "lr": 1e-4, "weight_decay": 1e-3}}
        )
        assert bool(found) != hasattr(torch.optim, name)


def test_what_a_test_needs(run_options: dict[str, Any]) -> None:
    train = run_options["datasets"].pop("train")
    warnings: list[str] = []
    assert check(run_options, False, warnings, random_weights=True) == []
    assert warnings == ["path.pretrain_network_g: missing; a network with random weights is tested"]
    (problem,) = check(run_options, False, again := [])
    assert problem.endswith("would be tested; name its file, or give --random-weights")
    assert again == []
    run_options["path"]["pretrain_network_g"] = __file__  # its contents are looked at later
    assert check(run_options, False, again := []) == again == []
    assert problems_after(run_options, {"train": ...}, False) == []
    assert problems_after(run_options, {"val": ...}, False) == ["val: is required"]
    found = problems_after(run_options, {"datasets.train": train}, False)
    assert found == ["datasets.train: a test knows sets named test, test_NAME or val, val_NAME"]
    # the teacher is not built in a test, so its file may be away; the student's may not
    assert problems_after(run_options, {"network_t": {**run_options["network_g"]}, "path.pretrain_network_t": "gone"}, False) == []  # fmt: skip  # noqa: E501
    found = problems_after(run_options, {"path.pretrain_network_g": "gone"}, False)
    assert found == ["path.pretrain_network_g: there is no file gone (relative to the working directory)"]


def test_a_model_that_declares_nothing_keeps_its_own_keys(run_options: dict[str, Any]) -> None:
    class ForeignModel:
        pass

    MODEL_REGISTRY._obj_map["ForeignModel"] = ForeignModel
    try:
        changes = {
            "model_type": "ForeignModel",
            "own": 1,
            "train.own_opt": {"a": 1},
            "path.own": "x",
            "val.own": 2,
        }
        assert problems_after(run_options, changes) == []
        changes["network_g.num_feats"] = 3  # what it builds through BasicSR is judged all the same
        assert len(problems_after(run_options, changes)) == 1
    finally:
        del MODEL_REGISTRY._obj_map["ForeignModel"]


def test_stock_models_do_not_take_our_keys(run_options: dict[str, Any]) -> None:
    changes = {
        "model_type": "SRModel",
        "network_t": None,
        "precision": {},
        "train.logits_opt": None,
        "val.teacher": True,
    }
    found = problems_after(run_options, changes)
    assert [problem.split(":")[0] for problem in found] == [
        "network_t",
        "precision",
        "train.logits_opt",
        "val.teacher",
    ]


def test_the_check_prints_nothing(dckd_options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """BasicSR's registries print a line when they fall back to a name with a suffix."""
    from basicsr.utils.registry import ARCH_REGISTRY

    assert "SRVGGNetCompact" not in ARCH_REGISTRY  # it is registered with the suffix
    network = {"type": "SRVGGNetCompact", "num_in_ch": 3, "num_out_ch": 3, "upscale": 4}
    assert problems_after(dckd_options, {"network_g": network}) == []
    assert problems_after(dckd_options, {"network_g": {"type": "Nothing"}}) != []
    assert capsys.readouterr() == ("", "")


def test_junk_is_reported_not_stumbled_over(dckd_options: dict[str, Any]) -> None:
    places = (
        "datasets", "datasets.train", "datasets.train.io_backend", "train", "train.optim_g", "train.scheduler",
        "train.step", "train.cl_opt", "path", "val", "val.metrics", "val.metrics.psnr", "logger", "network_g",
        "network_vqgan", "network_vqgan.ddconfig", "scale", "model_type",
    )  # fmt: skip
    for place in places:
        for junk in (None, 3, "x", [], [1], {}, True):
            found = problems_after(dckd_options, {place: junk})
            assert all(isinstance(problem, str) for problem in found)
            assert found or junk != "x" or place == "network_vqgan.ddconfig", place


def test_nearest() -> None:
    assert nearest("lrr", ["lr", "betas"]) == "did you mean lr?"
    assert nearest("l1loss", ["L1Loss", "MSELoss", "CELoss"]) == "did you mean L1Loss?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"
    assert nearest("zzz", [str(n) for n in range(99)]).endswith("…")
    assert nearest("zzz", []) == "nothing is valid here"


def test_check_call_reads_annotations_and_defaults() -> None:
    def target(a: int, b: float = 1.0, c: list[int] | None = None, *, d=(1, 2), e="x", **kwargs):
        pass

    def found(**options: Any) -> list[str]:
        problems: list[str] = []
        check_call(target, options, "here", problems)
        return problems

    assert found(a=1) == []
    assert found(a=1, b=2, c=[3], d=[4], e="y") == []
    assert found(a=1, c=None) == []
    assert found() == ["here.a: is required by target"]
    assert found(a=1, f=2) == ["here.f: target has no such parameter; valid: a, b, c, d, e"]
    assert found(a="1", b="2", c=3, d=4, e=5) == [
        "here.a: expected a whole number, got the text '1'",
        "here.b: expected a number, got the text '2'",
        "here.c: expected a list or null, got 3",
        "here.d: expected a list, got 4",
        "here.e: expected text, got 5",
    ]
