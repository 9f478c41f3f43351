"""FACDModel: contrast between features, as far as the student can accept it (FACD, arXiv 2211.15951, 2023).

No code was released; the equations are our reading of the paper (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from kdsr.losses.facd_loss import GATES, patch_gate
from kdsr.models.adapters import TapGroup, resized_like
from kdsr.models.base_model import Number
from kdsr.models.kd_model import KDModel
from kdsr.models.tap_options import tap_pairs
from kdsr.runtime.distributed import gather_batches


@MODEL_REGISTRY.register()
class FACDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T(x)) + mean_j FACD_j``: logits KD, and at each tap j a contrast of features.

    The student's feature passes a trainable 1×1 convolution (the paper's DR block). Its positive is the teacher's
    feature of the same sample, its negatives are those of all other samples, of every process. Patches count by a gate:
    where the teacher is further from the ground truth than the student there is nothing to learn from it.

    Options (``train``): ``facd_opt`` (``FACDLoss``) → ``l_facd``; ``taps``: ``[{student: body.3, teacher: body.7},
    ...]``; ``gate``: ``hard`` (default), ``soft`` or ``off``; ``gate_temperature`` (0.01): width of the soft gate.
    Logged beside the losses: ``mutual_information``, the bound from below in nats, and ``gated``, the patches' mean
    weight.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "facd_opt": dict,
        "taps": (list, dict),
        "gate": str,
        "gate_temperature": Number,
    }

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        needing = super().keys_with_gt(train)
        return needing if train.get("gate", "hard") == "off" else {**needing, "gate": "set off"}

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt)
        if not opt.get("network_t"):
            problems.append("network_t: missing; FACDModel compares the student's features with a teacher's")
        if not train.get("facd_opt"):
            problems.append("train.facd_opt: missing; give {type: FACDLoss}, or use KDModel")
        if train.get("taps") is None:
            problems.append("train.taps: missing; name features: [{student: body.3, teacher: body.7}, ...]")
        gate = train.get("gate", "hard")
        if gate not in GATES:
            problems.append(f"train.gate: {gate!r} is not known; use {', '.join(GATES[:-1])} or {GATES[-1]}")
        if train.get("gate_temperature", 1) <= 0:
            problems.append(f"train.gate_temperature: {train['gate_temperature']} is not above 0")
        return problems

    def tap_groups(self) -> dict[str, TapGroup]:
        assert self.net_t is not None
        pairs = tap_pairs(self.opt["train"]["taps"])
        return {**super().tap_groups(), "facd": TapGroup("train.taps", pairs, self.net_t)}

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_facd = self.build_loss("facd_opt")
        self.gate_mode = train_opt.get("gate", "hard")
        self.gate_temperature = train_opt.get("gate_temperature", 0.01)

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        assert self.student_bundle is not None and self.cri_facd is not None
        taught = self.taught_features("facd")
        features = resized_like(self.student_bundle.features["facd"], taught)
        candidates = [gather_batches(level) for level in taught]
        own = torch.arange(len(self.lq), device=self.device) + self.opt["rank"] * len(self.lq)
        gt = None if self.gate_mode == "off" else self.gt  # there may be none
        self.gate = patch_gate(self.output, self.teacher_output, gt, self.gate_mode, self.gate_temperature)
        losses["l_facd"], self.bound = self.cri_facd(features, candidates, own, self.gate)
        return losses

    def statistics(self) -> dict[str, Tensor]:
        return {**super().statistics(), "mutual_information": self.bound, "gated": self.gate.mean()}
