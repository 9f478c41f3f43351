"""Composes the option file of a distillation: pieces of ``options/_base_``, and the sections that are its own."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from kdsr.deploy.image_pairs import GT_FOLDER, LQ_FOLDER, TEACHER_FOLDER, Images
from kdsr.deploy.student import Student, family
from kdsr.deploy.tap_pairs import tap_options
from kdsr.deploy.teacher import Teacher
from kdsr.options.compose import Pieces, Recipe, options_folder
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

WRITTEN_BY = "# Written by: kdsr distill "
_TRANSFORMERS = ("SwinIR", "Restormer", "Spandrel", "SpandrelNet")
_SLOW_RATE = 3e-4  # of transformers; the schedule's 1e-3 is for convolutions
# LQ patch at scales above 1, patch at scale 1, batch, processes that load images
_SIZES = {"cpu": (24, 64, 8, 0), "cuda": (48, 128, 16, 4)}


@dataclass(frozen=True)
class Sizes:
    """What a training step works on: side of the GT patches, images, and processes that load them."""

    patch: int
    batch: int
    workers: int


def sizes(device: str, scale: int, multiple_of: int) -> Sizes:
    """Sizes for a device; LQ patches are multiples of ``multiple_of``."""
    lq, same_size, batch, workers = _SIZES[device]
    side = lq if scale > 1 else same_size
    return Sizes(-(-side // multiple_of) * multiple_of * scale, batch, workers)


class Methods:
    """The methods of ``options/_base_/methods``.

    Raises:
        OptionError: There are no pieces.
    """

    def __init__(self) -> None:
        folder = options_folder()
        if folder is None:
            raise OptionError(
                "kdsr distill: there is no folder options/_base_ here, and the installed package has no pieces; run it "
                "in a clone of kdsr's repository"
            )
        self.folder, self.pieces = folder, Pieces(folder)

    def losses(self, name: str) -> dict[str, Any]:
        """``train`` of a method."""
        return self.pieces.read(self.pieces.methods[name]).get("train") or {}

    def choose(self, name: str | None, has_gt: bool) -> str:
        """The method; by default the teacher's output, beside ground truth where there is some.

        Raises:
            OptionError: There is no such method, or it has no teacher.
        """
        if name is None:
            return "Logits" if has_gt else "Logits_no_gt"
        known = [method for method in self.pieces.methods if self._distils(method)]
        if name not in known:
            raise OptionError(f"--method {name}: is no method with a teacher; {nearest(name, known)}")
        return name

    def others(self, chosen: str, images: Images, student: nn.Module, teacher: nn.Module) -> list[str]:
        """Further methods for these networks and images that need no other networks, for the user."""
        found = []
        for name, piece in self.pieces.methods.items():
            losses = self.losses(name)
            needs_more = bool(self.pieces.read(piece).get("network_vqgan"))
            needs_scale = "zoom_out_opt" in losses and images.scale == 1
            for_others = name.endswith("_no_gt") and images.has_gt
            if name == chosen or needs_more or needs_scale or for_others or not self._distils(name):
                continue
            with contextlib.suppress(OptionError):  # no such features
                tap_options(losses, student, teacher)
                found.append(name)
        return found

    def _distils(self, name: str) -> bool:
        piece = self.pieces.read(self.pieces.methods[name])
        return piece.get("network_t", True) is not None and piece.get("model_type") != "MCLIRModel"


def option_file(
    methods: Methods,
    method: str,
    teacher: Teacher,
    student: Student,
    images: Images,
    *,
    out: Path,
    file: Path,
    iters: int,
    device: str,
    size: Sizes,
    arguments: Sequence[str],
) -> tuple[str, dict[str, Any]]:
    """The option file of a distillation.

    Args:
        methods: The pieces.
        method: The name of one.
        teacher: See ``Teacher``.
        student: See ``Student``.
        images: See ``Images``; written to ``out/data``.
        out: Folder of the run's folder.
        file: Where the file will be.
        iters: Iterations.
        device: ``cpu``, ``cuda``, or ``auto``.
        size: See ``Sizes``.
        arguments: Those of the command, for the first line.

    Returns:
        Its text, and the proposed features by option of ``train``.

    Raises:
        OptionError: The method does not fit the networks.
    """
    folder = methods.folder / "_base_"
    losses = methods.losses(method)
    taps = tap_options(losses, student.net, teacher.opened.net)
    scale = images.scale
    name = "_".join([method, family(student.options), *([f"x{scale}"] if scale > 1 else [])])
    pieces = [folder / "runtime.yml", folder / "schedules/short.yml", methods.pieces.methods[method]]
    recipe = Recipe(name, [(piece, "") for piece in pieces])
    sections: list[tuple[str, dict[str, Any]]] = [
        ("", {"scale": scale, **({"num_gpu": 0} if device == "cpu" else {})}),
        ("the teacher", _teacher(teacher)),
        (f"the student: {student.how}; {student.parameters:,} parameters", _student(student)),
        (_about(images), {"datasets": _datasets(images, out / "data", size)}),
        ("measured on the held-out images", {"val": _validation(images, iters)}),
        ("iterations, rate, features", {"train": _training(method, student, images, iters, losses) | taps}),
        ("", {"logger": {"print_freq": max(min(iters // 20, 100), 1),
                         "save_checkpoint_freq": max(min(iters // 5, 2000), 1), "use_tb_logger": False}}),
        ("", {"path": _paths(teacher, student, out)}),
    ]  # fmt: skip
    for comment, section in sections:
        recipe.settings += ["", f"# {comment}"] if comment else [""]
        recipe.settings.append(_yaml(section))
    first = f"{WRITTEN_BY}{shlex.join(arguments)}\n# Edit it as you like, and train: kdsr train -opt {file}\n"
    return first + recipe.text(file, methods.folder), taps


def _yaml(section: Mapping[str, Any], indent: str = "") -> str:
    """Block style, but short sections of plain values and lists on one line."""
    lines = []
    for key, value in section.items():
        inline = not isinstance(value, dict) or (
            indent and len(value) <= 4 and not any(isinstance(below, dict) for below in value.values())
        )
        if inline:
            text = yaml.safe_dump(
                value, default_flow_style=True, width=1000, allow_unicode=True, sort_keys=False
            )
            lines.append(f"{indent}{key}: {text.strip().removesuffix('...').strip()}")
        else:
            lines += [f"{indent}{key}:", _yaml(value, f"{indent}  ")]
    return "\n".join(lines)


def _about(images: Images) -> str:
    if images.made:
        return (
            f"LQ images are made with Matlab's bicubic, factor {images.scale}; every tenth image is held out"
        )
    return "links to the images; every tenth is held out" + (
        ""
        if images.has_gt
        else ", and compared with the teacher's output (val/teacher) for want of ground truth"
    )


def _teacher(teacher: Teacher) -> dict[str, Any]:
    return {"network_t": dict(teacher.options)}


def _student(student: Student) -> dict[str, Any]:
    unused = {"find_unused_parameters": True} if student.options["type"] == "SpandrelNet" else {}
    return {"network_g": dict(student.options), **unused}


def _datasets(images: Images, folder: Path, size: Sizes) -> dict[str, Any]:
    lq = {"dataroot_lq": str(folder / "train" / LQ_FOLDER)}
    gt = {"dataroot_gt": str(folder / "train" / GT_FOLDER)} if images.has_gt else {}
    train = {
        "name": "train",
        "type": "PairedImageDataset" if images.has_gt else "LQImageDataset",
        **gt,
        **lq,
        "io_backend": {"type": "disk"},
        "gt_size": size.patch,
        "use_hflip": True,
        "use_rot": True,
        "num_worker_per_gpu": size.workers,
        "batch_size_per_gpu": size.batch,
        "dataset_enlarge_ratio": 100,
    }
    val = {
        "name": "val",
        "type": "PairedImageDataset",
        "dataroot_gt": str(folder / "val" / (GT_FOLDER if images.has_gt else TEACHER_FOLDER)),
        "dataroot_lq": str(folder / "val" / LQ_FOLDER),
        "io_backend": {"type": "disk"},
    }
    return {"train": train, "val": val}


def _validation(images: Images, iters: int) -> dict[str, Any]:
    border = {"crop_border": images.scale if images.scale > 1 else 0, "test_y_channel": True}
    return {
        "val_freq": max(iters // 5, 1),
        "teacher": images.has_gt,
        "metrics": {
            "psnr": {"type": "calculate_psnr", **border},
            "ssim": {"type": "calculate_ssim", **border},
        },
    }


def _training(
    method: str, student: Student, images: Images, iters: int, losses: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "total_iter": iters,
        # follows a tenth of the run behind, at most 1000 iterations
        "ema_decay": round(max(1 - max(10 / iters, 1e-3), 0.0), 4),
    }
    if student.options["type"] in _TRANSFORMERS:
        found["optim_g"] = {"lr": _SLOW_RATE}
    if losses.get("pixel_opt") and not images.has_gt:
        found["pixel_opt"] = None
    return found


def _paths(teacher: Teacher, student: Student, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"experiments_root": str(out)}
    if teacher.options["type"] != "Spandrel":
        found |= {"pretrain_network_t": str(teacher.file), "strict_load_t": True, "param_key_t": "auto"}
    if student.weights is not None:
        found |= {"pretrain_network_g": str(student.weights), "param_key_g": "auto"}
    return found


def written_arguments(file: Path) -> str | None:
    """The arguments with which ``kdsr distill`` has written an option file; None if it has not."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix(WRITTEN_BY) if first.startswith(WRITTEN_BY) else None


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda``, of ``auto`` what there is."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
