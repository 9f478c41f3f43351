"""KDModel: trains a student with the terms that the options enable. The methods are its presets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

import kdsr.terms  # noqa: F401  registers them
from kdsr.data.stored_outputs import KEY
from kdsr.distill.bundle import StudentBundle
from kdsr.distill.mixup import mixed
from kdsr.distill.moving_average import Ema
from kdsr.distill.step import Step, Teacher, X
from kdsr.distill.term import Setup, Term, all_terms, term_problems
from kdsr.models.builder import Builder
from kdsr.models.cached_teacher import StoredOutputs, cached_teacher_problems, outputs_are_given
from kdsr.models.ensemble import Ensemble
from kdsr.models.kd_options import KDTrainOptions, kd_problems
from kdsr.models.pretrained import warm_start
from kdsr.models.recompute import recompute_blocks
from kdsr.models.restorer import Restorer
from kdsr.models.trainer import LoopInterface, Trainer
from kdsr.models.validator import Validator
from kdsr.runtime.declarations import NONE, Network, Option
from kdsr.runtime.distributed import without_reduction, wrap_ddp
from kdsr.runtime.errors import OptionError

# LQ, GT and the stored output of the teacher, the last two where there are any
Images = tuple[Tensor, Tensor | None, Tensor | None]


@MODEL_REGISTRY.register()
class KDModel(LoopInterface, SRModel):
    """Trains a student ``net_g`` with the terms of ``kdsr.terms`` and of the user's modules.

    Each term is a key ``*_opt`` of ``train``: ``pixel_opt`` compares with the ground truth, ``logits_opt`` with the
    output of a frozen teacher ``net_t``, and so on. The sum of their losses is minimised. Without ``network_t`` the
    student trains from scratch. In test mode only the student is built.

    Options: ``path.init_from``: initialise the student from the ``teacher`` (its matching blocks) or a checkpoint.
    ``val.teacher``: validate the teacher once at the start. ``train.taps``: the features that terms compare.

    The method of a paper is a preset: a subclass that requires at least one of some terms (``REQUIRED_TERMS``). The
    same options under ``model_type: KDModel`` give the same numbers.
    """

    train_options = KDTrainOptions
    NETWORKS = LoopInterface.NETWORKS | {
        "t": Network(
            "The teacher, or a list of teachers whose outputs are averaged; without one `KDModel` trains from scratch.",
            kinds=(dict, list, NONE),
            item=Option(kinds=(dict,)),
            fewest=1,
        )
    }
    REQUIRED_TERMS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def term_classes(cls) -> list[type[Term]]:
        """The classes of the terms that it can use; each declares its own option keys."""
        return [*all_terms().values()]

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        problems = super().check_options(opt) + kd_problems(opt)
        if cls.REQUIRED_TERMS and not any((opt.get("train") or {}).get(key) for key in cls.REQUIRED_TERMS):
            keys = " or ".join(f"train.{key}" for key in cls.REQUIRED_TERMS)
            problems.append(f"{keys}: missing, required by {cls.__name__}; give it, or use KDModel")
        # two terms may need the same missing network
        return list(dict.fromkeys(problems + term_problems(opt) + cached_teacher_problems(opt)))

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        train = opt["train"] if isinstance(opt.get("train"), dict) else {}
        on = [term for key, term in all_terms().items() if train.get(key)]
        return {who: multiple for term in on for who, multiple in term.patch_multiples(opt).items()}

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        on = [term for key, term in all_terms().items() if train.get(key)]
        return {key: remedy for term in on for key, remedy in term.keys_with_gt(train).items()}

    net_t: nn.Module | None = None
    outputs_are_given: bool = False  # T(x) comes with the data
    student_bundle: StudentBundle | None = None

    # ------------------------------------------------------------------------------------------------ building

    def __init__(self, opt: dict[str, Any]) -> None:
        # SRModel's requires a pixel loss and uses DDP only on GPUs
        BaseModel.__init__(self, opt)
        self.builder = Builder(opt, self.device)
        self.restorer = Restorer(opt)
        self.net_g = self.builder.network("g")
        self.validator = Validator(opt, self.device, self.restore)
        if self.is_train:
            self.init_training_settings()

    def init_training_settings(self) -> None:
        """Builds the teachers, the terms, the moving average, optimizers and guard."""
        train = self.opt["train"]
        options = KDTrainOptions.read(train)
        self.mixing, self.accumulate = options.mixing_augs, options.accumulate
        self.teachers: dict[str, Teacher] = {}
        self.outputs_are_given = outputs_are_given(self.opt)
        if self.opt.get("network_t") and not self.outputs_are_given:
            self.net_t = self.teacher("t").net
        if (started := warm_start(self.net_g, self.opt, self.net_t)) is not None:
            get_root_logger().info(started)
        setup = Setup(
            opt=self.opt,
            device=self.device,
            student=self.net_g,
            sample_lq=self.builder.sample_lq,
            loss=self.builder.loss,
            frozen=self.builder.frozen,
            new_student=self.builder.new_student,
            copied=self.builder.copied,
            multiple_of=self.restorer.multiple_of,
        )
        self.terms = {key: term(setup) for key, term in all_terms().items() if train.get(key)}
        self.teacher_sees_lq = any(
            "teacher_output" in term.NEEDS or any(group.view == X for group in term.tap_groups().values())
            for term in self.terms.values()
        )
        self.net_g.train()
        self.ema = Ema.of(self.net_g, self.train_options.read(train))
        if self.ema:
            self.net_g_ema = self.ema.net
        find_unused = self.opt.get("find_unused_parameters", False)
        trained = self.trained_module()
        if options.checkpoint_student:
            blocks = recompute_blocks(self.net_g)
            get_root_logger().info(f"net_g: {len(blocks)} blocks are computed again in the backward pass")
        self.bundle = wrap_ddp(trained, self.device, find_unused)
        self.builder.fix_precision()
        if self.builder.precision.compile == "all":
            self.net_g.compile()
        self.trainer = Trainer(
            self.builder, {"g": self.bundle}, self.state_networks(), self.validator, self.update_learning_rate
        )
        self.guard, self.generator = self.trainer.guard, self.trainer.generator
        self.optimizers, self.schedulers = self.trainer.optimizers, self.trainer.schedulers
        self.optimizer_g = self.optimizers[0]

    def teacher(self, key: str) -> Teacher:
        """Returns the frozen ``network_<key>`` as a teacher; built once.

        Raises:
            OptionError: Only its outputs for the training images are there.
        """
        if key == "t" and self.outputs_are_given:
            raise OptionError(
                "network_t: a term uses the teacher itself, but only its stored outputs are there; remove the term or "
                "train.teacher_cache"
            )
        if key not in self.teachers:
            net = self.builder.frozen(key)
            self.teachers[key] = Teacher(net, self.restorer.multiple_of(net), self.opt.get("scale") or 1)
        return self.teachers[key]

    def trained_module(self) -> nn.Module:
        """Returns the module that DDP wraps and the optimizer trains: the student, in a bundle if terms need one."""
        groups = {name: group for term in self.terms.values() for name, group in term.tap_groups().items()}
        teachers = {group.teacher: self.teacher(group.teacher) for group in groups.values()}
        bundle = StudentBundle(
            self.net_g, groups, teachers, self.builder.sample_lq() if groups else torch.empty(0)
        )
        for term in self.terms.values():
            bundle.passes.update(term.passes(bundle.shapes))
        if not (bundle.adapters or bundle.passes):
            return self.net_g
        self.student_bundle = bundle.to(self.device)
        return self.student_bundle

    def networks(self) -> dict[str, nn.Module]:
        """Returns all networks of a training by name: the student, its EMA, the teachers, and those of the terms."""
        found = {"net_g": self.net_g} | ({"net_g_ema": self.ema.net} if self.ema else {})
        found |= {f"net_{key}": teacher.net for key, teacher in self.teachers.items()}
        return found | {name: net for term in self.terms.values() for name, net in term.networks().items()}

    def state_networks(self) -> dict[str, nn.Module]:
        """Returns the networks that change, which are part of the training state."""
        found = {"net_g": self.net_g} | ({"net_g_ema": self.ema.net} if self.ema else {})
        if self.student_bundle is not None:
            found |= self.student_bundle.trained_parts()
        return found | {
            name: net for term in self.terms.values() for name, net in term.state_networks().items()
        }

    # ---------------------------------------------------------------------------------------------- one step

    def feed_data(self, data: dict[str, Any]) -> None:
        if self.is_train and self.trainer.checkpointer.pending_generators:
            self.trainer.checkpointer.restore_generators()
        self.images: Sequence[str] = data.get("lq_path") or data.get("gt_path") or ()
        to = {
            "device": self.device,
            "non_blocking": True,
            "memory_format": self.builder.precision.memory_format,
        }
        self.lq: Tensor = data["lq"].to(**to)
        self.gt: Tensor | None = data["gt"].to(**to) if data.get("gt") is not None else None
        self.teacher_output: Tensor | None = data[KEY].to(**to) if self.outputs_are_given else None

    def optimize_parameters(self, current_iter: int) -> None:
        """Runs one training step. An update that is not finite is skipped on all ranks."""
        self.guard.begin()
        losses = self.compute_gradients(current_iter)
        self.guard.step(current_iter, losses, self.images)
        if self.ema:
            self.ema.update(current_iter, self.guard)
        for term in self.terms.values():
            term.after_step(self.step)
        self.step.release()
        if self.guard.full():
            self.trainer.check()

    def compute_gradients(self, current_iter: int) -> dict[str, Tensor]:
        """Runs forward and backward pass of each batch; returns the weighted losses by name (scalars), their means."""
        for loss in self.builder.scheduled_losses:
            loss.begin(current_iter)
        batches, losses, statistics = self.batches(), [], []
        shares = [len(lq) / len(self.lq) for lq, *_ in batches]
        for number, (images, share) in enumerate(zip(batches, shares, strict=True), 1):
            if number > 1:
                self.step.release()
            with nullcontext() if number == len(batches) else without_reduction(self.bundle):
                with self.builder.precision.autocast:
                    losses.append(self.forward_step(current_iter, images))
                if not losses[-1]:
                    raise OptionError("train: has no loss; give pixel_opt, or the options of a method")
                self.guard.backward(torch.stack(list(losses[-1].values())).sum() * share)
            if self.student_bundle is not None:  # blocks that are computed again record features again
                self.student_bundle.clear()
            statistics.append(self.step.statistics)
        self.step.statistics = _mean(statistics, shares)
        return _mean(losses, shares)

    def batches(self) -> list[Images]:
        """Returns the images of the batches of an iteration, ``train.accumulate`` of them."""
        whole = self.lq, self.gt, self.teacher_output
        if self.accumulate == 1:
            return [whole]
        count = len(self.lq.chunk(self.accumulate))
        parts = [[None] * count if images is None else images.chunk(self.accumulate) for images in whole]
        return [*zip(*parts, strict=True)]

    def forward_step(self, current_iter: int, images: Images | None = None) -> dict[str, Tensor]:
        """Runs the frozen networks, then the student, then the losses of each term; by default on all images."""
        self.step = step = self.begin_step(current_iter, images)
        with torch.no_grad():
            self.run_frozen(step)
        self.run_student(step)
        return self.compute_losses(step)

    def begin_step(self, current_iter: int, images: Images | None = None) -> Step:
        ema = self.ema.net if self.ema else None
        lq, gt, teacher_output = images or (self.lq, self.gt, self.teacher_output)
        if self.mixing.mixup:
            lq, gt = mixed(lq, gt, self.mixing, self.generator)
        step = Step(current_iter, lq, gt, self.generator, self.net_g, ema)
        if teacher_output is not None:
            step.teacher_outputs[X] = teacher_output
        return step

    def run_frozen(self, step: Step) -> None:
        """Runs everything without gradient: ``prepare`` of the terms, the teachers, ``before_student`` of the terms."""
        if self.teacher_sees_lq and X not in step.teacher_outputs:
            step.show_teacher(X, step.lq)
        for term in self.terms.values():
            term.prepare(step)
        for key, views in step.teacher_views.items():
            self.teacher(key).run(views, step)
        for term in self.terms.values():
            term.before_student(step)

    def run_student(self, step: Step) -> None:
        """Runs the student; with a bundle also its adapted features and further passes."""
        if self.student_bundle is None:
            output = self.bundle(step.lq)
        else:
            output, step.student_features, step.results = self.bundle(step.lq, step.student_inputs)
        self.output = step.output = output.to(step.lq.dtype)

    def compute_losses(self, step: Step) -> dict[str, Tensor]:
        """Returns the weighted losses by name; their sum is minimised."""
        return {name: loss for term in self.terms.values() for name, loss in term.losses(step).items()}

    def statistics(self) -> dict[str, Tensor]:
        return self.step.statistics

    # ------------------------------------------------------------------------------------------------ validation

    def restore(self, lq: Tensor) -> Tensor:
        return self.restore_with(getattr(self, "net_g_ema", self.net_g), lq)

    def restore_with(self, net: nn.Module, lq: Tensor) -> Tensor:
        """Restores images of any size with a network; the tapped features are dropped."""
        with self.builder.precision.eager():
            output = self.restorer(net, lq)
        if self.student_bundle is not None:
            self.student_bundle.clear()
            for teacher in self.teachers.values():
                teacher.clear()
        return output

    def teachers_by_place(self) -> dict[str, nn.Module]:
        """Returns the teacher as ``network_t``; for a list first its members, ``network_t.0``, ..."""
        listed = self.net_t if isinstance(self.net_t, Ensemble) else ()
        found = {f"network_t.{index}": net for index, net in enumerate(listed)}
        return found | ({"network_t": self.net_t} if self.net_t is not None else {})

    def validate_teacher(self, dataloaders: list[Any]) -> None:
        """Measures the teachers, or their stored outputs for the images of the sets."""
        if self.outputs_are_given:
            for dataloader in dataloaders:
                self.validator.validate_teacher([dataloader], StoredOutputs(dataloader.dataset))
        for place, net in self.teachers_by_place().items():
            self.validator.validate_teacher(dataloaders, partial(self.restore_with, net), place)


def _mean(values: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """The weighted means of scalars by name."""
    if len(values) == 1:
        return values[0]
    return {
        name: torch.stack(
            [each[name].detach() * share for each, share in zip(values, shares, strict=True)]
        ).sum()
        for name in values[0]
    }
