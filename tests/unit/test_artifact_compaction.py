"""Objects that are merged are a team's only copy of its logs: nothing may be lost, shown twice, or out of order."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
from zenml.artifact_stores import BaseArtifactStore, LocalArtifactStore
from zenml.log_stores.artifact.artifact_log_store import fetch_log_records, prepare_logs_uri

from composite_logstore import Page, PageRequest, RejectedError, Scanned, Stream
from composite_logstore.reading.cursor import without_duplicates
from composite_logstore.zenml import LogsEntriesFilter, LogStoreUnavailableError
from composite_logstore_artifact import compaction, exporter
from composite_logstore_artifact.compaction import Loose, compact
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.lines import Summary
from composite_logstore_artifact.objects import ObjectName
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import ListingFilesystem, listing_store, make_logs, object_store
from tests.events import NOON, WRITER, make_events, make_stream

OTHER_WRITER = "fedcba987654321"
DIRECTIONS: tuple[Literal["newer", "older"], ...] = ("newer", "older")
stores = pytest.mark.parametrize("make_store", [object_store, listing_store], ids=["objects", "listed"])


class Archive:
    """A stream of many objects."""

    def __init__(self, store: LocalArtifactStore) -> None:
        self.store: BaseArtifactStore = store
        self.stream: Stream = make_stream()
        self.logs = make_logs(self.stream.id)
        self.uri = prepare_logs_uri(store, self.stream.id)
        self.folder = Path(self.uri)
        self.exporter = self.make_exporter()

    def make_exporter(self, arrival: int = NOON) -> ArtifactExporter:
        return ArtifactExporter(find=lambda stream: self.store, clock=lambda: arrival)

    def write(self, first: int, end: int, writer: str = WRITER, **changes: Any) -> None:
        """Write an object of one event for each number."""
        for number in range(first, end):
            self.exporter.export(make_events([str(number)], self.stream, number, writer, **changes))

    def end(self) -> None:
        self.exporter.end_stream(self.stream)
        self.exporter.close()

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    @property
    def names(self) -> list[ObjectName]:
        return [name for name in map(ObjectName.parse, self.files) if name is not None]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in self.files}

    def read(
        self, direction: Literal["newer", "older"] = "newer", token: str | None = None, limit: int = 1_000
    ) -> Page:
        reader = ArtifactReader(find=lambda logs: self.store)
        return reader.read(PageRequest(self.logs, direction, token, limit, LogsEntriesFilter()))

    def fetched(self, direction: Literal["newer", "older"] = "newer") -> list[str]:
        """What `fetch()` shows: a reader's pages without copies."""
        return [read.entry.message for read in without_duplicates(self.read(direction).entries, direction, {})]

    def fetched_by_zenml(self) -> list[str]:
        return [entry.message for entry in fetch_log_records(self.store, self.uri, 10_000)]

    def assert_complete(self, count: int) -> None:
        """Check that all is there once and in order, and nothing is lost to ZenML's own reader either."""
        for direction in DIRECTIONS:
            assert self.fetched(direction) == numbered(0, count)
        assert set(numbered(0, count)) <= set(self.fetched_by_zenml())


def numbered(first: int, end: int) -> list[str]:
    return [str(number) for number in range(first, end)]


@stores
def test_a_stream_of_many_objects_is_merged_now_and_then_and_at_its_end(
    make_store: Callable[[Path], LocalArtifactStore], tmp_path: Path
) -> None:
    archive = Archive(make_store(tmp_path))
    for number in range(250):
        archive.write(number, number + 1)
        archive.exporter._compaction.wait()
        assert len(archive.files) <= 102
    archive.end()

    assert [(name.first, name.last) for name in archive.names] == [(0, 99), (100, 199), (200, 249)]
    archive.assert_complete(250)
    assert archive.fetched_by_zenml() == numbered(0, 250)


