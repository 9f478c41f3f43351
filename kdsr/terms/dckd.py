"""DCKD's two terms: dynamic contrastive regularisation and distribution mapping (arXiv 2412.08939, AAAI 2025).

Both see images through a frozen VQGAN, ``network_vqgan``, which sees each set of images once per step.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.distill.moving_average import blend_weights
from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.terms.dckd_degradations import degrade, probability_problems

Number = (int, float)
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


class _ThroughVQGAN(Term):
    """A term that compares the student with the teacher through ``network_vqgan``.

    ``vqgan_chunk``: images per batch of its passes without a gradient (default all at once).
    """

    NETWORK_KEYS = frozenset({"vqgan"})
    NEEDS = frozenset({"teacher_output"})
    LABELS = {"net_vqgan": "VQGAN", "net_his": "history model"}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = []
        if not opt.get("network_vqgan"):
            problems.append(
                "network_vqgan: missing; train.cl_opt and train.ce_opt compare student and teacher through a VQGAN"
            )
        elif not (opt.get("path") or {}).get("pretrain_network_vqgan"):
            problems.append("path.pretrain_network_vqgan: missing; the codes of a random VQGAN mean nothing")
        chunk = opt["train"].get("vqgan_chunk")
        if isinstance(chunk, int) and chunk < 1:
            problems.append("train.vqgan_chunk: must be at least 1")
        return problems

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.vqgan = setup.frozen("vqgan")

    def seen(self, step: Step, *images: Tensor) -> list[Any]:
        """Features per level and code logits of each set of images."""
        return step.extract(self.vqgan, *images, chunk=self.train.get("vqgan_chunk"))


@TERM_REGISTRY.register()
class ContrastTerm(_ThroughVQGAN):
    """``l_cl``, the dynamic contrastive regularisation (``ContrasLoss``).

    Anchor S(x), positive T(x), negatives ``F_his(D_j(x))``: outputs of a slow copy of the student, the history model,
    on degraded inputs.

    Options (``train``), with the release's defaults: ``num_neg`` (4) degraded negatives, and the undegraded one where
    ``clean_negative`` (true); ``gaussian_blur_prob`` (1), ``resize_prob`` (0), ``gaussian_noise_prob`` (0),
    ``gray_noise_prob`` (0); history update ``θ_his ← update_decay·θ_his + (1 − update_decay)·θ`` (0.1) every ``step``
    iterations (1000; see ``history_step``) from ``history_source``: ``ema`` (the release) or ``student`` (the paper).
    """

    KEY = "cl_opt"
    TRAIN_KEYS: ClassVar[dict[str, Any]] = {
        KEY: (dict, type(None)),
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

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        train = opt["train"]
        problems = super().problems(opt) + probability_problems(train)
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
        return problems

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.history = deepcopy(setup.student).eval().requires_grad_(False)
        self.decay = self.train.get("update_decay", 0.1)
        self.schedule = self.train.get("step", 1000)
        self.source = self.train.get("history_source", "ema" if self.train.get("ema_decay") else "student")
        get_root_logger().info(f"net_his follows the {self.source} every {self.schedule} iterations")

    def before_student(self, step: Step) -> None:
        step.kept[self.KEY] = self.negatives(step)

    def negatives(self, step: Step) -> Tensor:
        """``I_neg^j = F_his(D_j(x))``, (K·N, C, H, W), the N images of the first degradation first."""
        train, inputs = self.train, []
        if train.get("num_neg", 4) > 0:
            inputs.append(
                degrade(
                    step.lq,
                    num=train.get("num_neg", 4),
                    blur_prob=train.get("gaussian_blur_prob", 1.0),
                    resize_prob=train.get("resize_prob", 0.0),
                    noise_prob=train.get("gaussian_noise_prob", 0.0),
                    gray_noise_prob=train.get("gray_noise_prob", 0.0),
                    generator=step.generator,
                )
            )
        if train.get("clean_negative", True):
            inputs.append(step.lq)
        return self.history(torch.cat(inputs)).to(step.lq.dtype)

    def losses(self, step: Step) -> dict[str, Tensor]:
        (positive, _), (negatives, _) = self.seen(step, step.teacher_output, step.kept[self.KEY])
        ((anchor, _),) = self.seen(step, step.output)
        return {"l_cl": self.loss(anchor, positive, negatives)}

    def after_step(self, step: Step) -> None:
        if step.iteration % history_step(self.schedule, step.iteration) == 0:
            source = step.student_ema if self.source == "ema" else step.student
            assert source is not None
            blend_weights(self.history, source, self.decay)

    def networks(self) -> dict[str, nn.Module]:
        return {"net_vqgan": self.vqgan, "net_his": self.history}

    def state_networks(self) -> dict[str, nn.Module]:
        return {"net_his": self.history}


@TERM_REGISTRY.register()
class DistributionTerm(_ThroughVQGAN):
    """``l_ce``, distribution mapping: the student's code distributions shall be the teacher's (``CELoss``)."""

    KEY = "ce_opt"
    TRAIN_KEYS = {KEY: (dict, type(None)), "vqgan_chunk": (int, type(None))}

    def losses(self, step: Step) -> dict[str, Tensor]:
        (_, student), (_, teacher) = self.seen(step, step.output, step.teacher_output)
        return {"l_ce": self.loss(student, teacher)}

    def networks(self) -> dict[str, nn.Module]:
        return {"net_vqgan": self.vqgan}
