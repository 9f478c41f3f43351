"""``kdsr profile``: counts that can be computed by hand, formats, ratios, NTIRE's score, bad input."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network

from kdsr.deploy.costs import NtireScore, count, latency
from kdsr.deploy.network_file import open_network

Command = Callable[..., tuple[int, str, str]]
ONCE = ("--size", "16x24", "--repeat", "2", "--warmup", "0", "--threads", "1")


def network(width: int = 8) -> dict[str, Any]:
    return {
        "type": "SRVGGNetCompact",
        "num_in_ch": 3,
        "num_out_ch": 3,
        "num_feat": width,
        "num_conv": 1,
        "upscale": 2,
    }


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, width in (("teacher", 16), ("student", 8)):
        options = network(width)
        torch.save({"params": build_network(dict(options)).state_dict(), "network": options}, f"{name}.pth")


def by_hand(width: int, pixels: int) -> tuple[int, int, int]:
    """Parameters, FLOPs and activations: three 3×3 convolutions, to 3·2² channels at last."""
    layers = [(3, width), (width, width), (width, 12)]
    parameters = sum(9 * a * b + b for a, b in layers) + 2 * width  # the slopes of PReLU
    return parameters, sum(2 * 9 * a * b for a, b in layers) * pixels, sum(b for _, b in layers) * pixels


def test_counts_are_those_computed_by_hand() -> None:
    opened = open_network("student.pth")
    for size in ((256, 256), (16, 24)):
        counts = count(opened, size)
        assert (counts.flops, counts.activations) == by_hand(8, math.prod(size))[1:]


def test_sizes_are_rounded_up_and_merged_convolutions_count_once() -> None:
    options: dict[str, Any] = {"type": "NAFNet", "width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1]}
    torch.save({"params": build_network(dict(options)).state_dict(), "network": options}, "n.pth")
    opened = open_network("n.pth")
    assert count(opened, (15, 31)) == count(opened, (16, 32)) != count(opened, (18, 32))
    options = {"type": "SpandrelNet", "architecture": "SPAN",
               "parameters": {"num_in_ch": 3, "num_out_ch": 3, "upscale": 2, "feature_channels": 8}}  # fmt: skip
    torch.save({"params": build_network(dict(options)).state_dict(), "network": options}, "s.pth")
    spans = [*[(3, 8)], *[(8, 8)] * 18, (8, 8), (8, 12)]  # all 3×3, and conv_cat of 1×1
    merged = sum(2 * 9 * a * b for a, b in spans) + 2 * 32 * 8
    assert count(open_network("s.pth"), (16, 16)).flops == merged * 256


def test_json_has_everything(command: Command) -> None:
    code, out, err = command("profile", "teacher.pth", "student.pth", *ONCE, "--onnx", "--format", "json")
    assert code == 0, err
    result = json.loads(out)
    assert "1 CPU threads" in result["latency"] and "machine" in result
    for row, (name, width) in zip(result["networks"], (("teacher", 16), ("student", 8)), strict=True):
        parameters, flops, activations = by_hand(width, 256 * 256)
        assert (row["network"], row["parameters"], row["activations_256x256"]) == (
            name,
            parameters,
            activations,
        )
        assert row["gflops_256x256"] == pytest.approx(flops / 1e9)
        assert row["gflops_16x24"] == pytest.approx(by_hand(width, 16 * 24)[1] / 1e9)
        assert row["file_mib"] == Path(f"{name}.pth").stat().st_size / 2**20
        for key in ("milliseconds", "onnx_milliseconds"):
            assert 0 < row[f"{key}_min"] <= row[key] <= row[f"{key}_max"]
    assert result["networks"][1]["parameters_ratio"] == pytest.approx(by_hand(16, 1)[0] / by_hand(8, 1)[0])


@pytest.mark.slow
def test_text_markdown_and_csv_of_an_option_file(command: Command) -> None:
    options = {"network_g": network(), "network_t": [network(16), network(32)], "path": {}}
    Path("o.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    words = ("profile", "-opt", "o.yml", "student.pth", *ONCE, "--ntire")
    code, out, err = command(*words, "-o", "table.txt")
    assert code == 0, err
    assert Path("table.txt").read_text(encoding="utf-8") == out
    rows = [line.split()[0] for line in out.splitlines() if "SRVGGNetCompact" in line]
    assert rows == ["teacher.0", "teacher.1", "student", "student.pth"]
    multiply_adds = by_hand(8, 256 * 256)[1] / 2e9
    assert "FLOPs [G]" in out and f"{multiply_adds:.2f}" in out
    code, out, _ = command("profile", "student.pth", *ONCE, "--format", "markdown")
    assert code == 0 and "| student |" in out
    code, out, _ = command("profile", "student.pth", *ONCE, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert code == 0 and int(row["parameters"]) == by_hand(8, 1)[0]


@pytest.mark.slow
def test_an_exported_file_is_a_row_too(command: Command) -> None:
    assert command("export", "student.pth", "-o", "student.onnx", "--unverified")[0] == 0
    code, out, err = command("profile", "student.pth", "student.onnx", *ONCE, "--format", "json")
    assert code == 0, err
    first, second = json.loads(out)["networks"]
    assert (
        first["scale"] == second["scale"] == 2 and second["milliseconds"] > 0 and "parameters" not in second
    )


def test_the_score_is_that_of_the_challenge() -> None:
    score = NtireScore(20.0, 10.0, 1e6)
    assert score(20.0, 10.0, 1e6) == pytest.approx(math.exp(2))
    assert score(10.0, 20.0, 0) == pytest.approx(0.7 * math.e + 0.15 * math.exp(4) + 0.15)
    assert score(1e9, 1, 1) == math.inf


@pytest.mark.slow
def test_a_baseline_is_an_earlier_profile(command: Command) -> None:
    assert command("profile", "teacher.pth", *ONCE, "--format", "json", "-o", "b.json")[0] == 0
    code, out, err = command("profile", "student.pth", *ONCE, "--format", "json", "--baseline", "b.json")
    assert code == 0, err
    row, base = json.loads(out)["networks"][0], json.loads(Path("b.json").read_text())["networks"][0]
    keys = ("milliseconds", "gflops_256x256", "parameters")
    assert row["ntire_score"] == pytest.approx(
        NtireScore(*(base[key] for key in keys))(*(row[key] for key in keys))
    )


def test_warm_up_is_not_measured() -> None:
    passes: list[int] = []

    def net(x: torch.Tensor) -> torch.Tensor:
        passes.append(len(passes))
        return x

    latency(net, torch.zeros(1), warmup=3, repeat=4)
    assert len(passes) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to measure"),
        (("absent.pth",), "no such file"),
        (("torn.pth",), "torn.pth"),
        (("-opt", "empty.yml"), "neither network_t nor network_g"),
        (("student.pth", "--size", "12"), "HEIGHTxWIDTH"),
        (("student.pth", "--baseline", "torn.pth"), "--baseline"),
        (("student.pth", "--baseline", "absent.json"), "--baseline"),
        (("student.pth", "--baseline", "other.json"), "--baseline"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str, command: Command) -> None:
    Path("torn.pth").write_bytes(Path("student.pth").read_bytes()[:500])
    Path("empty.yml").write_text("name: x\n", encoding="utf-8")
    Path("other.json").write_text('{"networks": [{"milliseconds": 0}]}', encoding="utf-8")
    before = sorted(Path().iterdir())
    code, out, err = command("profile", *words)
    assert code == 2 and message in err and len(err.splitlines()) <= 2 and not out
    assert sorted(Path().iterdir()) == before


def test_a_missing_gpu(command: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = command("profile", "student.pth", "--device", "cuda")
    assert code == 2 and "--device cuda" in err
