"""One event that cannot be stored, sent or read does not hold up those behind it, and is counted."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import pytest

from composite_logstore import CompositeLogStore, LogEvent, OtelExporter, RejectedError
from composite_logstore.capture import frames
from composite_logstore.capture.forked import Parent
from composite_logstore.capture.frames import Loss, Message
from composite_logstore.capture.inbox import Inbox
from composite_logstore.capture.outbox import Outbox
from composite_logstore.delivery import writer
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import Export
from composite_logstore.spool import format
from composite_logstore.spool.segments import Segments
from composite_logstore.testing import SimulatedBackend, SimulatedClock, make_events
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.exporter import CloudwatchExporter
from composite_logstore_component import exporter as component
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.exporter import DatadogExporter
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig
from composite_logstore_elasticsearch.exporter import ElasticsearchExporter
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.exporter import OtlpExporter
from tests.artifact_stores import local_store
from tests.events import capture, make_capture, make_stream
from tests.forks import in_fork
from tests.hostile import FIELDS, VALUES, NumpyLike, assert_plain, make_record
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store, process_dies
from tests.unit.test_otel_exporter import Recording


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(writer.logger, "warning", told.append)
    return told


class Machine:
    """A machine on which one process runs after another; its backend takes nothing until it is mended."""

    def __init__(self, clock: SimulatedClock, disk: Path, durability: str, **metadata: Any) -> None:
        self.clock = clock
        self.disk = disk
        self.durability = durability
        self.metadata = metadata
        self.id = uuid4()
        self.backend = SimulatedBackend()
        self.backend.fault = "refused"
        self.start()

    def start(self) -> None:
        self.store = make_store(
            make_child("a", self.backend), id=self.id, durability=self.durability, spool_directory=str(self.disk)
        )
        logs = make_logs(self.store)
        self.origin = self.store.register_origin(str(logs.id), logs, self.metadata)

    def log(self, *messages: str, **fields: Any) -> None:
        for message in messages:
            self.store.emit(self.origin, make_record(message, **fields))

    def delivered_after_death(self) -> list[str]:
        """Kill the process, and return what the next one finds."""
        process_dies(self.clock)
        self.backend.fault = None
        self.start()
        self.log("after")
        self.clock.advance(60)
        assert_accounts_add_up(self.store.stats())
        return self.backend.messages


durable = pytest.mark.parametrize("durability", ["spill", "write_ahead"])


# On disk


@durable
@pytest.mark.parametrize("created", [1_790_000_000_000, 1.79e12, float("nan"), -1, "now", 10**30])
def test_a_record_whose_time_is_none_is_on_disk_as_those_around_it_are(
    created: Any, durability: str, tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, durability)
    machine.log(*map(str, range(20)))
    machine.log("odd", created=created)
    machine.log(*map(str, range(20, 81)))
    clock.advance(1.5)
    found = machine.delivered_after_death()
    assert sorted(found) == sorted([*map(str, range(81)), "odd", "after"])


@durable
@pytest.mark.parametrize("error", [TypeError("no"), RecursionError(), OSError("of no disk"), MemoryError()])
def test_an_event_that_cannot_be_encoded_leaves_the_way_to_disk_to_others(
    error: Exception, durability: str, tmp_path: Path, clock: SimulatedClock, told: list[str], monkeypatch: Any
) -> None:
    encode = format._as_json

    def fails(event: LogEvent, stream: str) -> bytes:
        if event.message.startswith("poison"):
            raise error
        return encode(event, stream)

    monkeypatch.setattr(format, "_as_json", fails)
    machine = Machine(clock, tmp_path, durability)
    machine.log("a", "poison", "b", "poison too", "c")
    clock.advance(2)
    warnings = [line for line in told if "cannot be written to disk" in line]
    assert len(warnings) == 1
    assert type(error).__name__ in warnings[0]
    # It waits in memory, and is delivered as the others are.
    machine.backend.fault = None
    clock.advance(60)
    assert machine.backend.messages == ["a", "poison", "b", "poison too", "c"]
    machine.backend.received.clear()
    machine.backend.fault = "refused"
    machine.log("d", "poison", "e")
    clock.advance(2)
    assert sorted(machine.delivered_after_death()) == ["after", "d", "e"]


@durable
def test_an_event_that_cannot_be_encoded_and_has_no_room_in_memory_is_counted(
    durability: str, tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = format._as_json

    def fails(event: LogEvent, stream: str) -> bytes:
        if event.message == "poison":
            raise TypeError("no")
        return encode(event, stream)

    monkeypatch.setattr(format, "_as_json", fails)
    backend = SimulatedBackend()
    backend.fault = "refused"
    store = make_store(
        make_child("a", backend, max_queue_size=5, max_export_batch_size=2),
        durability=durability,
        spool_directory=str(tmp_path),
    )
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    for number in range(40):
        store.emit(origin, make_record("poison" if number == 15 else str(number)))
    clock.advance(2)
    backend.fault = None
    clock.advance(600)
    stats = store.stats()["a"]
    assert_accounts_add_up(store.stats())
    assert backend.messages == [str(number) for number in range(40) if number != 15]
    assert (stats["delivered"], stats["dropped"], stats["pending"]) == (39, 1, 0)


@durable
def test_of_an_event_that_no_line_can_hold_the_beginning_is_on_disk(
    durability: str, tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, durability)
    machine.log("a")
    machine.log("long " + "\0" * 12_000_000, given=["x" * 2_000_000], other=1)
    machine.log("b")
    clock.advance(2)
    found = sorted(machine.delivered_after_death())
    assert [message[:5] for message in found] == ["a", "after", "b", "long "]
    assert "shortened by" in found[-1]
    (long,) = (event for event in machine.backend.received if event.message.startswith("long"))
    assert long.attributes["other"] == 1


@durable
def test_what_the_spool_raises_that_nobody_foresaw_is_not_the_event_s_fault(
    durability: str, tmp_path: Path, clock: SimulatedClock, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(clock, tmp_path, durability)
    machine.log("a")
    clock.advance(2)

    def closed(*_: Any) -> None:
        raise ValueError("mmap closed or invalid")

    with monkeypatch.context() as patched:
        for way in ("append", "write_from"):
            patched.setattr(Segments, way, closed)
        machine.log("b", "c")
        clock.advance(2)
    assert sum("mmap closed" in line for line in told) == 1
    machine.log("d")
    clock.advance(2)
    assert sum("can be used again" in line for line in told) == 1
    assert sorted(machine.delivered_after_death()) == ["a", "after", "b", "c", "d"]


@durable
def test_attributes_of_a_stream_that_cannot_be_compared_are_brought_to_disk_once(
    durability: str, tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, durability, weights=NumpyLike(1))
    machine.log("a")
    clock.advance(2)
    for value, message in ((2, "b"), (3, "c")):
        machine.origin.metadata["weights"] = NumpyLike(value)
        machine.log(message)
        clock.advance(10)
    lines = [line for path in tmp_path.rglob("*.log") for line in path.read_bytes().split(b"\n") if b"weights" in line]
    assert len(lines) == 3
    assert sorted(machine.delivered_after_death()) == ["a", "after", "b", "c"]
    (stream,) = {event.stream for event in machine.backend.received if event.message == "a"}
    assert stream.attributes["weights"] == "3"


# Through a fork


def register(store: CompositeLogStore, **metadata: Any) -> Any:
    logs = make_logs(store)
    return store.register_origin(str(logs.id), logs, metadata)


@pytest.mark.process
def test_whatever_forked_processes_log_arrives_with_what_is_ordinary() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend), flush_limit_millis=30_000)
    origin = register(store, given=VALUES["unusable"]())
    expected = 2 * len(VALUES) + 1

    def child() -> None:
        own = register(store, **{"given": VALUES["unusable"](), "more": VALUES["numpy-like"]()})
        for number, make in enumerate(VALUES.values()):
            store.emit(origin, make_record(f"ordinary {number}"))
            store.emit(own, make_record(**dict.fromkeys(FIELDS, make())), {"given": make()})
        store.emit(origin, make_record("the last"))

    in_fork(child)
    backend.wait_for(expected)
    store.flush()
    stats = store.stats()["a"]
    assert (stats["accepted"], stats["delivered"]) == (expected, expected)
    ordinary = [event.message for event in backend.received if event.stream is origin.stream]
    assert ordinary == [*(f"ordinary {number}" for number in range(len(VALUES))), "the last"]
    for event in backend.received:
        assert_plain(event)


@pytest.fixture
def pipe() -> Iterator[tuple[Inbox, Outbox]]:
    inbox = Inbox()
    yield inbox, Outbox(inbox)
    inbox.close()


class _Unloadable:
    def __reduce__(self) -> Any:
        return os.stat, ("/nowhere",)


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


def _frames(data: bytes, sender: int = 7, is_message: bool = True) -> bytes:
    number = next(_numbers)
    return frames._HEADER.pack(frames._MAGIC, is_message, len(data), crc32(data, number), sender, number) + data


_numbers = count()
STREAM = make_stream()
GOOD = Message(STREAM.id, None, None, make_capture("good"))
UNREADABLE: dict[str, Callable[[], bytes]] = {
    "no pickle": lambda: _frames(b"no pickle at all"),
    "an empty message": lambda: _frames(b""),
    "half of a pickle": lambda: _frames(frames.encode_message(GOOD)[:-40]),
    "what cannot be made here": lambda: _frames(pickle.dumps(_Unloadable())),
    "of another class": lambda: _frames(pickle.dumps(tuple(GOOD))),
    "of a class that is not there": lambda: _frames(pickle.dumps(GOOD).replace(b"composite_log", b"composite_nowh")),
    "of the wrong length": lambda: _frames(pickle.dumps((STREAM.id.bytes, None, None, ("good",)))),
    "no loss": lambda: _frames(b"no loss", is_message=False),
    "no frame": lambda: b"what somebody else has written, by mistake or in spite",
    "a frame that is too long": lambda: frames._HEADER.pack(frames._MAGIC, True, 1 << 31, 0, 7, 0) + b"x" * 100,
    "a part of a header": lambda: _frames(frames.encode_message(GOOD))[:10],
    "a part of a message": lambda: _frames(frames.encode_message(GOOD))[:-10],
    "a changed message": lambda: _frames(frames.encode_message(GOOD))[:-10] + b"x" * 10,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_frames_of_forked_processes_are_counted_and_hide_no_others(
    data: Callable[[], bytes], pipe: tuple[Inbox, Outbox]
) -> None:
    inbox, outbox = pipe
    heard: list[Message | Loss] = []
    for _ in range(3):
        outbox.send(STREAM, False, GOOD.event)
        os.write(inbox.files[0], data())
        # It may be read in the middle of anything.
        heard += inbox.receive()
        os.write(inbox.files[0], data())
        outbox.send(STREAM, False, GOOD.event)
        heard += inbox.receive()
    good = [one for one in heard if isinstance(one, Message)]
    assert [one.event for one in good] == [GOOD.event] * 6
    losses = [one for one in heard if isinstance(one, Loss)]
    assert len(losses) >= 6
    assert {(one.level, one.progress) for one in losses} == {(logging.CRITICAL, False)}


def test_messages_are_put_together_wherever_they_were_read(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, outbox = pipe
    long = make_capture("x" * 20_000)
    for one in (long, GOOD.event) * 3:
        outbox.send(STREAM, False, one)
    for step in (40, 51, 4096, 5000):
        monkeypatch.setattr("composite_logstore.capture.inbox._CHUNK_BYTES", step)
        inbox._positions = (0, 0)
        inbox.shared.acknowledge(outbox._sender, 1_000)
        heard = list(inbox.receive())
        assert [said.event for said in heard if isinstance(said, Message)] == [long, GOOD.event] * 3


def test_what_a_killed_process_has_begun_to_write_is_left_behind(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes the rest, and the file must be emptied all the same."""
    monkeypatch.setattr("composite_logstore.capture.inbox._TURN_BYTES", 1)
    monkeypatch.setattr("composite_logstore.capture.inbox._TURN_SECONDS", 0.0)
    inbox, outbox = pipe
    heard: list[Message | Loss] = []
    for _ in range(6):
        outbox.send(STREAM, False, GOOD.event)
        os.write(inbox.files[inbox.shared.current], _frames(frames.encode_message(GOOD))[:-10])
        heard += inbox.receive()
        heard += inbox.receive()
    assert [one for one in heard if isinstance(one, Message)] == [GOOD] * 6
    assert 4 <= sum(isinstance(one, Loss) for one in heard) <= 6
    assert inbox.size(0) + inbox.size(1) < 10 * len(frames.encode_message(GOOD))


