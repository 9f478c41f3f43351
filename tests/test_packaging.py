"""The environment that ``make`` builds: what is pinned, what is refused."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
# module -> distribution, where the names differ
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def pins(name: str) -> dict[str, str]:
    """Distribution (lower case) -> version of a requirements file; anything but an exact pin fails."""
    lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "-r "))]
    found = {}
    for line in wanted:
        pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        assert pin, f"{name}: {line!r} is no exact pin"
        found[pin[1].lower().replace("_", "-")] = pin[2]
    return found


def imported() -> set[str]:
    """Distributions that the package imports."""
    modules = set()
    for file in (ROOT / "kdsr").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(str(node.module).split(".")[0])
    third_party = modules - set(sys.stdlib_module_names) - {"kdsr"}
    return {DISTRIBUTIONS.get(module, module).lower() for module in third_party}


def test_everything_that_is_imported_is_pinned():
    assert imported() <= set(pins("torch.txt") | pins("base.txt") | pins("basicsr.txt") | pins("export.txt"))


def test_everything_that_is_imported_is_required_by_the_package():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if getattr(call.func, "id", "") == "setup")
    words = {str(word.arg): word.value for word in setup.keywords}
    required = (
        ast.literal_eval(words["install_requires"]) + ast.literal_eval(words["extras_require"])["export"]
    )
    names = {re.split(r"[=<>]", requirement)[0].lower() for requirement in required}
    assert imported() - {"opencv-python-headless"} <= names  # basicsr brings opencv-python


def test_constraints_agree_with_the_pins():
    constraints = pins("constraints.txt")
    for name in ("build.txt", "base.txt", "export.txt", "dev.txt"):
        for distribution, version in pins(name).items():
            assert constraints.get(distribution) == version, f"{name}: {distribution}"


@pytest.mark.parametrize("python", ["false", "/nowhere/python3.11"])
def test_an_unfit_python_is_refused_in_one_line(tmp_path: Path, python: str):
    venv = tmp_path / "venv"
    result = subprocess.run(
        [str(REQUIREMENTS / "install.sh"), str(venv)],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "3.11 or 3.12" in line and python in line
    assert not venv.exists()


@pytest.mark.parametrize(
    "command",
    [[str(REQUIREMENTS / "install.sh"), "{}"], ["make", "-f", str(ROOT / "Makefile"), "clean", "VENV={}"]],
)
def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path, command: list[str]):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    result = subprocess.run(
        [word.format(mine) for word in command],
        cwd=tmp_path,  # make clean removes nothing of this repository
        env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert f"{mine} " in result.stderr and "no virtual environment" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_make_clean_removes_an_environment(tmp_path: Path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (tmp_path / "kdsr").mkdir()
    (tmp_path / "tests").mkdir()
    command = ["make", "-f", str(ROOT / "Makefile"), "clean", f"VENV={tmp_path / 'venv'}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kdsr", "tests"]
