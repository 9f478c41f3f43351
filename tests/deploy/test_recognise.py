"""Networks recognised by their tensors: every architecture, in odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network

from kdsr.deploy.architectures import DIV2K_MEAN
from kdsr.deploy.recognise import closest, recognise, recognised
from kdsr.runtime.checkpoint import read_checkpoint, select_weights

RGB = {"num_in_ch": 3, "num_out_ch": 3}
SWINIR = {
    "type": "SwinIR", "img_size": 16, "window_size": 4, "embed_dim": 12, "depths": [2, 3], "num_heads": [2, 3],
    "mlp_ratio": 1.5,
}  # fmt: skip
NETWORKS: list[dict[str, Any]] = [
    {"type": "EDSR", **RGB, "num_feat": 7, "num_block": 3, "upscale": 3},
    {"type": "EDSR", **RGB, "num_feat": 5, "num_block": 1, "upscale": 4, "res_scale": 0.1, "img_range": 1.0},
    {"type": "EDSR", **RGB, "num_feat": 6, "num_block": 2, "upscale": 8, "rgb_mean": [0.0, 0.0, 0.0]},
    {"type": "RCAN", **RGB, "num_feat": 19, "num_group": 2, "num_block": 3, "squeeze_factor": 5, "upscale": 2},
    {"type": "RCAN", **RGB, "num_feat": 16, "num_group": 1, "num_block": 1, "upscale": 3, "img_range": 1.0},
    {"type": "RRDBNet", **RGB, "num_feat": 7, "num_block": 2, "num_grow_ch": 3, "scale": 4},
    {"type": "RRDBNet", **RGB, "num_feat": 6, "num_block": 1, "num_grow_ch": 4, "scale": 2},
    {"type": "RRDBNet", "num_in_ch": 1, "num_out_ch": 1, "num_feat": 6, "num_block": 1, "scale": 1},
    {"type": "SRVGGNetCompact", "num_feat": 9, "num_conv": 3, "upscale": 3},
    {"type": "SRVGGNetCompact", "num_feat": 5, "num_conv": 2, "upscale": 2, "act_type": "leakyrelu"},
    {"type": "MSRResNet", "num_feat": 7, "num_block": 2, "upscale": 4},
    {"type": "MSRResNet", "num_feat": 5, "num_block": 1, "upscale": 3},
    {**SWINIR, "upscale": 4, "upsampler": "pixelshuffle"},
    {**SWINIR, "upscale": 3, "upsampler": "pixelshuffledirect", "resi_connection": "3conv"},
    {**SWINIR, "upscale": 4, "upsampler": "nearest+conv", "qkv_bias": False, "patch_norm": False},
    {**SWINIR, "upscale": 1, "upsampler": "", "img_range": 255.0, "ape": True},
    {**SWINIR, "upscale": 1, "upsampler": "", "in_chans": 1, "depths": [1, 1]},
    {"type": "NAFNet", "width": 6, "middle_blk_num": 0, "enc_blk_nums": [1, 0, 3], "dec_blk_nums": [2, 1, 0]},
    {"type": "Restormer", "dim": 10, "num_blocks": [1, 2, 1, 3], "num_refinement_blocks": 2, "heads": [1, 2, 5, 8]},
    {"type": "Restormer", "dim": 8, "num_blocks": [1, 1, 1, 1], "ffn_expansion_factor": 1.37, "bias": True,
     "LayerNorm_type": "BiasFree", "inp_channels": 6, "dual_pixel_task": True},
    {"type": "RLFN", "feature_channels": 11, "num_blocks": 3, "esa_channels": 5, "upscale": 3},
    {"type": "RLFN", "feature_channels": 8, "num_blocks": 1, "upscale": 2, "img_range": 1.0},
    {"type": "PReNet", "num_feat": 7, "num_block": 3, "recurrent_iter": 4},
    {"type": "PReNet", "num_feat": 6, "lstm": False, "recursive": True},
    {"type": "PReNet", "num_feat": 6, "num_block": 1, "img_channel": 1},
]  # fmt: skip
PUBLISHED = {
    "RLFN/rlfn_x4.pth": {"type": "RLFN", "feature_channels": 52, "num_blocks": 6, "upscale": 4},
    "RLFN/rlfn_s_x4.pth": {"type": "RLFN", "feature_channels": 48, "upscale": 4, "img_range": 255.0},
    "RealESRGAN/RealESRGAN_x4plus.fp16.safetensors": {"type": "RRDBNet", "num_block": 23, "scale": 4},
    "RealESRGAN/realesr-animevideov3.safetensors": {"type": "SRVGGNetCompact", "num_conv": 16, "upscale": 4},
    "PReNet/Rain1400/PReNet6/net_latest.pth": {"type": "PReNet", "lstm": True, "recursive": False, "num_block": 5},
    "PReNet/Rain1400/PRN6_r/net_latest.pth": {"type": "PReNet", "lstm": False, "recursive": True, "num_block": 5},
}  # fmt: skip


def random_network(options: dict[str, Any]) -> torch.nn.Module:
    """Every tensor random: NAFNet's blocks would otherwise be the identity."""
    torch.manual_seed(0)
    net = build_network(dict(options)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("options", NETWORKS, ids=lambda options: options["type"])
def test_a_recognised_network_gives_the_same_bits(options: dict[str, Any]) -> None:
    net = random_network(options)
    found = recognised(net.state_dict())
    assert found is not None and found.options["type"] == options["type"]
    keys = ("inp_channels", "img_channel", "in_chans", "num_in_ch")
    channels = next((options[key] for key in keys if key in options), 3)
    side = 16 if options.get("ape") else 24
    x = torch.rand(1, channels, side, side)
    with torch.no_grad():
        expected = net(x)
        same = []
        for candidate in found.candidates:
            again = build_network(dict(candidate)).eval()
            again.load_state_dict(net.state_dict(), strict=True)
            same.append(torch.equal(again(x), expected))
    assert any(same)
    assert recognise(net.state_dict()) == found.candidates[0] == found.options
    if len(found.candidates) == 1:
        assert not found.unknown


def test_what_tensors_do_not_show_is_listed_with_the_usual_value_first() -> None:
    net = random_network({"type": "EDSR", **RGB, "num_feat": 8, "num_block": 1})
    found = recognised(net.state_dict())
    assert found is not None and found.unknown == ("res_scale", "img_range", "rgb_mean")
    assert len(found.candidates) == 8
    assert (found.options["img_range"], found.options["rgb_mean"]) == (255.0, DIV2K_MEAN)


def test_other_tensors_are_not_recognised() -> None:
    state = random_network({"type": "EDSR", **RGB, "num_feat": 8, "num_block": 1}).state_dict()
    assert recognise({**state, "extra.weight": torch.zeros(3)}) is None
    assert recognise({"weight": torch.zeros(3, 3)}) is None
    assert recognise({}) is None
    assert closest({**state, "extra.weight": torch.zeros(3)}) == "EDSR"
    assert closest({"weight": torch.zeros(3, 3)}) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(shared: Path, name: str) -> None:
    file = shared / "data/weights" / name
    found = recognise(select_weights(read_checkpoint(file), "auto", file, "file"))
    assert found is not None and found.items() >= PUBLISHED[name].items()
