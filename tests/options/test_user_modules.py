"""import_modules: a user's own networks, losses, data sets and models; where they are found, and what goes wrong."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)
from torch.utils.data import DataLoader

import ranks
from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.options import user_modules
from kdsr.options.check import check
from kdsr.options.files import load
from kdsr.options.user_modules import import_user_modules
from kdsr.runtime.errors import OptionError
from kdsr.tools.bench_options import prepare

SCRIPT = Path(__file__).resolve().parents[2] / "kdsr" / "train.py"
REGISTRIES = (ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY)
FIVE_LINES = """\
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class {name}(nn.Sequential):
    def __init__(self, width: int = 4, upscale: int = 4):
        first, last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3 * upscale**2, 3, padding=1)
        super().__init__(first, nn.ReLU(), last, nn.PixelShuffle(upscale))
"""
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory of its own; registries, modules and path are afterwards what they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    maps, modules = [dict(registry._obj_map) for registry in REGISTRIES], set(sys.modules)
    yield
    for registry, entries in zip(REGISTRIES, maps, strict=True):
        registry._obj_map.clear()
        registry._obj_map.update(entries)
    for name in [name for name in set(sys.modules) - modules if not name.startswith(("torch", "kdsr"))]:
        del sys.modules[name]
    user_modules._registering.clear()


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def found(file: str = "run.yml", **options: Any) -> tuple[Options, list[str]]:
    """The options after the import, and the warnings."""
    warnings: list[str] = []
    import_user_modules(options, file, warnings)
    return options, warnings


def refused(file: str = "run.yml", **options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        import_user_modules(options, file, [])
    (problem,) = caught.value.problems
    return problem


def with_own_networks(options: Options, weights: str = "teacher.pth") -> Options:
    """A run of two networks of my_archs, whose teacher's weights are written."""
    teacher = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 48, 3, padding=1)
    )
    torch.save({"params": teacher.state_dict()}, weights)
    options.update(
        import_modules=["my_archs"],
        network_g={"type": "FiveLines", "width": 4},
        network_t={"type": "FiveLines", "width": 8},
    )
    options["path"]["pretrain_network_t"] = weights
    options["train"]["logits_opt"] = {"type": "L1Loss", "loss_weight": 1.0}
    options["logger"]["save_checkpoint_freq"] = 2
    options["train"]["total_iter"] = 2
    return options


# ------------------------------------------------------------------------------------------------------- whole runs


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_network_of_ones_own_is_teacher_and_student(run_options: Options) -> None:
    """In processes of their own: training, and the resolved file, which goes on though the module lies elsewhere."""
    write("mine/my_archs.py", FIVE_LINES.format(name="FiveLines"))
    write("mine/run.yml", yaml.safe_dump(with_own_networks(run_options)))
    done = script("-opt", "mine/run.yml")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(Path("experiments/run/run.yml").read_text())
    assert resolved["import_modules"] == ["my_archs"] and resolved["import_path"] == ["mine"]
    assert torch.load("experiments/run/models/net_g_latest.pth")["params"]["0.weight"].shape == (4, 3, 3, 3)
    log = next(Path("experiments/run").glob("train_*.log")).read_text()
    assert "net_t: FiveLines" in log and re.search(r"l_ts: [0-9.e+-]+ ", log)

    goes_on = ("-opt", "experiments/run/run.yml", "--auto_resume", "--force_yml", "train:total_iter=4")
    done = script(*goes_on)
    assert done.returncode == 0, done.stderr
    state = torch.load("experiments/run/training_states/4.state", weights_only=True)
    assert state["options"]["import_modules"] == ["my_archs"]
    log = sorted(Path("experiments/run").glob("train_*.log"))[-1].read_text()
    assert (
        re.search(r"Resuming training from epoch: \d, iter: 2", log)
        and "import_path: " not in log.split("Number of val")[1]
    )


def state_notes() -> list[str]:
    """What the last log says of changed modules."""
    log = sorted(Path("experiments/run").glob("train_*.log"), key=os.path.getmtime)[-1].read_text()
    return re.findall(r"import_modules: the code .*", log)


