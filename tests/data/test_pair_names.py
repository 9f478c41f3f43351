"""Messages about missing LQ images: correct for any names, and the advice works."""

from __future__ import annotations

import re
from os.path import splitext
from pathlib import Path
from typing import Any
from unicodedata import normalize

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kdsr.data.checks import check_dataset
from kdsr.data.pair_names import why_missing

LETTERS = "ab0x_{}'-é한ü"
STEMS = st.text(LETTERS, min_size=1, max_size=6).map(lambda text: normalize("NFC", text))
PIECES = st.text("xLR_4{}'ü", max_size=4).map(lambda text: normalize("NFC", text))
SETS = st.lists(STEMS, min_size=1, max_size=8, unique_by=str.casefold)


def partners(names: list[str], template: str) -> dict[str, str]:
    return {name: template.format(splitext(name)[0]) + splitext(name)[1] for name in names}


def advised(hint: str) -> str | None:
    found = re.search(r"set filename_tmpl: '((?:[^']|'')*)'", hint)
    return found[1].replace("''", "'") if found else None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SETS, PIECES, PIECES, st.sampled_from([".png", ".JPG"]))
def test_the_template_that_is_advised_pairs_all(
    stems: list[str], before: str, after: str, ending: str
) -> None:
    names = [f"{stem}{ending}" for stem in stems]
    there = [f"{before}{stem}{after}{ending}" for stem in stems]
    wanted = partners(names, "{}")
    assume(set(wanted.values()) - set(there))
    template = advised(why_missing(wanted, there, "{}"))
    if template is None:  # another one would not be better than names that differ in case
        assert {name.casefold() for name in wanted.values()} == {name.casefold() for name in there}
    else:
        assert set(partners(names, template).values()) == set(there)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SETS, st.sampled_from([".jpg", ".PNG", ".bmp"]), st.sampled_from(["{}", "{}x4", "lr_{}"]), st.data())
def test_another_ending(stems: list[str], ending: str, template: str, data: st.DataObject) -> None:
    others = data.draw(st.sets(st.sampled_from(stems), min_size=1))
    names = [f"{stem}.png" for stem in stems]
    there = [template.format(stem) + (ending if stem in others else ".png") for stem in stems]
    hint = why_missing(partners(names, template), there, template)
    assert "they exist under other names" in hint
    assert f"the ending is {ending} in place of .png" in hint
    assert "Unicode" not in hint and "filename_tmpl" not in hint and "case" not in hint


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SETS, st.sampled_from(["NFC", "NFD"]), st.sampled_from(["{}", "{}x4", None]))
def test_another_unicode_form(stems: list[str], form: Any, template: str | None) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    pairs = partners([f"{normalize(form, stem)}.png" for stem in stems], template or "{}")
    there = [normalize(other, name) for name in pairs.values()]
    assume(set(there) != set(pairs.values()))
    hint = why_missing(pairs, there, template)
    assert "they exist" in hint and "another Unicode form" in hint
    assert "ending" not in hint and "filename_tmpl" not in hint and "case" not in hint


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SETS, st.lists(st.text("pqrs", min_size=3, max_size=5), min_size=1, max_size=5))
def test_unknown_names_get_no_advice(stems: list[str], there: list[str]) -> None:
    names = [f"{stem}.png" for stem in stems]
    assert why_missing(partners(names, "{}"), [f"{name}.png" for name in there], "{}") == ""


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SETS, st.lists(STEMS | st.text("ab0x4", min_size=1), max_size=8), st.sampled_from(["{}", "{}x4"]))
def test_the_named_example_exists(stems: list[str], there: list[str], template: str) -> None:
    pairs = partners([f"{stem}.png" for stem in stems], template)
    present = [f"{name}.png" for name in there]
    hint = why_missing(pairs, present, template)
    if hint:
        example = re.match(r"; .* exist under other names \((.*)\): ", hint)
        assert example is not None and example[1] in present


def test_a_template_of_most_pairs_gives_their_number() -> None:
    hint = why_missing(partners(["a.png", "b.png", "c.png"], "{}"), ["ax4.png", "bx4.png", "z.png"], "{}")
    assert hint == "; 2 of 3 exist under other names (ax4.png): set filename_tmpl: '{}x4'"


def test_several_causes_at_once() -> None:
    there = [normalize("NFD", f"lr_{stem}x4.jpg") for stem in ("a", "ü")]
    hint = why_missing(partners(["a.png", "ü.png"], "{}"), there, "{}")
    assert advised(hint) == "lr_{}x4" and "Unicode form" in hint and "the ending is .jpg" in hint


def test_keys_of_lmdbs_get_no_template() -> None:
    hint = why_missing({"a": "a", "b": "b"}, ["ax2", "bx2"], None)
    assert "filename_tmpl" not in hint and "the keys of the two LMDBs must be equal" in hint


@pytest.mark.parametrize("template", ["{}x2", "LR_{}"])
def test_the_advice_reaches_the_user_and_works(tmp_path: Path, template: str) -> None:
    for folder, size, name in (("GT", 16, "{}"), ("LQ", 8, template)):
        (tmp_path / folder).mkdir()
        for stem in ("a", "ab"):
            assert cv2.imwrite(str(tmp_path / folder / f"{name.format(stem)}.png"), np.zeros((size, size, 3)))
    opt = {
        "type": "PairedImageDataset", "dataroot_gt": str(tmp_path / "GT"), "dataroot_lq": str(tmp_path / "LQ"),
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    (problem,) = check_dataset(opt, 2, "val")
    assert "LQ has no a.png, ab.png" in problem
    assert check_dataset(opt | {"filename_tmpl": advised(problem)}, 2, "val") == []
