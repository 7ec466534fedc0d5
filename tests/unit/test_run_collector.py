"""The collector of `composite-logstore run`, and what processes send to it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from composite_logstore import plain
from composite_logstore.capture import process
from composite_logstore.launch import collector as module
from composite_logstore.launch.collector import Collector, Output
from composite_logstore.launch.sender import Sender
from tests.hostile import FIELDS, VALUES, make_record, without
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


@pytest.mark.parametrize("value", sorted(VALUES))
def test_a_record_arrives_whatever_its_attributes_are(collector: Collector, taken: Taken, value: str) -> None:
    sender = Sender(collector.address, process, plain)
    odd = [make_record(**{field: VALUES[value]()}) for field in FIELDS]
    for one in (*odd, without(*FIELDS), record()):
        sender.send(one)
    wait_until(lambda: len(taken.records) == len(odd) + 2, "all records arrive")
    assert taken.records[-1].getMessage() == "said"


def test_a_level_beyond_all_bounds_stays_the_highest(collector: Collector, taken: Taken) -> None:
    Sender(collector.address, process, plain).send(make_record(levelno=1 << 70))
    wait_until(lambda: len(taken.records) == 1, "the record arrives")
    assert taken.records[0].levelno > logging.CRITICAL


def test_texts_are_sent_up_to_their_bounds(collector: Collector, taken: Taken) -> None:
    text = "x" * (plain.MOST_BYTES + 10)
    Sender(collector.address, process, plain).send(make_record(text))
    wait_until(lambda: len(taken.records) == 1, "the record arrives")
    assert plain.MOST_BYTES - 100 < len(taken.records[0].getMessage()) <= plain.MOST_BYTES


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
    senders = [Sender(collector.address, process, plain) for _ in range(2)]
    for sender in senders:
        sender.send(record())
    wait_until(lambda: len(taken.records) == 2, "both processes are served")
    for sender in senders:
        sender._close()
    wait_until(lambda: sum(thread.is_alive() for thread in collector._threads) == 1, "both have ended")
    Sender(collector.address, process, plain).send(record())
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
        Sender(collector.address, process, plain)
        wait_until(refused.is_set, "a thread is refused")
    Sender(collector.address, process, plain).send(record())
    wait_until(lambda: len(taken.records) == 1, "the next process is served")
