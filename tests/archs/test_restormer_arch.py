from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.archs.restormer_arch import Restormer
from kdsr.archs.restormer_blocks import Attention, layer_norm
from kdsr.distill.padding import pad_and_restore
from kdsr.runtime.errors import DataError, OptionError

TEACHER = {"dim": 48, "num_blocks": [4, 6, 6, 8], "num_refinement_blocks": 4}
STUDENT = {"dim": 24, "num_blocks": [2, 3, 3, 4], "num_refinement_blocks": 2}
TINY = {"dim": 8, "num_blocks": [1, 2, 1, 1], "num_refinement_blocks": 1}
HEADS = [1, 2, 4, 8]
KINDS = [
    {},
    {"LayerNorm_type": "BiasFree"},
    {"bias": True},
    {"inp_channels": 6, "dual_pixel_task": True},
]
KIND_NAMES = ["WithBias", "BiasFree", "bias", "dual_pixel"]


def published_shapes(
    dim: int, blocks: list[int], refinement: int, kind: dict | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, from the paper's structure."""
    kind = kind or {}
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int, bias: bool | None = None) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        if kind.get("bias", False) if bias is None else bias:
            shapes[f"{name}.bias"] = (out,)

    def level(name: str, c: int, heads: int, number: int) -> None:
        hidden = int(c * 2.66)
        for index in range(number):
            block = f"{name}.{index}"
            for norm in ("norm1", "norm2"):
                shapes[f"{block}.{norm}.body.weight"] = (c,)
                if kind.get("LayerNorm_type") != "BiasFree":
                    shapes[f"{block}.{norm}.body.bias"] = (c,)
            shapes[f"{block}.attn.temperature"] = (heads, 1, 1)
            convolution(f"{block}.attn.qkv", 3 * c, c, 1)
            convolution(f"{block}.attn.qkv_dwconv", 3 * c, 1, 3)
            convolution(f"{block}.attn.project_out", c, c, 1)
            convolution(f"{block}.ffn.project_in", 2 * hidden, c, 1)
            convolution(f"{block}.ffn.dwconv", 2 * hidden, 1, 3)
            convolution(f"{block}.ffn.project_out", c, hidden, 1)

    convolution("patch_embed.proj", dim, kind.get("inp_channels", 3), 3, bias=False)
    for index, name in enumerate(("encoder_level1", "encoder_level2", "encoder_level3", "latent")):
        level(name, dim * 2**index, HEADS[index], blocks[index])
    for name, c in (("down1_2", dim), ("down2_3", 2 * dim), ("down3_4", 4 * dim)):
        convolution(f"{name}.body.0", c // 2, c, 3, bias=False)
    for name, c in (("up4_3", 8 * dim), ("up3_2", 4 * dim), ("up2_1", 2 * dim)):
        convolution(f"{name}.body.0", 2 * c, c, 3, bias=False)
    convolution("reduce_chan_level3", 4 * dim, 8 * dim, 1)
    convolution("reduce_chan_level2", 2 * dim, 4 * dim, 1)
    level("decoder_level3", 4 * dim, HEADS[2], blocks[2])
    level("decoder_level2", 2 * dim, HEADS[1], blocks[1])
    level("decoder_level1", 2 * dim, HEADS[0], blocks[0])
    level("refinement", 2 * dim, HEADS[0], refinement)
    if kind.get("dual_pixel_task"):
        convolution("skip_conv", 2 * dim, dim, 1)
    convolution("output", 3, 2 * dim, 3)
    return shapes


def seeded(net: nn.Module) -> nn.Module:
    """Random values in every tensor, in the order of names, so that no zero hides a part of the network."""
    generator = torch.Generator().manual_seed(0)
    state = net.state_dict()
    for name in sorted(state):
        state[name].copy_(torch.randn(state[name].shape, generator=generator) * 0.2)
    return net.eval()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("options", [TEACHER, STUDENT, TINY], ids=["teacher", "student", "tiny"])
def test_names_and_shapes_are_the_authors(options, kind):
    with torch.device("meta"):
        net = Restormer(**options, **kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes == published_shapes(*options.values(), kind)


@pytest.mark.parametrize(("options", "parameters"), [(TEACHER, 26.1e6), (STUDENT, 3.8e6)])
def test_sizes_of_the_dckd_paper(options, parameters):
    with torch.device("meta"):
        net = Restormer(**options)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(parameters, rel=0.02)
    down = options["num_blocks"]
    assert sum(down) + sum(down[:3]) + options["num_refinement_blocks"] == {48: 44, 24: 22}[options["dim"]]


def by_the_paper(state: dict[str, Tensor], x: Tensor, options: dict, kind: dict) -> Tensor:
    """The paper's equations, term by term, on a state dict."""

    def convolution(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        depthwise = weight.shape[1] == 1
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1] if depthwise else 1)

    def norm(name: str, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        deviation = ((x - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
        weight, bias = state[f"{name}.body.weight"].view(1, -1, 1, 1), state.get(f"{name}.body.bias")
        if bias is None:
            return x / deviation * weight
        return (x - mean) / deviation * weight + bias.view(1, -1, 1, 1)

    def block(name: str, x: Tensor) -> Tensor:
        temperature = state[f"{name}.attn.temperature"]
        heads = len(temperature)
        maps = convolution(
            f"{name}.attn.qkv_dwconv", convolution(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        )
        attended = []
        for q, k, v in zip(*(part.chunk(heads, 1) for part in maps.chunk(3, 1)), strict=True):
            q, k, v = (part.flatten(2) for part in (q, k, v))
            similar = F.cosine_similarity(q.unsqueeze(2), k.unsqueeze(1), dim=-1)
            weights = torch.softmax(similar * temperature[len(attended)], -1)
            attended.append(torch.einsum("nij,njp->nip", weights, v).view(len(x), -1, *x.shape[2:]))
        x = x + convolution(f"{name}.attn.project_out", torch.cat(attended, 1))
        gate, value = convolution(
            f"{name}.ffn.dwconv", convolution(f"{name}.ffn.project_in", norm(f"{name}.norm2", x))
        ).chunk(2, 1)
        gate = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
        return x + convolution(f"{name}.ffn.project_out", gate * value)

    def level(name: str, x: Tensor, number: int) -> Tensor:
        for index in range(number):
            x = block(f"{name}.{index}", x)
        return x

    def down(name: str, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(convolution(f"{name}.body.0", x), 2)

    def up(name: str, x: Tensor) -> Tensor:
        return F.pixel_shuffle(convolution(f"{name}.body.0", x), 2)

    blocks = options["num_blocks"]
    first = convolution("patch_embed.proj", x)
    one = level("encoder_level1", first, blocks[0])
    two = level("encoder_level2", down("down1_2", one), blocks[1])
    three = level("encoder_level3", down("down2_3", two), blocks[2])
    h = level("latent", down("down3_4", three), blocks[3])
    h = convolution("reduce_chan_level3", torch.cat([up("up4_3", h), three], 1))
    h = level("decoder_level3", h, blocks[2])
    h = convolution("reduce_chan_level2", torch.cat([up("up3_2", h), two], 1))
    h = level("decoder_level2", h, blocks[1])
    h = level("decoder_level1", torch.cat([up("up2_1", h), one], 1), blocks[0])
    h = level("refinement", h, options["num_refinement_blocks"])
    if kind.get("dual_pixel_task"):
        return convolution("output", h + convolution("skip_conv", first))
    return convolution("output", h) + x


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_it_computes_the_equations_of_the_paper(kind):
    net = seeded(Restormer(**TINY, **kind)).double()
    x = torch.rand(
        2, kind.get("inp_channels", 3), 16, 24, generator=torch.Generator().manual_seed(1)
    ).double()
    with torch.no_grad():
        torch.testing.assert_close(net(x), by_the_paper(net.state_dict(), x, TINY, kind))


@pytest.mark.parametrize(("height", "width"), [(16, 20), (15, 16), (1, 1)])
def test_other_sizes_are_refused_and_padding_helps(height, width):
    net = Restormer(**TINY)
    assert net.multiple_of == 8
    x = torch.rand(1, 3, height, width)
    with pytest.raises(DataError, match=rf"Restormer: .*multiples of 8, not {height}x{width} pixels"):
        net(x)
    assert pad_and_restore(net, x, net.multiple_of, 1).shape == x.shape


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_every_parameter_is_trained(kind):
    net = seeded(Restormer(**TINY, **kind)).train()
    x = torch.rand(1, kind.get("inp_channels", 3), 16, 16, generator=torch.Generator().manual_seed(0))
    net(x).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", ["WithBias", "BiasFree"])
def test_layer_norms_have_right_gradients(kind):
    norm = layer_norm(5, kind).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    names, tensors = zip(*norm.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *given: torch.func.functional_call(norm, dict(zip(names, given, strict=True)), (x,)),
        (x, *tensors),
    )


def test_gradients_of_attention_also_for_a_black_image():
    attention = seeded(Attention(4, 2, bias=False)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,))
    black = torch.zeros(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    out = attention(black)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and black.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_blocks": [1, 2, 3]},
            "num_blocks: must be four whole numbers of at least 0, not \\[1, 2, 3\\]",
        ),
        ({"heads": [1, 2, 4, 0]}, "heads: must be four whole numbers of at least 1"),
        ({"heads": [1, 2, 5, 8]}, "heads: 5 does not divide the channels of its level"),
        ({"dim": 7, "heads": [1, 1, 1, 1]}, "dim: must be even, not 7"),
        ({"LayerNorm_type": "NoBias"}, "LayerNorm_type: 'NoBias' is neither WithBias nor BiasFree"),
        ({"inp_channels": 6}, "out_channels: is 3, but the 6 channels of the input are added to the output"),
        ({"ffn_expansion_factor": 0.001}, "ffn_expansion_factor: 0.001 leaves no channel"),
    ],
)
def test_inconsistent_options(options, message):
    with pytest.raises(OptionError, match=message):
        Restormer(**options)
