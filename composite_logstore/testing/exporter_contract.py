"""The contract of an exporter and of its child's settings, as tests."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from composite_logstore.backend import RetryableError, UnavailableError
from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import backends
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore.testing.contract import (
    Backend,
    Contract,
    ExporterThread,
    Fault,
    assert_error,
    assert_quiet,
)
from composite_logstore.testing.events import make_event, make_events, make_stream

OTHER_WRITER = "edcba9876543210"

_STACK = 'Traceback (most recent call last):\n  File "/code/train.py", line 42, in fit\nValueError: out of range\n'
_MEGABYTES = 5_000_000

ODD: Mapping[str, Mapping[str, Any]] = {
    "no message": {"message": ""},
    "line breaks": {"message": "one\ntwo\r\nthree\rfour\u2028five\x85six\n"},
    "blanks around": {"message": "  \tin the middle\t  "},
    "NUL": {"message": "\x00 before and after \x00"},
    "ANSI colours": {"message": "\x1b[31mred\x1b[0m"},
    "JSON": {"message": '{"message": "\\u0000", "level": [1'},
    "beyond ASCII": {"message": "ünïcödé 漢字 😀 \ufffe \U0010ffff"},
    "long message": {"message": "long " * 40_000},
    "progress": {"message": " 10%|#   |\r 20%|##  |", "progress": True, "logger_name": "stderr"},
    "nothing but a message": {"logger_name": "", "file": "", "line": 0, "function": ""},
    "exception": {"exception": ExceptionInfo("ValueError", "out of range", _STACK)},
    "exception without words": {"exception": ExceptionInfo("KeyboardInterrupt", "", "")},
    "span": {"trace": TraceContext(2**127 + 1, 2**63 + 1, 1)},
    "level without a name": {"level": 5, "level_name": "Level 5"},
    "level of its own": {"level": 25, "level_name": "NOTICE"},
    "level beyond all": {"level": 1_000, "level_name": "Level 1000"},
    "nested attributes": {"attributes": {"a": {"b": [1, None, {"c": [[], {}]}]}, "a.b": 1, "a.b.c": "x"}},
    "odd names": {"attributes": {"": 1, " ": 2, "ünï": 3, "\x00": 4, "x" * 1_000: 5}},
    "odd numbers": {"attributes": {"a": 2**63 - 1, "b": -(2**63), "c": float("nan"), "d": float("-inf"), "e": True}},
    "reserved names": {
        "attributes": dict.fromkeys(("id", "message", "level", "timestamp", "status", "service", "host"), "mine"),
        "metadata": {"zenml.log.source": "mine"},
    },
    "own names": {"attributes": dict.fromkeys(("log.record.uid", "zenml.log.writer", "zenml.log.sequence"), "mine")},
}
"""Fields of events that are allowed, but rare."""

HUGE: Mapping[str, Mapping[str, Any]] = {
    "message": {"message": "x" * _MEGABYTES},
    "message beyond ASCII": {"message": "😀" * (_MEGABYTES // 4)},
    "message of escapes": {"message": "\x1b" * _MEGABYTES},
    "stack trace": {"exception": ExceptionInfo("ValueError", "x" * 100, "x\n" * (_MEGABYTES // 2))},
    "attribute": {"attributes": {"a": "x" * _MEGABYTES}},
    "attributes": {"attributes": {f"name {number}": "x" * 80 for number in range(_MEGABYTES // 100)}},
}
"""Fields of events of five megabytes."""


@lru_cache
def _import(module: str, other: str) -> subprocess.CompletedProcess[str]:
    """Import a module in a new process, which fails if that imports the other one. ZenML takes seconds to import."""
    script = f"import {module}, sys; sys.exit({other!r} in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


class ExporterContract(Contract):
    """Inherit it in a test class, and define the fixture `child`."""

    # Events

    def test_every_event_arrives_once_and_in_order(self, exporter: ExporterThread, received: Backend) -> None:
        """Each has its identity, message, level and time."""
        events = make_events([f"message {number}" for number in range(50)], levels=(10, 20, 30, 40, 50))
        exporter.deliver(events[:20])
        exporter.deliver(events[20:21])
        exporter.deliver(events[21:])

        self.assert_received(received, events)

    def test_events_of_the_same_moment_stay_in_order(self, exporter: ExporterThread, received: Backend) -> None:
        """Their time cannot decide the order."""
        events = make_events([f"message {number}" for number in range(50)], step_nanos=0)
        exporter.deliver(events[:30])
        exporter.deliver(events[30:])

        self.assert_received(received, events)

    def test_the_streams_of_a_batch_are_kept_apart(self, exporter: ExporterThread, received: Backend) -> None:
        """A process may write several streams at once, with one journal."""
        streams = [make_stream() for _ in range(3)]
        events = [
            make_events(["hello"], streams[number % 3], number)[0]._replace(sequence=number // 3)
            for number in range(30)
        ]
        exporter.deliver(events)

        self.assert_received(received, events)

    def test_the_writers_of_a_stream_do_not_hide_each_other(self, exporter: ExporterThread, received: Backend) -> None:
        """Several processes may write to one stream, and each counts from 0."""
        stream = make_stream()
        ours = make_events(["ours"] * 10, stream)
        theirs = make_events(["theirs"] * 10, stream, writer=OTHER_WRITER)
        exporter.deliver(ours[:5])
        exporter.deliver(theirs)
        exporter.deliver(ours[5:])

        self.assert_received(received, [*ours, *theirs])

    @pytest.mark.parametrize("what", ODD)
    def test_an_odd_event_arrives_as_it_is(self, exporter: ExporterThread, received: Backend, what: str) -> None:
        """The events before and after it arrive, too."""
        before, odd, after = make_events(["before", "odd", "after"])
        events = [before, odd._replace(**ODD[what]), after]
        exporter.deliver(events)

        self.assert_received(received, events)

    @pytest.mark.parametrize("where", HUGE)
    def test_an_event_of_five_megabytes_arrives(self, exporter: ExporterThread, received: Backend, where: str) -> None:
        """It arrives as a whole, or shortened, with a mark, and counted. It does not block later events."""
        before, huge, after = make_events(["before", "huge", "after"])
        huge = huge._replace(**HUGE[where])
        shortened = exporter.deliver([before]) + exporter.deliver([huge]) + exporter.deliver([after])

        found = {event.uid: event for event in self.wait_for(received, [before, huge, after])}
        assert list(found) == [before.uid, huge.uid, after.uid]
        arrived = found[huge.uid]
        is_whole = arrived.message in (huge.message, huge.text)
        assert shortened in (0, 1)
        if not is_whole:
            assert shortened == 1, "export() returns how many events it has shortened"
            assert "shortened" in arrived.message, "a shortened message has no mark; use composite_logstore.shorten"
            assert arrived.message[:100] in (huge.message[:100], huge.text[:100])

    # Batches

    def test_a_full_batch_is_taken(self, child: ChildConfig, exporter: ExporterThread, received: Backend) -> None:
        """The settings' batch size is not too large for ordinary events."""
        events = make_events([f"message {number}" for number in range(child.batch_size)])
        exporter.export(events)

        self.assert_received(received, events)

    def test_a_large_batch_is_taken_or_called_too_large(self, exporter: ExporterThread, received: Backend) -> None:
        """After `TooLargeError` it is split until its parts are small enough."""
        events = make_events([f"{number} " + "€" * 100_000 for number in range(40)])
        exporter.deliver(events)

        self.assert_received(received, events)

    def test_the_batch_is_left_as_it_is(self, exporter: ExporterThread) -> None:
        """The exporter does not change it: all children share the events, and a failed batch is exported again."""
        events = [
            *make_events(["message"] * 3, attributes={"a": {"b": [1]}}, metadata={"c": "d"}),
            *make_events(["message"] * 2, first=3),
        ]
        batch = list(events)
        contents = copy.deepcopy([(event[1:], dict(event.stream.metadata)) for event in events])
        exporter.export(batch)

        assert len(batch) == len(events)
        assert all(event is original for event, original in zip(batch, events, strict=True))
        assert [(event[1:], dict(event.stream.metadata)) for event in batch] == contents

    def test_what_is_exported_again_keeps_its_identity(self, exporter: ExporterThread, received: Backend) -> None:
        """After a lost answer or a crash, events are exported again, in other batches."""
        events = make_events([f"message {number}" for number in range(30)])
        exporter.deliver(events[:20])
        exporter.deliver(events[10:20])
        exporter.close()
        exporter.deliver(events[5:])

        self.assert_received(received, events, copies=True)

    # Life

    def test_another_exporter_goes_on_where_one_ended(self, exporter: ExporterThread, received: Backend) -> None:
        """A stream may continue in another process."""
        events = make_events([f"message {number}" for number in range(6)])
        for event in events:
            exporter.deliver([event])
            exporter.close()

        self.assert_received(received, events)

    def test_the_end_of_a_stream_is_harmless(self, exporter: ExporterThread, received: Backend) -> None:
        """The stream may be unknown, may have ended before, and may still get events afterwards."""
        events = make_events(["a", "b", "c"])
        exporter.end_stream(make_stream())
        for event in events:
            exporter.deliver([event])
            exporter.end_stream(event.stream)
            exporter.end_stream(event.stream)

        self.assert_received(received, events)

    def test_closing_is_harmless(self, exporter: ExporterThread) -> None:
        """The exporter may be closed before its first export, and more than once."""
        exporter.create()
        exporter.close(times=2)
        exporter.export([make_event()])
        exporter.close(times=2)

    def test_it_says_nothing(self, exporter: ExporterThread, caplog: pytest.LogCaptureFixture) -> None:
        """The exporter raises errors and logs nothing: its records would appear in the pipeline's logs."""
        caplog.set_level("DEBUG")
        event = make_event()
        exporter.export([event])
        exporter.end_stream(event.stream)
        exporter.close()

        assert_quiet(caplog)

    def test_no_thread_keeps_the_process_from_ending(
        self, exporter: ExporterThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process must end even if the backend hangs, so remaining threads are daemons."""
        started: list[threading.Thread] = []
        start = threading.Thread.start

        def noted(thread: threading.Thread) -> None:
            if threading.current_thread() in (exporter.thread, *started):
                started.append(thread)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", noted)
        exporter.export([make_event()])

        assert [thread.name for thread in started if thread.is_alive() and not thread.daemon] == []

    # Faults

    def test_a_fault_is_reported_and_outlived(
        self, child: ChildConfig, received: Backend, faults: Mapping[str, Fault], caplog: pytest.LogCaptureFixture
    ) -> None:
        """It raises the right error in time, without secrets, and the same exporter works again after the fault."""
        concerned = {name: fault for name, fault in faults.items() if fault.export is not None}
        if not concerned:
            pytest.skip("declare the backend's faults in a fixture 'faults'")
        for name, fault in concerned.items():
            self._outlive(name, fault, child, received)
        assert_quiet(caplog)

    def _outlive(self, name: str, fault: Fault, child: ChildConfig, received: Backend) -> None:
        assert fault.export is not None
        # Each fault meets another writer, since a writer's numbers are those of its journal, whatever the stream.
        events = make_events([f"message {number}" for number in range(8)], writer=uuid4().hex[:15])
        # The first exporter has worked before the fault, the other has not.
        exporter, other = (ExporterThread(child, self.margin_seconds) for _ in range(2))
        exporter.deliver(events[:2])
        with fault.begin():
            assert_error(exporter.failure(events[2:5]), fault.export, child, name)
            assert_error(other.failure([make_event()]), fault.export, child, name)
            assert_error(exporter.failure(events[2:5]), fault.export, child, name)
        self.recovered(lambda: exporter.deliver(events[2:5]), RetryableError, UnavailableError)
        exporter.deliver(events[5:])
        self.assert_received(received, events, copies=True)
        exporter.close()
        other.close()

    # Settings

    def test_settings_name_their_backend(self, child: ChildConfig) -> None:
        """The type of a child is the name of its backend's entry point."""
        names = [name for name, backend in backends().items() if isinstance(child, backend.load())]
        if not names:
            pytest.skip(f"no backend with {type(child).__name__} is installed")
        assert child.type in names

    def test_settings_cannot_be_changed(self, child: ChildConfig) -> None:
        """Threads share them, so they are frozen."""
        with pytest.raises(ValidationError, match="frozen"):
            child.name = "other"  # type: ignore[misc]

    def test_settings_survive_being_stored(self, child: ChildConfig) -> None:
        """ZenML stores them as JSON, without settings that were not set."""
        stored = json.loads(json.dumps(child.model_dump(mode="json", exclude_unset=True)))

        assert type(child)(**stored) == child
        assert type(child)(**stored).model_dump(mode="json", exclude_unset=True) == stored

    def test_settings_have_sizes_that_fit(self, child: ChildConfig) -> None:
        """The default batch size is within the backend's own limit."""
        assert 0 < child.default_batch_size <= child.max_batch_size
        assert 0 < child.batch_size <= child.max_batch_size
        assert child.max_batch_bytes > 0

    def test_settings_refuse_what_they_do_not_know(self, child: ChildConfig) -> None:
        """A misspelt setting must raise an error."""
        settings: dict[str, Any] = {**child.model_dump(exclude_unset=True), "no_such_setting": 1}
        with pytest.raises(ValidationError, match="no_such_setting"):
            type(child)(**settings)

    def test_settings_are_light(self, child: ChildConfig) -> None:
        """Importing them does not import the exporter, which ZenML's server and its command line never use."""
        exporter = child.create_exporter()
        exporter.close()
        ours, other = type(child).__module__, type(exporter).__module__
        if ours == other:
            pytest.skip("the settings and the exporter are in the same module")
        process = _import(ours, other)

        assert process.returncode == 0, f"importing {ours} imports {other}\n{process.stderr}"

    def test_there_is_a_reader_or_a_reason(self, child: ChildConfig) -> None:
        """A child without a reader says why, and cannot be the primary."""
        if child.unreadable is None:
            reader = child.create_reader()
            assert type(reader.max_page_size) is int
            assert reader.max_page_size > 0
            assert type(reader.in_order) is bool
            reader.close()
            return
        assert child.unreadable.strip()
        with pytest.raises(ValidationError, match="primary"):
            CompositeLogStoreConfig(primary=child.name, children=[child])
