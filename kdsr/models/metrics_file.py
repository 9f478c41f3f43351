"""Reads and writes ``metrics.csv``, the metrics of each image; writes are atomic."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdsr.models.evaluation import ImageResult
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import DataError

CSV_HEADER = ("iteration", "network", "set", "image", "metric", "value")
BASELINE = "baseline"  # value of the column network in rows of the baseline


@dataclass(frozen=True)
class MeasuredRow:
    """One row of ``metrics.csv``: an image's value of a metric."""

    iteration: int | str
    network: str
    set: str
    image: str
    metric: str
    value: float


def read_csv(path: Path) -> list[MeasuredRow]:
    """Returns the rows of ``metrics.csv``; none if the file does not exist.

    Raises:
        DataError: The file has another format.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 or not row:
                continue
            try:
                iteration, network, dataset, image, metric, value = row
                at = int(iteration) if iteration.isdecimal() else iteration
                rows.append(MeasuredRow(at, network, dataset, image, metric, float(value)))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: is not a row of {', '.join(CSV_HEADER)}; correct or remove the file"
                ) from error
    return rows


def write_csv(path: Path, rows: list[MeasuredRow]) -> None:
    """Writes ``metrics.csv`` atomically (header: ``CSV_HEADER``)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in rows:
        writer.writerow((row.iteration, row.network, row.set, row.image, row.metric, repr(row.value)))
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def append_csv(
    path: Path, iteration: int | str, network: str, dataset: str, results: list[ImageResult]
) -> None:
    """Adds one row per image and metric to ``metrics.csv``; rows of a baseline come after those of iteration 0."""

    def made(at: int | str, who: str, which: str) -> list[MeasuredRow]:
        return [
            MeasuredRow(at, who, dataset, result.image, metric, value)
            for result in results
            for metric, value in getattr(result, which).items()
        ]

    # Rewrites the whole file: a killed run must not leave half a validation.
    rows = read_csv(path)
    # The same place as in a resumed run, which drops later iterations and keeps the baseline.
    start = next((place for place, row in enumerate(rows) if row.iteration != 0), len(rows))
    write_csv(
        path,
        [*rows[:start], *made(0, BASELINE, "baseline"), *rows[start:], *made(iteration, network, "values")],
    )


def forget_after(path: Path, iteration: int) -> None:
    """Removes the rows after ``iteration``, which a resumed run measures again."""
    rows = read_csv(path)
    kept = [row for row in rows if isinstance(row.iteration, int) and row.iteration <= iteration]
    if len(kept) != len(rows):
        write_csv(path, kept)


def recorded_means(path: Path, iteration: int, dataset: str, network: str = "student") -> dict[str, float]:
    """Returns a network's mean values on a set at an iteration from ``metrics.csv``; empty if there are none."""
    values: dict[str, list[float]] = {}
    for row in read_csv(path):
        if (row.iteration, row.network, row.set) == (iteration, network, dataset):
            values.setdefault(row.metric, []).append(row.value)
    return {metric: float(np.mean(of_images)) for metric, of_images in values.items()}
