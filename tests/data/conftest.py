"""A paired set of noise, on disk and as LMDBs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from pair_sets import SCALE, Options, write_pair


@pytest.fixture
def pairs(tmp_path: Path) -> Options:
    """Options of a paired set of five images of 24x32 at scale 2."""
    for number in range(5):
        write_pair(tmp_path, f"im{number}", (24, 32), (12, 16), number)

    def options(backend: str = "disk", phase: str = "train", **changes: Any) -> dict[str, Any]:
        suffix = ""
        if backend == "lmdb":
            suffix = ".lmdb"
            for folder in ("GT", "LQ"):
                if not (tmp_path / f"{folder}.lmdb").exists():
                    names = sorted(path.name for path in (tmp_path / folder).iterdir())
                    make_lmdb_from_imgs(
                        str(tmp_path / folder), str(tmp_path / f"{folder}.lmdb"), names,
                        [name.split(".")[0] for name in names], map_size=2**20,
                    )  # fmt: skip
        return {
            "name": "pairs", "type": "PairedImageDataset", "phase": phase, "scale": SCALE,
            "dataroot_gt": str(tmp_path / f"GT{suffix}"), "dataroot_lq": str(tmp_path / f"LQ{suffix}"),
            "io_backend": {"type": backend}, "gt_size": 8, "use_hflip": True, "use_rot": True,
            "num_worker_per_gpu": 0, "batch_size_per_gpu": 4,
        } | changes  # fmt: skip

    return options
