from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
from zenml.artifact_stores import BaseArtifactStore, LocalArtifactStore
from zenml.enums import LoggingLevels
from zenml.log_stores.artifact.artifact_log_store import fetch_log_records, parse_log_entry, prepare_logs_uri

from composite_logstore import PageRequest, RetryableError, Stream, TooLargeError, UnavailableError
from composite_logstore.event import ExceptionInfo, LogEvent, TraceContext
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_artifact.artifact_stores import ArtifactStoreNotFoundError, ArtifactStoreNotUsableError
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.lines import is_complete
from composite_logstore_artifact.parts import ListingError
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import Faulty, local_store, make_artifact_store, make_logs, object_store, with_faults
from tests.events import NOON, WRITER, make_events, make_stream

OTHER_WRITER = "fedcba987654321"


def exporter_to(store: BaseArtifactStore, clock: Callable[[], int] = lambda: NOON) -> ArtifactExporter:
    return ArtifactExporter(find=lambda stream: store, clock=clock)


def place(store: BaseArtifactStore, stream: Stream) -> Path:
    return Path(prepare_logs_uri(store, stream.id))


def lines_in(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]


def messages_in(path: Path) -> list[str]:
    return [line["message"] for line in lines_in(path)]


def one_event(message: str = "hello", **changes: Any) -> LogEvent:
    return make_events([message])[0]._replace(**changes)


# --- What a line says


