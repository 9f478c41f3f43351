"""Which codes of a VQGAN are used, and new places for those that are not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

DECAY = 0.99  # of the running histogram: it remembers about a hundred steps
DEAD_BELOW = 0.01  # a code is dead below this share of the use that it would have if all were used alike


class CodeUsage(nn.Module):
    """A running histogram of the codes that a training uses. Its buffer belongs to the training's state.

    Args:
        n_embed: Number of codes.
    """

    share: Tensor

    def __init__(self, n_embed: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((n_embed,), 1.0 / n_embed))

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Takes in the codes (any shape) of a step, of all processes. Nothing is read from the device."""
        counts = torch.bincount(codes.flatten(), minlength=len(self.share)).to(self.share.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        self.share.lerp_(counts / counts.sum(), 1 - DECAY)

    def dead(self) -> Tensor:
        """(n_embed,) whether a code is as good as unused."""
        return self.share * len(self.share) < DEAD_BELOW

    def statistics(self) -> dict[str, Tensor]:
        """``perplexity`` (1 .. n_embed: so many codes, used alike, would be as rich) and the share used."""
        entropy = -torch.special.xlogy(self.share, self.share).sum()
        return {"perplexity": entropy.exp(), "codes_used": 1 - self.dead().to(self.share.dtype).mean()}

    @torch.no_grad()
    def restart_dead(self, codebook: Tensor, encoding: Tensor, generator: torch.Generator) -> None:
        """Puts dead codes where the encoder's outputs are, and gives them time to be used.

        Args:
            codebook: (n_embed, C), changed in place; equal in all processes afterwards.
            encoding: (N, C, h, w), the encoder's outputs of this step.
            generator: Which outputs are taken is drawn from it (on the CPU).
        """
        tokens = encoding.detach().permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
        drawn = torch.randint(len(tokens), (len(codebook),), generator=generator)
        places = tokens[drawn.to(tokens.device)].to(codebook.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(places, 0)
        dead = self.dead()
        # masked, not indexed: how many are dead need not be known on the host
        codebook.copy_(torch.where(dead.unsqueeze(1), places, codebook))
        self.share.copy_(torch.where(dead, torch.full_like(self.share, 1.0 / len(self.share)), self.share))
        self.share.div_(self.share.sum())