def test_two_runs_and_a_test_in_one_process(run_options: Options) -> None:
    """The second run must not register the network again."""
    file = write("my_archs.py", FIVE_LINES.format(name="FiveLines"))
    write("run.yml", yaml.safe_dump(with_own_networks(run_options)))
    assert train_entry.main(["-opt", "run.yml"]) == 0
    assert train_entry.main(["-opt", "run.yml", "--auto_resume", "--force_yml", "train:total_iter=3"]) == 0
    assert state_notes() == []
    file.write_text(file.read_text() + "# another comment\n")
    assert train_entry.main(["-opt", "run.yml", "--auto_resume", "--force_yml", "train:total_iter=4"]) == 0
    assert state_notes() == [
        "import_modules: the code of my_archs has changed; the new code applies from here on"
    ]
    assert "import_path" not in yaml.safe_load(Path("experiments/run/run.yml").read_text())
    del run_options["train"], run_options["network_t"], run_options["logger"]
    run_options["datasets"] = {"test_1": run_options["datasets"]["val"]}
    run_options["path"] = {"pretrain_network_g": "experiments/run/models/net_g_latest.pth"}
    write("test.yml", yaml.safe_dump(run_options))
    assert test_entry.main(["-opt", "test.yml"]) == 0
    assert Path("results/run/metrics.csv").exists()


MORE = """\
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from kdsr.models.kd_model import KDModel
from kdsr.runtime.declarations import loss
from torch import nn


@LOSS_REGISTRY.register()
class HalfLoss(nn.Module):
    def __init__(self, share: float = 0.5):
        super().__init__()
        self.share = share

    def forward(self, one, other):
        return self.share * (one - other).abs().mean()


@METRIC_REGISTRY.register()
def my_brightness(img, **kwargs):
    return float(img.mean())


@DATASET_REGISTRY.register()
class MyPairs(PairedImageDataset):
    pass


class MyOptions(KDModel.train_options):
    my_opt: dict | None = loss("My loss, `l_mine`.")


@MODEL_REGISTRY.register()
class MyModel(KDModel):
    train_options = MyOptions

    def init_training_settings(self):
        super().init_training_settings()
        self.cri_mine = self.builder.loss("my_opt")

    def compute_losses(self, step):
        return {**super().compute_losses(step), "l_mine": self.cri_mine(step.output, step.gt)}
"""


