"""Terms on the student's output: against the ground truth, the teacher's output, and an augmented teacher output."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.losses.frequency_loss import FFTLoss
from kdsr.losses.masked_loss import MaskedLoss
from kdsr.losses.wavelet_loss import WaveletLoss
from kdsr.runtime.declarations import Options, Section, loss
from kdsr.terms.label_consistency import AugmentationOptions, LabelConsistency


class _OutputTerm(Term):
    """A loss between the student's output and the ground truth, or else the teacher's output."""

    NAME: ClassVar[str]
    COMPARES_IMAGES = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        target = step.ground_truth if "gt" in self.NEEDS else step.teacher_output
        return {self.NAME: self.loss(step.output, target)}


class PixelOptions(Options):
    pixel_opt: Section | None = loss("Loss against the ground truth, `l_pix`.")


@TERM_REGISTRY.register()
class PixelTerm(_OutputTerm):
    """``l_pix = L1(S(x), y)``, or any other pixel loss."""

    KEY, NAME = "pixel_opt", "l_pix"
    options = PixelOptions
    NEEDS = frozenset({"gt"})


class LogitsOptions(Options):
    logits_opt: Section | None = loss("Loss against the teacher's output, `l_ts`.")


@TERM_REGISTRY.register()
class LogitsTerm(_OutputTerm):
    """``l_ts = L1(S(x), T(x))``: response distillation (Hinton et al., 2015, with images in place of logits)."""

    KEY, NAME = "logits_opt", "l_ts"
    options = LogitsOptions
    NEEDS = frozenset({"teacher_output"})


class WaveletOptions(Options):
    wavelet_opt: Section | None = loss(
        "MTKD's wavelet loss against the teacher's output, `l_wavelet`.", WaveletLoss
    )


@TERM_REGISTRY.register()
class WaveletTerm(_OutputTerm):
    """``l_wavelet``: L1 between the wavelet sub-bands of S(x) and T(x) (MTKD, ECCV 2024)."""

    KEY, NAME = "wavelet_opt", "l_wavelet"
    options = WaveletOptions
    NEEDS = frozenset({"teacher_output"})


class FrequencyOptions(Options):
    fft_opt: Section | None = loss("L1 of the spectra against the teacher's output, `l_fft`.", FFTLoss)


@TERM_REGISTRY.register()
class FrequencyTerm(_OutputTerm):
    """``l_fft``: L1 between the Fourier transforms of S(x) and T(x)."""

    KEY, NAME = "fft_opt", "l_fft"
    options = FrequencyOptions
    NEEDS = frozenset({"teacher_output"})


class PixelFrequencyOptions(Options):
    fft_gt_opt: Section | None = loss("L1 of the spectra against the ground truth, `l_fft_gt`.", FFTLoss)


@TERM_REGISTRY.register()
class PixelFrequencyTerm(_OutputTerm):
    """``l_fft_gt``: L1 between the Fourier transforms of S(x) and y (MIMO-UNet, ICCV 2021)."""

    KEY, NAME = "fft_gt_opt", "l_fft_gt"
    options = PixelFrequencyOptions
    NEEDS = frozenset({"gt"})


class MaskedOptions(Options):
    masked_opt: Section | None = loss(
        "Loss against the teacher's output, with less weight where the teacher is wrong, `l_masked`.",
        MaskedLoss,
    )


@TERM_REGISTRY.register()
class MaskedTerm(Term):
    """``l_masked``: L1 between S(x) and T(x), weighted per pixel by how near T(x) is to y."""

    KEY = "masked_opt"
    options = MaskedOptions
    NEEDS = frozenset({"teacher_output", "gt"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_masked": self.loss(step.output, step.teacher_output, step.ground_truth)}


class LabelConsistencyOptions(AugmentationOptions):
    lcr_opt: Section | None = loss("Label consistency, `l_lcr`.")


@TERM_REGISTRY.register()
class LabelConsistencyTerm(Term):
    """``l_lcr = L1(S(x), A⁻¹ T(A x))`` of DCKD's release: A inverts colours, flips and transposes at random."""

    KEY = "lcr_opt"
    options = LabelConsistencyOptions
    NEEDS = frozenset({"teacher"})
    COMPARES_IMAGES = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.augmentation = LabelConsistency(self.options.noisy.prob)

    def prepare(self, step: Step) -> None:
        plan = self.augmentation.draw(len(step.lq), step.generator)
        step.kept[self.KEY] = plan
        step.show_teacher("augmented", self.augmentation.apply(step.lq, plan))

    def losses(self, step: Step) -> dict[str, Tensor]:
        target = self.augmentation.invert(step.teacher_outputs["augmented"], step.kept[self.KEY])
        return {"l_lcr": self.loss(step.output, target)}
