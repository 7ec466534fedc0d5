from __future__ import annotations

import os
from pathlib import Path

import pytest

from composite_logstore.event import ExceptionInfo, LogEvent, TraceContext
from composite_logstore.spool import SEGMENT_BYTES, Spool, SpoolFullError
from tests.events import WRITER, make_events, make_stream


def roomy(size: int) -> bool:
    return True


def create(tmp_path: Path, *children: str) -> Spool:
    return Spool.create(tmp_path / "component", WRITER, children or ("a", "b"))


def die(spool: Spool) -> Path:
    """What a process leaves that was killed."""
    assert spool._lock is not None
    os.close(spool._lock)
    return spool.folder


def adopt(folder: Path) -> Spool:
    spool = Spool.adopt(folder)
    assert spool is not None
    return spool


def write(spool: Spool, events: list[LogEvent]) -> None:
    for event in events:
        spool.append(event, roomy)


def test_what_was_written_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["one", "two\n\0\x1b[1m", "ünï😀"])
    events[1] = events[1]._replace(
        exception=ExceptionInfo("ValueError", "broken", "Traceback"),
        trace=TraceContext(2**127 + 1, 2**63 + 5, 1),
        attributes={"loss": 0.5, "nested": {"a": [1, None]}},
        metadata={"zenml.event.type": "exception"},
    )
    write(spool, events)
    found = [event for event in adopt(die(spool)).scan() if isinstance(event, LogEvent)]
    stream = found[0].stream
    assert [event._replace(stream=events[0].stream) for event in found] == events
    assert (stream.id, stream.attributes) == (events[0].stream.id, events[0].stream.attributes)
    assert stream.artifact_store_id == events[0].stream.artifact_store_id


def test_it_reads_from_a_position_to_another(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abcdef")))
    assert [event.message for event in spool.read(1, 4)] == ["c", "d"]


def test_a_living_process_s_folder_is_left_alone(tmp_path: Path) -> None:
    spool = create(tmp_path)
    assert Spool.adopt(spool.folder) is None


def test_one_of_many_adopts(tmp_path: Path) -> None:
    folder = die(create(tmp_path))
    assert Spool.adopt(folder) is not None
    assert Spool.adopt(folder) is None


def test_what_all_children_have_settled_is_freed(tmp_path: Path) -> None:
    spool = create(tmp_path)
    stream = make_stream()
    events = make_events(["x" * 1_000_000] * 10, stream)
    write(spool, events)
    assert len(list(spool.folder.glob("*.log"))) == 3
    spool.settle("a", 10)
    assert len(list(spool.folder.glob("*.log"))) == 3
    spool.settle("b", 7)
    assert spool.size < 3 * SEGMENT_BYTES
    assert [event.number for event in spool.read(6, float("inf"))] == [7, 8, 9]


def test_positions_survive(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    spool.settle("a", 2)
    found = adopt(die(spool))
    assert (found.settled("a"), found.settled("b")) == (2, 0)
    assert found.children == ["a", "b"]


def test_a_folder_whose_events_are_all_settled_goes_with_its_process(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    for child in "ab":
        spool.settle(child, 3)
    spool.close()
    assert not spool.folder.exists()


def test_a_folder_with_something_left_stays_and_takes_no_more_room_than_it_needs(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(list("abc")))
    spool.settle("a", 3)
    spool.close()
    found = adopt(spool.folder)
    assert found.size < 10_000
    assert [event.message for event in found.read(-1, float("inf"))] == list("abc")


def test_no_room_is_an_error_that_harms_nothing(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["x" * 3_000_000] * 2)
    spool.append(events[0], roomy)
    with pytest.raises(SpoolFullError):
        spool.append(events[1], lambda size: False)
    assert [event.number for event in spool.read(-1, float("inf"))] == [0]
    spool.append(events[1], roomy)
    assert [event.number for event in spool.read(-1, float("inf"))] == [0, 1]


def test_attributes_that_come_later_are_there_too(tmp_path: Path) -> None:
    spool = create(tmp_path)
    events = make_events(["a"])
    write(spool, events)
    events[0].stream.metadata["zenml.step.name"] = "train"
    spool.refresh(roomy)
    (found,) = list(adopt(die(spool)).scan())
    assert isinstance(found, LogEvent)
    assert found.stream.attributes["zenml.step.name"] == "train"


def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    spool = create(tmp_path)
    write(spool, make_events(["secret"]))
    assert spool.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in spool.folder.iterdir()} == {0o600}
