"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def _close(name: str, candidates: list[str]) -> list[str]:
    """At most three candidates similar to ``name``, all nearly as similar as the best one."""
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, candidate, name).ratio() for candidate in close]
    return [candidate for candidate, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.1]


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid names, or the first 20."""
    names = sorted(set(valid))
    # ignores case: L1loss means L1Loss
    folded = {candidate.lower(): candidate for candidate in names}
    close = _close(name.lower(), list(folded))
    if close:
        close = [folded[match] for match in close]
        return f"did you mean {' or '.join(close)}?"
    if not names:
        return "nothing is valid here"
    shown = names if len(names) <= 20 else [*names[:20], "…"]
    return f"valid: {', '.join(shown)}"
