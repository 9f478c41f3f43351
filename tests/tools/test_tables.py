"""kdsr list: the README's tables are those of the option files and the registries."""

from __future__ import annotations

from pathlib import Path

import pytest
from basicsr.utils.registry import LOSS_REGISTRY
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools.tables import BEGIN, END, read_templates, replaced, tables

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path("options/train")


@pytest.fixture
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_in_the_checkout")
def test_the_readme_has_todays_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replaced(text, tables(TEMPLATES), "README.md") == text, "run `make tables`"


@pytest.mark.usefixtures("_in_the_checkout")
def test_the_command_prints_and_writes_them(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["list"])
    assert printed.exit_code == 0 and printed.stdout == tables(TEMPLATES)
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert CliRunner().invoke(app, ["list", "--into", str(file)]).exit_code == 0
    assert file.read_text() == f"before\n{BEGIN}\n\n{printed.stdout}\n{END}\nafter\n"


def write(folder: Path, name: str, **changes: str) -> None:
    options = {
        "network": "EDSR",
        "scale": "4",
        "set": "DIV2K",
        "losses": "pixel_opt: {type: L1Loss}",
    } | changes
    (folder / f"{name}.yml").write_text(
        f"model_type: KDModel\nscale: {options['scale']}\ndatasets: {{train: {{name: {options['set']}}}}}\n"
        f"network_g: {{type: {options['network']}}}\ntrain: {{{options['losses']}}}\n"
    )


def test_the_tables_are_made_of_the_files(tmp_path: Path) -> None:
    for scale in (2, 4):
        write(tmp_path, f"Scratch_EDSR_x{scale}", scale=str(scale))
        write(tmp_path, f"Scratch_RCAN_x{scale}", scale=str(scale), network="RCAN")
    write(tmp_path, "Scratch_RLFN_x4", network="RLFN")
    write(tmp_path, "Scratch_NAFNet_GoPro", network="NAFNet", scale="1", set="GoPro")
    write(tmp_path, "Logits_NAFNet_GoPro", network="NAFNet", scale="1", set="GoPro",
          losses="pixel_opt: {type: L1Loss}, logits_opt: {type: L1Loss}, lcr_opt: ~")  # fmt: skip
    write(tmp_path, "short_Scratch_EDSR_x4")
    methods, tasks, registered = tables(tmp_path).split("\n\n")
    assert methods.splitlines()[0] == "| method | paper | `model_type` | losses in `train` | templates |"
    assert [line.split(" | ")[0] for line in methods.splitlines()[2:]] == [
        "| Logits KD",
        "| Scratch (no teacher)",
    ]
    assert "| `KDModel` | `pixel_opt`, `logits_opt` |" in methods
    assert tasks.splitlines() == [
        "| backbones | super-resolution (DIV2K) | motion deblurring (GoPro) |",
        "|---|---|---|",
        "| Logits KD | – | NAFNet |",
        "| Scratch (no teacher) | EDSR, RCAN (×2, ×4); RLFN (×4) | NAFNet |",
    ]
    ours = [name for name, made in LOSS_REGISTRY if made.__module__.startswith("kdsr.")]
    assert ours and all(f"`{name}`" in registered for name in ours)


def test_what_has_no_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there are no option files of methods"):
        read_templates(tmp_path)
    write(tmp_path, "Magic_EDSR_x4")
    write(tmp_path, "Logits_EDSR_x4_twice")
    write(tmp_path, "Logits_EDSR_fog", scale="1", set="Fog")
    with pytest.raises(OptionError) as caught:
        read_templates(tmp_path)
    assert [problem.split(": ")[1].split(" is no ")[0] for problem in caught.value.problems] == [
        "Fog", "Logits, twice", "Magic",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="page.md: has no place for the tables"):
        replaced("text", "tables", "page.md")
