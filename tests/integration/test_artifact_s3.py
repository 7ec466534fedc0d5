from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
from zenml.artifact_stores import BaseArtifactStore
from zenml.exceptions import DoesNotExistException
from zenml.log_stores.artifact.artifact_log_store import fetch_log_records, prepare_logs_uri

from composite_logstore import Page, PageRequest, RetryableError, Stream, TooLargeError, UnavailableError
from composite_logstore.reading import gaps
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreUnavailableError
from composite_logstore_artifact import artifact_stores, compaction
from composite_logstore_artifact import exporter as exporter_module
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import make_logs
from tests.deep import mostly_deep
from tests.events import make_events, make_stream
from tests.patience import PATIENCE_SECONDS
from tests.servers.reverse_proxy import ReverseProxy
from tests.servers.s3 import S3Server, s3_server
from tests.simulation import make_logs as make_store_logs
from tests.simulation import make_store

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def exporter_to(store: BaseArtifactStore) -> ArtifactExporter:
    return ArtifactExporter(find=lambda stream: store)


def read(
    store: BaseArtifactStore,
    stream: Stream,
    direction: Literal["newer", "older"] = "newer",
    token: str | None = None,
    limit: int = 50_000,
    in_progress: bool = False,
    **filters: Any,
) -> Page:
    reader = ArtifactReader(find=lambda logs: store, is_in_progress=lambda logs: in_progress)
    return reader.read(PageRequest(make_logs(stream.id), direction, token, limit, LogsEntriesFilter(**filters)))


def messages(page: Page) -> list[str]:
    return [read.entry.message for read in page.entries]


def test_a_stream_is_read_while_it_is_written_and_at_the_end(server: S3Server) -> None:
    # The writer and the reader are two programs: each has an artifact store of its own, the reader's stays
    # the same from page to page, as on ZenML's server.
    writing, reading = server.artifact_store(), server.artifact_store()
    stream = make_stream()
    exporter = exporter_to(writing)
    assert messages(read(reading, stream, in_progress=True)) == []

    exporter.export(make_events(["a", "b"], stream))
    first = read(reading, stream)
    exporter.export(make_events(["c"], stream, 2))
    newest = read(reading, stream, "older", limit=2)
    followed = read(reading, stream, token=first.newer)
    exporter.export(make_events([str(number) for number in range(3, 5000)], stream, 3))
    exporter.end_stream(stream)

    assert messages(first) == ["a", "b"]
    assert messages(newest) == ["b", "c"]
    assert messages(followed) == ["c"]
    everything = ["a", "b", "c", *(str(number) for number in range(3, 5000))]
    assert messages(read(reading, stream)) == everything
    assert messages(read(reading, stream, "older", newest.older)) == ["a"]
    assert messages(read(reading, stream, "older", search="499")) == [
        message for message in everything if "499" in message
    ]
    assert [read.event.sequence for read in read(reading, stream).entries if read.event] == list(range(5000))
    own = fetch_log_records(server.artifact_store(), prepare_logs_uri(writing, stream.id), 50_000)
    assert [entry.message for entry in own] == everything


def test_many_small_objects_are_read_side_by_side(server: S3Server) -> None:
    store = server.artifact_store()
    stream = make_stream()
    exporter = exporter_to(store)
    for number in range(60):
        exporter.export(make_events([str(number)], stream, number))

    page = read(store, stream, "older", limit=50)

    assert messages(page) == [str(number) for number in range(10, 60)]
    assert messages(read(store, stream, "older", page.older)) == [str(number) for number in range(10)]


