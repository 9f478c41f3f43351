"""VQGANModel's options: what cannot be trained is refused before anything is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kdsr.models.vqgan_model import VQGANModel
from kdsr.options.check import check
from kdsr.runtime.errors import OptionError

ENCODER = {
    "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "resolution": 64, "attn_resolutions": [],
}  # fmt: skip
PERCEPTUAL = {"type": "PerceptualLoss", "layer_weights": {"relu1_1": 1.0}}
ADVERSARIAL = {
    "gan_opt": {"type": "GANLoss", "gan_type": "hinge"},
    "optim_d": {"type": "Adam", "lr": 1e-3},
    "gan_start": 10000,
}


@pytest.fixture
def options(vqgan_options: dict[str, Any]) -> dict[str, Any]:
    return vqgan_options


@pytest.mark.parametrize(
    "network, size, message",
    [
        ({"type": "PatchDiscriminator", "num_layers": 5}, 16, "gt_size 16: RuntimeError"),
        ({"type": "PatchDiscriminator", "num_in_ch": 4}, 32, "gt_size 32: RuntimeError"),
        ({"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 4}, 32, "gt_size 32: AssertionError"),
        ({"type": "VQGAN", "embed_dim": 8, "n_embed": 4, "ddconfig": ENCODER}, 32, "no numbers for each"),
    ],
)
def test_wrong_discriminators_are_found_long_before_their_turn(
    options: dict[str, Any], network: dict[str, Any], size: int, message: str
) -> None:
    options["network_d"] = network
    options["train"].update(copy.deepcopy(ADVERSARIAL))
    options["datasets"]["train"]["gt_size"] = size
    with pytest.raises(OptionError, match=f"network_d: .*{message}"):
        VQGANModel(options)


def test_wrong_options_are_all_named(options: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    assert VQGANModel.check_options(options) == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    options["scale"] = 4
    options["datasets"]["train"]["gt_size"] = 50
    options["network_g"]["decoder"] = False
    options["train"].update(
        gan_opt={"type": "GANLoss", "gan_type": "hinge"},
        restart_every=-1,
        perceptual_opt={"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1.0}},
    )
    problems = "\n".join(check(options, True))
    parts = ("scale", "decoder: true", "gt_size: 50 is not a multiple of 4")
    parts += ("network_d: missing", "train.optim_d: missing", "restart_every", "vgg19-dcbb9e9d.pth")
    assert [part for part in parts if part not in problems] == []


def test_absent_vgg_weights_are_named_and_not_downloaded(
    options: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    options["train"]["perceptual_opt"] = PERCEPTUAL
    with pytest.raises(OptionError, match="experiments/pretrained_models/vgg19-dcbb9e9d.pth"):
        VQGANModel(options)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("network_g.ddconfig.in_channels", 1, "in_channels: VQGANModel's images have 3 channels, not 1"),
        ("network_g.ddconfig.out_ch", 4, "out_ch: VQGANModel's images have 3 channels, not 4"),
        ("network_g.ddconfig.num_res_blocks", 0, "num_res_blocks: must be at least 1"),
        ("network_g.ddconfig", [1], "network_g.ddconfig: is a section"),
        ("network_g.ddconfig", None, "network_g.ddconfig: is a section"),
        ("network_g.input_range", [None, 1], "network_g.input_range: is [low, high]"),
        ("network_g.n_embed", 0, "network_g.n_embed: must be at least 1"),
        ("network_d", {"type": "PatchDiscriminator"}, "network_d: has nothing to do without train.gan_opt"),
        (
            "train.perceptual_opt",
            PERCEPTUAL | {"vgg_type": "vgg18"},
            "vgg_type: 'vgg18' is not known; valid: vgg11,",
        ),
    ],
)
def test_the_option_check_names_what_is_wrong(
    vqgan_options: dict[str, Any], place: str, value: Any, message: str
) -> None:
    vqgan_options["path"] = {}
    *sections, key = place.split(".")
    section = vqgan_options
    for name in sections:
        section = section[name]
    section[key] = value
    problems = [problem for problem in check(vqgan_options, True) if not problem.startswith("datasets.")]
    assert any(message in problem for problem in problems), problems