def test_a_merged_object_says_what_is_in_it(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    for number in range(10):
        archive.write(number, number + 1, level=40 if number == 3 else 20, level_name="X")
    size = sum(archive.sizes.values())
    archive.end()

    [name] = archive.names
    micros = NOON // 1000
    assert name == ObjectName(NOON, NOON + 9, WRITER, 0, 9, Summary(micros, micros + 9000, 40), size)
    assert ObjectName.parse(str(name)) == name
    assert archive.sizes == {str(name): size}


def test_few_objects_are_left_as_they_are(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    archive.write(0, 7)
    archive.end()

    assert len(archive.names) == 7


@stores
def test_merged_objects_are_not_too_large_and_what_others_wrote_stays_where_it_is(
    make_store: Callable[[Path], LocalArtifactStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "LARGEST_OBJECT", 2_000)
    archive = Archive(make_store(tmp_path))
    archive.write(0, 11)
    # Another process, and another program.
    other = archive.make_exporter(NOON + 10)
    other.export(make_events(["other"], archive.stream, 0, OTHER_WRITER))
    other.close()
    archive.write(11, 20)
    (archive.folder / "foreign.log").write_bytes(b'{"message": "foreign"}\n')
    archive.end()

    assert max(archive.sizes.values()) <= 2_000
    assert len(archive.files) < 12
    expected = [*numbered(0, 11), "other", *numbered(11, 20), "foreign"]
    assert archive.fetched() == archive.fetched_by_zenml() == expected


def test_what_one_process_writes_for_several_writers_is_merged_for_each(tmp_path: Path) -> None:
    """As one that delivers what dead processes left: the names say whose events are in an object, and which."""
    archive = Archive(listing_store(tmp_path))
    for number in range(3):
        archive.write(4 * number, 4 * number + 4)
        archive.write(4 * number, 4 * number + 4, OTHER_WRITER)
    contents = {name: (archive.folder / name).read_bytes() for name in archive.files}
    pages = {direction: archive.read(direction, limit=10) for direction in DIRECTIONS}
    before = {direction: ids(archive.read(direction, getattr(pages[direction], direction))) for direction in DIRECTIONS}
    archive.end()

    assert [(name.writer, name.first, name.last) for name in archive.names] == [
        (writer, first, first + 3) for first in (0, 4, 8) for writer in (WRITER, OTHER_WRITER)
    ]
    assert b"".join(contents.values()) == b"".join((archive.folder / name).read_bytes() for name in archive.files)
    for direction in DIRECTIONS:
        assert ids(archive.read(direction, getattr(pages[direction], direction))) == before[direction]


def ids(page: Page) -> list[str]:
    return [str(read.entry.id) for read in page.entries]


def test_lines_that_make_no_sense_are_merged_as_they_are(tmp_path: Path) -> None:
    archive = Archive(listing_store(tmp_path))
    line = encode(make_events(["x"], archive.stream)[0])[:-1]
    odd = [line.replace(b'"x"', piece) for piece in (b"5", b"[]", b'"\xff"', b'"\x00"', b"{", b"[" * 2_000, b"1e999")]
    for number, text in enumerate(odd):
        text = text.replace(b'"number":0,', b'"number":%d,' % number)
        with suppress(RejectedError):
            archive.exporter.export_scanned(archive.stream, Scanned(WRITER, [number], (), [text], None, None))
            continue
        # What does not even say its number is no event; a line may be damaged where it lies all the same.
        archive.write(number, number + 1)
        path = archive.folder / archive.files[-1]
        size = path.stat().st_size
        path.write_bytes(text + b" " * (size - len(text) - 1) + b"\n" if len(text) < size else path.read_bytes())
    before = b"".join((archive.folder / name).read_bytes() for name in archive.files)
    shown = [archive.fetched(direction) for direction in DIRECTIONS]
    assert shown[0] == shown[1]
    assert len(shown[0]) == len(archive.files) == len(odd)
    compact(archive.store, archive.uri, Loose(archive.sizes))

    assert len(archive.files) == 1
    assert (archive.folder / archive.files[0]).read_bytes() == before
    assert [archive.fetched(direction) for direction in DIRECTIONS] == shown


def test_copies_of_what_was_merged_are_known_whatever_lies_between(tmp_path: Path) -> None:
    """A successor's clock is behind: what it merged of the same writer lies among what its predecessor has."""
    archive = Archive(listing_store(tmp_path))
    archive.write(0, 10)
    originals = {name: (archive.folder / name).read_bytes() for name in archive.files}
    archive.end()
    archive.exporter = archive.make_exporter(NOON + 4)
    archive.write(10, 20)
    archive.end()
    for name, content in originals.items():
        (archive.folder / name).write_bytes(content)

    for direction in DIRECTIONS:
        read = [int(read.entry.message) for read in archive.read(direction).entries]
        assert sorted(read) == list(range(20))


@pytest.mark.parametrize("writer", ["../../../x", "/x", "a/b", "..", "A" * 15, "a" * 14, "\0", "w" * 64])
def test_a_writer_s_name_leads_nowhere(tmp_path: Path, writer: str) -> None:
    """A copy of another backend's events takes over what these say of their writer."""
    archive = Archive(object_store(tmp_path))
    archive.write(0, 9, writer)
    archive.write(9, 12)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent for path in before} == {archive.folder}
    archive.end()

    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {archive.folder}
    assert len(archive.names) == len(archive.files)
    archive.assert_complete(12)


def test_large_objects_are_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_LARGE", 2_000)
    archive = Archive(object_store(tmp_path))
    archive.write(0, 10)
    archive.exporter.export(make_events(numbered(10, 30), archive.stream, 10))
    archive.write(30, 40)
    archive.end()

    assert [(name.first, name.last) for name in archive.names] == [(0, 9), (10, 29), (30, 39)]
    archive.assert_complete(40)


def test_a_cursor_from_before_leads_on(tmp_path: Path) -> None:
    archive = Archive(listing_store(tmp_path))
    archive.write(0, 30)
    pages = {direction: archive.read(direction, limit=13) for direction in DIRECTIONS}
    archive.end()

    assert len(archive.files) == 1
    newer, older = archive.read("newer", pages["newer"].newer), archive.read("older", pages["older"].older)
    assert [read.entry.message for read in newer.entries] == numbered(13, 30)
    assert [read.entry.message for read in older.entries] == numbered(0, 17)


# --- A scan


def scanned(chunks: Iterable[Scanned]) -> list[int]:
    return [sequence for chunk in chunks for sequence in chunk.sequences]


@pytest.mark.parametrize("seen", [1, 7, 29])
def test_a_scan_goes_on_when_objects_are_merged_meanwhile(tmp_path: Path, seen: int) -> None:
    archive = Archive(object_store(tmp_path))
    archive.write(0, 30)
    scan = ArtifactReader(find=lambda logs: archive.store).scan(archive.logs)
    before = scanned(islice(scan, seen))
    archive.end()

    # What was fetched ahead is still in hand; then there is nothing left of the objects that were listed.
    assert len(archive.files) == 1
    assert before + scanned(scan) == list(range(30))


def test_a_scan_gives_up_on_what_is_never_there(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    archive.write(0, 3)
    opened = archive.store.open

    def open_nothing(path: str, mode: str = "r") -> Any:
        if mode == "rb":
            raise FileNotFoundError(path)
        return opened(path, mode)

    archive.store.open = open_nothing  # type: ignore[method-assign, assignment]
    with pytest.raises(LogStoreUnavailableError, match="could not be read"):
        list(ArtifactReader(find=lambda logs: archive.store).scan(archive.logs))


def test_a_scan_leaves_out_the_copies_that_were_merged(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    archive.write(0, 10)
    originals = {name: (archive.folder / name).read_bytes() for name in archive.files}
    archive.end()
    for name, content in originals.items():
        (archive.folder / name).write_bytes(content)

    reader = ArtifactReader(find=lambda logs: archive.store)
    assert scanned(reader.scan(archive.logs)) == list(range(10))
    # A scan that began before leads on, too: its place was in one of these.
    token = f"{list(originals)[4]}:{len(originals[list(originals)[4]])}"
    assert scanned(reader.scan(archive.logs, token)) == list(range(5, 10))


# --- What fails


class Bucket(ListingFilesystem):
    """One that fails in the ways of remote stores."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps = False  # whether it removes nothing, and says nothing, as s3fs does where that is refused
        self.hides: Callable[[str], bool] = lambda path: False  # what a listing does not show
        self.removed: list[str] = []

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        return [info for info in super().ls(path, detail=True, **kwargs) if not self.hides(info["name"])]

    def rm(self, path: Any, *_: Any, **__: Any) -> None:
        for one in path:
            if not self.keeps:
                self.removed.append(one)
                os.remove(one)


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def archive(tmp_path: Path, bucket: Bucket) -> Archive:
    store = object_store(tmp_path)
    store.filesystem = bucket  # type: ignore[attr-defined]
    return Archive(store)


def test_a_listing_without_one_of_the_objects_is_not_trusted(archive: Archive, bucket: Bucket) -> None:
    archive.write(0, 99)
    late = archive.files[42]
    bucket.hides = lambda path: path.endswith(late)
    archive.write(99, 100)
    archive.exporter._compaction.wait()
    assert len(archive.files) == 100

    bucket.hides = lambda path: False
    archive.write(100, 110)
    archive.end()
    # What was not there then is left alone.
    assert [(name.first, name.last) for name in archive.names] == [(0, 41), (42, 42), (43, 109)]
    archive.assert_complete(110)


def test_nothing_is_removed_before_a_listing_shows_what_was_merged(archive: Archive, bucket: Bucket) -> None:
    archive.write(0, 99)
    bucket.hides = lambda path: path.count("-") > 7 + str(archive.folder).count("-")
    archive.write(99, 100)
    archive.exporter._compaction.wait()
    originals = [name for name in archive.names if name.size is None]
    assert len(originals) == 100

    bucket.hides = lambda path: False
    archive.assert_complete(100)
    archive.end()
    archive.assert_complete(100)


@pytest.mark.parametrize("fault", ["an error", "a piece", "an answer that is lost"])
def test_what_was_not_written_as_a_whole_replaces_nothing(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    archive.write(0, 99)
    before = archive.sizes
    open_file = archive.store.open

    def fail(path: str, mode: str = "r") -> Any:
        if mode == "wb" and path.count("-") > 7 + str(archive.folder).count("-"):
            file = open_file(path, mode)
            if fault == "a piece":
                file.write(b'{"timestamp":')
                write = file.write
                return type("Short", (), {"write": lambda self, content: write(content[:5]), **CONTEXT})()
            file.close()
            raise TimeoutError("no answer")
        return open_file(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(archive.store, "open", fail)
        archive.write(99, 100)
        archive.exporter._compaction.wait()
    assert archive.sizes.items() >= before.items()
    assert len(archive.files) == 100
    archive.assert_complete(100)

    archive.write(100, 110)
    archive.end()
    assert len(archive.files) == 1
    archive.assert_complete(110)


CONTEXT = {"__enter__": lambda self: self, "__exit__": lambda self, *_: None}


def test_who_may_not_remove_gets_no_more_copies(archive: Archive, bucket: Bucket) -> None:
    bucket.keeps = True
    archive.write(0, 350)
    archive.end()

    assert len([name for name in archive.names if name.size is not None]) == 1
    assert len(archive.files) == 351
    archive.assert_complete(350)


def test_what_could_not_be_removed_is_removed_later(archive: Archive, bucket: Bucket) -> None:
    bucket.keeps = True
    archive.write(0, 100)
    archive.exporter._compaction.wait()
    assert len(archive.files) == 101

    bucket.keeps = False
    archive.write(100, 103)
    archive.end()

    assert [(name.first, name.last) for name in archive.names] == [(0, 99), (100, 102)]
    archive.assert_complete(103)


def test_what_another_process_put_between_meanwhile_stays_between(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way while the objects were listed."""
    archive.write(0, 10)
    written = archive.sizes
    open_file = archive.store.open

    def open_late(path: str, mode: str = "r") -> Any:
        if mode == "wb" and "-0-9-" in path:
            other = archive.make_exporter(NOON + 4)
            other.export(make_events(["other"], archive.stream, 0, OTHER_WRITER))
        return open_file(path, mode)

    pages: list[Page] = []
    with monkeypatch.context() as patch:
        patch.setattr(archive.store, "open", open_late)
        remove = compaction._remove
        # Somebody reads what was merged before it is removed again.
        patch.setattr(
            compaction,
            "_remove",
            lambda *arguments: (pages.extend(archive.read(way, limit=4) for way in DIRECTIONS), remove(*arguments)),
        )
        with pytest.raises(OSError, match="merged object"):
            compact(archive.store, archive.uri, Loose(dict(written)))
    assert archive.sizes.items() > written.items()
    assert len(archive.files) == 11
    assert pages[0].newer is not None
    assert len(pages[0].newer.split("-")) > 8
    newer, older = archive.read("newer", pages[0].newer), archive.read("older", pages[1].older)
    assert [read.entry.message for read in newer.entries] == ["4", "other", *numbered(5, 10)]
    # The other one was on the page already: `fetch()` knows it by its number.
    assert [read.entry.message for read in older.entries] == [*numbered(0, 5), "other", "5", "6"]
    compact(archive.store, archive.uri, Loose(written))

    assert len(archive.files) == 3
    assert archive.fetched() == [*numbered(0, 5), "other", *numbered(5, 10)]


def test_what_somebody_else_removes_meanwhile_is_left_where_it_was_merged(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.write(0, 10)
    written = archive.sizes
    open_file = archive.store.open

    def open_late(path: str, mode: str = "r") -> Any:
        if mode == "wb":
            os.remove(archive.folder / archive.files[3])
        return open_file(path, mode)

    monkeypatch.setattr(archive.store, "open", open_late)
    with pytest.raises(OSError, match="merged object"):
        compact(archive.store, archive.uri, Loose(written))
    archive.assert_complete(10)


def test_a_piece_of_a_merged_object_hides_nothing(archive: Archive) -> None:
    """A filesystem that does not write an object as a whole, and a process that was killed while it did."""
    archive.write(0, 12)
    written = archive.sizes
    contents = {name: (archive.folder / name).read_bytes() for name in written}
    compact(archive.store, archive.uri, Loose(dict(written)))
    [merged] = archive.files
    whole = (archive.folder / merged).read_bytes()
    for name, content in contents.items():
        (archive.folder / name).write_bytes(content)

    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (archive.folder / merged).write_bytes(whole[:length])
        for direction in DIRECTIONS:
            assert archive.fetched(direction) == numbered(0, 12)


def test_an_object_that_comes_back_is_not_shown_again(archive: Archive) -> None:
    """An attempt to write it that seemed to have failed may arrive when the next one was merged long since."""
    archive.write(0, 12)
    late = archive.files[5]
    content = (archive.folder / late).read_bytes()
    archive.end()
    (archive.folder / late).write_bytes(content)

    assert [read.entry.message for read in archive.read().entries] == numbered(0, 12)
    archive.assert_complete(12)


@stores
def test_a_process_that_is_killed_at_any_moment(
    make_store: Callable[[Path], LocalArtifactStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first byte that it writes to the last object that it removes."""

    class Killed(BaseException):
        pass

    for moment in itertools.count():
        archive = Archive(make_store(tmp_path / str(moment)))
        archive.write(0, 12)
        steps = 0

        def step(moment: int = moment) -> None:
            nonlocal steps
            steps += 1
            if steps > moment:
                raise Killed

        open_file, remove = archive.store.open, os.remove

        def open_slowly(path: str, mode: str = "r", open_file: Any = open_file, step: Any = step) -> Any:
            if mode != "wb":
                return open_file(path, mode)
            step()
            file = open_file(path, mode)

            def write(content: bytes) -> None:
                step()
                file.write(content[:50])
                file.flush()
                step()
                file.write(content[50:])
                file.flush()

            return type("Slow", (), {"write": lambda self, content: write(content), **CONTEXT})()

        def remove_slowly(path: str, step: Any = step, remove: Any = remove) -> None:
            step()
            remove(path)

        written = archive.sizes
        with monkeypatch.context() as patch:
            patch.setattr(archive.store, "open", open_slowly)
            patch.setattr(os, "remove", remove_slowly)
            with suppress(Killed):
                compact(archive.store, archive.uri, Loose(written))
        archive.assert_complete(12)
        if steps <= moment:
            break
    assert moment > 30
    assert len(archive.files) == 1


def test_merging_holds_nothing_up(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, what comes meanwhile is written, and the stream can be ended."""
    goes_on, has_begun = threading.Event(), threading.Event()
    remove = os.remove

    def hang(path: str) -> None:
        has_begun.set()
        assert goes_on.wait(30)
        remove(path)

    monkeypatch.setattr(os, "remove", hang)
    archive.write(0, 100)
    assert has_begun.wait(30)
    archive.write(100, 230)
    archive.exporter.end_stream(archive.stream)

    assert sum(name.size is None for name in archive.names) == 230
    archive.assert_complete(230)
    goes_on.set()
    archive.exporter.close()
    assert [(name.first, name.last) for name in archive.names] == [(0, 99), (100, 199), (200, 229)]
    archive.assert_complete(230)