def test_a_loss_a_metric_a_data_set_and_a_model_of_ones_own(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    write("more.py", MORE)
    run_options.update(import_modules="more", model_type="MyModel")
    run_options["datasets"]["train"]["type"] = "MyPairs"
    run_options["train"]["my_opt"] = {"type": "HalfLoss", "shares": 0.25}
    run_options["val"]["metrics"]["brightness"] = {"type": "my_brightness"}
    write("run.yml", yaml.safe_dump(run_options))
    assert train_entry.main(["-opt", "run.yml"]) == 2  # its options are checked as any other's
    assert (
        "train.my_opt.shares: HalfLoss has no such parameter; did you mean share?" in capsys.readouterr().err
    )
    assert train_entry.main(["-opt", "run.yml", "--force_yml", "train:my_opt={type: HalfLoss}"]) == 0
    assert re.search(r"l_mine: [0-9.e+-]+ ", next(Path("experiments/run").glob("train_*.log")).read_text())
    assert ",brightness," in Path("experiments/run/metrics.csv").read_text()


def test_bench_step_knows_it(run_options: Options) -> None:
    write("my_archs.py", FIVE_LINES.format(name="FiveLines"))
    options = prepare(write("run.yml", yaml.safe_dump(with_own_networks(run_options))))
    assert options["network_g"]["type"] == "FiveLines" and "FiveLines" in ARCH_REGISTRY


@pytest.mark.slow
def test_each_process_of_a_run_imports_it(run_options: Options, tmp_path: Path) -> None:
    write("mine/my_archs.py", FIVE_LINES.format(name="FiveLines"))
    write("mine/run.yml", yaml.safe_dump(with_own_networks(run_options)))
    assert ranks.run(tmp_path, ["-opt", "mine/run.yml"]) == [0, 0]
    assert Path("experiments/run/training_states/2.state").exists()


@pytest.mark.slow
def test_spawned_workers_find_it(run_options: Options) -> None:
    """Where workers do not inherit the modules of their parent (macOS), they import them by name."""
    write("mine/my_sets.py", MORE.replace("MODEL_REGISTRY.register()", "LOSS_REGISTRY.register()"))
    found("mine/run.yml", import_modules=["my_sets"])
    made = dict(iter(DATASET_REGISTRY))["MyPairs"]
    dataset = SeededDataset(made({**run_options["datasets"]["train"], "phase": "train", "scale": 4}), 1)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["gt"].shape == (2, 3, 64, 64)


# ------------------------------------------------------------------------------------------------- where it is found


@pytest.mark.parametrize("place", ["cwd", "beside", "import_path", "python"])
def test_the_places(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = {"cwd": ".", "beside": "options", "import_path": "nets", "python": "elsewhere"}[place]
    write(f"{folder}/my_archs.py", FIVE_LINES.format(name="Placed"))
    given: Options = {"import_path": ["nets"]} if place == "import_path" else {}
    if place == "python":
        monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    options, warnings = found("options/run.yml", import_modules=["my_archs"], **given)
    assert warnings == [] and "Placed" in ARCH_REGISTRY
    noted = {"beside": ["options"], "import_path": ["nets"]}.get(place)
    assert options.get("import_path") == noted
    assert sys.path[-1] == str(tmp_path / folder) or place == "python"
    # what was noted is enough for the resolved file, which lies elsewhere
    again, _ = found("experiments/run/run.yml", **options)
    assert again == options


def test_the_order_of_the_places() -> None:
    for folder in ("options", ".", "nets"):
        write(f"{folder}/my_archs.py", FIVE_LINES.format(name=f"From{Path(folder).name or 'Here'}"))
    found("options/run.yml", import_modules=["my_archs"], import_path="nets")
    assert "Fromnets" in ARCH_REGISTRY and "FromHere" not in ARCH_REGISTRY
    problem = refused("options/run.yml", import_modules=["my_archs"])  # this process has another one by now
    assert re.search(r"my_archs\.py is hidden by .*nets/my_archs\.py, which has the same name", problem)


def test_a_module_of_a_package() -> None:
    write("my_nets/__init__.py", "")
    write("my_nets/tiny.py", FIVE_LINES.format(name="Packaged"))
    write("plain/deep/tiny.py", FIVE_LINES.format(name="Deep"))  # folders without __init__.py
    found(import_modules=["my_nets.tiny", "plain.deep.tiny"])
    assert {"Packaged", "Deep"} <= set(ARCH_REGISTRY.keys())
    assert ARCH_REGISTRY._obj_map["Packaged"].__module__ == "my_nets.tiny"


def test_a_network_made_from_another_takes_its_parameters(run_options: Options) -> None:
    write(
        "my_archs.py",
        """\
from basicsr.archs.edsr_arch import EDSR
from basicsr.utils.registry import ARCH_REGISTRY


@ARCH_REGISTRY.register()
class MyEDSR(EDSR):
    def __init__(self, wide: bool = False, **others):
        super().__init__(num_in_ch=3, num_out_ch=3, **others)
""",
    )
    network = {"type": "MyEDSR", "wide": True, "num_feat": 8, "num_block": 1, "upscale": 4}
    _, problems = found(**{**run_options, "import_modules": ["my_archs"], "network_g": network})
    assert problems == []
    options = {**run_options, "network_g": {**network, "num_feats": 8, "upscale": 2}}
    problems = check(options, True)
    assert any(
        p.startswith("network_g.num_feats: MyEDSR has no such parameter; did you mean num_feat")
        for p in problems
    )
    assert len(problems) == 2  # and the scale


def test_nothing_is_imported_that_is_not_named(run_options: Options) -> None:
    write("my_archs.py", "open('ran', 'w')")
    options = load(write("run.yml", yaml.safe_dump({**run_options, "import_modules": ["my_archs"]})))
    check(options, True)
    assert not Path("ran").exists()  # reading and checking is all that these do
    found(import_path=["."])
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------------------------- what goes wrong

REGISTER = "from basicsr.utils.registry import ARCH_REGISTRY\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nimport no_such_library_here\n",
         r"ModuleNotFoundError: No module named 'no_such_library_here' \(.*/my_archs\.py, line 2\)"),
        ("def f(:\n", r"SyntaxError: .*\(.*/my_archs\.py, line 1\)"),
        ("raise ValueError('one\\ntwo')\n", r"ValueError: one \(.*/my_archs\.py, line 1\)$"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*/my_archs\.py, line 2\)"),
        ("import torch\n\n\ntorch.zeros(2).view(3)\n", r"RuntimeError: .*\(.*/my_archs\.py, line 4\)"),
        ("import helper_of_mine\n", r"KeyError: 'k' \(.*/helper_of_mine\.py, line 3\)"),
        (REGISTER + "\n\n@ARCH_REGISTRY.register()\nclass EDSR:\n    pass\n",
         r"it registers a network EDSR \(.*/my_archs\.py, line [45]\), but basicsr\.archs\.edsr_arch has "
         r"registered one of this name; rename yours"),
    ],
)  # fmt: skip
def test_an_import_that_fails(source: str, message: str) -> None:
    write("helper_of_mine.py", "d = {}\ndef f():\n    return d['k']\nf()\n")
    write("my_archs.py", source)
    problem = refused(import_modules=["my_archs"])
    assert problem.startswith("import_modules.0: my_archs cannot be imported: ") and re.search(
        message, problem
    ), problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_arch",
            "no module my_arch in {here}, {here}/options or Python's path",
        ),
        (
            "./my_archs.py",
            "./my_archs.py is a file; give the module's name instead: my_archs",
        ),
        ("nets/my_archs.py", "give the module's name instead: nets.my_archs"),
        ("../nets/my_archs.py", "give the module's name instead: my_archs, and import_path: [../nets]"),
        ("my-archs", "'my-archs' is not the name of a module"),
        (".my_archs", "'.my_archs' is not the name of a module"),
        ("nets", "{here}/nets is a folder without an __init__.py; give a module in it, nets.NAME"),
        ("nets.my_arch", "no module nets.my_arch"),
        ("json", "{here}/json.py is hidden by "),
    ],
)
def test_a_name_that_is_none(name: str, message: str, tmp_path: Path) -> None:
    for file in ("my_archs.py", "nets/my_archs.py", "json.py"):
        write(file, FIVE_LINES.format(name="Unwanted"))
    problem = refused("options/run.yml", import_modules=[name])
    assert problem.startswith("import_modules.0: ") and message.format(here=tmp_path) in problem, problem
    assert "Unwanted" not in ARCH_REGISTRY


