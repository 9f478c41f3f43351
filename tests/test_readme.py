"""Every command of the README and of the other documents runs: as written, with small networks and images.

What is added to a command is a ``--force_yml`` that makes networks, patches and the number of steps small. The
checkpoints that it names hold random weights; the data it names are a few photographs in the same layout. A command
that is neither run here nor one of ``EXCEPTED`` fails.
"""

from __future__ import annotations

import csv
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY

from kdsr import cli
from kdsr.distill.term import TERM_REGISTRY
from kdsr.options.files import load
from kdsr.options.user_modules import import_user_modules
from kdsr.tools.demo_tasks import TASKS
from small_networks import SMALL

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
EXCEPTED = {
    r"make test\b": "the test command itself",
    r"python3\.11 -m venv \.venv && \. \.venv/bin/activate": "installation",
    r"pip install ": "installation",
    r"(srun|sbatch) ": "needs a cluster (tests/cluster)",
    r"torchrun --nnodes": "needs several machines (tests/runtime/test_distributed.py)",
}
SLOW = r"torchrun |make demo|kdsr demo|kdsr bench tiles|kdsr bench scale"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and text, and where it begins."""

    document: Path
    line: int
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(document, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in found]


ALL = [block for document in DOCUMENTS for block in blocks(document)]


def commands() -> dict[str, tuple[Block, str]]:
    """Command -> the block that it stands in first, and the output that is shown right below that block."""
    found: dict[str, tuple[Block, str]] = {}
    for block, below in zip(ALL, [*ALL[1:], None], strict=True):
        if block.language not in ("sh", "bash"):
            continue
        end = block.line + block.text.count("\n")
        shown = (
            below and below.language == "text" and below.document == block.document and below.line < end + 4
        )
        for line in block.text.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+# .*", "", line).strip()
            if command and not command.startswith("#"):
                found.setdefault(command, (block, below.text if below and shown else ""))
    return found


COMMANDS = commands()


def excepted(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in EXCEPTED)


# ---------------------------------------------------------------------------------------------------- a place to run


@pytest.fixture
def workspace(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with data and with the files that the documents tell a reader to write; not installed."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("Makefile", "setup.py", "requirements"):
        (root / name).symlink_to(ROOT / name)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("kdsr", "options"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for block in ALL:
        written = re.match(r"# (\S+\.(?:yml|py))\n", block.text)
        if block.language in ("yaml", "python") and written and not (ROOT / written[1]).exists():
            (root / written[1]).parent.mkdir(parents=True, exist_ok=True)
            (root / written[1]).write_text(block.text, encoding="utf-8")
    data = root / "datasets"
    for name, link in {"DIV2K/DIV2K_train_HR_sub": "GT", "my_photos": "LR_x4", "my_images": "GT"}.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).symlink_to(photos / link)
    for name in ("T91BSDS500", "T91BSDS"):
        (data / name).symlink_to(photos)
    for scale in (2, 3, 4):
        folder = data / f"DIV2K/DIV2K_train_LR_bicubic/X{scale}_sub"
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(photos / f"LR_x{scale}")
    for name in ("Set5", "Set14", "BSD100", "Urban100"):
        (data / name).mkdir()
        for folder, link in {"GTmod12": "GT", "GT": "GT", "LR_x4": "LR_x4"}.items():
            (data / name / folder).symlink_to(photos / link)
        for scale in (2, 3, 4):
            (data / name / f"LRbicx{scale}").symlink_to(photos / f"LR_x{scale}")
    pairs = [f"Rain13K/{part}" for part in ("train", "test/Test100", "test/Rain100L")]
    for folder in (*pairs, "T91BSDS_rain", "DDN_rain"):
        (data / folder).mkdir(parents=True)
        for name in ("GT", "rain") if folder == "DDN_rain" else ("target", "input"):
            (data / folder / name).symlink_to(photos / "GT")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return root


def reductions(options: dict[str, Any]) -> Iterator[str]:
    """Overrides that make a run small. Whatever a command is about stays as it is written."""
    for key, network in options.items():
        if key.startswith("network_") and isinstance(network, dict):
            yield from (f"{key}:{name}={value}" for name, value in SMALL[network["type"]].items())
    train = options["datasets"].get("train")
    if train:
        yield f"datasets:train:gt_size={48 if options.get('scale') == 3 else 32}"
        batch = 2 if options["model_type"] == "FACDModel" else 1  # it contrasts the samples of a batch
        entries = ("num_worker_per_gpu=0", f"batch_size_per_gpu={batch}", "progressive=null")
        yield from (f"datasets:train:{entry}" for entry in entries)
        if options["train"].get("taps"):  # reduced networks have one block
            yield "train:taps=[{student: body.0, teacher: body.0}]"
        yield from ("datasets:train:io_backend:type=disk", "train:total_iter=2", "logger:use_tb_logger=false")
        yield from (f"datasets:{name}=null" for name in options["datasets"] if name == "val_2")
        if train.get("dataroot_gt", "").endswith(".lmdb"):
            yield from (f"datasets:train:{key}={train[key][:-5]}" for key in ("dataroot_gt", "dataroot_lq"))


def option_words(words: list[str]) -> tuple[str, list[str]]:
    """The option file of a command and the overrides in it."""
    overrides = [word for word in words if re.match(r"[\w:.]+=", word)]
    return words[words.index("-opt") + 1], overrides


def write_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for key, file in (options.get("path") or {}).items():
        if key.startswith("pretrain_network_") and file and not Path(file).exists():
            state = build_network(options[key.removeprefix("pretrain_")]).state_dict()
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"params": state, "state_dict": state}, file)


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs ``python FILE ...`` or ``kdsr ...`` in this process, where everything is imported already."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", words[1:] if words[0] == "python" else words)
        with pytest.raises(SystemExit) as exit_info:
            if words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
            else:
                cli.main()
    code = exit_info.value.code
    return code if isinstance(code, int) else int(code is not None)


@pytest.fixture
def registered(workspace: Path) -> Iterator[None]:
    """Networks, losses and terms that the documents tell a reader to add, known in this process while a test runs."""
    registries = (ARCH_REGISTRY, LOSS_REGISTRY, TERM_REGISTRY)
    before = [dict(registry._obj_map) for registry in registries]
    for file in (workspace / "kdsr" / "archs").glob("*_arch.py"):
        if not (ROOT / "kdsr" / "archs" / file.name).exists():
            runpy.run_path(str(file))
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._obj_map.clear()
        registry._obj_map.update(entries)
    for name in (
        "my_archs",
        "my_methods",
        "my_state",
    ):  # docs/new_backbone.md and new_method.md have them imported
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------- the commands


def quick(command: str) -> bool:
    return not re.match(SLOW, command)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=command, marks=() if quick(command) else pytest.mark.slow)
        for command in COMMANDS
        if not excepted(command)
    ],
)
@pytest.mark.usefixtures("registered")
def test_command(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    shown = COMMANDS[command][1]
    if re.match(r"kdsr test experiments/", command):
        check_test_of_run(words, monkeypatch, capfd)
    elif re.match(r"(python kdsr/(train|test)\.py|kdsr (train|test)) ", command):
        check_run(words, shown, monkeypatch, capfd)
    elif command.startswith("kdsr data "):
        check_data(words, workspace, monkeypatch)
    elif command.startswith("kdsr new "):
        check_new(words, monkeypatch, capfd)
    elif re.match(r"kdsr (infer|evaluate) ", command):
        check_deployed(words, monkeypatch, capfd)
    elif command.startswith("kdsr bench step "):
        file, overrides = option_words(words)
        small = [f"--force_yml={entry}" for entry in reductions(load(file, overrides))]
        once = ["--threads", "1", "--repeat", "1", "--pairs", "1", "--warmup", "0"]
        assert call([*words, *once, *small], monkeypatch) == 0
        row = "second ÷ first" if "--vs" in words else "feature losses" if "SLKD" in file else "VQGAN"
        assert row in capfd.readouterr().out
    elif command.startswith("kdsr bench scale "):
        file, overrides = option_words(words)
        small = [f"--force_yml={entry}" for entry in reductions(load(file, overrides))]
        assert call([*words, "--threads", "1", "--repeat", "1", "--warmup", "0", *small], monkeypatch) == 0
        shown = capfd.readouterr().out
        settings = 1 + sum(word.count("|") + 1 for word in words if "|" in word)
        assert len(re.findall(r"^\| (as given|[\w:]+=)", shown, flags=re.MULTILINE)) == settings
        assert ("2 processes, DDP" in shown) == ("--processes" in words)
    elif "kdsr bench start " in command:
        assert words[-2:] == [
            "--python",
            "OTHER/.venv/bin/python",
        ]  # another installation, which there is not
        file, overrides = option_words(words)
        small = [f"--force_yml={entry}" for entry in reductions(load(file, overrides))]
        assert call([*words[1:-2], "--repeat", "1", *small], monkeypatch) == 0
        assert re.search(r"CPU s: median \d", capfd.readouterr().out)
    elif command.startswith("kdsr show "):
        assert call(words, monkeypatch) == 0
        assert ".yml:" in capfd.readouterr().out
    elif command.startswith(("kdsr export ", "kdsr profile ")):
        check_deployment(words, monkeypatch, capfd)
    elif command.startswith("kdsr fetch "):  # nothing is downloaded
        assert call([*words, *([] if "--list" in words else ["--dry-run"])], monkeypatch) == 0
        assert "-> experiments/pretrained_models/" in capfd.readouterr().out
    elif command.startswith("kdsr bench data "):
        assert call([*words, "--repeat", "1", "--seconds", "0"], monkeypatch) == 0
        assert re.search(r"\| kdsr, cache: ram +\| +[\d,]+ \|", capfd.readouterr().out)
    elif command.startswith("kdsr bench tiles "):
        assert (
            call([*words, "--size", "48x40", "--tile", "16", "--overlap", "8", "--threads", "1"], monkeypatch)
            == 0
        )
        assert re.search(r"\| whole image +\| +1 \| +48×40 \|", capfd.readouterr().out)
    elif command.startswith("kdsr bench validation "):
        assert call([*words, "--threads", "1", "--repeat", "1"], monkeypatch) == 0
        assert "kdsr ÷ BasicSR" in capfd.readouterr().out
    elif command.startswith("kdsr distill "):
        check_distill(words, monkeypatch, capfd)
    elif command.startswith("torchrun "):
        file, overrides = option_words(words)
        small = list(reductions(load(file, overrides)))
        write_weights(load(file, [*overrides, *small]))
        in_shell(f"{command} --force_yml {shlex.join(small)}", OMP_NUM_THREADS="1")
        assert (workspace / "experiments" / load(file)["name"] / "models" / "net_g_latest.pth").exists()
    elif command.startswith(("make demo", "kdsr demo")):
        check_demo(command, workspace)
    else:
        pytest.fail(f"no test runs this command: {command}")


def make_sample_of(photos: Path) -> None:
    """The layout of ``kdsr data sample`` and of the rain on it, which a reader of these commands has from the demos."""
    for part in ("train", "val"):
        for folder, lq, source in (("sample", "LR_x4", "LR_x4"), ("sample_rain", "LQ", "GT")):
            images = Path("datasets", folder, part)
            images.mkdir(parents=True)
            (images / "GT").symlink_to(photos / "GT")
            (images / lq).symlink_to(photos / source)


def check_run(
    words: list[str], shown: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A training or a test; one below which an error is shown must end with that error."""
    file, overrides = option_words(words)
    if "demo_" in file:
        make_sample_of(Path("datasets/my_images").resolve().parent)
    wrong = "kdsr: error" in shown
    options = load(file, [] if wrong else overrides)
    small = list(reductions(options))
    options = load(file, small if wrong else [*overrides, *small])
    before = [word for word in words if word != "--auto_resume" and not word.startswith("path:resume_state=")]
    is_train = "train" in options
    import_user_modules(options, file, [])
    resumed = before != words
    if resumed:
        options["path"].pop("resume_state", None)
    write_weights(options)
    run = Path("experiments" if is_train else "results") / options["name"]
    if resumed:
        before = [word for word in before if word != "--force_yml"]
        saved = ["--force_yml", *small, "train:total_iter=1", "logger:save_checkpoint_freq=1"]
        assert call([*before, *saved], monkeypatch) == 0
        shutil.copy(run / "training_states" / "1.state", run / "training_states" / "5000.state")
    code = call([*words, "--force_yml", *small], monkeypatch)
    captured = capfd.readouterr()
    if wrong:
        assert code == 2
        assert [line for line in shown.splitlines() if line not in captured.err.splitlines()] == []
        assert not run.exists()
        return
    assert code == 0, captured.err
    log = max(run.glob("*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()
    assert ("Resuming training from epoch: 0, iter: 1." in log) == resumed
    if is_train:
        assert (run / "models" / "net_g_latest.pth").exists()
    else:
        assert list((run / "visualization").rglob("*.png"))


def check_test_of_run(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A test of a run's folder, after that run."""
    name = Path(words[2]).name
    file = f"options/train/{name}.yml"
    small = [*reductions(load(file)), "logger:save_checkpoint_freq=1"]
    write_weights(load(file, small))
    assert call(["kdsr", "train", "-opt", file, "--force_yml", *small], monkeypatch) == 0
    assert call(words, monkeypatch) == 0, capfd.readouterr().err
    assert (Path("results") / name / "metrics.csv").exists()


def check_deployed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Inference and evaluation with small networks, which their files describe."""
    network = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, **SMALL["EDSR"], "upscale": 4}
    for file in (Path(word) for word in words if word.endswith(".pth")):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"params": build_network(network).state_dict(), "network": network}, file)
    assert call(words, monkeypatch) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "images restored in" in out if words[1] == "infer" else "bicubic" in out
    if "-o" in words:
        assert Path(words[words.index("-o") + 1]).exists()


def check_distill(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A distillation of a small teacher of the same architecture, up to the plan."""
    teacher = Path(words[2])
    options = {"type": teacher.stem.partition("_")[0], "feature_channels": 20, "num_blocks": 2}
    teacher.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"params": build_network(options).state_dict()}, teacher)
    assert call([*words, "--iters", "2", "--dry-run"], monkeypatch) == 0, capfd.readouterr().err
    assert load(f"experiments/distill_{teacher.stem}/distill.yml")["network_g"]["type"] == "RLFN"
    assert re.search(r"^time +about \d", capfd.readouterr().out, flags=re.MULTILINE)


def check_new(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What is written is what the document shows, where it shows the file."""
    shown = {file: load(file) for file in Path("options/train").glob("*.yml") if not (ROOT / file).exists()}
    for file in shown:
        file.unlink()
    assert call(words, monkeypatch) == 0
    if "--list" not in words:
        (written,) = (file for file in Path("options/train").glob("*.yml") if not (ROOT / file).exists())
        assert load(written) == shown.get(written, load(written))
        assert f"kdsr train -opt {written}" in capfd.readouterr().out


def check_data(words: list[str], workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a data set of one photograph; what is there already is not overwritten, so it goes first."""
    shutil.rmtree(workspace / "datasets")
    out, sources = workspace / "datasets" / "sample", []
    if words[2] != "sample":
        *sources, out = [
            workspace / word
            for before, word in pairwise(words)
            if word.startswith("datasets/") and not before.startswith("--")
        ]
        for number, source in enumerate(sources):
            source.mkdir(parents=True)
            assert cv2.imwrite(str(source / f"{number}.png"), skimage.data.astronaut()[..., ::-1])
        for option in {"--kernels", "--depth"} & set(words):  # a ramp is a kernel as well as depth
            folder = workspace / words[words.index(option) + 1]
            folder.mkdir(parents=True)
            side = 15 if option == "--kernels" else 512
            assert cv2.imwrite(str(folder / "0.png"), np.tile(np.arange(side) % 256, (side, 1)).astype("u1"))
        words = [*words, "--workers", "1"]
    assert call(words, monkeypatch) == 0
    made = {path.parent for path in out.rglob("*.png")} - set(sources)
    assert len(made) >= 2


def in_shell(command: str, **environment: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr


def check_deployment(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files that it names are made before: small networks, an exported one, the profile of one."""
    network = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 4, **SMALL["EDSR"]}
    made = [word for word, before in zip(words, ["", *words], strict=False) if before not in ("-o", "-opt")]
    for file in (Path(word) for word in made if word.endswith(".pth") or word == "student.onnx"):
        file.parent.mkdir(parents=True, exist_ok=True)
        weights = file.with_suffix(".pth")
        torch.save({"params": build_network(dict(network)).state_dict(), "network": network}, weights)
        if file.suffix == ".onnx":
            assert call(["kdsr", "export", str(weights), "-o", str(file), "--unverified"], monkeypatch) == 0
    once = ["--size", "16x16", "--repeat", "1", "--warmup", "0", "--threads", "1"]
    if "baseline.json" in made:
        weights = next(word for word in words if word.endswith(".pth"))
        assert (
            call(["kdsr", "profile", weights, "--format", "json", "-o", "baseline.json", *once], monkeypatch)
            == 0
        )
    capfd.readouterr()
    assert call([*words, *(once if words[1] == "profile" else ())], monkeypatch) == 0
    assert ("wrote student.onnx" if words[1] == "export" else "GFLOPs") in capfd.readouterr().out.replace(
        '"gflops_256x256"', "GFLOPs"
    )


def check_demo(command: str, workspace: Path) -> None:
    """The demo of a few steps. Its environment counts as installed: the checksum is the one it asks for."""
    task = TASKS["rain" if "rain" in command else "sr"]
    write_weights(load(task.files[task.method]))
    environment = workspace / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    script = f'#!/bin/sh\nexec "{sys.executable}" -m kdsr.cli "$@" --iters 2\n'
    (environment / "bin" / "kdsr").write_text(script)
    (environment / "bin" / "kdsr").chmod(0o755)
    asked = "pwd; cat requirements/*.txt requirements/install.sh setup.py | cksum"
    wanted = subprocess.run(asked, shell=True, capture_output=True, text=True, check=True).stdout
    (environment / "kdsr-installed").write_text(wanted.rstrip("\n"))
    in_shell(command, VENV=str(environment), PYTHONPATH=str(workspace))
    assert (workspace / task.out / "comparison.png").exists()
    assert task.method in (workspace / task.out / "comparison.md").read_text()


# ---------------------------------------------------------------------------------------------------- and the rest


def test_there_are_commands_and_each_exception_excepts_one() -> None:
    readme = [command for command, (block, _) in COMMANDS.items() if block.document == README]
    assert len(readme) > 10
    assert [p for p in EXCEPTED if not any(re.match(p, command) for command in COMMANDS)] == []


@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.language in ("yaml", "python")],
    ids=lambda block: f"{block.document.name}:{block.line}",
)
def test_files_shown_are_named_and_those_that_ship_are_shown_as_they_are(block: Block) -> None:
    first, _, rest = block.text.partition("\n")
    assert re.fullmatch(r"# (options|kdsr)/\S+\.(yml|py)", first)
    file = ROOT / first.removeprefix("# ")
    if file.exists():
        assert rest == file.read_text(encoding="utf-8")


def test_what_is_missing_is_listed_as_the_readme_shows(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(workspace / "datasets")
    (shown,) = (b.text for b in blocks(README) if b.language == "text" and "there is no folder" in b.text)
    words = shlex.split(next(command for command in COMMANDS if command.startswith("python kdsr/train.py")))
    assert call(words, monkeypatch) == 2
    printed = capfd.readouterr().err.splitlines()
    assert printed[: shown.count("\n") - 1] == shown.splitlines()[:-1] and shown.endswith("...\n")
    assert not (workspace / "experiments").exists()


@pytest.mark.slow
def test_a_network_of_ones_own_registers_itself(workspace: Path) -> None:
    """The file that docs/new_backbone.md adds is all that a fresh process needs."""
    code = "import kdsr; from basicsr.archs import build_network; print(build_network({'type': 'SmallNet'}))"
    in_shell(f'python -c "{code}"', PYTHONPATH=str(workspace))


@pytest.mark.slow
def test_the_published_check_gives_the_table(
    workspace: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's commands on the real benchmarks, with the published weights."""
    shutil.rmtree(workspace / "datasets")
    for name in ("Set5", "Set14"):
        (workspace / "datasets" / name).mkdir(parents=True)
        (workspace / "datasets" / name / "original").symlink_to(shared / "data" / name / "GT_x4")
    weights = workspace / "experiments" / "pretrained_models"
    weights.mkdir(parents=True)
    shutil.copy(shared / "data" / "weights" / "RLFN" / "rlfn_x4.pth", weights / "RLFN_x4.pth")
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## A check against the literature") :]
    for command in re.search(r"```sh\n(.*?)```", section, flags=re.DOTALL)[1].splitlines():  # type: ignore[index]
        assert call(shlex.split(command), monkeypatch) == 0
    with open("results/RLFN_x4/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "psnr"]
    measured = [mean(float(r["value"]) for r in rows if r["set"] == name) for name in ("Set5", "Set14")]
    for who in ("published", "kdsr"):
        stated = re.search(rf"\| {who} \| ([\d.]+) \| ([\d.]+) \|", section)
        assert stated and measured == pytest.approx([float(stated[1]), float(stated[2])], abs=0.005)
