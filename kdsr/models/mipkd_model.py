"""MiPKDModel: mixtures of the student's and the teacher's features and blocks (MiPKD, arXiv 2404.02573, ICLR 2025).

No code was released; the mixers are our reading of the paper's summary (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.losses.fitnet_loss import FitNetLoss
from kdsr.models.adapters import TapGroup
from kdsr.models.base_model import Number
from kdsr.models.feature_taps import shapes_of
from kdsr.models.kd_model import KDModel
from kdsr.models.mixing import BlockMixing, FeatureMixing, draw_mask
from kdsr.models.tap_options import missing_taps, tap_pairs, tap_problems
from kdsr.models.terms.features import loss_problems

_FEATURES, _BLOCKS = "feature_mixing", "block_mixing"


@MODEL_REGISTRY.register()
class MiPKDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T(x)) + L_fm + L_fm_aux + 0.1 · L_bm``.

    *Features*: at each tap student and teacher are encoded to a latent of the teacher's width; of a mixture of the two,
    element by element, a decoder makes the teacher's feature, ``‖D(M ⊙ E_T(F_T) + (1 − M) ⊙ E_S(F_S)) − F_T‖_1``. It is
    taught what to decode by the teacher's own latent, ``‖D(E_T(F_T)) − F_T‖_1``. *Blocks*: in a second pass of the
    student each named block is, with random R_k, replaced by the teacher's; ``‖out_mixed − T(x)‖_1``.

    The teacher sees x before the student does. Mixers and bridges belong to the training state and never to the
    student's file.

    Options (``train``): ``fm_opt`` and ``fm_aux_opt`` (``FitNetLoss``) → ``l_fm``, ``l_fm_aux`` at the ``taps``;
    ``bm_opt`` (any pixel loss) → ``l_bm`` with ``blocks``: ``[{student: layers.0, teacher: layers.1}, ...]``;
    ``mix_ratio`` and ``block_ratio`` (0.5): probability that an element, or a block, is the teacher's.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "fm_opt": (dict, type(None)),
        "fm_aux_opt": (dict, type(None)),
        "bm_opt": (dict, type(None)),
        "taps": (list, dict, type(None)),
        "blocks": (list, dict, type(None)),
        "mix_ratio": Number,
        "block_ratio": Number,
    }
    READ_WITH = {
        "taps": ("fm_opt",),
        "blocks": ("bm_opt",),
        "mix_ratio": ("fm_opt",),
        "block_ratio": ("bm_opt",),
    }

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt)
        if not opt.get("network_t"):
            problems.append("network_t: missing; MiPKDModel mixes the student's features with a teacher's")
        if not (train.get("fm_opt") or train.get("bm_opt")):
            problems.append("train.fm_opt: missing, and train.bm_opt too; give one of them, or use KDModel")
        problems += [
            missing_taps(opt, needed, [key])
            for key, needed in (("fm_opt", "taps"), ("bm_opt", "blocks"))
            if train.get(key) and train.get(needed) is None
        ]
        if train.get("fm_aux_opt") and not train.get("fm_opt"):
            problems.append("train.fm_aux_opt: teaches the decoder of train.fm_opt, which is missing")
        if train.get("blocks") is not None:
            problems += tap_problems(train["blocks"], "train.blocks", "blocks")
        for key in ("fm_opt", "fm_aux_opt"):
            if train.get(key):
                problems += loss_problems(opt, key, FitNetLoss)
        for key in ("mix_ratio", "block_ratio"):
            if not 0 <= train.get(key, 0.5) <= 1:
                problems.append(f"train.{key}: {train[key]} is no probability, from 0 to 1")
        return problems

    def tap_groups(self) -> dict[str, TapGroup]:
        groups = super().tap_groups()
        if not self.opt["train"].get("fm_opt"):
            return groups
        assert self.net_t is not None
        pairs = tap_pairs(self.opt["train"]["taps"])
        return {**groups, _FEATURES: TapGroup("train.taps", pairs, self.net_t, adapt=False)}

    def passes(self) -> dict[str, nn.Module]:
        passes = super().passes()
        if not self.opt["train"].get("bm_opt"):
            return passes
        assert self.net_t is not None
        pairs = tap_pairs(self.opt["train"]["blocks"])
        mixing = BlockMixing("train.blocks", pairs, self.net_g, self.net_t, self.sample_lq())
        return {**passes, _BLOCKS: mixing}

    def trained_module(self) -> nn.Module:
        module = super().trained_module()
        groups = self.tap_groups()
        self.taught_groups = [name for name, group in groups.items() if group.teacher is self.net_t]
        bundle = self.student_bundle
        if (
            bundle is not None and _FEATURES in bundle.taps
        ):  # the bundle has seen to it that they can be compared
            assert self.net_t is not None
            ours = shapes_of(self.net_g, bundle.taps[_FEATURES], self.sample_lq())
            theirs = shapes_of(self.net_t, bundle.teacher_taps[_FEATURES], self.sample_lq())
            bundle.passes[_FEATURES] = FeatureMixing(_FEATURES, ours, theirs).to(self.device)
        return module

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_features = self.build_loss("fm_opt")
        self.cri_own = self.build_loss("fm_aux_opt")
        self.cri_blocks = self.build_loss("bm_opt")
        self.mix_ratio = train_opt.get("mix_ratio", 0.5)
        self.block_ratio = train_opt.get("block_ratio", 0.5)

    def views(self) -> dict[str, tuple[Any, ...]]:
        """Those of the terms, then what is mixed: the teacher has to be asked first, and the draws are made."""
        views = super().views()
        assert self.student_bundle is not None
        self.lesson = super().teach([view for term in self.terms for view in term.teacher_views()])
        # Before its blocks run again: what hooks of the teacher then keep is not of x.
        taught = super().taught_features
        self.taught = {group: taught(group) for group in self.taught_groups}
        if self.cri_features:
            features = self.taught[_FEATURES]
            seeds = torch.randint(2**62, (len(features),), generator=self.generator).tolist()
            masks = [
                draw_mask(feature.shape, self.mix_ratio, seed, self.device)
                for feature, seed in zip(features, seeds, strict=True)
            ]
            views[_FEATURES] = (features, masks)
        if self.cri_blocks:
            count = len(tap_pairs(self.opt["train"]["blocks"]))
            taken = (torch.rand(count, generator=self.generator) < self.block_ratio).tolist()
            views[_BLOCKS] = (self.lq, taken)
        return views

    def teach(self, further: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """What the teacher has said in this step already."""
        return self.lesson

    def taught_features(self, group: str) -> list[Tensor]:
        return self.taught[group]

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        assert self.student_bundle is not None
        results = self.student_bundle.results
        if self.cri_features:
            mixtures, own = results[_FEATURES]
            losses["l_fm"] = self.cri_features(mixtures, self.taught[_FEATURES])
            if self.cri_own:
                losses["l_fm_aux"] = self.cri_own(own, self.taught[_FEATURES])
        if self.cri_blocks:
            losses["l_bm"] = self.cri_blocks(results[_BLOCKS].to(self.lq.dtype), self.teacher_output)
        return losses
