"""Whatever a stream holds and however it is paged through, the pages together are the stream."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.artifact_stores import LocalArtifactStore
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry
from zenml.models import LogsResponse

from composite_logstore import CompositeLogStore, Event, LogEvent, Page, PageRequest, ReadEntry
from composite_logstore.backend import ExportError
from composite_logstore.reading import gaps as reading_gaps
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogsEntriesResponse
from composite_logstore_artifact import reader as reader_module
from composite_logstore_artifact.compaction import Loose, compact
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.filtering import LineFilter
from composite_logstore_artifact.objects import ObjectName
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import FolderArchive, listing_store, local_store, make_logs, object_store, with_faults
from tests.events import make_events, make_stream
from tests.properties.test_gaps import NOTICE
from tests.simulation import make_logs as make_logs_of
from tests.simulation import make_store

Direction = Literal["newer", "older"]
Found = tuple[str, Event | None]

WRITERS = ["0123456789abcde", "fedcba987654321"]
LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR"}
STREAM = make_stream()
LAYOUTS = {"file": local_store, "objects": object_store, "listed": listing_store}

messages = st.one_of(
    st.sampled_from(["", "loss", "LOSS 1", "a\nb\r\n", "\x00\x1b[0m\x85\u2028", "x" * 300, '{"message": "y"}']),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
# No line here has a beginning that is an entry by itself: nobody could tell that it goes on.
odd_lines = st.sampled_from(
    [
        b"",
        b"  \r",
        b"plain loss",
        b"\xff\xfe",
        b"[2024-01-02 03:04:05 UTC] old",
        b'{"message": "torn',
        b'{"message": 1}',
        b"12",
        b'"text"',
        b"null",
        LogEntry(message="ZenML's own loss").model_dump_json(exclude_none=True).encode(),
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Lines of several writers, and of others."""
    numbers = dict.fromkeys(WRITERS, 0)
    lines = []
    for kind in draw(st.lists(st.sampled_from([*WRITERS, "odd"]), max_size=15)):
        if kind == "odd":
            lines.append(draw(odd_lines) + b"\n")
            continue
        level = draw(st.sampled_from(list(LEVELS)))
        [event] = make_events([draw(messages)], STREAM, numbers[kind], kind, level=level, level_name=LEVELS[level])
        numbers[kind] += 1
        lines.append(encode(event))
    return lines


class Archive:
    """A stream that grows, in one of the two layouts."""

    def __init__(self, root: Path, layout: str) -> None:
        self.store: LocalArtifactStore = LAYOUTS[layout](root)
        self.path = root / "logs" / f"{STREAM.id}.log"
        (self.path.parent if layout == "file" else self.path).mkdir(parents=True)
        self.layout = layout
        self.contents: list[bytes] = []
        self.page_bytes = 1_000_000
        self.reader = ArtifactReader(find=lambda logs: self.store, is_in_progress=lambda logs: True)
        self.logs = make_logs(STREAM.id)

    def grow(self, content: bytes) -> None:
        if self.layout != "file":
            (self.path / f"{len(self.contents):020d}.log").write_bytes(content)
        else:
            with self.path.open("ab") as file:
                file.write(content)
        self.contents.append(content)

    def read(self, direction: Direction, token: str | None, limit: int, filter_: LogsEntriesFilter) -> Page:
        return self.reader.read(PageRequest(self.logs, direction, token, limit, filter_, self.page_bytes))

    def expected(self, filter_: LogsEntriesFilter) -> list[Found]:
        """The whole stream, found out in the plainest way."""
        lines = [line for content in self._files() for line in content.split(b"\n")]
        if lines and not _is_entry(lines[-1]):
            lines.pop()  # empty, or not written to its end
        found = []
        for line in lines:
            entry = parse_log_entry(line.decode("utf-8", "replace"))
            if entry is not None and _is_wanted(entry, filter_):
                found.append((entry.message, _event(line)))
        return found

    def _files(self) -> list[bytes]:
        return [b"".join(self.contents)] if self.layout == "file" else self.contents


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _event(line: bytes) -> Event | None:
    try:
        fields = json.loads(line)
        return Event(fields["writer"], fields["sequence"])
    except (ValueError, TypeError, KeyError):
        return None


