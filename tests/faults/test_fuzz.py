"""Option files, checkpoints and states that nobody should have written: an explained error, or a run that trains."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from faults import fuzzing

# hypothesis draws the seeds, the same in each run; what a seed stands for is in mutations.py
SEEDS = st.integers(0, 2**32)
TRY = settings(
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def bases(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[fuzzing.Base]:
    return fuzzing.make_bases(tmp_path_factory.mktemp("bases"), photos)


@pytest.fixture
def attempt(bases: list[fuzzing.Base], tmp_path: Path) -> Callable[[str, int], int | None]:
    """Tries one mutation; gives the exit code, None for a run that had to be stopped."""

    def attempt(what: str, seed: int) -> int | None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
        case = fuzzing.CASES[what](bases, folder, random.Random(seed))
        result = fuzzing.run(case)
        problem = fuzzing.judge(case, result)
        assert problem is None, f"{problem} (seed {seed}): {case.message}\n{result.text[-2000:]}"
        shutil.rmtree(case.folder)
        return result.code

    return attempt


def test_the_unchanged_options_train(bases: list[fuzzing.Base], tmp_path: Path) -> None:
    """Else the mutations below would show nothing."""
    assert len(bases) >= 7
    for base in bases:
        folder = tmp_path / base.template.stem
        folder.mkdir()
        (folder / "run.yml").write_text(fuzzing.dump(base.options))
        result = fuzzing.run(fuzzing.Case(folder, ["-opt", "run.yml"], base.template.stem))
        assert result.code == 0, result.text[-2000:]


@pytest.mark.parametrize(("what", "number"), [("options", 140), ("pieces", 60), ("files", 200)])
def test_mutations_end_in_an_explained_error_or_train(
    what: str, number: int, attempt: Callable[[str, int], int | None]
) -> None:
    codes: Counter[int | None] = Counter()

    @settings(TRY, max_examples=int(os.environ.get("KDSR_FUZZ", number)))
    @given(SEEDS)
    def try_seeds(seed: int) -> None:
        codes[attempt(what, seed)] += 1

    try_seeds()
    print(f"\n{what}: " + ", ".join(f"{count} ended with {code}" for code, count in codes.items()))
    assert codes[2] and codes[0]  # both happen
