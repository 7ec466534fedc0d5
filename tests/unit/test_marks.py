"""The marks in the spool: that a stream gets no more events, and that the process has ended in order."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from composite_logstore.clock import Clock
from composite_logstore.delivery import writers
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.states import EndStream, Export, Load
from composite_logstore.event import Stream
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import Ended, encode_line
from composite_logstore.spool.marks import Marks
from composite_logstore.testing import SimulatedClock
from tests.events import WRITER, make_events, make_stream
from tests.simulation import Machine, folders_of_processes, make_child, make_logs

DURABILITIES = pytest.mark.parametrize("durability", ["spill", "write_ahead"])


def roomy(size: int) -> bool:
    return True


def full(size: int) -> bool:
    return False


def create(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "component", WRITER, ["a"])


def write(spool: Spool, *messages: str, stream: Stream, first: int = 0) -> None:
    for event in make_events(messages, stream, first):
        spool.segments.append(event, roomy)


def read(folder: Path) -> tuple[list[str], Marks]:
    """Return the messages and the ends of streams in the folder of a process, in order, and the marks."""
    spool = Spool.look(folder)
    said = [f"end of {item.stream.id}" if isinstance(item, Ended) else item.message  # type: ignore[union-attr]
            for item in spool.reader.scan()]  # fmt: skip
    assert not spool.reader.damage
    return said, spool.reader.marks


def ids(marks: Marks) -> list[str]:
    return [str(stream.id) for stream in marks.open]


# In the folder


def test_a_mark_follows_the_events_of_its_stream(tmp_path: Path) -> None:
    spool, one, other = create(tmp_path), make_stream(), make_stream()
    write(spool, "a", stream=one)
    write(spool, "b", stream=other, first=1)
    spool.segments.end(one, roomy)
    write(spool, "c", stream=other, first=2)
    said, marks = read(spool.folder)
    assert said == ["a", "b", f"end of {one.id}", "c"]
    assert ids(marks) == [str(other.id)]
    assert not marks.is_closed


def test_a_stream_that_is_registered_again_is_open_again(tmp_path: Path) -> None:
    spool, stream = create(tmp_path), make_stream()
    write(spool, "a", stream=stream)
    spool.segments.end(stream, roomy)
    spool.segments.open_again(stream)
    assert not read(spool.folder)[1].open
    write(spool, "b", stream=stream, first=1)
    assert ids(read(spool.folder)[1]) == [str(stream.id)]
    spool.segments.end(stream, roomy)
    said, marks = read(spool.folder)
    assert said == ["a", f"end of {stream.id}", "b", f"end of {stream.id}"]
    assert not marks.open


def test_an_event_that_follows_the_end_of_its_stream_does_not_open_it(tmp_path: Path) -> None:
    spool, stream, other = create(tmp_path), make_stream(), make_stream()
    write(spool, "a", stream=stream)
    spool.segments.end(stream, roomy)
    write(spool, "late", stream=stream, first=1)
    # So does one in another segment, which has to name the stream.
    write(spool, "x" * segments.SEGMENT_BYTES, stream=other, first=2)
    write(spool, "late", stream=stream, first=3)
    spool.acknowledge("a", 3)
    spool.segments.tidy()
    said, marks = read(spool.folder)
    assert said == [f"end of {stream.id}", "late"]
    assert ids(marks) == [str(other.id)]


def test_each_segment_names_the_open_streams_the_most_recent_ones_if_there_are_many(tmp_path: Path) -> None:
    spool, ended = create(tmp_path), make_stream()
    streams = [make_stream() for _ in range(150)]
    write(spool, "a", stream=ended)
    spool.segments.end(ended, roomy)
    for number, stream in enumerate(streams, start=1):
        write(spool, "a", stream=stream, first=number)
    write(spool, "x" * segments.SEGMENT_BYTES, stream=streams[0], first=151)
    spool.acknowledge("a", 152)
    spool.segments.tidy()
    _, marks = read(spool.folder)
    assert sorted(ids(marks)) == sorted(str(stream.id) for stream in [streams[0], *streams[-100:]])
    assert ids(marks)[-1] == str(streams[0].id)


def test_the_mark_of_an_orderly_end_stays_though_segments_before_are_removed(tmp_path: Path) -> None:
    spool, stream = create(tmp_path), make_stream()
    write(spool, "a", stream=stream)
    spool.segments.mark_closed()
    assert read(spool.folder)[1].is_closed
    write(spool, "late" + "x" * segments.SEGMENT_BYTES, stream=stream, first=1)
    spool.acknowledge("a", 1)
    spool.segments.tidy()
    assert len(list(spool.folder.glob("*.log"))) == 1
    assert read(spool.folder)[1].is_closed


@pytest.mark.parametrize("sizes", [[5_000_000], [10, 5_000_000, 5_000_000], [4_194_000], [4_194_304], [9_000_000, 10]])
def test_an_event_that_does_not_fit_behind_its_stream_s_line_is_read(tmp_path: Path, sizes: list[int]) -> None:
    spool, stream = create(tmp_path), make_stream()
    messages = ["x" * size for size in sizes]
    write(spool, *messages, "after", stream=stream)
    spool.segments.end(stream, roomy)
    said, marks = read(spool.folder)
    assert [len(text) for text in said[:-1]] == [*sizes, 5]
    assert not marks.open


def test_a_mark_without_room_is_written_later(tmp_path: Path) -> None:
    spool, stream = create(tmp_path), make_stream()
    (event,) = make_events(["x" * 4_194_000], stream)
    # Its segment has no room for anything but the mark of an orderly end.
    (_, end) = (spool.segments.append(event, roomy), spool.segments._end)
    spool.segments._in_use.memory.resize(end + 30)  # type: ignore[union-attr]
    with pytest.raises(segments.SpoolFullError):
        spool.segments.end(stream, full)
    spool.segments.mark_closed()
    assert read(spool.folder)[1].is_closed
    spool.segments.end(stream, roomy)
    said, marks = read(spool.folder)
    assert [len(text) for text in said] == [4_194_000, len(f"end of {stream.id}")]
    assert (marks.open, marks.is_closed) == ({}, True)


def test_a_folder_of_the_first_format_is_read(tmp_path: Path) -> None:
    spool, stream = create(tmp_path), make_stream()
    write(spool, "a", "b", stream=stream)
    spool.abandon()
    (segment,) = spool.folder.glob("*.log")
    header, *lines = segment.read_bytes().split(b"\n")
    value = {**orjson.loads(header[9:]), "format": 1}
    segment.write_bytes(b"\n".join([encode_line(orjson.dumps(value))[:-1], *lines]))
    said, marks = read(spool.folder)
    assert said == ["a", "b"]
    assert ids(marks) == [str(stream.id)]


# When they are written


class Process(Machine):
    """A process of a log store with a dead child, so that its events stay on disk."""

    def __init__(self, clock: SimulatedClock, disk: Path, durability: str, **settings: object) -> None:
        super().__init__(clock, disk, durability, dead={})
        self.backends["dead"].fault = "unavailable"
        self.start(**settings)

    @property
    def on_disk(self) -> tuple[list[str], Marks]:
        (folder,) = folders_of_processes(self.disk)
        said, marks = read(folder)
        return [text.partition(" ")[0] for text in said], marks


@DURABILITIES
def test_an_orderly_end_is_on_disk_behind_all_events(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    process = Process(clock, tmp_path, durability)
    process.log("a", "b")
    process.store.deregister_origin(process.origin)
    writers._close_all()
    said, marks = process.on_disk
    assert said == ["a", "b", "end"]
    assert marks.is_closed
    assert not marks.open


@DURABILITIES
def test_a_stream_that_is_open_at_an_orderly_end_has_no_end(
    tmp_path: Path, clock: SimulatedClock, durability: str
) -> None:
    process = Process(clock, tmp_path, durability)
    process.log("a")
    writers._close_all()
    said, marks = process.on_disk
    assert said == ["a"]
    assert marks.is_closed
    assert len(marks.open) == 1


@DURABILITIES
def test_a_killed_process_leaves_no_mark_of_an_orderly_end(
    tmp_path: Path, clock: SimulatedClock, durability: str
) -> None:
    process = Process(clock, tmp_path, durability)
    process.log("a")
    clock.advance(1)
    process.die()
    said, marks = process.on_disk
    assert said == ["a"]
    assert not marks.is_closed
    assert len(marks.open) == 1


@DURABILITIES
def test_events_after_the_orderly_end_do_not_undo_it(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    process = Process(clock, tmp_path, durability)
    writers._close_all()
    process.log("late")
    clock.advance(1)
    writers._close_all()
    process.log("later")
    process.die()
    said, marks = process.on_disk
    assert said == ["late", "later"]
    assert marks.is_closed


@DURABILITIES
def test_the_end_of_a_stream_is_on_disk_within_a_second_and_other_streams_go_on(
    tmp_path: Path, clock: SimulatedClock, durability: str
) -> None:
    process = Process(clock, tmp_path, durability)
    process.log("a")
    clock.advance(2)
    process.log("b")
    process.store.deregister_origin(process.origin, blocking=False)
    first = process.origin
    process.origin = process.store.register_origin("other", make_logs(process.store), {})
    process.log("c")
    clock.advance(1)
    process.die()
    said, marks = process.on_disk
    assert said == ["a", "b", "end", "c"]
    assert ids(marks) != [str(first.stream.id)]  # type: ignore[attr-defined]
    assert len(marks.open) == 1


def test_a_mark_drops_no_event_where_the_spool_is_full(tmp_path: Path, clock: SimulatedClock) -> None:
    process = Process(clock, tmp_path, "write_ahead", spool_max_bytes=16 * 1024**2)
    for _ in range(12):
        process.log("x" * 1_000_000)
    before = process.store.stats()["dead"]
    process.store.deregister_origin(process.origin, blocking=False)
    for _ in range(10_000):
        process.store.writer.end_stream(process.origin.stream)  # type: ignore[attr-defined]
    assert process.store.stats()["dead"]["dropped"] == before["dropped"]


# What they are for


def test_recovery_ends_each_stream_behind_its_events(tmp_path: Path) -> None:
    spool, one, other = create(tmp_path), make_stream(), make_stream()
    write(spool, "a", stream=one)
    spool.segments.end(one, roomy)
    write(spool, "b", "c", stream=other, first=1)
    spool.abandon()
    found = Spool.recover(spool.folder)
    assert found is not None
    journal = RecoveredJournal(found, {"a": make_child("a", max_export_batch_size=1)}, Clock())
    (delivery,) = journal.deliveries
    seen: list[str] = []
    while len(seen) < 5:
        action = delivery.next(0)
        if isinstance(action, Load):
            delivery.loaded(journal.load(delivery, action), action.expected)
        elif isinstance(action, Export):
            seen += [event.message for event in action.batch]
            delivery.exported()
        elif isinstance(action, EndStream):
            seen.append({one.id: "end of one", other.id: "end of other"}[action.stream.id])
    assert seen == ["a", "end of one", "b", "c", "end of other"]
    found.abandon()
