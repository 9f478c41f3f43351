"""Builder: networks, losses and optimizers, as the options name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.lr_scheduler import (
    CosineAnnealingRestartLR,
    MultiStepRestartLR,
    get_position_from_periods,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from kdsr.distill.weight_files import each_network
from kdsr.distill.weight_schedule import ScheduledLoss, is_schedule
from kdsr.models.ensemble import Ensemble
from kdsr.models.pretrained import load_pretrained, log_network
from kdsr.runtime.distributed import share_weights
from kdsr.runtime.errors import OptionError
from kdsr.runtime.precision import Precision
from kdsr.runtime.step_guard import fused_where_it_helps, keep_own_kernels


class CosineAnnealingRestartCyclicLR(CosineAnnealingRestartLR):
    """BasicSR's cosine schedule with a learning rate of its own at the end of each period, as in Restormer's code.

    Args:
        optimizer: Its learning rates are the highest.
        periods: Iterations of each cosine.
        restart_weights: Factor of the learning rate above the lowest, per period.
        eta_mins: The lowest learning rate of each period.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        periods: Sequence[int],
        restart_weights: Sequence[float] = (1,),
        eta_mins: Sequence[float] = (0,),
    ) -> None:
        self.eta_mins = eta_mins
        super().__init__(optimizer, periods, restart_weights)

    def get_lr(self) -> list[float]:
        self.eta_min = self.eta_mins[get_position_from_periods(self.last_epoch, self.cumulative_period)]
        return super().get_lr()


def _part(key: str) -> str:
    """The part of ``precision`` that ``network_<key>`` belongs to."""
    if key in ("g", "d"):
        return "student"
    return "teacher" if key.partition(".")[0] in ("t", "tb") else "extractor"


# names of the number of input channels in architectures
_CHANNEL_KEYS = ("num_in_ch", "in_chans", "in_channels", "inp_channels", "img_channel", "in_nc")
_SCHEDULERS = {
    "MultiStepLR": MultiStepRestartLR,
    "MultiStepRestartLR": MultiStepRestartLR,
    "CosineAnnealingRestartLR": CosineAnnealingRestartLR,
    "TrueCosineAnnealingLR": CosineAnnealingLR,
    "CosineAnnealingRestartCyclicLR": CosineAnnealingRestartCyclicLR,
}


class Builder:
    """Builds what the options name, on the device of the run.

    BasicSR's own functions load the weights that fit and print the rest, and support only Adam.

    Args:
        opt: The parsed options.
        device: Where the run computes.

    Attributes:
        precision: The options ``precision``, applied to all networks.
        scheduled_losses: The losses so far whose weight changes during the run.
    """

    def __init__(self, opt: dict[str, Any], device: torch.device) -> None:
        self.opt = each_network(opt)
        self.device = device
        self.precision = Precision(opt.get("precision"), device)
        self.scheduled_losses: list[ScheduledLoss] = []
        self._frozen: dict[str, nn.Module] = {}  # by the network's key
        self._copies: list[nn.Module] = []  # of the student

    def network(self, key: str) -> nn.Module:
        """``network_<key>`` with the weights of ``path.pretrain_network_<key>``, where that is given."""
        net = self.precision.place(build_network(self.opt[f"network_{key}"]))
        log_network(net, key, self.precision.dtypes[_part(key)])
        load_pretrained(net, key, self.opt)
        share_weights(net)
        return net

    def sample_lq(self) -> Tensor:
        """Returns a black LQ patch of the size used at the start of training, (1, C, H, W)."""
        options = self.opt["network_g"]
        channels = next((options[key] for key in _CHANNEL_KEYS if key in options), 3)
        size = self.opt["datasets"]["train"].get("gt_size", 64) // self.opt.get("scale", 1)
        return torch.zeros(1, channels, size, size, device=self.device)

    def frozen(self, key: str) -> nn.Module:
        """``network_<key>`` in eval mode, without gradients. Built once; never wrapped for DDP, never saved.

        Of a list the weighted mean (``train.teacher_weights``).
        """
        if key not in self._frozen:
            option = f"network_{key}"
            listed = [name.removeprefix("network_") for name in self.opt if name.startswith(f"{option}.")]
            net = (
                Ensemble([*map(self.network, listed)], self.opt["train"].get("teacher_weights"), option)
                if listed
                else self.network(key)
            )
            self._frozen[key] = net.eval().requires_grad_(False)
        return self._frozen[key]

    def new_student(self) -> nn.Module:
        """A frozen network like the student, with random weights, the same on all ranks."""
        net = self.precision.place(build_network(self.opt["network_g"])).eval().requires_grad_(False)
        share_weights(net)
        self._copies.append(net)
        return net

    def copied(self, student: nn.Module) -> nn.Module:
        """A frozen copy of the student."""
        self._copies.append(deepcopy(student).eval().requires_grad_(False))
        return self._copies[-1]

    def fix_precision(self) -> None:
        """Casts the frozen networks; from now on they compute in their precision. Called when all are built."""
        for key, net in self._frozen.items():
            for member in net if isinstance(net, Ensemble) else (net,):
                self.precision.fix(member, _part(key), cast=True)
        for net in self._copies:  # small, and updated by less than bf16 resolves
            self.precision.fix(net, "history", cast=False)

    def loss(self, key: str) -> nn.Module | None:
        """The loss ``train.<key>``, None without it; its ``loss_weight`` may be a schedule (``weight_schedule``)."""
        opt = self.opt["train"].get(key)
        if not opt:
            return None
        if not is_schedule(opt.get("loss_weight")):
            return build_loss(opt).to(self.device)
        loss = ScheduledLoss(build_loss({**opt, "loss_weight": 1.0}), opt["loss_weight"]).to(self.device)
        self.scheduled_losses.append(loss)
        return loss

    def optimizer(self, parameters: Iterable[nn.Parameter], key: str) -> torch.optim.Optimizer:
        """The optimizer ``train.<key>``, any of ``torch.optim``: ``{type: AdamW, lr: 1e-4, ...}``.

        On a GPU it is fused, where it can be.

        Raises:
            OptionError: There is nothing to train.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            network = f"network_{key.removeprefix('optim_')}"
            raise OptionError(f"{network}: {self.opt[network]['type']} has no parameters to train")
        options = dict(self.opt["train"][key])
        kind = options.pop("type")
        optimizer = getattr(torch.optim, kind)(trained, **fused_where_it_helps(options, kind, self.device))
        keep_own_kernels(optimizer)
        return optimizer

    def schedulers(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
        """The scheduler ``train.scheduler`` of each optimizer."""
        options = dict(self.opt["train"]["scheduler"])
        kind = _SCHEDULERS[options.pop("type")]
        return [kind(optimizer, **options) for optimizer in optimizers]
