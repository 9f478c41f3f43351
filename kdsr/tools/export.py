"""``kdsr export``: a network as one file for another program, checked before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdsr.deploy.export import ExportSettings
from kdsr.deploy.export import export as export_network
from kdsr.deploy.traced import OPSET
from kdsr.runtime.errors import OptionError


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth, .ckpt or .safetensors.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write: .onnx, .safetensors or .pt2.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder to measure the file on: LQ images with --gt, else images to reduce. "
            "Default: the validation sets of the checkpoint's run."
        ),
    ] = None,
    gt: Annotated[Path | None, typer.Option(help="Ground truth of --images.")] = None,
    opt: Annotated[
        Path | None,
        typer.Option("-opt", "--opt", help="Option file with the network, if a checkpoint lacks it."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Weights and computation in float16.")] = False,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="The only size of input images. Default: any size.")
    ] = None,
    opset: Annotated[int, typer.Option(min=18, max=23, help="Version of ONNX's operators.")] = OPSET,
    licence: Annotated[str | None, typer.Option(help="Text on the licence, for the file's header.")] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Write the file without measuring PSNR on images.")
    ] = False,
) -> None:
    """Export a network to ONNX, safetensors or torch.export's format; the file is measured before it is written."""
    settings = ExportSettings(out, fp16, _size(size), opset, licence, unverified)
    done = export_network(checkpoint, settings, opt=opt, images=images, gt=gt, say=typer.echo)
    how = "float16" if fp16 else "float32"
    how += f", opset {opset}" if out.suffix == ".onnx" else ""
    sizes = f"images of {size}" if size else "images of any size"
    measured = "" if done.psnr else "; PSNR was not measured"
    typer.echo(
        f"wrote {done.file}: {done.size / 2**20:.2f} MiB, {how}"
        + (f", {sizes}" if out.suffix != ".safetensors" else "")
        + measured
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise OptionError(f"--size: {text!r} is not a size; give HEIGHTxWIDTH in pixels, such as 256x256")
    return int(height), int(width)
