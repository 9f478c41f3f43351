"""FACD's contrastive loss between features, with a gate per patch.

"Feature-domain Adaptive Contrastive Distillation for Efficient Single Image Super-Resolution" (arXiv 2211.15951, 2023).
No code was released; the equations are our interpretation of the paper (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdsr.distill.adapters import TapGroup, resized_like
from kdsr.distill.step import Step
from kdsr.distill.tap_options import tap_pairs
from kdsr.distill.term import TERM_REGISTRY, Term
from kdsr.losses.facd_loss import GATES, FACDLoss, patch_gate
from kdsr.runtime.declarations import Section, loss, option
from kdsr.runtime.distributed import gather_batches
from kdsr.terms.features import TapOptions


class FACDOptions(TapOptions):
    facd_opt: Section | None = loss("Contrastive loss between features, `l_facd`.", FACDLoss)
    gate: str | bool = option(
        "hard",
        "Weights of patches: `hard`, 1 where the teacher is nearer to the ground truth than the student, else 0; "
        "`soft`, a smooth function of the difference; `off`, 1, without ground truth.",
        choices=GATES,
    )
    gate_temperature: float = option(0.01, "Width of the soft gate, in units of images from 0 to 1.", above=0)


def gate_mode(gate: Any) -> Any:
    """Returns the option ``gate``; YAML reads ``off`` without quotes as false."""
    return "off" if gate is False else gate


@TERM_REGISTRY.register()
class FACDTerm(Term):
    """``l_facd``: at each of ``taps``, the student's adapted feature has the teacher's of its sample as positive.

    Negatives are the teacher's features of all other samples on all ranks. Patches are weighted by ``gate`` (``hard``,
    ``soft`` or ``off``), because a teacher that is further from the ground truth than the student does not help. Also
    logged: ``mutual_information``, its lower bound in nats, and ``gated``, the mean weight of the patches.
    """

    KEY = "facd_opt"
    options = FACDOptions
    NEEDS = frozenset({"teacher_output", "taps"})

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        return {} if gate_mode(cls.options.read(train).gate) == "off" else {"gate": "set off"}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        gate = opt["train"].get("gate")
        return [f"train.gate: {gate!r} is not known; use {', '.join(GATES)}"] if gate is True else []

    def tap_groups(self) -> dict[str, TapGroup]:
        return {"facd": TapGroup("train.taps", tap_pairs(self.options.taps))}

    def losses(self, step: Step) -> dict[str, Tensor]:
        targets = step.teacher_features["facd"]
        features = resized_like(step.student_features["facd"], targets)
        candidates = [gather_batches(level) for level in targets]
        samples = len(step.lq)
        own = torch.arange(samples, device=step.lq.device) + self.setup.opt["rank"] * samples
        mode = gate_mode(self.options.gate)
        gt = None if mode == "off" else step.ground_truth  # there may be none
        gate = patch_gate(step.output, step.teacher_output, gt, mode, self.options.gate_temperature)
        loss, bound = self.loss(features, candidates, own, gate)
        step.statistics |= {"mutual_information": bound, "gated": gate.mean()}
        return {"l_facd": loss}
