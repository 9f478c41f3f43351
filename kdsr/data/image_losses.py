"""Warnings about parts of images and files that a data set does not read."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kdsr.data.image_info import LOSSES, ImageInfo, probe
from kdsr.data.image_roots import quote, spread


def describe_losses(infos: Sequence[tuple[str, ImageInfo]], total: int, results: bool = False) -> list[str]:
    """Warnings about what is lost when images, given by name and header, are read.

    ``total`` is the number of images in the data set; with ``results`` 8-bit results are written for them.
    """
    by_loss = {text: [name for name, info in infos if loss in info.losses] for loss, text in LOSSES.items()}
    if results:
        deep = [name for name, info in infos if info.bits > 8]
        by_loss["more than 8 bits per channel, all of which are read; results have 8"] = deep
    among = f" of the {len(infos)} checked" if len(infos) < total else ""
    sentences = []
    for text, names in by_loss.items():
        if names:
            subject = f"1 image{among} has" if len(names) == 1 else f"{len(names)} images{among} have"
            sentences.append(f"{subject} {text}: {quote(names)}")
    return sentences


def describe_left_out(root: str, left_out: Sequence[str], recursive: bool = True) -> str:
    """A warning about entries of a folder that are not read (from ``list_folder``); empty if there are none."""
    if not left_out:
        return ""
    what = "files without an image's ending" if recursive else "folders"
    text = f"left out of {root} ({len(left_out)}; {what}, or broken links): {quote(left_out)}"
    readable = [name for name in spread(list(left_out)) if recursive and _is_image(os.path.join(root, name))]
    if readable:
        text += f"; {quote(readable)} can be decoded: give such files an image's ending"
    return text


def _is_image(path: str) -> bool:
    try:
        return os.path.isfile(path) and bool(probe(path))
    except OSError:
        return False
