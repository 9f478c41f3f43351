"""FACD's contrast between features, as a term: the student accepts what the gate lets through.

"Feature-domain Adaptive Contrastive Distillation for Efficient Single Image Super-Resolution" (arXiv 2211.15951, 2023).
No code was released; the equations are our reading of the paper (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdsr.distill.adapters import TapGroup, resized_like
from kdsr.distill.step import Step
from kdsr.distill.tap_options import tap_pairs
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.losses.facd_loss import GATES, FACDLoss, patch_gate
from kdsr.runtime.distributed import gather_batches
from kdsr.terms.features import TAPS, loss_problems


def gate_mode(train: Mapping[str, Any]) -> Any:
    """The option ``gate``; YAML reads a bare ``off`` as false."""
    gate = train.get("gate", "hard")
    return "off" if gate is False else gate


@TERM_REGISTRY.register()
class FACDTerm(Term):
    """``l_facd``: at each of ``taps`` the student's adapted feature is drawn to the teacher's of the same sample.

    Its negatives are the teacher's features of all other samples, of every process. Patches count by ``gate``
    (``hard``, ``soft`` or ``off``): where the teacher is further from the ground truth than the student there is
    nothing to learn from it. ``gate_temperature`` (0.01) is the width of the soft gate. Logged beside the loss:
    ``mutual_information``, the bound from below in nats, and ``gated``, the patches' mean weight.
    """

    KEY = "facd_opt"
    TRAIN_KEYS = {KEY: (dict, type(None)), **TAPS, "gate": (str, bool), "gate_temperature": (int, float)}
    NEEDS = frozenset({"teacher_output", "taps"})

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

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mode, self.temperature = gate_mode(self.train), self.train.get("gate_temperature", 0.01)

    def tap_groups(self) -> dict[str, TapGroup]:
        return {"facd": TapGroup("train.taps", tap_pairs(self.train["taps"]))}

    def losses(self, step: Step) -> dict[str, Tensor]:
        wanted = step.teacher_features["facd"]
        features = resized_like(step.student_features["facd"], wanted)
        candidates = [gather_batches(level) for level in wanted]
        samples = len(step.lq)
        own = torch.arange(samples, device=step.lq.device) + self.setup.opt["rank"] * samples
        gt = None if self.mode == "off" else step.ground_truth  # there may be none
        gate = patch_gate(step.output, step.teacher_output, gt, self.mode, self.temperature)
        loss, bound = self.loss(features, candidates, own, gate)
        step.statistics |= {"mutual_information": bound, "gated": gate.mean()}
        return {"l_facd": loss}
