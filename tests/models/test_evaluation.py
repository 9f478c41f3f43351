"""Validation: images of any size, the values of each image."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import normalize

from kdsr.data.resize import imresize
from kdsr.distill.padding import pad_and_restore
from kdsr.models import evaluation
from kdsr.models.evaluation import (
    EvaluationSettings,
    ImageResult,
    evaluate,
    mean_baseline,
    mean_values,
)
from kdsr.models.metrics_file import BASELINE, append_csv, forget_after, recorded_means
from kdsr.models.restored_images import largest_batch
from kdsr.runtime.errors import DataError, TrainingError

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
    with pytest.raises(DataError, match=r"/data/0.png: 12x12 pixels do not fit into memory; set val.tile"):
        evaluate(lambda lq: lq.new_empty(2**60), DataLoader(Greys()), PSNR, torch.device("cpu"))


def test_other_failures_of_a_network_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        evaluate(lambda lq: lq + torch.rand(7, 1), DataLoader(Greys()), PSNR, torch.device("cpu"))


# ------------------------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", range(5))
def test_an_output_that_is_not_finite_names_its_image(tmp_path: Path, value: float, bad: int) -> None:
    def net(lq: Tensor) -> Tensor:
        output = lq.clone()
        if round(float(lq.mean()) * 255) == 101 + bad:
            output[0, 2, 7, 3] = value
        return output

    with pytest.raises(TrainingError, match=rf"/data/{bad}.png: the output of the student is not finite"):
        evaluate(
            net, DataLoader(Greys()), EvaluationSettings(PSNR, network="the student"), torch.device("cpu"),
            save_to=lambda name: tmp_path / f"{name}.png",
        )  # fmt: skip
    assert not (tmp_path / f"{bad}.png").exists()  # no black picture


def items(sizes: list[tuple[int, int]], scale: int = 1, channels: int = 3) -> DataLoader:
    """A set of noise with images of these sizes; LQ is GT with less contrast."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index, (height, width) in enumerate(sizes):
        lq = torch.rand(channels, height, width, generator=generator)
        gt = lq.repeat_interleave(scale, -1).repeat_interleave(scale, -2) * 0.8
        made.append({"lq": lq, "gt": gt, "lq_path": f"/lq/{index}.png", "gt_path": f"/gt/{index}.png"})
    return DataLoader(made)  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.tuples(st.integers(6, 30), st.integers(6, 30)), min_size=1, max_size=4), st.integers(0, 8))
def test_the_mean_is_finite_or_an_image_is_named(sizes: list[tuple[int, int]], border: int) -> None:
    metrics = {kind: {"type": f"calculate_{kind}", "crop_border": border} for kind in ("psnr", "ssim")}
    loader = items(sizes)
    too_small = [index for index, size in enumerate(sizes) if min(size) - 2 * border < 11]
    if not too_small:
        means = mean_values(evaluate(lambda lq: lq, loader, metrics, torch.device("cpu")))
        assert set(means) == set(metrics) and all(np.isfinite(value) for value in means.values())
        return
    with pytest.raises(DataError) as caught:
        evaluate(lambda lq: lq, loader, metrics, torch.device("cpu"))
    assert all(f"/lq/{too_small[0]}.png" in problem for problem in caught.value.problems)


def test_an_output_that_equals_its_ground_truth_is_named() -> None:
    with pytest.raises(DataError, match=r"/lq/0.png, restored by the network.*equals the ground truth"):
        evaluate(lambda lq: lq * 0.8, items([(12, 12)]), PSNR, torch.device("cpu"))


def test_an_error_of_the_network_names_the_image() -> None:
    with pytest.raises(RuntimeError) as caught:
        evaluate(lambda lq: lq @ torch.rand(5, 5), DataLoader(Greys()), PSNR, torch.device("cpu"))
    assert "/data/0.png" in caught.value.__notes__[0]


# ------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_baseline_is_measured_beside_the_network(scale: int, channels: int) -> None:
    loader = items([(12, 9), (7, 7)], scale, channels)

    def bicubic(lq: Tensor) -> Tensor:
        image = lq.squeeze(0).permute(1, 2, 0).mul(255).round().byte().numpy()
        made = imresize(image, scale) if scale > 1 else image
        return torch.from_numpy(made.astype("f4") / 255).permute(2, 0, 1)[None]

    results = evaluate(bicubic, loader, EvaluationSettings(PSNR, PSNR, scale), torch.device("cpu"))
    assert [result.values for result in results] == [result.baseline for result in results]
    assert mean_baseline(results) == mean_values(results)


