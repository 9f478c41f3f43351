"""Training without ground truth: what needs it is named, and the rest trains."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from kdsr.data.image_folder_dataset import ImageFolderDataset
from kdsr.distill.term import all_terms
from kdsr.options.check import check
from kdsr.options.check_gt import ground_truth_problems
from small_runs import run

Options = dict[str, Any]
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
MISSING = "needs ground truth, which datasets.train (LQImageDataset) does not have; {}, or use a paired set"


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lq_options(run_options: Options) -> Options:
    """A student that learns from the outputs of its teacher on LQ patches, and is validated on pairs."""
    teacher = {**run_options["network_g"], "num_feat": 12}
    torch.manual_seed(7)
    torch.save({"params": build_network(teacher).state_dict()}, "teacher.pth")
    run_options["network_t"] = teacher
    run_options["path"]["pretrain_network_t"] = "teacher.pth"
    run_options["train"].update(logits_opt=dict(L1), pixel_opt=None)
    train = run_options["datasets"]["train"]
    train["type"] = "LQImageDataset"
    del train["dataroot_gt"]
    return run_options


def state(name: str, iteration: int) -> dict[str, Any]:
    return torch.load(f"experiments/{name}/training_states/{iteration}.state", weights_only=True)


def logged(name: str = "run") -> str:
    return "".join(file.read_text() for file in sorted(Path(f"experiments/{name}").glob("train_*.log")))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("model_type", "train", "keys"),
    [
        ("KDModel", {"pixel_opt": L1, "logits_opt": L1, "lcr_opt": L1}, {"pixel_opt": "remove it"}),
        ("KDModel", {"pixel_opt": None, "logits_opt": L1}, {}),
        ("DCKDModel", {"pixel_opt": L1, "cl_opt": L1, "ce_opt": L1}, {"pixel_opt": "remove it"}),
        ("SLKDModel", {"nc_opt": L1, "et_opt": L1, "kl_opt": L1}, {"et_opt": "remove it"}),
        ("FACDModel", {"facd_opt": L1}, {"gate": "set off"}),
        ("FACDModel", {"facd_opt": L1, "gate": "soft"}, {"gate": "set off"}),
        ("FACDModel", {"facd_opt": L1, "gate": "off"}, {}),
        ("FACDModel", {"facd_opt": L1, "gate": False}, {}),
        ("KDModel", {"zoom_in_opt": L1, "zoom_out_opt": L1}, {"zoom_in_opt": "remove it"}),
        ("FACDModel", {"zoom_in_opt": L1, "gate": "off"}, {"zoom_in_opt": "remove it"}),
        ("VQGANModel", {"pixel_opt": L1}, {}),
        ("SRModel", {"pixel_opt": L1, "perceptual_opt": L1},
         {"pixel_opt": "remove it", "perceptual_opt": "remove it"}),
    ],
)  # fmt: skip
def test_what_needs_it(model_type: str, train: Options, keys: dict[str, str]) -> None:
    opt = {"train": train, "datasets": {"train": {"type": "LQImageDataset"}}}
    found = ground_truth_problems(opt, dict(iter(MODEL_REGISTRY))[model_type])
    assert sorted(found) == sorted(f"train.{key}: {MISSING.format(cure)}" for key, cure in keys.items())


def test_every_declaration_names_an_option() -> None:
    for key, term in all_terms().items():
        assert key in term.options.declared()
        assert {"teacher", "teacher_output", "taps", "gt"} >= term.NEEDS
        assert set(term.keys_with_gt({key: {"type": "ContrasLoss"}})) <= set(term.options.declared())


@pytest.mark.parametrize("kind", ["LQImageDataset", "SingleImageDataset"])
def test_the_check_names_all_of_it(lq_options: Options, kind: str) -> None:
    lq_options["train"].update(pixel_opt=dict(L1), zoom_in_opt=dict(L1))
    train = lq_options["datasets"]["train"]
    if kind == "SingleImageDataset":
        for key in ("gt_size", "use_hflip", "use_rot"):
            del train[key]
    train["type"] = kind
    found = check(lq_options, True)
    assert found == [
        f"train.{key}: {MISSING.format('remove it').replace('LQImageDataset', kind)}"
        for key in ("pixel_opt", "zoom_in_opt")
    ]
    lq_options["train"].update(pixel_opt=None, zoom_in_opt=None)
    assert check(lq_options, True) == []


@pytest.fixture
def without_gt() -> Iterator[str]:
    """A data set of the user's own that does not say what it gives."""

    class Silent(ImageFolderDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return {key: item[key] for key in ("lq", "lq_path")}

    DATASET_REGISTRY._obj_map["Silent"] = Silent
    yield "Silent"
    del DATASET_REGISTRY._obj_map["Silent"]


def test_a_foreign_set_is_found_out_before_anything_is_written(
    run_options: Options, photos: Path, without_gt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = run_options["datasets"]["train"]
    train.update(type=without_gt, dataroot_gt=str(photos / "LR_x4"), gt_size=16)
    del train["dataroot_lq"]
    assert run(run_options) == 2
    error = capsys.readouterr().err
    assert f"train.pixel_opt: needs ground truth, which datasets.train ({without_gt}) does not have" in error
    assert not Path("experiments").exists()


# --------------------------------------------------------------------------------------------------- what is trained


def test_a_student_learns_from_its_teacher_alone(lq_options: Options) -> None:
    lq_options["val"].update(teacher=True, val_freq=2)
    lq_options["train"]["total_iter"] = 4
    lq_options["logger"]["save_checkpoint_freq"] = 2
    lq_options["datasets"]["train"]["num_worker_per_gpu"] = 1
    assert run(lq_options, "--force_yml", "name=whole") == 0
    assert run(lq_options, "--force_yml", "name=parted", "train:total_iter=2") == 0
    assert run(lq_options, "--auto_resume", "--force_yml", "name=parted") == 0
    whole, parted = state("whole", 4), state("parted", 4)
    for network, weights in whole["networks"].items():
        assert all(torch.equal(parted["networks"][network][name], value) for name, value in weights.items())
    log = logged("whole")
    assert len(re.findall(r"l_ts: [0-9.e+-]+ ", log)) == 4 and "l_pix" not in log
    with open("experiments/whole/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] != "baseline"]
    measured = {(row["iteration"], row["network"]) for row in rows if 5 < float(row["value"]) < 60}
    assert measured == {("0", "teacher"), ("2", "student"), ("4", "student")} and len(rows) == 12


def test_its_first_step_is_that_of_pairs(lq_options: Options, photos: Path) -> None:
    """What the ground truth does not enter does not change with it: one step on the same patches, the same bits."""
    lq_options["train"]["total_iter"] = 1
    lq_options["logger"]["save_checkpoint_freq"] = 1
    assert run(lq_options, "--force_yml", "name=alone") == 0
    lq_options["datasets"]["train"].update(type="PairedImageDataset", dataroot_gt=str(photos / "GT"))
    assert run(lq_options, "--force_yml", "name=pairs") == 0
    alone, pairs = state("alone", 1)["networks"]["net_g"], state("pairs", 1)["networks"]["net_g"]
    assert all(torch.equal(alone[name], value) for name, value in pairs.items())


def test_whole_images(lq_options: Options) -> None:
    """BasicSR's SingleImageDataset, whose images have one size here."""
    train = lq_options["datasets"]["train"]
    for key in ("gt_size", "use_hflip", "use_rot"):
        del train[key]
    train["type"] = "SingleImageDataset"
    lq_options["train"]["lcr_opt"] = dict(L1)
    assert run(lq_options) == 0
    assert len(re.findall(r"l_ts: [0-9.e+-]+ .*l_lcr: [0-9.e+-]+ ", logged())) == 3


@pytest.mark.parametrize("gate", ["off", False])  # YAML reads a bare off as false
def test_facd_without_its_gate(lq_options: Options, gate: Any) -> None:
    lq_options["model_type"] = "FACDModel"
    lq_options["train"].update(
        facd_opt={"type": "FACDLoss"}, taps=[{"student": "body.0", "teacher": "body.0"}], gate=gate
    )
    assert run(lq_options) == 0
    assert len(re.findall(r"l_facd: [0-9.e+-]+ ", logged())) == 3


def test_dckd_without_ground_truth(dckd_options: Options) -> None:
    train = dckd_options["datasets"]["train"]
    train["type"] = "LQImageDataset"
    del train["dataroot_gt"]
    dckd_options["train"].update(pixel_opt=None, total_iter=2)
    assert run(dckd_options) == 0
    assert len(re.findall(r"l_cl: [0-9.e+-]+ l_ce: [0-9.e+-]+ ", logged())) == 2


def test_terms_without_ground_truth(lq_options: Options) -> None:
    terms = {
        "fitnet": "FitNetLoss",
        "at": "AttentionTransferLoss",
        "fakd": "AffinityLoss",
        "zoom_out": "L1Loss",
    }
    lq_options["train"].update({f"{term}_opt": {"type": loss} for term, loss in terms.items()}, total_iter=2)
    lq_options["train"]["taps"] = [{"student": "body.0", "teacher": "body.0"}]
    assert run(lq_options) == 0
    log = logged()
    assert [len(re.findall(rf"\bl_{term}: [0-9.e+-]+ ", log)) for term in terms] == [2] * 4
