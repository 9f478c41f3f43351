"""Composes option files from the pieces in ``options/_base_``, for ``kdsr new``.

A piece may have a variant for another choice, which then replaces it:
``methods/FitNet_EDSR.yml``, ``methods/DUKD_EDSR_x4.yml``, ``backbones/NAFNet_GoPro.yml``, ``taps/EDSR_FACD.yml``,
``schedules/SLKD_100_epochs_GoPro.yml``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdsr.options.files import read_file
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

# loss in train -> the option that lists its features, which depend on the backbone
_FEATURES = {"bm_opt": "blocks", "nc_opt": "encoder_taps", "et_opt": "decoder_taps"} | dict.fromkeys(
    ("fitnet_opt", "at_opt", "fakd_opt", "rkd_opt", "facd_opt", "fm_opt"), "taps"
)
_SHORT = {"sample": "demo", "T91BSDS": "short"}  # small data set -> its schedule


@dataclass(frozen=True)
class Choice:
    """The arguments of ``kdsr new``: names of pieces, or paths of ``.yml`` files.

    If ``scale`` is None, the data set has only one. If ``schedule`` is None, the default is used.
    """

    method: str
    backbone: str
    data: str
    scale: int | None = None
    schedule: str | None = None

    @property
    def name(self) -> str:
        """Name of the run and of its file: ``FAKD_EDSR_x4``, ``SLKD_NAFNet_GoPro``, ``Logits_SwinIR_x4_no_gt``."""
        names = (self.method, self.backbone, self.data)
        method, backbone, data = (Path(one).stem if _is_path(one) else one for one in names)
        method, _, variant = method.partition("_")
        scale = f"x{self.scale}" if (self.scale or 1) > 1 else ""
        parts = [method, backbone, "" if scale and data.startswith("DIV2K") else data, scale, variant]
        return "_".join(part for part in (*parts, self.schedule and Path(self.schedule).stem) if part)

    def command(self, file: str | Path) -> str:
        """The command that writes ``file``."""
        words = ["--method", self.method, "--backbone", self.backbone, "--data", self.data]
        words += ["--scale", str(self.scale)] if (self.scale or 1) > 1 else []
        words += ["--schedule", self.schedule] if self.schedule else []
        return shlex.join(["kdsr", "new", *words, "-o", str(file)])


@dataclass
class Recipe:
    """A composed option file: its pieces in order, each with a reason, and its own settings."""

    name: str
    pieces: list[tuple[Path, str]] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)  # lines of YAML

    def text(self, file: Path, options: Path) -> str:
        """Returns the option file, with ``_base_`` entries relative to the folder of ``file``."""
        folder = file.resolve().parent
        bases = [Path(os.path.relpath(piece.resolve(), folder)).as_posix() for piece, _ in self.pieces]
        schema = Path(os.path.relpath((options / "schema.json").resolve(), folder)).as_posix()
        lines = [
            f"# yaml-language-server: $schema={schema}",
            "_base_:",
            *(f"  - {base}" for base in bases),
            "",
        ]
        return "\n".join([*lines, f"name: {self.name}", *self.settings]) + "\n"


def options_folder() -> Path | None:
    """Returns the folder with the pieces: ``options`` here or in kdsr's checkout; None for an installed package."""
    folders = (Path("options"), Path(__file__).resolve().parents[2] / "options")
    return next((folder for folder in folders if (folder / "_base_/runtime.yml").is_file()), None)


