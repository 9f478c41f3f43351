"""Proposed students: smaller networks of the teacher's family, stock networks, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdsr.deploy.network_file import Found, build
from kdsr.deploy.student import count, parse_size, propose
from kdsr.deploy.tap_pairs import blocks, tap_options
from kdsr.runtime.errors import CheckpointError, OptionError

LOSS = {"type": "L1Loss"}  # any section
RGB = {"num_in_ch": 3, "num_out_ch": 3}
SWINIR = {"img_size": 16, "window_size": 8, "mlp_ratio": 2, "upscale": 2, "upsampler": "pixelshuffledirect"}
# teacher and its scale
TEACHERS: list[tuple[dict[str, Any], int]] = [
    ({"type": "EDSR", **RGB, "num_feat": 40, "num_block": 9, "upscale": 3}, 3),
    ({"type": "RCAN", **RGB, "num_feat": 48, "num_group": 4, "num_block": 5, "upscale": 2}, 2),
    ({"type": "RRDBNet", **RGB, "num_feat": 24, "num_block": 5, "num_grow_ch": 12, "scale": 4}, 4),
    ({"type": "SRVGGNetCompact", "num_feat": 32, "num_conv": 9, "upscale": 4}, 4),
    ({"type": "MSRResNet", "num_feat": 32, "num_block": 8, "upscale": 4}, 4),
    ({"type": "SwinIR", **SWINIR, "embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [4, 4, 4, 4]}, 2),
    ({"type": "RLFN", "feature_channels": 40, "num_blocks": 5, "upscale": 2}, 2),
    ({"type": "NAFNet", "width": 16, "middle_blk_num": 2, "enc_blk_nums": [1, 3], "dec_blk_nums": [2, 1]}, 1),
    ({"type": "Restormer", "dim": 24, "num_blocks": [2, 2, 2, 3], "heads": [1, 2, 4, 8]}, 1),
    ({"type": "PReNet", "num_feat": 24, "num_block": 4}, 1),
]


def teacher_of(options: dict[str, Any]) -> torch.nn.Module:
    return build(Found(options, "a test"))


@pytest.mark.parametrize(("options", "scale"), TEACHERS, ids=lambda value: str(value)[:30])
def test_a_student_of_the_same_family_is_as_large_as_asked(options: dict[str, Any], scale: int) -> None:
    teacher = teacher_of(options)
    student = propose(None, "6x", options, count(teacher), scale)
    assert student.options["type"] == options["type"]
    assert count(teacher) / 18 < student.parameters <= count(teacher) / 6
    assert student.parameters == count(teacher_of(student.options))
    half = propose(None, "2x", options, count(teacher), scale)
    assert student.parameters < half.parameters <= count(teacher) / 2
    names = [set(dict(net.named_modules())) for net in (student.net, teacher)]
    for pair in tap_options({"fakd_opt": LOSS}, student.net, teacher)["taps"]:
        assert pair["student"] in names[0] and pair["teacher"] in names[1]


@pytest.mark.parametrize("kind", ["SRVGGNetCompact", "EDSR", "SPAN", "MSRResNet", "RLFN"])
def test_a_stock_network_is_as_large_as_asked(kind: str) -> None:
    student = propose(kind, "60k", {"type": "Spandrel"}, 500_000, 3)
    assert 20_000 < student.parameters <= 60_000
    with torch.no_grad():
        assert student.net.eval()(torch.rand(1, 3, 24, 24)).shape == (1, 3, 72, 72)


def test_a_teacher_of_another_kind_gets_a_stock_student() -> None:
    assert propose(None, "10x", {"type": "Spandrel"}, 900_000, 4).options["type"] == "SRVGGNetCompact"
    assert propose(None, "10x", {"type": "Spandrel"}, 9_000_000, 1).options["type"] == "NAFNet"


def test_sizes() -> None:
    assert parse_size("10x", 1000) == 100
    assert parse_size("2.5x", 1000) == 400
    assert [parse_size(text, 1) for text in ("54000", "300k", "1.2M")] == [54_000, 300_000, 1_200_000]
    for text in ("", "x", "1x", "0.5x", "0", "-3k", "10 times", "3G"):
        with pytest.raises(OptionError, match="--size"):
            parse_size(text, 1000)


def test_students_from_files(tmp_path: Path) -> None:
    options = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 1, "upscale": 4}
    file = tmp_path / "student.pth"
    torch.save({"params": teacher_of(options).state_dict()}, file)
    found = propose(str(file), "10x", {"type": "RLFN"}, 500_000, 4)
    assert found.weights == file and found.options["num_feat"] == 8
    network = "{type: MSRResNet, num_feat: 8, num_block: 1}"
    for text in (network, f"network_g: {network}"):
        (tmp_path / "net.yml").write_text(text)
        found = propose(str(tmp_path / "net.yml"), "10x", {"type": "RLFN"}, 500_000, 4)
        assert found.weights is None and found.options == {"type": "MSRResNet", "num_feat": 8, "num_block": 1}


def test_students_that_cannot_be(tmp_path: Path) -> None:
    teacher = {"type": "RLFN", "upscale": 4}
    with pytest.raises(OptionError, match=r"has 300,.*the teacher only 300,000|must be smaller"):
        propose("EDSR", "400k", teacher, 300_000, 4)
    with pytest.raises(OptionError, match="the smallest RLFN"):
        propose(None, "100", teacher, 500_000, 4)
    with pytest.raises(OptionError, match="--student EDSSR: .*EDSR"):
        propose("EDSSR", "10x", teacher, 500_000, 4)
    with pytest.raises(CheckpointError, match="no such file"):
        propose(str(tmp_path / "none.pth"), "10x", teacher, 500_000, 4)
    (tmp_path / "net.yml").write_text("type: MSRResNet\nnum_feat: 8\nnum_block: 1\nupscale: 2\n")
    with pytest.raises(OptionError, match="has scale 2"):
        propose(str(tmp_path / "net.yml"), "10x", teacher, 500_000, 4)
    (tmp_path / "net.yml").write_text("name: nothing\n")
    with pytest.raises(OptionError, match="neither network_g nor a type"):
        propose(str(tmp_path / "net.yml"), "10x", teacher, 500_000, 4)


def test_features_are_those_at_equal_depth() -> None:
    student = teacher_of({"type": "EDSR", **RGB, "num_feat": 4, "num_block": 4})
    teacher = teacher_of({"type": "RLFN", "feature_channels": 8, "num_blocks": 6})
    assert blocks(teacher) == [f"block_{number}" for number in range(1, 7)]
    assert tap_options({"at_opt": LOSS, "pixel_opt": LOSS}, student, teacher) == {
        "taps": [
            {"student": "body.0", "teacher": "block_2"},
            {"student": "body.2", "teacher": "block_4"},
            {"student": "body.3", "teacher": "block_6"},
        ]
    }
    assert tap_options({"pixel_opt": LOSS}, student, teacher) == {}
    assert tap_options({"at_opt": LOSS, "taps": []}, student, teacher) == {}
    with pytest.raises(OptionError, match="levels of an encoder and a decoder, EDSR and RLFN has none"):
        tap_options({"nc_opt": LOSS}, student, teacher)
    with pytest.raises(OptionError, match="same architecture"):
        tap_options({"bm_opt": LOSS}, student, teacher)


def test_levels_of_encoders_and_decoders() -> None:
    nets = [
        teacher_of({"type": "NAFNet", "width": width, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]})
        for width in (2, 4)
    ]
    found = tap_options({"nc_opt": LOSS, "et_opt": LOSS}, *nets)
    assert [pair["student"] for pair in found["encoder_taps"]] == ["encoders.0", "encoders.1"]
    assert [pair["teacher"] for pair in found["decoder_taps"]] == ["decoders.0", "decoders.1"]
