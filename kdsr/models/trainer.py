"""Trainer: the optimizers of a model, with the guard of its updates, its checkpoints and its log.

LoopInterface: delegates the calls of BasicSR's loop, except for the step, to the parts of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdsr.models.builder import Builder
from kdsr.models.checkpointer import Checkpointer
from kdsr.models.sections import TrainOptions
from kdsr.models.validator import Validator
from kdsr.runtime.declarations import Network
from kdsr.runtime.step_guard import StepGuard, Trained
from kdsr.runtime.step_log import StepLog, mean_over_ranks


class Trainer:
    """The parts of a training that do not depend on the losses. The step itself is in the model.

    Args:
        builder: Builds optimizers and schedulers.
        trained: The modules to optimise, by the key of ``train.optim_<key>``: ``g``, and ``d`` for a discriminator.
        networks: The networks of the training state, by name.
        validator: Its best values are part of the state.
        update_learning_rate: BasicSR's.

    Attributes:
        guard: Makes the updates, or skips them.
        generator: For the random numbers of a step, on the CPU.
        checkpointer: Saves and resumes.
    """

    def __init__(
        self,
        builder: Builder,
        trained: Mapping[str, nn.Module],
        networks: Mapping[str, nn.Module],
        validator: Validator,
        update_learning_rate: Callable[[int, int], None],
    ) -> None:
        opt, device = builder.opt, builder.device
        options = TrainOptions.read(opt["train"])
        self.validator = validator
        self.optimizers = [
            builder.optimizer(net.parameters(), f"optim_{key}") for key, net in trained.items()
        ]
        self.schedulers = builder.schedulers(self.optimizers)
        names = ["grad_norm" if key == "g" else f"grad_norm_{key}" for key in trained]
        parts = map(Trained, trained.values(), self.optimizers)
        self.guard = StepGuard(
            dict(zip(names, parts, strict=True)),
            device,
            clip_norm=options.clip_grad_norm,
            limit=options.max_nonfinite,
            loss_scale=builder.precision.loss_scale(),
        )
        self.step_log = StepLog(self.guard, opt["rank"])
        self.generator = torch.Generator().manual_seed(opt.get("manual_seed", 0) + opt.get("rank", 0))
        self.checkpointer = Checkpointer(
            opt,
            device,
            networks=networks,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
            generator=self.generator,
            guard=self.guard,
            best=validator.best,
            update_learning_rate=update_learning_rate,
        )
        validator.save_best = self.checkpointer.save_best

    def check(self) -> None:
        """Logs the steps that were not finite since the last call; ends a run that makes no others. Collective.

        Raises:
            TrainingError: ``train.max_nonfinite`` in a row.
        """

        def save() -> Path:
            return self.checkpointer.save(self.guard.iteration)

        self.step_log.check(save)

    def save(self, iteration: int) -> None:
        """Saves an iteration; ``-1``, BasicSR's sign for the end of a run: ``net_g_latest.pth`` alone."""
        self.check()  # steps since the last printed line
        if iteration == -1:
            self.checkpointer.save_weights("latest")
        else:
            self.checkpointer.save(iteration)

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a state, see ``Checkpointer.load``; validations of later iterations are dropped."""
        self.checkpointer.resume(state)
        self.validator.resume(self.guard.iteration)


class LoopInterface:
    """Delegates the calls of BasicSR's loop, except for the step, to the parts of KDModel and VQGANModel.

    Attributes:
        builder: Builds the networks.
        trainer: In training only.
        validator: Measures the network under test.
        train_options: Declares the options of ``train`` that it reads.
        NETWORKS: The networks that it reads, by the key of ``network_<key>``.
    """

    is_train: bool
    net_g: nn.Module
    lq: Tensor
    output: Tensor
    builder: Builder
    trainer: Trainer
    validator: Validator

    train_options: ClassVar[type[TrainOptions]] = TrainOptions
    NETWORKS: ClassVar[dict[str, Network]] = {
        "g": Network("The student: the network that is trained or tested.", required="always", in_state=True)
    }

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        """Problems that show only when several options are seen together."""
        train = opt.get("train") or {}
        if train.get("ema_warmup") and not train.get("ema_decay"):
            return ["train.ema_warmup: needs train.ema_decay above 0, the moving average that it speeds up"]
        return []

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        """What the sides of training patches of the ground truth must be multiples of, by the option that asks."""
        return {}

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        """The keys of ``train`` that are on and need ground truth, each with what to do where there is none."""
        return {}

    def restore(self, lq: Tensor) -> Tensor:
        """Restores images of any size with the network under test: the EMA where there is one."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Tensor]:
        """What is logged of the last step beside its losses, by name (scalars on the device)."""
        return {}

    @property
    def log_dict(self) -> dict[str, Tensor]:
        """What is logged of the last step, by name (scalars on the device)."""
        guard = self.trainer.guard
        return guard.last_values() | self.statistics() if guard.last else {}

    def get_current_log(self) -> dict[str, float]:
        """``log_dict``, averaged over the ranks. It is read from the device here, and not at each step.

        Raises:
            TrainingError: Too many steps in a row were not finite.
        """
        self.trainer.check()
        return mean_over_ranks(self.log_dict)

    def save(self, epoch: int, current_iter: int) -> None:
        self.trainer.save(current_iter)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        self.trainer.resume(resume_state)

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        if self.is_train:  # BasicSR passes an iteration past the end to the last validation
            current_iter = self.trainer.guard.iteration
        self.validator.validate(dataloader, current_iter, tb_logger, save_img)

    def test(self) -> None:
        with torch.no_grad():
            self.output = self.restore(self.lq)
