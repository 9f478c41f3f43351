"""docs/: options.md names every key there is, with its default, and no other; links lead somewhere."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY

from kdsr.archs.vqgan_arch import DDConfig
from kdsr.data.image_folder_dataset import ImageFolderDataset
from kdsr.data.lq_image_dataset import LQImageDataset
from kdsr.models.dckd_model import DCKDModel
from kdsr.models.facd_model import FACDModel
from kdsr.models.kd_model import KDModel
from kdsr.models.mclir_model import MCLIRModel
from kdsr.models.mipkd_model import MiPKDModel
from kdsr.models.slkd_model import SLKDModel
from kdsr.models.vqgan_model import VQGANModel
from kdsr.options import declarations as tables
from kdsr.options.check import ModelKeys
from kdsr.options.files import load
from kdsr.runtime.precision import Precision
from small_runs import run

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODELS = [KDModel, DCKDModel, SLKDModel, FACDModel, MiPKDModel, MCLIRModel, VQGANModel]


def sections(document: Path) -> dict[str, str]:
    """Text below each heading, down to the next one of any level; fenced blocks left out."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> dict[str, str]:
    """Key -> default of the tables that have both columns."""
    found = {}
    for table in re.findall(r"^\| key \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        for row in table.splitlines():
            key, default = (cell.strip() for cell in row.strip("|").split("|")[:2])
            assert re.fullmatch(r"`[^`]+`", key), row
            assert key.strip("`") not in found, f"{key} has two rows"
            found[key.strip("`")] = default
    return found


OPTIONS = {heading: rows(text) for heading, text in sections(ROOT / "docs" / "options.md").items()}


def flat(table: dict[str, Any]) -> set[str]:
    """Keys of an option table, those of a nested one as ``outer.inner``."""
    keys = set()
    for key, kind in table.items():
        keys |= {f"{key}.{inner}" for inner in kind} if isinstance(kind, dict) else {key}
    return keys


def declared() -> dict[str, set[str]]:
    """Section of options.md -> the keys that the option check takes there, from the same tables."""
    models = [ModelKeys(model) for model in MODELS]
    networks = {f"network_{network}" for model in models for network in model.networks}
    path = set()
    for model in models:
        for key in model.path:
            start, _, network = key.rpartition("_")
            path.add(f"{start}_X" if network in model.networks else key)
    return {
        "Top level": set().union(*(model.top for model in models)) | networks,
        "datasets": flat(tables.ANY_DATASET)
        | set().union(*(table for table, *_ in tables.STOCK_DATASETS.values()))
        | set(ImageFolderDataset.OPTION_KEYS | LQImageDataset.OPTION_KEYS),
        "path": path,
        "train": set().union(*(flat(model.train) for model in models)),
        "val": set().union(*(model.val for model in models)),
        "precision": set(Precision.KEYS),
        "logger": flat(tables.LOGGER | tables.OUR_LOGGER),
        "dist_params": set(tables.DIST_PARAMS),
    }


@pytest.mark.parametrize("section", declared())
def test_options_md_has_a_row_for_every_key_and_for_no_other(section: str) -> None:
    assert set(OPTIONS[section]) == declared()[section]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_of_a_model_is_explained(model: type) -> None:
    keys = flat(ModelKeys(model).train)
    assert keys and keys <= set(OPTIONS["train"])


OURS = [
    entry
    for registry in (ARCH_REGISTRY, LOSS_REGISTRY)
    for _, entry in registry
    if entry.__module__.startswith("kdsr.")
]


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.__name__)
def test_networks_and_losses_are_documented_with_their_defaults(entry: type) -> None:
    parameters = dict(inspect.signature(entry).parameters)
    documented = OPTIONS[entry.__name__]
    assert set(documented) == set(parameters)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty:
            assert documented[name] == "–", name
        else:
            default = parameter.default
            expected = list(default) if isinstance(default, tuple) else default
            assert yaml.safe_load(documented[name]) == expected, name


def test_precision_is_documented_with_its_defaults() -> None:
    assert {key: yaml.safe_load(value) for key, value in OPTIONS["precision"].items()} == {
        "amp": None, "channels_last": False, "cudnn_benchmark": False, "deterministic": False,
    }  # fmt: skip


def test_every_key_of_ddconfig_is_named() -> None:
    text = sections(ROOT / "docs" / "options.md")["VQGAN"]
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


def test_the_folder_of_a_run_is_as_experiments_says(
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
