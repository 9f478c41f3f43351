"""Where taps come from when an option file has none: the advice names what there is, and it helps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.distill import tap_options
from kdsr.distill.adapters import TapGroup
from kdsr.distill.bundle import StudentBundle
from kdsr.distill.step import Teacher
from kdsr.distill.tap_options import PIECES, missing_taps, tap_pairs, tap_problems
from kdsr.options.files import load
from small_runs import run

Options = dict[str, Any]
# every option that lists modules, with every piece that gives it to networks of any size
GIVEN = [
    (key, file)
    for folder in ("taps", "blocks")
    for file in sorted((PIECES / folder).glob("*.yml"))
    if "_" not in file.stem
    for key in load(file)["train"]
]


def networks(student: str, teacher: str | None = None) -> Options:
    return {"network_g": {"type": student}, "network_t": {"type": teacher or student}}


@pytest.mark.parametrize(("key", "file"), GIVEN, ids=lambda value: getattr(value, "stem", value))
def test_the_piece_for_the_networks_is_named_and_is_right(
    key: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PIECES.parents[1])
    advised = (
        missing_taps(networks(file.stem), key, ["some_opt"]).split("; add ")[1].removesuffix(" to _base_")
    )
    assert Path(advised) == file.relative_to(os.getcwd())
    assert tap_problems(load(Path(advised))["train"][key], key) == []
    monkeypatch.chdir(tmp_path)  # from elsewhere the path is whole
    assert str(file) in missing_taps(networks(file.stem), key, ["some_opt"])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.sampled_from(sorted({key for key, _ in GIVEN})),
    st.sampled_from(["EDSR", "SwinIR", "NAFNet", "MSRResNet", "Spandrel", "NoSuchNet"]),
    st.sampled_from(["EDSR", "Restormer", "MSRResNet"]),
)
def test_a_piece_is_advised_for_both_networks_or_not_at_all(key: str, student: str, teacher: str) -> None:
    message = missing_taps(networks(student, teacher), key, ["a_opt", "b_opt"])
    fits = student == teacher and any(named == key and file.stem == student for named, file in GIVEN)
    assert message.startswith(f"train.{key}: missing, train.a_opt and train.b_opt need it; ")
    assert (".yml" in message) == fits and ("docs/new_backbone.md" in message) != fits


def test_a_variant_of_a_network_gets_the_networks_piece() -> None:
    assert "taps/NAFNet.yml" in missing_taps(networks("NAFNetLocal", "NAFNet"), "encoder_taps", ["nc_opt"])


@pytest.mark.parametrize("key", sorted({key for key, _ in GIVEN}))
def test_an_installed_package_has_no_pieces(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tap_options, "PIECES", tmp_path / "options" / "_base_")
    message = missing_taps(networks("EDSR"), key, ["some_opt"])
    assert " add " not in message and str(tmp_path) not in message and ".yml" not in message
    assert "{student: body.3, teacher: body.7}" in message and "repository" in message


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (3, 5), (8, 16)])
def test_the_edsr_piece_trains_at_other_depths(
    student: int, teacher: int, teacher_options: Options, tmp_path: Path
) -> None:
    teacher_options["_base_"] = [str(PIECES / "taps" / "EDSR.yml")]
    teacher_options["network_g"]["num_block"] = student
    teacher_options["network_t"]["num_block"] = teacher
    teacher_options["train"].update(fitnet_opt={"type": "FitNetLoss"}, total_iter=1)
    torch.save({"params": build_network(teacher_options["network_t"]).state_dict()}, tmp_path / "deep.pth")
    teacher_options["path"]["pretrain_network_t"] = str(tmp_path / "deep.pth")
    assert run(teacher_options) == 0
    assert "l_fitnet" in next(Path("experiments/run").glob("*.log")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "body.20",
            "EDSR has no module 'body.20'; there is body.0 to body.3; body.1/2 is the middle at any depth",
        ),
        ("body.4/3", "train.taps: body.4/3: 4/3 is no share of a list of modules"),
        ("body.1/0", "train.taps: body.1/0: 1/0 is no share of a list of modules"),
        ("conv_first.1/3", "EDSR has no module 'conv_first.1/3'; did you mean conv_first?"),
    ],
)
def test_a_missing_module_is_reported_before_anything_is_written(
    name: str, message: str, teacher_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher_options["network_g"]["num_block"] = 4
    teacher_options["train"].update(
        fitnet_opt={"type": "FitNetLoss"}, taps={"student": [name], "teacher": ["body.0"]}
    )
    assert run(teacher_options) == 2
    assert message in capsys.readouterr().err and not Path("experiments").exists()


def test_yaml_takes_shares_as_text() -> None:
    assert yaml.safe_load("[{student: body.1/3, teacher: 1/3}]") == [
        {"student": "body.1/3", "teacher": "1/3"}
    ]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.sampled_from([("EDSR", "num_block"), ("RCAN", "num_group")]), st.integers(1, 33), st.integers(1, 33)
)
def test_the_pieces_serve_a_student_and_a_teacher_of_any_depths(
    kind: tuple[str, str], student: int, teacher: int
) -> None:
    name, depth = kind
    pairs = tap_pairs(load(PIECES / "taps" / f"{name}.yml")["train"]["taps"])
    small = {"type": name, "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}
    small |= {"squeeze_factor": 2} if name == "RCAN" else {}
    nets = [build_network({**small, depth: blocks}) for blocks in (student, teacher)]
    shown = Teacher(nets[1], multiple_of=1, scale=1)
    bundle = StudentBundle(
        nets[0], {"taps": TapGroup("train.taps", pairs)}, {"t": shown}, torch.zeros(1, 3, 4, 4)
    )
    for taps, blocks in ((bundle.taps["taps"], student), (shown._taps["taps"][0], teacher)):
        first, second, after = taps.names
        indices = [int(tapped.removeprefix("body.")) for tapped in (first, second)]
        assert indices == sorted(indices) and indices[1] < blocks and after == "conv_after_body"
        assert blocks < 3 or indices[0] < indices[1]
