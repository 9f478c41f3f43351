"""Networks that are larger than the machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdsr.runtime import memory
from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import MOST_LAYERS, free_memory, sizes_watched


def test_there_is_some_memory() -> None:
    free = free_memory()
    assert free is None or 0 < free < 2**50


def test_a_container_may_have_less(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() in (2000, None)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() != 2000


def test_ordinary_networks_pass_and_nothing_is_left_watching() -> None:
    with sizes_watched("network_g", 4):
        nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(50)))
    with sizes_watched("network_g"), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    nn.ModuleList(nn.Identity() for _ in range(MOST_LAYERS + 1))


def test_too_many_layers() -> None:
    with pytest.raises(OptionError, match="network_t: more than 20,000 layers"), sizes_watched("network_t"):
        nn.ModuleList(nn.Identity() for _ in range(10**9))


def test_weights_that_together_are_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**20)
    with torch.device("meta"), sizes_watched("network_g"):
        nn.Linear(500, 500)  # 1 MB
    with (
        pytest.raises(OptionError, match=r"network_g: its weights, held 4 times in training, need more than"),
        torch.device("meta"),
        sizes_watched("network_g", 4),
    ):
        nn.Linear(500, 500)
