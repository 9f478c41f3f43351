"""``kdsr evaluate``: values of published networks, the table, its files, missing sets and packages."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from kdsr.data.resize import imresize, mod_crop
from kdsr.deploy import benchmarks
from kdsr.deploy.benchmarks import find_benchmark
from kdsr.models.psnr_ssim import psnr, ssim

Make = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
OPTIONS = Path(__file__).resolve().parents[2] / "options"


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(photos: Path) -> Path:
    """Set5 in the benchmark layout, Set14 with ground truth alone, and three pairs in rain."""
    for folder, source in {"Set5/GTmod12": "GT", "Set5/LRbicx2": "LR_x2", "Set14/original": "GT"}.items():
        shutil.copytree(photos / source, Path("datasets", folder))
    for folder in ("DDN_rain/GT", "DDN_rain/rain"):
        shutil.copytree(photos / "GT", Path("datasets", folder))
    for file in Path("datasets/DDN_rain/rain").iterdir():
        assert cv2.imwrite(str(file), cv2.imread(str(file)) // 2)
    return Path("datasets")


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table that ends a text."""
    lines = [line.split("  ") for line in text.splitlines() if "  " in line]
    return {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}


def expected(scale: int) -> tuple[float, float]:
    """Mean PSNR and SSIM of repeated pixels on the photographs."""
    values = []
    for file in sorted(Path("datasets/Set5/GTmod12").iterdir()):
        gt = mod_crop(cv2.imread(str(file)), scale)
        image = imresize(gt, 1 / scale).repeat(scale, 0).repeat(scale, 1)
        values.append((psnr(image, gt, scale, True), ssim(image, gt, scale, True)))
    return tuple(np.mean(values, axis=0))


def test_networks_beside_the_baseline_and_each_other(nearest: Make, command: Command, data: Path) -> None:
    one, other = nearest(2, name="one"), nearest(2, name="other")
    code, out, _ = command("evaluate", one, other, "--sets", "Set5", "Set14", "--per-image", "images.csv")
    assert code == 0
    table = rows(out)
    cell = "{:.2f} / {:.4f}".format(*expected(2))
    # Set14 has ground truth alone: its LQ images are made as those of Set5 were
    assert table["one"][2:] == table["other"][2:] == [cell, cell]
    assert table["bicubic"][0] == "×2" and table["bicubic"][2] == table["bicubic"][3] > cell
    with open("images.csv", newline="") as file:
        values = list(csv.DictReader(file))
    assert len(values) == 3 * 2 * 4
    ours = [float(row["psnr"]) for row in values if (row["network"], row["set"]) == ("one", "Set5")]
    assert np.mean(ours) == pytest.approx(expected(2)[0], abs=1e-9)


def test_networks_of_two_scales_in_one_table(nearest: Make, command: Command, data: Path) -> None:
    code, out, _ = command("evaluate", nearest(2, name="x2"), nearest(4, name="x4"), "--sets", "Set14")
    assert code == 0
    assert out.count("bicubic  ") == 2
    assert rows(out)["x4"][2] == "{:.2f} / {:.4f}".format(*expected(4))


