"""CSD's contrastive loss: towards the teacher's output, away from upsampled inputs of other samples.

Wang et al., "Towards Compact Single Image Super-Resolution via Contrastive Self-distillation", IJCAI 2021 (arXiv
2105.11683). Differences from the release are in docs/methods.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.distill.extractors import EXTRACTOR, VQGAN, features_of, vqgan_multiples
from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.distill.weight_files import weight_files
from kdsr.losses.contrastive_loss import ContrasLoss
from kdsr.losses.levels import levels_compared
from kdsr.runtime.declarations import Options, Section, loss, option
from kdsr.runtime.errors import OptionError
from kdsr.terms.features import smallest_batch


def following(samples: Tensor, count: int) -> Tensor:
    """Returns, for each sample of a batch, the next ``count`` samples, cyclically.

    Args:
        samples: (N, C, H, W).
        count: 1 to N - 1.

    Returns:
        (count, N, C, H, W), a view of N + count samples: entry (k, i) is sample i + 1 + k, modulo N.
    """
    doubled = torch.cat([samples, samples[:count]])
    return doubled[1:].unfold(0, len(samples), 1).movedim(-1, 1)


class CSDOptions(Options):
    csd_opt: Section | None = loss(
        "Contrastive loss on features of `network_extractor`, `l_csd`.", ContrasLoss
    )
    csd_negatives: int | None = option(
        None,
        "Number of other samples of the batch whose inputs are the negatives of a sample; null: all others.",
        lowest=1,
    )


@TERM_REGISTRY.register()
class CSDTerm(Term):
    """``l_csd``: the contrastive loss ``ContrasLoss`` on the features of ``network_extractor`` (VGG19 in the paper).

    Anchor S(x), positive T(x), negatives the bicubic inputs of ``csd_negatives`` other samples of the process's batch
    (all of them by default). Without an extractor, ``network_vqgan`` is used.
    """

    KEY = "csd_opt"
    LABELS = {"net_extractor": "extractor", "net_vqgan": "VQGAN"}
    options = CSDOptions
    NETWORKS = EXTRACTOR | VQGAN
    NEEDS = frozenset({"teacher_output"})

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = []
        if opt.get("network_extractor"):
            if "extractor" not in weight_files(opt):
                problems.append(
                    "path.pretrain_network_extractor: missing; features of a random network are useless"
                )
        elif not opt.get("network_vqgan"):
            problems.append(
                f"network_extractor: missing, train.{cls.KEY} compares its features; give {{type: VGG19}} or a VQGAN"
            )
        batch, negatives = smallest_batch(opt), cls.options.read(opt["train"]).csd_negatives
        if batch is not None and batch < 1 + (negatives or 1):
            problems.append(_too_few(batch, negatives))
        return problems

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        return vqgan_multiples(opt)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.extractor = setup.frozen("extractor" if setup.opt.get("network_extractor") else "vqgan")
        self.levels = levels_compared(self.loss)
        self.weights = next(m.weights for m in self.loss.modules() if isinstance(m, ContrasLoss))

    def losses(self, step: Step) -> dict[str, Tensor]:
        samples = len(step.output)
        if samples < 2:
            raise OptionError(_too_few(samples, None))
        count = min(self.options.csd_negatives or samples, samples - 1)
        with torch.no_grad():
            lq = step.lq.float()
            blurred = F.interpolate(lq, step.output.shape[2:], mode="bicubic", align_corners=False).clamp(
                0, 1
            )
        answers = step.extract(
            self.extractor,
            step.output,
            step.teacher_output,
            blurred.to(step.output.dtype),
            levels=self.levels,
        )
        anchor, positive, inputs = (features_of(answer, self.extractor, self.weights) for answer in answers)
        return {"l_csd": self.loss(anchor, positive, [following(level, count) for level in inputs])}

    def networks(self) -> dict[str, nn.Module]:
        key = "extractor" if self.setup.opt.get("network_extractor") else "vqgan"
        return {f"net_{key}": self.extractor}


def _too_few(batch: int, negatives: int | None) -> str:
    whose = "the others" if negatives is None else f"{negatives} others (train.csd_negatives)"
    fewer = f", or train.csd_negatives to {batch - 1} or less" if negatives is not None and batch > 1 else ""
    return (
        f"train.csd_opt: compares a sample with the inputs of {whose} of its batch, and "
        f"datasets.train.batch_size_per_gpu is {batch}; set it to {1 + max(negatives or 1, 1)} or more{fewer}"
    )