def _is_wanted(entry: LogEntry, filter_: LogsEntriesFilter) -> bool:
    if filter_.search and filter_.search.casefold() not in entry.message.casefold():
        return False
    if filter_.level and (entry.level is None or entry.level.value < filter_.level.value):
        return False
    if filter_.since and (entry.timestamp is None or entry.timestamp < filter_.since):
        return False
    return not filter_.until or (entry.timestamp is not None and entry.timestamp <= filter_.until)


def _found(page: Page) -> list[Found]:
    return [(read.entry.message, read.event) for read in page.entries]


filters = st.builds(
    LogsEntriesFilter,
    search=st.sampled_from([None, None, "loss", "Y"]),
    level=st.sampled_from([None, None, "INFO", "WARNING"]),
    since=st.sampled_from([None, None, "2026-09-21T14:13:20.002Z"]),
    until=st.sampled_from([None, None, "2026-09-21T14:13:20.004Z"]),
)
limits = st.lists(st.integers(1, 6), min_size=1, max_size=4)
page_bytes = st.sampled_from([1, 20, 310, 1_000_000])
layouts = st.sampled_from(list(LAYOUTS))
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """Make the reader work in blocks so small that most lines cross one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "_USUAL_LINE", 1)
        patch.setattr(reader_module, "_FIRST_BLOCK", 16)
        patch.setattr(reader_module, "_SEARCHED_BLOCK", 32)
        patch.setattr(reader_module, "_LARGEST_BLOCK", 64)
        patch.setattr(reader_module, "_WORTH_KNOWING", 1)
        patch.setattr(reader_module, "_MOST_BYTES", 1500)
        yield


@contextmanager
def archive_of(layout: str, contents: list[bytes]) -> Iterator[Archive]:
    with tempfile.TemporaryDirectory() as root:
        archive = Archive(Path(root), layout)
        for content in contents:
            archive.grow(content)
        yield archive


def pieces(lines: list[bytes], layout: str, cuts: list[int]) -> list[bytes]:
    """Cut a stream up: a file anywhere, since nothing else is promised of it; objects between two lines.

    Some objects lack their last newline.
    """
    content = b"".join(lines)
    if layout != "file":
        ends = [0]
        for line in lines:
            ends.append(ends[-1] + len(line))
        places = sorted(ends[cut % len(ends)] for cut in cuts)
    else:
        places = sorted(cut % (len(content) + 1) for cut in cuts)
    found = [content[begin:end] for begin, end in zip([0, *places], [*places, len(content)], strict=True)]
    if layout != "file":
        found = [piece.removesuffix(b"\n") if (len(piece) + len(cuts)) % 3 == 0 else piece for piece in found]
    return found


cuts = st.lists(st.integers(0, 10_000), max_size=5)


def pages(archive: Archive, direction: Direction, limits: list[int], filter_: LogsEntriesFilter) -> Iterator[Page]:
    """Read to the end."""
    token: str | None = None
    number = 0
    while number == 0 or token is not None:
        page = archive.read(direction, token, limits[number % len(limits)], filter_)
        assert len(page.entries) <= limits[number % len(limits)]
        assert len(page.entries) <= 1 or sum(read.size for read in page.entries) <= archive.page_bytes
        if page.entries:
            assert page.newer is not None
        yield page
        token = page.newer if direction == "newer" else page.older
        number += 1


def all_from(archive: Archive, direction: Direction, token: str | None, filter_: LogsEntriesFilter) -> list[Found]:
    """Return what the pages from a token on lead through, in any order."""
    found: list[Found] = []
    while token is not None:
        page = archive.read(direction, token, 1000, filter_)
        found += _found(page)
        token = page.newer if direction == "newer" else page.older
    return found


@few
@given(streams(), layouts, cuts, st.sampled_from(["newer", "older"]), limits, filters, st.booleans(), page_bytes)
def test_pages_are_the_stream(
    lines: list[bytes],
    layout: str,
    cuts: list[int],
    direction: Direction,
    limits: list[int],
    filter_: LogsEntriesFilter,
    is_cut_off: bool,
    page_bytes: int,
) -> None:
    contents = pieces(lines, layout, cuts)
    if is_cut_off and contents[-1]:
        contents[-1] = contents[-1][: len(contents[-1]) * 2 // 3]
    with archive_of(layout, contents) as archive:
        archive.page_bytes = page_bytes
        found: list[Found] = []
        for page in pages(archive, direction, limits, filter_):
            found = found + _found(page) if direction == "newer" else _found(page) + found

        assert found == archive.expected(filter_)


@few
@given(streams(), layouts, cuts, limits, filters, page_bytes)
def test_tokens_lead_back_and_forth(
    lines: list[bytes], layout: str, cuts: list[int], limits: list[int], filter_: LogsEntriesFilter, page_bytes: int
) -> None:
    with archive_of(layout, pieces(lines, layout, cuts)) as archive:
        archive.page_bytes = page_bytes
        expected = archive.expected(filter_)
        for direction in ("newer", "older"):
            passed = 0
            for page in pages(archive, direction, limits, filter_):
                begin = passed if direction == "newer" else len(expected) - passed - len(page.entries)
                end = begin + len(page.entries)
                passed += len(page.entries)
                older = all_from(archive, "older", page.older, filter_)
                newer = all_from(archive, "newer", page.newer, filter_)
                assert len(older) == begin
                assert len(newer) == (len(expected) - end if page.newer else 0)


@few
@given(streams(), layouts, cuts, limits, filters, st.lists(st.booleans(), max_size=30))
def test_pages_that_follow_a_growing_stream_are_the_stream(
    lines: list[bytes],
    layout: str,
    cuts: list[int],
    limits: list[int],
    filter_: LogsEntriesFilter,
    grows: list[bool],
) -> None:
    with archive_of(layout, []) as archive:
        remaining = pieces(lines, layout, cuts)
        found: list[Found] = []
        token: str | None = None
        number = 0

        def follow() -> bool:
            nonlocal token, number
            page = archive.read("newer", token, limits[number % len(limits)], filter_)
            number += 1
            found.extend(_found(page))
            token = page.newer or token
            return page.newer is not None

        for grow in grows:
            if grow and remaining:
                archive.grow(remaining.pop(0))
            else:
                follow()
        for content in remaining:
            archive.grow(content)
        while follow():
            pass

        assert found == archive.expected(filter_)


@few
@given(streams(), layouts, cuts, limits, st.integers(0, 5))
def test_pages_towards_the_oldest_end_do_not_see_what_is_added_behind_them(
    lines: list[bytes], layout: str, cuts: list[int], limits: list[int], already: int
) -> None:
    nothing = LogsEntriesFilter()
    contents = pieces(lines, layout, cuts)
    with archive_of(layout, contents[:already]) as archive:
        expected = archive.expected(nothing)
        found: list[Found] = []
        remaining = contents[already:]
        for page in pages(archive, "older", limits, nothing):
            found = _found(page) + found
            if remaining:
                archive.grow(remaining.pop(0))

        assert found == expected


faults = st.lists(
    st.one_of(
        st.none(), st.integers(0, 2000), st.just((TimeoutError("no answer"),)), st.just(ConnectionError("refused"))
    ),
    max_size=8,
)


@few
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 6)), min_size=1, max_size=5),
    layouts,
    faults,
    st.randoms(use_true_random=False),
)
def test_whatever_fails_every_event_is_there_once_and_in_order(
    batches: list[tuple[int, int]], layout: str, faults: list[Any], random: Any
) -> None:
    # A local file either takes some bytes or refuses; it has no answer that can be lost. An object is
    # there as a whole or not at all.
    fitting = [fault for fault in faults if not isinstance(fault, tuple if layout == "file" else int)]
    streams = [make_stream(), make_stream()]
    exported: dict[Any, list[LogEvent]] = {stream.id: [] for stream in streams}
    with tempfile.TemporaryDirectory() as root:
        store = with_faults(LAYOUTS[layout](Path(root)), fitting)
        exporter = ArtifactExporter(find=lambda stream: store)
        reader = ArtifactReader(find=lambda logs: store, is_in_progress=lambda logs: True)
        number = 0
        for which, size in batches:
            # The first events go to one stream, the others to either.
            pending = make_events(["x"], streams[which], number) + [
                make_events(["x" * random.randint(0, 300)], random.choice(streams), number + 1 + later)[0]
                for later in range(size)
            ]
            number += len(pending)
            for event in pending:
                exported[event.stream.id].append(event)
            batches_left = [pending]
            while batches_left:
                part = batches_left[0]
                # What failed is tried again, or its halves, and nothing else before.
                if len(part) > 1 and random.random() < 0.3:
                    middle = random.randint(1, len(part) - 1)
                    batches_left[:1] = [part[:middle], part[middle:]]
                with suppress(ExportError):
                    exporter.export(batches_left[0])
                    del batches_left[0]

        for stream in streams:
            found: list[ReadEntry] = []
            page = Page(newer="")
            while page.newer is not None:
                page = reader.read(
                    PageRequest(make_logs(stream.id), "newer", page.newer or None, 1000, LogsEntriesFilter())
                )
                found += [read for read in page.entries if read.event is not None]
            assert [read.event.sequence for read in found if read.event] == [
                event.sequence for event in exported[stream.id]
            ]
            assert [read.entry.message for read in found] == [event.message for event in exported[stream.id]]


@few
@given(
    st.lists(st.tuples(st.sampled_from(WRITERS), st.integers(1, 4), st.sampled_from([20, 40])), max_size=12),
    st.sampled_from(["objects", "listed"]),
    st.sampled_from(["newer", "older"]),
    limits,
    filters,
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
)
def test_cursors_stay_valid_when_objects_are_merged(
    batches: list[tuple[str, int, int]],
    layout: str,
    direction: Direction,
    limits: list[int],
    filter_: LogsEntriesFilter,
    before: int,
    after: int,
    is_killed: bool,
) -> None:
    """Some objects are merged before anything is read, the others after some pages; and that may be cut off."""
    with archive_of(layout, []) as archive:
        exporter = ArtifactExporter(find=lambda stream: archive.store)
        numbers = dict.fromkeys(WRITERS, 0)
        events: list[LogEvent] = []
        for place, (writer, count, level) in enumerate(batches):
            if place == before:
                merge(archive, is_killed=False)
            batch = make_events(["loss", "y" * 300] * 2, STREAM, numbers[writer], writer, level=level)[:count]
            numbers[writer] += count
            exporter.export(batch)
            events += batch
        found: list[Found] = []
        if events:
            for number, page in enumerate(pages(archive, direction, limits, filter_)):
                found = found + _found(page) if direction == "newer" else _found(page) + found
                if number == after:
                    merge(archive, is_killed)

        entries = [(parse_log_entry(encode(event).decode()), event) for event in events]
        assert found == [
            (entry.message, Event(event.writer, event.sequence))
            for entry, event in entries
            if entry is not None and _is_wanted(entry, filter_)
        ]


def merge(archive: Archive, is_killed: bool) -> None:
    """Merge what each writer has written; killed, it leaves the objects that were merged."""
    there = {path: path.read_bytes() for path in archive.path.iterdir()}
    for writer in WRITERS:
        # Those that were merged already have their size in their names.
        written = {
            path.name: len(content)
            for path, content in sorted(there.items())
            if (name := ObjectName.parse(path.name)) and name.writer == writer and name.size is None
        }
        compact(archive.store, str(archive.path), Loose(written))
    if is_killed:
        for path, content in there.items():
            path.write_bytes(content)


class Process:
    """One that writes a writer's events: the one that logs them, or one that delivers what that one left."""

    def __init__(self, archive: Archive, writer: str, logged: list[LogEvent], place: int, clock: int) -> None:
        self.clock = clock
        self._archive = archive
        self._logged = logged
        self._exporter = ArtifactExporter(find=lambda stream: archive.store, clock=lambda: self.clock)
        self._written = self._noted = place
        self._objects: set[str] = set()

    def export(self, count: int, is_noted: bool) -> None:
        """Export the next events; whether it is noted that they were decides with which a successor begins."""
        batch = self._logged[self._written : self._written + count]
        before = self._names()
        if batch:
            self.clock += 1
            self._exporter.export(batch)
        self._written += len(batch)
        if is_noted:
            self._noted = self._written
        self._objects |= self._names() - before

    def merge(self) -> None:
        sizes = {name: (self._archive.path / name).stat().st_size for name in sorted(self._objects)}
        self._objects.clear()
        with suppress(OSError):
            compact(self._archive.store, str(self._archive.path), Loose(sizes))

    def successor(self, clock: int, writer: str) -> Process:
        return Process(self._archive, writer, self._logged, self._noted, clock)

    def _names(self) -> set[str]:
        path = self._archive.path
        return {one.name for one in path.iterdir()} if path.is_dir() else set()


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, str, int, bool]]:
    """What happens to some writers: what they do, who, a number, and whether it is noted."""
    kinds = ["log", "log", "log", "lose", "die", "die", "jump", "merge"]
    return draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), st.sampled_from(WRITERS), st.integers(1, 6), st.booleans()),
            min_size=6,
            max_size=25,
        )
    )


