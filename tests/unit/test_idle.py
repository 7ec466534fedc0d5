"""How often the log store's threads wake up while nothing is logged: each time costs up to a millisecond of a core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composite_logstore.testing import SimulatedClock
from tests.simulation import Machine

_SECONDS = 300


class CountingClock(SimulatedClock):
    waits = 0

    def wait_until(self, ready: Any, seconds: float | None = None) -> bool:
        self.waits += 1
        return super().wait_until(ready, seconds)


@pytest.mark.parametrize("durability", ["memory", "spill", "write_ahead"])
@pytest.mark.parametrize("fault", [None, "refused", "unavailable", "throttled", "silent", "rejects all"])
@pytest.mark.parametrize("children", [1, 5])
def test_while_nothing_is_logged_threads_wake_up_a_few_times_a_second(
    tmp_path: Path, durability: str, fault: str | None, children: int
) -> None:
    with CountingClock() as clock:
        machine = Machine(clock, tmp_path, durability, **{f"child{number}": {} for number in range(children)})
        for backend in machine.backends.values():
            backend.fault = fault
        machine.start()
        machine.log(*map(str, range(1000)))
        clock.advance(120)
        before = clock.waits
        clock.advance(_SECONDS)
        assert (clock.waits - before) / _SECONDS <= 2 + children
