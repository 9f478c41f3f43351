"""LmdbClient: one environment per process, and damage by name."""

from __future__ import annotations

import random
from pathlib import Path

import lmdb
import pytest

from kdsr.data.lmdb_client import LmdbClient, first_bytes
from kdsr.runtime.errors import DataError


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "images.lmdb"
    with lmdb.open(str(path), map_size=2**22) as env, env.begin(write=True) as writing:
        for number in range(20):
            writing.put(f"im{number}".encode(), bytes([number]) * 9000)
    return path


def test_values_and_absent_keys(database: Path) -> None:
    client = LmdbClient([str(database)], ["gt"])
    assert client.get("im3", "gt") == bytes([3]) * 9000
    assert client.get("im99", "gt") is None


def test_first_bytes_leaves_nothing_open(database: Path) -> None:
    found = first_bytes(str(database), [f"im{number}" for number in range(22)], 5000)
    assert found == {f"im{n}": bytes([n]) * 5000 if n < 20 else None for n in range(22)}
    with lmdb.open(str(database), map_size=2**22) as env, env.begin(write=True) as writing:
        writing.delete(b"im5")  # lmdb would refuse a second environment of one that is open
    client = LmdbClient([str(database)], ["gt"])
    client.get("im1", "gt")
    assert first_bytes(str(database), ["im5", "im6"], 1) == {"im5": None, "im6": bytes([6])}
    assert client.get("im1", "gt") == bytes([1]) * 9000, "what was open stays open"


def test_impossible_key_is_named(database: Path) -> None:
    with pytest.raises(DataError, match=f"Cannot read the key '' of the LMDB {database}"):
        LmdbClient([str(database)], ["gt"]).get("", "gt")
    with pytest.raises(DataError, match=f"Cannot read the LMDB {database}"):
        first_bytes(str(database), [""], 1)


def test_truncated_at_any_length(database: Path) -> None:
    data = database / "data.mdb"
    whole = data.read_bytes()
    draw = random.Random(0)
    for length in [0, 1, 4096, 8192, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(50))]:
        data.write_bytes(whole[:length])
        with pytest.raises(DataError, match="images.lmdb"):
            LmdbClient([str(database)], ["gt"]).get("im7", "gt")
        with pytest.raises(DataError, match="images.lmdb"):
            first_bytes(str(database), ["im7"], 1)
    data.write_bytes(whole)
    assert LmdbClient([str(database)], ["gt"]).get("im7", "gt") == bytes([7]) * 9000


def test_folder_without_a_database(tmp_path: Path) -> None:
    (tmp_path / "empty.lmdb").mkdir()
    for name in ("empty.lmdb", "nowhere.lmdb"):
        with pytest.raises(DataError, match=f"Cannot open the LMDB {tmp_path / name}"):
            LmdbClient([str(tmp_path / name)], ["gt"]).get("a", "gt")