def test_an_input_that_equals_its_ground_truth_has_no_baseline_and_is_named() -> None:
    loader = items([(12, 12), (12, 12)])
    loader.dataset[1]["gt"] = loader.dataset[1]["lq"]
    results = evaluate(lambda lq: lq * 0.9, loader, EvaluationSettings(PSNR, PSNR), torch.device("cpu"))
    assert results[1].baseline == {} and "equals the ground truth" in results[1].unmeasured["psnr"]
    assert mean_baseline(results) == results[0].baseline


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=3),
)
def test_a_run_that_was_killed_anywhere_leaves_the_same_file(
    sets: int, validations: int, kills: list[tuple[int, int]]
) -> None:
    """Killed between any two writes and resumed from any state before: no order of rows tells of it."""

    def whole_run(file: Path, kills: list[tuple[int, int]]) -> bytes:
        start, kills = 0, list(kills)
        while True:
            forget_after(file, start)
            writes = 0
            for iteration in range(start + 1, validations + 1):
                for name in map(str, range(sets)):
                    new = not recorded_means(file, 0, name, BASELINE)
                    result = ImageResult(0, "a", {"m": float(iteration)}, {"m": 0.5} if new else {})
                    append_csv(file, iteration, "student", name, [result])
                    writes += 1
                    if kills and writes == kills[0][0]:
                        break
                else:
                    continue
                break
            else:
                return file.read_bytes()
            start = min(kills.pop(0)[1], iteration - 1)

    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one.csv"), Path(folder, "other.csv")
        assert whole_run(one, []) == whole_run(other, kills)


# --------------------------------------------------------------------------------------------------- normalised sets


class Photos(Dataset):
    """Noise of one grey level more than its ground truth, normalised as BasicSR's sets do it."""

    opt = {"name": "photos"}

    def __init__(self, mean: list[float] | None, std: list[float] | None) -> None:
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, object]:
        gt = torch.randint(0, 250, (3, 16, 16), generator=torch.Generator().manual_seed(index)) / 255
        pair = {"lq": gt + 5 / 255, "gt": gt}
        if self.mean is not None:
            pair = {key: normalize(image.clone(), self.mean, self.std) for key, image in pair.items()}
        return {**pair, "lq_path": f"/lq/{index}.png", "gt_path": f"/gt/{index}.png"}


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.lists(st.floats(0.1, 3), min_size=3, max_size=3)
)
def test_a_normalised_set_gives_the_values_and_pictures_of_the_images(
    mean: list[float], std: list[float]
) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, photos in enumerate((Photos(None, None), Photos(mean, std))):
            results = evaluate(
                lambda lq: lq, DataLoader(photos), EvaluationSettings(PSNR, PSNR), torch.device("cpu"),
                save_to=lambda name, number=number: Path(folder, f"{number}_{name}.png"),
            )  # fmt: skip
            pictures = [cv2.imread(str(Path(folder, f"{number}_{name}.png"))) for name in (0, 1)]
            found.append(([(r.values["psnr"], r.baseline["psnr"]) for r in results], np.stack(pictures)))
    (plain, images), (normalised, others) = found
    np.testing.assert_allclose(normalised, plain, rtol=1e-9)
    assert np.array_equal(images, others)


# ---------------------------------------------------------------------------------------------- threads and batches


@pytest.fixture(params=[0, 1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Threads beside the network's, whatever the machine."""
    monkeypatch.setattr(evaluation, "free_threads", lambda device: request.param)
    return int(request.param)


def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "free_threads", lambda device: 0)


BOTH = PSNR | {"ssim": {"type": "calculate_ssim", "crop_border": 0}}
SIZES = [(20, 16), (16, 20), (20, 16), (20, 16), (16, 20), (20, 16), (12, 30)]


def blurred(lq: Tensor) -> Tensor:
    return F.avg_pool2d(lq, 3, 1, 1)


def test_results_and_images_do_not_depend_on_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_at_first(name: str) -> Path:
        time.sleep(0.03 if name in "01" else 0)
        return tmp_path / str(threads) / f"{name}.png"

    found = evaluate(
        blurred, items(SIZES), EvaluationSettings(BOTH, BOTH), torch.device("cpu"), save_to=slow_at_first
    )
    without_threads(monkeypatch)
    expected = evaluate(
        blurred, items(SIZES), EvaluationSettings(BOTH, BOTH), torch.device("cpu"),
        save_to=lambda name: tmp_path / "alone" / f"{name}.png",
    )  # fmt: skip
    assert found == expected and len(found) == len(SIZES)
    for index in range(len(SIZES)):
        files = [tmp_path / folder / f"{index}.png" for folder in (str(threads), "alone")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [(None, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 2, 1, 1]), (9, [4, 2, 1])],
)
def test_images_of_one_size_are_restored_at_once(threads: int, asked: int | None, sizes: list[int]) -> None:
    seen: list[int] = []

    def net(lq: Tensor) -> Tensor:
        seen.append(len(lq))
        return blurred(lq)

    options = EvaluationSettings(BOTH, batch_size=asked)
    results = evaluate(net, items(SIZES), options, torch.device("cpu"))
    assert sorted(seen, reverse=True) == sizes
    alone = evaluate(blurred, items(SIZES), BOTH, torch.device("cpu"))
    assert [result.image for result in results] == [result.image for result in alone]
    for result, other in zip(results, alone, strict=True):
        assert result.values == pytest.approx(other.values, abs=1e-6)


