from __future__ import annotations

import cv2
import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from basicsr.utils import img2tensor, tensor2img
from torch import nn

from kdsr.archs.rlfn_arch import RLFN


def published(shared, name: str, **options) -> nn.Module:
    net = build_network({"type": "RLFN", **options})
    file = shared / "data" / "weights" / "RLFN" / f"{name}.pth"
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    return net.eval()


def mean_psnr(net: nn.Module, folder, scale: int) -> float:
    """PSNR as in the papers: Y channel, without a border of `scale` pixels."""
    values = []
    for file in sorted((folder / f"LR_x{scale}").iterdir()):
        lq = img2tensor(cv2.imread(str(file)) / 255.0)[
            None
        ].float()  # a grey file becomes three equal channels
        with torch.no_grad():
            restored = tensor2img(net(lq))
        gt = cv2.imread(str(folder / f"GT_x{scale}" / file.name))
        values.append(calculate_psnr(restored, gt, crop_border=scale, test_y_channel=True))
    assert values
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "options", "benchmark", "decibel"),
    [
        ("rlfn_x4", {}, "Set5", 32.24),
        ("rlfn_x4", {}, "Set14", 28.62),
        pytest.param("rlfn_x2", {"upscale": 2}, "Set5", 38.07, marks=pytest.mark.slow),
        ("rlfn_s_x4", {"feature_channels": 48}, "Set5", 32.24),
    ],
    ids=["x4-Set5", "x4-Set14", "x2-Set5", "S-x4-Set5"],
)
def test_published_numbers(shared, name, options, benchmark, decibel):
    net = published(shared, name, **options)
    scale = options.get("upscale", 4)
    assert mean_psnr(net, shared / "data" / benchmark, scale) == pytest.approx(decibel, abs=0.01)


def test_sizes_of_the_paper_and_of_the_student():
    parameters = [
        sum(parameter.numel() for parameter in RLFN(**options).parameters())
        for options in ({}, {"feature_channels": 18, "num_blocks": 4, "esa_channels": 8})
    ]
    assert parameters == [543_740, 54_054]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 40), (15, 15), (17, 23)])
def test_any_size_goes_through(height, width):
    net = RLFN(feature_channels=8, num_blocks=1, esa_channels=4, upscale=3)
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    assert net(x).shape == (2, 3, 3 * height, 3 * width)


def test_small_image_is_the_corner_of_its_padded_self():
    net = RLFN(feature_channels=8, num_blocks=2, esa_channels=4, upscale=2).eval()
    x = torch.rand(1, 3, 10, 20, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, 5, -1)], 2)
    torch.testing.assert_close(net(x), net(padded)[:, :, :20])


def test_range_is_inside():
    torch.manual_seed(0)
    net = RLFN(feature_channels=8, num_blocks=2, esa_channels=4).eval()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inside = RLFN(feature_channels=8, num_blocks=2, esa_channels=4, img_range=1.0).eval()
    inside.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), inside(x * 255) / 255)


def test_every_parameter_is_trained():
    net = RLFN(feature_channels=8, num_blocks=2, esa_channels=4)
    net(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0] == []
