"""DCKDModel: dynamic contrastive regularisation and distribution mapping (DCKD, arXiv 2412.08939, AAAI 2025)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.data.degradations import PROBABILITY_KEYS, degrade, probability_problems
from kdsr.models.base_model import Number
from kdsr.models.kd_model import KDModel
from kdsr.models.moving_average import blend_weights

ITERATIONS_PER_STEP = 100_000  # the release changes the history's step every 100k iterations
HISTORY_SOURCES = ("ema", "student")


def history_step(step: int | list[int], current_iter: int) -> int:
    """Iterations between two updates of the history model.

    Args:
        step: One number for the whole run; or, as in the release, one per 100k iterations: the first holds for
            iterations n ≤ 100k, the second for n ≤ 200k, and so on. The last one holds on (in the release iteration
            300,001 is an index error).
        current_iter: From 1.
    """
    if isinstance(step, int):
        return step
    return step[min((current_iter - 1) // ITERATIONS_PER_STEP, len(step) - 1)]


@MODEL_REGISTRY.register()
class DCKDModel(KDModel):
    """``L = L_rec + L_kd [+ L_lcr] + L_dcl + L_ce`` (Eq. 10, weights in the options).

    The history model ``net_his`` is a slow copy of the student; its outputs on degraded inputs are the negatives, the
    teacher's output is the positive, both seen through the encoder of a frozen VQGAN (``net_vqgan``). The VQGAN's
    codebook also turns outputs into code distributions, the student's being drawn to the teacher's.

    Options (``train``), with the release's defaults: ``cl_opt`` → ``l_cl``; ``ce_opt`` → ``l_ce``; ``num_neg`` (4)
    degraded negatives, and the undegraded one where ``clean_negative`` (true); ``gaussian_blur_prob`` (1),
    ``resize_prob`` (0), ``gaussian_noise_prob`` (0), ``gray_noise_prob`` (0); history update ``θ_his ←
    update_decay·θ_his + (1 − update_decay)·θ`` (0.1) every ``step`` iterations (1000; see ``history_step``) from
    ``history_source``: ``ema`` (the release) or ``student`` (the paper). ``vqgan_chunk``: images per no-grad VQGAN
    batch (default all at once).
    """

    TRAIN_KEYS: dict[str, Any] = {
        "cl_opt": (dict, type(None)),
        "ce_opt": (dict, type(None)),
        "num_neg": int,
        "clean_negative": bool,
        "update_decay": Number,
        "step": (int, list),
        "history_source": str,
        "gaussian_blur_prob": Number,
        "resize_prob": Number,
        "gaussian_noise_prob": Number,
        "gray_noise_prob": Number,
        "vqgan_chunk": (int, type(None)),
    }
    NETWORK_KEYS = frozenset({"his", "vqgan"})
    READ_WITH = {
        "vqgan_chunk": ("cl_opt", "ce_opt"),
        **dict.fromkeys(
            (*PROBABILITY_KEYS, "num_neg", "clean_negative", "update_decay", "step", "history_source"),
            ("cl_opt",),
        ),
    }

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt) + probability_problems(train)
        for key in ("network_t", "network_vqgan"):
            if not opt.get(key):
                problems.append(
                    f"{key}: missing; DCKDModel compares the student with a teacher through a VQGAN"
                )
        if opt.get("network_vqgan") and not (opt.get("path") or {}).get("pretrain_network_vqgan"):
            problems.append("path.pretrain_network_vqgan: missing; the codes of a random VQGAN mean nothing")
        if opt.get("network_his", True) is not True:
            problems.append(
                "network_his: must be true: the history model is a copy of the student, of no other shape"
            )
        decay = train.get("update_decay", 0.1)
        if not 0 <= decay <= 1:
            problems.append(f"train.update_decay: {decay} is the share of the old history model, from 0 to 1")
        if train.get("num_neg", 4) < 0 or train.get("num_neg", 4) + train.get("clean_negative", True) < 1:
            problems.append("train.num_neg: there must be at least one negative (or clean_negative: true)")
        step = train.get("step", 1000)
        entries = step if isinstance(step, list) else [step]
        if not entries or not all(isinstance(entry, int) and entry > 0 for entry in entries):
            problems.append(f"train.step: {step!r} must be a number of iterations above 0, or a list of such")
        source = train.get("history_source", "ema")
        if source not in HISTORY_SOURCES:
            problems.append(
                f"train.history_source: {source!r} is not known; use {' or '.join(HISTORY_SOURCES)}"
            )
        elif "history_source" in train and source == "ema" and not train.get("ema_decay"):
            problems.append("train.history_source: ema needs train.ema_decay above 0")
        if isinstance(train.get("vqgan_chunk"), int) and train["vqgan_chunk"] < 1:
            problems.append("train.vqgan_chunk: must be at least 1")
        return problems

    net_vqgan: nn.Module
    net_his: nn.Module

    def build_training_networks(self) -> None:
        super().build_training_networks()
        self.net_vqgan = self.build_frozen("vqgan")
        self.net_his = deepcopy(self.net_g).eval().requires_grad_(False)

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_contrastive = self.build_loss("cl_opt")
        self.cri_distribution = self.build_loss("ce_opt")
        self.history_decay = train_opt.get("update_decay", 0.1)
        self.history_schedule = train_opt.get("step", 1000)
        self.history_source = train_opt.get("history_source", "ema" if self.ema_decay > 0 else "student")
        get_root_logger().info(
            f"net_his follows the {self.history_source} every {self.history_schedule} iterations"
        )

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        if not (self.cri_contrastive or self.cri_distribution):
            return losses
        samples = len(self.output)
        frozen = [self.teacher_output]
        if self.cri_contrastive:
            frozen.append(self.draw_negatives())
        features, code_logits = self.extract_frozen(torch.cat(frozen))
        anchor, student_logits = self.net_vqgan(self.output)
        if self.cri_contrastive:
            positive = [level[:samples] for level in features]
            negatives = [level[samples:] for level in features]
            losses["l_cl"] = self.cri_contrastive(anchor, positive, negatives)
        if self.cri_distribution:
            losses["l_ce"] = self.cri_distribution(student_logits, code_logits[: len(student_logits)])
        return losses

    @torch.no_grad()
    def draw_negatives(self) -> Tensor:
        """``I_neg^j = F_his(D_j(x))``, (K·N, C, H, W), the N images of the first degradation first."""
        train = self.opt["train"]
        inputs = []
        if train.get("num_neg", 4) > 0:
            inputs.append(
                degrade(
                    self.lq,
                    num=train.get("num_neg", 4),
                    blur_prob=train.get("gaussian_blur_prob", 1.0),
                    resize_prob=train.get("resize_prob", 0.0),
                    noise_prob=train.get("gaussian_noise_prob", 0.0),
                    gray_noise_prob=train.get("gray_noise_prob", 0.0),
                    generator=self.generator,
                )
            )
        if train.get("clean_negative", True):
            inputs.append(self.lq)
        return self.net_his(torch.cat(inputs)).to(self.lq.dtype)

    @torch.no_grad()
    def extract_frozen(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features per level and code logits of images that need no gradient, ``vqgan_chunk`` at a time."""
        chunk = self.opt["train"].get("vqgan_chunk") or len(images)
        parts = [self.net_vqgan(part) for part in images.split(chunk)]
        if len(parts) == 1:
            return parts[0]
        levels = [torch.cat(level) for level in zip(*(features for features, _ in parts), strict=True)]
        return levels, torch.cat([logits for _, logits in parts])

    def after_step(self, current_iter: int) -> None:
        super().after_step(current_iter)
        if current_iter % history_step(self.history_schedule, current_iter) == 0:
            source = self.net_g_ema if self.history_source == "ema" else self.net_g
            blend_weights(self.net_his, source, self.history_decay)

    def state_networks(self) -> dict[str, nn.Module]:
        return {**super().state_networks(), "net_his": self.net_his}
