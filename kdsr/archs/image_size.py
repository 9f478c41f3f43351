"""What networks that halve their features say to an image whose sides do not divide."""

from __future__ import annotations

from torch import Tensor

from kdsr.runtime.errors import DataError


def require_multiple(x: Tensor, multiple: int, network: str) -> None:
    """Refuses (N, C, H, W) whose H or W is no multiple of ``multiple``.

    Validation and tests pad by a network's ``multiple_of`` and never come here; what does is a training patch, or code
    of one's own.

    Raises:
        DataError: Naming the network, the size and the multiple.
    """
    height, width = x.shape[-2:]
    if height % multiple or width % multiple:
        raise DataError(
            f"{network}: takes sides that are multiples of {multiple}, not {height}x{width} pixels"
        )
