"""Counts which transitions of the table the examples of a state machine take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from composite_logstore.delivery.states import TRANSITIONS, Outcome, State


class Watched(dict[tuple[State, Outcome], State]):
    """The table of transitions, with a count of each transition taken."""

    def __init__(self) -> None:
        super().__init__(TRANSITIONS)
        self.taken: Counter[tuple[State, Outcome]] = Counter()

    def __getitem__(self, key: tuple[State, Outcome]) -> State:
        self.taken[key] += 1
        return super().__getitem__(key)

    def report(self, record_property: Callable[[str, object], None]) -> None:
        """Have the test run list the counts at its end."""
        lines = [
            f"  {count:8,}  {state.value}, {outcome.name} → {TRANSITIONS[state, outcome].value}"
            for (state, outcome), count in sorted(self.taken.items(), key=str)
        ]
        record_property("said at the end", "\n".join(["transitions taken, and how often:", *lines]))
