"""Self-ensemble (Timofte et al., CVPR 2016): the mean output over the eight rotated and mirrored views."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def self_ensemble(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Runs ``net`` on the eight views of an image, transforms the outputs back and averages them.

    Takes eight times as long and, without gradient, little more memory: the views run one after the other.

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
                output = net((view.flip(-1) if mirrored else view).contiguous())
                output = (output.flip(-1) if mirrored else output).rot90(-turns, (-2, -1))
                total = output / 8 if total is None else total.add_(output, alpha=1 / 8)
        assert total is not None
        return total

    return restore
