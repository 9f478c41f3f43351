"""VQGAN against DCKD's release and taming-transformers' names."""

import re

import pytest
import torch

import kdsr  # noqa: F401  # isort: skip  (makes basicsr importable)
from basicsr.archs import build_network

from kdsr.archs.vqgan_arch import VQGAN
from kdsr.options.check import check
from kdsr.runtime.errors import DataError, OptionError

SMALL = {
    "in_channels": 3, "out_ch": 3, "resolution": 64, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1,
    "attn_resolutions": [16], "dropout": 0.0, "double_z": False, "z_channels": 16,
}  # fmt: skip
F16 = {
    "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


def small(seed: int = 0, **options) -> VQGAN:
    torch.manual_seed(seed)
    net = VQGAN(8, 20, SMALL, **options)
    torch.nn.init.normal_(net.quantize.embedding.weight)  # its own initial codes all lie within 1/20 of zero
    return net


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", ["dckd_a", "dckd_b"])
@pytest.mark.parametrize("image", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_and_distribution_are_the_releases(shared, name, image, dtype):
    golden = torch.load(shared / "golden" / f"{name}.pt", weights_only=True)
    net = VQGAN(**golden["config"]).eval()
    net.load_state_dict(golden["state_dict"])
    features, logits = features_and_logits(net.to(dtype), golden[image].to(dtype))
    assert logits.dtype == dtype and [f.dtype for f in features] == [dtype] * 5
    expected = golden["features"][image]
    assert [f.shape for f in features] == [f.shape for f in expected]
    for ours, theirs in zip(features, expected, strict=True):
        assert distance(ours, theirs.to(dtype)) < 1e-5
    assert distance(logits.softmax(1), golden["distribution"][image].to(dtype)) < 1e-5


def test_full_size_has_tamings_names_and_shapes():
    with torch.device("meta"):
        net = build_network(
            {"type": "VQGAN", "embed_dim": 256, "n_embed": 1024, "ddconfig": F16, "decoder": True}
        )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "encoder.down.1.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.1.norm2.bias": (256,),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.bias": (512,),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (256, 256, 1, 1),
        "quantize.embedding.weight": (1024, 256),
        "post_quant_conv.weight": (256, 256, 1, 1),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.mid.attn_1.norm.weight": (512,),
        "decoder.up.4.attn.2.v.weight": (512, 512, 1, 1),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = [
        "encoder.down.4.downsample",
        "encoder.down.3.attn",
        "decoder.up.0.upsample",
        "decoder.up.3.attn",
    ]
    assert not [name for name in shapes if name.startswith(tuple(absent))]
    # two blocks a level, two of five levels widened, attention in two of them and in the middle
    encoder = 2 + (10 * 8 + 2 * 2) + 4 * 2 + 2 * 10 + (2 * 8 + 10) + 4
    assert sum(name.startswith("encoder.") for name in shapes) == encoder
    decoder = 2 + (15 * 8 + 2 * 2) + 4 * 2 + 3 * 10 + (2 * 8 + 10) + 4
    assert sum(name.startswith("decoder.") for name in shapes) == decoder
    assert len(shapes) == encoder + decoder + 5


def features_and_logits(net, x):
    features = net(x)
    return features, net.code_logits(features)


def test_logits_are_negative_squared_distances_by_n_h_w():
    net = small().double()
    x = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    features, logits = features_and_logits(net, x)
    z = net.encoding(features)
    assert logits.shape == (2 * 2 * 3, 20)
    for n, h, w, code in [(0, 0, 0, 0), (0, 1, 2, 7), (1, 0, 1, 19), (1, 1, 2, 3)]:
        direct = -(z[n, :, h, w] - net.quantize.embedding.weight[code]).square().sum()
        torch.testing.assert_close(logits[(n * 2 + h) * 3 + w, code], direct)


def test_input_range_maps_images_linearly():
    x = torch.rand(1, 3, 16, 16)
    features, logits = features_and_logits(small(input_range=(-1, 1)), x)
    theirs, their_logits = features_and_logits(small(), 2 * x - 1)
    torch.testing.assert_close(features, theirs)
    torch.testing.assert_close(logits, their_logits)
    symmetric, plain = small(input_range=(-1, 1), decoder=True), small(decoder=True)
    torch.testing.assert_close(symmetric.reconstruct(x).image, plain.reconstruct(2 * x - 1).image / 2 + 0.5)


def test_any_size_from_the_smallest_on():
    net = small()
    features, logits = features_and_logits(net, torch.rand(2, 3, 13, 22))
    assert [tuple(f.shape[2:]) for f in features] == [(13, 22), (6, 11), (3, 5)]
    assert logits.shape == (2 * 3 * 5, 20)
    assert net.multiple_of == 4
    net(torch.rand(2, 3, 4, 4))
    with pytest.raises(DataError, match="3x40 pixels are too small.*4 or more"):
        net(torch.rand(1, 3, 3, 40))


def test_reconstruction_needs_multiples():
    with pytest.raises(DataError, match="16x18 pixels.*multiples of 4"):
        small(decoder=True).reconstruct(torch.rand(1, 3, 16, 18))


def test_reconstruction_goes_straight_through():
    net = small(decoder=True)
    x = torch.rand(2, 3, 16, 24)
    result = net.reconstruct(x)
    assert result.image.shape == x.shape
    assert result.encoding.shape == result.quantized.shape == (2, 8, 4, 6)
    assert torch.equal(result.codes.flatten(), features_and_logits(net, x)[1].argmax(1))
    nearest = torch.cdist(result.encoding.permute(0, 2, 3, 1).reshape(-1, 8), net.quantize.embedding.weight)
    assert torch.equal(result.codes.flatten(), nearest.argmin(1))
    torch.testing.assert_close(result.image, net.decode(result.quantized))
    result.image.square().mean().backward(retain_graph=True)
    assert net.encoder.conv_in.weight.grad.abs().sum() > 0
    assert net.quantize.embedding.weight.grad is None
    result.quantized.sum().backward()
    assert net.quantize.embedding.weight.grad.abs().sum() > 0


def test_reduced_precision_keeps_distances_in_float32():
    net = small()
    x = torch.rand(2, 3, 32, 32)
    features, logits = features_and_logits(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        reduced, reduced_logits = features_and_logits(net, x)
    assert reduced[1].dtype == torch.bfloat16 and reduced_logits.dtype == torch.float32
    assert distance(reduced[1].float(), features[1]) < 0.02
    assert distance(reduced_logits, logits) < 0.05
    assert features_and_logits(net.bfloat16(), x.bfloat16())[1].dtype == torch.float32


def test_groups_of_the_normalisation():
    net = VQGAN(8, 20, SMALL | {"norm_groups": 8})
    assert {m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert {m.num_groups for m in small().modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    assert net.state_dict().keys() == small().state_dict().keys()


def test_a_fresh_network_lets_the_image_through():
    x = torch.rand(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.manual_seed(0)
    net = VQGAN(64, 20, SMALL | {"ch_mult": [1, 1, 1, 1, 1], "z_channels": 64})
    features = net(x)
    z = net.encoding(features)
    assert all(0.5 < feature.std() < 5 for feature in features) and 0.3 < z.std() < 3


def test_attention_follows_the_configured_resolution():
    attended = {name for name in small().state_dict() if ".attn." in name}
    assert {name.split(".")[2] for name in attended} == {"2"}
    other = VQGAN(8, 20, SMALL | {"resolution": 32})
    assert {name.split(".")[2] for name in other.state_dict() if ".attn." in name} == {"1"}


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(OptionError) as caught:
        build_network(
            {
                "type": "VQGAN",
                "embed_dim": 8,
                "n_embed": 20,
                "ddconfig": SMALL | {"num_res_block": 2, "atn": 1},
            }
        )
    assert "ddconfig.num_res_block: no such key; did you mean num_res_blocks" in str(caught.value)
    assert "ddconfig.atn" in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ch": 24}, "multiple of 32, not 24"),
        ({"norm_groups": 5}, "multiple of 5, not 32"),
        ({"double_z": True}, "double_z"),
        ({"ch_mult": "1,1,2"}, "ch_mult: is a list of whole numbers"),
        ({"ch_mult": []}, "at least one level"),
        ({"num_res_blocks": "two"}, "num_res_blocks: is a whole number"),
        ({"num_res_blocks": 0}, "num_res_blocks: must be at least 1"),
        ({"z_channels": 0}, "z_channels: must be at least 1"),
        ({"ch_mult": [1, 0]}, "ch_mult: its numbers must be at least 1"),
        ({"dropout": 1.0}, "dropout: is a rate from 0 to below 1, not 1.0"),
        ({"dropout": "some"}, "dropout: is a rate"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(OptionError, match=message):
        VQGAN(8, 20, SMALL | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_range": [None, 1]}, "input_range: is \\[low, high\\], two numbers"),
        ({"input_range": ["a", "b"]}, "input_range: is"),
        ({"input_range": [0, float("inf")]}, "input_range: is"),
        ({"ddconfig": [1, 2]}, "ddconfig: is a section, not \\[1, 2\\]"),
        ({"ddconfig": None}, "ddconfig: is a section, not None"),
        ({"embed_dim": 0}, "embed_dim: must be at least 1, not 0"),
        ({"n_embed": -1}, "n_embed: must be at least 1, not -1"),
    ],
)
def test_impossible_options(change, message):
    options = {"embed_dim": 8, "n_embed": 20, "ddconfig": SMALL} | change
    with pytest.raises(OptionError, match=f"VQGAN: {message}"):
        VQGAN(**options)
    problems = check({"model_type": "DCKDModel", "network_vqgan": {"type": "VQGAN"} | options}, is_train=True)
    assert any(re.match(f"network_vqgan.{message}", problem) for problem in problems)


def test_option_check_sees_into_ddconfig():
    network = {"type": "VQGAN", "embed_dim": 8, "n_embed": 20, "ddconfig": SMALL | {"chanels": 3}}
    problems = check({"model_type": "DCKDModel", "network_vqgan": network}, is_train=True)
    assert [p for p in problems if p.startswith("network_vqgan")] == [
        "network_vqgan.ddconfig.chanels: no such key; did you mean z_channels or in_channels?"
    ]


def test_missing_key_and_wrong_range():
    with pytest.raises(OptionError, match="ddconfig.z_channels: missing"):
        VQGAN(8, 20, {key: value for key, value in SMALL.items() if key != "z_channels"})
    with pytest.raises(OptionError, match="input_range"):
        VQGAN(8, 20, SMALL, input_range=(1, 0))
