"""Composed option files: all templates that shipped before ``kdsr new``, what cannot be combined, own pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdsr.options.compose import Choice, Pieces, new_command
from kdsr.options.files import load
from kdsr.runtime.errors import OptionError

OPTIONS = Path(__file__).resolve().parents[2] / "options"
PIECES = Pieces(OPTIONS)
CHOICES = list(PIECES.choices())
TASKS = ("GoPro", "RESIDE", "Rain13K", "noise25")
SCHEDULES = {"NAFNet": "NAFNet_200k", "Restormer": "Restormer_300k"}
SWINIR = {"AT", "CSD", "DCKDstar", "DUKD", "FAKD", "FitNet", "MCLIR", "MiPKD", "RKD"}  # methods of x4 alone
FACD_TAPS = {"EDSR": ((10, 10), (21, 21), (31, 31)), "EDSR16": ((5, 10), (10, 21), (15, 31)),
             "RCAN": ((2, 2), (5, 5), (9, 9))}  # fmt: skip


def templates() -> Iterator[tuple[Choice, list[str], str]]:
    """The templates of methods that there were: their choice, their pieces and what else stood in them."""
    for method in ("DCKD", "Logits", "Scratch", "FACD", *sorted(SWINIR)):
        backbones = tuple(FACD_TAPS) if method == "FACD" else ("EDSR", "RCAN", "SwinIR")
        for backbone in (*backbones, *(["RLFN"] if method == "DCKD" else [])):
            for scale in (4,) if method in SWINIR or backbone == "RLFN" else (2, 3, 4):
                network, more = backbone.removesuffix("16"), ""
                pieces = [f"data/DIV2K_x{scale}", "validation/Set5_Set14", f"backbones/{network}"]
                if method in ("AT", "FAKD", "FitNet", "MiPKD", "RKD"):
                    pieces.append(f"taps/{backbone}")
                if method == "MiPKD":
                    pieces.append(f"blocks/{backbone}")
                if method == "FACD":
                    pairs = ", ".join(
                        f"{{student: body.{s}, teacher: body.{t}}}" for s, t in FACD_TAPS[backbone]
                    )
                    more = f"train: {{taps: [{pairs}]}}\n"
                if backbone == "EDSR16":
                    more += "network_g: {num_block: 16, res_scale: 1}\n"
                if method == "FitNet" and backbone != "SwinIR":
                    more = "train: {fitnet_opt: {loss_weight: 0.002}}\n"
                piece = f"DUKD_{backbone}{'_x4' * (backbone == 'EDSR')}" if method == "DUKD" else method
                pieces += ["schedules/SR_250k", f"methods/{piece}"]
                yield Choice(method, backbone, "DIV2K", scale), pieces, more
    for method in ("DCKD", "Logits", "SLKD", "Scratch"):
        for backbone, schedule in SCHEDULES.items():
            for task in TASKS:
                schedule = SCHEDULES[backbone]
                if (backbone, task) == ("Restormer", "noise25"):
                    schedule += "_noise25"
                if method == "SLKD":
                    schedule = "SLKD_100_epochs" + f"_{task}" * (task != "Rain13K")
                pieces = [
                    f"data/{task}",
                    f"backbones/{backbone}",
                    f"schedules/{schedule}",
                    f"methods/{method}{'_NAFNet' * ((method, backbone) == ('Scratch', 'NAFNet'))}",
                ]
                pieces += [f"taps/{backbone}"] if method == "SLKD" else []
                # SLKD_NAFNet_GoPro had NAFNet, whose teacher measures below what its authors publish for GoPro
                own = {
                    ("NAFNet", "GoPro"): "type: NAFNetLocal",
                    ("Restormer", "noise25"): "LayerNorm_type: BiasFree",
                }
                roles = "g" if method == "Scratch" else "gt"
                more = "".join(
                    f"network_{role}: {{{own[backbone, task]}}}\n"
                    for role in roles
                    if (backbone, task) in own
                )
                if method != "Scratch":
                    more += (
                        f"path: {{pretrain_network_t: experiments/pretrained_models/{backbone}_{task}.pth}}\n"
                    )
                yield Choice(method, backbone, task, 1), pieces, more


TEMPLATES = list(templates())


@pytest.mark.parametrize(
    ("choice", "pieces", "more"), TEMPLATES, ids=[choice.name for choice, *_ in TEMPLATES]
)
def test_resolves_as_the_template_did(choice: Choice, pieces: list[str], more: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old.yml", tmp_path / "new.yml"
    bases = "".join(f"  - {OPTIONS}/_base_/{piece}.yml\n" for piece in ("runtime", *pieces))
    old.write_text(f"_base_:\n{bases}name: {choice.name}\n{more}")
    new.write_text(PIECES.compose(choice).text(new, OPTIONS))
    assert load(new) == load(old)


def test_those_are_all_and_every_name_is_one_choice() -> None:
    names = [choice.name for choice in CHOICES]
    assert len(names) == len(set(names))
    assert len(TEMPLATES) == 96 and {choice.name for choice, *_ in TEMPLATES} <= set(names)


@pytest.mark.parametrize("file", sorted((OPTIONS / "train").glob("*.yml")), ids=lambda file: file.stem)
def test_a_template_that_ships_is_what_would_be_composed(file: Path, tmp_path: Path) -> None:
    choices = [choice for choice in CHOICES if choice.name == file.stem]
    if choices and not file.stem.endswith("_release"):  # which adds the release's own schedule
        new = tmp_path / file.name
        new.write_text(PIECES.compose(choices[0]).text(new, OPTIONS))
        assert load(new) == load(file)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("FKAD", "SwinR", "DIV2", schedule="SR_200k"), ["FAKD", "SwinIR", "DIV2K", "SR_250k"]),
        (Choice("FAKD", "EDSR", "DIV2K"), ["--scale: missing; DIV2K has 2, 3, 4"]),
        (Choice("FAKD", "EDSR", "DIV2K", 5), ["--scale 5: DIV2K has 2, 3, 4"]),
        (Choice("FAKD", "RLFN", "DIV2K", 4), ["fakd_opt needs train.taps"]),
        (Choice("SLKD", "EDSR", "Rain13K"), ["upscales", "nc_opt needs", "et_opt needs"]),
        (Choice("Logits", "NAFNet", "DIV2K", 2), ["keeps the size"]),
        (Choice("DUKD", "NAFNet", "GoPro"), ["zoom_out_opt is for super-resolution"]),
        (Choice("DCKD", "EDSR", "DIV2K_LQ"), ["pixel_opt needs ground truth"]),
        (Choice("Logits_no_gt", "EDSR", "DIV2K", 4), ["is for data without ground truth"]),
        (Choice("Logits", "PReNet", "Rain13K"), ["--schedule: PReNet has no default"]),
        (Choice("Logits", "EDSR", "DIV2K", 4, "NAFNet_200k"), ["both set gt_size", "valid: SR_250k"]),
        (Choice("no.yml", "EDSR", "DIV2K", 4), ["--method no.yml: no such file"]),
    ],
    ids=lambda value: value.name if isinstance(value, Choice) else "",
)
def test_what_does_not_fit_is_refused(choice: Choice, message: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        PIECES.compose(choice)
    assert [words for words in message if words not in str(caught.value)] == []


def composed(choice: Choice, folder: Path) -> dict[str, Any]:
    file = folder / "composed.yml"
    file.write_text(PIECES.compose(choice).text(file, OPTIONS))
    return load(file)


@pytest.mark.parametrize(
    ("backbone", "scale", "pixel", "prob", "zoom_out", "init"),
    [
        ("EDSR", 2, 5, 0.3, True, None),
        ("EDSR", 4, 5, 0.3, True, "experiments/DUKD_EDSR_x2/models/net_g_latest.pth"),
        ("RCAN", 4, 1, 0, False, None),
        ("SwinIR", 4, 5, 0.3, False, None),
    ],
)
def test_dukd_has_its_authors_options(
    backbone: str, scale: int, pixel: float, prob: float, zoom_out: bool, init: str | None, tmp_path: Path
) -> None:
    options = composed(Choice("DUKD", backbone, "DIV2K", scale), tmp_path)
    train = options["train"]
    assert train["pixel_opt"]["loss_weight"] == pixel and train["noisy"] == {"prob": prob}
    assert train["logits_opt"]["loss_weight"] == train["zoom_in_opt"]["loss_weight"] == 1
    assert bool(train["zoom_out_opt"]) == zoom_out
    if zoom_out:
        assert train["zoom_out_opt"]["loss_weight"] == 1 and train["zoom_out_gt_weight"] == pixel
    assert options["path"].get("init_from") == init


@pytest.mark.parametrize(
    ("data", "pairs"), [("Rain13K", 13712), ("GoPro", 2103), ("RESIDE", 13990), ("noise25", 32592)]
)
def test_slkd_trains_100_epochs_of_each_data_set(data: str, pairs: int, tmp_path: Path) -> None:
    options = composed(Choice("SLKD", "NAFNet", data), tmp_path)
    train = options["train"]
    assert train["total_iter"] == math.ceil(100 * pairs / options["datasets"]["train"]["batch_size_per_gpu"])
    assert train["scheduler"]["periods"] == [train["total_iter"]]
    assert train["optim_g"]["betas"] == [0.9, 0.999]
    assert composed(Choice("SLKD", "NAFNet", data, schedule="SLKD_100_epochs"), tmp_path)["train"] == train


@pytest.mark.parametrize(
    ("method", "schedule", "iterations", "milestone", "gamma"),
    [("FAKD", "SR_FAKD_200k", 200000, 150000, 0.5), ("CSD", "SR_CSD_400k", 400000, 200000, 0.1)],
)
def test_a_baseline_has_its_authors_schedule_too(
    method: str, schedule: str, iterations: int, milestone: int, gamma: float, tmp_path: Path
) -> None:
    choice = Choice(method, "EDSR16", "DIV2K", 4)
    assert composed(choice, tmp_path)["train"]["total_iter"] == 250000  # DCKD's, to compare methods
    options = composed(replace(choice, schedule=schedule), tmp_path)
    train = options["train"]
    assert train["total_iter"] == iterations and not train.get("ema_decay")
    assert train["scheduler"] == {"type": "MultiStepLR", "milestones": [milestone], "gamma": gamma}
    assert train["optim_g"] == {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.999]}
    assert (options["network_g"]["num_block"], options["network_g"]["res_scale"]) == (16, 1)


def test_pieces_of_ones_own(tmp_path: Path) -> None:
    backbone, data = tmp_path / "pieces/Tiny.yml", tmp_path / "pieces/Fog.yml"
    backbone.parent.mkdir()
    backbone.write_text("network_g: {type: NAFNet, width: 8}\nnetwork_t: {type: NAFNet, width: 16}\n")
    data.write_text("datasets: {train: {name: Fog, dataroot_gt: a, dataroot_lq: b}, val: {name: v}}\n")
    choice = Choice("Logits", str(backbone), str(data), schedule="NAFNet_200k")
    file = tmp_path / "runs" / "tiny.yml"
    file.parent.mkdir()
    file.write_text(PIECES.compose(choice).text(file, OPTIONS))
    assert "  - ../pieces/Tiny.yml\n" in file.read_text()
    options = load(file)
    assert (options["name"], options["scale"]) == ("Logits_Tiny_Fog_NAFNet_200k", 1)
    assert options["network_g"]["width"] == 8 and options["train"]["total_iter"] == 200000
    assert options["path"]["pretrain_network_t"] == "experiments/pretrained_models/Tiny_Fog.pth"


def test_the_message_on_a_missing_file_has_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(OPTIONS.parent)
    for name, words in {
        "FAKD_SwinIR_x4": "--method FAKD --backbone SwinIR --data DIV2K --scale 4",
        "Logits_RCAN_x4_no_gt": "--method Logits_no_gt --backbone RCAN --data DIV2K_LQ --scale 4",
        "SLKD_NAFNet_GoPro": "--method SLKD --backbone NAFNet --data GoPro",
    }.items():
        file = tmp_path / f"{name}.yml"
        assert new_command(file) == f"kdsr new {words} -o {file}"
        with pytest.raises(OptionError, match=f"No such file.*\n  kdsr new {words} -o "):
            load(file)
        (tmp_path / "below.yml").write_text(f"_base_: {name}.yml\n")
        with pytest.raises(OptionError, match=f"kdsr new {words} -o "):
            load(tmp_path / "below.yml")
    with pytest.raises(OptionError, match="No such file or directory$"):
        load(tmp_path / "FAKD_SwinR_x4.yml")
