"""RestorationModel: BasicSR's SRModel with its defects cured; what every model of this package stands on.

Replaced, and why: networks are read by ``load_weights`` (BasicSR's reader loads what it finds and prints the rest);
the student is wrapped for DDP after its subclass is complete, on the CPU too; optimizers come from all of
``torch.optim`` (PyPI's BasicSR knows Adam only); losses stay on the device until they are printed (BasicSR calls
``.item()`` on each at every step); validation keeps the value of each image, is shared among ranks and pads any
network; files are whole or absent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.models.pretrained import load_pretrained
from kdsr.models.stateful_model import StatefulModel
from kdsr.runtime.distributed import share_weights, wrap_ddp
from kdsr.runtime.errors import OptionError
from kdsr.runtime.precision import Precision

Number = (int, float)


class RestorationModel(StatefulModel):
    """Base of the package's models.

    A subclass overrides ``build_training_networks`` (which networks), ``compute_losses`` (which losses) and
    ``after_step``; names the trained or remembered networks in ``state_networks``; and declares the option keys that
    it consumes in ``TRAIN_KEYS`` and ``NETWORK_KEYS`` (merged over its bases by the option check).

    Args:
        opt: The parsed options, as BasicSR passes them.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "total_iter": int,
        "warmup_iter": int,
        "ema_decay": Number,
        "optim_g": dict,
        "scheduler": dict,
        "pixel_opt": (dict, type(None)),
    }
    NETWORK_KEYS: frozenset[str] = frozenset({"g"})

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(
            self, opt
        )  # not SRModel's: it wraps, builds the optimizer and insists on a pixel loss
        self.precision = Precision(opt.get("precision"), self.device)
        self.log_dict: dict[str, Tensor] = OrderedDict()
        self.init_measures()
        self.init_state()
        self.net_g = self.build("g")
        if self.is_train:
            self.init_training_settings()

    # ------------------------------------------------------------------------------------------------ networks

    def build(self, key: str) -> nn.Module:
        """Builds ``network_<key>`` on the run's device and loads ``path.pretrain_network_<key>`` where given."""
        net = self.precision.place(build_network(self.opt[f"network_{key}"]))
        load_pretrained(net, key, self.opt)
        share_weights(net)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        get_root_logger().info(f"net_{key}: {type(net).__name__}, {parameters:,d} parameters")
        return net

    def build_frozen(self, key: str) -> nn.Module:
        """A network that only teaches: eval mode, no gradients, never wrapped, never saved."""
        net = self.build(key).eval()
        return net.requires_grad_(False)

    def build_training_networks(self) -> None:
        """Builds what training needs beside ``net_g``. Called before the EMA, the DDP wrapper and the optimizer."""

    def init_training_settings(self) -> None:
        self.build_training_networks()
        self.net_g.train()
        train_opt = self.opt["train"]
        self.ema_decay = train_opt.get("ema_decay", 0)
        if self.ema_decay > 0:
            self.net_g_ema = deepcopy(self.net_g).eval().requires_grad_(False)
        self.build_losses(train_opt)
        find_unused = self.opt.get("find_unused_parameters", False)
        self.bundle = wrap_ddp(self.trained_module(), self.device, find_unused)
        self.setup_optimizers()
        self.setup_schedulers()

    def trained_module(self) -> nn.Module:
        """What maps ``lq`` to the output in training: what DDP wraps and the optimizer sees."""
        return self.net_g

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        """Builds the losses that the options name, as attributes ``cri_*`` (None where there is none)."""
        self.cri_pix = self.build_loss("pixel_opt")

    def build_loss(self, key: str) -> nn.Module | None:
        opt = self.opt["train"].get(key)
        return build_loss(opt).to(self.device) if opt else None

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.bundle.parameters() if parameter.requires_grad)

    def setup_optimizers(self) -> None:
        self.optimizer_g = self.make_optimizer(self.trained_parameters(), self.opt["train"]["optim_g"])
        self.optimizers.append(self.optimizer_g)

    def make_optimizer(
        self, parameters: Iterable[nn.Parameter], opt: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Any optimizer of ``torch.optim``: ``{type: AdamW, lr: 1e-4, ...}``."""
        options = {key: value for key, value in opt.items() if key != "type"}
        return getattr(torch.optim, opt["type"])(list(parameters), **options)

    def setup_schedulers(self) -> None:
        scheduler = dict(self.opt["train"]["scheduler"])
        super().setup_schedulers()
        self.opt["train"]["scheduler"] = scheduler  # BasicSR's pops the type out of the options

    # -------------------------------------------------------------------------------------------- one step

    def feed_data(self, data: dict[str, Any]) -> None:
        self.restore_generators_once()
        self.lq = data["lq"].to(self.device, non_blocking=True, memory_format=self.precision.memory_format)
        if "gt" in data:
            self.gt = data["gt"].to(
                self.device, non_blocking=True, memory_format=self.precision.memory_format
            )

    def optimize_parameters(self, current_iter: int) -> None:
        """One training step: the student, the losses by name, backward, the update, the EMA."""
        self.optimizer_g.zero_grad(set_to_none=True)
        with self.precision.autocast():
            self.output = self.bundle(self.lq).to(self.lq.dtype)
            losses = self.compute_losses(current_iter)
        if not losses:
            raise OptionError("train: names no loss; give pixel_opt, or the options of a method")
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer_g.step()
        self.update_ema()
        self.after_step(current_iter)
        self.iteration = current_iter
        self.log_dict = OrderedDict((name, value.detach()) for name, value in losses.items())

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        """The weighted losses of this step by name (scalars); their sum is what is minimised."""
        return {"l_pix": self.cri_pix(self.output, self.gt)} if self.cri_pix else {}

    def after_step(self, current_iter: int) -> None:
        """Called after the update and the EMA of each step."""

    @torch.no_grad()
    def update_ema(self) -> None:
        """``ema ← decay·ema + (1 − decay)·student`` in one fused update; buffers are copied."""
        if self.ema_decay > 0:
            blend_weights(self.net_g_ema, self.net_g, self.ema_decay)

    def get_current_log(self) -> dict[str, float]:
        """The last step's losses, averaged over ranks. The only place where they are read from the device."""
        if not self.log_dict:
            return {}
        values = torch.stack([value.float() for value in self.log_dict.values()])
        if self.opt["dist"]:
            dist.all_reduce(values)
            values /= self.opt["world_size"]
        return OrderedDict(zip(self.log_dict, values.tolist(), strict=True))


@torch.no_grad()
def blend_weights(target: nn.Module, source: nn.Module, keep: float) -> None:
    """``target ← keep·target + (1 − keep)·source`` for all parameters; buffers are copied.

    Multiplies first and adds then, as BasicSR's EMA does, so that a run agrees with BasicSR's to rounding.
    """
    targets: list[Tensor] = list(target.parameters())
    sources = [parameter.detach() for parameter in source.parameters()]
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, sources, alpha=1 - keep)
    for ours, theirs in zip(target.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)
