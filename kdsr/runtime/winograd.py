"""3x3 convolutions of frozen networks on a CPU by Winograd's algorithm F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv 1509.09308). A tile of 4x4 outputs
takes 36 multiplications per pair of channels in place of 144; the transforms around them take some of the gain. In
float32 the rounding error is about three times that of a direct convolution (docs/benchmarks.md, "Levers").
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHANNELS = range(96, 257)  # fewer: the transforms outweigh the gain; more: so do 36 weights in place of 9
SMALLEST = 24  # side of the images from which on it is faster
_TILES = 40  # of a block, so that its data stay in the second-level cache

# The matrices of the paper (equations 9 to 13) for the points 0, 1, -1, 2, -2 and infinity.
_INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_WEIGHT = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_ONE = 7  # a constant at this place of a transformed tile is that constant in all of its outputs


@functools.lru_cache(maxsize=1)
def _transforms() -> tuple[Tensor, Tensor]:
    """Of a flattened tile: inputs (36, 36) and outputs (16, 36)."""
    rows, columns = torch.tensor(_INPUT, dtype=torch.float32), torch.tensor(_OUTPUT, dtype=torch.float32)
    return torch.kron(rows, rows), torch.kron(columns, columns)


def transformed(weight: Tensor) -> Tensor:
    """A weight (O, C, 3, 3) in Winograd's domain: (36, C, O)."""
    matrix = torch.tensor(_WEIGHT, dtype=torch.float64, device=weight.device)
    tiles = torch.einsum("ai,ocij,bj->abco", matrix, weight.double(), matrix)
    return tiles.reshape(36, weight.shape[1], weight.shape[0]).to(weight.dtype)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution with padding 1: x (N, C, H, W), weight (36, C, O) of ``transformed`` -> (N, O, H, W).

    Outside autograd. The result is in ``channels_last``.
    """
    of_inputs, of_outputs = _transforms()
    images, inputs, height, width = x.shape
    outputs = weight.shape[2]
    down, across = -(-height // 4), -(-width // 4)  # tiles
    padded = x.new_empty(images, 4 * down + 2, 4 * across + 2, inputs)
    for edge in (padded[:, 0], padded[:, height + 1 :], padded[:, :, 0], padded[:, :, width + 1 :]):
        edge.zero_()
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    image, row, column, _ = padded.stride()
    tiles = padded.as_strided(
        (images, 6, 6, down, across, inputs), (image, row, column, 4 * row, 4 * column, 1)
    )
    result = x.new_empty(images, 4 * down, 4 * across, outputs)
    target = result.view(images, down, 4, across, 4, outputs).permute(0, 2, 4, 1, 3, 5)
    step = max(1, round(_TILES / across))
    one, other = x.new_empty(2, 36 * step * across * max(inputs, outputs))  # buffers, used in turn
    for index in range(images):
        for top in range(0, down, step):
            rows = min(step, down - top)
            count = rows * across
            block = one[: 36 * count * inputs].view(36, count * inputs)
            block.view(6, 6, rows, across, inputs).copy_(tiles[index, :, :, top : top + rows])
            taps = other[: block.numel()].view(36, count, inputs)
            torch.mm(of_inputs, block, out=taps.view(36, -1))
            products = one[: 36 * count * outputs].view(36, count, outputs)
            torch.bmm(taps, weight, out=products)
            if bias is not None:
                products[_ONE] += bias
            found = other[: 16 * count * outputs].view(16, count * outputs)
            torch.mm(of_outputs, products.view(36, -1), out=found)
            target[index, :, :, top : top + rows] = found.view(4, 4, rows, across, outputs)
    return result[:, :height, :width].permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """``convolve`` with a gradient of the input."""

    @staticmethod
    def forward(ctx, x: Tensor, convolution: Winograd) -> Tensor:
        ctx.convolution = convolution
        return convolve(x, convolution.weight, convolution.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return convolve(gradient, ctx.convolution.backward_weight), None


class Winograd:
    """The forward pass of a frozen 3x3 convolution; images that are too small go through the convolution itself."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.direct = convolution.forward
        self.original = convolution.weight
        self.weight, self.bias = transformed(convolution.weight.detach()), convolution.bias

    @functools.cached_property
    def backward_weight(self) -> Tensor:
        return transformed(self.original.detach().transpose(0, 1).flip(2, 3))

    def __call__(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < SMALLEST or x.dim() != 4 or x.dtype is not self.weight.dtype:
            return self.direct(x)
        if x.requires_grad and torch.is_grad_enabled():
            return _Convolution.apply(x, self)
        with torch.no_grad():
            return convolve(x, self.weight, self.bias)


def use_winograd(net: nn.Module) -> int:
    """Lets the 3x3 convolutions of a frozen network for which it is faster use Winograd's algorithm.

    Returns:
        How many they are. Their parameters stay, and their ``forward`` is replaced.
    """
    found = [module for module in net.modules() if type(module) is nn.Conv2d and _is_faster(module)]
    for convolution in found:
        convolution.forward = Winograd(convolution)  # type: ignore[assignment, method-assign]
    return len(found)


def _is_faster(convolution: nn.Conv2d) -> bool:
    shape = (convolution.kernel_size, convolution.stride, convolution.dilation, convolution.groups)
    weight = convolution.weight
    return (
        shape == ((3, 3), (1, 1), (1, 1), 1)
        and convolution.padding in ((1, 1), 1)
        and convolution.padding_mode == "zeros"
        and convolution.in_channels in CHANNELS
        and convolution.out_channels in CHANNELS
        and weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and not weight.requires_grad
    )
