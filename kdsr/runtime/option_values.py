"""Valid values of an option: type, choices and bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kdsr.runtime.suggestions import nearest

NONE = type(None)


@dataclass(frozen=True)
class Allowed:
    """Types and valid values of an option.

    Attributes:
        kinds: Types, as in ``(int, NONE)``.
        choices: Valid strings; empty for any.
        one_name: The string becomes part of a file's or folder's name: neither empty nor a path.
        lowest: Smallest number.
        highest: Largest number.
        above: Lower bound, exclusive.
        below: Upper bound, exclusive.
    """

    kinds: tuple[type, ...]
    choices: tuple[str, ...] = ()
    one_name: bool = False
    lowest: float = -math.inf
    highest: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def problem(self, value: Any) -> str | None:
        """Why a value is invalid, for the end of a message; None if it is valid or of another type."""
        if isinstance(value, str) and self.choices:
            return None if value in self.choices else self._other_word(value)
        if self.one_name and isinstance(value, str) and ("/" in value or value in ("", ".", "..")):
            return f"{value!r} becomes part of the name of a file or folder, and must not be empty or a path"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if value == math.inf:
            return f"{value} is not finite"
        if value < self.lowest or value == -math.inf:
            return f"{value} is below {self.lowest:,}"
        if value > self.highest:
            return f"{value} is above {self.highest:,}"
        if value <= self.above and value > -math.inf:
            return f"{value} is not above {self.above:,}"
        if value >= self.below:
            return f"{value} is not below {self.below:,}"
        return None

    def _other_word(self, value: str) -> str:
        words = [*self.choices, *(["null"] if NONE in self.kinds else [])]
        meant = nearest(value, self.choices)
        advice = f"; {meant}" if meant.startswith("did you mean") else ""
        none_of = f"neither {' nor '.join(words)}" if len(words) > 1 else f"not {words[0]}"
        return f"{value!r} is {none_of}{advice}"


def count(lowest: int = 1, highest: float = math.inf, *, null: bool = False) -> Allowed:
    """An integer between inclusive bounds."""
    return Allowed((int, NONE) if null else (int,), lowest=lowest, highest=highest)


def number(
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Allowed:
    """A finite number; ``lowest`` and ``highest`` are inclusive bounds, ``above`` and ``below`` exclusive ones."""
    return Allowed((int, float), lowest=lowest, highest=highest, above=above, below=below)


def word(*choices: str, null: bool = False) -> Allowed:
    """One of some strings."""
    return Allowed((str, NONE) if null else (str,), choices=choices)
