from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdsr.archs.nafnet_arch import LayerNorm2d, LocalAverage, NAFNet, NAFNetLocal
from kdsr.distill.padding import pad_and_restore
from kdsr.runtime.errors import DataError, OptionError

TEACHER = {"width": 32, "middle_blk_num": 1, "enc_blk_nums": [1, 1, 1, 28], "dec_blk_nums": [1, 1, 1, 1]}
STUDENT = {"width": 16, "middle_blk_num": 1, "enc_blk_nums": [1, 1, 1, 14], "dec_blk_nums": [1, 1, 1, 1]}
TINY = {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 2], "dec_blk_nums": [2, 1]}


def published_shapes(width: int, middle: int, down: list[int], up: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, from the paper's structure."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def block(name: str, c: int) -> None:
        shapes[f"{name}.beta"] = shapes[f"{name}.gamma"] = (1, c, 1, 1)
        for norm in ("norm1", "norm2"):
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (c,)
        convolution(f"{name}.conv1", 2 * c, c, 1)
        convolution(f"{name}.conv2", 2 * c, 1, 3)
        convolution(f"{name}.conv3", c, c, 1)
        convolution(f"{name}.sca.1", c, c, 1)
        convolution(f"{name}.conv4", 2 * c, c, 1)
        convolution(f"{name}.conv5", c, c, 1)

    convolution("intro", width, 3, 3)
    convolution("ending", 3, width, 3)
    c = width
    for level, number in enumerate(down):
        for index in range(number):
            block(f"encoders.{level}.{index}", c)
        convolution(f"downs.{level}", 2 * c, c, 2)
        c *= 2
    for index in range(middle):
        block(f"middle_blks.{index}", c)
    for level, number in enumerate(up):
        convolution(f"ups.{level}.0", 2 * c, c, 1, bias=False)
        c //= 2
        for index in range(number):
            block(f"decoders.{level}.{index}", c)
    return shapes


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def seeded(net: nn.Module, spread: float = 0.2) -> nn.Module:
    """Random values in every tensor, in the order of names, so that no zero hides a part of the network."""
    generator = torch.Generator().manual_seed(0)
    state = net.state_dict()
    for name in sorted(state):
        state[name].copy_(torch.randn(state[name].shape, generator=generator) * spread)
    return net.eval()


@pytest.mark.parametrize("options", [TEACHER, STUDENT, TINY], ids=["teacher", "student", "tiny"])
def test_names_and_shapes_are_the_authors(options):
    with torch.device("meta"):
        net = NAFNet(**options)
    expected = published_shapes(*(options[key] for key in TINY))
    assert shapes_of(net) == expected


@pytest.mark.parametrize(("options", "parameters"), [(TEACHER, 17.1e6), (STUDENT, 2.7e6)])
def test_sizes_of_the_dckd_paper(options, parameters):
    with torch.device("meta"):
        net = NAFNet(**options)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(parameters, rel=0.02)
    blocks = options["middle_blk_num"] + sum(options["enc_blk_nums"]) + sum(options["dec_blk_nums"])
    assert blocks == {32: 36, 16: 22}[options["width"]]


def test_output_is_that_of_another_implementation():
    """Numbers recorded from spandrel's NAFNet with the same weights and the same image."""
    net = seeded(NAFNet(**TINY))
    assert len(net.state_dict()) == 136
    x = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x)
    assert y.double().mean().item() == pytest.approx(-0.711004, abs=1e-5)
    assert y.double().std().item() == pytest.approx(1.819834, abs=1e-5)
    pixel = torch.tensor([[-1.6352, -0.871626, 0.355125], [-2.893491, -0.821507, -0.411225]])
    torch.testing.assert_close(y[:, :, 3, 5], pixel, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(16, 18), (15, 16), (1, 1)])
def test_other_sizes_are_refused_and_padding_helps(height, width):
    net = NAFNet(**TINY)
    assert net.multiple_of == 4
    x = torch.rand(1, 3, height, width)
    with pytest.raises(DataError, match=rf"NAFNet: .*multiples of 4, not {height}x{width} pixels"):
        net(x)
    assert pad_and_restore(net, x, net.multiple_of, 1).shape == x.shape


def test_a_fresh_network_is_nearly_the_identity():
    """The branches are initially 0, and the input is added to the output."""
    net = NAFNet(**TINY)
    nn.init.zeros_(net.ending.weight)
    nn.init.zeros_(net.ending.bias)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(net(x), x)


def test_every_parameter_is_trained():
    net = seeded(NAFNet(**TINY)).train()
    net(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_layer_norm_is_the_formula_with_its_gradient():
    norm = LayerNorm2d(5).double()
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    mean = x.mean(1, keepdim=True)
    deviation = ((x - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = (x - mean) / deviation * norm.weight.view(1, 5, 1, 1) + norm.bias.view(1, 5, 1, 1)
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,)),
        (x, *norm.parameters()),
    )


def test_layer_norm_of_flat_and_bright_pixels():
    norm = LayerNorm2d(4)
    flat = torch.full((1, 4, 2, 2), 1000.0)
    torch.testing.assert_close(norm(flat), torch.zeros_like(flat))
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x + 100), norm(x), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_blk_nums": [1, 1], "dec_blk_nums": [1]}, "dec_blk_nums: has 1 levels, but enc_blk_nums has 2"),
        ({"enc_blk_nums": [-1], "dec_blk_nums": [1]}, "enc_blk_nums: must be whole numbers of at least 0"),
        ({"width": 0}, "width: must be at least 1, not 0"),
        ({"middle_blk_num": -1}, "middle_blk_num: must be at least 0, not -1"),
    ],
)
def test_inconsistent_options(options, message):
    with pytest.raises(OptionError, match=message):
        NAFNet(**options)


@pytest.mark.parametrize(
    ("size", "shape"), [((4, 6), (9, 13)), ((3, 5), (8, 8)), ((20, 4), (9, 13)), ((2, 2), (3, 2))]
)
def test_local_average_is_a_sliding_mean(size, shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = [min(length, side) for length, side in zip(size, shape, strict=True)]
    means = F.avg_pool2d(x, window, stride=1)
    down, right = (side - length for side, length in zip(shape, means.shape[2:], strict=True))
    expected = F.pad(means, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
    torch.testing.assert_close(LocalAverage(size)(x), expected)


def test_local_statistics_are_those_of_the_patch_up_to_one_and_a_half_patches():
    net, local = seeded(NAFNet(**TINY)), seeded(NAFNetLocal(**TINY, train_size=[1, 3, 16, 16]))
    windows = {
        name: module.size for name, module in local.named_modules() if isinstance(module, LocalAverage)
    }
    assert windows["encoders.0.0.sca.0"] == windows["decoders.1.0.sca.0"] == (24, 24)
    assert windows["encoders.1.1.sca.0"] == windows["decoders.0.1.sca.0"] == (12, 12)
    assert windows["middle_blks.0.sca.0"] == (6, 6) and len(windows) == 7
    assert shapes_of(local) == shapes_of(net)
    generator = torch.Generator().manual_seed(0)
    patch, image = (
        torch.rand(1, 3, 24, 20, generator=generator),
        torch.rand(1, 3, 32, 24, generator=generator),
    )
    image[:, :, :16] *= 0.1  # a dark half, which has means of its own
    with torch.no_grad():
        torch.testing.assert_close(local(patch), net(patch))
        assert local(image).shape == image.shape
        assert (local(image) - net(image)).abs().max() > 1e-3
    with pytest.raises(OptionError, match="NAFNetLocal: train_size: must end in the height and width"):
        NAFNetLocal(**TINY, train_size=[256])
