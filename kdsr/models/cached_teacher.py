"""Teachers whose outputs come with the data: ``train.teacher_cache`` and ``network_t: {type: Outputs}``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import path as osp
from typing import Any

import torch
from torch import Tensor

from kdsr.data.seeded_dataset import SeededDataset
from kdsr.data.stored_outputs import TRAINING_SETS, flips_of
from kdsr.distill.term import all_terms
from kdsr.distill.weight_files import each_network, weight_files

LMDB = "images.lmdb"


class StoredOutputs:
    """Restores the images of a set by their stored outputs, to measure these like those of a network.

    Args:
        dataset: Whole images, with outputs.
    """

    def __init__(self, dataset: SeededDataset) -> None:
        self.dataset = dataset
        self.indices = {_bytes(dataset[index]["lq"]): index for index in range(len(dataset))}

    def __call__(self, lq: Tensor) -> Tensor:
        """(N, C, H, W), LQ images of the set -> (N, C, H·scale, W·scale)."""
        return torch.stack([self.dataset.stored_output(self.indices[_bytes(image)]) for image in lq]).to(lq)


def _bytes(image: Tensor) -> bytes:
    return hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()


def outputs_are_given(opt: Mapping[str, Any]) -> bool:
    """Whether the teacher's outputs come with the data; ``network_t`` is then not built."""
    return bool((opt.get("train") or {}).get("teacher_cache")) or is_outputs(opt.get("network_t"))


def is_outputs(network: Any) -> bool:
    """Whether a network of the options is a folder of outputs."""
    return isinstance(network, dict) and network.get("type") == "Outputs"


def cached_teacher_problems(opt: Mapping[str, Any]) -> list[str]:
    """Returns why stored outputs cannot take the place of the teacher; empty if they can or there are none."""
    network, train, path = opt.get("network_t"), opt.get("train") or {}, opt.get("path") or {}
    problems = [
        f"{key}: Outputs is no network; only network_t can be one, and no list with others"
        for key, options in each_network(opt).items()
        if key.startswith("network_") and key != "network_t" and is_outputs(options)
    ]
    if not outputs_are_given(opt):
        return problems
    place = "network_t (Outputs)" if is_outputs(network) else "train.teacher_cache"
    if train.get("teacher_cache"):
        if not network:
            problems.append(f"{place}: there is no teacher; give network_t and path.pretrain_network_t")
        if is_outputs(network):
            problems.append(
                "train.teacher_cache: network_t is a folder of outputs itself; remove this option"
            )
    elif path.get("pretrain_network_t"):
        problems.append("path.pretrain_network_t: has no effect, network_t is a folder of outputs; remove it")
    problems += [
        f"train.{key}: needs the teacher itself, for its features or its output for other images; "
        f"{place} has only its output for the training images. Remove one of the two"
        for key, term in all_terms().items()
        if train.get(key) and term.NEEDS & {"teacher", "taps"}
    ]
    if (train.get("mixing_augs") or {}).get("mixup"):
        problems.append(
            f"train.mixing_augs.mixup: {place} has no outputs for mixed images; set it to false, or remove {place}"
        )
    if path.get("init_from") == "teacher":
        problems.append(
            f"path.init_from: teacher: {place} takes the teacher's place, it is not loaded; name its file instead"
        )
    return problems + _data_problems(opt, place)


def _data_problems(opt: Mapping[str, Any], place: str) -> list[str]:
    dataset = (opt.get("datasets") or {}).get("train") or {}
    problems = []
    if dataset.get("type") not in TRAINING_SETS:
        problems.append(
            f"datasets.train.type: {dataset.get('type')}: {place} is for images that are files, not made or changed at "
            f"each step; use {', '.join(TRAINING_SETS)}, or the teacher itself"
        )
    if dataset.get("color") == "y":
        problems.append(f"datasets.train.color: y: {place} has colour images; remove this option, or {place}")
    network = opt.get("network_t")
    if (
        isinstance(network, dict)
        and is_outputs(network)
        and not network.get("flips")
        and any(flips_of(dataset))
    ):
        problems.append(
            "network_t.flips: datasets.train flips patches (use_hflip, use_rot), and most networks do not give the "
            "flipped output for a flipped image; set use_hflip and use_rot to false, or flips: true if they may be "
            "flipped"
        )
    return problems


def cache_folder(opt: Mapping[str, Any]) -> str:
    """The folder in ``train.teacher_cache`` of this teacher at this scale: its name is a hash of both.

    The hash is that of the networks' options, the content of their files, ``param_key``, ``train.teacher_weights``,
    the scale, and ``mean`` and ``std`` of the training set.
    """
    train, networks, files = opt["train"], each_network(opt), weight_files(opt)
    dataset = opt["datasets"]["train"]
    described: list[Any] = [
        opt.get("scale") or 1,
        train.get("teacher_weights"),
        dataset.get("mean"),
        dataset.get("std"),
    ]
    for key in sorted(key for key in files if key.partition(".")[0] == "t"):
        options = {name: value for name, value in networks[f"network_{key}"].items() if name != "path"}
        with open(osp.expanduser(files[key]), "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        described.append([options, networks["path"].get(f"param_key_{key}"), content])
    name = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return osp.join(osp.expanduser(train["teacher_cache"]), name)


def name_teacher_images(opt: dict[str, Any]) -> None:
    """Sets the option ``teacher_images`` of the training set where the teacher's outputs come with the data."""
    if not outputs_are_given(opt):
        return
    if keyed := bool(opt["train"].get("teacher_cache")):
        root, place = cache_folder(opt), "train.teacher_cache"
        lmdb = osp.join(root, LMDB)
        root = lmdb if osp.isdir(lmdb) else root
    else:
        root, place = osp.expanduser(opt["network_t"]["path"]), "network_t.path"
    opt["datasets"]["train"]["teacher_images"] = {"root": root, "place": place, "keyed": keyed}
