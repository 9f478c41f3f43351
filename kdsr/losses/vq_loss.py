"""Losses of a VQGAN: commitment, codebook, and the weight of the adversarial loss.

van den Oord et al., "Neural Discrete Representation Learning" (VQ-VAE), NeurIPS 2017, Eq. 3; Esser et al.,
"Taming Transformers", CVPR 2021, Eq. 5 to 7.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.mscn import widened


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference in at least float32: under autocast encodings are in half precision."""
    return (widened(a) - widened(b)).square().mean()


def commitment_loss(encoding: Tensor, quantized: Tensor) -> Tensor:
    """``mean((z - sg[e])^2)``: pulls the encoding towards its code (VQ-VAE Eq. 3, third term, without weight).

    Args:
        encoding: z, the encoder's output (N, C, h, w).
        quantized: e, each token's nearest code, in the same shape.
    """
    return _mean_square(encoding, quantized.detach())


def codebook_loss(encoding: Tensor, quantized: Tensor) -> Tensor:
    """``mean((sg[z] - e)^2)``: pulls the used codes towards the encodings (VQ-VAE Eq. 3, second term)."""
    return _mean_square(encoding.detach(), quantized)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The weight that makes the norms of the adversarial and the reconstruction gradient equal (Taming Eq. 7).

    ``lambda = |d reconstruction / d w| / (|d adversarial / d w| + 1e-4)``, at most 1e4, without gradient.

    Args:
        reconstruction: Scalar loss of the reconstruction.
        adversarial: Scalar loss of the generator against the discriminator.
        last_layer: w, the weight of the decoder's last layer.
    """
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, 1e4).detach()


@LOSS_REGISTRY.register()
class VQLoss(nn.Module):
    """Commitment and codebook loss with their weights.

    Args:
        commitment_weight: beta; 0.25 in both papers.
        codebook_weight: 1 in both papers.
    """

    def __init__(self, commitment_weight: float = 0.25, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight

    def forward(self, encoding: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted commitment and codebook loss; arguments as for ``commitment_loss``."""
        return (
            self.commitment_weight * commitment_loss(encoding, quantized),
            self.codebook_weight * codebook_loss(encoding, quantized),
        )
