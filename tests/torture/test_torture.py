"""The log store under everything at once: `make torture`."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.torture.programs import PLANTED
from tests.torture.torture import Torture

pytestmark = [pytest.mark.integration, pytest.mark.deep]

# What happens, and for how many seconds.
SEED = int(os.environ.get("TORTURE_SEED") or random.randrange(10**6))
SECONDS = float(os.environ.get("TORTURE_SECONDS") or 1_200)
# What the backends hold is in memory, so one torture takes no longer than that; then comes the next one.
ROUND_SECONDS = 300.0


def test_nothing_is_lost_or_shown_twice_whatever_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = max(1, round(SECONDS / ROUND_SECONDS))
    kills = 0
    for seed in range(SEED, SEED + rounds):
        again = f"make torture SEED={seed} SECONDS={SECONDS / rounds:.0f}"
        with capsys.disabled():
            print(f"\n{again}", flush=True)
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        torture = Torture(folder, seed, SECONDS / rounds)
        wrong = torture.run()
        with capsys.disabled():
            print(torture.figures, flush=True)
        if wrong:
            pytest.fail("\n".join([f"{len(wrong)} things are wrong, seen with {again}:", *wrong[:40]]), pytrace=False)
        kills += torture.counted["kills"]
    # In twenty minutes 200, and many more on a machine that has nothing else to do.
    assert kills >= SECONDS / 6


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(tmp_path: Path, bug: str) -> None:
    assert Torture(tmp_path, seed=1, seconds=20, bug=bug).run()
