from __future__ import annotations

import errno
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest

from composite_logstore.event import ExceptionInfo, LogEvent, TraceContext
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.format import EventTooLongError, UnstorableEventError
from composite_logstore.spool.private_folder import PrivateFolder
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.segments import SEGMENT_BYTES, SpoolFullError
from tests.events import WRITER, make_events, make_stream
from tests.forks import idle_fork


def roomy(size: int) -> bool:
    return True


def create(tmp_path: Path, *children: str) -> Spool:
    return Spool.create(tmp_path / "component", WRITER, children or ("a", "b"))


def die(spool: Spool) -> Path:
    """Do what a kill does to the process, and return its folder."""
    assert spool.lock is not None
    os.close(spool.lock.file)
    return spool.folder


def recover(folder: Path) -> Spool:
    spool = Spool.recover(folder)
    assert spool is not None
    return spool


def write(spool: Spool, events: list[LogEvent]) -> None:
    for event in events:
        spool.segments.append(event, roomy)


def test_a_folder_that_cannot_be_named_keeps_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = PrivateFolder.status

    def fail(folder: PrivateFolder, name: str) -> os.stat_result | None:
        if name == WRITER:
            raise OSError(errno.EIO, "the disk fails")
        return status(folder, name)

    monkeypatch.setattr(PrivateFolder, "status", fail)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="the disk fails"):
            create(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_next_process_reads_all_events(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["one", "two\n\0\x1b[1m", "ünï😀"])
    events[1] = events[1]._replace(
        exception=ExceptionInfo("ValueError", "broken", "Traceback"),
        trace=TraceContext(2**127 + 1, 2**63 + 5, 1),
        attributes={"loss": 0.5, "nested": {"a": [1, None]}},
        metadata={"zenml.event.type": "exception"},
    )
    write(spool, events)
    found = [event for event in recover(die(spool)).reader.scan() if isinstance(event, LogEvent)]
    stream = found[0].stream
    assert [event._replace(stream=events[0].stream) for event in found] == events
    assert (stream.id, stream.attributes) == (events[0].stream.id, events[0].stream.attributes)
    assert stream.artifact_store_id == events[0].stream.artifact_store_id


def test_reading_from_one_number_to_another(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abcdef")))
    assert [event.message for event in spool.reader.read(1, 4)] == ["c", "d"]


def test_the_folder_of_a_living_process_is_not_recovered(tmp_path: Path) -> None:
    spool = create(tmp_path)
    assert Spool.recover(spool.folder) is None


def test_only_one_process_recovers_a_folder(tmp_path: Path) -> None:
    folder = die(create(tmp_path))
    assert Spool.recover(folder) is not None
    assert Spool.recover(folder) is None


def test_a_segment_is_removed_once_all_children_have_acknowledged_it(tmp_path: Path) -> None:
    spool = create(tmp_path)
    stream = make_stream()
    events = make_events(["x" * 1_000_000] * 10, stream)
    write(spool, events)
    assert len(list(spool.folder.glob("*.log"))) == 3
    spool.acknowledge("a", 10)
    assert len(list(spool.folder.glob("*.log"))) == 3
    spool.acknowledge("b", 7)
    assert spool.segments.size < 3 * SEGMENT_BYTES
    assert [event.number for event in spool.reader.read(6, float("inf"))] == [7, 8, 9]


def test_positions_survive_the_process(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    spool.acknowledge("a", 2)
    found = recover(die(spool))
    assert (found.acknowledged("a"), found.acknowledged("b")) == (2, 0)
    assert found.children == ["a", "b"]


def test_a_folder_is_removed_with_its_process_once_all_events_are_acknowledged(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    for child in "ab":
        spool.acknowledge(child, 3)
    spool.close()
    assert not spool.folder.exists()


def test_a_folder_with_a_backlog_stays_and_is_cut_to_its_length(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    spool.acknowledge("a", 3)
    spool.close()
    found = recover(spool.folder)
    assert found.segments.size < 10_000
    assert [event.message for event in found.reader.read(-1, float("inf"))] == list("abc")


def test_a_full_spool_is_an_error_that_damages_nothing(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["x" * 3_000_000] * 2)
    spool.segments.append(events[0], roomy)
    with pytest.raises(SpoolFullError):
        spool.segments.append(events[1], lambda size: False)
    assert [event.number for event in spool.reader.read(-1, float("inf"))] == [0]
    spool.segments.append(events[1], roomy)
    assert [event.number for event in spool.reader.read(-1, float("inf"))] == [0, 1]


@pytest.mark.parametrize(("before", "most", "written"), [(inf, inf, 5), (inf, 3, 3), (4, inf, 3), (inf, 0, 0)], ids=str)
def test_of_a_queue_those_events_are_written_that_need_no_more_than_a_line(
    tmp_path: Path, before: float, most: float, written: int
) -> None:
    spool = create(tmp_path)
    events = make_events(list("abcdef"), levels=(20, 40))
    queue = deque([*events, *make_events("g", first=6)])
    assert spool.segments.write_from(queue, inf, inf) == 0
    write(spool, [queue.popleft()])
    assert spool.segments.write_from(queue, before, most) == written
    # The last event's stream has no line in this segment yet.
    assert [event.number for event in queue] == [*range(written + 1, 7)]
    assert [event.number for event in spool.reader.read(-1, inf)] == [*range(written + 1)]
    assert spool.segments.last == written
    levels = Counter(event.level for event in events[: written + 1])
    assert {level: count for (level, _), count in spool.segments.all[0].kinds.items()} == levels


def test_of_a_queue_those_events_are_written_that_the_segment_has_room_for(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["x" * (SEGMENT_BYTES // 3)] * 4)
    write(spool, events[:1])
    queue = deque(events[1:])
    assert spool.segments.write_from(queue, inf, inf) == 1
    assert [event.number for event in queue] == [2, 3]


def test_what_no_line_can_express_is_told_after_the_events_before_it_are_written(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(list("abcd"))
    write(spool, events[:1])
    queue = deque([events[1], events[2]._replace(time_unix_nano=1 << 70), events[3]])
    with pytest.raises(UnstorableEventError):
        spool.segments.write_from(queue, inf, inf)
    assert [event.number for event in queue] == [2, 3]
    assert [event.number for event in spool.reader.read(-1, inf)] == [0, 1]
    assert spool.segments.all[0].kinds.total() == 2


def test_attributes_that_are_added_later_are_written_too(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["a"])
    write(spool, events)
    events[0].stream.metadata["zenml.step.name"] = "train"
    spool.segments.refresh(roomy)
    (found,) = list(recover(die(spool)).reader.scan())
    assert isinstance(found, LogEvent)
    assert found.stream.attributes["zenml.step.name"] == "train"


def test_only_its_user_can_read_a_spool(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["secret"]))
    assert spool.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in spool.folder.iterdir()} == {0o600}


def torn(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the bytes of the only segment in the folder."""
    (segment,) = folder.glob("*.log")
    segment.write_bytes(change(segment.read_bytes()))
    return segment


def found_in(spool: Spool) -> tuple[list[str], list[Damage]]:
    items = list(spool.reader.scan())
    return (
        [item.message for item in items if isinstance(item, LogEvent)],
        [item for item in items if isinstance(item, Damage)],
    )


def test_a_flipped_bit_hides_one_event(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["first", "second", "third"]))
    segment = torn(die(spool), lambda data: data.replace(b"second", b"sekond"))
    spool = recover(spool.folder)
    messages, (damage,) = found_in(spool)
    assert messages == ["first", "third"]
    assert damage.path == segment
    ((_, aside),) = spool.set_aside()
    assert b"sekond" in aside.read_bytes()
    assert aside.stat().st_mode & 0o777 == 0o600
    assert found_in(recover(die(spool))) == (["first", "third"], [])


def test_a_damaged_stream_line_hides_no_event(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["first", "second"])
    write(spool, events)
    torn(die(spool), lambda data: data.replace(b'"stream"', b'"strEam"'))
    items = list(recover(spool.folder).reader.scan())
    found = [item for item in items if isinstance(item, LogEvent)]
    assert [(event.message, event.stream.id) for event in found] == [
        ("first", events[0].stream.id),
        ("second", events[0].stream.id),
    ]
    # Backends find the events of a stream by this attribute.
    assert [event.stream.attributes["zenml.log.id"] for event in found] == 2 * [str(events[0].stream.id)]


def test_zeros_in_the_middle_hide_one_event(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["first", "second", "third"]))

    def zeroed(data: bytes) -> bytes:
        (second,) = [line for line in data.split(b"\n") if b"second" in line]
        return data.replace(second + b"\n", bytes(len(second) + 1))

    torn(die(spool), zeroed)
    messages, damage = found_in(recover(spool.folder))
    assert messages == ["first", "third"]
    assert len(damage) == 1


def test_a_file_of_zeros_has_no_event(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["first"]))
    torn(die(spool), lambda data: bytes(len(data)))
    assert found_in(recover(spool.folder)) == ([], [])


def test_a_segment_of_another_version_is_set_aside_as_a_whole(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["first"]))
    payload = b'{"format":99}'
    segment = torn(die(spool), lambda data: b"%08x %b\n" % (zlib.crc32(payload), payload) + b"\1\2\3" * 100)
    data = segment.read_bytes()
    spool = recover(spool.folder)
    messages, damage = found_in(spool)
    assert (messages, [item.length for item in damage]) == ([], [None])
    ((_, aside),) = spool.set_aside()
    assert aside.read_bytes() == data
    assert not segment.exists()


def test_a_damaged_position_counts_as_0(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    spool.acknowledge("a", 2)
    spool.acknowledge("b", 2)
    folder = die(spool)
    (folder / "a.settled").write_bytes(b"\0" * 30)
    (folder / "b.settled").write_text("00000000000000000009 00000000\n")
    found = recover(folder)
    assert (found.acknowledged("a"), found.acknowledged("b")) == (0, 0)
    found.acknowledge("a", 3)
    assert (recover(die(found)).acknowledged("a")) == 3


def test_unknown_files_are_set_aside(tmp_path: Path) -> None:
    folder = die(create(tmp_path))
    (folder / "notes.txt").write_text("mine")
    spool = recover(folder)
    ((damage, aside),) = spool.set_aside()
    assert damage.path.name == "notes.txt"
    assert aside.read_text() == "mine"


def test_a_segment_that_cannot_be_opened_hides_no_other(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events([f"{number}" + "x" * 1_500_000 for number in range(6)]))
    first, *_ = sorted(die(spool).glob("*.log"))
    first.unlink()
    first.mkdir()
    messages, damage = found_in(recover(spool.folder))
    assert [message[0] for message in messages] == list("2345")
    assert [item.length for item in damage] == [None]


def test_a_reader_continues_where_it_ended(tmp_path: Path) -> None:
    spool = create(tmp_path)
    forward = ForwardReader(spool.reader)
    stream = make_stream()
    events = make_events(["x" * 1_000_000] * 12, stream)
    found = []
    for event in events:
        spool.segments.append(event, roomy)
        found += [read.number for read in forward.read(len(found) - 1, event.number)]
    found += [read.number for read in forward.read(len(found) - 1, float("inf"))]
    assert found == list(range(12))


def test_an_event_that_no_line_can_hold_is_refused(tmp_path: Path) -> None:
    spool = create(tmp_path)
    huge, small = make_events(["\0" * 12_000_000, "small"])
    with pytest.raises(EventTooLongError):
        spool.segments.append(huge, roomy)
    spool.segments.append(small, roomy)
    assert [event.message for event in spool.reader.read(-1, float("inf"))] == ["small"]


def test_only_the_folders_of_processes_are_found_oldest_first(tmp_path: Path) -> None:
    for place, name in enumerate(["b" * 15, "a" * 15, "damaged", "notes", ".hidden-" + "c" * 15]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner.lock").touch()
        os.utime(tmp_path / name / "owner.lock", (place, place))
    (tmp_path / ("d" * 15)).write_text("a file")
    assert [folder.name[0] for folder in process_folders(tmp_path)] == ["b", "a"]
    # A folder whose process died while it made the folder is removed.
    assert not list(tmp_path.glob(".hidden-*"))


@pytest.mark.process
def test_a_forked_process_does_not_keep_its_parent_s_lock(tmp_path: Path) -> None:
    spool = create(tmp_path)
    with idle_fork():
        folder = die(spool)
        assert Spool.recover(folder) is not None
