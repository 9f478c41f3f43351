"""The table of a comparison of several methods on the same photographs.

Images are RGB, uint8, (H, W, 3). PSNR and SSIM are BasicSR's, on the Y channel without ``border`` pixels at each side,
as in super-resolution papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from basicsr.metrics import calculate_psnr, calculate_ssim
from numpy.typing import NDArray

from kdsr.runtime.errors import DataError

Image = NDArray[np.uint8]
MEAN = "mean"


@dataclass(frozen=True)
class Method:
    """One column of a comparison."""

    name: str
    images: Mapping[str, Image]  # restored images by photograph
    parameters: int | None = None  # number of parameters; None without a network
    competes: bool = True  # whether the picture marks its best values (not of a teacher)


def load_rgb(path: str | Path) -> Image:
    """Reads an image file as RGB; raises a ``DataError`` if it is missing or not an image."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: not an image that can be read")
    return np.asarray(image[..., ::-1], dtype=np.uint8)


def measure(image: Image, gt: Image, border: int) -> tuple[float, float]:
    """PSNR in dB and SSIM of ``image`` against ``gt`` on the Y channel."""
    options = {"crop_border": border, "test_y_channel": True}
    bgr, gt_bgr = image[..., ::-1], gt[..., ::-1]  # BasicSR's order
    return float(calculate_psnr(bgr, gt_bgr, **options)), float(calculate_ssim(bgr, gt_bgr, **options))


def score(photographs: Mapping[str, Image], methods: Sequence[Method], border: int) -> pd.DataFrame:
    """Measures every method on every photograph.

    Returns:
        For each method a row per photograph, then one with the means (``image`` is ``"mean"``); columns
        method, parameters (nullable integer), image, psnr, ssim.
    """
    rows: list[tuple[str, int | None, str, float, float]] = []
    for method in methods:
        values = [measure(method.images[name], gt, border) for name, gt in photographs.items()]
        means = np.mean(values, axis=0)
        scored = [*zip(photographs, values, strict=True), (MEAN, (float(means[0]), float(means[1])))]
        rows += [(method.name, method.parameters, name, psnr, ssim) for name, (psnr, ssim) in scored]
    table = pd.DataFrame(rows, columns=["method", "parameters", "image", "psnr", "ssim"])
    return table.astype({"parameters": "Int64"})


def mean_scores(scores: pd.DataFrame, method: str) -> tuple[float, float]:
    """Mean PSNR and SSIM of a method over the photographs."""
    row = scores[(scores["method"] == method) & (scores["image"] == MEAN)].iloc[0]
    return float(row["psnr"]), float(row["ssim"])


def comparison(scores: pd.DataFrame) -> pd.DataFrame:
    """The table as text: rows are photographs, means and parameters; columns are methods."""
    cells = [f"{row.psnr:.2f} / {row.ssim:.4f}" for row in scores.itertuples()]
    table = scores.assign(cell=cells).pivot(index="image", columns="method", values="cell")
    table = table.loc[scores["image"].unique(), scores["method"].unique()]
    parameters = scores.groupby("method", sort=False)["parameters"].first()
    table.loc["parameters"] = ["–" if pd.isna(number) else f"{number:,}" for number in parameters]
    table.index.name = "PSNR (dB) / SSIM"
    return table


def _aligned(table: pd.DataFrame) -> list[list[str]]:
    """Header and rows, with the cells of a column padded to the same width."""
    rows = [[str(table.index.name), *table.columns]]
    rows += [[str(index), *values] for index, values in table.iterrows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]


def as_text(table: pd.DataFrame, below: int = 2) -> str:
    """A comparison for the terminal: aligned columns, rules around the means, which are the last ``below`` rows."""
    lines = ["  ".join(row) for row in _aligned(table)]
    rule, end = "-" * len(lines[0]), len(lines) - below
    return "\n".join([lines[0], rule, *lines[1:end], *([rule] if below else []), *lines[end:]])


def as_markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown with aligned columns."""
    rows = _aligned(table)
    first, *others = (len(cell) for cell in rows[0])
    rows.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_table(scores: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Writes ``comparison.csv`` (all values of ``score``) and ``comparison.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    csv_file, markdown_file = folder / "comparison.csv", folder / "comparison.md"
    scores.to_csv(csv_file, index=False)
    markdown_file.write_text(as_markdown(comparison(scores)), encoding="utf-8")
    return csv_file, markdown_file
