"""What a program holds does not grow, however long it logs and whatever its backends do: `make soak`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.soak.soak import Soak, growth

SECONDS = float(os.environ.get("SOAK_SECONDS") or 1_800)


@pytest.mark.deep
@pytest.mark.process
def test_memory_threads_and_descriptors_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak = Soak(tmp_path, SECONDS)
    wrong = soak.run()
    with capsys.disabled():
        print("", *soak.report, sep="\n", flush=True)
    assert wrong == []


@pytest.mark.deep
@pytest.mark.process
@pytest.mark.parametrize(
    ("leak", "said"),
    [
        ("memory of the parent", r"parent: memory grows by"),
        ("memory of workers", r"worker \d: memory grows by"),
        ("threads", r"parent: threads grow by"),
        ("descriptors", r"parent: descriptors grow by"),
        ("events", r"http: \d+ of \d+ events of \w+ \d+ are missing"),
    ],
)
def test_a_planted_leak_is_found(tmp_path: Path, leak: str, said: str) -> None:
    wrong = Soak(tmp_path, 60, leak).run()
    assert any(re.match(said, line) for line in wrong), wrong


def test_growth_is_that_of_the_line_through_values_that_go_up_and_down() -> None:
    times = [float(second) for second in range(100)]
    ups_and_downs = [(second % 10) * 5.0 for second in times]
    assert abs(growth(times, ups_and_downs)) < 5
    assert growth(times, [each + second for each, second in zip(ups_and_downs, times, strict=True)]) > 95
