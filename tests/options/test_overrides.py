"""Overrides: dots as good as colons, unless a key contains one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.options.files import load, parse_yaml
from kdsr.options.overrides import apply_overrides, overrides_of
from kdsr.runtime.errors import OptionError

KEYS = st.text("abcx_0", min_size=1, max_size=4)
PLAIN = st.recursive(
    st.integers() | st.booleans(),
    lambda below: st.dictionaries(KEYS, below, max_size=3) | st.lists(below, min_size=1, max_size=3),
)
TREES = st.dictionaries(KEYS, PLAIN, min_size=1, max_size=4)


def applied(options: dict[str, Any], *entries: str) -> Any:
    options = copy.deepcopy(options)
    try:
        apply_overrides(options, entries, parse_yaml, lambda value: value)
    except OptionError as error:
        return str(error).split(": ", 1)[1]  # after the entry itself
    return options


@settings(deadline=None, derandomize=True, max_examples=60)
@given(TREES, st.lists(KEYS | st.integers(0, 3).map(str), min_size=1, max_size=4))
def test_dots_are_colons(options: dict[str, Any], keys: list[str]) -> None:
    assert applied(options, f"{'.'.join(keys)}=7") == applied(options, f"{':'.join(keys)}=7")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(TREES, st.lists(KEYS, min_size=2, max_size=3), st.data())
def test_a_key_with_dots_that_is_there_counts(
    options: dict[str, Any], parts: list[str], data: st.DataObject
) -> None:
    """At any depth, and with keys below it."""
    dotted = ".".join(parts)
    above, below = data.draw(st.lists(KEYS, max_size=2)), data.draw(st.lists(KEYS, max_size=2))
    inside: Any = 1
    for key in reversed(below):
        inside = {key: inside}
    tree: dict[str, Any] = {**options, dotted: inside}
    for key in reversed(above):
        tree = {key: tree}
    result = applied(tree, f"{'.'.join([*above, dotted, *below])}=7")
    exact = applied(tree, f"{':'.join([*above, dotted, *below])}=7")
    if above or below:  # else there is no colon in the exact form
        assert result == exact
    node = result
    for key in (*above, dotted, *below):
        node = node[key]
    assert node == 7


def test_a_colon_keeps_dots() -> None:
    assert applied({"w": {}}, "w:body.3=2") == {"w": {"body.3": 2}}
    assert applied({"w": {}}, "w.body.3=2") == {"w": {"body": {"3": 2}}}


@pytest.mark.parametrize("entry", ["a..b=1", ".a=1", "a.=1", "=1"])
def test_an_empty_key(entry: str) -> None:
    assert "expected key:key=value" in applied({"a": {}}, entry)


def test_dots_reach_references_and_values_keep_theirs(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(yaml.safe_dump({"t": {"type": "EDSR"}, "g": "${t}", "path": {}}))
    assert load(file, ["g.num_feat=8", "path.init=runs/a.b:c/x.pth"]) == {
        "t": {"type": "EDSR"},
        "g": {"type": "EDSR", "num_feat": 8},
        "path": {"init": "runs/a.b:c/x.pth"},
    }


def test_which_overrides_set_an_option() -> None:
    entries = ["path.a=1", "path:a=2", "path={a: 3}", "paths.a=4", "path.a.b=5", "a=6"]
    assert overrides_of(entries, "path", "a") == entries[:3]
