"""The metrics of the options: which values are better, and the values of one image or why there is none."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import basicsr.metrics
import cv2
import numpy as np
import torch
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor

from kdsr.data.resize import imresize
from kdsr.models import psnr_ssim
from kdsr.runtime.errors import TrainingError, is_out_of_memory

_BETTER = {"calculate_psnr": "higher", "calculate_ssim": "higher", "calculate_niqe": "lower"}
_ROWS = 256  # of an image at once: work on a whole one takes several times its memory
_FASTER = {"calculate_psnr": psnr_ssim.psnr, "calculate_ssim": psnr_ssim.ssim}
_NIQE_BLOCK = 96


def better_of(metric: Mapping[str, Any]) -> str | None:
    """Which values of a metric of ``val.metrics`` are better, ``higher`` or ``lower``; None where it is not declared.

    The option ``better`` counts first, then the attribute ``better`` of a registered function or class.
    (BasicSR takes higher values of any metric for better, those of NIQE as well.)
    """
    kind = str(metric.get("type"))
    entry = dict(iter(METRIC_REGISTRY)).get(kind)
    for direction in (metric.get("better"), _BETTER.get(kind), getattr(entry, "better", None)):
        if direction in ("higher", "lower"):
            return direction
    return None


def calculate_metric(images: Mapping[str, Any], metric: Mapping[str, Any]) -> Any:
    """BasicSR's ``calculate_metric``, without passing ``better``, which is no argument of a metric.

    PSNR and SSIM of ordinary images are computed by ``psnr_ssim``.

    Args:
        images: ``img`` and, for a metric with a reference, ``img2``: (H, W, C) or (H, W), BGR, 8 bits.
        metric: One entry of ``val.metrics``.
    """
    arguments = {key: value for key, value in metric.items() if key != "better"}
    border: Any = arguments.get("crop_border")
    if (
        arguments.keys() <= {"type", "crop_border", "test_y_channel"}
        and (faster := _FASTER.get(arguments["type"]))
        and psnr_ssim.is_supported(images["img"], images["img2"], border)
    ):
        return faster(images["img"], images["img2"], border, arguments.get("test_y_channel", False))
    return basicsr.metrics.calculate_metric(images, arguments)


def needs_reference(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of the options compares with GT (PSNR) or looks at the image alone (NIQE)."""
    return "img2" in inspect.signature(dict(iter(METRIC_REGISTRY))[metric["type"]]).parameters


def needs_no_main_thread(metrics: Mapping[str, Mapping[str, Any]] | None) -> bool:
    """Whether all metrics are BasicSR's, which keep no state; metrics of the user may."""
    registered = dict(iter(METRIC_REGISTRY))
    return all(
        registered[metric["type"]].__module__.startswith("basicsr.") for metric in (metrics or {}).values()
    )


@contextmanager
def without_numpy_warnings() -> Iterator[None]:
    """Hides NumPy's warnings about means over nothing; such a metric has no value, which is reported.

    Not in ``metric_values``: warnings can be filtered in one thread only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def is_finite(image: Tensor) -> Tensor:
    """Whether no value is NaN or infinite: a boolean scalar on the tensor's device."""
    return torch.isfinite(torch.stack(torch.aminmax(image))).all()