def test_what_cannot_be_sent_is_counted_with_its_level(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    odd = make_capture("odd", logging.ERROR, attributes={"given": _Unpicklable()})
    outbox.send(STREAM, False, odd)
    outbox.send(STREAM, False, GOOD.event)
    assert list(inbox.receive()) == [Loss(logging.ERROR, False, 1, STREAM.id), GOOD]


def test_a_loss_is_told_in_one_piece_however_many_there_are(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    outbox._lost[STREAM, logging.INFO, False] = 5_000_000_000
    outbox._lost[STREAM, logging.ERROR, True] = 3
    outbox.send(STREAM, False, GOOD.event)
    losses = [one for one in inbox.receive() if isinstance(one, Loss)]
    assert losses == [Loss(logging.INFO, False, (1 << 32) - 1, STREAM.id), Loss(logging.ERROR, True, 3, STREAM.id)]
    assert not outbox._lost


def test_what_is_lost_on_the_way_from_a_fork_is_in_every_account() -> None:
    store = make_store(make_child("a"), make_child("b", min_level="ERROR"))
    origin = register(store)
    store.writer.before_fork()
    inbox = store.writer._forked._inbox
    assert inbox is not None
    os.write(inbox.files[0], UNREADABLE["no pickle"]())
    outbox = Outbox(inbox)
    outbox.send(origin.stream, False, capture(make_record("good")))
    os.write(inbox.files[0], UNREADABLE["of the wrong length"]())
    outbox.send(origin.stream, False, capture(make_record("good")))
    store.flush()
    stats = store.stats()
    assert_accounts_add_up(stats)
    assert (stats["a"]["delivered"], stats["a"]["dropped"]) == (2, 2)
    assert (stats["b"]["delivered"], stats["b"]["dropped"]) == (0, 2)


@pytest.mark.process
@pytest.mark.parametrize("code", [errno.EBADF, errno.EPIPE, errno.EIO])
def test_where_the_pipe_is_gone_the_forked_process_delivers_by_itself(
    code: int, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)

    class _Gone(Inbox):
        def size(self, file: int) -> int:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("composite_logstore.capture.outbox._CUT_OFF_SECONDS", 0.0)
    inbox = _Gone()
    writer = store.writer
    writer._parent = Parent(Outbox(inbox), [], writer._journal, writer._wake)
    store.emit(origin, make_record("hello"))
    clock.advance(1)
    assert backend.messages == ["hello"]
    inbox.close()


# In every backend


def odd_events() -> list[LogEvent]:
    """Events that nobody here has numbered, as another program's archive may have them: each with one odd field."""
    changes: list[dict[str, Any]] = [
        {"time_unix_nano": None, "exception": None},
        {"attributes": {"a": object()}},
        {"attributes": {"a": 1 << 70}, "message": "\ud800"},
        {"level": None},
        {"attributes": {"a": VALUES["deep"]()}},
    ]
    return [event._replace(**change) for event, change in zip(make_events(["odd"] * 5), changes, strict=True)]


EXPORTERS: dict[str, Callable[[Path], Any]] = {
    "artifact": lambda folder: ArtifactExporter(find=lambda stream: local_store(folder)),
    "cloudwatch": lambda folder: CloudwatchExporter(CloudwatchChildConfig(name="b", type="cloudwatch")),
    "datadog": lambda folder: DatadogExporter(DatadogChildConfig(name="b", type="datadog", api_key="k" * 32)),
    "elasticsearch": lambda folder: ElasticsearchExporter(
        ElasticsearchChildConfig(name="b", type="elasticsearch", url="http://127.0.0.1:1")
    ),
    "otlp": lambda folder: OtlpExporter(OtlpChildConfig(name="b", type="otlp", endpoint="http://127.0.0.1:1")),
    "otel": lambda folder: OtelExporter(Recording(), {"service.name": "train"}),
    "component": lambda folder: component.EmittingExporter(_Store()),  # type: ignore[arg-type]
}


class _Store:
    name = "theirs"

    def register_origin(self, *_: Any) -> Any:
        return type("Origin", (), {"metadata": {}})()

    def emit(self, *_: Any) -> None:
        pass

    def flush(self, blocking: bool = True) -> None:
        pass


@pytest.mark.parametrize("backend", EXPORTERS)
def test_an_event_that_a_backend_cannot_encode_is_rejected_alone(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = EXPORTERS[backend](tmp_path)
    monkeypatch.setattr(component, "describe", lambda stream, store: None)
    monkeypatch.setattr(DatadogExporter, "_send", lambda self, entries: None)
    monkeypatch.setattr(CloudwatchExporter, "_call", lambda self, *arguments: {})
    monkeypatch.setattr(ElasticsearchExporter, "_send", lambda self, operations, deadline: {})
    if backend == "otlp":
        monkeypatch.setattr(exporter._transport, "send", lambda payload, seconds: b"")
    good = make_events(list("abcd"), first=100)
    for odd in odd_events():
        queue = [*good[:2], odd._replace(number=102), *(event._replace(number=event.number + 1) for event in good[2:])]
        delivery = Delivery(make_child("b"), accepted=queue.__len__)
        delivery.queue.extend(queue)
        now, tries = 0.0, 0
        while isinstance(action := delivery.next(now), Export):
            tries += 1
            assert tries < 20, "it is tried again and again"
            try:
                exporter.export(action.batch)
            except RejectedError as error:
                delivery.failed(error, now)
            else:
                delivery.exported()
            now += 3600
        stats = delivery.stats()
        # Some have words for what others have none for.
        assert stats.delivered + stats.rejected == len(queue)
        assert stats.rejected <= 1
        assert stats.state == "healthy"
