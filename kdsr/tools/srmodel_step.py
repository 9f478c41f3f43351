"""The floor of logits distillation: a step of BasicSR's SRModel, and a forward pass of the teacher.

``KDModel`` with one loss on the teacher's output, and nothing else, should take hardly longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from torch import Tensor, nn

from kdsr.models.kd_model import KDModel


def problem(opt: Mapping[str, Any]) -> str | None:
    """Why there is no such step for the options of a KDModel; None where there is one."""
    train = opt["train"]
    if not isinstance(opt.get("network_t"), dict) or not train.get("logits_opt"):
        return "needs one teacher and train.logits_opt"
    if others := [key for key in train if key.endswith("_opt") and key != "logits_opt" and train[key]]:
        return f"compares logits_opt alone; add --force_yml train:{others[0]}=null"
    if train.get("accumulate", 1) > 1:
        return "BasicSR's SRModel has no train.accumulate; add --force_yml train:accumulate=1"
    if train["optim_g"]["type"] != "Adam":
        return "train.optim_g.type: BasicSR 1.4.2 has Adam alone"
    return None


class SRModelStep:
    """The same student, optimizer, EMA and loss as of a ``KDModel``, in BasicSR's SRModel.

    Its loss compares with the ground truth, and the teacher's output is dropped.

    Args:
        model: In training, with the options of ``problem``; only its teacher is used.
    """

    def __init__(self, model: KDModel) -> None:
        opt = deepcopy({**model.opt, "path": {}, "dist": False})
        opt["train"]["pixel_opt"] = opt["train"]["logits_opt"]
        self.stock = SRModel(opt)
        assert model.net_t is not None
        self.teacher: nn.Module = model.net_t

    def feed_data(self, data: dict[str, Tensor]) -> None:
        self.stock.feed_data(data)

    def optimize_parameters(self, current_iter: int) -> None:
        with torch.no_grad():
            self.teacher(self.stock.lq)
        self.stock.optimize_parameters(current_iter)

    @property
    def log_dict(self) -> dict[str, float]:
        return self.stock.log_dict
