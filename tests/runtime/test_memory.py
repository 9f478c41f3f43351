"""Networks that are larger than the machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdsr.runtime import memory
from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import MOST_LAYERS, free_memory, limit_network_size


def test_there_is_some_memory() -> None:
    free = free_memory()
    assert free is None or 0 < free < 2**50


def test_the_memory_limit_of_a_container(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() in (2000, None)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() != 2000


def test_ordinary_networks_pass_and_hooks_are_removed() -> None:
    with limit_network_size("network_g", 4):
        nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(50)))
    with limit_network_size("network_g"), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    nn.ModuleList(nn.Identity() for _ in range(MOST_LAYERS + 1))


def test_too_many_layers() -> None:
    with (
        pytest.raises(OptionError, match="network_t: more than 20,000 layers"),
        limit_network_size("network_t"),
    ):
        nn.ModuleList(nn.Identity() for _ in range(10**9))


def test_weights_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**20)
    with torch.device("meta"), limit_network_size("network_g"):
        nn.Linear(500, 500)  # 1 MB
    with (
        pytest.raises(OptionError, match=r"network_g: its weights \(4 copies in training\) need more than"),
        torch.device("meta"),
        limit_network_size("network_g", 4),
    ):
        nn.Linear(500, 500)
