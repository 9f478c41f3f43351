"""Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdsr.runtime.errors import OptionError

OPTION = "train.checkpoint_student"


def blocks_of(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The main blocks of a network by name: entries of its outermost lists (``ModuleList``, ``Sequential``).

    Entries with fewer than two layers that have weights are left out: recomputing them saves nothing.
    """
    for name, child in net.named_children():
        if isinstance(net, nn.ModuleList | nn.Sequential) and _layers(child) > 1:
            yield prefix + name, child
        elif not isinstance(net, nn.ModuleList | nn.Sequential):
            yield from blocks_of(child, f"{prefix}{name}.")


def _layers(net: nn.Module) -> int:
    return sum(any(True for _ in module.parameters(recurse=False)) for module in net.modules())


def recompute_blocks(net: nn.Module) -> list[str]:
    """Makes the blocks of a network in training keep their inputs alone, and run again in the backward pass.

    Losses and gradients stay the same to the bit, random numbers included. Called when all copies are made.

    Returns:
        The names of the blocks.

    Raises:
        OptionError: There are none.
    """
    blocks = dict(blocks_of(net))
    if not blocks:
        raise OptionError(
            f"{OPTION}: {type(net).__name__} has no list of blocks to recompute; set it to false"
        )
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # the input of a block is needed again
    for name, block in blocks.items():
        _recompute(
            block, f"{OPTION}: {type(net).__name__} cannot be recomputed, {name} changes its input in place"
        )
    return list(blocks)


def _recompute(block: nn.Module, message: str) -> None:
    forward = block.forward

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        versions = [value._version for value in inputs]
        output = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if versions != [value._version for value in inputs]:
            raise OptionError(f"{message}; set it to false")
        return output

    block.forward = recomputed
