"""Exports a network to one file and checks the file against the network before it gets its name."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from kdsr.deploy.inference import Inference, Settings
from kdsr.deploy.network_file import Found, OpenedNetwork, describe, open_network
from kdsr.deploy.onnx_network import at_least, require_onnx
from kdsr.deploy.pairs import Pairs, given_pairs, mean_psnr, of_one_size, validation_pairs
from kdsr.deploy.traced import (
    ONNX_PACKAGES,
    OPSET,
    ExportError,
    Pt2Network,
    onnx_content,
    onnx_model,
    pt2_content,
    traced,
)
from kdsr.distill.padding import extended
from kdsr.models.pretrained import as_text
from kdsr.models.restored_images import Restore
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import CheckpointError, OptionError, TrainingError

ENDINGS = (".onnx", ".safetensors", ".pt2")
LARGEST_ERROR = 1e-4  # of the output's range, in float32
LARGEST_DROP = {False: 0.01, True: 0.05}  # of PSNR in dB, in float32 and in float16
LICENCE = "not stated; the terms of the training images and of the teacher's weights apply"
_CROP = 160  # longest side of the images on which outputs are compared


@dataclass(frozen=True)
class ExportSettings:
    """What is written.

    Attributes:
        out: The file; its ending is one of ``ENDINGS``.
        half: Whether weights and computation are in float16.
        size: The only H and W of an ``.onnx`` or ``.pt2``; None: free.
        opset: Version of ONNX's operators.
        licence: Text for the file's header; None: that of the checkpoint, or ``LICENCE``.
        unverified: Whether the file is written without a measurement on images.
    """

    out: Path
    half: bool = False
    size: tuple[int, int] | None = None
    opset: int = OPSET
    licence: str | None = None
    unverified: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: The file.
        size: Its length in bytes.
        error: Largest difference to the network's output, as a share of the output's range.
        psnr: By set: PSNR in dB of the network and of the file; empty if unverified.
    """

    file: Path
    size: int
    error: float
    psnr: dict[str, tuple[float, float]]


def export(
    checkpoint: Path,
    settings: ExportSettings,
    *,
    opt: Path | None = None,
    images: Path | None = None,
    gt: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Exported:
    """Exports the network of a checkpoint.

    Args:
        checkpoint: See ``open_network``, also for ``opt``.
        settings: What is written.
        opt: The option file with the network.
        images: Folder on whose images the file is measured; None: the validation sets of the checkpoint's run.
        gt: Folder of their ground truth; see ``given_pairs``.
        say: Called with lines for the user.

    Raises:
        OptionError: The settings are wrong, there is nothing to measure on, or a package is missing.
        CheckpointError: See ``open_network``.
        ExportError: The network cannot be exported, or the file differs; nothing is left behind.
    """
    _check(checkpoint, settings)
    opened = open_network(checkpoint, opt)
    say(f"{checkpoint}: {opened.source}")
    if settings.size and any(side % opened.multiple_of for side in settings.size):
        raise OptionError(f"--size: both sides must be multiples of {opened.multiple_of} for {opened.source}")
    sets = _sets(checkpoint, opened, settings, images, gt)
    make, smallest = _maker(opened, settings)
    metadata = _metadata(opened, settings, smallest)
    restore = partial(at_least, _restore(opened, settings), side=smallest)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, settings.out.name)
        file.write_bytes(make(metadata))
        written = _opened_again(file, opened, smallest, settings.size)
        examples = _examples(opened, settings, sets, smallest)
        error = max(_difference(opened, written, example) for example in examples)
        shapes = ", ".join("x".join(map(str, example.shape[-2:])) for example in examples)
        say(f"largest difference to PyTorch: {error:.1e} of the output's range ({shapes})")
        if not settings.half and not error <= LARGEST_ERROR:
            raise ExportError(
                f"{settings.out}: differs from PyTorch by {error:.1e} of the output's range; not written"
            )
        psnr: dict[str, tuple[float, float]] = {}
        for pairs in sets:
            values = [mean_psnr(restore, pairs, opened.scale, str(checkpoint))]
            try:
                values.append(mean_psnr(_restore(written, settings), pairs, opened.scale, "the file"))
            except TrainingError as problem:  # not finite
                raise ExportError(
                    f"{settings.out}: its output is not finite on {pairs.name}, perhaps for lack of range; "
                    "not written"
                ) from problem
            psnr[pairs.name] = (values[0], values[1])
            say(f"PSNR on {pairs.name}: {values[1]:.3f} dB, PyTorch {values[0]:.3f} dB")
            if not values[0] - values[1] <= LARGEST_DROP[settings.half]:
                raise ExportError(
                    f"{settings.out}: loses {values[0] - values[1]:.3f} dB on {pairs.name}; not written"
                )
    if psnr:
        metadata["psnr"] = "; ".join(
            f"{value:.3f} dB on {Path(name).name}" for name, (_, value) in psnr.items()
        )
    content = make(metadata)
    atomic_write(settings.out, lambda opened_file: opened_file.write(content))
    return Exported(settings.out, len(content), error, psnr)


def _check(checkpoint: Path, settings: ExportSettings) -> None:
    out = settings.out
    if out.suffix not in ENDINGS:
        raise OptionError(f"-o {out}: give a file that ends in {', '.join(ENDINGS)}")
    if out.is_dir():
        raise OptionError(f"-o {out}: is a folder")
    if out.absolute() == checkpoint.absolute():
        raise OptionError(f"-o {out}: is the checkpoint itself")
    if out.suffix == ".onnx":
        require_onnx("export to ONNX", *ONNX_PACKAGES)
    if settings.size and out.suffix == ".safetensors":
        raise OptionError("--size: weights have no size; it is for .onnx and .pt2")


