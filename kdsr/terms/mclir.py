"""MCLIR's term: negatives from earlier states of the network (arXiv 2309.06023, AAAI 2024), without a teacher."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.distill.extractors import EXTRACTOR, features_of
from kdsr.distill.moving_average import blend_weights
from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.distill.weight_files import weight_files
from kdsr.losses.contrastive_loss import ContrasLoss
from kdsr.losses.levels import levels_compared
from kdsr.losses.negative_loss import NegativeLoss
from kdsr.runtime.declarations import Options, Section, loss, option


class OwnPastOptions(Options):
    neg_opt: Section | None = loss(
        "Distance from outputs of earlier students in features of `network_extractor`, `l_neg`; `ContrasLoss` uses the "
        "ground truth as positive.",
        NegativeLoss,
        ContrasLoss,
    )
    neg_iter: int | list[int] = option(
        1000,
        "Iterations between updates of the negative model; a list has an entry for each of several models.",
        lowest=1,
        fewest=1,
    )
    neg_decay: float | list[float] = option(
        0.1,
        "Weight of the old negative model in an update, from 0 to 1; one number, or one for each model.",
        lowest=0,
        highest=1,
        fewest=1,
    )
    neg_start: float = option(
        0.1, "Weight of a random network in the initial negative model; 0: the student.", lowest=0, highest=1
    )


@TERM_REGISTRY.register()
class OwnPastTerm(Term):
    """``l_neg = −λ · Σ_i w_i · mean_k |f_i(S(x)) − f_i(N_k(x))|``, N_k slow copies of the student.

    f are the features of a frozen ``network_extractor`` (VGG19 or a VQGAN). With ``neg_opt: {type: ContrasLoss}`` the
    loss is the ratio of the distances to y and to the negatives, which is bounded.

    A negative model is initialised with the weighted mean of a random network (``neg_start``) and the student. Update:
    ``θ_k ← neg_decay_k·θ_k + (1 − neg_decay_k)·θ`` every ``neg_iter_k`` iterations.
    """

    KEY = "neg_opt"
    LABELS = {"net_extractor": "extractor", "net_neg": "negative models"}
    options = OwnPastOptions
    NETWORKS = EXTRACTOR

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        loss = train.get(cls.KEY)
        has_positive = isinstance(loss, dict) and loss.get("type") == ContrasLoss.__name__
        return {cls.KEY: "use NegativeLoss"} if has_positive else {}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = []
        if not opt.get("network_extractor"):
            problems.append(
                f"network_extractor: missing, train.{cls.KEY} compares its features; give {{type: VGG19}} or a VQGAN"
            )
        elif "extractor" not in weight_files(opt):
            problems.append(
                "path.pretrain_network_extractor: missing; features of a random network are useless"
            )
        options = cls.options.read(opt["train"])
        models, decays = len(_listed(options.neg_iter)), len(_listed(options.neg_decay))
        if decays not in (1, models):
            problems.append(
                f"train.neg_decay: {decays} entries for {models} negative models (train.neg_iter)"
            )
        return problems

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.extractor = setup.frozen("extractor")
        self.iterations: list[int] = _listed(self.options.neg_iter)
        self.decays: list[float] = _listed(self.options.neg_decay)
        self.decays *= len(self.iterations) // len(self.decays)
        self.negatives = nn.ModuleList(setup.new_student() for _ in self.iterations)
        for net in self.negatives:
            blend_weights(net, setup.student, self.options.neg_start)
        loss = next(part for part in self.loss.modules() if isinstance(part, ContrasLoss | NegativeLoss))
        self.levels = levels_compared(self.loss)
        self.weights = loss.weights
        self.with_positive = isinstance(loss, ContrasLoss)
        follows = " and ".join(f"every {each}" for each in self.iterations)
        get_root_logger().info(f"net_neg follows the student {follows} iterations")

    def before_student(self, step: Step) -> None:
        step.kept[self.KEY] = torch.cat([net(step.lq).to(step.lq.dtype) for net in self.negatives])

    def losses(self, step: Step) -> dict[str, Tensor]:
        frozen = [step.kept[self.KEY], *([step.ground_truth] if self.with_positive else [])]
        answers = step.extract(self.extractor, *frozen, step.output, levels=self.levels)
        negatives, *positive, anchor = (
            features_of(answer, self.extractor, self.weights) for answer in answers
        )
        return {"l_neg": self.loss(anchor, *positive, negatives)}

    def after_step(self, step: Step) -> None:
        for net, every, decay in zip(self.negatives, self.iterations, self.decays, strict=True):
            if step.iteration % every == 0:
                blend_weights(net, step.student, decay)

    def networks(self) -> dict[str, nn.Module]:
        return {"net_extractor": self.extractor, "net_neg": self.negatives}

    def state_networks(self) -> dict[str, nn.Module]:
        return {"net_neg": self.negatives}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
