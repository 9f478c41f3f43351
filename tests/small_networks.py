"""Reduced sizes of the networks of option files, for tests that run those files."""

from __future__ import annotations

from typing import Any

# parameter (a path below it with colons) -> value, by network
SMALL: dict[str, dict[str, Any]] = {
    "SwinIR": {"depths": [2], "num_heads": [2], "embed_dim": 8},
    "RCAN": {"num_feat": 16, "num_group": 1, "num_block": 1},
    "EDSR": {"num_feat": 8, "num_block": 1},
    "RRDBNet": {"num_feat": 8, "num_block": 1, "num_grow_ch": 4},
    "SRVGGNetCompact": {"num_feat": 8, "num_conv": 1},
    "MSRResNet": {"num_feat": 8, "num_block": 1},
    "SmallNet": {"num_feat": 8, "num_block": 1},
    "FiveLines": {"width": 8},
    "RLFN": {"feature_channels": 8, "num_blocks": 1, "esa_channels": 4},
    "VQGAN": {"embed_dim": 8, "n_embed": 16, "ddconfig:ch": 32, "ddconfig:ch_mult": [1, 1, 1, 1, 1],
              "ddconfig:num_res_blocks": 1, "ddconfig:z_channels": 8, "ddconfig:attn_resolutions": []},
    "NAFNet": {"width": 8, "enc_blk_nums": [1, 1, 1, 1], "dec_blk_nums": [1, 1, 1, 1]},
    "NAFNetLocal": {"width": 8, "enc_blk_nums": [1, 1, 1, 1], "dec_blk_nums": [1, 1, 1, 1]},
    "Restormer": {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1},
    "PReNet": {"num_feat": 8, "recurrent_iter": 2, "num_block": 1},
    "PatchDiscriminator": {"num_feat": 8},
    "VGG19": {},
    "SpandrelNet": {"parameters:feature_channels": 8},
}  # fmt: skip


def small_vqgan(levels: int = 5, n_embed: int = 16, resolution: int = 64, **options: Any) -> dict[str, Any]:
    """Options of a VQGAN of 32 channels that shrinks images by ``2 ** (levels - 1)``."""
    ddconfig = {
        "ch": 32, "ch_mult": [1] * levels, "num_res_blocks": 1, "z_channels": 8, "resolution": resolution,
        "attn_resolutions": [],
    }  # fmt: skip
    return {"type": "VQGAN", "embed_dim": 8, "n_embed": n_embed, "ddconfig": ddconfig, **options}
