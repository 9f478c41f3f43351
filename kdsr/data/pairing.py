"""Pairs LQ and GT images by name, with the rules of ``basicsr.data.data_util``.

BasicSR's pairing takes quadratic time and drops the folders of names in a ``meta_info_file``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import path as osp
from pathlib import Path
from typing import Any

from kdsr.data.image_files import list_folder


def partners(gt_names: Iterable[str], template: str, lq_folder: str) -> dict[str, str]:
    """The LQ name of each GT name: same folder and extension, the stem inserted into ``template``.

    Names are relative to the roots. If ``lq_folder`` has none of the GT's subfolders, the LQ images are expected
    directly in it, as in BasicSR.
    """
    names = list(gt_names)
    folders = {osp.dirname(name) for name in names if "/" in name}
    flat = not any(osp.isdir(osp.join(lq_folder, folder)) for folder in folders)
    found = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        stem, ending = osp.splitext(file)
        found[name] = f"{'' if flat else folder + slash}{template.format(stem)}{ending}"
    return found


def names_in_list(lines: Iterable[str]) -> list[str]:
    """The names in a ``meta_info_file``: each line up to the first space, without empty lines."""
    return [line.strip().split(" ")[0] for line in lines if line.strip()]


def lmdb_key(name: str) -> str:
    """The key of an image in an LMDB: its name up to the first dot."""
    return name.split(".")[0]


def _paths(
    pairs: Iterable[tuple[str, str]], folders: Sequence[str], keys: Sequence[str]
) -> list[dict[str, str]]:
    (lq_folder, gt_folder), (lq, gt) = folders, keys
    return [
        {f"{lq}_path": osp.join(lq_folder, partner), f"{gt}_path": osp.join(gt_folder, name)}
        for name, partner in pairs
    ]


def paired_paths_from_folder(
    folders: Sequence[str], keys: Sequence[str], filename_tmpl: str
) -> list[dict[str, str]]:
    """BasicSR's function of this name, in linear time.

    Args:
        folders: Folders of the LQ and GT images.
        keys: ``['lq', 'gt']``.
        filename_tmpl: LQ name from GT name, without extensions.

    Returns:
        ``{lq_path, gt_path}`` for each GT image, sorted by name; an ``AssertionError`` if the folders do not pair.
    """
    lq_names, gt_names = (list_folder(folder, recursive=False).images for folder in folders)
    assert len(lq_names) == len(gt_names), (
        f"{keys[0]} and {keys[1]} datasets have different number of images: {len(lq_names)}, {len(gt_names)}."
    )
    there = set(lq_names)
    pairs = partners(gt_names, filename_tmpl, folders[0])
    for partner in pairs.values():
        assert partner in there, f"{partner} is not in {keys[0]}_paths."
    return _paths(pairs.items(), folders, keys)


def paired_paths_from_meta_info_file(
    folders: Sequence[str], keys: Sequence[str], meta_info_file: str, filename_tmpl: str
) -> list[dict[str, str]]:
    """BasicSR's function of this name, but keeps folders in names; arguments as above."""
    names = names_in_list(Path(meta_info_file).read_text(encoding="utf-8").splitlines())
    pairs = partners(names, filename_tmpl, folders[0])
    return _paths(((name, pairs[name]) for name in names), folders, keys)


def keep_listed(dataset: Any, opt: Mapping[str, Any]) -> None:
    """Restricts an LMDB data set to its ``meta_info_file``, which BasicSR ignores for LMDBs."""
    listing = opt.get("meta_info_file")
    if listing is None or (opt.get("io_backend") or {}).get("type") != "lmdb":
        return
    wanted = set(map(lmdb_key, names_in_list(Path(listing).read_text(encoding="utf-8").splitlines())))
    dataset.paths = [
        path for path in dataset.paths if (path["gt_path"] if isinstance(path, dict) else path) in wanted
    ]
