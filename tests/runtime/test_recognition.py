"""The message about a file of another architecture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from kdsr.archs.spandrel_arch import Spandrel
from kdsr.runtime.checkpoint import load_weights, mismatch
from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.recognition import _TYPES, architecture_name, known_type
from spandrel_files import TINY, made

THREE = {"num_in_ch": 3, "num_out_ch": 3}
RESTORMER = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 1, 1]}
VQGAN = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8, "resolution": 32, "attn_resolutions": [],
         "in_channels": 3, "out_ch": 3, "dropout": 0.0}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "EDSR": [THREE | {"num_feat": 8, "num_block": 1, "upscale": scale} for scale in (2, 3, 4)],
    "MSRResNet": [{"num_feat": 8, "num_block": 1, "upscale": scale} for scale in (2, 3, 4)],
    "RCAN": [THREE | {"num_feat": 16, "num_group": 1, "num_block": 1, "squeeze_factor": 4, "upscale": 2}],
    "RRDBNet": [
        THREE | {"num_feat": 8, "num_block": 1, "num_grow_ch": 4, "scale": scale} for scale in (1, 2, 4)
    ],
    "ECBSR": [
        THREE | {"num_block": 1, "num_channel": 4, "with_idt": idt, "act_type": act, "scale": 2}
        for idt, act in ((False, "prelu"), (True, "relu"))
    ],
    "RIDNet": [{"in_channels": 3, "mid_channels": 16, "out_channels": 3}],
    "RLFN": [{"feature_channels": 16, "num_blocks": blocks, "upscale": 2} for blocks in (1, 3)],
    "PReNet": [
        {"lstm": lstm, "recursive": recursive} for lstm in (True, False) for recursive in (True, False)
    ],
    "Restormer": [
        RESTORMER | {"LayerNorm_type": "BiasFree"},
        RESTORMER | {"bias": True},
        RESTORMER | {"inp_channels": 6, "dual_pixel_task": True},
    ],
    "VQGAN": [
        {"embed_dim": 8, "n_embed": 8, "ddconfig": VQGAN, "decoder": decoder} for decoder in (False, True)
    ],
}
MADE = [(kind, options) for kind, variants in OPTIONS.items() for options in variants]


def built(kind: str, options: dict[str, Any]) -> nn.Module:
    return build_network({"type": kind, **options})


def test_every_type_that_is_recognised_is_built_here() -> None:
    assert set(OPTIONS) == set(_TYPES)


@pytest.mark.parametrize(("kind", "options"), MADE, ids=[kind for kind, _ in MADE])
def test_a_type_is_recognised_whatever_its_options(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    state = built(kind, options).state_dict()
    assert known_type(state.keys()) == architecture_name(state) == kind
    matching = [name for name, needed in _TYPES.items() if state.keys() >= set(needed)]
    assert matching == [kind]  # of no other type, in whatever order they are looked at
    torch.save({"params": {f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "x.pth")
    if kind == "RRDBNet":  # spandrel's ESRGAN
        return
    with pytest.raises(CheckpointError) as caught:
        Spandrel(str(tmp_path / "x.pth"))
    output = str(caught.value)
    assert f"spandrel does not know {kind}; use `type: {kind}`" in output and len(output) < 300 + len(
        str(tmp_path)
    )


@pytest.mark.parametrize("name", TINY)
def test_spandrels_architectures_have_spandrels_names(name: str) -> None:
    assert architecture_name(made(name).state_dict()) == name


def test_unknown_weights_have_no_name() -> None:
    assert architecture_name(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)).state_dict()) is None
    assert architecture_name({}) is None


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    own = {kind: built(kind, variants[0]) for kind, variants in OPTIONS.items()}
    return own | {f"spandrel's {name}": made(name) for name in TINY}


def test_another_architecture_is_one_short_message(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    for kind, network in itertools.permutations(networks, 2):
        if f"spandrel's {kind}" == network or f"spandrel's {network}" == kind:
            continue  # RCAN, under two kinds of names
        weights, net = networks[kind].state_dict(), networks[network]
        output = mismatch(weights, net)
        assert output is not None and "\n" not in output and len(output) < 500, (len(output or ""), output)
        called = kind.removeprefix("spandrel's ")
        assert f"does not fit {type(net).__name__}: it looks like {called}; " in output
        assert f"of the network's {len(net.state_dict())} " in output
        shown = [
            name
            for name in {*weights, *net.state_dict()}
            if f" {name} " in output.replace(",", " ").replace(";", " ")
        ]
        assert len(shown) <= 6


def test_the_file_and_the_option_are_named(tmp_path: Path, networks: dict[str, nn.Module]) -> None:
    torch.save({"params": networks["Restormer"].state_dict()}, tmp_path / "x.pth")
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            load_weights(
                networks["RLFN"], tmp_path / "x.pth", strict=strict, option="path.pretrain_network_t"
            )
        assert str(caught.value).startswith(
            f"path.pretrain_network_t: {tmp_path / 'x.pth'} does not fit RLFN: it looks like Restormer; "
            "no name in common of the network's "
        )


@pytest.mark.parametrize("blocks", [1, 2, 5, 20])
def test_the_same_architecture_of_another_size_is_not_called_another(tmp_path: Path, blocks: int) -> None:
    options = OPTIONS["EDSR"][0]
    net, other = built("EDSR", options), built("EDSR", options | {"num_block": blocks, "num_feat": 4})
    output = mismatch(other.state_dict(), net)
    assert output is not None and "another size or scale? 1 of the network's 12 tensors match" in output
    assert "looks like" not in output and len(output) < 600


@pytest.mark.parametrize(
    ("name", "ending"),
    [("SwinIR", ".proj.bias"), ("NAFNet", "norm2.bias"), ("NAFNet", "bias"), ("HAT", "norm2.bias")],
)
def test_a_list_of_names_from_spandrel_is_cut(tmp_path: Path, name: str, ending: str) -> None:
    """Recognised weights that lack much of the architecture."""
    state = made(name).state_dict()
    missing = [key for key in state if key.endswith(ending)]
    torch.save(
        {"params": {key: value for key, value in state.items() if key not in missing}}, tmp_path / "x.pth"
    )
    with pytest.raises(CheckpointError) as caught:
        Spandrel(str(tmp_path / "x.pth"))
    output = str(caught.value)
    assert (
        f"looks like {name}, but spandrel cannot build it (RuntimeError: " in output
        and "Missing key(s)" in output
    )
    assert sum(f'"{key}"' in output for key in missing) == min(4, len(missing)) and len(output) < 600
