"""CSD's contrast: towards the teacher's output, away from other samples' blurred inputs, as an extractor sees them.

Wang et al., "Towards Compact Single Image Super-Resolution via Contrastive Self-distillation", IJCAI 2021 (arXiv
2105.11683). Where it leaves the release is in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.losses.contrastive_loss import ContrasLoss
from kdsr.models.extraction import extract_features
from kdsr.models.pretrained import weight_files
from kdsr.models.terms.features import loss_problems, smallest_batch
from kdsr.models.terms.term import Term
from kdsr.runtime.errors import OptionError


def following(samples: Tensor, count: int) -> Tensor:
    """For each sample of a batch the ``count`` that follow it, the first ones following the last.

    Args:
        samples: (N, C, H, W).
        count: 1 to N - 1.

    Returns:
        (count, N, C, H, W), a view of N + count samples: the k-th row has, for sample i, sample i + 1 + k.
    """
    doubled = torch.cat([samples, samples[:count]])
    return doubled[1:].unfold(0, len(samples), 1).movedim(-1, 1)


class CSDTerm(Term):
    """``l_csd``: the ratio contrast of ``ContrasLoss`` on the features of ``network_extractor`` (VGG19 in the paper).

    Anchor S(x), positive T(x), negatives the bicubic inputs of ``csd_negatives`` other samples of the process's batch
    (all of them by default). In a model with a ``network_vqgan`` that one serves where no extractor is given.
    """

    KEY = "csd_opt"
    TRAIN_KEYS = {KEY: (dict, type(None)), "csd_negatives": (int, type(None))}
    NETWORK_KEYS = frozenset({"extractor"})
    NEEDS = frozenset({"teacher"})

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = loss_problems(opt, cls.KEY, ContrasLoss)
        if opt.get("network_extractor"):
            if "extractor" not in weight_files(opt):
                problems.append(
                    "path.pretrain_network_extractor: missing; features of a random network mean nothing"
                )
        elif not opt.get("network_vqgan"):
            problems.append(
                f"network_extractor: missing, train.{cls.KEY} sees images through it; give {{type: VGG19}} or a VQGAN"
            )
        batch, asked = smallest_batch(opt), opt["train"].get("csd_negatives")
        if asked is not None and asked < 1:
            problems.append(f"train.csd_negatives: {asked} is no number of negatives, from 1")
        elif batch is not None and batch < 1 + (asked or 1):
            problems.append(_too_few(batch, asked))
        return problems

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.own_extractor = model.build_frozen("extractor") if model.opt.get("network_extractor") else None
        self.levels = next(len(m.weights) for m in self.cri.modules() if isinstance(m, ContrasLoss))

    @property
    def extractor(self) -> nn.Module:
        return self.model.net_vqgan if self.own_extractor is None else self.own_extractor

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        output, samples = self.model.output, len(self.model.output)
        if samples < 2:
            raise OptionError(_too_few(samples, None))
        count = min(self.model.opt["train"].get("csd_negatives") or samples, samples - 1)
        with torch.no_grad():
            lq = self.model.lq.float()
            blurred = F.interpolate(lq, output.shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
            frozen = torch.cat([self.model.teacher_output, blurred.to(output.dtype)])
            features = extract_features(self.extractor, frozen, self.levels)
        anchor = extract_features(self.extractor, output, self.levels)
        positive = [level[:samples] for level in features]
        negatives = [following(level[samples:], count) for level in features]
        return {"l_csd": self.cri(anchor, positive, negatives)}


def _too_few(batch: int, asked: int | None) -> str:
    whose = "the others" if asked is None else f"{asked} others (train.csd_negatives)"
    fewer = f", or train.csd_negatives to {batch - 1} or less" if asked is not None and batch > 1 else ""
    return (
        f"train.csd_opt: contrasts a sample with the inputs of {whose} of its batch, and "
        f"datasets.train.batch_size_per_gpu is {batch}; set it to {1 + max(asked or 1, 1)} or more{fewer}"
    )
