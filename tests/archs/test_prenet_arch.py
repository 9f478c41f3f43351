from __future__ import annotations

import cv2
import pytest
import torch
from basicsr.metrics import calculate_psnr
from basicsr.utils import img2tensor, tensor2img

from kdsr.archs.prenet_arch import PReNet
from kdsr.runtime.errors import OptionError

KINDS = {
    "PReNet6": ({}, 168_963),
    "PRN6_r": ({"lstm": False, "recursive": True}, 21_123),
}


@pytest.mark.parametrize("name", KINDS)
def test_published_weights_remove_rain(shared, name):
    """A part of a real pair; the whole images are measured in test_published.py."""
    options, parameters = KINDS[name]
    net = PReNet(**options).eval()
    file = shared / "data" / "weights" / "PReNet" / "Rain1400" / name / "net_latest.pth"
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    rain, clean = (
        cv2.imread(str(shared / "data" / "DDN_rain" / folder / "2.jpg"))[100:197, 100:203]
        for folder in ("rain", "GT")
    )
    with torch.no_grad():
        restored = tensor2img(net(img2tensor(rain / 255.0)[None].float()))
    before, after = (
        calculate_psnr(image, clean, crop_border=0, test_y_channel=True) for image in (rain, restored)
    )
    assert after > before + 6, (before, after)


def test_the_other_two_networks_of_the_paper():
    sizes = {
        (lstm, recursive): sum(p.numel() for p in PReNet(lstm=lstm, recursive=recursive).parameters())
        for lstm in (True, False)
        for recursive in (True, False)
    }
    # of five residual blocks four more than one: 4 * 2 * (32 * 32 * 9 + 32)
    assert sizes[True, False] - sizes[True, True] == sizes[False, False] - sizes[False, True] == 73_984
    assert sizes[True, False] - sizes[False, False] == sizes[True, True] - sizes[False, True] == 73_856


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("lstm", [True, False])
def test_any_size_and_every_parameter_is_trained(lstm, recursive):
    torch.manual_seed(0)
    net = PReNet(num_feat=8, recurrent_iter=3, num_block=2, lstm=lstm, recursive=recursive)
    x = torch.rand(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    y = net(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_each_stage_sees_the_last_one():
    """Without an LSTM a stage depends on the input and the previous output."""
    torch.manual_seed(0)
    options = {"num_feat": 8, "num_block": 2, "lstm": False}
    one, two = (PReNet(recurrent_iter=number, **options) for number in (1, 2))
    two.load_state_dict(one.state_dict())
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stage = one.conv0[0]
    first = one(x)
    torch.testing.assert_close(two(x) - x, body(one, torch.relu(stage(torch.cat([x, first], 1)))))


def body(net: PReNet, h: torch.Tensor) -> torch.Tensor:
    for block in (net.res_conv1, net.res_conv2):
        h = torch.relu(h + block(h))
    return net.conv(h)


def test_numbers_below_one_are_refused():
    with pytest.raises(OptionError, match="recurrent_iter: must be at least 1, not 0") as caught:
        PReNet(recurrent_iter=0, num_feat=0)
    assert len(caught.value.problems) == 2
