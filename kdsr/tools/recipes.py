"""Creates the table of docs/recipes.md: settings of each template and of its authors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdsr.options.files import load

COLUMNS = ("optimizer", "iterations, learning rate", "batch, GT patch", "EMA, clipping", "weights")
Cells = tuple[str, ...]  # one per column
UNKNOWN = "–"

_ADAM, _OTHER_ADAM = "Adam 0.9, 0.99", "Adam 0.9, 0.999"
_SR = (_ADAM, "250k: 1e-4, ×0.1 at 100k, 200k", "16, 192²")
_FAKD: dict[str, Cells] = {
    "release": (
        _OTHER_ADAM,
        "200k: 1e-4, ×0.5 at 150k",
        "16, 192²",
        "none",
        "pixel 0.5, logits 0.5, fakd 0.0392",
    )
}
_DCKD = "pixel 1, logits 1, cl 0.1, ce 0.001"
_SLKD: dict[str, Cells] = {"paper": (_OTHER_ADAM, "171.4k (100 epochs): cosine", "8, 128²", UNKNOWN,
                   "pixel 1, logits 0.5, kl 0.5, nc 0.1, et 0.1")}  # fmt: skip
_MIPKD: dict[str, Cells] = {"paper": (*[UNKNOWN] * 4, "pixel 1, logits 1, fm 1, bm 0.1")}
_NAFNET = ("AdamW 0.9, 0.9, decay 0.001", "200k: 0.001 → 1e-7, cosine", "32, 256²")
_RESTORMER = "AdamW 0.9, 0.999, decay 1e-4"
_STAGES = "64, 128²; 40, 160²; 32, 192²; 16, 256²; 8, 320²; 8, 384²"

# template -> source -> settings in the format of ``cells``; loss weights for images in [0, 1]
AUTHORS: dict[str, dict[str, Cells]] = {
    "DCKD_SwinIR_x4": {"paper": (*_SR, UNKNOWN, _DCKD)},
    "DCKD_RCAN_x4": {"paper": (*_SR, UNKNOWN, _DCKD)},
    "DCKD_SwinIR_x4_release": {
        "release": (_ADAM, "250k: 1e-4", "64, 192²", "0.999", "pixel 1, logits 1, lcr 1, noisy 0.5, cl 0.1, ce 0.001")
    },
    "DCKD_NAFNet_GoPro": {
        "paper": (*_NAFNET, UNKNOWN, _DCKD),
        "NAFNet": (*_NAFNET, "none, 0.01", "pixel 1 (PSNRLoss)"),
    },
    "DCKD_Restormer_Rain13K": {
        "paper": (_RESTORMER, "300k: 3e-4 → 1e-6, cosine", _STAGES, UNKNOWN, _DCKD),
        "Restormer": (_RESTORMER, "300k: 3e-4, from 92k → 1e-6, cosine", _STAGES, "none, 0.01", "pixel 1"),
    },
    "SLKD_Restormer_Rain13K": _SLKD,
    "DUKD_EDSR_x4": {
        "release": (*_SR, "0.999", "pixel 5, logits 1, zoom_in 1, noisy 0.3, zoom_out 1, zoom_out_gt 5")
    },
    "DUKD_RCAN_x4": {"release": (*_SR, "0.999", "pixel 1, logits 1, zoom_in 1, noisy 0")},
    "DUKD_SwinIR_x4": {"release": (*_SR, "0.999", "pixel 5, logits 1, zoom_in 1, noisy 0.3")},
    "FAKD_EDSR_x4": _FAKD,
    "FAKD_RCAN_x4": _FAKD,
    "CSD_EDSR_x4": {
        "release": (_OTHER_ADAM, "400k: 1e-4, ×0.1 at 200k", "16, 192²", "none", "pixel 1, csd 0.784")
    },
    "MiPKD_EDSR_x4": _MIPKD,
    "MiPKD_RCAN_x4": _MIPKD,
    "MiPKD_SwinIR_x4": _MIPKD,
}  # fmt: skip
_NO_RECIPES = ("VQGAN_", "demo_", "short_", "teacher_")


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def _rate(train: dict[str, Any]) -> str:
    rate, scheduler = _number(train["optim_g"]["lr"]), train["scheduler"]
    total = train["total_iter"]
    match scheduler["type"]:
        case "MultiStepLR":
            steps = [_number(step) for step in scheduler["milestones"] if step < total]
            course = rate + (f", ×{scheduler['gamma']:g} at {', '.join(steps)}" if steps else "")
        case "CosineAnnealingRestartCyclicLR":
            first, lowest = scheduler["periods"][0], scheduler["eta_mins"][-1]
            course = f"{rate}, from {_number(first)} → {_number(lowest)}, cosine"
        case _:
            course = f"{rate} → {_number(scheduler['eta_min'])}, cosine"
    return f"{_number(total)}: {course}"


def cells(options: dict[str, Any]) -> Cells:
    """Returns one cell per column for the resolved options of a template."""
    train, data = options["train"], options["datasets"]["train"]
    optim = train["optim_g"]
    decay = f", decay {_number(optim['weight_decay'])}" if optim.get("weight_decay") else ""
    optimizer = f"{optim['type']} {', '.join(f'{beta:g}' for beta in optim['betas'])}{decay}"
    stages = [data]
    for stage in data.get("progressive") or []:
        stages.append({**stages[-1], **stage})
    batch = "; ".join(f"{stage['batch_size_per_gpu']}, {stage['gt_size']}²" for stage in stages)
    steadied = [_number(value) for value in (train.get("ema_decay"), train.get("clip_grad_norm")) if value]
    steadied = steadied if train.get("ema_decay") else ["none", *steadied]
    return optimizer, _rate(train), batch, ", ".join(steadied), ", ".join(_weights(train))


def _weights(train: dict[str, Any]) -> Iterator[str]:
    for key, value in train.items():
        if key.endswith("_opt") and value:
            kind = f" ({value['type']})" if key == "pixel_opt" and value["type"] != "L1Loss" else ""
            yield f"{key.removesuffix('_opt')} {_number(value['loss_weight'])}{kind}"
        elif key == "noisy":
            yield f"noisy {_number(value['prob'])}"
        elif key == "zoom_out_gt_weight" and train.get("zoom_out_opt"):
            yield f"zoom_out_gt {_number(value)}"


def recipe_table(options: Path) -> str:
    """Returns a Markdown table of the templates in ``options/train``: rows of the authors, then that of kdsr.

    A cell of kdsr's row is bold if no row of the authors has this value.
    """
    lines = [f"| template | source | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for file in sorted((options / "train").glob("*.yml")):
        if file.stem.startswith(_NO_RECIPES):
            continue
        theirs = AUTHORS.get(file.stem, {})
        lines += [f"| `{file.stem}` | {source} | {' | '.join(known)} |" for source, known in theirs.items()]
        ours = [
            f"**{cell}**" if theirs and all(cell != known[column] for known in theirs.values()) else cell
            for column, cell in enumerate(cells(load(file)))
        ]
        lines.append(f"| `{file.stem}` | kdsr | {' | '.join(ours)} |")
    return "\n".join(lines) + "\n"