class Pieces:
    """The pieces of an options folder, by kind and name.

    Args:
        options: The folder that has ``_base_``.
    """

    def __init__(self, options: Path) -> None:
        self.folder = options / "_base_"
        self._read: dict[Path, dict[str, Any]] = {}
        self._listed: dict[str, dict[str, Path]] = {}
        self.data: dict[tuple[str, int], Path] = {}
        for name, piece in self._all("data").items():
            if scale := self.read(piece).get("scale"):
                self.data[name.removesuffix(f"_x{scale}"), scale] = piece
        sets = {name for name, _ in self.data}
        self.backbones = self._without_variants("backbones", sets)
        scales = {f"_x{scale}" for _, scale in self.data}
        self.methods = self._without_variants(
            "methods", {b + s for b in self.backbones for s in ("", *scales)}
        )
        self.schedules = self._without_variants("schedules", sets)

    def read(self, piece: Path) -> dict[str, Any]:
        """Returns a piece's options with its ``_base_`` merged; references are not resolved."""
        if piece not in self._read:
            self._read[piece] = read_file(piece)[0]
        return self._read[piece]

    def _all(self, kind: str) -> dict[str, Path]:
        if kind not in self._listed:
            self._listed[kind] = {piece.stem: piece for piece in sorted((self.folder / kind).glob("*.yml"))}
        return self._listed[kind]

    def _without_variants(self, kind: str, others: set[str]) -> dict[str, Path]:
        pieces = self._all(kind)
        variants = {f"{name}_{other}" for name in pieces for other in others}
        return {name: piece for name, piece in pieces.items() if name not in variants}

    def _first(self, kind: str, *names: str) -> Path | None:
        pieces = self._all(kind)
        return next((pieces[name] for name in names if name in pieces), None)

    def choices(self) -> Iterator[Choice]:
        """Yields every valid combination of pieces, with the default schedule."""
        for method in self.methods:
            for backbone in self.backbones:
                for data, scale in self.data:
                    choice = Choice(method, backbone, data, scale)
                    try:
                        self.compose(choice)
                    except OptionError:
                        continue
                    yield choice

    def compose(self, choice: Choice) -> Recipe:
        """Composes the pieces of a choice.

        Raises:
            OptionError: All unknown names, with the nearest ones, and combinations that cannot work.
        """
        problems: list[str] = []
        method = self._find("method", choice.method, self.methods, problems)
        backbone = self._find("backbone", choice.backbone, self.backbones, problems)
        data, scale = self._find_data(choice, problems)
        schedule = self.folder  # set below if not given
        if choice.schedule:
            schedule = self._find("schedule", choice.schedule, self.schedules, problems)
        if problems:
            raise OptionError(problems)
        # FitNet_EDSR.yml and NAFNet_GoPro.yml replace FitNet.yml and NAFNet.yml
        network = str((self.read(backbone).get("network_g") or {}).get("type"))
        if not _is_path(choice.method):
            variant = f"{choice.method}_{choice.backbone}"
            variants = (f"{variant}_x{scale}", variant, f"{choice.method}_{network}")
            method = self._first("methods", *variants) or method
        if not _is_path(choice.backbone):
            backbone = self._first("backbones", f"{choice.backbone}_{choice.data}") or backbone

        train = self.read(method).get("train") or {}
        losses = [key for key, value in train.items() if key.endswith("_opt") and value]
        problems += self._misfits(choice, losses, backbone, data, scale)
        recipe = Recipe(replace(choice, scale=scale).name)
        add = recipe.pieces.append
        add((self.folder / "runtime.yml", "device, seed, precision and log of every run"))
        add((data, f"--data {choice.data}" + (f" --scale {scale}" if scale > 1 else "")))
        if not any(name.startswith("val") for name in self.read(data).get("datasets") or {}):
            add((self.folder / "validation/Set5_Set14.yml", "the data set has no validation set of its own"))
        add((backbone, f"--backbone {choice.backbone}"))
        recipe.pieces += self._features(choice, losses, backbone, network, problems)
        if not choice.schedule:
            schedule = self._usual_schedule(choice, network, data, scale, problems)
        elif self._sets_patches(schedule) == self._sets_patches(data):
            both = "both set" if self._sets_patches(data) else "neither sets"
            problems.append(
                f"--schedule {choice.schedule}: does not fit {choice.data}, {both} gt_size, the size of patches; "
                f"valid: {', '.join(self._fitting_schedules(data))}"
            )
        if not _is_path(choice.schedule or ""):
            schedule = self._first("schedules", f"{schedule.stem}_{choice.data}") or schedule
        add((schedule, f"--schedule {choice.schedule}" if choice.schedule else "the default"))
        add((method, f"--method {choice.method}"))
        if problems:
            raise OptionError(problems)
        training = {**self._train_set(data), **self._train_set(schedule)}
        stages = [training, *(training.get("progressive") or [])]
        batch = min(
            (stage["batch_size_per_gpu"] for stage in stages if "batch_size_per_gpu" in stage), default=16
        )
        if "csd_opt" in losses and batch <= train.get("csd_negatives", 1):
            recipe.settings.append(
                f"train: {{csd_negatives: {batch - 1}}}  # the others of the smallest batch"
            )
        if "rkd_opt" in losses and batch < 3:
            recipe.settings.append("datasets: {train: {batch_size_per_gpu: 3}}  # RKD compares three samples")
        if not self.read(data).get("scale"):
            recipe.settings.append(f"scale: {scale}")
        has_teacher = self.read(method).get("network_t", True) is not None
        if has_teacher and not (self.read(backbone).get("path") or {}).get("pretrain_network_t"):
            file = f"experiments/pretrained_models/{Path(choice.backbone).stem}_{Path(choice.data).stem}.pth"
            recipe.settings += ["path:", f"  pretrain_network_t: {file}"]
        return recipe

    def _find(self, flag: str, name: str, known: Mapping[str, Path], problems: list[str]) -> Path:
        if name in known:
            return known[name]
        if not _is_path(name):
            problems.append(f"--{flag} {name}: no such piece in {self.folder}; {nearest(name, known)}")
        elif not Path(name).is_file():
            problems.append(f"--{flag} {name}: no such file")
        return Path(name)

    def _find_data(self, choice: Choice, problems: list[str]) -> tuple[Path, int]:
        if _is_path(choice.data):
            piece = self._find("data", choice.data, {}, problems)
            return piece, (self.read(piece).get("scale") if piece.is_file() else None) or choice.scale or 1
        scales = [scale for name, scale in self.data if name == choice.data]
        if not scales:
            self._find("data", choice.data, {name: piece for (name, _), piece in self.data.items()}, problems)
        elif choice.scale is None and len(scales) > 1:
            problems.append(f"--scale: missing; {choice.data} has {', '.join(map(str, scales))}")
        elif choice.scale not in (None, *scales):
            problems.append(f"--scale {choice.scale}: {choice.data} has {', '.join(map(str, scales))}")
        else:
            scale = choice.scale or scales[0]
            return self.data[choice.data, scale], scale
        return self.folder, 1

    def _misfits(
        self, choice: Choice, losses: list[str], backbone: Path, data: Path, scale: int
    ) -> Iterator[str]:
        """Yields why method, backbone and data do not fit together."""
        student = self.read(backbone).get("network_g") or {}
        student = {**student, **(student.get("parameters") or {})}
        resizes = "upscale" in student or "scale" in student
        if resizes and scale == 1:
            yield f"--backbone {choice.backbone}: upscales, and the images of {choice.data} keep their size"
        if not resizes and scale > 1 and student.get("type") != "Spandrel":
            yield f"--backbone {choice.backbone}: keeps the size of images, and {choice.data} needs x{scale}"
        if "zoom_out_opt" in losses and scale == 1:
            yield f"--method {choice.method}: zoom_out_opt is for super-resolution"
        has_gt = "dataroot_gt" in self._train_set(data)
        if has_gt and choice.method.endswith("_no_gt"):
            yield f"--method {choice.method}: is for data without ground truth, {choice.data} has ground truth"
        if not has_gt and "pixel_opt" in losses:
            yield f"--method {choice.method}: pixel_opt needs ground truth, {choice.data} has none"

    def _features(
        self, choice: Choice, losses: list[str], backbone: Path, network: str, problems: list[str]
    ) -> list[tuple[Path, str]]:
        """Returns the pieces that list features, for the losses that compare features."""
        found: dict[Path, str] = {}
        for loss in losses:
            option = _FEATURES.get(loss)
            if option is None or option in (self.read(backbone).get("train") or {}):
                continue
            kind = "blocks" if option == "blocks" else "taps"
            name = Path(choice.backbone).stem
            piece = self._first(kind, f"{name}_{choice.method}", name, network)
            if piece is None or option not in self.read(piece)["train"]:
                problems.append(
                    f"--method {choice.method}: {loss} needs train.{option}, which no piece in "
                    f"{self.folder / kind} has for {choice.backbone}; write one, or add it to the backbone's piece "
                    "(docs/new_backbone.md)"
                )
            else:
                found.setdefault(piece, f"the features that {loss} compares")
        return list(found.items())

    def _train_set(self, piece: Path) -> dict[str, Any]:
        return (self.read(piece).get("datasets") or {}).get("train") or {}

    def _sets_patches(self, piece: Path) -> bool:
        return "gt_size" in self._train_set(piece)

    def _fitting_schedules(self, data: Path) -> dict[str, Path]:
        """Returns the schedules that set ``gt_size``, if the data set does not, or else those that do not."""
        wanted = not self._sets_patches(data)
        return {name: piece for name, piece in self.schedules.items() if self._sets_patches(piece) == wanted}

    def _usual_schedule(
        self, choice: Choice, network: str, data: Path, scale: int, problems: list[str]
    ) -> Path:
        """Returns ``demo`` or ``short`` for small data sets, else the method's, the network's or ``SR_*``."""
        fitting = self._fitting_schedules(data)
        short = _SHORT.get(Path(choice.data).stem.partition("_")[0])
        wanted = [f"{short}_{network}", short] if short else []
        starts = [] if short else [choice.method, network, *(["SR"] if scale > 1 else [])]
        wanted += [name for start in starts for name in fitting if name.startswith(f"{start}_")]
        for name in wanted:
            if name in fitting:
                return fitting[name]
        problems.append(
            f"--schedule: {choice.backbone} has no default for {choice.data}; valid: {', '.join(fitting)}"
        )
        return self.folder


def new_command(file: Path) -> str | None:
    """Returns the ``kdsr new`` command that writes a file of this name; None if no combination has this name."""
    options = options_folder()
    choices = Pieces(options).choices() if options else ()
    return next((choice.command(file) for choice in choices if choice.name == file.stem), None)


def _is_path(name: str) -> bool:
    return name.endswith((".yml", ".yaml"))
