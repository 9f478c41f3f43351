"""Explains unpaired GT and LQ names: ``filename_tmpl``, extension, Unicode form or case."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from unicodedata import normalize

_SAMPLES, _TRIED = 20, 5  # names from which templates are guessed; templates that are tried on all names


def why_missing(partners: Mapping[str, str], present: Iterable[str], template: str | None) -> str:
    """The end of a message about missing LQ images: the names that they have instead, and the remedy.

    Args:
        partners: GT name -> LQ name that BasicSR looks for, of every pair.
        present: The existing LQ names.
        template: ``filename_tmpl``; None for LMDBs, whose keys must be equal.

    Returns:
        Begins with ``"; "``; empty if no similar names exist.
    """
    there = set(present)
    missing = {gt: name for gt, name in partners.items() if name not in there}
    used = template or "{}"
    best = _found(missing, used, there.difference(partners.values()))
    for tried in _templates(missing, there) if len(best) < len(missing) else ():
        found = _found(partners, tried, there)
        # a template changes the partners of all images
        if len(found) > len(best) + len(partners) - len(missing):
            best, used = found, tried
    if not best:
        return ""
    remedies = _remedies(best, used, template)
    asked = len(missing) if used == (template or "{}") else len(partners)
    example = next((name for gt, name in best.items() if gt in missing), next(iter(best.values())))
    which = "they" if len(best) == asked else f"{len(best)} of {asked}"
    return f"; {which} exist under other names ({example}): {'; '.join(remedies)}"


def _split(name: str) -> tuple[str, str]:
    return os.path.splitext(os.path.basename(name))


def _loose(stem: str) -> str:
    return normalize("NFC", stem).casefold()


def _found(partners: Iterable[str], template: str, there: Iterable[str]) -> dict[str, str]:
    """GT name -> LQ name under ``template``, ignoring extension, case and Unicode form."""
    left = set(there)
    by_stem: dict[str, str] = {}
    for name in sorted(left):
        by_stem.setdefault(_loose(_split(name)[0]), name)
    found = {}
    for gt in sorted(partners):
        stem, ending = _split(gt)
        wanted = template.format(stem)
        name = f"{wanted}{ending}"
        name = name if name in left else by_stem.get(_loose(wanted), "")
        if name in left:
            found[gt] = name
            left.remove(name)
    return found


def _templates(missing: Iterable[str], there: Iterable[str]) -> list[str]:
    """Templates that match most of a few missing names."""
    around: Counter[tuple[str, str]] = Counter()
    stems = {normalize("NFC", _split(name)[0]) for name in there}
    for gt in sorted(missing)[:_SAMPLES]:
        wanted = normalize("NFC", _split(gt)[0])
        places = re.compile(f"(?={re.escape(wanted)})")
        around.update(
            {
                (stem[: place.start()], stem[place.start() + len(wanted) :])
                for stem in stems
                if wanted in stem
                for place in places.finditer(stem)
            }
        )
    braces = str.maketrans({"{": "{{", "}": "}}"})
    return [
        f"{before.translate(braces)}{{}}{after.translate(braces)}"
        for (before, after), _ in around.most_common(_TRIED)
    ]


def _remedies(found: Mapping[str, str], used: str, template: str | None) -> list[str]:
    remedies = []
    if used != (template or "{}"):
        quoted = used.replace("'", "''")
        remedies.append(
            f"set filename_tmpl: '{quoted}'"
            if template is not None
            else "the keys of the two LMDBs must be equal, create one again"
        )
    wanted = {gt: (used.format(_split(gt)[0]), _split(gt)[1]) for gt in found}
    stems = [(wanted[gt][0], _split(name)[0]) for gt, name in found.items()]
    if any(one != other and normalize("NFC", one) == normalize("NFC", other) for one, other in stems):
        remedies.append(
            "the names are in another Unicode form (archives from macOS have ü as two characters), "
            "rename one side (convmv --nfc)"
        )
    if any(normalize("NFC", one) != normalize("NFC", other) for one, other in stems):
        remedies.append("upper and lower case differ, rename one side")
    endings = {(wanted[gt][1], _split(name)[1]) for gt, name in found.items()}
    if other := sorted({there for one, there in endings if one != there}):
        remedies.append(
            f"the ending is {', '.join(other)} in place of "
            f"{', '.join(sorted({one for one, there in endings if one != there}))}, and must be the same on both "
            "sides: rename or convert"
        )
    return remedies
