"""How ``val`` has images restored: whole, in tiles, by the mean of eight views; by student, EMA and teacher alike."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.archs.edsr_arch import EDSR
from torch.nn.modules.module import register_module_forward_pre_hook

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.models.kd_model import KDModel
from kdsr.models.self_ensemble import self_ensemble

TILES = {"tile": 18, "tile_overlap": 12}  # of the 24×24 LQ photographs; EDSR with one block reaches 6 pixels


@pytest.fixture
def seen() -> Iterator[list[tuple[int, int]]]:
    """The sizes that an EDSR is shown for validation or a test: all but the patches of 16×16."""
    sizes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, EDSR) and inputs[0].shape[-2:] != (16, 16):
            sizes.append(tuple(inputs[0].shape[-2:]))

    handle = register_module_forward_pre_hook(note)
    yield sizes
    handle.remove()


def make(options: dict[str, Any], is_train: bool, **val: Any) -> KDModel:
    options = copy.deepcopy(options) | {"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1}
    options["val"].update(val)
    torch.manual_seed(0)
    return KDModel(options | {"is_train": is_train})


@pytest.mark.parametrize("ema", [0, 0.9])
@torch.no_grad()
def test_tiles_and_ensemble_of_student_or_ema(run_options: dict[str, Any], ema: float) -> None:
    """The EMA is what is validated where there is one; both come back to the mode that they were in."""
    run_options["train"]["ema_decay"] = ema
    model = make(run_options, True, **TILES, self_ensemble=True)
    if ema:
        for weight in model.net_g_ema.parameters():
            weight.mul_(0.9)
    tested = copy.deepcopy(model.net_g_ema if ema else model.net_g).eval()
    lq = torch.rand(1, 3, 40, 29)
    torch.testing.assert_close(model.restore(lq), self_ensemble(tested)(lq), rtol=0, atol=1e-4)
    model.opt["val"]["self_ensemble"] = False
    torch.testing.assert_close(model.restore(lq), tested(lq), rtol=0, atol=1e-4)
    assert (self_ensemble(tested)(lq) - tested(lq)).abs().max() > 1e-3
    assert model.net_g.training and not tested.training


def measured(name: str) -> dict[tuple[str, str], float]:
    (file,) = Path().glob(f"*/{name}/metrics.csv")
    with file.open(newline="", encoding="utf-8") as rows:
        return {(row["network"], row["image"]): float(row["value"]) for row in csv.DictReader(rows)}


def run_test(options: dict[str, Any], **val: Any) -> dict[str, np.ndarray]:
    """A test as on the command line; gives the saved images."""
    options = copy.deepcopy(options)
    options["val"].update(val)
    Path("test.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 0
    images = Path("results", options["name"], "visualization", "held_out").iterdir()
    return {path.name.split("_")[0]: cv2.imread(str(path)).astype(int) for path in images}


@pytest.fixture
def test_options(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    torch.save({"params": build_network(run_options["network_g"]).state_dict()}, "student.pth")
    run_options["datasets"] = {"test_1": run_options["datasets"]["val"]}
    run_options["path"] = {"pretrain_network_g": "student.pth"}
    run_options["val"].update(save_img=True)
    return {key: value for key, value in run_options.items() if key not in ("train", "logger")}


def test_a_test_in_tiles_gives_the_images_and_values_of_one_without(
    test_options: dict[str, Any], seen: list[tuple[int, int]]
) -> None:
    whole = run_test({**test_options, "name": "whole"})
    assert set(seen) == {(24, 24)}
    seen.clear()
    tiles = run_test({**test_options, "name": "tiles"}, **TILES)
    assert seen == [(18, 18)] * 4 * 4
    assert len(whole) == 4 and set(tiles) == set(whole)
    assert all(np.abs(tiles[name] - whole[name]).max() <= 1 for name in whole)  # a grey level: rounding
    assert measured("tiles") == pytest.approx(measured("whole"), abs=1e-2)


def test_a_test_of_eight_views(test_options: dict[str, Any], seen: list[tuple[int, int]]) -> None:
    plain = run_test({**test_options, "name": "plain"})
    seen.clear()
    views = run_test({**test_options, "name": "views"}, self_ensemble=True)
    assert seen == [(24, 24)] * 8 * 4
    assert all(np.abs(views[name] - plain[name]).max() > 1 for name in plain)
    seen.clear()
    both = run_test({**test_options, "name": "both"}, self_ensemble=True, **TILES)
    assert seen == [(18, 18)] * 8 * 4 * 4
    assert all(np.abs(views[name] - both[name]).max() <= 1 for name in plain)


def test_validation_in_tiles_shows_no_network_more(
    dckd_options: dict[str, Any], seen: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher before the training, student after it; their values are those of whole images."""
    monkeypatch.chdir(tmp_path)
    values = {}
    for name, tiles in (
        ("whole", {}),
        ("tiles", {"tile": 22, "tile_overlap": 16}),
    ):  # the teacher reaches 8 pixels
        seen.clear()
        dckd_options["name"] = name
        dckd_options["val"].update(teacher=True, **tiles)
        Path("run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
        assert train_entry.main(["-opt", "run.yml"]) == 0
        assert set(seen) == ({(22, 22)} if tiles else {(24, 24)})
        values[name] = measured(name)
    assert {network for network, _ in values["tiles"]} == {"teacher", "student"}
    assert values["tiles"] == pytest.approx(values["whole"], abs=1e-2)
