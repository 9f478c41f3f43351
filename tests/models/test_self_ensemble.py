"""The mean of eight views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.models.self_ensemble import self_ensemble


class Lopsided(nn.Module):
    """×2, and another answer to each view: its kernel has no symmetry, what it adds depends on the place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.linspace(0, 1, x.shape[-1]) + 2 * torch.linspace(0, 1, x.shape[-2])[:, None]
        return F.interpolate(torch.tanh(self.conv(x)) * place, scale_factor=2)


@pytest.mark.parametrize("size", [(6, 6), (5, 9), (1, 4)])
@torch.no_grad()
def test_it_is_the_mean_over_flips_and_transposes(size: tuple[int, int]) -> None:
    net, lq = Lopsided(), torch.rand(2, 3, *size)
    answers = [
        net(lq),
        net(lq.flip(3)).flip(3),
        net(lq.flip(2)).flip(2),
        net(lq.flip(2, 3)).flip(2, 3),
        net(lq.transpose(2, 3)).transpose(2, 3),
        net(lq.flip(3).transpose(2, 3)).transpose(2, 3).flip(3),
        net(lq.flip(2).transpose(2, 3)).transpose(2, 3).flip(2),
        net(lq.flip(2, 3).transpose(2, 3)).transpose(2, 3).flip(2, 3),
    ]
    if size[0] != 1:
        assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(answers) for other in answers[:i])
    torch.testing.assert_close(self_ensemble(net)(lq), torch.stack(answers).mean(0))


def test_the_image_and_the_answers_are_left_alone() -> None:
    lq = torch.rand(1, 3, 4, 5)
    before = lq.clone()
    result = self_ensemble(nn.Identity())(lq)
    torch.testing.assert_close(result, before)
    assert torch.equal(lq, before)


def test_views_are_contiguous() -> None:
    """Networks may reshape their input by ``view``."""
    self_ensemble(lambda x: x.view(*x.shape[:2], -1).view(x.shape))(torch.rand(1, 3, 4, 6))
