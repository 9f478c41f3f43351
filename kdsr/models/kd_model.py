"""KDModel: response distillation, and the template that every method of the package fills in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.data.label_consistency import LabelConsistency
from kdsr.models.adapters import StudentBundle, TapGroup
from kdsr.models.base_model import Number, RestorationModel
from kdsr.models.evaluation import mean_values, pad_and_restore
from kdsr.models.pretrained import warm_start, weight_files
from kdsr.models.tap_options import tap_problems
from kdsr.models.teacher_check import teacher_warnings
from kdsr.models.terms import TERMS
from kdsr.models.terms.term import Term, read_with, term_problems

# what architectures call the number of channels of their input
_CHANNEL_KEYS = ("num_in_ch", "in_chans", "in_channels", "inp_channels", "img_channel", "in_nc")


@MODEL_REGISTRY.register()
class KDModel(RestorationModel):
    """A student ``net_g`` that learns from the ground truth and from the outputs of a frozen teacher ``net_t``.

    ``L = L1(S(x), y) + L1(S(x), T(x)) [+ L1(S(x), A⁻¹ T(A x))]`` — logits KD and, where ``lcr_opt`` is given, label
    consistency (A flips, transposes or inverts). Without ``network_t`` it trains from scratch. In test mode only the
    student is built.

    Options (``train``): ``pixel_opt`` → ``l_pix``; ``logits_opt`` → ``l_ts``; ``lcr_opt`` → ``l_lcr``;
    ``noisy.prob``: probability of each augmentation of the label consistency (0.5). ``path.init_from``: ``teacher``
    (its matching blocks) or a checkpoint, from which the student starts. ``val.teacher``: validate the teacher once
    at the start. Each of ``kdsr.models.terms`` adds a loss by an option of its own; ``taps`` names the features that
    these compare.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "logits_opt": (dict, type(None)),
        "lcr_opt": (dict, type(None)),
        "noisy": {"prob": Number},
        "taps": (list, dict, type(None)),
        **{key: kinds for term in TERMS for key, kinds in term.TRAIN_KEYS.items()},
    }
    NETWORK_KEYS = frozenset({"t"}).union(*(term.NETWORK_KEYS for term in TERMS))
    READ_WITH = {
        **read_with(TERMS),
        "noisy": ("lcr_opt", "zoom_in_opt"),
        "taps": tuple(term.KEY for term in TERMS if "taps" in term.NEEDS),
    }

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        """Problems that show only when several options are seen together."""
        train, path = opt.get("train") or {}, opt.get("path") or {}
        problems = super().check_options(opt)
        if not opt.get("network_t"):
            problems += [
                f"train.{key}: needs a teacher; give network_t and path.pretrain_network_t"
                for key in ("logits_opt", "lcr_opt")
                if train.get(key)
            ]
            if path.get("init_from") == "teacher":
                problems.append("path.init_from: teacher: there is no teacher; give network_t")
        elif "t" not in weight_files(opt):
            problems.append(
                "path.pretrain_network_t: missing; a teacher with random weights has nothing to teach"
            )
        if train.get("taps") is not None:
            problems += tap_problems(train["taps"], "train.taps")
        return problems + term_problems(TERMS, opt)

    net_t: nn.Module | None = None
    net_tb: nn.Module | None = None  # Teacher B, of a term that shows one the clean images
    student_bundle: StudentBundle | None = None
    terms: list[Term] = []  # those that the options switch on

    def build_training_networks(self) -> None:
        super().build_training_networks()
        if self.opt.get("network_t"):
            self.net_t = self.build_frozen("t")
        started = warm_start(self.net_g, self.opt, self.net_t)
        if started:
            get_root_logger().info(started)
        self.terms = [term(self) for term in TERMS if self.opt["train"].get(term.KEY)]

    def tap_groups(self) -> dict[str, TapGroup]:
        """Which features of the student are compared with which of a frozen teacher, by a name for the comparison."""
        return {name: group for term in self.terms for name, group in term.tap_groups().items()}

    def passes(self) -> dict[str, nn.Module]:
        """What else the student is asked for in a step, see ``Term.passes``."""
        return {name: further for term in self.terms for name, further in term.passes().items()}

    def trained_module(self) -> nn.Module:
        groups, passes = self.tap_groups(), self.passes()
        if not (groups or passes):
            return self.net_g
        bundle = StudentBundle(self.net_g, groups, self.sample_lq(), passes)
        self.student_bundle = bundle.to(self.device)
        return self.student_bundle

    def sample_lq(self) -> Tensor:
        """An empty LQ patch of the size that training begins with, (1, C, H, W)."""
        options = self.opt["network_g"]
        channels = next((options[key] for key in _CHANNEL_KEYS if key in options), 3)
        size = self.opt["datasets"]["train"].get("gt_size", 64) // self.opt.get("scale", 1)
        return torch.zeros(1, channels, size, size, device=self.device)

    def state_networks(self) -> dict[str, nn.Module]:
        networks = super().state_networks()
        if self.student_bundle is not None:
            networks |= self.student_bundle.trained_parts()
        return networks

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_logits = self.build_loss("logits_opt")
        self.cri_lcr = self.build_loss("lcr_opt")
        self.augmentation = LabelConsistency((train_opt.get("noisy") or {}).get("prob", 0.5))

    def views(self) -> dict[str, tuple[Any, ...]]:
        """What the further passes of the student are to see in this step."""
        return {name: seen for term in self.terms for name, seen in term.prepare().items()}

    def run_student(self) -> Tensor:
        views = self.views()
        answer = self.bundle(self.lq, views) if views else self.bundle(self.lq)
        return answer if self.student_bundle is None else answer.output

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        asked = [list(term.teacher_views()) for term in self.terms]
        answers: list[Tensor] = []
        if self.net_t is not None:
            self.teacher_output, second_view, answers = self.teach(
                [view for views in asked for view in views]
            )
            if self.cri_logits:
                losses["l_ts"] = self.cri_logits(self.output, self.teacher_output)
            if self.cri_lcr:
                losses["l_lcr"] = self.cri_lcr(self.output, second_view)
        for term, views in zip(self.terms, asked, strict=True):
            own, answers = answers[: len(views)], answers[len(views) :]
            losses |= term.losses(current_iter, own)
        return losses

    def statistics(self) -> dict[str, Tensor]:
        mine = super().statistics()
        return {**mine, **{name: value for term in self.terms for name, value in term.statistics().items()}}

    @torch.no_grad()
    def teach(self, further: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The teacher's output on x; for label consistency ``A⁻¹ T(A x)``; and its outputs on further views.

        What is of x's size goes through it in one batch, the images themselves first and last of all passes, so that
        its features are theirs.
        """
        assert self.net_t is not None
        teacher, samples = self.net_t, len(self.lq)
        multiple, scale = self.size_multiple(teacher), self.opt.get("scale") or 1
        alike = [view.shape == self.lq.shape for view in further]
        apart = [
            pad_and_restore(teacher, view, multiple, scale)
            for view, same in zip(further, alike, strict=True)
            if not same
        ]
        views = [self.lq, *(view for view, same in zip(further, alike, strict=True) if same)]
        if self.cri_lcr:
            plan = self.augmentation.draw(samples, self.generator)
            views.append(self.augmentation.apply(self.lq, plan))
        outputs = list(
            teacher(torch.cat(views) if len(views) > 1 else self.lq).to(self.lq.dtype).split(samples)
        )
        second = self.augmentation.invert(outputs.pop(), plan) if self.cri_lcr else None
        together, others = iter(outputs[1:]), iter(apart)
        answers = [next(together) if same else next(others).to(self.lq.dtype) for same in alike]
        return outputs[0], second, answers

    def taught_features(self, group: str) -> list[Tensor]:
        """A teacher's features of its last pass, on the images themselves and not on their second view."""
        assert self.student_bundle is not None
        features = self.student_bundle.teacher_taps[group].take(self.lq)
        return [feature[: len(self.lq)] for feature in features]

    def restore_with(self, net: nn.Module, lq: Tensor) -> Tensor:
        """As in ``MeasuredModel``; features of whole images are not held until the next step."""
        restored = super().restore_with(net, lq)
        if self.student_bundle is not None:
            self.student_bundle.forget()
        return restored

    def validate_teacher(self, dataloaders: list[Any]) -> None:
        """Measures the teacher as the student will be measured: a wrong range, scale or key shows at once."""
        if self.net_t is None:
            return
        teacher = self.net_t
        for dataloader in dataloaders:
            name = dataloader.dataset.opt["name"]
            results = self.measure_images(
                lambda lq: self.restore_with(teacher, lq), dataloader, 0, network="the teacher"
            )
            self.record(0, "teacher", name, results)
            self.log_means(f"Validation of the teacher, {name}", mean_values(results), name)
            for line in teacher_warnings({name: results}, self.opt):
                get_root_logger().warning(line)
