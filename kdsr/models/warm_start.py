"""Starts a student from weights that fit it only in part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdsr.runtime.errors import CheckpointError


def copy_matching(net: nn.Module, weights: dict[str, Tensor], source: str) -> tuple[int, int]:
    """Copies every parameter and buffer that ``weights`` has under the same name and in the same shape.

    Serves the teacher's matching blocks (RCAN and EDSR of equal width: the student's first blocks) and a ×2 student
    as the start of a ×4 one (all but the upsampler).

    Args:
        net: The student; changed in place.
        weights: State dict of the source.
        source: What the weights came from, for the error.

    Returns:
        How many tensors were copied, and how many the student has.

    Raises:
        CheckpointError: When nothing matches.
    """
    own = net.state_dict()
    matching = {name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape}
    learned = {name for name, _ in net.named_parameters()}
    if not matching & learned:
        example = next((name for name in own if name in weights), None)
        why = (
            f"for instance {example} is {tuple(weights[example].shape)} there and {tuple(own[example].shape)} here"
            if example
            else "no name of a parameter is the same"
        )
        raise CheckpointError(f"path.init_from: nothing of {source} fits the student ({why}); take the option out")
    with torch.no_grad():
        for name in matching:
            own[name].copy_(weights[name])
    return len(matching), len(own)