def without_normalisation(batch: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Undoes a data set's ``mean`` and ``std``: (N, C, H, W) as the network gives it -> images in [0, 1].

    Images with another number of channels than the normalisation are returned as they are: their number is an error
    of its own.
    """
    if mean is None or std is None or {len(mean), len(std)} - {1, batch.shape[1]}:
        return batch
    shift, factor = (batch.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return batch * factor + shift


def to_8_bits(batch: Tensor) -> Tensor:
    """Rounds values in [0, 1] to uint8 as BasicSR's ``tensor2img`` does, on the tensor's device: (N, C, H, W).

    By planes or rows: at once it takes four times the tensor's memory.
    """
    rounded = torch.empty(batch.shape, dtype=torch.uint8, device=batch.device)
    if batch.device.type == "cpu":  # OpenCV takes half of torch's time
        for image, values in zip(rounded.numpy(), batch.detach().float().numpy(), strict=True):
            for place, plane in zip(image, values, strict=True):
                cv2.convertScaleAbs(np.clip(plane, 0, 1), dst=place, alpha=255)
        return rounded
    for place, rows in zip(rounded.split(_ROWS, dim=-2), batch.split(_ROWS, dim=-2), strict=True):
        place.copy_(rows.float().clamp(0, 1).mul_(255).round_())
    return rounded


def as_image(batch: Tensor) -> np.ndarray:
    """BasicSR's ``tensor2img`` of (1, C, H, W), with values in [0, 1] or of ``to_8_bits``; waits for the device."""
    if batch.shape[1] not in (1, 3):
        return tensor2img([batch if batch.is_floating_point() else batch / 255])
    planes = (batch if batch.dtype == torch.uint8 else to_8_bits(batch))[0].cpu().numpy()
    return np.asarray(cv2.merge([*planes[::-1]])) if len(planes) == 3 else planes[0]


def baseline_name(scale: int) -> str:
    return "bicubic" if scale > 1 else "input"


def baseline_image(lq: np.ndarray, scale: int) -> np.ndarray:
    """The image that needs no network: Matlab's bicubic interpolation, at scale 1 the input itself.

    Args:
        lq: (H, W) or (H, W, 3), uint8.
        scale: Upscaling factor.

    Returns:
        (H·scale, W·scale) or the same with 3 channels, uint8.
    """
    return imresize(lq, scale) if scale > 1 else lq


def shape_problem(image: np.ndarray, gt: np.ndarray, colour: str) -> str | None:
    """Why a restored image cannot be compared with its ground truth; ``colour``: the option that sets the channels."""
    if image.shape == gt.shape:
        return None
    (height, width, made), (gt_height, gt_width, wanted) = (
        (*array.shape[:2], array.shape[2] if array.ndim == 3 else 1) for array in (image, gt)
    )
    if made != wanted:
        cure = (
            f"set {colour}: y" if made == 1 else f"remove {colour}" if wanted == 1 else "change one of them"
        )
        return f"has {made} channel{'s' * (made > 1)}, the ground truth has {wanted}; {cure}"
    return f"has {height}×{width} pixels, the ground truth has {gt_height}×{gt_width}; another scale?"


def metric_values(
    image: np.ndarray, gt: np.ndarray | None, metrics: Mapping[str, Mapping[str, Any]] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Measures an image with every metric that can be had: without ground truth those that need none.

    Args:
        image: (H, W) or (H, W, C), uint8, BGR.
        gt: Of the same shape.
        metrics: ``val.metrics`` of the options.

    Returns:
        The finite values by the metric's name; of the other metrics, why there is none.
    """
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, metric in (metrics or {}).items():
        compares = needs_reference(metric)
        if compares and gt is None:
            continue
        pair = {"img": image, "img2": gt} if compares else {"img": image}
        try:
            with np.errstate(all="ignore"):
                value = float(calculate_metric(pair, metric))
            why = "" if np.isfinite(value) else f"its value is {value}"
        except Exception as error:  # whatever a metric makes of an image or of its options
            if is_out_of_memory(error):
                raise TrainingError(f"{metric['type']} needs more memory than there is") from error
            value, why = np.nan, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if why:
            problems[name] = _likely_cause(metric, image, value) or why
        else:
            values[name] = value
    return values, problems


def _likely_cause(metric: Mapping[str, Any], image: np.ndarray, value: float) -> str | None:
    height, width = image.shape[:2]
    border = metric.get("crop_border") or 0
    if not isinstance(border, int) or border < 0:
        return None
    kind = str(metric["type"]).lower()
    left = [max(0, side - 2 * border) for side in (height, width)]
    whole = f"{height}×{width} pixels"
    if min(left) == 0:
        return f"nothing is left of {whole} without crop_border {border}; lower it, or leave the image out"
    rest = f"{left[0]}×{left[1]} of {whole} are left without crop_border {border}" if border else whole
    if "ssim" in kind and min(left) < psnr_ssim.SMALLEST:
        return (
            f"{rest}, SSIM needs {psnr_ssim.SMALLEST}×{psnr_ssim.SMALLEST}; leave the image or the metric out"
        )
    if "niqe" in kind and (left[0] // _NIQE_BLOCK) * (left[1] // _NIQE_BLOCK) < 2:
        return f"{rest}, NIQE needs {_NIQE_BLOCK}×{2 * _NIQE_BLOCK}; leave the image or the metric out"
    if value == np.inf and "psnr" in kind:
        return "its value is infinite: the image equals the ground truth exactly; is it in the right folder?"
    return None
