"""docs/: links and files that are named are there. The option reference is tested in tests/options/test_schema.py."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from kdsr.archs.vqgan_arch import DDConfig
from kdsr.options.files import load
from small_runs import run

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def sections(document: Path) -> dict[str, str]:
    """Text below each heading, down to the next one of any level; fenced blocks left out."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_key_of_ddconfig_is_named() -> None:
    text = sections(ROOT / "docs" / "options.md")["Networks"]
    assert [field.name for field in fields(DDConfig) if f"`{field.name}`" not in text] == []


def anchors(document: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections(document)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name) if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert missing == []


MARKDOWN = sorted({*DOCUMENTS, *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")})


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda document: str(document.relative_to(ROOT)))
def test_no_row_is_cut_off_from_its_table(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = ["", *text.splitlines(), ""]
    heads = [
        number
        for number, line in enumerate(lines)
        if line.startswith("|") and not lines[number - 1].startswith("|")
    ]
    assert [lines[number] for number in heads if not re.fullmatch(r"\|[-:| ]+\|", lines[number + 1])] == []


def test_the_folder_of_a_run_is_as_in_experiments_readme(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["train"]["total_iter"] = 1
    assert run(run_options) == 0
    left = {path.name for path in Path("experiments/run").iterdir()}
    named = set(re.findall(r"`([\w.]+)/?`", (ROOT / "experiments" / "README.md").read_text()))
    documented = {name for name in named if name in ("models", "training_states", "metrics.csv")}
    assert len(documented) == 3 and documented <= left
    others = left - documented - {"visualization"}
    assert sorted(re.sub(r"_\d+", "", name) for name in others) == ["run.yml", "train_run.log"]
    assert load("experiments/run/run.yml") == load("run.yml") | {"path": {}}  # resolved, and there once


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths in backticks: of the project itself, not those of data, runs and files that a reader makes."""
    text = document.read_text(encoding="utf-8")
    made_here = set(re.findall(r"^```(?:yaml|python)\n# (\S+)$", text, flags=re.MULTILINE))
    named = set(re.findall(r"`((?:kdsr|options|tests|docs|requirements)/[\w./-]+)`", text))
    assert sorted(name for name in named - made_here if not (ROOT / name).exists()) == []
