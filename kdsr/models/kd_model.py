"""KDModel: trains a student with the terms that the options switch on. The methods are its presets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from basicsr.archs import build_network
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

import kdsr.terms  # noqa: F401  registers them
from kdsr.distill.adapters import TapGroup
from kdsr.distill.bundle import StudentBundle
from kdsr.distill.step import Step, X
from kdsr.distill.tap_options import tap_problems
from kdsr.distill.teacher import Teacher
from kdsr.distill.term import Setup, Term, all_terms, term_problems
from kdsr.distill.weight_files import weight_files
from kdsr.models.base_model import RestorationModel
from kdsr.models.evaluation import mean_values
from kdsr.models.pretrained import warm_start
from kdsr.models.teacher_check import teacher_warnings
from kdsr.runtime.distributed import share_weights

# what architectures call the number of channels of their input
_CHANNEL_KEYS = ("num_in_ch", "in_chans", "in_channels", "inp_channels", "img_channel", "in_nc")


@MODEL_REGISTRY.register()
class KDModel(RestorationModel):
    """A student ``net_g`` that learns from the terms of ``kdsr.terms`` and of the user's modules.

    Each term is a key ``*_opt`` of ``train``: ``pixel_opt`` compares with the ground truth, ``logits_opt`` with the
    output of a frozen teacher ``net_t``, and so on; their sum is minimised. Without ``network_t`` it trains from
    scratch. In test mode only the student is built.

    Options: ``path.init_from``: ``teacher`` (its matching blocks) or a checkpoint, from which the student starts.
    ``val.teacher``: validate the teacher once at the start. ``train.taps`` names the features that terms compare.

    A method of a paper is a preset, a subclass that names the terms of which it wants one at least
    (``REQUIRED_TERMS``). The same options under ``model_type: KDModel`` give the same numbers.
    """

    NETWORK_KEYS = frozenset({"t"})
    REQUIRED_TERMS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def declared_terms(cls) -> list[type[Term]]:
        """The terms that it takes; they declare option keys of their own."""
        return [*all_terms().values()]

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        """Problems that show only when several options are seen together."""
        train, path = opt.get("train") or {}, opt.get("path") or {}
        problems = super().check_options(opt)
        if opt.get("network_t") and "t" not in weight_files(opt):
            problems.append(
                "path.pretrain_network_t: missing; a teacher with random weights has nothing to teach"
            )
        if not opt.get("network_t") and path.get("init_from") == "teacher":
            problems.append("path.init_from: teacher: there is no teacher; give network_t")
        if train.get("taps") is not None:
            problems += tap_problems(train["taps"], "train.taps")
        if cls.REQUIRED_TERMS and not any(train.get(key) for key in cls.REQUIRED_TERMS):
            wanted = " or ".join(f"train.{key}" for key in cls.REQUIRED_TERMS)
            problems.append(f"{wanted}: missing, {cls.__name__} is for it; give it, or use KDModel")
        return list(dict.fromkeys(problems + term_problems(opt)))  # two terms may miss the same network

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        on = [term for key, term in all_terms().items() if train.get(key)]
        return {key: remedy for term in on for key, remedy in term.keys_with_gt(train).items()}

    net_t: nn.Module | None = None
    student_bundle: StudentBundle | None = None

    # ------------------------------------------------------------------------------------------------ building

    def build_training_networks(self) -> None:
        super().build_training_networks()
        self.teachers: dict[str, Teacher] = {}
        if self.opt.get("network_t"):
            self.net_t = self.teacher("t").net
        started = warm_start(self.net_g, self.opt, self.net_t)
        if started:
            get_root_logger().info(started)
        setup = Setup(
            opt=self.opt,
            device=self.device,
            student=self.net_g,
            sample_lq=self.sample_lq,
            loss=self.build_loss,
            frozen=self.build_frozen,
            new_student=self.new_student,
            multiple_of=self.size_multiple,
        )
        self.terms = {key: term(setup) for key, term in all_terms().items() if self.opt["train"].get(key)}
        self.asks_for_x = any("teacher_output" in term.NEEDS for term in self.terms.values())

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        """The terms have built theirs."""

    def teacher(self, key: str) -> Teacher:
        """The frozen ``network_<key>`` as one that is shown images, built once."""
        if key not in self.teachers:
            net = self.build_frozen(key)
            self.teachers[key] = Teacher(net, self.size_multiple(net), self.opt.get("scale") or 1)
        return self.teachers[key]

    def new_student(self) -> nn.Module:
        """A further network like the student, with random weights, the same on all ranks."""
        net = self.precision.place(build_network(self.opt["network_g"])).eval().requires_grad_(False)
        share_weights(net)
        return net

    def sample_lq(self) -> Tensor:
        """An empty LQ patch of the size that training begins with, (1, C, H, W)."""
        options = self.opt["network_g"]
        channels = next((options[key] for key in _CHANNEL_KEYS if key in options), 3)
        size = self.opt["datasets"]["train"].get("gt_size", 64) // self.opt.get("scale", 1)
        return torch.zeros(1, channels, size, size, device=self.device)

    def tap_groups(self) -> dict[str, TapGroup]:
        """Which features of the student are compared with which of a teacher, by a name for the comparison."""
        return {name: group for term in self.terms.values() for name, group in term.tap_groups().items()}

    def trained_module(self) -> nn.Module:
        groups = self.tap_groups()
        teachers = {group.teacher: self.teacher(group.teacher) for group in groups.values()}
        sample = self.sample_lq() if groups else torch.empty(0)
        bundle = StudentBundle(self.net_g, groups, teachers, sample)
        for term in self.terms.values():
            bundle.passes.update(term.passes(bundle.shapes))
        self.asks_for_x |= any(group.view == X for group in groups.values())
        if not (bundle.adapters or bundle.passes):
            return self.net_g
        self.student_bundle = bundle.to(self.device)
        return self.student_bundle

    def networks(self) -> dict[str, nn.Module]:
        """All networks of a training by name: the student, its EMA, the teachers, and the terms' own."""
        found = {"net_g": self.net_g}
        if self.ema_decay > 0:
            found["net_g_ema"] = self.net_g_ema
        found |= {f"net_{key}": teacher.net for key, teacher in self.teachers.items()}
        return found | {name: net for term in self.terms.values() for name, net in term.networks().items()}

    def state_networks(self) -> dict[str, nn.Module]:
        networks = super().state_networks()
        if self.student_bundle is not None:
            networks |= self.student_bundle.trained_parts()
        return networks | {
            name: net for term in self.terms.values() for name, net in term.state_networks().items()
        }

    # ---------------------------------------------------------------------------------------------- one step

    def forward_step(self, current_iter: int) -> dict[str, Tensor]:
        """The frozen networks first, then the student, then the losses of each term."""
        self.step = step = self.begin_step(current_iter)
        with torch.no_grad():
            self.ask_frozen(step)
        self.run_student(step)
        return self.compute_losses(step)

    def begin_step(self, current_iter: int) -> Step:
        ema = self.net_g_ema if self.ema_decay > 0 else None
        return Step(current_iter, self.lq, self.gt, self.generator, self.net_g, ema)

    def ask_frozen(self, step: Step) -> None:
        """All that needs no gradient: what the terms draw, what the teachers answer, the terms' own networks."""
        if self.asks_for_x:
            step.show_teacher(X, step.lq)
        for term in self.terms.values():
            term.prepare(step)
        for key, views in step.teacher_views.items():
            self.teacher(key).answer(views, step)
        for term in self.terms.values():
            term.before_student(step)

    def run_student(self, step: Step) -> None:
        """The student's output and, with a bundle, its adapted features and further passes."""
        if self.student_bundle is None:
            output = self.bundle(step.lq)
        else:
            output, step.student_features, step.results = self.bundle(step.lq, step.student_inputs)
        self.output = step.output = output.to(step.lq.dtype)

    def compute_losses(self, step: Step) -> dict[str, Tensor]:
        """The weighted losses of this step by name (scalars); their sum is what is minimised."""
        return {name: loss for term in self.terms.values() for name, loss in term.losses(step).items()}

    def statistics(self) -> dict[str, Tensor]:
        return self.step.statistics

    def after_step(self, current_iter: int) -> None:
        super().after_step(current_iter)
        for term in self.terms.values():
            term.after_step(self.step)
        self.step.release()

    # ------------------------------------------------------------------------------------------------ validation

    def restore_with(self, net: nn.Module, lq: Tensor) -> Tensor:
        """As in ``MeasuredModel``; features of whole images are not held until the next step."""
        restored = super().restore_with(net, lq)
        if self.student_bundle is not None:
            self.student_bundle.forget()
            for teacher in self.teachers.values():
                teacher.forget()
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
