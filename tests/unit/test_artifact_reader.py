from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
from zenml.artifact_stores import BaseArtifactStore, LocalArtifactStore
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException, IllegalOperationError
from zenml.models import LogsResponse

from composite_logstore import BACKFILLED, Event, Page, PageRequest, Stream
from composite_logstore.event import ExceptionInfo
from composite_logstore.reading import gaps
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError, LogStoreUnavailableError
from composite_logstore_artifact import lines, parts
from composite_logstore_artifact import reader as reader_module
from composite_logstore_artifact.artifact_stores import ArtifactStoreNotFoundError, ArtifactStoreNotUsableError
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.filtering import LineFilter
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import FolderArchive, listing_store, local_store, make_logs, object_store
from tests.events import NOON, WRITER, make_events, make_stream
from tests.simulation import make_logs as make_logs_of
from tests.simulation import make_store

MakeStore = Callable[[Path], LocalArtifactStore]
all_layouts = pytest.mark.parametrize(
    "make_store", [local_store, object_store, listing_store], ids=["file", "objects", "listed"]
)


class Archive:
    """A stream in an artifact store, with what writes and reads it."""

    def __init__(self, store: BaseArtifactStore) -> None:
        self.store = store
        self.stream = make_stream()
        self.logs = make_logs(self.stream.id)
        self.exporter = ArtifactExporter(find=lambda stream: store)
        self.in_progress = False
        self.reader = ArtifactReader(find=lambda logs: store, is_in_progress=lambda logs: self.in_progress)
        self.count = 0

    def write(self, *messages: str, **changes: Any) -> None:
        self.exporter.export(make_events(messages, self.stream, self.count, **changes))
        self.count += len(messages)

    def read(
        self,
        direction: Literal["newer", "older"] = "newer",
        token: str | None = None,
        limit: int = 1000,
        **filters: Any,
    ) -> Page:
        return self.reader.read(PageRequest(self.logs, direction, token, limit, LogsEntriesFilter(**filters)))


def put(root: Path, logs: LogsResponse, content: bytes) -> None:
    """Write a stream as another program would."""
    path = root / "logs" / f"{logs.id}.log"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def messages(page: Page) -> list[str]:
    return [read.entry.message for read in page.entries]


# --- Pages


