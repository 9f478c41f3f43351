"""KDModel: response distillation, and the template that every method of the package fills in."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.data.label_consistency import LabelConsistency
from kdsr.models.adapters import StudentBundle, TapGroup
from kdsr.models.base_model import Number, RestorationModel
from kdsr.models.evaluation import mean_values
from kdsr.models.pretrained import warm_start

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
    at the start.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "logits_opt": (dict, type(None)),
        "lcr_opt": (dict, type(None)),
        "noisy": {"prob": Number},
    }
    NETWORK_KEYS = frozenset({"t"})

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
        elif not path.get("pretrain_network_t"):
            problems.append(
                "path.pretrain_network_t: missing; a teacher with random weights has nothing to teach"
            )
        return problems

    net_t: nn.Module | None = None
    student_bundle: StudentBundle | None = None

    def build_training_networks(self) -> None:
        super().build_training_networks()
        if self.opt.get("network_t"):
            self.net_t = self.build_frozen("t")
        started = warm_start(self.net_g, self.opt, self.net_t)
        if started:
            get_root_logger().info(started)

    def tap_groups(self) -> dict[str, TapGroup]:
        """Which features of the student are compared with which of a frozen teacher, by a name for the comparison."""
        return {}

    def trained_module(self) -> nn.Module:
        groups = self.tap_groups()
        if not groups:
            return self.net_g
        self.student_bundle = StudentBundle(self.net_g, groups, self.sample_lq()).to(self.device)
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
            networks["adapters"] = self.student_bundle.adapters
        return networks

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_logits = self.build_loss("logits_opt")
        self.cri_lcr = self.build_loss("lcr_opt")
        self.augmentation = LabelConsistency((train_opt.get("noisy") or {}).get("prob", 0.5))

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        if self.net_t is None:
            return losses
        self.teacher_output, second_view = self.teach()
        if self.cri_logits:
            losses["l_ts"] = self.cri_logits(self.output, self.teacher_output)
        if self.cri_lcr:
            losses["l_lcr"] = self.cri_lcr(self.output, second_view)
        return losses

    @torch.no_grad()
    def teach(self) -> tuple[Tensor, Tensor | None]:
        """The teacher's output on x and, for label consistency, ``A⁻¹ T(A x)``, in one batch."""
        assert self.net_t is not None
        if not self.cri_lcr:
            return self.net_t(self.lq).to(self.lq.dtype), None
        plan = self.augmentation.draw(len(self.lq), self.generator)
        views = torch.cat([self.lq, self.augmentation.apply(self.lq, plan)])
        output, augmented = self.net_t(views).to(self.lq.dtype).chunk(2)
        return output, self.augmentation.invert(augmented, plan)

    def taught_features(self, group: str) -> list[Tensor]:
        """A teacher's features of its last pass, on the images themselves and not on their second view."""
        assert self.student_bundle is not None
        features = self.student_bundle.teacher_taps[group].take(self.lq)
        return [feature[: len(self.lq)] for feature in features]

    def validate_teacher(self, dataloaders: list[Any]) -> None:
        """Measures the teacher as the student will be measured: a wrong range, scale or key shows at once."""
        if self.net_t is None:
            return
        teacher = self.net_t
        for dataloader in dataloaders:
            name = dataloader.dataset.opt["name"]
            results = self.measure_images(lambda lq: self.restore_with(teacher, lq), dataloader, 0)
            self.record(0, "teacher", name, results)
            self.log_means(f"Validation of the teacher, {name}", mean_values(results))