def test_a_line_is_a_log_entry_of_zenml() -> None:
    event = one_event(time_unix_nano=NOON + 123_456_789)

    entry = parse_log_entry(encode(event).decode())

    assert entry is not None
    assert entry.message == "hello"
    assert entry.level == LoggingLevels.INFO
    assert entry.timestamp == datetime.fromtimestamp(NOON // 10**9, timezone.utc).replace(microsecond=123_456)
    assert (entry.name, entry.filename, entry.lineno, entry.module) == ("train", "/code/train.py", 42, "fit")
    assert str(entry.id) == event.uid


def test_a_line_keeps_what_zenml_has_no_place_for() -> None:
    event = one_event(
        trace=TraceContext(0xABC, 0xDEF, 1),
        attributes={"loss": 0.25, "nested": {"list": [1, None, "x"]}},
        metadata={"zenml.part": 1},
    )

    line = json.loads(encode(event))

    assert {key: line[key] for key in ("writer", "sequence", "number", "time_unix_nano")} == {
        "writer": WRITER,
        "sequence": 0,
        "number": 0,
        "time_unix_nano": NOON,
    }
    assert line["trace_id"] == "00000000000000000000000000000abc"
    assert line["span_id"] == "0000000000000def"
    assert line["flags"] == 1
    assert line["attributes"] == {"loss": 0.25, "nested": {"list": [1, None, "x"]}, "zenml.part": 1}


def test_a_line_leaves_out_what_is_empty() -> None:
    line = json.loads(encode(one_event(file="", line=0, function="")))

    assert line.keys() == {
        "timestamp", "level", "name", "message", "id", "writer", "sequence", "number", "time_unix_nano"
    }  # fmt: skip


def test_an_exception_is_shown_beneath_the_message_and_kept_by_itself() -> None:
    error = ExceptionInfo("ValueError", "bad", "Traceback …\nValueError: bad\n")

    line = json.loads(encode(one_event("it failed", exception=error)))

    assert line["message"] == "it failed\nValueError: bad\nTraceback …\nValueError: bad"
    assert line["exception"] == error._asdict()
    assert line["message"].startswith("it failed\nValueError")


@pytest.mark.parametrize(
    ("level", "name", "expected", "extra"),
    [
        (10, "DEBUG", LoggingLevels.DEBUG, {}),
        (30, "WARNING", LoggingLevels.WARNING, {}),
        (50, "CRITICAL", LoggingLevels.CRITICAL, {}),
        (5, "TRACE", LoggingLevels.NOTSET, {"level_number": 5, "level_name": "TRACE"}),
        (25, "SUCCESS", LoggingLevels.INFO, {"level_number": 25, "level_name": "SUCCESS"}),
        (99, "Level 99", LoggingLevels.CRITICAL, {"level_number": 99, "level_name": "Level 99"}),
        (20, "NOTE", LoggingLevels.INFO, {"level_name": "NOTE"}),
        (-3, "Level -3", LoggingLevels.NOTSET, {"level_number": -3, "level_name": "Level -3"}),
    ],
)
def test_a_level_becomes_the_standard_one_below_it(
    level: int, name: str, expected: LoggingLevels, extra: dict[str, Any]
) -> None:
    line = json.loads(encode(one_event(level=level, level_name=name)))

    assert line["level"] == expected.value
    assert {key: line[key] for key in ("level_number", "level_name") if key in line} == extra


@pytest.mark.parametrize(
    "message",
    [
        "a\nb\r\nc\rd",
        "\x00 NUL \x1b[31mred\x1b[0m \x85 \u2028 \u2029 \x1c",
        " leading and trailing \n",
        "x" * 5_000_000,
        '{"message": "JSON"}',
        "ünïcödé 🦀",
    ],
    ids=["newlines", "control", "blanks", "5 MB", "json", "unicode"],
)
def test_any_message_is_one_line_that_zenml_reads_back(message: str, tmp_path: Path) -> None:
    store = local_store(tmp_path)
    events = make_events([message, "next"])

    exporter_to(store).export(events)

    assert place(store, events[0].stream).read_bytes().count(b"\n") == 2
    assert messages_in(place(store, events[0].stream)) == [message, "next"]
    entries = fetch_log_records(store, str(place(store, events[0].stream)), 10)
    assert [entry.message for entry in entries] == [message, "next"]


def test_numbers_that_json_does_not_have_become_null() -> None:
    values = {"nan": float("nan"), "infinity": float("inf"), "finite": 1.5}

    assert json.loads(encode(one_event(attributes=values)))["attributes"] == {
        "nan": None,
        "infinity": None,
        "finite": 1.5,
    }


@pytest.mark.parametrize(
    "changes", [{"file": "/code/\ud800.py"}, {"line": 1 << 80}, {"time_unix_nano": 1 << 70}, {"logger_name": 7}]
)
def test_no_event_is_beyond_encoding(changes: dict[str, Any]) -> None:
    line = encode(one_event(**changes))

    assert line.count(b"\n") == 1
    assert json.loads(line)["message"] == "hello"


# --- Where it is written


def test_a_local_store_gets_one_file_for_each_stream(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    first, second = make_stream(), make_stream()
    exporter = exporter_to(store)
    events = [*make_events(["a", "b"], first), *make_events(["c"], second, 2), *make_events(["d"], first, 3)]

    assert exporter.export(events) == 0
    assert exporter.export(make_events(["e"], second, 4)) == 0

    assert messages_in(tmp_path / "logs" / f"{first.id}.log") == ["a", "b", "d"]
    assert messages_in(tmp_path / "logs" / f"{second.id}.log") == ["c", "e"]


def test_a_remote_store_gets_an_object_for_each_export(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    exporter = exporter_to(store)

    exporter.export(make_events(["a", "b"], stream))
    exporter.export(make_events(["c"], stream, 2))

    folder = tmp_path / "logs" / f"{stream.id}.log"
    micros = NOON // 1000
    assert sorted(os.listdir(folder)) == [
        f"{NOON:020d}-{NOON:020d}-{WRITER}-0-1-{micros}-{micros + 1000}-20.log",
        f"{NOON + 1:020d}-{NOON + 1:020d}-{WRITER}-2-2-{micros + 2000}-{micros + 2000}-20.log",
    ]
    assert messages_in(folder) == ["a", "b", "c"]
    assert [entry.message for entry in fetch_log_records(store, str(folder), 10)] == ["a", "b", "c"]


def test_names_sort_in_the_order_of_arrival_though_the_clock_goes_back(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    times = iter([NOON, NOON - 10**9, NOON - 10**9, NOON + 5])
    exporter = exporter_to(store, clock=lambda: next(times))

    for number in range(4):
        exporter.export(make_events([str(number)], stream, number))

    assert messages_in(place(store, stream)) == ["0", "1", "2", "3"]


class Late(LocalArtifactStore):
    """Another writer finds the disk full when the end of the file has just been looked at, and leaves half a line.

    Then the disk has room for so many bytes, and for all once `rooms` is empty.
    """

    rooms: ClassVar[list[int | None]] = []

    def open(self, path: str, mode: str = "r") -> Any:
        if not (mode.startswith("a") and path.endswith(".log") and self.rooms):
            return super().open(path, mode)
        room = self.rooms.pop(0)
        file = Faulty(path, sys.maxsize if room is None else room)
        read, looks = file.read, [True]

        def read_and_lose(size: int = -1) -> bytes:
            last = read(size)
            if looks:
                looks.pop()
                with open(path, "ab") as other:
                    other.write(b'{"timestamp":"2026-')
            return last

        file.read = read_and_lose  # type: ignore[method-assign]
        return file


@pytest.mark.parametrize("room", [None, *range(1, 1_600, 50)])
def test_half_a_line_that_another_writer_leaves_in_the_last_moment_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    monkeypatch.setattr(Late, "rooms", [])
    store = make_artifact_store(Late, local_store(tmp_path).config, "local")
    stream = make_stream()
    exporter = exporter_to(store)
    exporter.export(make_events(["before"], stream))
    Late.rooms.append(room)
    events = make_events(["a", "b"], stream, 1)
    # As the worker does: again until it is taken.
    with suppress(RetryableError):
        exporter.export(events)
    exporter.export(events)

    whole = [line for line in place(store, stream).read_bytes().split(b"\n") if is_complete(line)]
    assert {json.loads(line)["message"] for line in whole} == {"a", "b", "before"}
    assert room is not None or len(whole) == 3


@pytest.mark.parametrize("writer", [WRITER, "a writer/of another program"])
def test_what_a_dead_process_left_comes_after_what_it_wrote_by_a_clock_that_was_ahead(
    tmp_path: Path, writer: str
) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    events = [event._replace(writer=writer) for event in make_events(list("abcdef"), stream)]
    exporter_to(store, clock=lambda: NOON + 900 * 10**9).export(events[:2])
    others = make_events(["other"], stream)[0]._replace(writer=OTHER_WRITER)

    for begin in (2, 4):
        # Each time another process: the first of them dies too.
        adopter = exporter_to(store, clock=lambda: NOON)
        adopter.export(events[begin : begin + 1])
        adopter.export(events[begin + 1 : begin + 2])
    adopter.export([others])

    # The clock that was ahead moves nobody else's.
    assert messages_in(place(store, stream)) == ["other", "a", "b", "c", "d", "e", "f"]


def test_an_object_from_beyond_the_end_of_time_moves_no_other_there(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    folder = place(store, stream)
    folder.mkdir(parents=True)
    (folder / f"{'9' * 20}-{'9' * 20}-{WRITER}-0-0-0-0-20.log").touch()

    exporter_to(store).export(make_events(["a", "b"], stream)[1:])

    assert min(os.listdir(folder)).startswith(f"{NOON:020d}-")


def test_copies_come_after_what_was_written_first(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    events = make_events(list("abcd"), stream)
    exporter_to(store, clock=lambda: NOON + 900 * 10**9).export(events[:3])

    # Where it had come to is not known, and some events are damaged.
    exporter_to(store).export([events[0], events[3]])

    assert list(dict.fromkeys(messages_in(place(store, stream)))) == list("abcd")


def test_what_was_listed_when_nothing_could_be_written_is_listed_again(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    exporter_to(store, clock=lambda: NOON + 900 * 10**9).export(make_events(["a"], stream))
    folder = tmp_path / "logs"
    # Where a folder should be, there is a file: no objects are there, and none can be written.
    folder.rename(tmp_path / "elsewhere")
    folder.touch()
    adopter = exporter_to(store)
    with pytest.raises((RetryableError, UnavailableError)):
        adopter.export(make_events(["b"], stream, 1))
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)

    adopter.export(make_events(["b"], stream, 1))

    assert messages_in(place(store, stream)) == ["a", "b"]


@pytest.mark.parametrize("writes", [1, 5])
def test_one_listing_for_a_stream_is_enough(tmp_path: Path, writes: int) -> None:
    store = with_faults(object_store(tmp_path), [])
    listings = []
    listdir = store.listdir
    store.__dict__["listdir"] = lambda path: listings.append(path) or listdir(path)
    stream = make_stream()
    exporter = exporter_to(store)

    for number in range(writes):
        exporter.export(make_events(["a"], stream, number))

    assert len(listings) <= 1


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ListingError()])
def test_who_may_write_and_not_list_may_go_on_writing(tmp_path: Path, error: Exception) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    folder = place(store, stream)
    folder.mkdir(parents=True)

    def refuse(path: Any) -> Any:
        raise error

    store.__dict__["listdir"] = refuse
    exporter_to(store).export(make_events(["a"], stream))

    assert messages_in(folder) == ["a"]


def test_a_listing_that_fails_is_tried_again(tmp_path: Path) -> None:
    store = object_store(tmp_path)
    stream = make_stream()
    folder = place(store, stream)
    folder.mkdir(parents=True)
    errors = [OSError(errno.ETIMEDOUT, "late")]
    listdir = store.listdir

    def fail(path: Any) -> Any:
        if errors:
            raise errors.pop()
        return listdir(path)

    store.__dict__["listdir"] = fail
    exporter = exporter_to(store)
    with pytest.raises(RetryableError):
        exporter.export(make_events(["a"], stream))
    exporter.export(make_events(["a"], stream))

    assert messages_in(folder) == ["a"]


def test_where_zenml_says_so_the_folder_has_no_extension(tmp_path: Path) -> None:
    class ImmutableConfig(type(object_store(tmp_path).config)):  # type: ignore[misc]
        IS_IMMUTABLE_FILESYSTEM = True

    store = make_artifact_store(LocalArtifactStore, ImmutableConfig(path=str(tmp_path)), "objects")
    events = make_events(["a"])

    exporter_to(store).export(events)

    assert messages_in(tmp_path / "logs" / str(events[0].stream.id)) == ["a"]


def test_streams_go_to_their_own_artifact_stores(tmp_path: Path) -> None:
    first, second = make_stream(), make_stream()
    second.artifact_store_id = None
    stores = {first.id: local_store(tmp_path / "1"), second.id: local_store(tmp_path / "2")}
    found: list[Stream] = []

    def find(stream: Stream) -> BaseArtifactStore:
        found.append(stream)
        return stores[stream.id]

    exporter = ArtifactExporter(find=find)
    exporter.export([*make_events(["a"], first), *make_events(["b"], second, 1)])
    exporter.export([*make_events(["c"], first, 2), *make_events(["d"], second, 3)])

    assert messages_in(place(stores[first.id], first)) == ["a", "c"]
    assert messages_in(place(stores[second.id], second)) == ["b", "d"]
    assert found == [first, second]  # each only once


def test_several_processes_append_to_one_file(tmp_path: Path) -> None:
    # So large that each export takes several pages: they must not come between one another.
    script = """
import sys
from pathlib import Path
from uuid import UUID
from tests.artifact_stores import local_store
from tests.events import make_events, make_stream
from composite_logstore_artifact.exporter import ArtifactExporter

root, id, writer = sys.argv[1:]
stream = make_stream()
stream.id = UUID(id)
store = local_store(Path(root))
exporter = ArtifactExporter(find=lambda stream: store)
for export in range(50):
    exporter.export(make_events([f"{number} " + "x" * 2000 for number in range(20)], stream, export * 20, writer))
"""
    stream = make_stream()
    writers = [WRITER, OTHER_WRITER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(stream.id), writer], env=environment)
        for writer in writers
    ]

    assert [process.wait(120) for process in processes] == [0, 0]

    lines = lines_in(tmp_path / "logs" / f"{stream.id}.log")
    for writer in writers:
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(1000))
    assert len(lines) == 2000


# --- How long events wait for a fuller batch


def test_an_object_takes_what_is_logged_in_ten_seconds_unless_something_else_is_set(tmp_path: Path) -> None:
    def delay(store: BaseArtifactStore, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int | None:
        exporter = ArtifactChildConfig(name="archive", type="artifact", **settings).create_exporter()
        monkeypatch.setattr(exporter, "_find", lambda stream: store)
        assert exporter.schedule_delay_millis is None
        exporter.export(make_events(["a"]))
        return exporter.schedule_delay_millis

    with pytest.MonkeyPatch.context() as patch:
        assert delay(object_store(tmp_path), patch) == 10_000
        assert delay(local_store(tmp_path), patch) is None
        assert delay(object_store(tmp_path), patch, schedule_delay_millis=3_000) is None


# --- What goes wrong


def test_a_stream_that_was_written_is_not_written_again(tmp_path: Path) -> None:
    store = with_faults(local_store(tmp_path), [None, OSError(errno.EIO, "broken")])
    first, second = make_stream(), make_stream()
    batch = [*make_events(["a"], first), *make_events(["b"], second, 1), *make_events(["c"], first, 2)]
    exporter = exporter_to(store)

    with pytest.raises(RetryableError, match="Input/output error"):
        exporter.export(batch)
    exporter.export(batch)

    assert messages_in(place(store, first)) == ["a", "c"]
    assert messages_in(place(store, second)) == ["b"]


def test_half_of_a_batch_that_was_split_is_not_written_again(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    batch = make_events(["a", "b", "c"])
    exporter = exporter_to(store)

    exporter.export(batch)
    exporter.export(batch[:2])
    exporter.export(batch[2:])

    assert messages_in(place(store, batch[0].stream)) == ["a", "b", "c"]


@pytest.mark.parametrize("room", [0, 1, 300, 301, 900])
def test_a_full_disk_loses_and_repeats_nothing(tmp_path: Path, room: int) -> None:
    store = with_faults(local_store(tmp_path), [None, room, room])
    exporter = exporter_to(store)
    stream = make_stream()
    exporter.export(make_events(["before"], stream))
    batch = make_events(["a", "b", "c", "d"], stream, 1)

    with pytest.raises(RetryableError, match="is full; free some space"):
        exporter.export(batch)
    try:
        exporter.export(batch)
    except RetryableError:
        exporter.export(batch)

    complete = []
    for line in place(store, stream).read_bytes().split(b"\n"):
        try:
            complete.append(json.loads(line)["message"])
        except ValueError:
            continue  # what was left of a line
    assert complete == ["before", "a", "b", "c", "d"]


def test_a_line_that_another_writer_left_torn_swallows_none_of_ours(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    events = make_events(["ours"])
    path = place(store, events[0].stream)
    path.parent.mkdir()
    path.write_bytes(b'{"message": "whole"}\n{"message": "to')

    exporter_to(store).export(events)

    assert path.read_bytes().startswith(b'{"message": "whole"}\n{"message": "to\n{"timestamp"')


def test_a_lost_answer_leaves_no_copy(tmp_path: Path) -> None:
    store = with_faults(object_store(tmp_path), [(TimeoutError("no answer"),), None])
    batch = make_events(["a", "b", "c"])
    times = iter(range(NOON, NOON + 10))
    exporter = exporter_to(store, clock=lambda: next(times))

    with pytest.raises(RetryableError):
        exporter.export(batch)
    exporter.export(batch[:2])  # the core may split it
    exporter.export(batch[2:])

    assert messages_in(place(store, batch[0].stream)) == ["a", "b", "c"]
    assert len(list(place(store, batch[0].stream).iterdir())) == 2


def test_a_name_never_says_less_than_is_in_the_object(tmp_path: Path) -> None:
    store = with_faults(object_store(tmp_path), [(TimeoutError("no answer"),), None])
    stream = make_stream()
    batch = [*make_events(["a", "b"], stream), *make_events(["c"], stream, 2, level=40, level_name="ERROR")]
    exporter = exporter_to(store)

    with pytest.raises(RetryableError):
        exporter.export(batch[:2])
    exporter.export(batch)

    reader = ArtifactReader(find=lambda logs: store)
    page = reader.read(PageRequest(make_logs(stream.id), "newer", None, 10, LogsEntriesFilter(level="ERROR")))
    assert [read.entry.message for read in page.entries] == ["c"]


def test_what_ended_is_forgotten(tmp_path: Path) -> None:
    store = local_store(tmp_path)
    events = make_events(["a"])
    exporter = exporter_to(store)
    exporter.export(events)

    exporter.end_stream(events[0].stream)
    exporter.end_stream(events[0].stream)

    assert exporter._progress == {}
    exporter.close()


class NotConnected(Exception):
    """As of a client library: from no module of Python's own."""


class NoCredentialsError(Exception):
    pass


class Forbidden(Exception):
    status_code = 403


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (PermissionError(errno.EACCES, "secret"), UnavailableError, "'archive' refuses access; check its cred"),
        (NoCredentialsError("secret"), UnavailableError, "refuses access"),
        (Forbidden("secret"), UnavailableError, "refuses access"),
        (OSError(errno.EINVAL, "secret"), UnavailableError, "check its path and settings"),
        (OSError(errno.EROFS, "secret"), UnavailableError, "Read-only file system"),
        (OSError(errno.ENOSPC, "secret"), RetryableError, "'archive' is full; free some space"),
        (OSError(errno.EDQUOT, "secret"), RetryableError, "'archive' is full; free some space"),
        (OSError(errno.EBUSY, "secret"), RetryableError, "'archive' did not take it: Device or resource busy"),
        (TimeoutError("secret"), RetryableError, "TimeoutError"),
        (ConnectionResetError("secret"), RetryableError, "ConnectionResetError"),
        (NotConnected("secret"), RetryableError, "NotConnected"),
    ],
)
def test_errors_say_what_to_do_and_repeat_no_text(
    tmp_path: Path, error: Exception, expected: type[Exception], words: str
) -> None:
    store = local_store(tmp_path)
    (tmp_path / "logs").mkdir()

    with pytest.raises(expected) as raised:
        exporter_to(with_faults(store, [error])).export(make_events(["a"]))

    assert words in str(raised.value)
    assert "secret" not in str(raised.value)


class ProxyAnswer(Exception):
    """As botocore raises it, and s3fs passes it on in another."""

    response: ClassVar[dict[str, Any]] = {"Error": {"Code": "413"}, "ResponseMetadata": {"HTTPStatusCode": 413}}


class PayloadTooLarge(Exception):
    status_code = 413


def from_proxy() -> OSError:
    error = OSError(errno.EIO, "secret")
    error.__cause__ = ProxyAnswer()
    return error


@pytest.mark.parametrize("error", [OSError(errno.EMSGSIZE, "secret"), PayloadTooLarge("secret"), from_proxy()])
def test_an_object_that_is_too_large(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "logs").mkdir()

    with pytest.raises(TooLargeError, match="'archive' takes no object of that size"):
        exporter_to(with_faults(local_store(tmp_path), [error])).export(make_events(["a"]))


@pytest.mark.parametrize(
    ("error", "smaller_may_pass"),
    [
        (TimeoutError("secret"), True),
        (ConnectionResetError(errno.ECONNRESET, "secret"), True),
        (NotConnected("secret"), True),
        (OSError(errno.EBUSY, "SlowDown"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "secret"), False),
        (OSError(errno.ENOSPC, "secret"), False),
    ],
)
def test_what_may_be_about_size(tmp_path: Path, error: Exception, smaller_may_pass: bool) -> None:
    (tmp_path / "logs").mkdir()

    with pytest.raises(RetryableError) as raised:
        exporter_to(with_faults(local_store(tmp_path), [error])).export(make_events(["a"]))

    assert raised.value.smaller_may_pass is smaller_may_pass


def test_a_defect_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()

    with pytest.raises(ZeroDivisionError):
        exporter_to(with_faults(local_store(tmp_path), [ZeroDivisionError()])).export(make_events(["a"]))


def test_a_root_that_is_missing_is_not_made(tmp_path: Path) -> None:
    store = object_store(tmp_path / "bucket")
    assert store.path
    (tmp_path / "bucket").rmdir()

    with pytest.raises(UnavailableError, match="bucket or folder of artifact store 'archive' does not exist"):
        exporter_to(store).export(make_events(["a"]))

    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (ArtifactStoreNotFoundError("there is none"), UnavailableError, "there is none, or set 'artifact_store'"),
        (ArtifactStoreNotUsableError("install s3"), UnavailableError, "install s3"),
        (ConnectionError("secret"), RetryableError, "could not be looked up in ZenML: ConnectionError"),
    ],
)
def test_an_artifact_store_that_cannot_be_found_is_looked_for_again(
    tmp_path: Path, error: Exception, expected: type[Exception], words: str
) -> None:
    store = local_store(tmp_path)
    outcomes = iter([error, None])

    def find(stream: Stream) -> BaseArtifactStore:
        if outcome := next(outcomes):
            raise outcome
        return store

    events = make_events(["a"])
    exporter = ArtifactExporter(find=find)
    with pytest.raises(expected, match=words):
        exporter.export(events)
    exporter.export(events)

    assert messages_in(place(store, events[0].stream)) == ["a"]


# --- The configuration


def test_the_settings() -> None:
    config = ArtifactChildConfig(name="archive", type="artifact")

    assert config.artifact_store is None
    assert config.readable
    assert config.batch_size == 20_000
    assert config.max_batch_bytes == 8 * 1024 * 1024
    assert config.requirements == {"composite-logstore"}
    config.check()


@pytest.mark.deep
def test_the_settings_import_nothing_heavy() -> None:
    code = (
        "import sys, composite_logstore_artifact.config\n"
        "print([name for name in ('orjson', 's3fs', 'fsspec', 'zenml.log_stores.artifact.artifact_log_store',"
        " 'composite_logstore_artifact.exporter', 'composite_logstore_artifact.reader') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    imported = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    # ZenML itself imports its artifact log store.
    assert "composite_logstore_artifact" not in imported.stdout
    assert "fsspec" not in imported.stdout
