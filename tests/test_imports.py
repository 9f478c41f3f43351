"""What the commands import: the help no torch, the option check nothing that only a run needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


WRITE_MODULES = (
    "import atexit, sys; atexit.register(lambda: open('modules', 'w').write(' '.join(sys.modules)))"
)


def imported(*command: str, cwd: Path, code: int = 0) -> tuple[set[str], str]:
    """The modules that are there at the end of a command, and what it prints."""
    site = cwd / "site"  # sitecustomize is imported when Python starts
    site.mkdir()
    (site / "sitecustomize.py").write_text(WRITE_MODULES)
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return set((cwd / "modules").read_text().split()), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["data", "--help"], 0),
        (["bench", "--help"], 0),
        (["list", "--help"], 0),
        (["fetch", "--help"], 0),
        (["new", "--help"], 0),
        (["train", "--help"], 0),
        (["train"], 2),
        (["no_such_command"], 2),
    ],
)
def test_the_help_needs_no_torch(arguments: list[str], code: int, tmp_path: Path) -> None:
    modules, printed = imported("-m", "kdsr.cli", *arguments, cwd=tmp_path, code=code)
    assert "typer" in modules and "usage: " in printed.lower()
    assert not modules & {"torch", "basicsr", "numpy", "cv2"}


def test_the_help_of_a_group_is_that_of_its_commands() -> None:
    from kdsr import cli

    def check(commands: dict[str, tuple[Any, str]]) -> None:
        for name, (target, summary) in commands.items():
            if isinstance(target, dict):
                check(target)
            elif not target.startswith("cli:"):
                assert cli._load(name, target, summary).name == name and summary.endswith(".")

    check(cli.COMMANDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train:pixel_opt:type=NoSuchLoss", "NoSuchLoss"),
        ("network_g:num_feet=3", "num_feet"),
        ("datasets:train:dataroot_gt=nowhere", "nowhere"),
    ],
)
def test_option_errors_come_before_what_only_a_run_needs(
    run_options: dict[str, Any], change: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = ("-m", "kdsr.train", "-opt", "run.yml", "--force_yml", change)
    modules, printed = imported(*command, cwd=tmp_path, code=2)
    assert message in printed and "basicsr" in modules
    assert not modules & {"matplotlib", "pandas", "torchvision.models", "scipy", "skimage", "torch._dynamo"}


@pytest.mark.parametrize("program", ["kdsr.train", "kdsr.cli"])
def test_misspelt_keys_need_no_torch(run_options: dict[str, Any], program: str, tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = ["train"] if program == "kdsr.cli" else []
    command += ["-opt", "run.yml", "--force_yml", "train:totl_iter=4"]
    modules, printed = imported("-m", program, *command, cwd=tmp_path, code=2)
    assert "train.totl_iter: " in printed and "total_iter" in printed
    assert not modules & {"torch", "basicsr", "numpy", "cv2"}


REGISTERED = """
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
assert "VQGAN" in ARCH_REGISTRY and "DCKDModel" in MODEL_REGISTRY
"""


def test_other_programs_have_everything_registered(tmp_path: Path) -> None:
    """A user's own, one of kdsr's name in another folder, and what multiprocessing spawns from kdsr's."""
    (tmp_path / "kdsr.py").write_text("")  # not imported: the folder of the program comes first on the path
    program = tmp_path / "elsewhere" / "train.py"
    program.parent.mkdir()
    program.write_text(f"import kdsr\n{REGISTERED}")
    spawned = f"import sys; sys.argv = [{str(REPOSITORY / 'kdsr' / 'train.py')!r}]; import kdsr\n{REGISTERED}"
    for command in (["-c", f"import kdsr\n{REGISTERED}"], [str(program)], ["-c", spawned]):
        subprocess.run([sys.executable, *command], cwd=program.parent, check=True, timeout=300)


def test_what_basicsr_takes_from_torchvision_and_scipy_works(tmp_path: Path) -> None:
    program = """
import kdsr, sys, torch
assert "torchvision" not in sys.modules and "scipy" not in sys.modules
from basicsr.archs.arch_util import torchvision as deferred
from basicsr.data.degradations import multivariate_normal, rgb_to_grayscale, special
from basicsr.utils.img_util import make_grid
image = torch.rand(2, 3, 4, 4)
assert make_grid(image).shape[0] == 3 and rgb_to_grayscale(image).shape == (2, 1, 4, 4)
assert multivariate_normal.pdf(0.0) > 0.39 and special.gamma(5) == 24
import torchvision
from torchvision.transforms.functional_tensor import rgb_to_grayscale as old
assert deferred.__version__ == torchvision.__version__ and old(image).equal(rgb_to_grayscale(image))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)


def test_processes_that_a_command_spawns(run_options: dict[str, Any], tmp_path: Path) -> None:
    """``kdsr bench tiles`` measures each size in a process of its own."""
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = [
        "-m",
        "kdsr.cli",
        "bench",
        "tiles",
        "-opt",
        "run.yml",
        "--threads",
        "1",
        "--tile",
        "32",
        "--size",
        "48x48",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--size", "48x48"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "32" in done.stdout


def test_the_table_of_downloads_needs_no_torch(tmp_path: Path) -> None:
    modules, printed = imported("-m", "kdsr.cli", "fetch", "--list", cwd=tmp_path)
    assert "RealESRGAN_x4plus" in printed and "yaml" in modules
    assert not modules & {"torch", "basicsr", "cv2"}
