"""What guards an update: a step whose losses or gradients are not finite changes nothing, and is counted.

Whether a step is finite is decided on the device and agreed among the processes there. Nothing is read on the host:
fused optimizers take the decision as a tensor, as they do from ``torch.amp.GradScaler``. On the CPU, where reading
costs nothing, and for optimizers that are not fused, the decision is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kdsr.runtime.precision import LossScale


class Trained(NamedTuple):
    """What an optimizer trains."""

    module: nn.Module
    optimizer: torch.optim.Optimizer


class StepRecord(NamedTuple):
    """A step as it was, still on the device."""

    iteration: int
    losses: dict[str, Tensor]
    norms: dict[str, Tensor]  # of the gradients, before clipping
    failed: Tensor
    images: Sequence[str]


CAPACITY = 1000  # records between two readings


class StepGuard:
    """Makes the updates of a step, all of them or none.

    A step is ``begin``, forward passes, ``backward`` once or more, ``step``. Afterwards ``made`` says on the device
    whether the update was made, and ``made_on_host`` says it on the host where that is known (else None).
    ``records`` holds the steps since ``StepLog`` read them last, ``iteration`` is the last one.

    Args:
        trained: What is trained, by the name that the norm of its gradients is given.
        device: Where the run computes.
        clip_norm: Longest gradient (2-norm over all of an optimizer's parameters); longer ones are shortened.
        limit: After so many skipped updates in a row no further one is made, whatever comes.
        loss_scale: Scaling of the loss where the precision needs it.
    """

    def __init__(
        self,
        trained: dict[str, Trained],
        device: torch.device,
        *,
        clip_norm: float | None = None,
        limit: int = 10,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.trained = trained
        self.clip_norm = clip_norm
        self.limit = limit
        self.loss_scale = loss_scale
        optimizers = [part.optimizer for part in trained.values()]
        self.reads_on_host = not all(can_skip_on_device(optimizer) for optimizer in optimizers)
        if self.reads_on_host and device.type == "cuda":
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
            get_root_logger().warning(
                f"{kinds}: cannot skip an update on the GPU, so that each step waits for the GPU to say whether its "
                f"losses were finite; fused optimizers can ({', '.join(FUSED)})"
            )
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # in the whole run
        self.in_a_row = torch.zeros_like(self.skipped)  # up to now
        self.made = torch.ones((), dtype=torch.bool, device=device)
        self.made_on_host: bool | None = True
        self.failed = torch.zeros_like(self.made)  # not finite, and not merely held back after the limit
        self.norms: dict[str, Tensor] = {}
        self.records: list[StepRecord] = []
        self.last: StepRecord | None = None
        self.iteration = 0

    def begin(self) -> None:
        """Forgets the gradients, and remembers the buffers: a forward pass may change them."""
        for part in self.trained.values():
            part.optimizer.zero_grad(set_to_none=True)
        self._buffers = [buffer.clone() for buffer in self._current_buffers()]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar loss, scaled where the precision needs it."""
        (loss if self.loss_scale is None else loss * self.loss_scale.factor).backward()

    def step(self, iteration: int, losses: dict[str, Tensor], images: Sequence[str] = ()) -> None:
        """Updates all that is trained; or, unless the losses and the gradients are finite everywhere, nothing.

        Collective under a process group.

        Args:
            iteration: For the record.
            losses: The step's losses of this process by name, scalars.
            images: What they were computed of, for the record.
        """
        having = {name: part for name, part in self.trained.items() if gradients_of(part.optimizer)}
        self._measure(having)
        losses = {name: loss.detach() for name, loss in losses.items()}
        self._decide(torch.stack(list(losses.values())))
        if self.clip_norm is not None:
            for name, part in having.items():
                clip_grads_with_norm_(parameters_of(part.optimizer), self.clip_norm, self.norms[name])
        self._update([part.optimizer for part in having.values()])
        self.last = StepRecord(iteration, losses, self.norms, self.failed, images)
        self.records.append(self.last)
        self.iteration = iteration

    def _measure(self, having: dict[str, Trained]) -> None:
        self.norms = {}
        for name, part in having.items():
            gradients = gradients_of(part.optimizer)
            if self.loss_scale is not None:
                self.loss_scale.unscale(gradients)
            self.norms[name] = get_total_norm(gradients)

    def _decide(self, losses: Tensor) -> None:
        norms = torch.stack(list(self.norms.values())) if self.norms else losses.new_zeros(1)
        flags = torch.stack([losses.isfinite().all(), norms.isfinite().all()]).to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        losses_finite, gradients_finite = flags.bool().unbind()
        finite, held_back = losses_finite & gradients_finite, self.in_a_row >= self.limit
        self.made, self.failed = finite & ~held_back, ~finite & ~held_back
        self.skipped = self.skipped + self.failed
        self.in_a_row = torch.where(self.made, torch.zeros_like(self.in_a_row), self.in_a_row + self.failed)
        if self.loss_scale is not None:
            self.loss_scale.follow(self.made, self.failed & losses_finite)

    def _update(self, optimizers: list[torch.optim.Optimizer]) -> None:
        if self.reads_on_host:
            self.made_on_host = bool(self.made)
            if self.made_on_host:
                for optimizer in optimizers:
                    optimizer.step()
            else:
                for buffer, before in zip(self._current_buffers(), self._buffers, strict=True):
                    buffer.copy_(before)
                for optimizer in optimizers:
                    # Else torch warns that the schedule has overtaken an optimizer whose first step is skipped.
                    optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            self.made_on_host = None
            for optimizer in optimizers:
                optimizer.found_inf = (~self.made).float()  # type: ignore[attr-defined]
                optimizer.step()
                del optimizer.found_inf  # type: ignore[attr-defined]
            for buffer, before in zip(self._current_buffers(), self._buffers, strict=True):
                torch.where(self.made, buffer, before, out=buffer)
        self._buffers = []

    def _current_buffers(self) -> list[Tensor]:
        return [buffer for part in self.trained.values() for buffer in part.module.buffers()]

    def last_values(self) -> dict[str, Tensor]:
        """The losses of the last step by name; with ``clip_norm`` the norms of its gradients too, before clipping."""
        if self.last is None:
            return {}
        return self.last.losses | (self.last.norms if self.clip_norm is not None else {})

    def full(self) -> bool:
        """Whether the records are to be read before the next step: there are many, or the run has to stop."""
        return len(self.records) >= CAPACITY or (
            self.made_on_host is False and int(self.in_a_row) >= self.limit
        )

    def try_again(self) -> None:
        """Forgets how many updates were skipped in a row."""
        self.in_a_row.zero_()

    def state(self) -> dict[str, Any]:
        """Counters and loss scale, to be saved."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}
        return {"skipped": int(self.skipped), "in_a_row": int(self.in_a_row), **scale}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state`` gave; a run that had reached the limit gets as many tries again.

        Raises:
            ValueError: No ``state()`` gives this.
        """
        skipped, in_a_row = (state.get(key, 0) for key in ("skipped", "in_a_row"))
        if not all(type(count) is int and count >= 0 for count in (skipped, in_a_row)):
            raise ValueError(f"numbers of skipped updates are {skipped!r} and {in_a_row!r}")
        self.skipped.fill_(skipped)
        self.in_a_row.fill_(in_a_row if in_a_row < self.limit else 0)
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load(state["loss_scale"])


# --------------------------------------------------------------------------------------------------- optimizers

# Those of torch.optim whose fused kernels take found_inf, on the CPU and on CUDA.
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


def fused_where_it_helps(options: dict[str, Any], kind: str, device: torch.device) -> dict[str, Any]:
    """Adds ``fused: true`` to an optimizer's options on a GPU, unless they speak of its implementation already."""
    spoken_of = {"fused", "foreach", "capturable", "differentiable"} & options.keys()
    if device.type != "cuda" or kind not in FUSED or spoken_of:
        return options
    return {**options, "fused": True}


def keep_own_kernels(optimizer: torch.optim.Optimizer) -> None:
    """A state that is loaded may come from another machine: which kernels compute stays what it is on this one."""

    def with_own(loading: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [
            {**saved, **{key: own[key] for key in ("fused", "foreach") if key in own}}
            for saved, own in zip(state["param_groups"], loading.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(with_own)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer.found_inf`` skips a step exactly. Prepares SGD for it."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    # Fused SGD makes its momentum from unwritten memory when its first step is skipped (torch 2.13). Zeros give
    # the same first step as no momentum at all, unless there is dampening.
    if any(group["momentum"] and group["dampening"] for group in optimizer.param_groups):
        return False
    _start_momentum(optimizer)
    optimizer.register_load_state_dict_post_hook(_start_momentum)
    return True


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