def lived_through(archive: Archive, history: list[tuple[str, str, int, bool]]) -> tuple[list[LogEvent], set[Any]]:
    """Archive what the writers log, and return it, and the gaps: a writer, the first and the last number."""
    logged: dict[str, list[LogEvent]] = {writer: [] for writer in WRITERS}
    processes = {writer: Process(archive, writer, logged[writer], 0, 10**18) for writer in WRITERS}
    sequences = dict.fromkeys(WRITERS, 0)
    gaps = set()
    for kind, writer, number, is_noted in history:
        process = processes[writer]
        if kind == "log":
            first = sequences[writer]
            said = [("loss", "y" * 60)[(first + place) % 2] for place in range(number)]
            level = (20, 40)[number % 2]
            for event in make_events(said, STREAM, first, writer, level=level):
                # Most writers log to several streams.
                logged[writer].append(event._replace(number=3 * event.sequence))
            sequences[writer] += number
            process.export(number + 3, is_noted)
        elif kind == "lose":
            last = sequences[writer] + number - 1
            before = logged[writer][-1].sequence if logged[writer] else -1
            sequences[writer] = last + 1
            gaps = {gap for gap in gaps if gap[0] != writer or gap[1] != before + 1} | {(writer, before + 1, last)}
        elif kind == "die":
            # Half of the successors' clocks are behind.
            clock = process.clock + (7 if number % 2 else -1000 * number)
            processes[writer] = process.successor(clock, writer)
            processes[writer].export(number, is_noted)
        elif kind == "jump":
            process.clock += 1000 * (number - 4)
        elif archive.layout != "file":
            process.merge()
    for process in processes.values():
        process.export(1000, True)
    ends = {writer: events[-1].sequence for writer, events in logged.items() if events}
    return [event for events in logged.values() for event in events], {
        gap for gap in gaps if gap[2] < ends.get(gap[0], -1)
    }


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from(["file", "objects"]), limits, filters, st.integers(0, 5))
def test_the_same_is_fetched_from_both_ends_whatever_the_clocks_did(
    history: list[tuple[str, str, int, bool]],
    layout: str,
    limits: list[int],
    filter_: LogsEntriesFilter,
    turn: int,
) -> None:
    """Each event once, and each gap once, through writers that die, and successors that deliver again, out of order."""
    with archive_of(layout, []) as archive, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_gaps, "is_finished", lambda logs: True)
        events, gaps = lived_through(archive, history)
        entries = {event.uid: parse_log_entry(encode(event).decode()) for event in events}
        wanted = {uid for uid, entry in entries.items() if entry is not None and _is_wanted(entry, filter_)}
        config = FolderArchive(
            name="archive", type="artifact", root=str(archive.path.parent.parent), is_file=layout == "file"
        )
        store = make_store(config)
        logs = make_logs_of(store, id=STREAM.id)

        for start, way, back in (("oldest", "after", "before"), ("newest", "before", "after")):
            items: list[LogEntry] = []
            pages = fetched(store, logs, way, store.fetch(logs, start, limits[0], filter_=filter_)) if events else ()
            for number, page in enumerate(pages):
                if number == turn:
                    first = store.fetch(logs, **{back: cursor}) if (cursor := getattr(page, back)) else None
                    turned = [entry for other in fetched(store, logs, back, first) for entry in other.items]
                    assert sorted(ids(turned)) == sorted(ids(items))
                items = items + page.items if way == "after" else page.items + items
            told = [gap for entry in items if entry.name == "composite_logstore" for gap in [told_by(entry)]]
            assert sorted(ids(items)) == sorted(wanted)
            assert sorted(told) == sorted(gaps if filter_ == LogsEntriesFilter() else ())