@all_layouts
def test_what_was_written_is_read_oldest_first(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a", "b")
    archive.write("c")

    for direction in ("newer", "older"):
        page = archive.read(direction)
        assert messages(page) == ["a", "b", "c"]
        assert [read.event for read in page.entries] == [Event(WRITER, number) for number in range(3)]
        assert page.older is None
        assert page.newer is not None


@all_layouts
def test_pages_from_the_oldest_end(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a", "b", "c")
    archive.write("d", "e")

    first = archive.read("newer", limit=2)
    second = archive.read("newer", first.newer, limit=2)
    third = archive.read("newer", second.newer, limit=2)
    end = archive.read("newer", third.newer, limit=2)

    assert [messages(page) for page in (first, second, third, end)] == [["a", "b"], ["c", "d"], ["e"], []]
    assert first.older is None
    assert end.newer is None
    assert messages(archive.read("older", second.older, limit=5)) == ["a", "b"]
    assert messages(archive.read("older", end.older, limit=1)) == ["e"]


@all_layouts
def test_pages_from_the_newest_end(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a", "b")
    archive.write("c", "d", "e")

    first = archive.read("older", limit=2)
    second = archive.read("older", first.older, limit=2)
    third = archive.read("older", second.older, limit=2)

    assert [messages(page) for page in (first, second, third)] == [["d", "e"], ["b", "c"], ["a"]]
    assert third.older is None
    assert messages(archive.read("newer", second.newer, limit=5)) == ["d", "e"]
    assert messages(archive.read("newer", first.newer, limit=5)) == []


@all_layouts
def test_a_page_that_begins_with_the_first_line_has_nothing_older(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a", "b")

    assert archive.read("older", limit=2).older is None
    assert archive.read("older", limit=1).older is not None


@all_layouts
def test_tokens_stay_valid_while_the_stream_grows(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a", "b")
    newest = archive.read("older", limit=1)

    archive.write("c", "d")

    assert messages(archive.read("newer", newest.newer)) == ["c", "d"]
    assert messages(archive.read("older", newest.older)) == ["a"]
    assert messages(archive.read("older", limit=1)) == ["d"]


@all_layouts
def test_lines_of_all_lengths_across_blocks(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    expected = ["x" * length for length in (1, 64 * 1024, 3, 700_000, 0, 65_000, 1, 2_000_000, 5)]
    archive.write(*expected)

    for limit in (1, 2, 100):
        for direction in ("newer", "older"):
            found: list[str] = []
            token: str | None = None
            for _ in range(20):
                page = archive.read(direction, token, limit)
                found = found + messages(page) if direction == "newer" else messages(page) + found
                token = page.newer if direction == "newer" else page.older
                if token is None:
                    break
            assert found == expected


def test_many_small_objects(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    for number in range(100):
        archive.write(str(number))

    assert messages(archive.read("newer", limit=40)) == [str(number) for number in range(40)]
    page = archive.read("older", limit=40)
    assert messages(page) == [str(number) for number in range(60, 100)]
    assert messages(archive.read("older", page.older)) == [str(number) for number in range(60)]


def test_a_page_of_a_file_reads_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write(*("x" * 1000 for _ in range(5000)))
    read_bytes = 0
    open_file = archive.store.open

    def counting(path: Any, mode: str = "r") -> Any:
        file = open_file(path, mode)
        read = file.read

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def read(self, size: int) -> bytes:
                nonlocal read_bytes
                read_bytes += size
                return bytes(read(size))

        return Counting()

    monkeypatch.setattr(archive.store, "open", counting)

    assert len(archive.read("older", limit=10).entries) == 10
    assert read_bytes < 100_000


@all_layouts
@pytest.mark.parametrize("token", ["", "a", ":", ":-1", ":1.5", ":\u0661", "name:", "a:b:c", ":" + "9" * 5000])
def test_a_malformed_token(make_store: MakeStore, tmp_path: Path, token: str) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a")

    with pytest.raises(ValueError, match=r"token|integer string"):
        archive.read("newer", token)


@pytest.mark.parametrize(
    "name",
    ["..", "../other.log/x.log", "/etc/passwd", "x.log", "\0", "n\n", "9" * 300, "0" * 20 + ".log", "a" * 30_000],
)
@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_token_names_an_object_of_the_stream(tmp_path: Path, name: str, direction: Literal["newer", "older"]) -> None:
    archive = Archive(object_store(tmp_path))
    archive.write("a")

    with pytest.raises(ValueError, match="token"):
        archive.read(direction, f"{name}:0")
    with pytest.raises(ValueError, match="token"):
        list(archive.reader.scan(archive.logs, f"{name}:0"))


@pytest.mark.parametrize(("make_store", "token"), [(local_store, "name.log:0"), (object_store, ":0")])
def test_a_token_of_another_layout(make_store: MakeStore, tmp_path: Path, token: str) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("a")

    with pytest.raises(ValueError, match="not one of this stream"):
        archive.read("newer", token)


def test_a_token_beyond_the_end_is_the_end(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write("a")

    assert messages(archive.read("newer", ":999999")) == []
    assert messages(archive.read("older", ":999999")) == ["a"]


# --- What a line may be


def test_an_entry_is_what_was_logged(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    error = ExceptionInfo("ValueError", "bad", "Traceback")
    archive.write("it failed", level=45, level_name="ALARM", exception=error)

    [read] = archive.read().entries
    assert read.entry == LogEntry(
        message="it failed\nValueError: bad\nTraceback",
        name="train",
        level=LoggingLevels.ERROR,
        timestamp=datetime.fromtimestamp(NOON // 10**9, timezone.utc),
        module="fit",
        filename="/code/train.py",
        lineno=42,
        id=UUID(make_events(["it failed"])[0].uid),
    )


def test_lines_of_zenml_s_own_stores(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    own = LogEntry(message="zenml's", level=LoggingLevels.WARNING, chunk_index=1, total_chunks=2)
    put(tmp_path, archive.logs, own.model_dump_json(exclude_none=True).encode() + b"\n")

    [read] = archive.read().entries

    assert read == (own, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain text", "plain text"),
        (b"[2024-01-02 03:04:05 UTC] old format", "old format"),
        (b"\xff\xfe not UTF-8", "�� not UTF-8"),
        (b'{"message": "cut o', '{"message": "cut o'),
        (b'{"no message": 1}', '{"no message": 1}'),
        (b'{"message": 1}', '{"message": 1}'),
        (b'{"message": "x", "level": 21}', '{"message": "x", "level": 21}'),
        (b"[2024-13-45 99:99:99 UTC] no time", "[2024-13-45 99:99:99 UTC] no time"),
        (b'{"message": "x", "id": "no id"}', '{"message": "x", "id": "no id"}'),
        (b"[" * 5_000, "[" * 5_000),
        (b"[1, 2]", "[1, 2]"),
        (b"null", "null"),
        (b"12", "12"),
        (b"windows\r", "windows"),
        (b'{"message": "nan", "attributes": NaN}', "nan"),
    ],
)
def test_a_line_that_is_no_entry_is_plain_text(tmp_path: Path, line: bytes, message: str) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"before\n" + line + b"\nafter\n")

    for direction in ("newer", "older"):
        page = archive.read(direction)
        assert messages(page) == ["before", message, "after"]
        assert page.entries[1].event is None


def line_of(said: str, **changes: Any) -> bytes:
    """Return a line as ours are, with other fields."""
    [event] = make_events([said], make_stream())
    return json.dumps(json.loads(encode(event)) | changes).encode()


@pytest.mark.parametrize("attributes", [5, 1.5, "zenml.log.backfilled", True, [], ["zenml.log.backfilled"], None])
def test_attributes_that_are_none_hide_nothing(tmp_path: Path, attributes: Any) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"before\n" + line_of("odd", attributes=attributes) + b"\nafter\n")

    for filters in ({}, {"search": "odd"}, {"level": "INFO"}):
        for direction in ("newer", "older"):
            page = archive.read(direction, **filters)
            assert next(read for read in page.entries if read.entry.message == "odd").event == Event(WRITER, 0)
    assert messages(archive.read()) == ["before", "odd", "after"]


@pytest.mark.parametrize(
    "changes",
    [
        {"timestamp": "yesterday"},
        {"timestamp": []},
        {"timestamp": 1e300},
        {"level": 21},
        {"level": "x"},
        {"level": {}},
        {"level": 10**30},
        {"message": 5},
        {"message": None},
        {"id": 5},
        {"lineno": "x"},
        {"name": [[]]},
    ],
    ids=repr,
)
def test_a_line_of_ours_with_a_field_that_makes_no_sense_is_one_damaged_line(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    archive = Archive(local_store(tmp_path))
    odd = line_of("odd", **changes)
    put(tmp_path, archive.logs, line_of("before") + b"\n" + odd + b"\n" + line_of("after", sequence=1) + b"\n")

    for direction in ("newer", "older"):
        page = archive.read(direction)
        assert messages(page) == ["before", odd.decode(), "after"]
        assert [read.event for read in page.entries] == [Event(WRITER, 0), None, Event(WRITER, 1)]


@pytest.mark.parametrize("damage", [b"\xff,", b"\x00", b"}", b"\x1b"])
def test_a_line_of_ours_that_is_damaged_in_its_middle_is_shown(tmp_path: Path, damage: bytes) -> None:
    archive = Archive(local_store(tmp_path))
    odd = line_of("odd").replace(b'"odd"', b'"od"' + damage)
    put(tmp_path, archive.logs, line_of("before") + b"\n" + odd + b"\n" + line_of("after", sequence=1) + b"\n")

    for direction in ("newer", "older"):
        assert messages(archive.read(direction)) == ["before", odd.decode("utf-8", "replace"), "after"]


@pytest.mark.parametrize("writer", ["", 5, None, "w" * 1_000, "\u00fc", ["x"]])
@pytest.mark.parametrize("sequence", [-1, 1 << 62, 1 << 64, 10**30, True, "0", 0.0, None])
def test_a_line_that_does_not_say_which_event_it_is(tmp_path: Path, writer: Any, sequence: Any) -> None:
    archive = Archive(local_store(tmp_path))
    both = [line_of("writer", writer=writer), line_of("sequence", sequence=sequence)]
    put(tmp_path, archive.logs, b"\n".join(both) + b"\n")

    assert [(read.entry.message, read.event) for read in archive.read().entries] == [
        ("writer", None),
        ("sequence", None),
    ]
    [chunk] = archive.reader.scan(archive.logs)
    assert (chunk.writer, list(chunk.sequences), len(chunk.contents)) == ("", [], 2)


def test_empty_lines_are_no_entries(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"\n\n  \na\n\r\n\t\n\nb\n\n")

    assert messages(archive.read("newer")) == ["a", "b"]
    assert messages(archive.read("older")) == ["a", "b"]
    assert messages(archive.read("older", limit=1)) == ["b"]


@pytest.mark.parametrize("line", [b'{"message": "whole"', b"plain", b"12", b'"text"', b"\xf0\x9f"])
@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_line_that_is_being_written_is_returned_once_it_is_whole(
    tmp_path: Path, line: bytes, direction: Literal["newer", "older"]
) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"first\n" + line)
    page = archive.read(direction)
    assert messages(page) == ["first"]

    put(tmp_path, archive.logs, b"first\n" + line + b" end\nlast\n")

    [whole, last] = messages(archive.read("newer", page.newer))
    assert whole.endswith(" end")
    assert last == "last"


def test_a_whole_entry_needs_no_newline(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    content = b'{"message": "first"}'
    put(tmp_path, archive.logs, content)
    page = archive.read("older")
    assert messages(page) == ["first"]

    put(tmp_path, archive.logs, content + b'\n{"message": "second"}\n')

    assert messages(archive.read("newer", page.newer)) == ["second"]
    assert messages(archive.read("older")) == ["first", "second"]


def test_a_line_that_stays_torn_is_shown_once_others_follow(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b'{"message": "to')

    assert messages(archive.read()) == []
    archive.write("next")

    assert messages(archive.read()) == ['{"message": "to', "next"]


@pytest.mark.parametrize("kept", [2, 13, 14, 100])
def test_a_piece_of_an_event_is_not_shown(tmp_path: Path, kept: int) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write("killed in the middle of this")
    [file] = tmp_path.rglob("*.log")
    file.write_bytes(file.read_bytes()[:kept])
    archive.write("killed in the middle of this", "next")

    assert messages(archive.read()) == ["killed in the middle of this", "next"]


# --- Filters


@all_layouts
def test_filters(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    archive.write("Loss 0.5", level=20, level_name="INFO")
    archive.write("loss is NaN (50%)", level=30, level_name="WARNING")
    archive.write("done", level=25, level_name="NOTE")
    archive.write("STRASSE", level=50, level_name="CRITICAL")
    noon = datetime.fromtimestamp(NOON // 10**9, timezone.utc)

    def found(**filters: Any) -> list[str]:
        pages = [messages(archive.read(direction, **filters)) for direction in ("newer", "older")]
        assert pages[0] == pages[1]
        return pages[0]

    assert found(search="LOSS") == ["Loss 0.5", "loss is NaN (50%)"]
    assert found(search="0.5") == ["Loss 0.5"]
    assert found(search=".") == ["Loss 0.5"]
    assert found(search="(50%") == ["loss is NaN (50%)"]
    assert found(search="straße") == ["STRASSE"]
    assert found(level="NOTSET") == ["Loss 0.5", "loss is NaN (50%)", "done", "STRASSE"]
    assert found(level="WARNING") == ["loss is NaN (50%)", "STRASSE"]
    assert found(since=noon + timedelta(milliseconds=2)) == ["done", "STRASSE"]
    assert found(until=noon + timedelta(milliseconds=1)) == ["Loss 0.5", "loss is NaN (50%)"]
    assert found(since=noon, until=noon) == ["Loss 0.5"]
    assert found(search="loss", level="ERROR") == []


def test_filters_on_lines_of_others(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    put(
        tmp_path,
        archive.logs,
        b'{"message": "no level"}\n'
        b'{"message": "with", "level": 40, "timestamp": "2024-01-02T03:04:05Z"}\n'
        b'{"message": "naive", "level": 10, "timestamp": "2024-01-02T03:04:06"}\n'
        b"[2024-01-02 03:04:05 UTC] plain\n"
        b'{"message": "before all time", "level": 0, "timestamp": "0001-01-01T00:00:00+14:00"}\n',
    )

    assert messages(archive.read(level="NOTSET")) == ["no level", "with", "naive", "plain", "before all time"]
    assert messages(archive.read(level="DEBUG")) == ["with", "naive", "plain"]
    assert messages(archive.read(level="ERROR")) == ["with"]
    assert messages(archive.read(since="2024-01-02T03:04:06Z")) == ["naive"]
    assert messages(archive.read(until="2024-01-02T03:04:05Z")) == ["with", "plain"]


@all_layouts
def test_pages_of_what_a_filter_wants(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))
    for number in range(20):
        archive.write(*(f"{'odd' if number % 2 else 'even'} {number}.{part}" for part in range(2)))

    first = archive.read("older", limit=3, search="odd")
    second = archive.read("older", first.older, limit=100, search="odd")
    nothing = archive.read("newer", first.newer, search="odd")

    assert messages(first) == ["odd 17.1", "odd 19.0", "odd 19.1"]
    assert len(second.entries) == 17
    assert second.older is None
    assert nothing.entries == []
    assert nothing.newer is None


# --- Large streams


def count_reads(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by how many bytes of the stream were read."""
    sizes: list[int] = []
    for kind in (parts._File, parts._Object):
        read = kind._read

        def counting(part: Any, begin: int, end: int, read: Any = read) -> bytes:
            sizes.append(end - begin)
            return bytes(read(part, begin, end))

        monkeypatch.setattr(kind, "_read", counting)
    return sizes


@all_layouts
@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_page_reads_so_much_and_goes_on_from_there(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: Literal["newer", "older"]
) -> None:
    monkeypatch.setattr(reader_module, "_MOST_BYTES", 200_000)
    monkeypatch.setattr(reader_module, "_SEARCHED_BLOCK", 50_000)
    archive = Archive(make_store(tmp_path))
    for number in range(20):
        archive.write(*(["wanted"] if number == 9 else []), *("x" * 1000 for _ in range(50)))
    sizes = count_reads(archive, monkeypatch)

    found, pages, token = [], 0, None
    while pages == 0 or token is not None:
        sizes.clear()
        page = archive.read(direction, token, search="wanted")
        assert sum(sizes) < 400_000 + 16 * 50_000  # further objects are read ahead
        found += messages(page)
        token = page.newer if direction == "newer" else page.older
        pages += 1

    assert found == ["wanted"]
    assert pages >= 5


def test_an_index_beside_the_file_spares_what_a_filter_cannot_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(local_store(tmp_path))
    for number in range(100):
        level, name = (40, "ERROR") if number == 20 else (20, "INFO")
        archive.write(*(f"{number} " + "x" * 1000 for _ in range(100)), level=level, level_name=name)
    index = tmp_path / "logs" / f"{archive.logs.id}.log.index"
    size = (tmp_path / "logs" / f"{archive.logs.id}.log").stat().st_size
    sizes = count_reads(archive, monkeypatch)
    noon = datetime.fromtimestamp(NOON // 10**9, timezone.utc)

    def found(**filters: Any) -> tuple[set[str], int]:
        pages = [archive.read(direction, **filters) for direction in ("newer", "older")]
        assert messages(pages[0]) == messages(pages[1])
        read = sum(sizes)
        sizes.clear()
        return {message.split()[0] for message in messages(pages[0])}, read

    wanted: list[tuple[dict[str, Any], set[str]]] = [
        ({"level": "ERROR"}, {"20"}),
        ({"since": noon + timedelta(milliseconds=9_850)}, {"98", "99"}),
        ({"until": noon + timedelta(milliseconds=99)}, {"0"}),
        ({"level": "CRITICAL"}, set()),
    ]
    whole = index.read_bytes()
    with_index = [found(**filters) for filters, _ in wanted]
    index.unlink()
    without = [found(**filters) for filters, _ in wanted]
    rebuilt = [found(**filters) for filters, _ in wanted]
    index.write_bytes(b"x" + whole[: len(whole) // 2] + b"\xff\n[1,2,3] 12345678\n" + whole[len(whole) // 2 : -3])
    corrupt = [found(**filters) for filters, _ in wanted]

    for results in (with_index, without, rebuilt, corrupt):
        assert [result[0] for result in results] == [names for _, names in wanted]
    assert all(read < 3_000_000 for _, read in with_index)
    assert without[0][1] > size
    assert all(read < 5_000_000 for _, read in [*without[1:], *rebuilt, *corrupt])
    assert index.stat().st_size < size / 200


def test_an_index_of_a_file_that_is_no_longer_there_counts_for_nothing(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write(*("x" * 100 for _ in range(100)))
    path = tmp_path / "logs" / f"{archive.logs.id}.log"
    other = Archive(local_store(tmp_path))
    other.count = 1000
    other.write(*("y" * 100 for _ in range(100)), level=40, level_name="ERROR")

    path.write_bytes((tmp_path / "logs" / f"{other.logs.id}.log").read_bytes())

    assert len(archive.read(level="ERROR").entries) == 100
    path.write_bytes(path.read_bytes()[:5_000])
    assert len(archive.read(level="ERROR").entries) == 5_000 // len(path.read_bytes().split(b"\n")[0])


@pytest.mark.parametrize(
    "values",
    [
        b"5",
        b"null",
        b"{}",
        b'"text"',
        b"[]",
        b"[1,2,3]",
        b"[0,1,2,3,4,5,6]",
        b'[0,"1",2,3,4,5]',
        b"[0,null,2,3,4,5]",
        b"[0.0,100,2,3,4,5]",
        b"[true,100,2,3,4,5]",
        b"[0,100,2,3,4,[]]",
        b"[-100,100,2,3,4,5]",
        b"[100,0,2,3,4,5]",
        b"[0,0,0,0,0,0]",
        b"[18446744073709551615,18446744073709551615,2,3,4,5]",
        b"not JSON",
        b"\xff",
        b"[" * 5_000,
        b"",
    ],
)
def test_a_line_of_the_index_with_a_right_checksum_and_a_wrong_shape_counts_for_nothing(
    tmp_path: Path, values: bytes
) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write("quiet")
    archive.write("loud", level=40, level_name="ERROR")
    index = tmp_path / "logs" / f"{archive.logs.id}.log.index"
    index.write_bytes(b"%s %08x\n" % (values, zlib.crc32(values)) + index.read_bytes())

    for direction in ("newer", "older"):
        assert messages(archive.read(direction, level="ERROR")) == ["loud"]
        assert messages(archive.read(direction, since="2020-01-01T00:00:00Z")) == ["quiet", "loud"]


def test_an_index_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    (tmp_path / "logs" / f"{archive.logs.id}.log.index").mkdir(parents=True)
    archive.write("a", level=40, level_name="ERROR")

    assert messages(archive.read(level="ERROR")) == ["a"]


def test_a_line_of_50_mb(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    huge = b'{"message": "%s"}' % (b"x" * 50_000_000)
    put(tmp_path, archive.logs, b"first\n" + huge + b"\n" + b"y" * 50_000_000 + b"\nlast\n")

    for direction in ("newer", "older"):
        page = archive.read(direction)
        assert [len(message) for message in messages(page)] == [5, 50_000_000, 50_000_000, 4]
        assert messages(archive.read(direction, search="last")) == ["last"]
        one = archive.read(direction, limit=1)
        two = archive.read(direction, one.newer if direction == "newer" else one.older, limit=1)
        assert len(messages(two)[0]) == 50_000_000


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_what_has_no_newline_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: Literal["newer", "older"]
) -> None:
    monkeypatch.setattr(parts, "LONGEST_LINE", 300_000)
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"first\n" + b"x" * 2_000_000 + b"\nlast\n")

    found = messages(archive.read(direction))

    assert (found[0], found[-1]) == ("first", "last")
    assert "".join(found[1:-1]) == "x" * 2_000_000
    assert len(found) > 3


# --- What is not there


@all_layouts
def test_a_stream_that_is_not_there(make_store: MakeStore, tmp_path: Path) -> None:
    archive = Archive(make_store(tmp_path))

    with pytest.raises(DoesNotExistException) as raised:
        archive.read()
    for words in ("'archive'", "set 'artifact_store' of this child to the old one"):
        assert words in str(raised.value)

    archive.in_progress = True
    assert archive.read() == Page()


def test_an_empty_file_is_an_empty_page(tmp_path: Path) -> None:
    archive = Archive(local_store(tmp_path))
    put(tmp_path, archive.logs, b"")

    assert archive.read("newer") == Page()
    assert archive.read("older") == Page()


def reading(error: Exception) -> None:
    def find(logs: LogsResponse) -> BaseArtifactStore:
        raise error

    reader = ArtifactReader(find=find)
    reader.read(PageRequest(make_logs(), "newer", None, 1, LogsEntriesFilter()))


def test_an_artifact_store_that_is_not_there() -> None:
    with pytest.raises(DoesNotExistException, match=r"no longer exists.*set 'artifact_store' of this child"):
        reading(ArtifactStoreNotFoundError("the stack of run 'r' no longer exists"))
    with pytest.raises(LogStoreUnavailableError, match="install s3"):
        reading(ArtifactStoreNotUsableError("install s3"))


class NotConnected(Exception):
    """As of a client library: from no module of Python's own."""


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (PermissionError(13, "secret"), LogStoreUnavailableError, "'archive' refuses access. Check its credentials"),
        (TimeoutError("secret"), LogStoreUnavailableError, "could not be read: TimeoutError. Try again later"),
        (OSError(5, "secret"), LogStoreUnavailableError, "could not be read: Input/output error"),
        (NotConnected("secret"), LogStoreUnavailableError, "could not be read: NotConnected"),
        (IllegalOperationError("secret"), LogStoreError, "which the ZenML server does not read"),
        (ZeroDivisionError(), ZeroDivisionError, ""),
    ],
)
def test_errors_say_what_to_do_and_repeat_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], words: str
) -> None:
    archive = Archive(local_store(tmp_path))
    archive.write("a")

    def fail(path: str, mode: str = "r") -> None:
        raise error

    monkeypatch.setattr(archive.store, "open", fail)

    with pytest.raises(expected) as raised:
        archive.read()
    assert words in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_listing_that_the_filesystem_remembers_is_not_trusted(tmp_path: Path) -> None:
    archive = Archive(listing_store(tmp_path))
    archive.write("a")
    assert messages(archive.read()) == ["a"]
    archive.write("b")
    assert messages(archive.read()) == ["a", "b"]


def test_the_settings_make_the_reader() -> None:
    reader = ArtifactChildConfig(name="archive", type="artifact").create_reader()

    assert isinstance(reader, ArtifactReader)
    assert reader.in_order
    assert reader.max_page_size >= 50_000
    reader.close()


def test_an_object_that_is_no_json_has_a_name_with_a_colon(tmp_path: Path) -> None:
    archive = Archive(object_store(tmp_path))
    folder = tmp_path / "logs" / f"{archive.logs.id}.log"
    folder.mkdir(parents=True)
    (folder / "1:2.log").write_text(json.dumps({"message": "a", "id": str(uuid4())}) + "\nb\n")

    page = archive.read("newer", limit=1)

    assert messages(archive.read("newer", page.newer)) == ["b"]


@pytest.mark.parametrize("limit", [1, 4, 100])
@pytest.mark.parametrize(("recovered", "other"), [(-60, 0), (60, 0), (-60, -30), (60, -90)])
def test_no_event_is_hidden_when_a_clock_goes_back(tmp_path: Path, limit: int, recovered: int, other: int) -> None:
    """Between a death and the recovery, which sends the last export again; or another pod's clock is slower."""
    child = FolderArchive(name="archive", type="artifact", root=str(tmp_path), is_file=False)
    store = make_store(child)
    logs = make_logs_of(store)
    stream = Stream(logs.id, {})
    artifact_store = child.store()
    for writer, first, end, seconds in (
        (WRITER, 0, 5, 0),
        ("f" * 15, 0, 6, other),
        (WRITER, 5, 10, 1),
        (WRITER, 5, 15, recovered),
    ):
        exporter = ArtifactExporter(find=lambda stream: artifact_store, clock=lambda at=seconds: NOON + at * 10**9)
        exporter.export(make_events([str(number) for number in range(first, end)], stream, first, writer))
    for start, way in (("oldest", "after"), ("newest", "before")):
        found, page = [], store.fetch(logs, start=start, limit=limit)
        while True:
            found += [str(entry.id) for entry in page.items]
            if (cursor := getattr(page, way)) is None:
                break
            page = store.fetch(logs, **{way: cursor})
        assert len(found) == len(set(found)) == 21


# --- What is missing


class TestGaps:
    """An archive is looked through before anything is called lost: it may be elsewhere in it."""

    @pytest.fixture(autouse=True)
    def _finished(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gaps, "is_finished", lambda logs: True)

    def notices(self, root: Path, archive: Archive, limit: int = 3) -> list[str]:
        config = FolderArchive(name="archive", type="artifact", root=str(root), is_file=archive.store.config.is_local)
        store = make_store(config)
        logs = make_logs_of(store, id=archive.logs.id)
        found = []
        for start, way in (("oldest", "after"), ("newest", "before")):
            page = store.fetch(logs, start=start, limit=limit)
            while True:
                found += [entry.message for entry in page.items if entry.name == "composite_logstore"]
                cursor = getattr(page, way)
                if cursor is None:
                    break
                page = store.fetch(logs, **{way: cursor})
        return found

    @pytest.mark.parametrize("make_store", [local_store, object_store])
    def test_what_was_copied_there_later_is_not_missing(self, make_store: MakeStore, tmp_path: Path) -> None:
        archive = Archive(make_store(tmp_path))
        archive.write("0", "1", "2")
        archive.count = 6
        archive.write("6", "7", "8", "9")
        archive.exporter.end_stream(archive.stream)
        archive.count = 3
        archive.write("3", "4", "5", metadata={BACKFILLED: True})

        assert self.notices(tmp_path, archive) == []

    @pytest.mark.parametrize("make_store", [local_store, object_store])
    def test_what_is_lost_is_told_once_from_each_end(self, make_store: MakeStore, tmp_path: Path) -> None:
        archive = Archive(make_store(tmp_path))
        archive.write("0", "1", "2")
        archive.count = 6
        archive.write("6", "7", "8", "9")

        assert (
            self.notices(tmp_path, archive)
            == [f"Child 'archive' is missing 3 entries here, between 2 and 6 of writer {WRITER}."] * 2
        )

    def test_a_stream_that_takes_too_long_to_look_through(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gaps, "LONGEST_LOOK_SECONDS", -1.0)
        archive = Archive(local_store(tmp_path))
        archive.write("0", "1", "2")
        archive.count = 6
        archive.write("6", "7", "8", "9")

        [notice] = self.notices(tmp_path, archive, limit=100)[:1]
        assert "is missing" not in notice
        assert "3 entries are missing on this page, the first between 2 and 6" in notice
        assert "not checked" in notice

    def test_what_cannot_be_looked_for_fails_no_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> Any:
            raise ValueError("as if the caller were at fault")

        archive = Archive(local_store(tmp_path))
        archive.write("0", "1", "2")
        archive.count = 6
        archive.write("6", "7", "8", "9")
        monkeypatch.setattr(ArtifactReader, "scan", fail)

        assert self.notices(tmp_path, archive) == []


@pytest.mark.parametrize(
    ("attributes", "rank"),
    [
        (None, None),
        ({}, None),
        ({"zenml.log.rank": 3}, 3),
        ({"zenml.log.rank": 0, "process.pid": 7}, 0),
        ({"zenml.log.rank": "3"}, None),
        ({"zenml.log.rank": True}, None),
        ("no attributes", None),
        (["zenml.log.rank"], None),
    ],
)
def test_an_entry_has_the_rank_of_its_process(attributes: Any, rank: int | None) -> None:
    changes = {} if attributes is None else {"attributes": attributes}
    text = line_of("hello", **changes)
    read = LineFilter(LogsEntriesFilter()).parse(text)
    assert read is not None
    for entry in (read.entry, lines.entry_of(text)):
        assert entry is not None
        assert (entry.message, getattr(entry, "rank", None)) == ("hello", rank)
