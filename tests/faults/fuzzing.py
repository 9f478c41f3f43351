"""Runs with mutated option files, checkpoints and states, and the judgement of what came of them."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import chdir, getcwd
from pathlib import Path
from typing import Any

import torch
import yaml

from faults import lives
from faults.mutations import MARKER, ODD_VALUES, dump, mutate_checkpoint, mutate_text, mutate_tree
from kdsr.options.files import load
from test_templates import reductions, write_weights

OPTIONS = Path(__file__).resolve().parents[2] / "options"
TEMPLATES = ("DCKD_EDSR_x4", "DCKD_SwinIR_x4", "DCKD_RCAN_x4", "DCKD_RLFN_x4", "VQGAN_f16_small", "VQGAN_f16",
             "DCKD_SwinIR_x4_release", "teacher_EDSR_x4")  # fmt: skip
FILES_OF = ("DCKD_EDSR_x4", "DCKD_RCAN_x4")  # small files, with all that a state can hold
SECONDS = 60  # after which a run that trains is fine, and one that does not is stuck
MEMORY = 8 << 30  # bytes of address space, so that what is tried here cannot take the machine down


@dataclass
class Base:
    """A template at reduced sizes that trains one step."""

    template: Path
    overrides: list[str]
    options: dict[str, Any]
    trained: Path | None = None  # folder with a run of it that has a state


@dataclass
class Case:
    """A run to try: its folder, its command line, and what was done to it."""

    folder: Path
    argv: list[str]
    message: str
    before: set[Path] = field(default_factory=set)


@dataclass
class Result:
    code: int | None  # None: still training when its time was over
    text: str
    trained: bool
    seconds: float


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = getcwd()
    chdir(folder)
    try:
        yield
    finally:
        chdir(before)


def make_bases(root: Path, photos: Path, templates: tuple[str, ...] = TEMPLATES) -> list[Base]:
    """Reduced templates with their weights in ``root``."""
    bases = []
    for name in templates:
        template = OPTIONS / f"train/{name}.yml"
        if not template.exists():
            continue
        weights = root / name
        weights.mkdir(parents=True)
        overrides = [*reductions(load(template), photos, weights), "train:total_iter=1"]
        options = load(template, overrides)
        torch.manual_seed(0)
        write_weights(options)
        bases.append(Base(template, overrides, options))
    return bases


def with_a_state(base: Base) -> Path:
    """A folder with a finished run of a base: one state, from which a second iteration goes on."""
    if base.trained is None:
        folder = base.template.parent / "none"
        for key, value in base.options["path"].items():
            if key.startswith("pretrain_network_") and value:
                folder = Path(value).parent
        if folder.name == "none":
            raise ValueError(f"{base.template.name} names no weights to lie beside")
        folder = folder / "trained"
        folder.mkdir()
        options = {**base.options, "logger": {**base.options["logger"], "save_checkpoint_freq": 1}}
        (folder / "run.yml").write_text(dump(options), encoding="utf-8")
        assert lives.train(folder, ["-opt", "run.yml"]) == 0
        (folder / "life.log").unlink()
        options["train"] = {**options["train"], "total_iter": 2}
        (folder / "run.yml").write_text(dump(options), encoding="utf-8")
        base.trained = folder
    return base.trained


# ---------------------------------------------------------------------------------------------------------- cases


def mutated_options(bases: list[Base], folder: Path, rng: random.Random) -> Case:
    """A written-out option file with one to three odd values, names or places, or with an odd line."""
    base = rng.choice(bases)
    folder.mkdir(parents=True)
    if rng.random() < 0.65:
        content = dump(mutate_tree(base.options, rng)).encode()
    else:
        content = mutate_text(dump(base.options), rng)
    (folder / "run.yml").write_bytes(content)
    argv = ["-opt", "run.yml"]
    if rng.random() < 0.1:
        keys = rng.choice(
            ["train:optim_g:lr", "network_g", "datasets:train", "val:metrics:psnr:crop_border", "a:0:b"]
        )
        value = rng.choice(ODD_VALUES)
        argv += [
            "--force_yml",
            f"{keys}={yaml.safe_dump(value).strip().removesuffix('...').strip()}".replace("\0", ""),
        ]
    original = dump(base.options).encode().splitlines()
    changed = [line.decode(errors="replace")[:200] for line in content.splitlines() if line not in original]
    return Case(folder, argv, f"{base.template.stem}: {changed[:8]} {argv[2:]}")


def mutated_pieces(bases: list[Base], folder: Path, rng: random.Random) -> Case:
    """A template with its pieces, one of which has an odd line."""
    base = rng.choice(bases)
    shutil.copytree(OPTIONS, folder / "options")
    template = folder / "options/train" / base.template.name
    pieces = [template]
    for piece in (
        yaml.safe_load(template.read_text())["_base_"] if "_base_:\n" in template.read_text() else []
    ):
        pieces.append((template.parent / piece).resolve())
    piece = rng.choice(pieces)
    original = piece.read_text()
    if rng.random() < 0.3:
        tree = yaml.safe_load(original)
        content = dump(mutate_tree(tree, rng)).encode()
    else:
        content = mutate_text(original, rng)
    piece.write_bytes(content)
    argv = ["-opt", str(template.relative_to(folder)), "--force_yml", *base.overrides]
    changed = [
        line.decode(errors="replace")[:200]
        for line in content.splitlines()
        if line.decode(errors="replace") not in original
    ]
    return Case(folder, argv, f"{base.template.stem}, {piece.name}: {changed[:8]}")


def mutated_files(bases: list[Base], folder: Path, rng: random.Random) -> Case:
    """Options that are right, and a teacher, an extractor, a start or a state that is not."""
    base = rng.choice([base for base in bases if base.template.stem in FILES_OF])
    folder.mkdir(parents=True)
    options = yaml.safe_load(dump(base.options))
    argv = ["-opt", "run.yml"]
    if rng.random() < 0.5:
        trained = with_a_state(base)
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        options = yaml.safe_load((folder / "run.yml").read_text())
        (file,) = folder.glob("experiments/*/training_states/1.state")
        content = file.read_bytes()
        if rng.random() < 0.7:
            argv.append("--auto_resume")
        else:
            options["path"]["resume_state"] = str(file)
    else:
        keys = [
            key for key, value in options["path"].items() if key.startswith("pretrain_network_") and value
        ]
        key = rng.choice(keys)
        content = Path(options["path"][key]).read_bytes()
        if rng.random() < 0.2:
            key = "init_from"
        file = folder / "weights.pth"
        options["path"][key] = str(file)
        if rng.random() < 0.3 and key != "init_from":
            options["path"][key.replace("pretrain_network", "param_key")] = rng.choice(
                ["auto", None, "params", "x"]
            )
        if rng.random() < 0.3 and key != "init_from":
            options["path"][key.replace("pretrain_network", "strict_load")] = rng.choice([True, False])
    changed = mutate_checkpoint(content, rng)
    file.write_bytes(changed)
    (folder / "run.yml").write_text(dump(options), encoding="utf-8")
    return Case(
        folder, argv, f"{base.template.stem}, {file.name}: {len(content)} -> {len(changed)} bytes {argv[2:]}"
    )


CASES = {"options": mutated_options, "pieces": mutated_pieces, "files": mutated_files}


def run(case: Case) -> Result:
    """Tries a case in a process of its own."""
    case.before = set(case.folder.rglob("*"))
    life = lives.Life(case.folder, case.argv, MEMORY)
    trains = life.wait_until(lambda life: life.iteration > 3 or life.age > SECONDS, SECONDS + 10)
    while life.age < SECONDS and life.process.is_alive() and not trains:
        time.sleep(0.01)
    code = None
    if life.process.is_alive():
        life.kill()
    else:
        code = life.finish()
    return Result(code, life.log.read_text(errors="replace"), life.iteration > 0, life.age)


def judge(case: Case, result: Result) -> str | None:
    """What is wrong about a result; None where all is well: an explained error, or a run that trains."""
    if list(case.folder.rglob(MARKER)):
        return "CODE WAS EXECUTED"
    if "Traceback" in result.text:
        return "traceback"
    if result.code is None:
        return None if result.trained else f"stuck for {SECONDS} s"
    if result.code not in (0, 1, 2):
        return f"ended with {result.code}"
    message = [line for line in result.text.splitlines() if line.startswith("kdsr: error: ")]
    if result.code and not message:
        return "no word of explanation"
    if any(len(line) > 3000 for line in message):
        return "a message without end"
    written = {path for path in case.folder.rglob("*")} - case.before - {case.folder / "life.log"}
    if result.code == 2 and written:
        return f"refused, but wrote {sorted(str(path.relative_to(case.folder)) for path in written)[:5]}"
    return None
