"""MCLIRModel: negatives from the network's own past (MCLIR, arXiv 2309.06023, AAAI 2024). It needs no teacher."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.losses.contrastive_loss import ContrasLoss
from kdsr.losses.negative_loss import NegativeLoss
from kdsr.models.base_model import Number
from kdsr.models.extraction import extract_features
from kdsr.models.kd_model import KDModel
from kdsr.models.moving_average import blend_weights
from kdsr.models.pretrained import weight_files
from kdsr.models.terms.features import loss_problems
from kdsr.runtime.distributed import share_weights


@MODEL_REGISTRY.register()
class MCLIRModel(KDModel):
    """``L = L1(S(x), y) − λ · Σ_i w_i · mean_k |f_i(S(x)) − f_i(N_k(x))|``, N_k slow copies of the student itself.

    f are the features of a frozen ``network_extractor`` (VGG19 or a VQGAN). With ``neg_opt: {type: ContrasLoss}`` the
    second term is the ratio of the distances to y and to the negatives, which is bounded.

    A negative model begins as ``neg_start`` parts of a random network and the rest of the student, and follows:
    ``θ_k ← neg_decay_k·θ_k + (1 − neg_decay_k)·θ`` every ``neg_iter_k`` iterations.

    Options (``train``): ``neg_opt`` → ``l_neg``; ``neg_iter`` (1000) and ``neg_decay`` (0.1): numbers, or lists with
    an entry for each negative model; ``neg_start`` (0.1). With a ``network_t`` the terms of ``KDModel`` can be added.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "neg_opt": dict,
        "neg_iter": (int, list),
        "neg_decay": (*Number, list),
        "neg_start": Number,
    }
    NETWORK_KEYS = frozenset({"extractor"})
    READ_WITH = {"network_extractor": ("neg_opt",)}

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        needing = super().keys_with_gt(train)
        loss = train.get("neg_opt")
        has_positive = isinstance(loss, dict) and loss.get("type") == ContrasLoss.__name__
        return {**needing, "neg_opt": "use NegativeLoss"} if has_positive else needing

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt)
        if not train.get("neg_opt"):
            problems.append(
                "train.neg_opt: missing; give {type: NegativeLoss} or {type: ContrasLoss}, or use KDModel"
            )
        elif train["neg_opt"].get("type") != ContrasLoss.__name__:
            problems += loss_problems(opt, "neg_opt", NegativeLoss)
        if not opt.get("network_extractor"):
            problems.append(
                "network_extractor: missing, train.neg_opt sees images through it; give {type: VGG19} or a VQGAN"
            )
        elif "extractor" not in weight_files(opt):
            problem = "path.pretrain_network_extractor: missing; features of a random network mean nothing"
            problems += [problem] if problem not in problems else []
        iterations, decays = _listed(train.get("neg_iter", 1000)), _listed(train.get("neg_decay", 0.1))
        if not iterations or not all(type(each) is int and each > 0 for each in iterations):
            problems.append(
                f"train.neg_iter: {train['neg_iter']!r} must be a number of iterations above 0, or a list of such"
            )
        if not decays or not all(isinstance(each, Number) and 0 <= each <= 1 for each in decays):
            problems.append(
                f"train.neg_decay: {train['neg_decay']!r} is the share of the old negative model, from 0 to 1, or a "
                "list of such"
            )
        if len(decays) not in (1, len(iterations)):
            problems.append(
                f"train.neg_decay: {len(decays)} entries for {len(iterations)} negative models (train.neg_iter)"
            )
        if not 0 <= train.get("neg_start", 0.1) <= 1:
            problems.append(
                f"train.neg_start: {train['neg_start']} is the share of a random network, from 0 to 1"
            )
        return problems

    net_neg: nn.ModuleList
    net_extractor: nn.Module

    def build_training_networks(self) -> None:
        super().build_training_networks()
        train = self.opt["train"]
        self.net_extractor = self.build_frozen("extractor")
        self.neg_iter: list[int] = _listed(train.get("neg_iter", 1000))
        self.neg_decay: list[float] = _listed(train.get("neg_decay", 0.1))
        self.neg_decay *= len(self.neg_iter) // len(self.neg_decay)
        start = train.get("neg_start", 0.1)
        self.net_neg = nn.ModuleList(self._begun(start) for _ in self.neg_iter)
        follows = " and ".join(f"every {each}" for each in self.neg_iter)
        get_root_logger().info(f"net_neg follows the student {follows} iterations")

    def _begun(self, start: float) -> nn.Module:
        """A negative model as it begins: ``start`` parts of a random network, the rest of the student."""
        net = self.precision.place(build_network(self.opt["network_g"])).eval().requires_grad_(False)
        share_weights(net)
        blend_weights(net, self.net_g, start)
        return net

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        cri = self.build_loss("neg_opt")
        assert cri is not None  # the option check saw to it
        self.cri_negative = cri
        loss = next(part for part in cri.modules() if isinstance(part, ContrasLoss | NegativeLoss))
        self.levels = len(loss.weights)
        self.with_positive = isinstance(loss, ContrasLoss)

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        samples = len(self.output)
        with torch.no_grad():
            images = [net(self.lq).to(self.output.dtype) for net in self.net_neg]
            if self.with_positive:
                images.insert(0, self.gt)
            frozen = extract_features(self.net_extractor, torch.cat(images), self.levels)
        anchor = extract_features(self.net_extractor, self.output, self.levels)
        if self.with_positive:
            positive = [level[:samples] for level in frozen]
            negatives = [level[samples:] for level in frozen]
            losses["l_neg"] = self.cri_negative(anchor, positive, negatives)
        else:
            losses["l_neg"] = self.cri_negative(anchor, frozen)
        return losses

    def after_step(self, current_iter: int) -> None:
        super().after_step(current_iter)
        for net, every, decay in zip(self.net_neg, self.neg_iter, self.neg_decay, strict=True):
            if current_iter % every == 0:
                blend_weights(net, self.net_g, decay)

    def state_networks(self) -> dict[str, nn.Module]:
        return {**super().state_networks(), "net_neg": self.net_neg}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