def _sets(
    checkpoint: Path, opened: OpenedNetwork, settings: ExportSettings, images: Path | None, gt: Path | None
) -> list[Pairs]:
    if not list(opened.net.parameters()):
        raise OptionError(f"{checkpoint}: has no weights to export; give the checkpoint of a network")
    if gt is not None and images is None:
        raise OptionError("--gt: needs --images, the LQ images")
    if images is not None:
        sets = [given_pairs(images, gt, opened.scale)]
    else:
        sets = [] if settings.unverified else validation_pairs(checkpoint)
        if not sets and not settings.unverified:
            raise OptionError(
                f"{checkpoint}: there is no run with validation images beside it to measure the exported file on; give "
                "--images FOLDER (and --gt FOLDER), or --unverified"
            )
    if settings.size:
        return [of_one_size(pairs, settings.size, opened.scale) for pairs in sets]
    return sets


def _maker(
    opened: OpenedNetwork, settings: ExportSettings
) -> tuple[Callable[[Mapping[str, str]], bytes], int]:
    """What makes the file's content of its metadata, and the least side of an image."""
    if settings.out.suffix == ".safetensors":
        weights = {
            name: (value.half() if settings.half and value.is_floating_point() else value)
            .clone()
            .contiguous()
            for name, value in opened.net.state_dict().items()
        }
        return lambda metadata: safetensors.torch.save(weights, {"format": "pt", **metadata}), 1
    if settings.out.suffix == ".pt2":
        program, smallest = traced(opened, settings.size, settings.half)
        return lambda metadata: pt2_content(program, metadata), smallest
    program, smallest = traced(opened, settings.size)
    model = onnx_model(program, settings.half, settings.opset)
    return lambda metadata: onnx_content(model, metadata), smallest


def _metadata(opened: OpenedNetwork, settings: ExportSettings, smallest: int) -> dict[str, str]:
    described: dict[str, object] = {
        **{key: value for key, value in opened.described.items() if key in ("run", "teacher")},
        "scale": opened.scale,
        "value_range": [0.0, 1.0],
        "precision": "float16" if settings.half else "float32",
        "licence": settings.licence or opened.licence or LICENCE,
    }
    if opened.options and opened.options["type"] != "Spandrel":  # which names a file
        described["network"] = opened.options
    if settings.out.suffix != ".safetensors":
        described |= {"multiple_of": opened.multiple_of, "smallest": smallest}
    return as_text(described)


def _opened_again(
    file: Path, opened: OpenedNetwork, smallest: int, size: tuple[int, int] | None
) -> OpenedNetwork:
    """The network of the written file, opened as a user opens it."""
    if file.suffix != ".pt2":
        try:
            return open_network(file)
        except CheckpointError as error:
            raise ExportError(
                [f"the exported file cannot be opened: {line}" for line in error.problems]
            ) from error
    net = Pt2Network(file.read_bytes(), opened.multiple_of, smallest)
    return describe(net, Found(opened.options, "in a .pt2 file"), file, "cpu", size)


def _restore(opened: OpenedNetwork, settings: ExportSettings) -> Restore:
    if settings.size is None:
        return Inference(opened, Settings())
    return torch.no_grad()(opened.net)


def _examples(
    opened: OpenedNetwork, settings: ExportSettings, sets: Sequence[Pairs], smallest: int
) -> list[Tensor]:
    """(N, C, H, W) in [0, 1] of three sizes, of one for a fixed size: cuts of real images where there are any."""
    shares = [(1.0, 1.0), (0.75, 1.0), (1.0, 0.5)]
    if sets:
        images = [lq for pairs in sets for lq in pairs.lq(len(shares))][: len(shares)]
        images = [images[index % len(images)] for index in range(len(shares))]
    else:
        sides = settings.size or (_CROP, _CROP)
        images = [torch.rand(1, opened.channels_in, *sides, generator=torch.Generator().manual_seed(1))] * 3
    examples = []
    for image, share in zip(images, shares, strict=True):
        image = image[:, : opened.channels_in]
        if settings.size is None:
            image = extended(image, math.lcm(opened.multiple_of, smallest))
            height, width = (
                max(
                    int(min(side, _CROP) * part) // opened.multiple_of * opened.multiple_of,
                    opened.multiple_of,
                    smallest,
                )
                for side, part in zip(image.shape[-2:], share, strict=True)
            )
            image = image[..., :height, :width]
        examples.append(image.contiguous())
    examples[0] = torch.cat([examples[0], examples[0].flip(-1)])  # a batch of two
    return examples[:1] if settings.size else examples


def _difference(opened: OpenedNetwork, written: OpenedNetwork, example: Tensor) -> float:
    """The largest difference of two networks' outputs, as a share of the first one's range."""
    with torch.no_grad():
        wanted, given = opened.net(example.clone()), written.net(example.clone())
    if wanted.shape != given.shape:
        raise ExportError(f"gives {tuple(given.shape)} in place of {tuple(wanted.shape)}; not written")
    span = float(wanted.max() - wanted.min())
    return float((wanted - given).abs().max()) / max(span, 1e-12)
