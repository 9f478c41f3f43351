"""Which codes of a VQGAN are used, and new places for those that are not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

DECAY = 0.99  # of the running histogram: it remembers about a hundred steps
USED_ABOVE = 0.01  # a code counts as used above this share of what it would have if all were used alike


class CodeUsage(nn.Module):
    """Counts the codes that a training uses. Its buffers belong to the training's state.

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
        """Takes in the codes of a step, of all processes. Nothing is read from the device.

        Args:
            codes: Indices, of any shape.
            counts_if: Boolean scalar, equal in all processes: false leaves everything as it is. None: true.
        """
        indices = codes.flatten()
        # not bincount: it reads the largest index from the device; whole numbers add up alike in any order
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
        """``perplexity`` (1 .. n_embed: so many codes, used alike, would be as rich) and the share used."""
        whole = self.histogram.sum()  # 0 until a step has counted
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
        """Puts codes that were not used for ``patience`` steps where the encoder's outputs are.

        Args:
            codebook: (n_embed, C), changed in place; equal in all processes afterwards.
            encoding: (N, C, h, w), the encoder's outputs of this step.
            patience: Steps without use after which a code is dead.
            generator: Which outputs are taken is drawn from it (on the CPU), in any case.
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
        # masked, not indexed: how many are dead need not be known on the host
        codebook.copy_(torch.where(dead.unsqueeze(1), places, codebook))
        self.idle.masked_fill_(dead, 0)
