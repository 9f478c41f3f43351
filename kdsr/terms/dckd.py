"""DCKD's two terms: dynamic contrastive regularisation and distribution mapping (arXiv 2412.08939, AAAI 2025).

Both compare features or codes of a frozen VQGAN, ``network_vqgan``, which runs once per step for each set of images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.distill.extractors import VQGAN, vqgan_multiples
from kdsr.distill.moving_average import blend_weights
from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.losses.levels import levels_compared
from kdsr.runtime.declarations import Network, Options, Section, loss, option
from kdsr.terms.dckd_degradations import degrade

ITERATIONS_PER_STEP = 100_000  # in the release, the step of the history model changes every 100k iterations


def history_step(step: int | list[int], current_iter: int) -> int:
    """Returns the iterations between two updates of the history model.

    Args:
        step: One number, or, as in the release, one per 100k iterations: the first is used for iterations n ≤ 100k, the
            second for n ≤ 200k, and so on. The last one is used until the end (in the release, iteration 300,001 is
            an index error).
        current_iter: The iteration, from 1.
    """
    if isinstance(step, int):
        return step
    return step[min((current_iter - 1) // ITERATIONS_PER_STEP, len(step) - 1)]


class ThroughVQGANOptions(Options):
    vqgan_chunk: int | None = option(
        None,
        "Images per pass of the VQGAN without gradient; null: on a GPU all, on a CPU as many as fit its caches.",
        lowest=1,
    )


class _ThroughVQGAN(Term):
    """A term that compares the student with the teacher through ``network_vqgan``."""

    NETWORKS = VQGAN
    NEEDS = frozenset({"teacher_output"})
    LABELS = {"net_vqgan": "VQGAN", "net_his": "history model"}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        if not opt.get("network_vqgan"):
            return [
                "network_vqgan: missing; train.cl_opt and train.ce_opt compare student and teacher through a VQGAN"
            ]
        if not (opt.get("path") or {}).get("pretrain_network_vqgan"):
            return ["path.pretrain_network_vqgan: missing; the codes of a random VQGAN are useless"]
        return []

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        return vqgan_multiples(opt)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.vqgan = setup.frozen("vqgan")


class ContrastOptions(ThroughVQGANOptions):
    """The defaults are the release's."""

    cl_opt: Section | None = loss("Contrastive loss (`ContrasLoss`), `l_cl`.")
    num_neg: int = option(4, "Negatives from degraded inputs.", lowest=0)
    clean_negative: bool = option(
        True, "Whether there is one more negative, from the input without degradation."
    )
    gaussian_blur_prob: float = option(1.0, "Probability of a blur, per negative.", lowest=0, highest=1)
    resize_prob: float = option(0.0, "Probability of resizing there and back.", lowest=0, highest=1)
    gaussian_noise_prob: float = option(0.0, "Probability of noise.", lowest=0, highest=1)
    gray_noise_prob: float = option(
        0.0, "Probability that the noise of a sample is grey.", lowest=0, highest=1
    )
    step: int | list[int] = option(
        1000,
        "Iterations between updates of the history model; a list has an entry per 100,000 iterations.",
        lowest=1,
        fewest=1,
    )
    update_decay: float = option(
        0.1, "Weight of the old history model in an update, from 0 to 1.", lowest=0, highest=1
    )
    history_source: str = option(
        None,
        "What the history model follows: the student's EMA (the release) or the student (the paper).",
        choices=("ema", "student"),
        shown_default="ema; student without an EMA",
    )


HISTORY = replace(
    Network("`true`, as in the release: the history model is a copy of the student.", in_state=True),
    kinds=(dict, bool, type(None)),
    default=True,
)


@TERM_REGISTRY.register()
class ContrastTerm(_ThroughVQGAN):
    """``l_cl``, the dynamic contrastive regularisation (``ContrasLoss``).

    Anchor S(x), positive T(x), negatives ``F_his(D_j(x))``: outputs of the history model, a slow copy of the student,
    on degraded inputs. Every ``step`` iterations ``θ_his ← update_decay·θ_his + (1 − update_decay)·θ``.
    """

    KEY = "cl_opt"
    options = ContrastOptions
    NETWORKS = VQGAN | {"his": HISTORY}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        train = opt["train"]
        problems, options = super().problems(opt), cls.options.read(train)
        if opt.get("network_his", True) is not True:
            problems.append("network_his: must be true: the history model is a copy of the student")
        if not (options.num_neg or options.clean_negative):
            problems.append(
                "train.num_neg: at least one negative is required; give 1 or more, or clean_negative: true"
            )
        if options.history_source == "ema" and not train.get("ema_decay"):
            problems.append("train.history_source: ema needs train.ema_decay above 0")
        return problems

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.levels = levels_compared(self.loss) if self.loss is not None else None
        self.history = setup.copied(setup.student)
        self.decay, self.schedule = self.options.update_decay, self.options.step
        self.source = self.options.history_source or ("ema" if setup.train.get("ema_decay") else "student")
        get_root_logger().info(f"net_his follows the {self.source} every {self.schedule} iterations")

    def before_student(self, step: Step) -> None:
        step.kept[self.KEY] = self.negatives(step)

    def negatives(self, step: Step) -> Tensor:
        """``I_neg^j = F_his(D_j(x))``, (K·N, C, H, W), the N images of the first degradation first."""
        options, inputs = self.options, []
        if options.num_neg > 0:
            inputs.append(
                degrade(
                    step.lq,
                    num=options.num_neg,
                    blur_prob=options.gaussian_blur_prob,
                    resize_prob=options.resize_prob,
                    noise_prob=options.gaussian_noise_prob,
                    gray_noise_prob=options.gray_noise_prob,
                    generator=step.generator,
                )
            )
        if options.clean_negative:
            inputs.append(step.lq)
        return self.history(torch.cat(inputs)).to(step.lq.dtype)

    def losses(self, step: Step) -> dict[str, Tensor]:
        images = step.output, step.teacher_output, step.kept[self.KEY]
        features = step.extract(self.vqgan, *images, chunk=self.options.vqgan_chunk, levels=self.levels)
        return {"l_cl": self.loss(*features)}

    def after_step(self, step: Step) -> None:
        if step.iteration % history_step(self.schedule, step.iteration) == 0:
            source = step.student_ema if self.source == "ema" else step.student
            assert source is not None
            blend_weights(self.history, source, self.decay)

    def networks(self) -> dict[str, nn.Module]:
        return {"net_vqgan": self.vqgan, "net_his": self.history}

    def state_networks(self) -> dict[str, nn.Module]:
        return {"net_his": self.history}


class DistributionOptions(ThroughVQGANOptions):
    ce_opt: Section | None = loss("Distribution mapping (`CELoss`), `l_ce`.")


@TERM_REGISTRY.register()
class DistributionTerm(_ThroughVQGAN):
    """``l_ce``, distribution mapping: cross-entropy of student's and teacher's code distributions (``CELoss``)."""

    KEY = "ce_opt"
    options = DistributionOptions

    def losses(self, step: Step) -> dict[str, Tensor]:
        images = step.output, step.teacher_output
        return {"l_ce": self.loss(*step.code_logits(self.vqgan, *images, chunk=self.options.vqgan_chunk))}

    def networks(self) -> dict[str, nn.Module]:
        return {"net_vqgan": self.vqgan}
