"""The collector of `composite-logstore run`, and what processes send to it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from composite_logstore.capture import process
from composite_logstore.launch import collector as module
from composite_logstore.launch.collector import Collector, Output
from composite_logstore.launch.sender import Sender
from tests.watching import wait_until


class Taken:
    """What a collector has taken in."""

    def __init__(self) -> None:
        self.records: list[logging.LogRecord] = []

    def __call__(self, record: logging.LogRecord, attributes: dict[str, Any]) -> None:
        self.records.append(record)


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def collector(taken: Taken) -> Iterator[Collector]:
    collector = Collector(taken, captures=False)
    yield collector
    collector.close()


def record(**extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("train", logging.INFO, "train.py", 1, "said", (), None)
    vars(made).update(extra)
    return made


def contains_itself() -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    mapping["itself"] = mapping
    return mapping


@pytest.mark.parametrize("value", [{(1, 2): 3}, {object(): 1}, [{frozenset(): {b"": 2}}], contains_itself()])
def test_a_record_arrives_whatever_its_attributes_are(collector: Collector, taken: Taken, value: Any) -> None:
    Sender(collector.address, process).send(record(odd=value))
    wait_until(lambda: len(taken.records) == 1, "the record arrives")
    assert isinstance(taken.records[0].odd, str)  # type: ignore[attr-defined]


def test_a_window_may_be_resized_when_an_output_has_been_closed(taken: Taken) -> None:
    terminal, end = os.openpty()
    try:
        output = Output(1, end, {}, taken)
        output.close()
        output.resize()
    finally:
        os.close(terminal)
        os.close(end)


def test_a_collector_that_was_full_takes_new_processes_once_others_have_ended(
    collector: Collector, taken: Taken
) -> None:
    collector._most_processes = 2
    senders = [Sender(collector.address, process) for _ in range(2)]
    for sender in senders:
        sender.send(record())
    wait_until(lambda: len(taken.records) == 2, "both processes are served")
    for sender in senders:
        sender._close()
    wait_until(lambda: sum(thread.is_alive() for thread in collector._threads) == 1, "both have ended")
    Sender(collector.address, process).send(record())
    wait_until(lambda: len(taken.records) == 3, "a third one is served")


def test_a_process_for_which_there_is_no_thread_ends_nothing(
    collector: Collector, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refused = threading.Event()

        def start(self: threading.Thread) -> None:
            refused.set()
            raise RuntimeError("can't start new thread")

        patch.setattr(module.threading.Thread, "start", start)
        Sender(collector.address, process)
        wait_until(refused.is_set, "a thread is refused")
    Sender(collector.address, process).send(record())
    wait_until(lambda: len(taken.records) == 1, "the next process is served")
