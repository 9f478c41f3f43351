"""What follows from the declarations: the JSON Schema, the option reference, and the early check of names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY

from kdsr.models.sections import NetworkPathOptions
from kdsr.options.early import _declared, misspelt
from kdsr.options.json_schema import known, known_models
from kdsr.options.model_keys import ModelKeys
from kdsr.options.signatures import options_of, registered

ROOT = Path(__file__).resolve().parents[2]
OPTION_FILES = sorted((ROOT / "options").rglob("*.yml"))
SCHEMA = json.loads((ROOT / "options/schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def found(options: dict[str, Any]) -> list[str]:
    """Where the schema finds something wrong."""
    return [".".join(map(str, error.absolute_path)) for error in VALIDATOR.iter_errors(options)]


def test_schema_and_reference_are_current(tmp_path: Path) -> None:
    for folder in ("options", "docs"):
        (tmp_path / folder).mkdir()
    # a process of its own: other tests register classes
    subprocess.run(
        [sys.executable, "-m", "kdsr.cli", "schema", str(tmp_path)], check=True, capture_output=True
    )
    for name in ("options/schema.json", "docs/option_reference.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text == (tmp_path / name).read_text(encoding="utf-8"), (
            f"{name} is not current; run: kdsr schema"
        )


def test_every_option_file_and_piece_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(ROOT / "options/schema.json")]
    result = subprocess.run([*command, *map(str, OPTION_FILES)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("nmae: x", ""),
        ("train: {num_negs: 1}", "train"),
        ("train: {num_neg: -1}", "train.num_neg"),
        ("train: {num_neg: four}", "train.num_neg"),
        ("train: {num_neg: 1.5}", "train.num_neg"),
        ("train: {optim_g: {type: Adam, lrr: 1}}", "train.optim_g"),
        ("train: {cl_opt: {type: ContrasLoss, wieghts: [1]}}", "train.cl_opt"),
        ("train: {rkd_opt: {type: L1Loss}}", "train.rkd_opt.type"),
        ("train: {scheduler: {type: MultiStepLR, milestones: [0]}}", "train.scheduler.milestones.0"),
        ("train: {gate: hrd}", "train.gate"),
        ("network_g: {type: EDSR, num_feats: 1}", "network_g"),
        ("network_g: {num_feats: 1}", "network_g"),
        ("network_g: {type: EDRS}", "network_g.type"),
        ("network_q: {type: EDSR}", ""),
        ("datasets: {train: {type: PairedImageDataset, gt_sise: 1}}", "datasets.train"),
        ("datasets: {train: {batch_size_per_gpu: 0}}", "datasets.train.batch_size_per_gpu"),
        ("datasets: {trian: {}}", "datasets"),
        ("path: {pretrain_netwrok_g: x}", "path"),
        ("val: {metrics: {psnr: {type: calculate_psnr, crop_border: -1}}}", "val.metrics.psnr.crop_border"),
        ("logger: {save_best: {sett: x}}", "logger.save_best"),
        ("model_type: KDModle", "model_type"),
        ("import_modules: mine\nnetwork_g: {type: EDSR, num_feats: 1}", "network_g"),
        ("import_modules: mine\nval: {tiel: 1}", "val"),
    ],
)
def test_what_is_wrong_is_found(text: str, place: str) -> None:
    assert place in found(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "_base_: [a.yml]\ntrain: {_replace_: true}",
        "network_g: {num_feat: 1}",  # the type is in another file
        "network_t: ~\ndatasets: {val: ~}\ntrain: {cl_opt: ~}",
        "network_t: ${network_g}\ntrain: {num_neg: '${a.b}', total_iter: 5.0e+3}",
        "train: {cl_opt: {loss_weight: [[0, 0.0], [10, 0.1]]}}",
        "import_modules: mine\nnetwork_g: {type: Mine, a: 1}\ntrain: {mine_opt: {type: L}, mine: 2}\nnetwork_x: {}",
        "model_type: VideoBaseModel\ntrain: {fix_flow: 5000}",
        "network_his: true",
    ],
)
def test_what_a_run_would_take_is_valid(text: str) -> None:
    assert found(yaml.safe_load(text)) == []


def test_every_option_is_described() -> None:
    """In a sentence, also the arguments of kdsr's networks and losses."""
    tables = {
        name: keys.train | keys.top | keys.val | keys.path | keys.logger
        for name, keys in known_models().items()
    }
    for registry in (ARCH_REGISTRY, LOSS_REGISTRY):
        tables |= {
            name: options_of(entry)
            for name, entry in known(registry).items()
            if entry.__module__.startswith("kdsr.")
        }
    bare = [
        f"{name}.{key}" for name, table in tables.items() for key, option in table.items() if not option.help
    ]
    assert bare == []


