"""Warnings about what a data set does not read: parts of images, and files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kdsr.data.image_info import LOSSES, ImageInfo, probe
from kdsr.data.image_roots import quote, spread


def describe_losses(looks: Sequence[tuple[str, ImageInfo]], total: int, results: bool = False) -> list[str]:
    """Sentences on what is lost when images are read.

    Args:
        looks: Names and headers.
        total: How many images there are.
        results: Whether results with 8 bits are made of them.
    """
    by_loss = {text: [name for name, info in looks if loss in info.losses] for loss, text in LOSSES.items()}
    if results:
        deep = [name for name, info in looks if info.bits > 8]
        by_loss["more than 8 bits per channel, all of which are read; results have 8"] = deep
    among = f" of the {len(looks)} looked at" if len(looks) < total else ""
    sentences = []
    for text, names in by_loss.items():
        if names:
            subject = f"1 image{among} has" if len(names) == 1 else f"{len(names)} images{among} have"
            sentences.append(f"{subject} {text}: {quote(names)}")
    return sentences


def describe_left_out(root: str, left_out: Sequence[str], recursive: bool = True) -> str:
    """A sentence on what lies in a folder and is not read; empty where everything is read.

    Args:
        root: The folder.
        left_out: As ``list_folder`` gives them.
        recursive: Whether folders in the folder are read.
    """
    if not left_out:
        return ""
    what = "files without an image's ending" if recursive else "folders"
    text = f"left out of {root} ({len(left_out)}; {what}, or links that lead nowhere): {quote(left_out)}"
    sound = [name for name in spread(list(left_out)) if recursive and _is_image(os.path.join(root, name))]
    if sound:
        text += f"; their content is an image's in {quote(sound)}: give them such an ending"
    return text


def _is_image(path: str) -> bool:
    try:
        return os.path.isfile(path) and bool(probe(path))
    except OSError:
        return False
