"""The command line: spellings of flags, overrides and option files without a flag."""

from __future__ import annotations

import itertools

import pytest

from kdsr.options.command_line import parse_arguments
from kdsr.runtime.errors import OptionError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("dash", ["_", "-"])
@pytest.mark.parametrize(
    "opt", [["-opt", "a-b_c.yml"], ["--opt", "a-b_c.yml"], ["--opt=a-b_c.yml"], ["a-b_c.yml"]]
)
def test_flags_are_joined_by_either(dash: str, opt: list[str]) -> None:
    flags = [f"--{name}".replace("_", dash) for name in ("auto_resume", "force_resume")]
    args = parse_arguments(True, [*opt, *flags, f"--force{dash}yml", "x:a_b=c-d", f"--local{dash}rank=3"])
    assert (args.opt, args.auto_resume, args.force_resume) == ("a-b_c.yml", True, True)
    assert (args.force_yml, args.local_rank) == (["x:a_b=c-d"], 3)


PARTS = (["-opt", "a.yml"], ["train.total_iter=5"], ["--auto_resume"], ["scale=2", "name=x"])


@pytest.mark.parametrize("order", itertools.permutations(range(len(PARTS))))
def test_overrides_without_a_flag_stand_anywhere(order: tuple[int, ...]) -> None:
    args = parse_arguments(True, [word for index in order for word in PARTS[index]])
    assert args.opt == "a.yml" and args.auto_resume
    assert sorted(args.force_yml) == ["name=x", "scale=2", "train.total_iter=5"]


def test_both_kinds_of_overrides() -> None:
    args = parse_arguments(
        True, ["a=1", "-opt", "x", "--force_yml", "b=2", "c=3", "--debug", "d=4", "--force_yml", "e=5"]
    )
    assert args.force_yml == ["b=2", "c=3", "e=5", "a=1", "d=4"]


def test_a_file_with_an_equals_sign_in_its_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yml").touch()
    args = parse_arguments(False, ["lr=1.yml", "lr=2"])
    assert (args.opt, args.force_yml) == ("lr=1.yml", ["lr=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the option file is missing: -opt FILE"),
        (["a=1"], "the option file is missing"),
        (["-opt", "a.yml", "b.yml"], "neither a flag nor KEY=VALUE: b.yml"),
        (["a.yml", "b.yml", "c=1"], "neither a flag nor KEY=VALUE: b.yml"),
        (["a.yml", "--auto_resum_e"], "unrecognized arguments"),
    ],
)
def test_what_is_no_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(True, words)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "1_0", "9" * 30])
def test_local_rank_of_the_environment_is_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(OptionError) as caught:
        parse_arguments(True, ["a.yml"])
    assert f"LOCAL_RANK is {value!r}, not a whole number from 0 on" in str(caught.value)
    assert parse_arguments(True, ["a.yml", "--local_rank", "2"]).local_rank == 2
