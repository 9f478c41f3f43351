"""kdsr list: the README's tables are those of the pieces, the option files and the registries."""

from __future__ import annotations

from pathlib import Path

import pytest
from basicsr.utils.registry import LOSS_REGISTRY
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools.tables import BEGIN, END, METHODS, replaced, tables

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = Path("options")


@pytest.fixture
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_in_the_checkout")
def test_the_readme_has_todays_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replaced(text, tables(OPTIONS), "README.md") == text, "run `make tables`"


@pytest.mark.usefixtures("_in_the_checkout")
def test_the_command_prints_and_writes_them(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["list"])
    assert printed.exit_code == 0 and printed.stdout == tables(OPTIONS)
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert CliRunner().invoke(app, ["list", "--into", str(file)]).exit_code == 0
    assert file.read_text() == f"before\n{BEGIN}\n\n{printed.stdout}\n{END}\nafter\n"


def write(options: Path, name: str, text: str) -> None:
    file = options / "_base_" / f"{name}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_tables_are_made_of_the_pieces(tmp_path: Path) -> None:
    for scale in (2, 3, 4):
        write(
            tmp_path,
            f"data/DIV2K_x{scale}",
            f"scale: {scale}\ndatasets: {{train: {{dataroot_gt: a, gt_size: 48}}}}\n",
        )
    write(tmp_path, "data/DIV2K_LQ_x4", "scale: 4\ndatasets: {train: {gt_size: 48}}\n")
    write(tmp_path, "data/GoPro", "scale: 1\ndatasets: {train: {dataroot_gt: a, gt_size: 48}}\n")
    write(tmp_path, "schedules/SR_250k", "train: {total_iter: 250000}\n")
    write(tmp_path, "schedules/NAFNet_200k", "train: {total_iter: 200000}\n")
    for network in ("EDSR", "RCAN"):
        write(tmp_path, f"backbones/{network}", f"network_g: {{type: {network}, upscale: 4}}\n")
    write(tmp_path, "backbones/NAFNet", "network_g: {type: NAFNet}\n")
    losses = "pixel_opt: {type: L1Loss}, logits_opt: {type: L1Loss}, lcr_opt: ~"
    write(tmp_path, "methods/Logits", f"model_type: KDModel\ntrain: {{{losses}}}\n")
    write(tmp_path, "methods/Logits_no_gt", "_base_: Logits.yml\ntrain: {pixel_opt: ~}\n")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "Logits_EDSR_x3.yml").touch()
    methods, tasks, registered = tables(tmp_path).split("\n\n")
    assert [line.split(" | ")[1:] for line in methods.splitlines()[2:]] == [
        ["`Logits`", METHODS["Logits"][1], "`KDModel`", "`pixel_opt`, `logits_opt` |"],
        ["`Logits_no_gt`", "–", "`KDModel`", "`logits_opt` |"],
    ]
    assert [line.split(" | ")[1:3] for line in tasks.splitlines()[2:]] == [
        ["**EDSR**, RCAN", "NAFNet"],
        ["EDSR (×4), RCAN (×4)", "–"],
    ]
    ours = [name for name, made in LOSS_REGISTRY if made.__module__.startswith("kdsr.")]
    assert ours and all(f"`{name}`" in registered for name in ours)


def test_what_has_no_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no methods found"):
        tables(tmp_path)
    write(tmp_path, "methods/Magic", "model_type: KDModel\n")
    with pytest.raises(OptionError, match=r"Magic.yml: not in METHODS of kdsr/tools/tables.py"):
        tables(tmp_path)
    with pytest.raises(OptionError, match="page.md: markers of the tables are missing"):
        replaced("text", "tables", "page.md")
