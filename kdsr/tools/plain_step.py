"""The baseline of ``kdsr bench step --vs plain``: a DCKD step in the order of the authors' release (arXiv 2412.08939).

Written from the order of the release's work, with none of this package's savings:

- The student runs first, then the teacher on both views, then the history model on all inputs.
- The VQGAN runs on one set of images after the other: a feature pass for the student's output, the teacher's output and
  each set of negatives, then a second, full pass for the codes of the first two. Its feature pass ends at the last
  feature, as in the release. A set is one image at batch 1.
- Autograd records everything that depends on the student. Losses are read on the host at each step.
- Float32 without TF32, contiguous tensors, no autocast, torch's default optimizer.

The VQGAN's forward pass is written out here, so that a faster VQGAN does not make the baseline faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr.distill.moving_average import ema_decay_at
from kdsr.terms.dckd import history_step
from kdsr.terms.dckd_degradations import degrade

TERMS = ("pixel_opt", "logits_opt", "lcr_opt", "cl_opt", "ce_opt")  # in the order of the release


def problem(opt: dict[str, Any]) -> str | None:
    """Why there is no baseline for an option file; None if there is one."""
    train = opt["train"]
    if not (train.get("cl_opt") or train.get("ce_opt")):
        return "it has neither train.cl_opt nor train.ce_opt; compare with KEY:KEY=VALUE instead"
    others = [key for key in train if key.endswith("_opt") and train[key] and key not in TERMS]
    others += ["accumulate"] if train.get("accumulate", 1) > 1 else []
    others += ["mixing_augs"] if (train.get("mixing_augs") or {}).get("mixup") else []
    if others:
        return f"DCKD's release has no train.{others[0]}; compare with KEY:KEY=VALUE instead"
    return None


class PlainVQGAN:
    """The forward pass of a VQGAN encoder in single operations, from its weights under taming-transformers' names.

    Args:
        weights: ``state_dict`` of the network.
        options: ``network_vqgan`` of the option file.
    """

    def __init__(self, weights: dict[str, Tensor], options: dict[str, Any]) -> None:
        self.weights = weights
        config = options["ddconfig"]
        self.levels, self.blocks = len(config["ch_mult"]), config["num_res_blocks"]
        self.groups = config.get("norm_groups", 32)
        self.low, self.high = options.get("input_range", (0.0, 1.0))

    def features(self, x: Tensor) -> list[Tensor]:
        """Per level the output of the first residual block; nothing after the last of them is computed."""
        found: list[Tensor] = []
        self._down(self._scaled(x), found, features_only=True)
        return found

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances of each token to each code, (tokens, codes)."""
        h = self._down(self._scaled(x), [], features_only=False)
        h = self._block(h, "encoder.mid.block_1")
        h = self._block(self._attention(h, "encoder.mid.attn_1"), "encoder.mid.block_2")
        h = self._conv(self._norm_swish(h, "encoder.norm_out"), "encoder.conv_out")
        tokens = self._conv(h, "quant_conv").permute(0, 2, 3, 1).flatten(0, 2)
        codes = self.weights["quantize.embedding.weight"]
        return (tokens**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * (tokens @ codes.t())

    def _scaled(self, x: Tensor) -> Tensor:
        return x if (self.low, self.high) == (0, 1) else x * (self.high - self.low) + self.low

    def _down(self, x: Tensor, features: list[Tensor], features_only: bool) -> Tensor:
        h = self._conv(x, "encoder.conv_in")
        for level in range(self.levels):
            name, last = f"encoder.down.{level}", level == self.levels - 1
            for block in range(self.blocks):
                h = self._block(h, f"{name}.block.{block}")
                if block == 0:
                    features.append(h)
                    if last and features_only:
                        return h
                if f"{name}.attn.{block}.q.weight" in self.weights:
                    h = self._attention(h, f"{name}.attn.{block}")
            if not last:
                h = self._conv(F.pad(h, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2, padding=0)
        return h

    def _conv(self, x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2 if padding is None else padding)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.group_norm(x, self.groups, weight, bias, eps=1e-6)

    def _norm_swish(self, x: Tensor, name: str) -> Tensor:
        h = self._norm(x, name)
        return h * torch.sigmoid(h)

    def _block(self, x: Tensor, name: str) -> Tensor:
        h = self._conv(self._norm_swish(x, f"{name}.norm1"), f"{name}.conv1")
        h = self._conv(self._norm_swish(h, f"{name}.norm2"), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self._conv(x, f"{name}.nin_shortcut")
        return x + h

    def _attention(self, x: Tensor, name: str) -> Tensor:
        h = self._norm(x, f"{name}.norm")
        q, k, v = (self._conv(h, f"{name}.{part}").flatten(2) for part in "qkv")  # (N, C, H*W)
        attention = (torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5).softmax(2)
        h = torch.bmm(v, attention.transpose(1, 2)).view_as(x)
        return x + self._conv(h, f"{name}.proj_out")


class PlainStep:
    """A training step of DCKD's release with the networks of a model, which it trains in place of the model.

    Random numbers are drawn as by the model, so that both have the same losses.

    Args:
        model: A KDModel in training, with float32 networks; ``problem`` finds nothing in its options.

    Attributes:
        log_dict: The losses of the last step by name.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.terms: dict[str, Any] = model.terms
        self.train = model.opt["train"]
        networks: dict[str, Any] = model.networks()
        for net in networks.values():
            net.to(memory_format=torch.contiguous_format)
        self.vqgan = PlainVQGAN(networks["net_vqgan"].state_dict(), model.opt["network_vqgan"])
        optimizer = dict(self.train["optim_g"])
        kind = getattr(torch.optim, optimizer.pop("type"))
        self.optimizer: torch.optim.Optimizer = kind(model.net_g.parameters(), **optimizer)
        self.log_dict: dict[str, float] = {}

    def feed_data(self, data: dict[str, Any]) -> None:
        self.lq, self.gt = (data[key].to(self.model.device) for key in ("lq", "gt"))

    def optimize_parameters(self, current_iter: int) -> None:
        """Runs one training step."""
        self.optimizer.param_groups[0]["lr"] = self.model.optimizers[0].param_groups[0]["lr"]
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = cuda.allow_tf32, cudnn.allow_tf32
        cuda.allow_tf32 = cudnn.allow_tf32 = False
        try:
            self.optimizer.zero_grad()
            losses = self.losses()
            torch.stack([*losses.values()]).sum().backward()
            if limit := self.train.get("clip_grad_norm"):
                torch.nn.utils.clip_grad_norm_(self.model.net_g.parameters(), limit)
            self.optimizer.step()
        finally:
            cuda.allow_tf32, cudnn.allow_tf32 = before
        self.log_dict = {name: loss.item() for name, loss in losses.items()}
        self.update_averages(current_iter)

    def losses(self) -> dict[str, Tensor]:
        """Forward passes and losses, in the order of the release."""
        model, terms, lq = self.model, self.terms, self.lq
        output = model.net_g(lq)
        images, consistency = [lq], terms.get("lcr_opt")
        if consistency is not None:
            plan = consistency.augmentation.draw(len(lq), model.generator)
            images.append(consistency.augmentation.apply(lq, plan))
        teacher, *augmented = model.teacher("t").net(torch.cat(images)).chunk(len(images))
        losses = {}
        if "pixel_opt" in terms:
            losses["l_pix"] = terms["pixel_opt"].loss(output, self.gt)
        if "logits_opt" in terms:
            losses["l_ts"] = terms["logits_opt"].loss(output, teacher)
        if consistency is not None:
            target = consistency.augmentation.invert(augmented[0], plan)
            losses["l_lcr"] = consistency.loss(output, target)
        if "cl_opt" in terms:
            features = [self.vqgan.features(x) for x in (output, teacher, *self.negatives())]
            losses["l_cl"] = self.contrast(features)
        if "ce_opt" in terms:
            student, target = self.vqgan.distances(output), self.vqgan.distances(teacher)
            losses["l_ce"] = self.cross_entropy(student, target)
        return losses

    def negatives(self) -> list[Tensor]:
        """Outputs of the history model: one tensor per degradation."""
        options = self.terms["cl_opt"].options
        inputs: list[Tensor] = []
        if options.num_neg:
            degraded = degrade(
                self.lq,
                num=options.num_neg,
                blur_prob=options.gaussian_blur_prob,
                resize_prob=options.resize_prob,
                noise_prob=options.gaussian_noise_prob,
                gray_noise_prob=options.gray_noise_prob,
                generator=self.model.generator,
            )
            inputs += degraded.chunk(options.num_neg)
        if options.clean_negative:
            inputs.append(self.lq)
        return list(self.terms["cl_opt"].history(torch.cat(inputs)).chunk(len(inputs)))

    def contrast(self, features: list[list[Tensor]]) -> Tensor:
        """The contrastive loss of the anchor's, positive's and negatives' features, recorded by autograd."""
        loss = self.terms["cl_opt"].loss
        dims = (0, 1, 2, 3) if loss.ratio == "batch" else (1, 2, 3)
        total = torch.zeros((), device=self.lq.device)
        for weight, (anchor, positive, *negatives) in zip(
            loss.weights, zip(*features, strict=True), strict=True
        ):
            near, far = anchor - positive, anchor - torch.stack(negatives)
            near, far = (x.abs() if loss.distance == "L1" else x**2 for x in (near, far))
            total = total + weight * (near.mean(dims) / (far.sum(0).mean(dims) + 1e-7)).mean()
        return loss.loss_weight * total

    def cross_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The cross-entropy of code distributions, from squared distances."""
        loss = self.terms["ce_opt"].loss
        student, teacher = (x.max(1, keepdim=True).values - x for x in (student, teacher))
        logits = student.softmax(1) if loss.variant == "released" else student
        return loss.loss_weight * F.cross_entropy(logits, teacher.softmax(1), reduction=loss.reduction)

    def update_averages(self, current_iter: int) -> None:
        """Updates EMA and history model, parameter by parameter."""
        model, contrast = self.model, self.terms.get("cl_opt")
        if model.ema:
            keep = ema_decay_at(current_iter, model.ema.decay, model.ema.warmup)
            blend(model.ema.net, model.net_g, keep)
        if contrast is not None and current_iter % history_step(contrast.schedule, current_iter) == 0:
            source = model.ema.net if contrast.source == "ema" else model.net_g
            blend(contrast.history, source, contrast.decay)


def blend(target: torch.nn.Module, source: torch.nn.Module, keep: float) -> None:
    """``target ← keep·target + (1 − keep)·source``, as BasicSR does it."""
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    for name in ours:
        ours[name].data.mul_(keep).add_(theirs[name].data, alpha=1 - keep)
