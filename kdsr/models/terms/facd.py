"""FACD's contrast between features, as a term: the student accepts what the gate lets through.

"Feature-domain Adaptive Contrastive Distillation for Efficient Single Image Super-Resolution" (arXiv 2211.15951, 2023).
No code was released; the equations are our reading of the paper (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdsr.losses.facd_loss import GATES, FACDLoss, patch_gate
from kdsr.models.adapters import TapGroup, resized_like
from kdsr.models.tap_options import tap_pairs
from kdsr.models.terms.features import loss_problems
from kdsr.models.terms.term import Term
from kdsr.runtime.distributed import gather_batches


def gate_mode(train: dict[str, Any]) -> Any:
    """The option ``gate``; YAML reads a bare ``off`` as false."""
    gate = train.get("gate", "hard")
    return "off" if gate is False else gate


class FACDTerm(Term):
    """``l_facd``: at each of ``taps`` the student's adapted feature is drawn to the teacher's of the same sample.

    Its negatives are the teacher's features of all other samples, of every process. Patches count by ``gate``
    (``hard``, ``soft`` or ``off``): where the teacher is further from the ground truth than the student there is
    nothing to learn from it. ``gate_temperature`` (0.01) is the width of the soft gate. Logged beside the loss:
    ``mutual_information``, the bound from below in nats, and ``gated``, the patches' mean weight.
    """

    KEY = "facd_opt"
    TRAIN_KEYS = {KEY: (dict, type(None)), "gate": (str, bool), "gate_temperature": (int, float)}
    NEEDS = frozenset({"teacher", "taps"})

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        return {} if gate_mode(train) == "off" else {"gate": "set off"}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        train, problems = opt["train"], loss_problems(opt, cls.KEY, FACDLoss)
        gate = gate_mode(train)
        if gate not in GATES:
            problems.append(f"train.gate: {gate!r} is not known; use {', '.join(GATES[:-1])} or {GATES[-1]}")
        if train.get("gate_temperature", 1) <= 0:
            problems.append(f"train.gate_temperature: {train['gate_temperature']} is not above 0")
        return problems

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        train = model.opt["train"]
        self.mode, self.temperature = gate_mode(train), train.get("gate_temperature", 0.01)

    def tap_groups(self) -> dict[str, TapGroup]:
        assert self.model.net_t is not None
        return {"facd": TapGroup("train.taps", tap_pairs(self.model.opt["train"]["taps"]), self.model.net_t)}

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        model = self.model
        assert model.student_bundle is not None
        wanted = model.taught_features("facd")
        features = resized_like(model.student_bundle.features["facd"], wanted)
        candidates = [gather_batches(level) for level in wanted]
        own = torch.arange(len(model.lq), device=model.device) + model.opt["rank"] * len(model.lq)
        gt = None if self.mode == "off" else model.gt  # there may be none
        self.gate = patch_gate(model.output, model.teacher_output, gt, self.mode, self.temperature)
        loss, self.bound = self.cri(features, candidates, own, self.gate)
        return {"l_facd": loss}

    def statistics(self) -> dict[str, Tensor]:
        return {"mutual_information": self.bound, "gated": self.gate.mean()}
