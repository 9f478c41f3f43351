"""The picture of a comparison: per photograph a row with the same magnified crop of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from basicsr.utils.color_util import rgb2ycbcr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from kdsr.tools.report import Image, Method

_ACCENT = "#ffd000"  # with a dark outline, visible on any photograph
_GREY = "#666666"
_CELL = 1.9  # height of a row's images, inches
_PHOTO_ASPECT = 1.4  # width of the photograph's cell over its height


def _luma(image: Image) -> NDArray[np.float32]:
    return np.asarray(rgb2ycbcr(image, y_only=True), dtype=np.float32)


def pick_crop(gt: Image, images: Sequence[Image], size: int, border: int = 0) -> tuple[int, int]:
    """Picks the square in which the methods differ most.

    This is the square with the largest sum of (standard deviation across the methods) × (gradient of the ground truth)
    on the Y channel; it does not depend on which method is better.

    Args:
        gt: Ground truth.
        images: The methods' results, of the same size.
        size: Side of the square in pixels, limited to the image's.
        border: Pixels to avoid at each side.

    Returns:
        Top and left of the square.
    """
    height, width = gt.shape[:2]
    luma = _luma(gt)
    gradient = cv2.magnitude(cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1))
    interest = np.std([_luma(image) for image in images], axis=0) * gradient
    total = cv2.integral(interest.astype(np.float64))
    tall, wide = min(size, height), min(size, width)
    sums = total[tall:, wide:] - total[:-tall, wide:] - total[tall:, :-wide] + total[:-tall, :-wide]
    top, left = (min(border, (full - part) // 2) for full, part in ((height, tall), (width, wide)))
    inside = sums[top : sums.shape[0] - top, left : sums.shape[1] - left]
    row, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return int(row) + top, int(column) + left


def _bare(axes: Axes, colour: str = "#bbbbbb", width: float = 0.6) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(width)


def draw(
    photographs: Mapping[str, Image],
    methods: Sequence[Method],
    scores: pd.DataFrame,
    *,
    title: str = "",
    caption: str = "",
    crop: int = 64,
    border: int = 4,
) -> Figure:
    """Draws the comparison.

    Args:
        photographs: Ground truth by name, one per row.
        methods: One per column, after the photograph and its ground-truth crop.
        scores: From ``report.score``; the values of the whole photograph are shown under each crop.
        title: Line above the picture.
        caption: Line below the picture.
        crop: Side of the crops in pixels.
        border: Pixels at the photographs' edges that crops avoid.
    """
    columns = 2 + len(methods)
    widths = [_PHOTO_ASPECT] + [1.0] * (columns - 1)
    head, foot, gap, below = 0.95, 0.3, 0.12, 0.42  # inches
    figure_width = _CELL * sum(widths) + gap * (columns + 1)
    figure_height = head + foot + len(photographs) * (_CELL + below)
    figure = Figure(figsize=(figure_width, figure_height), facecolor="white")
    FigureCanvasAgg(figure)
    keys = zip(scores["method"], scores["image"], strict=True)
    values = dict(zip(keys, scores[["psnr", "ssim"]].to_numpy(float).tolist(), strict=True))

    def cell(row: int, column: int) -> Axes:
        left = gap + sum(widths[:column]) * _CELL + gap * column
        bottom = figure_height - head - row * (_CELL + below) - _CELL
        width = widths[column] * _CELL
        return figure.add_axes(
            (left / figure_width, bottom / figure_height, width / figure_width, _CELL / figure_height)
        )

    for row, (name, gt) in enumerate(photographs.items()):
        images = [method.images[name] for method in methods]
        top, left = pick_crop(gt, images, crop, border)
        window = np.s_[top : top + crop, left : left + crop]
        photo = cell(row, 0)
        photo.imshow(gt, interpolation="antialiased")
        photo.set_anchor("C")
        _bare(photo)
        box = Rectangle((left - 0.5, top - 0.5), crop, crop, fill=False, edgecolor=_ACCENT, linewidth=1.8)
        box.set_path_effects([withStroke(linewidth=3.6, foreground="black")])
        photo.add_patch(box)
        photo.set_xlabel(name, fontsize=10, labelpad=4)
        reference = cell(row, 1)
        reference.imshow(gt[window], interpolation="nearest")
        _bare(reference, _ACCENT, 2.2)
        reference.set_xlabel("PSNR / SSIM", fontsize=9, color=_GREY, labelpad=4)
        best = max((values[method.name, name][0] for method in methods if method.competes), default=None)
        for column, method in enumerate(methods, start=2):
            axes = cell(row, column)
            axes.imshow(method.images[name][window], interpolation="nearest")
            _bare(axes)
            psnr, ssim = values[method.name, name]
            weight = "bold" if method.competes and psnr == best else "normal"
            axes.set_xlabel(f"{psnr:.2f} / {ssim:.4f}", fontsize=10, fontweight=weight, labelpad=4)
            if row == 0:
                size = "" if method.parameters is None else f"\n{method.parameters:,} parameters"
                axes.set_title(method.name + size, fontsize=10, pad=6)
        if row == 0:
            photo.set_title("photograph", fontsize=10, pad=6)
            reference.set_title("ground truth", fontsize=10, pad=6)
    figure.text(gap / figure_width, 1 - 0.14 / figure_height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(gap / figure_width, 0.14 / figure_height, caption, fontsize=8.5, color=_GREY, va="bottom")
    return figure


def write_picture(figure: Figure, path: Path) -> Path:
    """Saves the picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
