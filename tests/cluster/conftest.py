"""A real cluster of two nodes, started once for the tests that ask for it and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.two_nodes import TwoNodes, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("cluster"))  # one process for them: there is one cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[TwoNodes]:
    reason = why_not()
    if reason:
        pytest.skip(f"NO SLURM CLUSTER, nothing of it is tested: {reason}")
    with TwoNodes() as nodes:
        yield nodes
