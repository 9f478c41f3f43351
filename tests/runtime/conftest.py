"""Process environments of launchers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

NAMES = re.compile(r"SLURM_|MASTER_|RANK$|WORLD_SIZE$|LOCAL_|TORCHELASTIC_")


@pytest.fixture
def no_launcher() -> Iterator[None]:
    """Removes the launchers' variables before and after a test."""
    before = dict(os.environ)
    for name in before:
        if NAMES.match(name):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
