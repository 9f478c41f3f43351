"""Option files, overrides and pieces are data: no tag, expression or format in them ever runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdsr import test as test_entry
from kdsr import train as train_entry

Options = dict[str, Any]

# What makes the folder {0} where YAML tags are followed, or text is evaluated.
TAGS = (
    "!!python/object/apply:os.mkdir ['{0}']",
    "!!python/object/apply:os.mkdir {{args: ['{0}']}}",
    "!!python/object/new:os.mkdir ['{0}']",
    "!!python/object/apply:builtins.exec ['import os; os.mkdir(\"{0}\")']",
    "!!python/object/apply:subprocess.check_output [[mkdir, '{0}']]",
    "!!python/object/new:type {{args: [x, [], {{}}], state: {{y: !!python/object/apply:os.mkdir ['{0}']}}}}",
    "[!!python/object/apply:os.mkdir ['{0}']]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{0}']",
    "{{? !!python/object/apply:os.mkdir ['{0}'] : 1}}",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!include /etc/hostname",
)
TEXTS = (
    "__import__('os').mkdir('{0}')",
    "eval(\"__import__('os').mkdir('{0}')\")",
    "[__import__('os').mkdir('{0}')]",
    "${{__import__('os').mkdir('{0}')}}",
    "$(mkdir {0})",
    "`mkdir {0}`",
    "{{0.__class__}}; __import__('os').mkdir('{0}')",
)
KEY = 'name"]; {}; opt["name'  # BasicSR builds a statement of the keys


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a file that must be refused: exit code 2, one clear line, no folder, nothing run."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *flags: str, entry: Any = train_entry) -> str:
        Path("run.yml").write_text(text, encoding="utf-8")
        assert entry.main(["-opt", "run.yml", *flags]) == 2
        error = capsys.readouterr().err
        assert "kdsr: error: " in error and "Traceback" not in error
        assert not Path("ran").exists() and not Path("experiments").exists()
        return error

    return run


def dumped(options: Options) -> str:
    return yaml.safe_dump(options)


@pytest.mark.parametrize("entry", [train_entry, test_entry])
@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_files_pieces_and_overrides(
    run_options: Options, tmp_path: Path, refused: Any, tag: str, entry: Any
) -> None:
    value = tag.format(tmp_path / "ran")
    message = "is refused" if "{?" not in value else "option names are text"
    for at in ("more", "train:\n  optim_g"):
        error = refused(f"name: x\n{at}: {value}\n", entry=entry)
        assert message in error or "is refused" in error
    Path("piece.yml").write_text(f"more: {value}\n")
    assert "piece.yml" in refused(dumped(run_options | {"_base_": "piece.yml"}), entry=entry)
    for key in ("name", "datasets:train:gt_size", "train:optim_g:betas:0"):
        assert "override" in refused(dumped(run_options), "--force_yml", f"{key}={value}", entry=entry)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key", ["datasets:train:gt_size", "train:optim_g:betas", "scale", "network_g:type", "manual_seed"]
)
def test_text_is_text(run_options: Options, tmp_path: Path, refused: Any, text: str, key: str) -> None:
    value = text.format(tmp_path / "ran")
    refused(dumped(run_options), "--force_yml", f"{key}={value}")
    node, *rest = run_options, *key.split(":")
    for part in rest[:-1]:
        node = node[part]
    node[rest[-1]] = value
    refused(dumped(run_options))


@pytest.mark.parametrize("text", TEXTS)
def test_keys_of_overrides_are_text(run_options: Options, tmp_path: Path, refused: Any, text: str) -> None:
    """BasicSR builds a statement of them and runs it."""
    refused(dumped(run_options), "--force_yml", f"{text.format(tmp_path / 'ran')}=1")
    refused(dumped(run_options), "--force_yml", f"{KEY.format(text.format(tmp_path / 'ran'))}=1")


@pytest.mark.parametrize("override", [f"name={TEXTS[2]}", f"{KEY.format(TEXTS[0])}=1"])
def test_basicsr_runs_what_is_refused_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    """The traps are real ones: stock BasicSR's parser makes the folder."""
    from basicsr.utils import options as stock

    monkeypatch.chdir(tmp_path)
    Path("run.yml").write_text("name: x\n")
    trap = override.format("ran")
    monkeypatch.setattr("sys.argv", ["train.py", "-opt", "run.yml", "--force_yml", trap])
    with pytest.raises(Exception):  # noqa: B017  what it stumbles over afterwards is its own affair
        stock.parse_options(str(tmp_path))
    assert Path("ran").is_dir()
