"""RestorationModel: BasicSR's SRModel with its defects cured; what every model of this package stands on.

Replaced, and why: networks are read by ``load_weights`` (BasicSR's reader loads what it finds and prints the rest);
the student is wrapped for DDP after its subclass is complete, on the CPU too; optimizers come from all of
``torch.optim`` (PyPI's BasicSR knows Adam only); losses stay on the device until they are printed (BasicSR calls
``.item()`` on each at every step); a step that is not finite changes nothing (BasicSR trains on with NaN weights);
validation keeps the value of each image, is shared among ranks and pads any network; files are whole or absent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from torch import Tensor, nn

from kdsr.distill.moving_average import blend_weights, ema_decay_at
from kdsr.distill.weight_schedule import ScheduledLoss, is_schedule
from kdsr.models.pretrained import load_pretrained, tell_of
from kdsr.models.stateful_model import StatefulModel
from kdsr.runtime.distributed import share_weights, wrap_ddp
from kdsr.runtime.errors import OptionError, TrainingError
from kdsr.runtime.option_values import count, number
from kdsr.runtime.precision import Precision
from kdsr.runtime.step_guard import StepGuard, Trained, fused_where_it_helps, keep_own_kernels
from kdsr.runtime.step_log import StepLog

Number = (int, float)


class RestorationModel(StatefulModel):
    """Base of the package's models.

    A subclass overrides ``build_training_networks`` (which networks), ``forward_step`` (which losses) and
    ``after_step``; names the trained or remembered networks in ``state_networks``; and declares the option keys that
    it consumes in ``TRAIN_KEYS`` and ``NETWORK_KEYS``, and those that are read for the sake of others only in
    ``READ_WITH`` (all merged over its bases by the option check).

    Args:
        opt: The parsed options, as BasicSR passes them.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "total_iter": count(),
        "warmup_iter": int,
        "ema_decay": number(lowest=0, below=1),  # at 1 what is validated and saved would never change
        "ema_warmup": bool,
        "optim_g": dict,
        "scheduler": dict,
        "clip_grad_norm": (*Number, type(None)),
        "max_nonfinite": int,
    }
    NETWORK_KEYS: frozenset[str] = frozenset({"g"})
    # a key of train, or network_X -> the keys of train that make use of it
    READ_WITH: dict[str, tuple[str, ...]] = {}

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        """The keys of ``train`` that are on and need ground truth, each with what to do where there is none."""
        return {}

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        """Problems that a look at the kinds of single options does not find."""
        train = opt.get("train") or {}
        problems = []
        clip = train.get("clip_grad_norm")
        if clip is not None and not clip > 0:
            problems.append(f"train.clip_grad_norm: {clip} is no length of a gradient; it must be above 0")
        if train.get("ema_warmup") and not train.get("ema_decay"):
            problems.append(
                "train.ema_warmup: needs train.ema_decay above 0, the moving average that it speeds up"
            )
        if train.get("max_nonfinite", 1) < 1:
            problems.append(f"train.max_nonfinite: {train['max_nonfinite']} is no number of steps, from 1")
        return problems

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(
            self, opt
        )  # not SRModel's: it wraps, builds the optimizer and insists on a pixel loss
        self.precision = Precision(opt.get("precision"), self.device)
        self.log_dict: dict[str, Tensor] = OrderedDict()
        self.scheduled_losses: list[ScheduledLoss] = []
        self.frozen: dict[str, nn.Module] = {}  # by the network's key
        self.init_measures()
        self.init_state()
        self.net_g = self.build("g")
        if self.is_train:
            self.init_training_settings()

    # ------------------------------------------------------------------------------------------------ networks

    def build(self, key: str) -> nn.Module:
        """Builds ``network_<key>`` on the run's device and loads ``path.pretrain_network_<key>`` where given."""
        net = self.precision.place(build_network(self.opt[f"network_{key}"]))
        tell_of(net, key, self.opt, self.precision.amp_dtype)
        load_pretrained(net, key, self.opt)
        share_weights(net)
        return net

    def build_frozen(self, key: str) -> nn.Module:
        """A network that only teaches: eval mode, no gradients, never wrapped, never saved. Built once."""
        if key not in self.frozen:
            self.frozen[key] = self.build(key).eval().requires_grad_(False)
        return self.frozen[key]

    def build_training_networks(self) -> None:
        """Builds what training needs beside ``net_g``. Called before the EMA, the DDP wrapper and the optimizer."""

    def init_training_settings(self) -> None:
        self.build_training_networks()
        self.net_g.train()
        train_opt = self.opt["train"]
        self.ema_decay = train_opt.get("ema_decay", 0)
        self.ema_warmup = train_opt.get("ema_warmup", False)
        if self.ema_decay > 0:
            self.net_g_ema = deepcopy(self.net_g).eval().requires_grad_(False)
        self.build_losses(train_opt)
        find_unused = self.opt.get("find_unused_parameters", False)
        self.bundle = wrap_ddp(self.trained_module(), self.device, find_unused)
        self.setup_optimizers()
        self.setup_schedulers()
        self.guard = StepGuard(
            self.trained(),
            self.device,
            clip_norm=train_opt.get("clip_grad_norm"),
            limit=train_opt.get("max_nonfinite", 10),
            loss_scale=self.precision.loss_scale(),
        )
        self.step_log = StepLog(self.guard, self.opt["rank"])

    def trained_module(self) -> nn.Module:
        """What maps ``lq`` to the output in training: what DDP wraps and the optimizer sees."""
        return self.net_g

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        """Builds the losses that the options name."""

    def build_loss(self, key: str) -> nn.Module | None:
        """The loss that ``train.<key>`` names; its ``loss_weight`` may be a schedule (``weight_schedule``)."""
        opt = self.opt["train"].get(key)
        if not opt:
            return None
        if not is_schedule(opt.get("loss_weight")):
            return build_loss(opt).to(self.device)
        loss = ScheduledLoss(build_loss({**opt, "loss_weight": 1.0}), opt["loss_weight"]).to(self.device)
        self.scheduled_losses.append(loss)
        return loss

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.bundle.parameters() if parameter.requires_grad)

    def setup_optimizers(self) -> None:
        parameters = list(self.trained_parameters())
        if not parameters:
            raise OptionError(f"network_g: {self.opt['network_g']['type']} has no parameters to train")
        self.optimizer_g = self.make_optimizer(parameters, self.opt["train"]["optim_g"])
        self.optimizers.append(self.optimizer_g)

    def make_optimizer(
        self, parameters: Iterable[nn.Parameter], opt: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Any optimizer of ``torch.optim``: ``{type: AdamW, lr: 1e-4, ...}``; on a GPU fused, where it can be."""
        options = {key: value for key, value in opt.items() if key != "type"}
        options = fused_where_it_helps(options, opt["type"], self.device)
        optimizer = getattr(torch.optim, opt["type"])(list(parameters), **options)
        keep_own_kernels(optimizer)
        return optimizer

    def trained(self) -> dict[str, Trained]:
        """What is trained by which optimizer, by the name under which the norm of its gradients is logged."""
        return {"grad_norm": Trained(self.bundle, self.optimizer_g)}

    def setup_schedulers(self) -> None:
        scheduler = dict(self.opt["train"]["scheduler"])
        super().setup_schedulers()
        self.opt["train"]["scheduler"] = scheduler  # BasicSR's pops the type out of the options

    # -------------------------------------------------------------------------------------------- one step

    def feed_data(self, data: dict[str, Any]) -> None:
        self.restore_generators_once()
        self.images: Sequence[str] = data.get("lq_path") or data.get("gt_path") or ()
        self.lq = data["lq"].to(self.device, non_blocking=True, memory_format=self.precision.memory_format)
        gt = data.get("gt")
        if gt is not None:
            gt = gt.to(self.device, non_blocking=True, memory_format=self.precision.memory_format)
        self.gt: Any = gt

    def optimize_parameters(self, current_iter: int) -> None:
        """One training step: the losses by name, backward, the update where all of it is finite, the EMA."""
        self.guard.begin()
        losses = self.compute_gradients(current_iter)
        self.guard.step(torch.stack(list(losses.values())))
        self.update_ema(current_iter)
        self.after_step(current_iter)
        self.iteration = current_iter
        self.step_log.note(current_iter, losses, self.images)
        self.log_dict = OrderedDict((name, value.detach()) for name, value in losses.items())
        if self.guard.clip_norm is not None:
            self.log_dict.update(self.guard.norms)
        self.log_dict.update(self.statistics())
        if self.step_log.due():
            self.tell_of_skipped_steps()

    def compute_gradients(self, current_iter: int) -> dict[str, Tensor]:
        """All losses of the step by name, after their backward pass."""
        for loss in self.scheduled_losses:
            loss.begin(current_iter)
        with self.precision.autocast():
            losses = self.forward_step(current_iter)
        if not losses:
            raise OptionError("train: names no loss; give pixel_opt, or the options of a method")
        self.guard.backward(torch.stack(list(losses.values())).sum())
        return losses

    @abstractmethod
    def forward_step(self, current_iter: int) -> dict[str, Tensor]:
        """Runs the networks on the batch and returns the weighted losses by name (scalars); their sum is minimised."""

    def statistics(self) -> dict[str, Tensor]:
        """What is logged of a step beside its losses, by name (scalars on the device)."""
        return {}

    def after_step(self, current_iter: int) -> None:
        """Called after the update and the EMA of each step, made or skipped (``guard.made``)."""

    @torch.no_grad()
    def update_ema(self, current_iter: int) -> None:
        """``ema ← decay·ema + (1 − decay)·student`` in one fused update; it stays where the student's is skipped."""
        if self.ema_decay > 0 and self.guard.made_on_host is not False:
            where = None if self.guard.made_on_host else self.guard.made
            decay = ema_decay_at(current_iter, self.ema_decay, self.ema_warmup)
            blend_weights(self.net_g_ema, self.net_g, decay, where)

    def get_current_log(self) -> dict[str, float]:
        """The last step's losses, averaged over ranks. Here they are read from the device, and not at each step.

        Raises:
            TrainingError: Too many steps in a row were not finite.
        """
        if not self.log_dict:
            return {}
        self.tell_of_skipped_steps()
        values = torch.stack([value.float() for value in self.log_dict.values()])
        if self.opt["dist"]:
            dist.all_reduce(values)
            values /= self.opt["world_size"]
        return OrderedDict(zip(self.log_dict, values.tolist(), strict=True))

    # ----------------------------------------------------------------------------- steps that are not finite

    def tell_of_skipped_steps(self) -> None:
        """Logs the steps that were not finite since the last call; ends a run that makes no others. Collective.

        Raises:
            TrainingError: ``train.max_nonfinite`` in a row; what is saved is from before the first of them.
        """
        problems = self.step_log.tell()
        if not problems:
            return
        self.guard.try_again()  # else the state would be one that stops at once
        self.save(-1, self.iteration)
        state = Path(self.opt["path"]["training_states"]) / f"{self.iteration}.state"
        raise TrainingError(
            [
                f"{problems[0]} (train.max_nonfinite: {self.guard.limit}). Lower train.optim_g.lr, set "
                "train.clip_grad_norm, use precision.amp: bf16 or none, or look at the images; the same command with "
                f"--auto_resume then goes on from {state}, with the weights from before",
                *problems[1:],
            ]
        )

    def save(self, epoch: int, current_iter: int) -> None:
        self.tell_of_skipped_steps()  # what comes after the last printed line is told here
        super().save(epoch, current_iter)

    def extra_state(self) -> dict[str, Any]:
        """What a state holds beside networks and optimizers: counters of skipped steps, the loss scale."""
        return {**super().extra_state(), "guard": self.guard.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.guard.load(state.get("guard", {}))
