"""The losses of a VQGAN: values by hand, gradients, the adaptive weight."""

import pytest
import torch
from torch import nn

from kdsr.losses.vq_loss import VQLoss, adaptive_weight, codebook_loss, commitment_loss


def test_values_and_gradients():
    encoding = torch.tensor([[1.0, 3.0]], requires_grad=True)
    quantized = torch.tensor([[2.0, 0.0]], requires_grad=True)
    assert commitment_loss(encoding, quantized).item() == codebook_loss(encoding, quantized).item() == 5.0
    commitment_loss(encoding, quantized).backward()
    assert quantized.grad is None
    torch.testing.assert_close(encoding.grad, torch.tensor([[-1.0, 3.0]]))
    encoding.grad = None
    codebook_loss(encoding, quantized).backward()
    assert encoding.grad is None
    torch.testing.assert_close(quantized.grad, torch.tensor([[1.0, -3.0]]))


def test_half_precision_is_raised_and_double_kept():
    a, b = torch.full((1000,), 256.0), torch.full((1000,), 255.0)
    assert commitment_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert commitment_loss(a.double(), b.double()).dtype == torch.float64


def test_module_weighs_both():
    encoding, quantized = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    commitment, codebook = VQLoss(commitment_weight=0.5, codebook_weight=2.0)(encoding, quantized)
    torch.testing.assert_close(commitment, 0.5 * (encoding - quantized).square().mean())
    torch.testing.assert_close(codebook, 4 * commitment)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_adaptive_weight_makes_both_gradients_equally_long(strength):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    output = layer(torch.rand(5, 4))
    reconstruction, adversarial = output.abs().mean(), -strength * output.square().mean()
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    assert not weight.requires_grad
    ours = torch.autograd.grad(weight * adversarial, layer.weight, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(reconstruction, layer.weight)[0].norm()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_adaptive_weight_stays_finite_without_an_adversarial_gradient():
    layer = nn.Linear(4, 3)
    output = layer(torch.rand(5, 4))
    assert adaptive_weight(1e6 * output.sum(), 0 * output.sum(), layer.weight) == 1e4
