"""Rejected events that are sent again, whatever the backend does and wherever the process that sends them is killed."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from composite_logstore import CompositeLogStoreConfig
from composite_logstore.operations import retry_rejected
from composite_logstore.operations.inventory import LogStore
from composite_logstore.operations.resending import Resending, Retried
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.rejected import KeptLine, RejectedFolder
from composite_logstore.testing import FAULTS, SimulatedBackend, SimulatedClock, make_events, make_stream
from tests.events import NOON
from tests.properties.machines import run
from tests.simulation import make_child

# The package has a function of this name.
INVENTORY = import_module("composite_logstore.operations.inventory")
WRITERS = ("0123456789abcde", "fedcba987654321")
STREAM = make_stream()
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"min_level": "WARNING"},
    {"drop": [{"message": "[37]$"}]},
    {"budget": {"events": 3, "per": "minute", "then": "stop"}},
)


class KilledError(BaseException):
    """The process is killed."""


class Retries(RuleBasedStateMachine):
    """One child, whose rejected events are sent again by one process after the other."""

    @initialize()
    def begin(self) -> None:
        self.clock = SimulatedClock()
        self.clock.__enter__()
        self.disk = tempfile.TemporaryDirectory(prefix="composite-logstore-tests-")
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("ZENML_CONFIG_PATH", self.disk.name)
        self.patch.setattr(INVENTORY, "registered", lambda: [self.store])
        self.backend = SimulatedBackend()
        self.id = uuid4()
        self.folder = RejectedFolder(Path(self.disk.name) / str(self.id))
        self.settle({})
        self.numbers: Counter[str] = Counter()
        # The uids of all events that were ever rejected, and of those that may arrive more than once.
        self.rejected: set[str] = set()
        self.copies_allowed: set[str] = set()

    @rule(settings=st.sampled_from(SETTINGS))
    def settle(self, settings: dict[str, Any]) -> None:
        """The component is updated."""
        child = make_child("a", self.backend, max_export_batch_size=4, retry_max_interval_millis=2_000, **settings)
        config = CompositeLogStoreConfig(primary="a", children=[child], spool_directory=self.disk.name)
        self.store = LogStore(self.id, "logs", config)

    @rule(
        writer=st.sampled_from(WRITERS),
        levels=st.lists(st.sampled_from([20, 30, 40]), min_size=1, max_size=9),
        is_certain=st.sampled_from([True, True, False]),
    )
    def reject(self, writer: str, levels: list[int], is_certain: bool) -> None:
        first = self.numbers[writer]
        self.numbers[writer] += len(levels)
        events = make_events([str(first + place) for place in range(len(levels))], STREAM, first, writer, levels=levels)
        self.folder.keep("a", [RejectedEvent(one, "too old", NOON, 1, 1 if is_certain else 9) for one in events])
        self.rejected.update(event.uid for event in events)

    @rule(fault=st.sampled_from([None, *(fault for fault in FAULTS if fault != "silent")]))
    def fail(self, fault: str | None) -> None:
        self.backend.fault = fault

    @rule(seconds=st.sampled_from([1, 60, 3_600]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def kept(self) -> list[KeptLine]:
        return list(self.folder.read("a"))

    @precondition(kept)
    @rule(uncertain=st.booleans())
    def retry(self, uncertain: bool) -> None:
        before = [line.rejected for line in self.kept() if line.rejected and (uncertain or line.rejected.is_certain)]
        meant = {one.event.uid for one in before}
        self._note_copies(meant)
        received = len(self.backend.received)
        result = retry_rejected("logs", uncertain=uncertain)
        arrived = {event.uid for event in self.backend.received[received:]}
        assert arrived <= meant
        for one in result:
            assert one.remaining == len(self.kept())
            answered = one.delivered + one.rejected.total() + one.withheld.total()
            assert answered <= len(meant)
            assert answered == len(meant) or one.obstacle
            if self.backend.fault not in ("answer lost", "rejects one"):
                assert one.delivered == len(arrived)

    @precondition(kept)
    @rule(uncertain=st.booleans(), after=st.integers(0, 3))
    def be_killed(self, uncertain: bool, after: int) -> None:
        """The process is killed when it is about to remove what the backend has answered for."""
        self._note_copies({line.rejected.event.uid for line in self.kept() if line.rejected})
        left = after
        remove = RejectedFolder.remove

        def killed(folder: RejectedFolder, lines: list[KeptLine]) -> None:
            nonlocal left
            if not left:
                raise KilledError
            left -= 1
            remove(folder, lines)

        received = len(self.backend.received)
        result: list[Retried] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RejectedFolder, "remove", killed)
            try:
                retry_rejected("logs", uncertain=uncertain, result=result)
            except KilledError:
                # Of the last export nothing is removed.
                last = self.backend.received[received:][-4:]
                self.copies_allowed.update(event.uid for event in last)

    def _note_copies(self, meant: set[str]) -> None:
        if self.backend.fault in ("answer lost", "rejects one"):
            self.copies_allowed |= meant

    @invariant()
    def no_event_is_lost_or_sent_twice_for_nothing(self) -> None:
        if not hasattr(self, "rejected"):
            return
        kept = Counter(line.rejected.event.uid for line in self.kept() if line.rejected)
        arrived = Counter(event.uid for event in self.backend.received)
        assert kept.keys() | arrived.keys() == self.rejected
        twice = {uid for uid, number in arrived.items() if number > 1}
        assert twice <= self.copies_allowed
        assert kept.keys() & arrived.keys() <= self.copies_allowed

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.patch.undo()
            self.clock.__exit__(None, None, None)
            self.disk.cleanup()


def test_a_rejected_event_is_delivered_once_or_kept_and_a_kill_makes_copies_at_most() -> None:
    run(Retries, 30, 20)


def _keep_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Resending._settle
    monkeypatch.setattr(
        Resending, "_settle", lambda self, events, processed, again: settle(self, events, processed, [])
    )


def _remove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RejectedFolder, "remove", lambda self, lines: None)


def _remove_what_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    export = Resending._export

    def forgetful(self: Resending, events: Any, batch: list[int]) -> list[list[int]]:
        again = export(self, events, batch)
        if not again:
            self._folder.remove([line for number in batch for line in events.lines[number]])
        return again

    monkeypatch.setattr(Resending, "_export", forgetful)


@pytest.mark.deep
@pytest.mark.parametrize("bug", [_keep_nothing_anew, _remove_nothing, _remove_what_is_withheld])
def test_the_machine_finds_planted_bugs(bug: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        run(Retries, 150, 20, phases=[Phase.generate], database=None, report_multiple_bugs=False)
