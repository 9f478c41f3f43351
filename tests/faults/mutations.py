"""Mutations of option trees, texts and checkpoints: what a tired hand, a bad disk or a bad mind makes of them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import yaml

MARKER = "executed"  # a file of this name means that code out of a file has run

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1000, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.0, 0.5, -0.5, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "x", "1", "1e5", "true", "null", "~", "\x07bell", "tab\tnewline\n",
    "\x1b[31m", "ünïcödé", "\u202eleft", "../up", "/dev/null", "/dev/zero", ".", "a/b", "%s %d {}", "{0.__class__}",
    "${scale}", "${nothing}",
    "${train}", "${train.total_iter", "${${scale}}", "$", "__class__", "type", "x" * 5000, [], [[]], [1], [1, 2, 3],
    [None], ["a"], [math.nan], [-1, 0], [{}], {}, {"type": "L1Loss"}, {"type": None}, {"a": {"b": 1}}, {"": 1},
    {"__init__": 1}, "L1Loss", "EDSR", "VQGAN", "Adam", "PairedImageDataset", "DCKDModel", "SRModel", "lmdb", "cuda",
]  # fmt: skip
HOSTILE_TEXT = [
    f"!!python/object/apply:os.system ['touch {MARKER}']",
    f"!!python/object/new:os.system [touch {MARKER}]",
    "!!python/name:os.system",
    "!!python/module:os",
    f"!!python/object/apply:builtins.eval [\"open('{MARKER}', 'w')\"]",
    f"__import__('os').system('touch {MARKER}')",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2001-12-14",
    "!custom {a: 1}",
    "*nowhere",
    "&a [*a, *a]",
    "{<<: {type: EDSR}}",
    "{? [1, 2] : 3}",
    "{1: 2}",
    "[1, 2",
    "'open",
    "|\n  block",
    "0x1F",
    "0o17",
    "1_000",
    "12:30:45",
    ".inf",
    ".nan",
    "-.inf",
    "2001-01-01",
    "yes",
    "\x00",
    "\ufeff",
    "\t",
    "%YAML 9.9",
    "---",
    "...",
]

Path = tuple[Any, ...]


def places(node: Any, above: Path = ()) -> list[Path]:
    """All places in a tree of dicts and lists, the root left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found: list[Path] = []
    for key, value in items:
        found += [(*above, key), *places(value, (*above, key))]
    return found


def at(tree: Any, place: Path) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def typo(word: str, rng: random.Random) -> str:
    if not word:
        return "x"
    spot = rng.randrange(len(word))
    return rng.choice(
        [word[:spot] + word[spot + 1 :], word[:spot] + word[spot] + word[spot:], word.upper(), word + "_",
         word[:spot] + rng.choice("axz_0.: ") + word[spot + 1 :]]
    )  # fmt: skip


def _delete(tree: Any, place: Path, rng: random.Random) -> None:
    del at(tree, place[:-1])[place[-1]]


def _rename(tree: Any, place: Path, rng: random.Random) -> None:
    above = at(tree, place[:-1])
    if isinstance(above, dict):
        others = [key for path in places(tree) if isinstance(key := path[-1], str)]
        name = typo(str(place[-1]), rng) if rng.random() < 0.6 else rng.choice(others)
        above[name] = above.pop(place[-1])


def _replace(tree: Any, place: Path, rng: random.Random) -> None:
    at(tree, place[:-1])[place[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))


def _scale(tree: Any, place: Path, rng: random.Random) -> None:
    value = at(tree, place)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _replace(tree, place, rng)
    factor = rng.choice([-1, 0, 0.1, 0.5, 2, 3, 10, 1000, 1e6, 1e12, 1e300])
    scaled = value * factor if isinstance(value, float) or abs(factor) < 1e20 else float(value) * factor
    whole = isinstance(value, int) and math.isfinite(scaled) and rng.random() < 0.8
    at(tree, place[:-1])[place[-1]] = int(scaled) if whole else scaled + rng.choice([0, 0, 1, -1])
    return None


def _swap(tree: Any, place: Path, rng: random.Random) -> None:
    other = rng.choice(places(tree))
    one, two = copy.deepcopy(at(tree, place)), copy.deepcopy(at(tree, other))
    at(tree, other[:-1])[other[-1]] = one
    with suppress(KeyError, IndexError, TypeError):  # the other place may have lain above this one
        at(tree, place[:-1])[place[-1]] = two


def _nest(tree: Any, place: Path, rng: random.Random) -> None:
    value = at(tree, place)
    wrapped = rng.choice([[value], {"type": value}, [value, value], {str(place[-1]): value}, str(value)])
    at(tree, place[:-1])[place[-1]] = wrapped


def _add(tree: Any, place: Path, rng: random.Random) -> None:
    above = at(tree, place)
    names = [key for path in places(tree) if isinstance(key := path[-1], str)]
    if isinstance(above, dict):
        above[rng.choice([*names, "extra", "_base_", "_replace_"])] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif isinstance(above, list):
        above.insert(rng.randrange(len(above) + 1), copy.deepcopy(rng.choice(ODD_VALUES)))
    else:
        _replace(tree, place, rng)


TREE_MUTATIONS: list[Callable[[Any, Path, random.Random], None]] = [
    _delete, _rename, _replace, _replace, _replace, _scale, _scale, _swap, _nest, _add,
]  # fmt: skip