def test_few_images_wait_for_others_of_their_size() -> None:
    """Of a set in which each size comes twice, far apart."""
    seen: list[int] = []

    def net(lq: Tensor) -> Tensor:
        seen.append(len(lq))
        return blurred(lq)

    sizes = [(8, 8 + index) for index in range(20)]
    evaluate(net, items(sizes + sizes), EvaluationSettings(None, batch_size=2), torch.device("cpu"))
    assert sum(seen) == 40 and max(seen) == 1


def test_a_batch_that_does_not_fit_is_restored_image_by_image() -> None:
    def net(lq: Tensor) -> Tensor:
        if len(lq) > 1:
            lq.new_empty(2**60)
        return blurred(lq)

    found = evaluate(net, items(SIZES), EvaluationSettings(BOTH, batch_size=4), torch.device("cpu"))
    assert found == evaluate(blurred, items(SIZES), BOTH, torch.device("cpu"))


@pytest.mark.parametrize(
    ("height", "images"), [(48, 16), (64, 16), (65, 15), (128, 4), (182, 1), (256, 1), (2000, 1)]
)
def test_a_batch_on_a_gpu_has_the_pixels_of_a_small_image(height: int, images: int) -> None:
    assert largest_batch(height, height, torch.device("cuda"), None) == images
    assert largest_batch(height, height, torch.device("cpu"), None) == 1
    assert largest_batch(height, height, torch.device("cuda"), 7) == 7


def test_the_first_image_with_an_error_is_named(threads: int, tmp_path: Path) -> None:
    """Even if a later one cannot be loaded, which shows first where images are loaded ahead."""
    loader = items([(12, 12), (12, 12), (9, 9), (12, 12)])
    loader.dataset[3].pop("lq")
    with pytest.raises(DataError, match=r"/lq/2.png, restored by the network: calculate_ssim"):
        evaluate(blurred, loader, BOTH, torch.device("cpu"))


def test_an_error_of_loading_comes_after_the_images_before(threads: int, tmp_path: Path) -> None:
    loader = items([(12, 12)] * 3)
    loader.dataset[2].pop("lq")
    with pytest.raises(KeyError, match="lq"):
        evaluate(blurred, loader, BOTH, torch.device("cpu"), save_to=lambda name: tmp_path / f"{name}.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_an_image_that_cannot_be_written_is_named(threads: int, tmp_path: Path) -> None:
    (tmp_path / "1.png").mkdir()
    with pytest.raises(TrainingError, match=r"1\.png: cannot be written"):
        evaluate(
            blurred, items(SIZES), None, torch.device("cpu"), save_to=lambda name: tmp_path / f"{name}.png"
        )


def test_any_error_while_an_image_is_measured_names_it(threads: int) -> None:
    def nowhere(name: str) -> Path:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError) as caught:
        evaluate(blurred, items(SIZES), None, torch.device("cpu"), save_to=nowhere)
    assert "/lq/0.png" in caught.value.__notes__[0]


@pytest.fixture
def where() -> Iterator[list[bool]]:
    """Whether each call of a user's metric came from the main thread."""
    calls: list[bool] = []

    def mean_error(img: np.ndarray, img2: np.ndarray, **options: Any) -> float:
        calls.append(threading.current_thread() is threading.main_thread())
        return float(np.abs(img.astype(int) - img2).mean())

    METRIC_REGISTRY._obj_map["mean_error"] = mean_error
    yield calls
    del METRIC_REGISTRY._obj_map["mean_error"]


def test_metrics_of_the_user_run_in_the_main_thread(threads: int, where: list[bool]) -> None:
    results = evaluate(blurred, items(SIZES), BOTH | {"mine": {"type": "mean_error"}}, torch.device("cpu"))
    assert where == [True] * len(SIZES)
    assert all(list(result.values) == ["psnr", "ssim", "mine"] for result in results)


def test_no_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    evaluate(blurred, items(SIZES), BOTH, torch.device("cpu"))
    assert not calls
