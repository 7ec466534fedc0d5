"""What backfill copies, in which order, and what it remembers."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from threading import get_ident
from typing import Any
from uuid import UUID, uuid4

import pytest
from zenml.enums import LoggingLevels
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import (
    ChildConfig,
    LogEvent,
    PageRequest,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.catalog.errors import NoAnswerError
from composite_logstore.operations.copying import copy_with
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import BackfillRunsError, open_ledger
from composite_logstore.parity.result import BackfillStoppedError, Copied
from composite_logstore.parity.scan import Source, open_source
from composite_logstore.parity.sender import GIVE_UP_SECONDS, Sender
from composite_logstore.processing.processor import StripEscapes
from composite_logstore.testing import SimulatedBackend, make_logs, make_stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.lines import summarize_events
from composite_logstore_artifact.objects import ObjectName
from composite_logstore_datadog.config import OLDEST_SECONDS
from tests.artifact_stores import FolderArchive, object_store, with_faults
from tests.events import WRITER, make_events
from tests.simulation import make_child

STORE = UUID(int=7)


def archive(name: str, root: Path, is_file: bool = True) -> FolderArchive:
    return FolderArchive(name=name, type="artifact", root=str(root / name), is_file=is_file)


class WriteOnly(ChildConfig):
    """A child that cannot be read."""

    def create_exporter(self) -> SimulatedBackend:
        return BACKENDS[self.name]


BACKENDS: dict[str, SimulatedBackend] = {}


def write(child: ChildConfig, events: Sequence[LogEvent]) -> None:
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.close()


def copy(
    source: ChildConfig,
    target: ChildConfig,
    stream: Stream,
    folder: Path,
    rate: float | None = None,
    result: Copied | None = None,
    **options: Any,
) -> Copied:
    """Do what the command does for one stream."""
    there = None if target.unreadable else open_source(target)
    since = 0.0 if target.unreadable else time.time() - 3600
    with open_ledger(folder / "ledgers", STORE, target.name, since) as ledger:
        with closing(Sender(target, ledger, rate, **options)) as sender:
            result = Backfill(open_source(source), there, sender).copy(make_logs(stream), stream, result)
        ledger.complete()
    return result


def sources(*children: ChildConfig) -> list[Source]:
    return [open_source(child) for child in children]


def everything(count: int, stream: Stream) -> list[LogEvent]:
    """Return events with all that an event may have."""
    from composite_logstore.event import ExceptionInfo, TraceContext

    events = make_events([f"event {number}\nmore" for number in range(count)], stream)
    events[1] = events[1]._replace(exception=ExceptionInfo("ValueError", "no", "Traceback\n  ValueError: no\n"))
    events[2] = events[2]._replace(trace=TraceContext(1 << 100, 1 << 60, 1), level=25, level_name="NOTICE")
    events[3] = events[3]._replace(attributes={"epoch": 3, "deep": {"a": [1, None]}}, metadata={"own": "é"})
    return events


@pytest.mark.parametrize("is_file", [True, False])
def test_an_archive_is_copied_with_all_that_its_events_have(tmp_path: Path, is_file: bool) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path, is_file)
    write(a, everything(100, stream))

    assert copy(a, b, stream, tmp_path).copied == 100
    again = copy(a, b, stream, tmp_path)

    assert (again.copied, again.there) == (0, 100)
    lines = [open_source(child).scanner.scan(make_logs(stream)) for child in (a, b)]
    one, other = ([content for chunk in chunks for content in chunk.contents] for chunks in lines)
    assert one == other


def test_a_hole_is_filled_and_every_event_is_shown_once_from_both_ends(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path)
    events = make_events([str(number) for number in range(30)], stream)
    write(a, events)
    write(b, events[:10])
    write(b, events[15:])

    assert copy(a, b, stream, tmp_path).copied == 5

    result = compare(make_logs(stream), "", sources(a, b))
    assert [child.differences for child in result.children.values()] == [0, 0]
    page = b.create_reader().read(PageRequest(make_logs(stream), "newer", None, 100, LogsEntriesFilter()))
    # By their numbers those that came late would pass for copies of what came before them.
    assert [read.entry.message for read in page.entries if read.event is None] == [str(n) for n in range(10, 15)]
    assert len({read.entry.id for read in page.entries}) == 30


def test_what_an_earlier_log_store_has_gets_an_identity_that_stays(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path)
    path = Path(prepare_logs_uri(a.store(), stream.id))
    path.parent.mkdir(parents=True)
    path.write_text("".join(LogEntry(message=f"old {n}").model_dump_json(exclude_none=True) + "\n" for n in range(20)))

    assert copy(a, b, stream, tmp_path).copied == 20
    # Not known by what is noted, but by what is there.
    assert copy(a, b, stream, tmp_path / "elsewhere").there == 20

    result = compare(make_logs(stream), "", sources(a, b))
    assert [child.missing for child in result.children.values()] == [0, 0]
    with open(path, "a") as file:
        file.write(LogEntry(message="old 20").model_dump_json(exclude_none=True) + "\n")
    assert copy(a, b, stream, tmp_path).copied == 1


def test_the_place_of_the_earlier_log_store_itself_gets_no_copies(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path).model_copy(update={"root": str(tmp_path / "a")})
    path = Path(prepare_logs_uri(a.store(), stream.id))
    path.parent.mkdir(parents=True)
    path.write_text("plain text\n" * 10)
    before = path.read_bytes()
    assert copy(a, b, stream, tmp_path).there == 10
    assert path.read_bytes() == before


def test_a_child_that_cannot_be_read_gets_nothing_twice(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    backend = BACKENDS["b"] = SimulatedBackend()
    events = make_events([str(number) for number in range(5000)], stream)
    write(a, events)
    assert copy(a, b, stream, tmp_path).copied == 5000
    assert copy(a, b, stream, tmp_path).copied == 0
    assert [event.uid for event in backend.received] == [event.uid for event in events]


def test_a_copy_that_was_interrupted_goes_on_where_it_ended(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only", max_export_batch_size=100)
    events = make_events([str(number) for number in range(1000)], stream)
    write(a, events)

    class Dying(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            if len(self.received) == 300:
                raise UnavailableError("the bucket is gone")
            return super().export(batch)

    backend = BACKENDS["b"] = Dying()
    with pytest.raises(BackfillStoppedError, match="child 'b' takes no events: the bucket is gone"):
        copy(a, b, stream, tmp_path)
    rest = BACKENDS["b"] = SimulatedBackend()
    assert copy(a, b, stream, tmp_path).copied == 700
    assert [event.sequence for event in [*backend.received, *rest.received]] == list(range(1000))


def test_what_is_refused_is_counted_and_what_is_too_large_is_split(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    write(a, make_events([str(number) for number in range(20)], stream))

    class Picky(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            if len(batch) > 4:
                raise TooLargeError("at most 4")
            if any(event.sequence == 7 for event in batch):
                raise RejectedError("no sevens")
            return super().export(batch)

    backend = BACKENDS["b"] = Picky()
    result = copy(a, b, stream, tmp_path)
    assert (result.copied, result.rejected) == (19, {"no sevens": 1})
    assert len(backend.received) == 19


def test_a_batch_has_no_more_bytes_than_the_child_takes_wherever_they_are(tmp_path: Path) -> None:
    stream = make_stream()

    class Small(WriteOnly):
        max_batch_bytes = 10_000

    a, b = archive("a", tmp_path), Small(name="b", type="small")
    write(a, make_events([str(number) for number in range(10)], stream, attributes={"report": "x" * 3_000}))
    sizes: list[int] = []

    class Measuring(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            sizes.append(sum(event.size for event in batch))
            return super().export(batch)

    BACKENDS["b"] = Measuring()
    assert copy(a, b, stream, tmp_path).copied == 10
    assert max(sizes) <= 10_000


class Watched(Copied):
    """Notes which threads change which of its counts."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[str, set[int]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "threads" in vars(self) and name != "threads":
            self.threads.setdefault(name, set()).add(get_ident())


