"""kdsr show: resolved options with the place that each value comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from kdsr.options.files import load
from kdsr.tools.show import show

ROOT = Path(__file__).resolve().parents[2]


def shown(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(show)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yml").write_text(
        "scale: 4\nnetwork_g:\n  type: EDSR\n  upscale: ${scale}\nval: {suffix: x}\n"
    )
    (tmp_path / "child.yml").write_text(
        "_base_: base.yml\nnetwork_g: {num_feat: 8}\nnetwork_t: ${network_g}\nval: {_replace_: true, val_freq: 1}\n"
    )
    return "child.yml"


def test_each_value_has_its_origin(child: str) -> None:
    lines = shown("-opt", child, "--force_yml", "network_g:type=RCAN", "scale=2").splitlines()
    assert lines == [
        "scale: 2  # --force_yml scale=2",
        "network_g:",
        "  type: RCAN  # --force_yml network_g:type=RCAN",
        "  upscale: 2  # base.yml:4",
        "  num_feat: 8  # child.yml:2",
        "val:",
        "  val_freq: 1  # child.yml:4",
        "network_t:",
        "  type: RCAN  # child.yml:3",
        "  upscale: 2  # child.yml:3",
        "  num_feat: 8  # child.yml:3",
    ]


def test_what_differs(child: str) -> None:
    assert shown("-opt", child, "--diff", "base.yml", "network_t=~").splitlines() == [
        "network_g.num_feat:", "  - not given", "  + 8  # child.yml:2",
        "val.val_freq:", "  - not given", "  + 1  # child.yml:4",
        "val.suffix:", "  - x  # base.yml:5", "  + not given",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["DCKD_SwinIR_x4", "SLKD_NAFNet_Rain13K", "VQGAN_f16"])
def test_what_is_shown_is_what_a_run_reads(name: str) -> None:
    file = str(ROOT / "options/train" / f"{name}.yml")
    assert yaml.safe_load(shown("-opt", file)) == yaml.safe_load(yaml.safe_dump(load(file)))
