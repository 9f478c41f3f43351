"""The tasks of ``kdsr demo``: data, trainings and their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdsr.data.resize import imresize
from kdsr.prepare.sample import degrade_sample, make_sample
from kdsr.prepare.synthesis import Seeded
from kdsr.prepare.synthetic_rain import Rain
from kdsr.tools.report import Image

ROOT = Path(__file__).resolve().parents[2]
SCRATCH, TEACHER = "no teacher", "teacher"
SAMPLE, RAINY_SAMPLE = Path("datasets/sample"), Path("datasets/sample_rain")
SAMPLE_SCALES = (2, 3, 4)


@dataclass(frozen=True)
class Task:
    """A demonstration."""

    title: str  # of the picture
    method: str  # of the distillation
    files: Mapping[str, Path]  # option files of the trainings by the student's name: SCRATCH and method
    data: str  # description of the data
    prepare: Callable[[], object]  # makes the data
    baseline: str  # name of the image without a network
    without_network: Callable[[Image, int], Image]  # makes this image from an LQ image and the scale
    out: Path  # default output folder


def _option_files(method: str, ending: str) -> dict[str, Path]:
    names = {SCRATCH: "Scratch", method: method}
    return {student: ROOT / f"options/train/demo_{name}_{ending}.yml" for student, name in names.items()}


def _rainy_sample() -> None:
    make_sample(SAMPLE, SAMPLE_SCALES)
    degrade_sample(SAMPLE, RAINY_SAMPLE, Seeded(Rain()))


TASKS = {
    "sr": Task(
        title="×4 super-resolution",
        method="DCKD",
        files=_option_files("DCKD", "EDSR_x4"),
        data=f"sample photographs in {SAMPLE}",
        prepare=lambda: make_sample(SAMPLE, SAMPLE_SCALES),
        baseline="bicubic",
        without_network=imresize,
        out=Path("experiments/demo"),
    ),
    "rain": Task(
        title="Deraining",
        method="SLKD",
        files=_option_files("SLKD", "NAFNet_rain"),
        data=f"sample photographs with synthetic rain in {RAINY_SAMPLE}",
        prepare=_rainy_sample,
        baseline="rainy",
        without_network=lambda lq, scale: lq,
        out=Path("experiments/demo_rain"),
    ),
}
