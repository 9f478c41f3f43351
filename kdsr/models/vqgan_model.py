"""VQGANModel: trains a VQGAN on images of a domain other than ImageNet's.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv 2012.09841). Without
the adversarial term it is a VQ-VAE (van den Oord et al., NeurIPS 2017).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from basicsr.archs.vgg_arch import NAMES as VGG_LAYERS
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.archs.vqgan_arch import VQGAN, Reconstruction
from kdsr.distill.extractors import vqgan_multiples
from kdsr.distill.moving_average import Ema
from kdsr.distill.weight_schedule import ScheduledLoss
from kdsr.losses.vq_loss import VQLoss, adaptive_weight
from kdsr.models.builder import Builder
from kdsr.models.code_usage import CodeUsage
from kdsr.models.restorer import Restorer
from kdsr.models.sections import TrainOptions
from kdsr.models.trainer import LoopInterface, Trainer
from kdsr.models.validator import Validator
from kdsr.runtime.declarations import Network, Section, loss, option
from kdsr.runtime.distributed import wrap_ddp
from kdsr.runtime.errors import OptionError

VGG_TYPES = tuple(name + norm for name in VGG_LAYERS for norm in ("", "_bn"))


class _Reconstructor(nn.Module):
    """A VQGAN as a network from image to image, for DDP and validation; ``result`` holds its other outputs."""

    result: Reconstruction

    def __init__(self, net: VQGAN) -> None:
        super().__init__()
        self.net = net
        self.multiple_of = net.multiple_of
        self.training = net.training
        self.quantize = True

    def forward(self, x: Tensor) -> Tensor:
        self.result = self.net.reconstruct(x, self.quantize)
        return self.result.image


def vgg_weights_problem(options: dict[str, Any]) -> str | None:
    """Why BasicSR's PerceptualLoss would not find the weights of its VGG; None where it will. Downloads nothing."""
    kind = options.get("vgg_type", "vgg19")
    if kind not in VGG_TYPES:
        return f"train.perceptual_opt.vgg_type: {kind!r} is not known; valid: {', '.join(VGG_TYPES)}"
    # BasicSR loads this one file whatever the type; other types come from torchvision's cache.
    if kind == "vgg19" and os.path.isfile(VGG_PRETRAIN_PATH):
        return None
    from torchvision.models import get_model_weights  # takes as long to import as torch

    name = get_model_weights(kind).DEFAULT.url.rpartition("/")[2]
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.isfile(cached) and not os.path.isfile(VGG_PRETRAIN_PATH):
        return None
    places = f"{VGG_PRETRAIN_PATH} or {cached}" if kind == "vgg19" else cached
    return f"train.perceptual_opt: no weights of {kind}; put them at {places}, or leave the term out"


class VQGANOptions(TrainOptions):
    pixel_opt: Section | None = loss(
        "Loss of the reconstruction, `l_pix`."
    )  # any image is its own ground truth
    vq_opt: Section = option(
        None,
        "Commitment and codebook loss (`VQLoss`), `l_commit` and `l_codebook`.",
        shown_default="{type: VQLoss}",
    )
    perceptual_opt: Section | None = loss(
        "BasicSR's `PerceptualLoss`, `l_percep` and `l_style`; needs VGG weights on disk."
    )
    gan_opt: Section | None = loss(
        "BasicSR's `GANLoss`, `l_g_gan` and `l_d`; needs `network_d` and `optim_d`."
    )
    optim_d: Section | None = option(
        None, "Optimizer of the discriminator, as `optim_g`.", read_with="gan_opt"
    )
    gan_start: int = option(
        0, "Iterations before the discriminator is trained and used.", lowest=0, read_with="gan_opt"
    )
    gan_adaptive_weight: bool = option(
        True,
        "Whether its gradient is weighed against that of the reconstruction, as in the paper.",
        read_with="gan_opt",
    )
    restart_every: int = option(
        100, "Iterations after which unused codes are restarted from encoder outputs; 0: never.", lowest=0
    )
    vq_start: int = option(
        0,
        "Iterations in which the decoder gets the encodings in place of the codes, which already follow them.",
        lowest=0,
    )