def test_no_count_is_changed_by_two_threads_at_once(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only", min_level="INFO", max_export_batch_size=5)
    write(a, make_events([str(number) for number in range(40)], stream, levels=(10, 20)))

    class Judging(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            raise RejectedError("bad", count=1)

    BACKENDS["b"] = Judging()
    result = Watched()
    copy(a, b, stream, tmp_path, result=result)
    assert (result.copied, result.unwanted, result.rejected) == (16, 20, {"bad": 4})
    assert {name: len(threads) for name, threads in result.threads.items()} == {"copied": 1, "unwanted": 1}


def test_a_batch_that_is_rejected_late_is_copied_in_halves(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    write(a, make_events([str(number) for number in range(20)], stream))
    now = 0.0

    class Slow(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            nonlocal now
            if not now:
                now = 2 * GIVE_UP_SECONDS
            if any(event.sequence == 7 for event in batch):
                raise RejectedError("no sevens")
            return super().export(batch)

    BACKENDS["b"] = Slow()
    result = copy(a, b, stream, tmp_path, clock=lambda: now)
    assert (result.copied, result.rejected) == (19, {"no sevens": 1})


def test_the_text_of_an_unknown_exception_is_not_shown(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    write(a, make_events(["0"], stream))

    class Broken(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            raise ZeroDivisionError("Authorization: Bearer hidden")

    BACKENDS["b"] = Broken()
    waited: list[float] = []
    with pytest.raises(BackfillStoppedError, match="ZeroDivisionError") as stopped:
        copy(a, b, stream, tmp_path, clock=lambda: sum(waited), sleep=waited.append)
    assert "hidden" not in str(stopped.value)


@pytest.mark.parametrize("error", [RetryableError("no answer", smaller_may_pass=True), TimeoutError("no answer")])
def test_a_batch_that_breaks_off_is_copied_in_halves_and_the_next_ones_are_smaller(
    tmp_path: Path, error: Exception
) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only", max_export_batch_size=100)
    events = make_events([str(number) for number in range(1000)], stream)
    write(a, events)
    cut: list[int] = []

    class Narrow(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            if len(batch) > 30:
                cut.append(len(batch))
                raise error
            return super().export(batch)

    backend = BACKENDS["b"] = Narrow()
    waited: list[float] = []
    result = copy(a, b, stream, tmp_path, clock=lambda: sum(waited), sleep=waited.append)
    assert result.copied == 1000
    assert [event.uid for event in backend.received] == [event.uid for event in events]
    assert cut[:3] == [100, 100, 50]
    assert len(cut) < 15


def test_a_child_that_rejects_everything_stops_the_copy(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    write(a, make_events([str(number) for number in range(1000)], stream))
    backend = BACKENDS["b"] = SimulatedBackend()
    backend.fault = "rejects all"
    with pytest.raises(BackfillStoppedError, match=r"child 'b'.* 10 .*: bad request"):
        copy(a, b, stream, tmp_path)
    assert backend.exports < 60
    # They were not at fault: when the child is mended, they are copied as well.
    backend.fault = None
    assert copy(a, b, stream, tmp_path).copied == 1000


def test_what_is_too_old_or_not_meant_for_a_child_is_left_out(tmp_path: Path) -> None:
    stream = make_stream()

    class Recent(WriteOnly):
        oldest_seconds = OLDEST_SECONDS

    a, b = archive("a", tmp_path), Recent(name="b", type="recent", min_level="WARN")
    BACKENDS["b"] = SimulatedBackend()
    old = make_events(["old"] * 10, stream, level=40)
    now = time.time_ns()
    new = make_events(["new"] * 10, stream, 10, time_unix_nano=now, levels=(10, 30))
    write(a, [*old, *new])
    result = copy(a, b, stream, tmp_path)
    assert (result.too_old, result.unwanted, result.copied) == (10, 5, 5)


def test_the_rate_is_kept(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only")
    BACKENDS["b"] = SimulatedBackend()
    write(a, make_events([str(number) for number in range(1000)], stream))
    waited: list[float] = []
    copy(a, b, stream, tmp_path, rate=100, clock=lambda: sum(waited), sleep=waited.append)
    assert sum(waited) == pytest.approx(9)


def test_two_copies_to_one_child_at_once_are_refused(tmp_path: Path) -> None:
    with (
        open_ledger(tmp_path, STORE, "b", 0),
        pytest.raises(BackfillRunsError, match="another backfill to child 'b' runs on this machine"),
        open_ledger(tmp_path, STORE, "b", 0),
    ):
        pass
    with open_ledger(tmp_path, STORE, "b", 0), open_ledger(tmp_path, uuid4(), "b", 0):
        pass


def test_a_torn_note_costs_no_other(tmp_path: Path) -> None:
    with open_ledger(tmp_path, STORE, "b", 0) as ledger:
        ledger.note("s", WRITER, [0])
    with open(tmp_path / f"{STORE}-b.jsonl", "ab") as file:
        file.write(b'{"time":1,"str')
    with open_ledger(tmp_path, STORE, "b", 0) as ledger:
        ledger.note("s", WRITER, [1])
    with open_ledger(tmp_path, STORE, "b", 0) as ledger:
        assert list(ledger.sent("s", WRITER)) == [(0, 1)]
        assert ledger.is_resumed


def test_a_source_that_fails_in_the_middle_stops_the_copy_in_words(tmp_path: Path) -> None:
    stream = make_stream()
    backend = SimulatedBackend()
    backend.fault = RuntimeError("a secret")
    a, b = make_child("a", backend), WriteOnly(name="b", type="write-only")
    BACKENDS["b"] = SimulatedBackend()
    with pytest.raises(BackfillStoppedError, match=r"child 'a' could not be read: RuntimeError$"):
        copy(a, b, stream, tmp_path)


def rewritten(child: FolderArchive, stream: Stream, change: Callable[[bytes], bytes]) -> bytes:
    """Change what lies in a local archive, and return it."""
    path = Path(prepare_logs_uri(child.store(), stream.id))
    path.write_bytes(change(path.read_bytes()))
    return path.read_bytes()


def contents(child: ChildConfig, stream: Stream) -> bytes:
    chunks = open_source(child).scanner.scan(make_logs(stream))
    return b"".join(content + b"\n" for chunk in chunks for content in chunk.contents)


@pytest.mark.parametrize("is_file", [True, False])
def test_between_archives_lines_are_passed_on_as_they_are(tmp_path: Path, is_file: bool) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path, is_file)
    write(a, everything(100, stream))
    # As a later version may write them.
    lines = rewritten(a, stream, lambda content: content.replace(b'","level":20', b'", "new": "", "level": 20'))

    assert copy(a, b, stream, tmp_path).copied == 100
    assert contents(b, stream) == lines
    again = copy(a, b, stream, tmp_path / "elsewhere")
    assert (again.copied, again.there) == (0, 100)


def test_what_is_passed_on_is_found_by_level_and_time(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path, False).model_copy(update={"max_export_batch_size": 10})
    events = make_events([str(number) for number in range(25)], stream, level=20)
    events[14] = events[14]._replace(level=45, level_name="ODD")
    write(a, events)
    assert copy(a, b, stream, tmp_path).copied == 25

    names = [ObjectName.parse(path.name) for path in sorted(Path(prepare_logs_uri(b.store(), stream.id)).iterdir())]
    batches = [events[:10], events[10:20], events[20:]]
    assert [(name.first, name.last, name.summary) for name in names if name] == [
        (batch[0].number, batch[-1].number, summarize_events(batch)) for batch in batches
    ]


def test_writers_that_wrote_in_turn_get_few_objects(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path, False)
    others = ("fedcba987654321", WRITER)
    events = {writer: make_events([str(number) for number in range(50)], stream, 0, writer) for writer in others}
    for number in range(50):
        for writer in others:
            write(a, [events[writer][number]])

    assert copy(a, b, stream, tmp_path).copied == 100
    assert len(list(Path(prepare_logs_uri(b.store(), stream.id)).iterdir())) == 2
    assert all(not child.differences for child in compare(make_logs(stream), "", sources(a, b)).children.values())


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "broken"), (TimeoutError("no answer"),)])
def test_what_is_passed_on_arrives_once_though_the_artifact_store_fails(tmp_path: Path, fault: Any) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path, False).model_copy(update={"max_export_batch_size": 10})
    write(a, make_events([str(number) for number in range(50)], stream))
    store = with_faults(object_store(Path(b.root)), [None, fault, fault, None, fault])
    waited: list[float] = []

    class Failing(FolderArchive):
        def create_exporter(self) -> ArtifactExporter:
            return ArtifactExporter(find=lambda stream: store)

    failing = Failing(**b.model_dump())
    assert copy(a, failing, stream, tmp_path, sleep=waited.append).copied == 50
    assert len(waited) >= 2
    assert contents(b, stream) == contents(a, stream)


def test_a_full_disk_repeats_nothing_of_what_is_passed_on(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path)
    write(a, make_events([str(number) for number in range(50)], stream))
    (tmp_path / "b" / "logs").mkdir(parents=True)
    store = with_faults(b.store(), [2_000, 0, 1])

    class Full(FolderArchive):
        def create_exporter(self) -> ArtifactExporter:
            return ArtifactExporter(find=lambda stream: store)

    assert copy(a, Full(**b.model_dump()), stream, tmp_path, sleep=lambda seconds: None).copied == 50
    assert contents(b, stream) == contents(a, stream)


class Awkward(SimulatedBackend):
    """Takes all events, and fails with all else."""

    def end_stream(self, stream: Stream) -> None:
        raise ValueError("a-key")

    def close(self) -> None:
        raise ValueError("a-key")


def test_an_exporter_that_cannot_end_a_stream_costs_no_event(tmp_path: Path) -> None:
    stream = make_stream()
    a = archive("a", tmp_path)
    write(a, make_events([str(number) for number in range(20)], stream))
    BACKENDS["b"] = Awkward()
    assert copy(a, WriteOnly(name="b", type="x"), stream, tmp_path).copied == 20
    assert BACKENDS["b"].messages == [str(number) for number in range(20)]


def test_an_exporter_that_cannot_forget_what_it_has_written_gets_nothing_that_it_would_leave_out(
    tmp_path: Path,
) -> None:
    stream = make_stream()
    a = archive("a", tmp_path)
    events = make_events([str(number) for number in range(20)], stream)
    write(a, events[10:])
    write(a, events[:10])
    BACKENDS["b"] = Awkward()
    with pytest.raises(BackfillStoppedError, match=r"'b'.*ValueError") as stopped:
        copy(a, WriteOnly(name="b", type="x"), stream, tmp_path)
    assert "a-key" not in str(stopped.value)
    assert BACKENDS["b"].messages == [str(number) for number in range(10, 20)]


def test_a_step_of_the_child_that_fails_stops_the_backfill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    stream = make_stream()
    a = archive("a", tmp_path)
    write(a, make_events(["one"], stream))
    BACKENDS["b"] = SimulatedBackend()
    monkeypatch.setattr(StripEscapes, "process", fail)
    with pytest.raises(BackfillStoppedError, match=r"'b'.*MemoryError"):
        copy(a, WriteOnly(name="b", type="x", ansi="strip"), stream, tmp_path)
    assert BACKENDS["b"].exports == 0


class Broken(ChildConfig):
    """A child that cannot be opened."""

    def create_exporter(self) -> SimulatedBackend:
        raise ValueError("a-key")

    def create_reader(self) -> Any:
        raise ValueError("a-key")


@pytest.mark.parametrize("is_source", [True, False])
def test_a_child_that_cannot_be_opened_is_named_without_what_its_error_says(tmp_path: Path, is_source: bool) -> None:
    children: list[Any] = [Broken(name="b", type="x"), archive("a", tmp_path)]
    source, target = children if is_source else reversed(children)
    registered: Any = None
    ledgers = open_ledger(tmp_path / "ledgers", STORE, "b", 0.0)
    with ledgers as ledger, pytest.raises(NoAnswerError, match=r"'b'.*ValueError") as raised:
        copy_with(ledger, registered, source, target, [], Copied(), None, lambda number: None)
    assert "a-key" not in str(raised.value)


def test_only_what_a_child_takes_is_passed_on(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path).model_copy(update={"min_level": LoggingLevels.WARN})
    write(a, make_events([str(number) for number in range(20)], stream, levels=(20, 40)))
    result = copy(a, b, stream, tmp_path)
    assert (result.copied, result.unwanted) == (10, 10)


def test_a_rate_is_kept_by_what_is_passed_on(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path)
    write(a, make_events([str(number) for number in range(1000)], stream))
    waited: list[float] = []
    copy(a, b, stream, tmp_path, rate=100, clock=lambda: sum(waited), sleep=waited.append)
    assert sum(waited) == pytest.approx(9)


def test_a_line_without_its_number_is_rejected_alone(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path)
    write(a, make_events([str(number) for number in range(20)], stream))
    rewritten(a, stream, lambda content: content.replace(b'"number":19,', b'"number":"",'))
    result = copy(a, b, stream, tmp_path)
    assert (result.copied, sum(result.rejected.values())) == (19, 1)


def test_what_comes_late_right_after_a_full_batch_is_no_copy(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), archive("b", tmp_path).model_copy(update={"max_export_batch_size": 10})
    events = make_events([str(number) for number in range(20)], stream)
    write(a, events[10:])
    write(a, events[:10])
    assert copy(a, b, stream, tmp_path).copied == 20
    assert [child.missing for child in compare(make_logs(stream), "", sources(a, b)).children.values()] == [0, 0]