def fetched(
    store: CompositeLogStore, logs: LogsResponse, way: str, page: LogsEntriesResponse | None
) -> Iterator[LogsEntriesResponse]:
    """Yield a page and those that follow it."""
    while page is not None:
        yield page
        page = store.fetch(logs, **{way: cursor}) if (cursor := getattr(page, way)) else None


def ids(entries: list[LogEntry]) -> list[str]:
    return [str(entry.id) for entry in entries if entry.name != "composite_logstore"]


def told_by(notice: LogEntry) -> tuple[str, int, int]:
    match = NOTICE.fullmatch(notice.message)
    assert match is not None, notice.message
    count, before, after, writer = match.groups()
    first = 0 if before == "the beginning" else int(before) + 1
    assert int(count) == int(after) - first
    return writer, first, int(after) - 1


# What JSON escapes, and characters that become others, or more, when case does not count.
tricky = st.text(st.sampled_from('aAkKsS\u212a\u017f\u00df\u0130\ufb01i"\\\\/\n\t\x1b\x7fé\u0301É. u0'), max_size=6)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(tricky, st.sampled_from(["orjson", "ascii", "plain"])), max_size=6), tricky, st.booleans())
def test_a_search_finds_what_is_there_however_it_is_written(
    written: list[tuple[str, str]], search: str, backwards: bool
) -> None:
    lines = []
    for message, how in written:
        [event] = make_events([message], STREAM)
        if how == "orjson":
            lines.append(encode(event))
        elif how == "ascii":
            lines.append(json.dumps({"message": message}).encode() + b"\n")
        else:
            lines.append(message.replace("\n", " ").encode() + b"\n")
    wanted = LineFilter(LogsEntriesFilter(search=search))
    content = b"".join(lines)

    found = [wanted.parse(content[begin:end]) for begin, end in wanted.find(content, backwards)]

    entries = [parse_log_entry(line.decode()) for line in content.split(b"\n")]
    expected = [entry.message for entry in entries if entry and search.casefold() in entry.message.casefold()]
    assert [read.entry.message for read in found if read] == (expected[::-1] if backwards else expected)