@MODEL_REGISTRY.register()
class VQGANModel(LoopInterface, SRModel):
    """Encoder, codebook and decoder (``net_g``) trained on the images of a folder (``gt``, else ``lq``).

    ``L = |x - x'| + beta |z - sg[e]|^2 + |sg[z] - e|^2 [+ perceptual] [+ lambda * adversarial]``. The saved
    ``net_g`` file is for ``path.pretrain_network_vqgan`` (with ``strict_load_vqgan: false``: the decoder is not
    used there). Validation measures the reconstruction.

    The losses and the schedule are options, see ``VQGANOptions``. A trained encoder spreads over more codes, hence
    ``vq_start`` (our choice). The discriminator's weight is ``loss_weight`` and, unless ``gan_adaptive_weight: false``,
    taming's adaptive weight. Logged beside the losses: ``perplexity`` and ``codes_used`` of about the last hundred
    steps.
    """

    train_options = VQGANOptions
    NETWORKS = LoopInterface.NETWORKS | {"d": Network("The discriminator.", in_state=True)}

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train, network = opt.get("train") or {}, opt.get("network_g") or {}
        problems = super().check_options(opt)
        problems += [
            f"precision.{key}: VQGANModel has no other networks than the one that it trains; remove it"
            for key in ("teacher", "extractor", "history", "compile")
            if (opt.get("precision") or {}).get(key)
        ]
        if opt.get("scale", 1) != 1:
            problems.append(
                f"scale: VQGANModel gives images of the same size back, set 1, not {opt['scale']}"
            )
        if network.get("type") != "VQGAN" or network.get("decoder") is not True:
            problems.append("network_g: VQGANModel trains type VQGAN with decoder: true")
        ddconfig = network.get("ddconfig") or {}
        problems += [
            f"network_g.ddconfig.{key}: VQGANModel's images have 3 channels, not {ddconfig[key]}"
            for key in ("in_channels", "out_ch")
            if ddconfig.get(key, 3) != 3
        ]
        if train.get("gan_opt"):
            needed = {"network_d": opt.get("network_d"), "train.optim_d": train.get("optim_d")}
            problems += [
                f"{key}: missing, train.gan_opt needs it" for key, given in needed.items() if not given
            ]
        elif opt.get("network_d"):
            problems.append(
                "network_d: has nothing to do without train.gan_opt; remove it, or give train.gan_opt"
            )
        if train.get("perceptual_opt") and (problem := vgg_weights_problem(train["perceptual_opt"])):
            problems.append(problem)
        return problems

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        return vqgan_multiples(opt, "network_g")

    net_g: VQGAN
    net_d: nn.Module | None = None

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(self, opt)
        self.builder = Builder(opt, self.device)
        self.restorer = Restorer(opt)
        self.net_g = self.builder.network("g")  # type: ignore[assignment]
        self.validator = Validator(opt, self.device, self.restore, has_baseline=False)
        if self.is_train:
            self.init_training_settings()

    def init_training_settings(self) -> None:
        """Builds what only training needs: discriminator, losses, moving average, optimizers and guard."""
        train = self.opt["train"]
        if train.get("gan_opt"):
            self.net_d = self.builder.network("d")
            self.check_discriminator(self.net_d)
            self.bundle_d = wrap_ddp(self.net_d, self.device)
        self.usage = CodeUsage(self.net_g.quantize.embedding.num_embeddings).to(self.device)
        self.options = self.train_options.read(train)
        self.net_g.train()
        self.ema = Ema.of(self.net_g, self.options)
        if self.ema:
            self.net_g_ema = self.ema.net
        self.init_losses(train)
        self.reconstructor = _Reconstructor(self.net_g)
        self.bundle = wrap_ddp(self.reconstructor, self.device, self.opt.get("find_unused_parameters", False))
        trained = {"g": self.bundle} | ({"d": self.bundle_d} if self.net_d is not None else {})
        networks = {"net_g": self.net_g} | ({"net_g_ema": self.ema.net} if self.ema else {})
        networks |= {"usage": self.usage} | ({"net_d": self.net_d} if self.net_d is not None else {})
        self.trainer = Trainer(self.builder, trained, networks, self.validator, self.update_learning_rate)
        self.guard, self.generator = self.trainer.guard, self.trainer.generator
        self.optimizers, self.schedulers = self.trainer.optimizers, self.trainer.schedulers

    @torch.no_grad()
    def check_discriminator(self, net: nn.Module) -> None:
        """Runs the discriminator on patches of ``gt_size`` pixels, for it may be used only much later (``gan_start``).

        Raises:
            OptionError: It fails on them, or its output has no row for each of them.
        """
        size = self.opt["datasets"]["train"].get("gt_size")
        if size is None:
            return
        at_fault = f"network_d: {type(net).__name__} cannot judge patches of datasets.train.gt_size {size}"
        net.eval()  # running statistics and power iterations stay as they are
        try:
            judged = net(torch.zeros(2, 3, size, size, device=self.device))
        except Exception as error:  # any error of an architecture that is not made for this size
            reason = (str(error).strip().splitlines() or [""])[0]
            raise OptionError(f"{at_fault}: {type(error).__name__}: {reason}") from error
        finally:
            net.train()
        if not isinstance(judged, Tensor) or judged.shape[:1] != (2,) or not judged.numel():
            raise OptionError(f"{at_fault}: it gives no numbers for each of them")

    def init_losses(self, train: dict[str, Any]) -> None:
        self.cri_pix = self.builder.loss("pixel_opt")
        self.cri_vq = self.builder.loss("vq_opt") or VQLoss()
        if train.get("perceptual_opt") and (problem := vgg_weights_problem(train["perceptual_opt"])):
            raise OptionError(problem)
        self.cri_perceptual = self.builder.loss("perceptual_opt")
        self.cri_gan = self.builder.loss("gan_opt")
        self.gan_schedule = self.cri_gan if isinstance(self.cri_gan, ScheduledLoss) else None
        if (
            self.gan_schedule is not None
        ):  # the schedule is for the generator; the discriminator's loss has no weight
            self.cri_gan = self.gan_schedule.loss
        if self.cri_gan is not None:
            # BasicSR's loss includes its weight, which the adaptive weight would cancel.
            self.gan_weight = float(self.cri_gan.loss_weight)  # type: ignore[arg-type]
            self.cri_gan.loss_weight = 1.0  # type: ignore[assignment]

    # ---------------------------------------------------------------------------------------------- one step

    def feed_data(self, data: dict[str, Any]) -> None:
        if self.is_train and self.trainer.checkpointer.pending_generators:
            self.trainer.checkpointer.restore_generators()
        self.images: Sequence[str] = data.get("lq_path") or data.get("gt_path") or ()
        images: Tensor = data["lq"] if data.get("gt") is None else data["gt"]
        memory_format = self.builder.precision.memory_format
        self.lq = self.gt = images.to(self.device, non_blocking=True, memory_format=memory_format)

    def optimize_parameters(self, current_iter: int) -> None:
        """One training step of generator and discriminator. An update that is not finite is skipped, on all ranks."""
        self.guard.begin()
        losses = self.compute_gradients(current_iter)
        self.guard.step(current_iter, losses, self.images)
        if self.ema:
            self.ema.update(current_iter, self.guard)
        self.update_codes(current_iter)
        if self.guard.full():
            self.trainer.check()

    def compute_gradients(self, current_iter: int) -> dict[str, Tensor]:
        """The losses of the step by name (scalars), after the backward pass of each network's own."""
        self.reconstructor.quantize = current_iter > self.options.vq_start
        for scheduled in self.builder.scheduled_losses:
            scheduled.begin(current_iter)
        with self.builder.precision.autocast:
            losses = self.forward_step(current_iter)
        self.guard.backward(torch.stack(list(losses.values())).sum())
        if self.net_d is not None and current_iter > self.options.gan_start:
            losses["l_d"] = self.discriminator_gradients()
        return losses

    def forward_step(self, current_iter: int) -> dict[str, Tensor]:
        """The weighted losses of ``net_g`` by name."""
        self.output = self.bundle(self.lq).to(self.lq.dtype)
        losses = {"l_pix": self.cri_pix(self.output, self.gt)} if self.cri_pix else {}
        if self.cri_perceptual:
            perceptual, style = self.cri_perceptual(self.output, self.gt)
            losses |= {
                name: value
                for name, value in (("l_percep", perceptual), ("l_style", style))
                if value is not None
            }
        if self.net_d is not None and current_iter > self.options.gan_start:
            losses["l_g_gan"] = self.adversarial_loss(torch.stack(list(losses.values())).sum())
        result = self.reconstructor.result
        commitment, losses["l_codebook"] = self.cri_vq(result.encoding, result.quantized)
        if self.reconstructor.quantize:  # before that, codes follow the encodings and not the reverse
            losses["l_commit"] = commitment
        return losses

    def adversarial_loss(self, reconstruction: Tensor) -> Tensor:
        """The generator's adversarial loss; ``reconstruction`` is the sum of its other losses so far."""
        assert self.net_d is not None and self.cri_gan is not None
        self.net_d.requires_grad_(False)
        loss = self.cri_gan(self.net_d(self.output), True, is_disc=False)
        if self.options.gan_adaptive_weight:
            loss = loss * adaptive_weight(reconstruction, loss, self.net_g.decoder.conv_out.weight)
        return (self.gan_weight if self.gan_schedule is None else self.gan_schedule.weight) * loss

    def discriminator_gradients(self) -> Tensor:
        """The discriminator's loss on this step's images and reconstructions, after its backward pass."""
        assert self.net_d is not None and self.cri_gan is not None
        self.net_d.requires_grad_(True)
        with self.builder.precision.autocast:
            # one pass for both: with DDP, a second pass before backward would change the buffers of the first
            real, fake = self.bundle_d(torch.cat([self.gt, self.output.detach()])).float().chunk(2)
            loss = 0.5 * (self.cri_gan(real, True, is_disc=True) + self.cri_gan(fake, False, is_disc=True))
        self.guard.backward(loss)
        return loss

    def update_codes(self, current_iter: int) -> None:
        """Counts the codes of this step, and restarts those that were not used for ``restart_every`` steps."""
        result = self.reconstructor.result
        self.usage.update(result.codes, self.guard.made)
        if self.options.restart_every and current_iter % self.options.restart_every == 0:
            codebook = self.net_g.quantize.embedding.weight.data
            self.usage.restart_idle(
                codebook, result.encoding, self.options.restart_every, self.generator, self.guard.made
            )

    def statistics(self) -> dict[str, Tensor]:
        return self.usage.statistics()

    def restore(self, lq: Tensor) -> Tensor:
        return self.restorer(_Reconstructor(getattr(self, "net_g_ema", self.net_g)), lq)