def test_restoration_is_measured_without_border_beside_the_input(
    nearest: Make, command: Command, data: Path
) -> None:
    code, out, _ = command("evaluate", nearest(1), "--sets", "DDN_rain", "--published")
    assert code == 0
    gt = [cv2.imread(str(file)) for file in sorted(Path("datasets/DDN_rain/GT").iterdir())]
    value = np.mean([psnr(image // 2, image, 0, True) for image in gt])
    assert rows(out)["nearest"][2].split(" / ")[0] == rows(out)["input"][2].split(" / ")[0] == f"{value:.2f}"
    assert "DDN_rain ×1: Y, border 0" in out


@pytest.mark.parametrize("ending", ["txt", "md", "csv", "json"])
def test_the_table_in_every_format(nearest: Make, command: Command, data: Path, ending: str) -> None:
    name = {"txt": "text", "md": "markdown"}.get(ending, ending)
    weights = nearest(2)
    code, out, _ = command(
        "evaluate", weights, "--sets", "Set5", "--format", name, "-o", f"t.{ending}", "--published"
    )
    assert code == 0
    text = Path(f"t.{ending}").read_text()
    assert out.endswith(text)
    if ending == "json":
        assert out == text
        values = {(one["network"], one["metric"]): one for one in json.loads(text)}
        assert values["nearest", "psnr"]["value"] == pytest.approx(expected(2)[0], abs=1e-9)
        assert values["SwinIR, DCKD", "psnr"]["value"] == 38.17
        assert values["SwinIR, DCKD", "psnr"]["source"] == "DCKD (arXiv 2412.08939), Table 2"
    elif ending == "csv":
        assert out == text
        first = next(csv.DictReader(text.splitlines()))
        assert (first["network"], first["set"], first["metric"]) == ("bicubic", "Set5", "psnr")
    else:
        assert f"{expected(2)[0]:.2f} / " in text and "38.17 / 0.9613" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--sets", "Set5", "Urban100"],
            "--sets Urban100: no images of scale 2: looked for datasets/Urban100/GT_x2",
        ),
        (["--sets", "Set5", "Urban100"], "kdsr fetch Urban100"),
        (["--sets", "Set55"], "did you mean Set5?"),
        (["--sets", "Set5", "-o", "t.xls"], "-o t.xls: give a file that ends in .txt, .md, .csv, .json"),
        (["--sets", "Set5", "--device", "tpu9"], "--device tpu9: is no device"),
        (["--sets", "Set5", "--data", "elsewhere"], "looked for elsewhere/Set5/GT_x2"),
    ],
)
def test_bad_input(nearest: Make, command: Command, data: Path, words: list[str], message: str) -> None:
    code, out, err = command("evaluate", nearest(2), *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


@pytest.mark.skipif(find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_further_metrics_need_pyiqa(nearest: Make, command: Command, data: Path) -> None:
    code, _, err = command("evaluate", nearest(2), "--sets", "Set5", "--metrics", "lpips", "niqe")
    assert code == 2
    assert err == (
        "kdsr: error: --metrics lpips niqe: needs the package pyiqa, which is not there: pip install pyiqa\n"
    )


PYIQA = '''
"""The part of pyiqa's interface that is used, with two metrics of its own."""
import torch

def list_models():
    return ["difference", "brightness"]

def create_metric(name, device):
    class Metric(torch.nn.Module):
        metric_mode, lower_better = ("FR", True) if name == "difference" else ("NR", False)

        def forward(self, image, other=None):
            assert image.shape[:2] == (1, 3) and 0 <= image.min() <= image.max() <= 1
            return image[:, 0].mean() if other is None else (image - other).abs().mean()

    return Metric()
'''


@pytest.mark.skipif(find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_metrics_of_pyiqa_get_rgb_images_and_the_ground_truth(
    nearest: Make, command: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pyiqa.py").write_text(PYIQA)
    monkeypatch.syspath_prepend(".")
    words = ("--sets", "DDN_rain", "--metrics", "difference", "brightness", "--format", "json")
    code, out, err = command("evaluate", nearest(1), *words)
    assert code == 0, err
    found = {one["metric"]: one["value"] for one in json.loads(out) if one["network"] == "nearest"}
    pairs = [
        [cv2.imread(f"datasets/DDN_rain/{folder}/{file.name}") / 255 for folder in ("GT", "rain")]
        for file in Path("datasets/DDN_rain/GT").iterdir()
    ]
    assert found["difference"] == pytest.approx(
        np.mean([np.abs(gt - rain).mean() for gt, rain in pairs]), abs=1e-5
    )
    assert found["brightness"] == pytest.approx(np.mean([rain[..., 2].mean() for _, rain in pairs]), abs=1e-5)
    code, _, err = command("evaluate", nearest(1), "--sets", "DDN_rain", "--metrics", "diference")
    assert code == 2 and "pyiqa has no such metric; did you mean difference?" in err
    monkeypatch.delitem(sys.modules, "pyiqa")


def test_pairs_that_do_not_fit_are_named(nearest: Make, command: Command, data: Path) -> None:
    image = Path("datasets/Set5/LRbicx2/cat.png")
    assert cv2.imwrite(str(image), cv2.imread(str(image))[:-3])
    code, _, err = command("evaluate", nearest(2), "--sets", "Set5")
    assert (
        code == 1 and "LRbicx2/cat.png (48x45) and datasets/Set5/GTmod12/cat.png (96x96) do not match" in err
    )
    image.unlink()
    shutil.copy("datasets/Set5/LRbicx2/coffee.png", "datasets/Set5/LRbicx2/tea.png")
    code, _, err = command("evaluate", nearest(2), "--sets", "Set5")
    assert code == 1 and "datasets/Set5/GTmod12 has no counterpart of tea.png in datasets/Set5/LRbicx2" in err


def test_the_published_rlfn(command: Command, shared: Path) -> None:
    """Its paper says 32.24 dB on Set5."""
    network = {"type": "RLFN", "feature_channels": 52, "num_blocks": 6, "esa_channels": 16, "upscale": 4}
    Path("rlfn.yml").write_text(yaml.safe_dump({"name": "rlfn", "scale": 4, "network_g": network}))
    weights = shared / "data/weights/RLFN/rlfn_x4.pth"
    words = ("--sets", "Set5", "--data", shared / "data", "--opt", "rlfn.yml", "--published")
    code, out, _ = command("evaluate", weights, *words)
    table = rows(out)
    assert (
        code == 0 and table["rlfn_x4"][2].startswith("32.24 / ") and table["RLFN"][2].startswith("32.24 / ")
    )


def test_folders_and_measures_are_those_of_the_option_files() -> None:
    """Of options/_base_/validation, whose sets have the names of benchmarks."""
    table = yaml.safe_load(Path(benchmarks.__file__).with_suffix(".yml").read_text(encoding="utf-8"))
    seen = set()
    for file in (OPTIONS / "_base_" / "validation").glob("test_*.yml"):
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
        kind = table["restoration" if options.get("scale") == 1 else "super_resolution"]
        for one in options.get("datasets", {}).values():
            name, pair = (
                one["name"],
                [one[key].removeprefix("datasets/") for key in ("dataroot_gt", "dataroot_lq")],
            )
            if kind is table["restoration"]:
                assert pair in kind["sets"][name]["folders"]
                luminance = options["val"]["metrics"]["psnr"]["test_y_channel"]
                assert kind["sets"][name]["channel"] == ("y" if luminance else "rgb")
            else:
                assert name in kind["sets"]
                pair = [part.removeprefix(f"{name}/").replace("${scale}", "SCALE") for part in pair]
                assert pair in kind["folders"]
            seen.add(name)
    assert seen >= {"Set5", "Urban100", "GoPro", "Test100", "CBSD68", "DDN_rain", "SOTS_outdoor"}


def test_each_published_row_has_a_source_and_names_known_sets() -> None:
    table = yaml.safe_load(Path(benchmarks.__file__).with_suffix(".yml").read_text(encoding="utf-8"))
    sets = {*table["super_resolution"]["sets"], *table["restoration"]["sets"]}
    for row in table["published"]:
        assert table["sources"][row["source"]]
        values = {key: value for key, value in row.items() if key not in ("network", "scale", "source")}
        assert values and values.keys() <= sets
        for value in values.values():
            numbers = value if isinstance(value, list) else [value]
            assert 20 < numbers[0] < 40 and all(0.7 < number < 1 for number in numbers[1:])


def test_the_folder_cropped_to_the_scale_goes_first(data: Path, photos: Path) -> None:
    """Papers crop the ground truth to a multiple of the scale, and not of 12."""
    assert find_benchmark("Set5", data, 2).gt == data / "Set5/GTmod12"
    for folder in ("GT", "LR_x2"):
        shutil.copytree(photos / folder, data / "Set5" / folder)
    found = find_benchmark("Set5", data, 2)
    assert (found.gt, found.lq) == (data / "Set5/GT", data / "Set5/LR_x2")
