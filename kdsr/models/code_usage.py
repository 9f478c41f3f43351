"""Counts the codes of a VQGAN that are used, and restarts the others."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

DECAY = 0.99  # of the running histogram: about a hundred steps
USED_ABOVE = 0.01  # a code counts as used above this fraction of a uniform share


class CodeUsage(nn.Module):
    """Counts the codes that a training uses. Its buffers are part of the training state.

    Args:
        n_embed: Number of codes.
    """

    histogram: Tensor
    idle: Tensor

    def __init__(self, n_embed: int) -> None:
        super().__init__()
        self.register_buffer("histogram", torch.zeros(n_embed))  # running; its sum tends to 1
        self.register_buffer("idle", torch.zeros(n_embed, dtype=torch.long))  # steps since last used

    @torch.no_grad()
    def update(self, codes: Tensor, counts_if: Tensor | None = None) -> None:
        """Counts the codes of a step, of all processes. Reads nothing from the device.

        Args:
            codes: Indices, of any shape.
            counts_if: Boolean scalar, equal in all processes: false changes nothing. None: true.
        """
        indices = codes.flatten()
        # not bincount, which reads the largest index from the device; sums of integers do not depend on their order
        counted = torch.zeros_like(self.idle).scatter_add_(0, indices, torch.ones_like(indices))
        counts = counted.to(self.histogram.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        histogram = self.histogram.lerp(counts / counts.sum(), 1 - DECAY)
        idle = (self.idle + 1).masked_fill(counts > 0, 0)
        if counts_if is not None:
            histogram = torch.where(counts_if, histogram, self.histogram)
            idle = torch.where(counts_if, idle, self.idle)
        self.histogram.copy_(histogram)
        self.idle.copy_(idle)

    def statistics(self) -> dict[str, Tensor]:
        """``perplexity`` (1 to n_embed: the effective number of codes) and ``codes_used`` (the fraction in use)."""
        whole = self.histogram.sum()  # 0 before the first step
        share = self.histogram / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        used = share * len(share) > USED_ABOVE
        return {
            "perplexity": (-torch.special.xlogy(share, share).sum()).exp(),
            "codes_used": used.to(share.dtype).mean(),
        }

    @torch.no_grad()
    def restart_idle(
        self,
        codebook: Tensor,
        encoding: Tensor,
        patience: int,
        generator: torch.Generator,
        restart_if: Tensor | None = None,
    ) -> None:
        """Moves codes that were not used for ``patience`` steps to outputs of the encoder.

        Args:
            codebook: (n_embed, C), changed in place; equal in all processes afterwards.
            encoding: (N, C, h, w), the encoder's outputs of this step.
            patience: Steps without use after which a code is dead.
            generator: On the CPU; the outputs are drawn from it, whether or not a code is moved.
            restart_if: Boolean scalar: false moves no code. None: true.
        """
        tokens = encoding.detach().permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
        drawn = torch.randint(len(tokens), (len(codebook),), generator=generator)
        places = tokens[drawn.to(tokens.device)].to(codebook.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(places, 0)
        dead = self.idle >= patience
        if restart_if is not None:
            dead &= restart_if
        # masked, not indexed: indexing would read the number of dead codes from the device
        codebook.copy_(torch.where(dead.unsqueeze(1), places, codebook))
        self.idle.masked_fill_(dead, 0)
