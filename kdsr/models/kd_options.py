"""The options of ``KDModel`` beside those of its terms, and their check."""

from __future__ import annotations

from typing import Any

from kdsr.distill.mixup import MixingOptions
from kdsr.distill.tap_options import tap_problems
from kdsr.distill.weight_files import weight_files
from kdsr.models.cached_teacher import is_outputs
from kdsr.models.sections import TrainOptions
from kdsr.runtime.declarations import option


class KDTrainOptions(TrainOptions):
    mixing_augs: MixingOptions = option(None, "Mixup of the training images, as in Restormer's code.")
    teacher_weights: list[float] | None = option(
        None,
        "Weights of the teachers in their mean if `network_t` is a list: one per teacher, divided by their sum.",
        lowest=0,
        fewest=1,
        shown_default="equal",
    )
    teacher_cache: str | None = option(
        None,
        "Folder of the teacher's outputs, which `kdsr data teacher-cache` makes; null: the teacher runs in each step.",
    )
    accumulate: int = option(
        1,
        "Batches of `batch_size_per_gpu` images in an iteration: one update from the mean of their gradients.",
        lowest=1,
    )
    checkpoint_student: bool = option(
        False,
        "Whether the student's blocks keep only their inputs and are computed again in the backward pass: less memory, "
        "more time.",
    )


def kd_problems(opt: dict[str, Any]) -> list[str]:
    """Problems of teachers, taps and precision that a single key does not show."""
    train, path = opt.get("train") or {}, opt.get("path") or {}
    problems: list[str] = []
    given = opt.get("network_t")
    several = isinstance(given, list)
    teachers = (
        [f"t.{index}" for index in range(len(given))]
        if isinstance(given, list)
        else ["t"]
        if given and not is_outputs(given)
        else []
    )
    problems += [
        f"path.pretrain_network_{key}: missing; a teacher with random weights is of no use"
        for key in teachers
        if key not in weight_files(opt)
    ]
    if path.get("init_from") == "teacher" and (several or not teachers):
        there = "network_t is a list; give a checkpoint" if several else "there is no teacher; give network_t"
        problems.append(f"path.init_from: teacher: {there}")
    weights = train.get("teacher_weights")
    if weights is not None and (not several or len(weights) != len(teachers) or not sum(weights)):
        there = f"a list of {len(teachers)} networks" if several else "no list"
        problems.append(
            f"train.teacher_weights: {weights}: network_t is {there}; give a weight for each of its networks, "
            "at least one above 0"
        )
    compiled = (opt.get("precision") or {}).get("compile")
    for key in ("checkpoint_student", "bm_opt"):
        if compiled == "all" and train.get(key):
            problems.append(f"precision.compile: all does not work with train.{key}; use frozen")
    if train.get("taps") is not None:
        problems += tap_problems(train["taps"], "train.taps")
    return problems
