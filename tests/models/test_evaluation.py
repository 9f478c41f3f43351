"""Validation: images of any size, the values of each image."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils import tensor2img
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from kdsr.models.evaluation import append_csv, evaluate, forget_after, mean_values, pad_and_restore
from kdsr.runtime.errors import DataError

PSNR = {"psnr": {"type": "calculate_psnr", "crop_border": 0, "test_y_channel": False}}


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 17), (2, 40)])
def test_any_size_is_padded_and_cropped(size: tuple[int, int]) -> None:
    seen = []

    def net(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return F.interpolate(x, scale_factor=2, mode="nearest")

    lq = torch.rand(1, 3, *size)
    torch.testing.assert_close(pad_and_restore(net, lq, 8, 2), F.interpolate(lq, scale_factor=2))
    assert seen == [tuple(-(-side // 8) * 8 for side in size)]


class Greys(Dataset):
    """Five images; item i is wrong by i + 1 grey levels everywhere."""

    opt = {"name": "greys"}

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, object]:
        gt = torch.full((3, 12, 12), 100 / 255)
        return {"lq": gt + (index + 1) / 255, "gt": gt, "lq_path": f"/data/{index}.png"}


def test_metrics_of_each_image_and_their_mean(tmp_path: Path) -> None:
    results = evaluate(lambda lq: lq, DataLoader(Greys()), PSNR, torch.device("cpu"))
    expected = [20 * torch.log10(torch.tensor(255.0 / (index + 1))).item() for index in range(5)]
    assert [result.image for result in results] == ["0", "1", "2", "3", "4"]
    assert [result.values["psnr"] for result in results] == pytest.approx(expected, abs=1e-4)
    assert mean_values(results)["psnr"] == pytest.approx(sum(expected) / 5, abs=1e-4)

    table = tmp_path / "metrics.csv"
    for iteration in (10, 20, 30):
        append_csv(table, iteration, "student", "greys", results)
    forget_after(table, 20)
    rows = [line.split(",")[0] for line in table.read_text().splitlines()]
    assert rows == ["iteration", *["10"] * 5, *["20"] * 5]


def test_ranks_share_the_images_unevenly() -> None:
    shares = [
        evaluate(lambda lq: lq, DataLoader(Greys()), PSNR, torch.device("cpu"), rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert [[result.index for result in share] for share in shares] == [[0, 2, 4], [1, 3]]


def test_restored_images_are_saved(tmp_path: Path) -> None:
    evaluate(
        lambda lq: lq, DataLoader(Greys()), None, torch.device("cpu"),
        save_to=lambda name: tmp_path / f"{name}_out.png",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{index}_out.png" for index in range(5)]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_many_rows_is_that_of_basicsr(tmp_path: Path, channels: int) -> None:
    """It is turned into 8 bits some rows at a time; values outside [0, 1] are clipped."""
    lq = torch.rand(1, channels, 600, 7, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    loader = DataLoader([{"lq": lq[0], "lq_path": "tall.png"}])  # type: ignore[arg-type]
    evaluate(
        lambda lq: lq.clone(), loader, None, torch.device("cpu"), save_to=lambda _: tmp_path / "tall.png"
    )
    saved = cv2.imread(str(tmp_path / "tall.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(saved, tensor2img([lq]))


def test_an_image_that_does_not_fit_is_named_with_what_helps() -> None:
    with pytest.raises(
        DataError, match=r"/data/0.png: 12x12 pixels need more memory than there is; with val.tile"
    ):
        evaluate(lambda lq: lq.new_empty(2**60), DataLoader(Greys()), PSNR, torch.device("cpu"))


def test_other_failures_of_a_network_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        evaluate(lambda lq: lq + torch.rand(7, 1), DataLoader(Greys()), PSNR, torch.device("cpu"))