def test_a_finished_stream_of_many_objects_is_merged_once_and_its_cursors_stay_valid(server: S3Server) -> None:
    writing, reading = server.artifact_store(), server.artifact_store()
    uri = prepare_logs_uri(writing, (stream := make_stream()).id)
    exporter = exporter_to(writing)
    for number in range(130):
        exporter.export(make_events([str(number)], stream, number))
    newest = read(reading, stream, "older", limit=10)
    oldest = read(reading, stream, limit=10)
    exporter.end_stream(stream)
    exporter.close()

    everything = [str(number) for number in range(130)]
    assert messages(read(reading, stream, "older", newest.older)) == everything[:120]
    assert messages(read(reading, stream, token=oldest.newer)) == everything[10:]
    assert messages(read(reading, stream)) == everything
    objects = server.artifact_store().listdir(uri)
    assert len(objects) == 2
    own = fetch_log_records(server.artifact_store(), uri, 50_000)
    assert [entry.message for entry in own] == everything

    # What is logged to it again leaves those alone.
    again = exporter_to(writing)
    for number in range(130, 140):
        again.export(make_events([str(number)], stream, number))
    again.end_stream(stream)
    again.close()
    assert len(names := server.artifact_store().listdir(uri)) == 3
    assert set(objects) < set(names)
    assert messages(read(reading, stream)) == [str(number) for number in range(140)]


def test_a_scan_goes_on_when_objects_are_merged_meanwhile(server: S3Server) -> None:
    stream = make_stream()
    exporter = exporter_to(server.artifact_store())
    for number in range(60):
        exporter.export(make_events([str(number)], stream, number))
    reading = server.artifact_store()
    scan = ArtifactReader(find=lambda logs: reading).scan(make_logs(stream.id))
    first = next(scan)
    exporter.end_stream(stream)
    exporter.close()

    assert len(server.artifact_store().listdir(prepare_logs_uri(reading, stream.id))) == 1
    assert [number for chunk in [first, *scan] for number in chunk.sequences] == list(range(60))


@pytest.mark.deep
def test_no_page_takes_a_listing_of_thousands(server: S3Server) -> None:
    """However many objects a step has written while it runs."""
    writing, reading = server.artifact_store(), server.artifact_store()
    stream = make_stream()
    exporter = exporter_to(writing)
    requests = requests_to(reading)
    for number in range(520):
        exporter.export(make_events([str(number)], stream, number))
        if number % 130 == 129:
            exporter._compaction.wait()
            # The listing is cached by the reader's artifact store, and not trusted.
            assert messages(read(reading, stream, "older", limit=5)) == [str(n) for n in range(number - 4, number + 1)]
            assert len(server.artifact_store().listdir(prepare_logs_uri(writing, stream.id))) < 130
    exporter.close()

    assert len([method for method, _ in requests if method == "LIST"]) == 4


