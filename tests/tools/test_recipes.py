"""kdsr list --recipes: docs/recipes.md is that of the option files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdsr.options.files import load
from kdsr.tools.recipes import AUTHORS, cells, recipe_table
from kdsr.tools.tables import replaced

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_todays_table() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert replaced(text, recipe_table(ROOT / "options"), "recipes.md") == text, "run `make tables`"


def test_every_recipe_of_authors_is_that_of_a_template() -> None:
    assert [name for name in AUTHORS if not (ROOT / f"options/train/{name}.yml").is_file()] == []


@pytest.mark.parametrize(
    ("change", "column", "cell"),
    [
        ({}, 0, "Adam 0.9, 0.99"),
        ({"optim_g": {"type": "AdamW", "lr": 3e-4, "betas": [0.9, 0.9], "weight_decay": 1e-4}}, 0,
         "AdamW 0.9, 0.9, decay 1e-4"),
        ({}, 1, "250k: 1e-4, ×0.1 at 100k, 200k"),
        ({"scheduler": {"type": "MultiStepLR", "milestones": [250000], "gamma": 0.1}}, 1, "250k: 1e-4"),
        ({"scheduler": {"type": "CosineAnnealingRestartCyclicLR", "periods": [92000, 208000],
                        "eta_mins": [1e-4, 1e-6]}}, 1, "250k: 1e-4, from 92k → 1e-6, cosine"),
        ({}, 2, "16, 192²"),
        ({"clip_grad_norm": 0.01}, 3, "0.999, 0.01"),
        ({"ema_decay": 0, "clip_grad_norm": 0.5}, 3, "none, 0.5"),
        ({"pixel_opt": {"type": "PSNRLoss", "loss_weight": 2}}, 4, "pixel 2 (PSNRLoss), logits 1"),
    ],
)  # fmt: skip
def test_cells_name_what_the_options_set(change: dict[str, Any], column: int, cell: str) -> None:
    options = load(ROOT / "options/train/Logits_EDSR_x4.yml")
    options["train"] |= change
    assert cells(options)[column] == cell


def test_what_no_author_has_is_bold() -> None:
    rows = [row for row in recipe_table(ROOT / "options").splitlines() if row.startswith("| `FAKD_EDSR_x4`")]
    assert len(rows) == 2 and "**" not in rows[0]
    assert (
        "| kdsr | **Adam 0.9, 0.99** | **250k: 1e-4, ×0.1 at 100k, 200k** | 16, 192² | **0.999** | pixel"
        in rows[1]
    )
