"""Self-ensemble (Timofte et al., CVPR 2016): a network's mean answer to the eight turned and mirrored views."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def self_ensemble(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The network that shows ``net`` each of the eight views of an image, turns the answers back and averages them.

    It takes eight times as long and, without gradient, little more memory: views are seen one after the other.

    Args:
        net: Maps (N, C, H, W) to (N, C', H·scale, W·scale), square or not.

    Returns:
        A function of the same kind.
    """

    def restore(lq: Tensor) -> Tensor:
        total: Tensor | None = None
        for turns in range(4):
            for mirrored in (False, True):
                view = lq.rot90(turns, (-2, -1))
                answer = net((view.flip(-1) if mirrored else view).contiguous())
                answer = (answer.flip(-1) if mirrored else answer).rot90(-turns, (-2, -1))
                total = answer / 8 if total is None else total.add_(answer, alpha=1 / 8)
        assert total is not None
        return total

    return restore