@pytest.mark.parametrize("seed", mostly_deep(range(3)))
def test_whatever_is_written_and_merged_meanwhile_pages_are_the_stream(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Two writers grow it, each page is as large as it likes, and cursors of all ages are used again."""
    random = Random(seed)
    monkeypatch.setattr(exporter_module, "_MANY", random.randint(3, 12))
    monkeypatch.setattr(compaction, "LARGEST_OBJECT", random.choice([3_000, 100_000]))
    writing, reading = server.artifact_store(), server.artifact_store()
    stream = make_stream()
    exporters = {writer: exporter_to(writing) for writer in ("0123456789abcde", "fedcba987654321")}
    numbers = dict.fromkeys(exporters, 0)
    written: list[str] = []
    followed: list[str] = []
    token: str | None = None
    places: list[tuple[str, int]] = []  # a token towards the oldest end → how many entries come before it

    def follow(limit: int) -> None:
        nonlocal token
        page = read(reading, stream, token=token, limit=limit)
        followed.extend(messages(page))
        token = page.newer or token

    for _ in range(60):
        writer = random.choice(list(exporters)) if random.random() < 0.2 else "0123456789abcde"
        texts = [f"{writer} {numbers[writer] + n} {'x' * random.randint(0, 200)}" for n in range(random.randint(1, 9))]
        exporters[writer].export(make_events(texts, stream, numbers[writer], writer))
        numbers[writer] += len(texts)
        written += texts
        if random.random() < 0.3:
            follow(random.randint(1, 20))
        if random.random() < 0.3:
            limit = random.randint(1, 20)
            newest = read(reading, stream, "older", limit=limit)
            assert messages(newest) == written[-limit:]
            if newest.older is not None:
                places.append((newest.older, len(written) - limit))
        if places and random.random() < 0.3:
            older, before = random.choice(places)
            limit = random.randint(1, 30)
            assert messages(read(reading, stream, "older", older, limit)) == written[:before][-limit:]
    for exporter in exporters.values():
        exporter.end_stream(stream)
        exporter.close()
    while len(followed) < len(written):
        follow(50)

    assert followed == written
    for older, before in places:
        assert messages(read(reading, stream, "older", older)) == written[:before]
    uri = prepare_logs_uri(writing, stream.id)
    assert len(server.artifact_store().listdir(uri)) < 60
    own = fetch_log_records(server.artifact_store(), uri, 50_000)
    assert [entry.message for entry in own] == written


def test_a_process_that_ends_with_its_step_merges_what_it_has_written(server: S3Server) -> None:
    """As in a pod of its own: nothing comes after the step, and the interpreter's end stops much of what it needs."""
    store = server.artifact_store()
    stream, other = make_stream(), make_stream()
    script = f"""
import logging
from uuid import UUID
from composite_logstore import log_store
from composite_logstore_artifact import exporter
from composite_logstore_artifact.config import ArtifactChildConfig
from tests.servers.s3 import S3Server
from tests.simulation import make_logs, make_store

log_store._active_artifact_store_id = lambda: None
archive = S3Server({server.endpoint.replace("127.0.0.1", "localhost")!r}, {server.bucket!r}).artifact_store()
exporter.find_named = lambda name: archive
child = ArtifactChildConfig(name="archive", type="artifact", artifact_store="archive")
store = make_store(child, flush_timeout_millis=20_000, flush_limit_millis=20_000)
step = store.register_origin("step", make_logs(store, id=UUID("{stream.id}")), {{}})
run = store.register_origin("client", make_logs(store, id=UUID("{other.id}")), {{}})
for number in range(20):
    store.emit(step, logging.LogRecord("train", 20, "train.py", 1, str(number), (), None))
    store.flush()
# Not the last stream, so this flushes nothing.
store.deregister_origin(step)
store.emit(run, logging.LogRecord("train", 20, "train.py", 1, "late", (), None))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)

    assert messages(read(store, stream)) == [str(number) for number in range(20)]
    assert len(store.listdir(prepare_logs_uri(store, stream.id))) == 1
    assert messages(read(store, other)) == ["late"]


def test_a_page_says_what_is_missing_wherever_it_was_merged(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, stream = server.artifact_store(), make_stream()
    events = make_events([str(number) for number in range(20)], stream)
    exporter = exporter_to(archive)
    for event in [*events[:7], *events[10:]]:
        exporter.export([event])
    exporter.end_stream(stream)
    exporter.close()
    monkeypatch.setattr(artifact_stores, "find_named", lambda name: archive)
    store = make_store(ArtifactChildConfig(name="archive", type="artifact", artifact_store="archive"))
    logs = make_store_logs(store, id=stream.id)
    expected = [
        *(str(number) for number in range(7)),
        f"Child 'archive' is missing 3 entries here, between 6 and 10 of writer {events[0].writer}.",
        *(str(number) for number in range(10, 20)),
    ]

    assert len(store.fetch(logs).items) == 17
    monkeypatch.setattr(gaps, "is_finished", lambda logs: True)
    for limit in (3, 7, 100):
        page = store.fetch(logs, limit=limit)
        found = [entry.message for entry in page.items]
        while page.before:
            page = store.fetch(logs, before=page.before)
            found = [*(entry.message for entry in page.items), *found]
        assert found == expected


def test_objects_that_a_killed_process_left_beside_what_they_were_merged_into(server: S3Server) -> None:
    store = server.artifact_store()
    stream = make_stream()
    uri = prepare_logs_uri(store, stream.id)
    exporter = exporter_to(store)
    for number in range(20):
        exporter.export(make_events([str(number)], stream, number))
    contents = {name: store.filesystem.cat_file(f"{uri}/{name}") for name in store.listdir(uri)}
    exporter.end_stream(stream)
    exporter.close()
    for name in random_half(contents):
        store.filesystem.pipe_file(f"{uri}/{name}", contents[name])

    for direction in ("newer", "older"):
        assert messages(read(server.artifact_store(), stream, direction)) == [str(number) for number in range(20)]


def random_half(names: Iterable[str]) -> list[str]:
    return Random(1).sample(sorted(names), k=10)


def requests_to(store: BaseArtifactStore) -> list[tuple[str, int]]:
    """Return a list that grows with each request to S3: what it is, and how many bytes came or went."""
    requests: list[tuple[str, int]] = []
    filesystem = store.filesystem  # type: ignore[attr-defined]
    filesystem.connect()
    events = filesystem.s3.meta.events

    def sent(request: Any, **_: Any) -> None:
        requests.append(
            ("LIST" if "list-type=" in request.url else request.method, int(request.headers.get("Content-Length", 0)))
        )

    def received(parsed: dict[str, Any], model: Any, **_: Any) -> None:
        if model.name == "GetObject":
            requests.append(("received", int(parsed["ContentLength"])))

    events.register("before-send.s3", sent)
    events.register("after-call.s3", received)
    return requests


def test_the_newest_page_of_a_large_stream_takes_few_requests_and_bytes(server: S3Server) -> None:
    writing, reading = server.artifact_store(), server.artifact_store()
    stream = make_stream()
    exporter = exporter_to(writing)
    lines = 60_000
    sent = requests_to(writing)
    for first in range(0, lines, 5_000):
        exporter.export(make_events([f"line {number}" for number in range(first, first + 5_000)], stream, first))
    puts = [size for method, size in sent if method == "PUT"]
    size = sum(
        writing.size(f"{prepare_logs_uri(writing, stream.id)}/{name}") or 0
        for name in writing.listdir(prepare_logs_uri(writing, stream.id))
    )
    assert len(puts) == lines / 5_000
    assert sum(puts) <= 1.01 * size
    exporter.end_stream(stream)
    requests = requests_to(reading)

    assert len(read(reading, stream, "older", limit=1_000).entries) == 1_000

    assert len([method for method, _ in requests if method != "received"]) <= 4
    assert 100_000 < sum(size for method, size in requests if method == "received") <= 2_000_000
    requests.clear()
    assert messages(read(reading, stream, "older", level="ERROR")) == []
    assert [method for method, _ in requests if method != "received"] == ["LIST"]


def test_an_object_that_is_too_large_to_be_read_at_once(server: S3Server) -> None:
    store = server.artifact_store()
    stream = make_stream()
    expected = [f"{number} " + "x" * 100_000 for number in range(120)]
    exporter_to(store).export(make_events(expected, stream))

    newest = read(store, stream, "older", limit=10)

    assert messages(newest) == expected[-10:]
    assert messages(read(store, stream, "older", newest.older)) == expected[:-10]
    assert messages(read(store, stream)) == expected


def test_lines_that_are_none(server: S3Server) -> None:
    """One of 50 MB, one that is not UTF-8, one that is cut, one that is no JSON."""
    store = server.artifact_store()
    stream = make_stream()
    exporter = exporter_to(store)
    exporter.export(make_events(["before"], stream))
    odd = [b"x" * 50_000_000, b"\xff\xfe not UTF-8", b'{"message": "cut o', b"plain text"]
    store.filesystem.pipe_file(
        f"{prepare_logs_uri(store, stream.id)}/{time.time_ns():020d}.log", b"\n".join(odd) + b"\n"
    )
    exporter.export(make_events(["after"], stream, 1))

    expected = ["before", *(line.decode("utf-8", "replace") for line in odd), "after"]
    for direction in ("newer", "older"):
        assert messages(read(store, stream, direction)) == expected
    page = read(store, stream, limit=2)
    assert messages(page) == expected[:2]
    assert messages(read(store, stream, token=page.newer)) == expected[2:]


def test_the_single_object_of_zenml_s_own_store(server: S3Server) -> None:
    store = server.artifact_store()
    stream = make_stream()
    entries = [LogEntry(message=str(number)) for number in range(10)]
    with store.open(prepare_logs_uri(store, stream.id), "w") as file:
        file.write("".join(entry.model_dump_json(exclude_none=True) + "\n" for entry in entries))

    page = read(store, stream, "older", limit=4)

    assert [read.entry for read in page.entries] == entries[6:]
    assert [read.entry for read in read(store, stream, "older", page.older).entries] == entries[:6]


def test_a_stream_that_is_not_there(server: S3Server) -> None:
    with pytest.raises(DoesNotExistException, match="'archive'"):
        read(server.artifact_store(), make_stream())


def test_wrong_credentials(server: S3Server) -> None:
    stream = make_stream()
    exporter_to(server.artifact_store()).export(make_events(["a"], stream))
    store = server.artifact_store(secret="not-the-secret")

    with pytest.raises(UnavailableError, match="refuses access; check its credentials") as written:
        exporter_to(store).export(make_events(["b"], stream))
    with pytest.raises(LogStoreUnavailableError, match=r"refuses access\. Check its credentials") as fetched:
        read(store, stream)
    assert "not-the-secret" not in f"{written.value} {fetched.value}"


def test_a_missing_bucket_is_not_made(server: S3Server) -> None:
    store = server.artifact_store(path="s3://not-there/store")

    for _ in range(2):
        with pytest.raises(UnavailableError, match="bucket or folder of artifact store 'archive' does not exist"):
            exporter_to(store).export(make_events(["a"]))


def test_credentials_that_were_mended_are_used(server: S3Server) -> None:
    stores = iter([server.artifact_store(secret="not-the-secret"), server.artifact_store()])
    stream = make_stream()
    events = make_events(["a"], stream)
    exporter = ArtifactExporter(find=lambda stream: next(stores))

    with pytest.raises(UnavailableError):
        exporter.export(events)
    exporter.export(events)

    assert messages(read(server.artifact_store(), stream)) == ["a"]


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = S3Server(f"http://127.0.0.1:{unused.getsockname()[1]}", "bucket").artifact_store(
            config_kwargs={"retries": {"max_attempts": 0}}
        )

        with pytest.raises(RetryableError, match="did not take it"):
            exporter_to(store).export(make_events(["a"]))
        with pytest.raises(LogStoreUnavailableError, match="could not be read"):
            read(store, make_stream())


@pytest.mark.parametrize(("cut", "is_known"), [("413", True), ("408", False), ("resets", False)])
def test_an_object_that_a_proxy_does_not_let_through_is_written_in_halves(
    server: S3Server, cut: str, is_known: bool
) -> None:
    with ReverseProxy(int(server.endpoint.rpartition(":")[2])) as proxy:
        behind = replace(server, endpoint=f"http://127.0.0.1:{proxy.port}")
        store = behind.artifact_store(config_kwargs={"retries": {"max_attempts": 0}})
        exporter = exporter_to(store)
        events = make_events([f"{number} {Random(number).randbytes(2_000).hex()}" for number in range(20)])
        proxy.most_bytes, proxy.cut = 60_000, cut
        with pytest.raises(TooLargeError if is_known else RetryableError) as raised:
            exporter.export(events)
        assert is_known or raised.value.smaller_may_pass
        exporter.export(events[:10])
        exporter.export(events[10:])
        exporter.close()
    assert messages(read(server.artifact_store(), events[0].stream)) == [event.message for event in events]