def test_all_problems_at_once(run_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    write("broken.py", "1 / 0\n")
    run_options.update(import_modules=["broken", "absent"], import_path=["nowhere"])
    write("run.yml", yaml.safe_dump(run_options))
    assert train_entry.main(["-opt", "run.yml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = (
        "import_path.0: no such folder: nowhere",
        "import_modules.0: broken",
        "import_modules.1: no module absent",
    )
    assert [line.startswith(f"kdsr: error: {start}") for line, start in zip(lines, starts, strict=True)] == [
        True
    ] * 3
    assert not Path("experiments").exists()


@pytest.mark.parametrize("value", [3, [3], {"a": 1}, [""], [["my_archs"]], True])
def test_junk(value: Any) -> None:
    assert refused(import_modules=value).startswith("import_modules: expected a list of module names, got")


def test_a_module_that_registers_nothing() -> None:
    write("my_archs.py", "from torch import nn\n\n\nclass Forgotten(nn.Module):\n    pass\n")
    write("glue.py", "import with_networks\n")
    write("with_networks.py", FIVE_LINES.format(name="ThroughGlue"))
    for _ in range(2):
        _, warnings = found(import_modules=["my_archs", "glue", "with_networks"])
        (warning,) = warnings
        assert warning.startswith("import_modules.0: my_archs registers nothing: no network, loss")


def test_a_module_that_fails_registers_nothing_and_may_be_mended() -> None:
    write("parts_of_mine.py", FIVE_LINES.format(name="Part"))
    file = write("my_archs.py", f"import parts_of_mine\n{FIVE_LINES.format(name='Whole')}\n1 / 0\n")
    before = [dict(registry._obj_map) for registry in REGISTRIES]
    refused(import_modules=["my_archs"])
    assert [dict(registry._obj_map) for registry in REGISTRIES] == before
    file.write_text(f"import parts_of_mine\n{FIVE_LINES.format(name='Whole')}")
    os.utime(file, (1, 1))  # not the time of the compiled one
    importlib.invalidate_caches()
    assert found(import_modules=["my_archs"])[1] == []
    assert {"Part", "Whole"} <= set(ARCH_REGISTRY.keys())
