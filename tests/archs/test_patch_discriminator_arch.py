"""The patch discriminator: shapes, locality, independence of the batch."""

import pytest
import torch

from kdsr.archs.patch_discriminator_arch import PatchDiscriminator
from kdsr.runtime.errors import OptionError


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(num_feat=8).eval()


def test_one_number_per_patch_of_70_pixels():
    net, x = discriminator(), torch.rand(1, 3, 128, 128, requires_grad=True)
    out = net(x)
    assert out.shape == (1, 1, 14, 14)
    out[0, 0, 7, 7].backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_images_are_independent():
    net, x = discriminator(), torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize("key", ["num_in_ch", "num_feat", "num_layers"])
def test_numbers_below_one(key):
    with pytest.raises(OptionError, match=f"PatchDiscriminator: {key}: must be at least 1, not 0"):
        PatchDiscriminator(**{key: 0})
