"""Option files: safe YAML, pieces, references, overrides, the command line, the resolved file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdsr.options.command_line import make_parser
from kdsr.options.dump import dump
from kdsr.options.files import load, merge, parse_yaml
from kdsr.options.overrides import split_override
from kdsr.options.parse import parse_options
from kdsr.runtime.errors import OptionError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("!!float 5e3", 5000.0),
        ("1e-4x", "1e-4x"),
        ("'1e-4'", "1e-4"),
        ("~", None),
        ("2024-01-01", "2024-01-01"),  # a name, not a date
        ("[1e-4, x, {a: 1}]", [1e-4, "x", {"a": 1}]),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parse_yaml(text, "here") == value
    assert type(parse_yaml(text, "here")) is type(value)


def test_an_object_tag_is_refused_by_name_and_line_and_never_runs(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    file = write(tmp_path / "a.yml", f"name: x\nscale: !!python/object/apply:os.mkdir ['{victim}']\n")
    with pytest.raises(OptionError, match=r"a\.yml: line 2: tag !!python/object/apply:os\.mkdir is refused"):
        load(file)
    assert not victim.exists()
    with pytest.raises(OptionError, match="override .* line 1: tag .* is refused"):
        load(write(tmp_path / "b.yml", "name: x\n"), [f"name=!!python/object/apply:os.mkdir ['{victim}']"])
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"line 3: key a occurs twice \(first on line 1\)"),
        ("t:\n  lr: 1\n  lr: 2\n", "line 3: key lr occurs twice"),
        ("a: [1, 2\nb: 3\n", "line 2: "),
        ("a: 1\n\tb: 2\n", "line 2: "),
        ("a: 1\n---\nb: 2\n", "line 2: "),
        ("1: x\n", "line 1: option names are text, 1 is not"),
        ("- a\n", "an option file is a mapping of keys to values, this one is a list"),
        ("", "an option file is a mapping of keys to values, this one is empty"),
        ("a: &x [*x]\n", "line 1: found unconstructable recursive node"),
    ],
)
def test_a_malformed_file_names_itself_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=rf"broken\.yml: {message}"):
        load(write(tmp_path / "broken.yml", text))


def test_a_missing_file_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"option file .*none\.yml: No such file"):
        load(tmp_path / "none.yml")


def test_an_anchor_gives_two_sections_that_do_not_share_changes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "x: &shared {lr: 1}\ny: *shared\nz: {<<: *shared, more: 2}\n")
    assert load(file, ["y:lr=5"]) == {"x": {"lr": 1}, "y": {"lr": 5}, "z": {"lr": 1, "more": 2}}


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without end")
def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"/dev/zero .*a\.yml\): has more than 1,000,000 characters"):
        load(write(tmp_path / "a.yml", "_base_: /dev/zero\n"))


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    file = write(tmp_path / "bomb.yml", "\n".join(levels))
    with pytest.raises(OptionError, match="more than 100,000 values"):
        load(file)


# ------------------------------------------------------------------------------------------------ pieces


def test_merge_is_deep_lists_replace_null_switches_off() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "l": [1, 2, 3], "t": {"type": "SwinIR"}, "keep": 0}
    over = {"a": {"y": {"w": 3}}, "l": [4], "t": None}
    assert merge(base, over) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "l": [4], "t": None, "keep": 0}
    assert base["a"] == {"x": 1, "y": {"z": 2}}  # left as it was
    assert merge(base, {"a": {"_replace_": True, "q": {"r": 1}}})["a"] == {"q": {"r": 1}}


def test_pieces_are_found_from_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "options/_base_/deep/inner.yml", "a: 1\nb: 1\nc: 1\n")
    write(tmp_path / "options/_base_/outer.yml", "_base_: deep/inner.yml\nb: 2\nc: 2\n")
    write(tmp_path / "options/_base_/other.yml", "d: 4\nc: 4\n")
    file = write(
        tmp_path / "options/train/t.yml", "_base_: [../_base_/outer.yml, ../_base_/other.yml]\ne: 5\n"
    )
    monkeypatch.chdir("/")
    assert load(file) == {"a": 1, "b": 2, "c": 4, "d": 4, "e": 5}


def test_a_circle_of_pieces_and_a_missing_piece_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "_base_: b.yml\n")
    write(tmp_path / "b.yml", "_base_: [a.yml]\n")
    with pytest.raises(OptionError, match=r"is circular: .*a\.yml -> .*b\.yml -> .*a\.yml"):
        load(tmp_path / "a.yml")
    file = write(tmp_path / "c.yml", "_base_: gone.yml\n")
    with pytest.raises(OptionError, match=r"gone\.yml \(_base_ of .*c\.yml\): No such file"):
        load(file)
    with pytest.raises(OptionError, match=r"_base_ must be a file name or a list of file names, not 3"):
        load(write(tmp_path / "d.yml", "_base_: 3\n"))


def test_references_keep_the_type_and_follow_overrides(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yml",
        "scale: 4\nroot: data/X${scale}\nnet: {up: '${scale}', sizes: [8, '${scale}']}\n"
        "copy: ${net}\npath: ${root}/sub_${net.sizes.0}\n",
    )
    assert load(file, ["scale=3"]) == {
        "scale": 3,
        "root": "data/X3",
        "net": {"up": 3, "sizes": [8, 3]},
        "copy": {"up": 3, "sizes": [8, 3]},
        "path": "data/X3/sub_8",
    }


def test_wrong_references_are_all_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "a: ${b}\nb: ${a}\nc: {d: 'x${scael}'}\ne: 'y${c}'\n")
    with pytest.raises(OptionError) as caught:
        load(file)
    text = str(caught.value)
    assert "a: ${b} refers to itself" in text and "b: ${a} refers to itself" in text
    assert "c.d: ${scael} refers to an option that does not exist" in text
    assert "e: ${c} is not a single value" in text


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yml",
        "train: {lr: 1, milestones: [5, 6], optim: {type: Adam}}\nnet: ~\nsets: [{name: x}]\nflag: false\n"
        "head: {type: EDSR, up: 4}\n",
    )
    options = load(
        file,
        [
            "train:lr=1e-4",
            "train:milestones:0=10",
            "train:optim:betas=[0.9, 0.99]",
            "train:optim:type = AdamW ",
            "net:type=EDSR",
            "sets:0:name=a=b:c",
            "flag=True",
            "new:deep:key={a: 1}",
            "head={_replace_: true, type: RLFN}",
            "off=none",
            "suffix=",
        ],
    )
    assert options == {
        "train": {"lr": 1e-4, "milestones": [10, 6], "optim": {"type": "AdamW", "betas": [0.9, 0.99]}},
        "net": {"type": "EDSR"},
        "sets": [{"name": "a=b:c"}],
        "flag": True,
        "new": {"deep": {"key": {"a": 1}}},
        "head": {"type": "RLFN"},
        "off": None,
        "suffix": "",
    }


@pytest.mark.parametrize(("is_train", "verb"), [(True, "train"), (False, "test")])
def test_help_names_its_command(
    is_train: bool, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/kdsr", verb, "--help"])
    with pytest.raises(SystemExit):
        make_parser(is_train).parse_args(["--help"])
    message = capsys.readouterr().out
    assert (
        message.startswith(f"usage: kdsr {verb} ") and f"{verb.capitalize()}s what an option file" in message
    )


def test_an_override_into_a_referenced_section_changes_a_copy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", "scale: 4\nt: {type: EDSR, up: '${scale}'}\ng: ${t}\nx: ${y}\n")
    options = load(file, ["g:num_feat=8", "scale=2", "x=1"])
    assert options == {
        "scale": 2, "t": {"type": "EDSR", "up": 2}, "g": {"type": "EDSR", "up": 2, "num_feat": 8}, "x": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("scale", "expected key:key=value"),
        ("=3", "expected key:key=value"),
        ("a::b=3", "expected key:key=value"),
        ("l:2=3", "l is a list of 2, '2' is not an index of it"),
        ("l:x=3", "l is a list of 2, 'x' is not an index of it"),
        ("scale:x=3", "scale is a single value"),
        ("a=[1, 2", "override 'a=\\[1, 2': line 1"),
    ],
)
def test_malformed_overrides(tmp_path: Path, entry: str, message: str) -> None:
    file = write(tmp_path / "a.yml", "scale: 4\nl: [1, 2]\n")
    with pytest.raises(OptionError, match=message):
        load(file, [entry])


def test_overrides_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.yml", "scale: 4\n")
    for entry in ("scale=[__import__('os').mkdir('made')]", 'x"];__import__("os").mkdir("made");y["a=1'):
        load(file, [entry])
    assert not (tmp_path / "made").exists()
    assert split_override("a:b=c=d") == (["a", "b"], "c=d")


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def option_file(run_options: dict[str, Any], tmp_path: Path) -> Path:
    return write(tmp_path / "run.yml", yaml.safe_dump(run_options))


def parse(file: Path, *flags: str, is_train: bool = True) -> tuple[dict[str, Any], Any]:
    return parse_options(str(file.parent), is_train, ["-opt", str(file), *flags])


def test_parse_options_gives_what_basicsr_expects(option_file: Path, tmp_path: Path) -> None:
    opt, args = parse(option_file, "--force_yml", "train:total_iter=5e3", "scale=4", "--auto_resume")
    run = str(tmp_path / "experiments" / "run")
    assert opt["path"] == {
        "experiments_root": run,
        "log": run,
        "models": f"{run}/models",
        "training_states": f"{run}/training_states",
        "visualization": f"{run}/visualization",
    }
    assert opt["datasets"]["train"]["phase"] == "train" and opt["datasets"]["val"]["phase"] == "val"
    assert {dataset["scale"] for dataset in opt["datasets"].values()} == {4}
    assert opt["train"]["total_iter"] == 5000 and isinstance(opt["train"]["total_iter"], int)
    assert (opt["is_train"], opt["auto_resume"], opt["dist"]) == (True, True, False)
    assert (opt["rank"], opt["world_size"]) == (0, 1)
    assert args.opt == str(option_file) and args.launcher == "none"
    assert not (tmp_path / "experiments").exists()  # nothing is written


def test_roots_name_the_folder_above_the_run(option_file: Path, tmp_path: Path) -> None:
    opt, _ = parse(option_file, "--force_yml", "path:experiments_root=elsewhere", "path:results_root=r")
    assert opt["path"]["experiments_root"] == str(tmp_path / "elsewhere" / "run")
    assert "results_root" not in opt["path"]
    words = ["--random-weights", "--force_yml", "path:results_root=r", "datasets:train=~"]
    opt, _ = parse(option_file, *words, is_train=False)
    assert opt["path"]["results_root"] == opt["path"]["log"] == str(tmp_path / "r" / "run")
    assert list(opt["datasets"]) == ["val"]  # a set that is null is off


def test_debug_works_as_in_basicsr(option_file: Path) -> None:
    opt, args = parse(option_file, "--debug")
    assert opt["name"] == "debug_run"
    assert opt["val"]["val_freq"] == opt["logger"]["save_checkpoint_freq"] == 8
    assert opt["logger"]["print_freq"] == 1
    assert args.resolved["val"]["val_freq"] == 100  # the name brings debug mode back


def test_local_rank_in_both_spellings_and_from_the_environment(
    option_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse(option_file)[1].local_rank == 0
    assert parse(option_file, "--local_rank", "1")[1].local_rank == 1
    assert parse(option_file, "--local-rank=2")[1].local_rank == 2
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse(option_file)[1].local_rank == 3
    assert parse(option_file, "--local-rank=2")[1].local_rank == 2


def test_the_seed_comes_from_the_overrides_or_is_drawn_once(option_file: Path) -> None:
    opt, _ = parse(option_file, "--force_yml", "manual_seed=11")
    first = torch.rand(3)
    parse(option_file, "--force_yml", "manual_seed=11")
    assert torch.equal(first, torch.rand(3)) and opt["manual_seed"] == 11
    opt, args = parse(option_file, "--force_yml", "manual_seed=null")
    assert opt["manual_seed"] == args.resolved["manual_seed"] > 0
    other, _ = parse(option_file, "--force_yml", "manual_seed=null")
    assert other["manual_seed"] != opt["manual_seed"]  # one in two thousand million says otherwise


def test_num_gpu_of_a_foreign_file_means_what_the_machine_has(
    option_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        option_file.read_text()
        .replace("num_gpu: auto", "num_gpu: 4")
        .replace("ema_decay: 0.9", "ema_decay: 0")
    )
    file = write(option_file.with_name("foreign.yml"), text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    opt, args = parse(file)
    assert opt["num_gpu"] == 0
    assert "num_gpu: 4 was requested, the run uses the CPU" in capsys.readouterr().err
    assert opt["warnings"] == ["num_gpu: 4 was requested, the run uses the CPU"]
    assert args.resolved["num_gpu"] == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opt, _ = parse(file)
    assert opt["num_gpu"] == 1 and "4 was requested, the run uses one GPU" in opt["warnings"][0]
    for requested, used in (("auto", 1), ("1", 1), ("0", 0)):
        opt, _ = parse(file, "--force_yml", f"num_gpu={requested}")
        assert (opt["num_gpu"], opt["warnings"]) == (used, [])


def test_several_gpus_in_our_files_or_by_override_need_a_launcher(option_file: Path) -> None:
    message = r"num_gpu: 2 needs a launcher(.|\n)*torchrun --nproc_per_node=2 kdsr/train\.py -opt .* --launcher pytorch"
    with pytest.raises(OptionError, match=message):
        parse(option_file, "--force_yml", "num_gpu=2")
    ours = write(option_file.with_name("ours.yml"), f"_base_: {option_file.name}\nnum_gpu: 2\n")
    with pytest.raises(OptionError, match=message) as caught:
        parse(ours)
    assert caught.value.exit_code == 2


def test_a_launcher_without_its_environment_is_refused_after_the_cheap_checks(
    option_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match="RANK is not set; start it with torchrun"):
        parse(option_file, "--launcher", "pytorch")
    with pytest.raises(OptionError, match="nmae: unknown key; did you mean name"):
        parse(option_file, "--launcher", "pytorch", "--force_yml", "nmae=x")


def test_the_resolved_file_runs_alone_with_the_same_result(option_file: Path, tmp_path: Path) -> None:
    write(tmp_path / "piece.yml", option_file.read_text())
    composed = write(
        tmp_path / "composed.yml",
        "_base_: piece.yml\nname: '1e5'\nmanual_seed: ~\ntrain: {warmup_iter: 1}\n"
        "datasets: {val: {name: 'x${scale}'}}\n",
    )
    opt, args = parse(composed, "--force_yml", "train:optim_g:lr=2e-5", "path:experiments_root=runs")
    run = tmp_path / "runs" / "1e5"
    run.mkdir(parents=True)
    resolved = run / "composed.yml"
    dump(args.resolved, resolved)
    header = resolved.read_text().split("\n\n")[0]
    assert "# Command: " in header and "# kdsr " in header
    (tmp_path / "piece.yml").unlink()
    again, args_again = parse_options(str(tmp_path), True, ["-opt", str(resolved)])
    assert again == opt
    assert args_again.resolved == args.resolved
    assert again["name"] == "1e5" and again["datasets"]["val"]["name"] == "x4"
    dump(args_again.resolved, resolved)  # onto the file that was run: BasicSR's copy fails here
    assert load(resolved) == args.resolved


def test_the_parsed_options_can_be_dumped_too(option_file: Path, tmp_path: Path) -> None:
    opt, _ = parse(option_file)
    dump(opt, tmp_path / "again.yml")
    again, _ = parse(tmp_path / "again.yml")
    assert again == opt
    assert "training_states" not in (tmp_path / "again.yml").read_text()
