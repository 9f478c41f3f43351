"""kdsr new: the command, on a copy of the pieces."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.options import compose
from kdsr.options.files import load
from kdsr.runtime.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]
FAKD = ["--method", "FAKD", "--backbone", "EDSR", "--data", "DIV2K", "--scale", "4"]


@pytest.fixture(autouse=True)
def _copy_of_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "options/_base_", tmp_path / "options/_base_")
    monkeypatch.chdir(tmp_path)


def new(*words: str) -> str:
    done = CliRunner().invoke(app, ["new", *words])
    if done.exception:
        raise done.exception
    return done.stdout


def test_writes_a_file_and_prints_its_pieces() -> None:
    Path("datasets/Set5/GTmod12").mkdir(parents=True)
    printed = new(*FAKD)
    file = Path("options/train/FAKD_EDSR_x4.yml")
    assert load(file) == load(ROOT / file)
    lines = file.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../schema.json" and len(lines) == 11
    pieces = [line.removeprefix("  - ../") for line in lines if line.startswith("  - ")]
    assert re.findall(r"^  options/(_base_/\S+)", printed, flags=re.MULTILINE) == pieces
    absent = re.findall(r"^  (\S+) +(?:datasets|path)\.", printed, flags=re.MULTILINE)
    assert "experiments/pretrained_models/EDSR_Lx4.pth" in absent
    assert "datasets/Set5/LRbicx4" in absent and "datasets/Set5/GTmod12" not in absent
    assert printed.endswith(f"kdsr train -opt {file}\n")


def test_no_file_is_overwritten_without_force(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "mine.yml"
    new(*FAKD, "-o", str(file))
    assert load(file)["name"] == "mine"
    file.write_text("work of days")
    with pytest.raises(OptionError, match="exists; use --force"):
        new(*FAKD, "-o", str(file))
    assert file.read_text() == "work of days"
    new(*FAKD, "-o", str(file), "--force")
    assert load(file)["name"] == "mine"


def test_nothing_is_written_for_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--backbone: missing"):
        new("--method", "FAKD")
    with pytest.raises(OptionError, match=r"--method FAK: .*FAKD"):
        new("--method", "FAK", *FAKD[2:])
    assert not Path("options/train").exists()


def test_lists_what_can_be_combined() -> None:
    everything = new("--list")
    for word in (
        "FAKD",
        "DCKD_release",
        "EDSR16",
        "DIV2K +x2, x3, x4",
        "Restormer_300k +Restormer's schedule",
    ):
        assert re.search(word, everything), word
    slkd = new("--list", "--method", "SLKD")
    assert "Restormer" in slkd and "Rain13K" in slkd and not re.search("EDSR|DIV2K", slkd)
    with pytest.raises(OptionError, match="no combination has these names"):
        new("--list", "--method", "SLKD", "--backbone", "EDSR")


def test_the_message_without_pieces_names_the_place_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages/kdsr/options/compose.py"
    monkeypatch.setattr(compose, "__file__", str(installed))
    monkeypatch.chdir(tmp_path / "options")
    with pytest.raises(OptionError, match=r"options/_base_.* run it in a clone"):
        new(*FAKD)


def test_imports_neither_torch_nor_basicsr() -> None:
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('kdsr'); package.__path__ = [{str(ROOT / 'kdsr')!r}]\n"
        "sys.modules['kdsr'] = package\n"  # the package itself registers networks
        "import kdsr.tools.new\n"
        "assert not {'torch', 'basicsr', 'matplotlib', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
