"""What it takes to read from ClickHouse: a page, a search, a whole stream, and `verify` against an archive.

One stream of a million events among 99 others, in the collector's table, in ClickHouse's own engine: a process of its
own on this machine, behind the HTTP face of the tests. CPU is this process's own. Times are medians.

    python -m benchmarks.clickhouse [EVENTS]
"""

from __future__ import annotations

import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import median
from typing import Any

import orjson

from composite_logstore import LogEvent, Page, PageRequest, Stream
from composite_logstore.parity.compare import compare
from composite_logstore.parity.scan import open_source
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_clickhouse.reader import ClickHouseReader
from composite_logstore_otlp.config import OtlpChildConfig
from tests.artifact_stores import FolderArchive
from tests.servers.clickhouse import ClickHouse

EVENTS = 1_000_000
BATCH = 50_000
OTHERS = 99
STEP_NANOS = 1_000_000
ROUNDS = 5


def make(stream: Stream, first: int, count: int, start: int) -> list[LogEvent]:
    messages = [f"epoch {number}, loss 0.25" for number in range(first, first + count)]
    return make_events(messages, stream, first, start_unix_nano=start, step_nanos=STEP_NANOS)


def fill(server: ClickHouse, stream: Stream, count: int, start: int) -> None:
    """Have the engine make the rows that a collector would write for these events."""
    [event] = make(stream, 0, 1, start)
    attributes = {**event.details, **stream.attributes, **event.metadata, **event.identity}
    own = {
        "zenml.log.sequence": "toString(number)",
        "log.record.uid": f"concat('{event.uid[:-12]}', lower(leftPad(hex(number), 12, '0')))",
    }
    pairs = ", ".join(f"'{name}', {own.get(name, repr(str(value)))}" for name, value in attributes.items())
    server.ask(
        "INSERT INTO otel_logs (Timestamp, TimestampTime, Body, SeverityText, SeverityNumber, ServiceName, ScopeName,"
        f" LogAttributes) SELECT fromUnixTimestamp64Nano({start} + toInt64(number) * {STEP_NANOS}) AS t, toDateTime(t),"
        f" concat('epoch ', toString(number), ', loss 0.25'), '{event.severity_text}', {event.severity_number},"
        f" 'zenml', '{event.logger_name}', map({pairs}) FROM numbers({count})"
    )


def measure(work: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Return the seconds it takes, and those of this process's CPU."""
    times = []
    for _ in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - begin, time.process_time() - cpu))
    return median(one for one, _ in times), median(one for _, one in times)


def show(what: str, figure: str) -> None:
    print(f"{what:56} {figure}", flush=True)


def main(arguments: Sequence[str]) -> None:
    count = int(arguments[0]) if arguments else EVENTS
    stream, start = make_stream(), time.time_ns() // 1000 * 1000 - count * STEP_NANOS - 60 * 10**9
    with ClickHouse() as server, tempfile.TemporaryDirectory(prefix="composite-logstore-clickhouse-") as root:
        section = {"type": "clickhouse", "url": server.url, "database": "otel"}
        child = OtlpChildConfig(name="sent", type="otlp", endpoint="http://127.0.0.1:9", read=section)
        archive = FolderArchive.model_validate({"name": "archive", "type": "artifact", "root": root, "is_file": True})
        fill(server, stream, count, start)
        for _ in range(OTHERS):
            fill(server, make_stream(), max(1, count // 100), start)
        exporter = archive.create_exporter()
        for first in range(0, count, BATCH):
            exporter.export(make(stream, first, min(BATCH, count - first), start))
        exporter.close()

        print(f"Python {platform.python_version()}, orjson {orjson.__version__}, {count:,} events of one stream")
        logs, reader = make_logs(stream), child.create_reader()
        assert isinstance(reader, ClickHouseReader)
        asked: list[str] = []
        rows = reader._rows

        def counted(sql: str, *rest: Any) -> list[list[Any]]:
            asked.append(sql)
            return rows(sql, *rest)

        reader._rows = counted  # type: ignore[method-assign]

        def page(token: str | None = None, **filters: Any) -> Page:
            return reader.read(PageRequest(logs, "older", token, 1_000, LogsEntriesFilter(**filters)))

        assert len(page().entries) == 1_000
        show("queries for the newest 1,000, the table's columns included", f"{len(asked)}")
        half = middle(start, count)
        for what, work in (
            ("the newest 1,000", page),
            ("1,000 in the middle", lambda: page(half)),
            ("a text that one event has", lambda: page(search=f"epoch {count // 3},")),
        ):
            seconds, cpu = measure(work)
            show(what, f"{seconds * 1e3:7.0f} ms, {cpu * 1e3:5.1f} ms of CPU")
        show("its CPU for an entry", f"{measure(page)[1] * 1e6 / 1_000:7.1f} µs")

        def scan() -> None:
            assert sum(len(chunk.contents) for chunk in reader.scan(logs)) == count

        seconds, cpu = measure(scan, 1)
        show("a whole stream", f"{count / seconds:7,.0f} events/s, {cpu / count * 1e6:.1f} µs of CPU each")
        reader.close()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def verify() -> None:
            with closing(open_source(archive)) as one, closing(open_source(child)) as two:
                result = compare(logs, "step", [one, two])
            assert {(c.events, c.missing, c.different) for c in result.children.values()} == {(count, 0, 0)}, result

        seconds, cpu = measure(verify, 1)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        show(
            "verify, archive against ClickHouse", f"{count / seconds:7,.0f} events/s, {cpu / count * 1e6:.1f} µs of CPU"
        )
        show("more memory for it", f"{more:7.0f} MB")


def middle(start: int, count: int) -> str:
    """Return the token of a page that ended in the middle of the stream."""
    return orjson.dumps([1, start + count // 2 * STEP_NANOS, "", 0, 0]).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
