"""However a spool's files are damaged: no error is raised, each intact event is read, and no other."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composite_logstore.clock import Clock
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.states import Load
from composite_logstore.event import ExceptionInfo, LogEvent, TraceContext
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import Ended
from tests.events import WRITER, make_events, make_stream
from tests.simulation import make_child

places = st.floats(0, 1, exclude_max=True)
cuts = st.tuples(st.just("cut"), places, st.just(b""))
flips = st.tuples(st.just("flip"), places, st.integers(0, 7).map(lambda bit: bytes([1 << bit])))
overwritten = st.tuples(st.just("overwrite"), places, st.binary(min_size=1, max_size=300) | st.just(bytes(300)))
inserted = st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=300))


def changed(data: bytes, change: tuple[str, float, bytes]) -> bytes:
    what, where, value = change
    place = int(where * len(data))
    if what == "cut":
        return data[:place]
    if what == "insert":
        return data[:place] + value + data[place:]
    if what == "flip":
        value = bytes([data[place] ^ value[0]]) if data else b""
    return data[:place] + value + data[place + len(value) :]


def intact(original: bytes, now: bytes) -> set[bytes]:
    """Return the original lines that are still intact."""
    return set(original.split(b"\n")) & {line.lstrip(b"\0") for line in now.split(b"\n")[:-1]}


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.text(max_size=200), min_size=1, max_size=12),
    changes=st.lists(cuts | flips | overwritten | inserted, min_size=1, max_size=3),
    in_position=st.booleans(),
    ends=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1), st.booleans()), max_size=6),
    is_closed=st.booleans(),
)
def test_intact_lines_are_read_and_no_others(
    messages: list[str],
    changes: list[tuple[str, float, bytes]],
    in_position: bool,
    ends: list[tuple[int, int, bool]],
    is_closed: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool.create(Path(folder), WRITER, ["a"])
        streams = [make_stream(), make_stream()]
        events = [
            make_events([message], streams[place % 2])[0]._replace(number=place, sequence=place // 2)
            for place, message in enumerate(messages)
        ]
        # What the marks say: a stream that is written is open until it ends, and again if it is opened again.
        open_streams: dict[str, bool] = {}
        ended: set[str] = set()
        for event in events:
            spool.segments.append(event, lambda size: True)
            open_streams[str(event.stream.id)] = str(event.stream.id) not in ended
            for _, which, is_again in [end for end in ends if end[0] == event.number]:
                id = str(streams[which].id)
                if is_again:
                    spool.segments.open_again(streams[which])
                    ended.discard(id)
                else:
                    spool.segments.end(streams[which], lambda size: True)
                    ended.add(id)
                    if id in open_streams:
                        open_streams[id] = False
        if is_closed:
            spool.segments.mark_closed()
        whole = Spool.look(spool.folder)
        for _ in whole.reader.scan():
            pass
        assert {str(stream.id) for stream in whole.reader.marks.open} == {
            id for id, is_open in open_streams.items() if is_open
        }
        assert whole.reader.marks.is_closed == is_closed
        spool.acknowledge("a", 1)
        spool.abandon()
        segment = next(spool.folder.glob("*.log"))
        written = segment.read_bytes()
        path = spool.folder / "a.settled" if in_position else segment
        original = path.read_bytes()
        data = original.rstrip(b"\0")
        for change in changes:
            data = changed(data, change)
        path.write_bytes(data)

        found = Spool.recover(spool.folder)
        assert found is not None
        assert found.acknowledged("a") in (0, 1)
        items = list(found.reader.scan())
        read = [item for item in items if isinstance(item, LogEvent)]
        known = {event.number: (event.message, event.stream.id, event.sequence) for event in events}
        for event in read:
            assert known[event.number] == (event.message, event.stream.id, event.sequence)
        lines = [line for line in original.split(b"\n") if line[9:10] == b"["]
        expected = intact(original, data) if not in_position else set(lines)
        assert {event.number for event in read} >= {
            number for number, line in enumerate(lines) if line in expected and b'"format"' not in line
        }
        left = [line.lstrip(b"\0") for line in (written if in_position else data).split(b"\n")[:-1]]
        marks = [line[9:] for line in left if line in set(written.split(b"\n"))]
        assert sum(isinstance(item, Ended) for item in items) == sum(mark.startswith(b'{"ended') for mark in marks)
        assert found.reader.marks.is_closed == (b'{"closed":true}' in marks)
        kept = found.set_aside()
        assert all(aside.exists() for damage, aside in kept if damage.length)
        found.abandon()

        # A piece that was set aside is not damage any more.
        again = Spool.recover(spool.folder)
        assert again is not None
        assert [item.number for item in again.reader.scan() if isinstance(item, LogEvent)] == [
            item.number for item in read
        ]
        assert not [item for item in again.reader.damage if isinstance(item, Damage) and item.why != "zeros"]
        again.abandon()


# Planted lines, with correct checksums

scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
)
odd_numbers = st.sampled_from([-1, True, False, 0.0, 2**62, 2**62 - 1, 2**63, 2**64 - 1, "1", None, [1]])
odd_texts = st.sampled_from(["", "\0", "stream", "00000000-0000-0000-0000-000000000000", WRITER, 0, None, [], {}])
nested = st.integers(2, 200_000).map(lambda depth: b"[" * depth + b"]" * depth)


def deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"a": [value]}
    return value


@st.composite
def changed_events(draw: st.DrawFn) -> Any:
    """The line of an event with arbitrary values in some fields."""
    value: list[Any] = orjson.loads(ORDINARY)
    for _ in range(draw(st.integers(0, 2))):
        field = draw(st.integers(0, len(value) - 1))
        value[field] = draw(values | odd_numbers | odd_texts | st.integers(1, 120).map(lambda depth: deep(1, depth)))
    size = draw(st.sampled_from([len(value)] * 6 + [0, 1, len(value) - 1, len(value) + 1]))
    return (value * 2)[:size]


@st.composite
def changed_streams(draw: st.DrawFn) -> Any:
    """The line of a stream, a header or a mark, with arbitrary values in some fields."""
    line = draw(
        st.sampled_from(
            [
                {"stream": str(make_stream().id), "artifact_store_id": None, "attributes": {"a": 1}},
                {"format": 1},
                {"format": 1, "positions": ["a.settled"]},
                {"format": 2, "positions": ["a.settled"]},
                {"ended": str(make_stream().id)},
                {"closed": True},
            ]
        )
    )
    keys = st.sampled_from(["stream", "artifact_store_id", "attributes", "format", "positions", "ended", "closed", "x"])
    return {**line, **draw(st.dictionaries(keys, values | odd_texts, max_size=2))}


def with_checksum(payload: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


planted_lines = (
    (values | changed_events() | changed_streams()).map(orjson.dumps) | nested | st.binary(max_size=100)
).map(lambda payload: with_checksum(payload.replace(b"\n", b" ")))

ORDINARY = b""


def _remember_an_ordinary_line() -> None:
    global ORDINARY
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool.create(Path(folder), WRITER, ["a"])
        event = make_events(["planted"], first=3)[0]._replace(
            number=2**61,
            exception=ExceptionInfo("ValueError", "broken", "Traceback"),
            trace=TraceContext(1, 2, 1),
            attributes={"loss": 0.5},
        )
        spool.segments.append(event, lambda size: True)
        spool.abandon()
        (segment,) = spool.folder.glob("*.log")
        ORDINARY = segment.read_bytes().splitlines()[-1][9:]


_remember_an_ordinary_line()


@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(1, 8),
    planted=st.lists(st.tuples(st.integers(0, 20), planted_lines), min_size=1, max_size=4),
    at=st.sampled_from(["among the lines", "a file of its own", "a file behind"]),
)
# Two lines have the same high number, and only one is an event.
@example(
    number=1,
    planted=[
        (
            0,
            with_checksum(
                f'["{stream}","{WRITER}",{1 << 61},3,1,20,"INFO","m","l","f",1,"f",null,null,{{}},{{}},false]'.encode()
            ),
        )
        for stream in ("92fd1a26-43d5-4ab0-b673-76c7a6da1c49", "")
    ],
    at="among the lines",
)
def test_planted_lines_hide_no_intact_line(number: int, planted: list[tuple[int, bytes]], at: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        component = Path(directory)
        stream = make_stream()
        folders = []
        for writer in (WRITER, "f" * 15):
            spool = Spool.create(component, writer, ["a"])
            # The numbers have gaps, so that planted lines may have numbers in between.
            events = [
                make_events([f"intact {place}"], stream, first=place, writer=writer)[0]._replace(number=100 * place)
                for place in range(number)
            ]
            for event in events:
                spool.segments.append(event, lambda size: True)
            spool.abandon()
            folders.append(spool.folder)
        (segment,) = folders[0].glob("*.log")
        lines = segment.read_bytes().splitlines(keepends=True)
        shaped = [line for _, line in planted if number_of(line) is not None]
        # A line in the form of an event, with a plausible number, cannot be told from one.
        likely = [line for line in shaped if (number_of(line) or 0) < 100 * number]
        for place, line in planted:
            if line not in shaped[1:] and line not in likely:
                if at == "among the lines":
                    lines.insert(1 + place % len(lines), line)
                else:
                    name = f"{50 if at == 'a file of its own' else 10**12:020d}.log"
                    with (folders[0] / name).open("ab") as file:
                        (folders[0] / name).chmod(0o600)
                        file.write(line)
        segment.write_bytes(b"".join(lines))

        for folder in folders:
            found = Spool.recover(folder)
            assert found is not None
            journal = RecoveredJournal(found, {"a": make_child("a")}, Clock())
            found.set_aside()
            (delivery,) = journal.deliveries
            read: list[LogEvent] = []
            while batch := journal.load(delivery, load_after(read)):
                read += batch
            intact = [event.message for event in read if event.message.startswith("intact")]
            assert intact == [f"intact {place}" for place in range(number)]
            assert delivery.stats().accepted == delivery.stats().pending + delivery.stats().dropped
            for event in read:
                assert_can_be_encoded(event)
            found.abandon()


def number_of(line: bytes) -> int | None:
    """Return the number of the event in a line, None if the line does not have the form of an event."""
    with tempfile.TemporaryDirectory() as directory:
        spool = Spool.create(Path(directory), WRITER, ["a"])
        (spool.folder / f"{0:020d}.log").write_bytes(line)
        (spool.folder / f"{0:020d}.log").chmod(0o600)
        spool.abandon()
        found = Spool.recover(spool.folder)
        assert found is not None
        numbers = [item.number for item in found.reader.scan() if isinstance(item, LogEvent)]
        found.abandon()
        return numbers[0] if numbers else None


def load_after(read: list[LogEvent]) -> Load:
    return Load(read[-1].number if read else -1, 5, 5)


def assert_can_be_encoded(event: LogEvent) -> None:
    """Do what backends do with an event."""
    assert event.uid.count("-") == 4
    assert len(event.uid) == 36
    orjson.dumps([event.details, event.text, event.severity_number, event.time_unix_nano, event.stream.attributes])
    assert event.size > 0
    if event.trace:
        event.trace.trace_id.to_bytes(16, "big")
        event.trace.span_id.to_bytes(8, "big")