def mutate_tree(tree: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three mutations of an option tree."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(tree)
        if found:
            rng.choice(TREE_MUTATIONS)(tree, rng.choice(found), rng)
    return tree


def mutate_text(text: str, rng: random.Random) -> bytes:
    """One mutation of an option file's text: lines, tags, anchors, bytes."""
    lines = text.split("\n")
    spot = rng.randrange(len(lines))
    key, colon, value = lines[spot].partition(":")
    kind = rng.randrange(10)
    if kind <= 3 and colon:
        lines[spot] = f"{key}: {rng.choice(HOSTILE_TEXT)}"
    elif kind == 4:
        lines.insert(spot, rng.choice([lines[spot], rng.choice(lines), rng.choice(HOSTILE_TEXT)]))
    elif kind == 5:
        lines[spot] = (
            " " * rng.randrange(6) + lines[spot].lstrip() if rng.random() < 0.7 else "\t" + lines[spot]
        )
    elif kind == 6:
        lines[spot] = f"{key}: &a {value}\nextra: *a"
    elif kind == 7 and rng.random() < 0.2:  # each level ten times the one before
        bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
        lines[spot:spot] = bomb
    elif kind == 8:
        lines = lines[:spot]
    else:
        encoded = bytearray("\n".join(lines).encode())
        for _ in range(rng.choice([1, 1, 5])):
            encoded[rng.randrange(len(encoded))] = rng.randrange(256)
        return bytes(encoded)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def dump(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


# ------------------------------------------------------------------------------------------------- checkpoints


class _Code:
    """Pickles into a call that leaves the marker."""

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {MARKER}",)

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # copy asks __reduce__ too: making mutants must not run what the tests look for


def _odd_tensor(value: torch.Tensor, rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if kind == 0:
        return torch.full_like(value, math.nan) if value.is_floating_point() else value.bool()
    if kind == 1:
        return value.to(rng.choice([torch.float64, torch.float16, torch.int32, torch.complex64, torch.bool]))
    if kind == 2:
        return value.flatten()
    if kind == 3:
        return value[:0] if value.ndim else value.reshape(1)
    if kind == 4:
        return value.unsqueeze(0)
    if kind == 5:
        return value.tolist()
    if kind == 6:
        return value.to_sparse() if value.ndim else value
    if kind == 7:
        return torch.nn.Parameter(value.clone()) if value.is_floating_point() else value
    return torch.empty(3, 3)


def _of_numpy(value: Any, rng: random.Random) -> Any:
    """What programs keep in numpy, and what nobody should."""
    number = value if isinstance(value, int | float) and abs(value) < 2**31 else 1
    return rng.choice(
        [np.float64(number), np.int64(number), np.float16(number % 7), np.bool_(number), np.array(number),
         np.zeros((0, 2)), np.full(3, math.nan), np.random.get_state(), np.array([None, _Code()]), np.array(["a"]),
         np.dtype("f4"), np.zeros(1, "f4,i4"), np.ones(getattr(value, "shape", 2), np.float32)]
    )  # fmt: skip


def _wrapped(names: dict[Any, Any], rng: random.Random) -> None:
    """Puts the names of wrappers before some or all names of a dict."""
    chain = "".join(rng.choice(["module.", "_orig_mod."]) for _ in range(rng.choice([1, 2, 5])))
    kept = rng.choice([0, 0, 0.2])
    renamed = {key if rng.random() < kept else f"{chain}{key}": names[key] for key in names}
    if rng.random() < 0.3:
        renamed["n_averaged"] = torch.tensor(3)
    names.clear()
    names.update(renamed)


def mutate_checkpoint(content: bytes, rng: random.Random) -> bytes:
    """A damaged, wrong or hostile file in place of a checkpoint or a state."""
    kind = rng.randrange(8)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 3, 100])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return rng.choice(
            [b"", b"PK\x03\x04", b"\x80\x02.", pickle.dumps(_Code()), pickle.dumps({"params": {}}), b"<html>",
             bytes(rng.randrange(256) for _ in range(500)), content + b"tail", b"head" + content]
        )  # fmt: skip
    tree = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.choice([1, 1, 2, 4])):
        found = places(tree)
        if not found:
            break
        place = rng.choice(found)
        above, value = at(tree, place[:-1]), at(tree, place)
        if rng.random() < 0.2:
            place = place[: rng.randrange(1, len(place) + 1)]  # nearer to the root, where the format lies
            above, value = at(tree, place[:-1]), at(tree, place)
        change = rng.randrange(8)
        if isinstance(value, torch.Tensor) and change < 4:
            above[place[-1]] = _odd_tensor(value, rng)
        elif change == 0:
            del above[place[-1]]
        elif change == 1 and isinstance(above, dict):
            above[rng.choice([typo(str(place[-1]), rng), 7, None, (1, 2)])] = above.pop(place[-1])
        elif change == 2:
            above[place[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif change == 3:
            above[place[-1]] = rng.choice([[value], {"params": value}, {0: value}])
        elif change == 4:
            above[place[-1]] = copy.deepcopy(at(tree, rng.choice(found[:20])))
        elif change == 5:
            above[place[-1]] = _of_numpy(value, rng)
        elif change == 6 and isinstance(above, dict):
            _wrapped(above, rng)
        else:
            above[place[-1]] = _Code() if rng.random() < 0.5 else [torch.zeros(2), {"a": [value]}]
    file = io.BytesIO()
    torch.save(tree, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    return file.getvalue()