# ------------------------------------------------------------------------------------------------------ the early check


def written(folder: Path, **options: Any) -> list[str]:
    (folder / "run.yml").write_text(yaml.safe_dump({"model_type": "DCKDModel"} | options))
    return ["-opt", str(folder / "run.yml")]


def test_misspelt_keys_are_found_together(tmp_path: Path) -> None:
    argv = written(
        tmp_path,
        nmae="x",
        network_g={"type": "EDSR"},
        datasets={
            "train": {"type": "PairedImageDataset", "gt_sise": 1},
            "val": {"type": "REDSDataset", "own": 1},
        },
        train={"num_negs": 1},
        path={"pretrian_network_g": "x", "strict_load_g": True},
    )
    assert misspelt([*argv, "--force_yml", "logger:print_frq=1"], True) == [
        "nmae: unknown key; did you mean name?",
        "path.pretrian_network_g: unknown key; did you mean pretrain_network_g?",
        "logger.print_frq: unknown key; did you mean print_freq?",
        "train.num_negs: unknown key; did you mean num_neg?",
        "datasets.train.gt_sise: unknown key; did you mean gt_size or gt_sizes?",
    ]


def test_the_early_check_knows_exactly_the_declared_keys() -> None:
    names, _ = _declared()
    models = [keys for model in registered(MODEL_REGISTRY).values() if (keys := ModelKeys(model)).strict]
    for section, place in (
        ("top", ""),
        ("path", "path"),
        ("train", "train"),
        ("val", "val"),
        ("logger", "logger"),
    ):
        declared = {key for keys in models for key in getattr(keys, section)}
        of_networks = ("network_", *(f"{name}_" for name in NetworkPathOptions.declared()))
        assert {key for key in declared if not key.startswith(of_networks)} == names[place]


@pytest.mark.parametrize("more", [{"import_modules": "mine"}, {"model_type": "Mine"}])
def test_options_of_the_users_own_are_not_judged_early(tmp_path: Path, more: dict[str, Any]) -> None:
    assert misspelt(written(tmp_path, train={"mine": 1}, **more), True) == []


@pytest.mark.parametrize("wrong", [{"model_type": ["KDModel"]}, {"datasets": {"train": {"type": {"a": 1}}}}])
def test_a_type_that_is_no_text_is_left_to_the_check(tmp_path: Path, wrong: dict[str, Any]) -> None:
    assert misspelt(written(tmp_path, **wrong), True) == []


@pytest.mark.parametrize("file", [*(ROOT / "options").glob("t*/*.yml")], ids=lambda file: file.stem)
def test_no_template_is_refused_early(file: Path) -> None:
    assert misspelt(["-opt", str(file)], file.parent.name == "train") == []


def test_the_early_check_needs_neither_torch_nor_basicsr(tmp_path: Path) -> None:
    script = f"""
import sys, types
package = types.ModuleType("kdsr")  # without the registration that importing kdsr does
package.__path__ = [{str(ROOT / "kdsr")!r}]
sys.modules["kdsr"] = package
from kdsr.options.early import misspelt
assert len(misspelt(sys.argv[1:], True)) == 1
assert not {{"torch", "basicsr", "numpy"}} & sys.modules.keys()
"""
    argv = written(tmp_path, train={"num_negs": 1})
    subprocess.run([sys.executable, "-c", script, *argv], check=True)
