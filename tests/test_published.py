"""Published numbers, through the commands that a user types."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from kdsr import test as test_entry

REPOSITORY = Path(__file__).resolve().parents[1]


def test_rlfn_gives_the_published_psnr(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLFN ×4 (Kong et al. 2022): 32.24 dB on Set5, 28.62 on Set14; img_003 of Set14 is a grey image."""
    monkeypatch.chdir(tmp_path)
    data = shared / "data"
    overrides = [f"path:pretrain_network_g={data}/weights/RLFN/rlfn_x4.pth", "val:save_img=false"]
    for number, name in ((1, "Set5"), (2, "Set14")):
        overrides.append(f"datasets:test_{number}:dataroot_gt={data}/{name}/GT_x4")
        overrides.append(f"datasets:test_{number}:dataroot_lq={data}/{name}/LR_x4")
    option_file = str(REPOSITORY / "options/test/RLFN_x4.yml")
    assert test_entry.main(["-opt", option_file, "--force_yml", *overrides]) == 0

    values = defaultdict(list)
    with open("results/RLFN_x4/metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "psnr":
                values[row["set"]].append(float(row["value"]))
    assert {name: len(psnr) for name, psnr in values.items()} == {"Set5": 5, "Set14": 14}
    assert sum(values["Set5"]) / 5 == pytest.approx(32.24, abs=0.02)
    assert sum(values["Set14"]) / 14 == pytest.approx(28.62, abs=0.02)


@pytest.mark.slow
def test_prenet_gives_the_published_psnr(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PReNet for Rain1400 (Ren et al. 2019): what its weights give on three pairs of that kind, Y, no border."""
    monkeypatch.chdir(tmp_path)
    data = shared / "data"
    overrides = [
        f"path:pretrain_network_g={data}/weights/PReNet/Rain1400/PReNet6/net_latest.pth",
        f"datasets:test_1:dataroot_gt={data}/DDN_rain/GT",
        f"datasets:test_1:dataroot_lq={data}/DDN_rain/rain",
        "val:save_img=false",
    ]
    option_file = str(REPOSITORY / "options/test/PReNet_rain.yml")
    assert test_entry.main(["-opt", option_file, "--force_yml", *overrides]) == 0

    with open("results/PReNet_rain/metrics.csv", newline="", encoding="utf-8") as file:
        psnr = {row["image"]: float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "psnr"}
    assert psnr == {name: pytest.approx(value, abs=0.05) for name, value in
                    (("1", 36.13), ("2", 33.05), ("3", 29.57))}  # fmt: skip
