"""The layers of the package: imports run downwards, and only the seam reaches into BasicSR."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "kdsr").rglob("*.py"))

LAYERS = (
    {"compat"},
    {"runtime"},
    {"archs", "losses", "data"},
    {"prepare", "distill"},
    {"terms"},
    {"models"},
    {"options"},
    {"pipeline"},
    {"deploy"},
    {"tools", "cli", "entry", "train", "test"},
)
LAYER_OF = {ours: layer for layer, packages in enumerate(LAYERS) for ours in packages}
TOP = len(LAYERS) - 1  # the packages of the top layer may import one another

# BasicSR's packages that a package of ours must not know either
NOT_OF_BASICSR = {"losses": {"archs", "models"}, "archs": {"losses", "models"}, "models": {"train", "test"}}


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; ``from a import b`` gives a.b, which may be no
    module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(source: str, module: str, package: str) -> list[str]:
    """What the module ``kdsr.PACKAGE...`` imports from its own layer's other packages, from above, or from
    the BasicSR packages they must not know."""
    ours = module.split(".")[1]
    wrong = []
    for name in imported_modules(ast.parse(source), package):
        parts = name.split(".")
        other = parts[1] if len(parts) > 1 else ""
        upwards = parts[0] == "kdsr" and other in LAYER_OF and other != ours
        if upwards and LAYER_OF[other] >= LAYER_OF[ours] and not LAYER_OF[other] == LAYER_OF[ours] == TOP:
            wrong.append(name)
        if parts[0] == "basicsr" and other in NOT_OF_BASICSR.get(ours, ()):
            wrong.append(name)
    return wrong


def root_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def replaced_in_basicsr(source: str) -> list[str]:
    """Statements that assign to, or delete from, something imported from basicsr."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "basicsr"]
            foreign |= {alias.asname or "basicsr" for alias in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "basicsr":
            foreign |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and root_name(node.func) in ("setattr", "delattr") and node.args:
            targets = [ast.Attribute(node.args[0], "", ast.Store())]
        for target in targets:
            key = target.slice if isinstance(target, ast.Subscript) else None
            module_entry = isinstance(key, ast.Constant) and str(key.value).split(".")[0] == "basicsr"
            reaches_in = isinstance(target, ast.Attribute | ast.Subscript) and root_name(target) in foreign
            if module_entry or reaches_in:
                found.append(ast.unparse(node))
    return found


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_every_module_has_a_docstring(file):
    assert ast.get_docstring(ast.parse(file.read_text())), "no docstring"


@pytest.mark.parametrize("file", [file for file in FILES if dotted(file) != "kdsr.__init__"], ids=dotted)
def test_imports_run_downwards(file):
    module = dotted(file)
    assert module.split(".")[1] in LAYER_OF, "a ours that no layer has: add it to LAYERS"
    assert wrong_imports(file.read_text(), module, module.rsplit(".", 1)[0]) == []


@pytest.mark.parametrize("file", [file for file in FILES if "pipeline" not in file.parts], ids=dotted)
def test_only_the_pipeline_replaces_names_of_basicsr(file):
    assert replaced_in_basicsr(file.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kdsr.runtime.checkpoint", "from kdsr.models.kd_model import KDModel"),
        ("kdsr.runtime.checkpoint", "def f():\n    import kdsr.archs.vqgan_arch"),
        ("kdsr.losses.a_loss", "from kdsr import archs"),
        ("kdsr.losses.a_loss", "from basicsr.archs.vgg_arch import VGGFeatureExtractor"),
        ("kdsr.archs.an_arch", "from ..losses import contrastive_loss"),
        ("kdsr.models.a_model", "from kdsr.pipeline import options"),
        ("kdsr.pipeline.seam", "import kdsr.cli"),
    ],
)
def test_the_check_sees_what_is_wrong(module, source):
    assert len(wrong_imports(source, module, module.rsplit(".", 1)[0])) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kdsr.models.a_model", "from kdsr.losses.contrastive_loss import contrastive_ratio"),
        ("kdsr.models.a_model", "from kdsr.models.trainer import Trainer"),
        ("kdsr.losses.a_loss", "from .contrastive_loss import ContrasLoss\nfrom kdsr import __version__"),
        ("kdsr.cli", "from kdsr.tools import report"),
    ],
)
def test_the_check_lets_pass_what_is_right(module, source):
    assert wrong_imports(source, module, module.rsplit(".", 1)[0]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import basicsr.train\nbasicsr.train.build_model = None",
        "from basicsr import train as loop\nsetattr(loop, 'build_model', None)",
        "from basicsr.models.sr_model import SRModel\nSRModel.save = None",
        "import sys\nsys.modules['basicsr.train'] = None",
        "from basicsr.utils import registry\ndel registry.ARCH_REGISTRY._obj_map['EDSR']",
    ],
)
def test_the_check_sees_a_replaced_name(source):
    assert len(replaced_in_basicsr(source)) == 1


def test_the_check_lets_pass_ones_own_attributes():
    assert replaced_in_basicsr("from basicsr.utils import x\nself.x = x\ny = x.z\nx = 3") == []
