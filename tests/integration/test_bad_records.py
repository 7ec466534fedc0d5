"""Records that are hard to encode or too large, each between two good ones, on their way to real backends."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.models import LogsResponse

from composite_logstore import ChildConfig, CompositeLogStore
from composite_logstore.ansi import without_escapes
from composite_logstore.plain import plain
from composite_logstore.zenml import LogEntry
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import Datadog
from tests.servers.otlp_receiver import OtlpReceiver, Record
from tests.simulation import assert_accounts_add_up, make_logs, make_store

pytestmark = pytest.mark.integration

MB = 1_000_000
MARK = re.compile(r"… \[shortened by (\d+) bytes\]\Z")
EVERYONE = frozenset({"collector", "receiver", "live"})


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Homeless:
    """As a proxy of a request, or of a context, outside of it."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("there is no context")


class Opaque:
    def __repr__(self) -> str:
        return "opaque"


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


HOMELESS = Homeless()
CYCLIC: dict[str, Any] = {"name": "a"}
CYCLIC["self"] = CYCLIC
CYCLIC["all"] = [CYCLIC] * 30


@dataclass(frozen=True)
class Bad:
    """A bad record, and what is to become of it.

    Attributes:
        said: What is logged.
        args: The arguments that go with it.
        extra: The record's extra attributes.
        error: The exception that goes with it.
        level: The record's level.
        logger: The logger; what is printed has none, but for the name of the file.
        message: The message that is to arrive, whole where it fits.
        attributes: The attributes that are to arrive; left out of those that do not fit.
        in_json: Those of them that are something else in JSON.
        too_large_for: The children that have to shorten it.
    """

    said: Any
    message: str
    args: tuple[Any, ...] = ()
    extra: Mapping[Any, Any] = field(default_factory=dict)
    error: BaseException | None = None
    level: int = logging.INFO
    logger: str = "train"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    in_json: Mapping[str, Any] = field(default_factory=dict)
    too_large_for: frozenset[str] = frozenset()

    def record(self) -> logging.LogRecord:
        exc_info: Any = None
        if self.error is not None:
            try:
                raise self.error
            except BaseException:
                exc_info = sys.exc_info()
        place = ("", 0) if self.logger in ("stdout", "stderr") else ("/code/train.py", 7)
        logger = logging.Logger(self.logger)
        # As `logger.info` does it: so what `logging` itself refuses is no case.
        return logger.makeRecord(self.logger, self.level, *place, self.said, self.args, exc_info, "fit", self.extra)


def with_extra(extra: Mapping[Any, Any], **fields: Any) -> Bad:
    return Bad("hello", "hello", extra=extra, **fields)


def too_large(text: str, **fields: Any) -> Bad:
    return Bad(text, text, **{"too_large_for": EVERYONE, **fields})


BAD = {
    "body: none": Bad(None, "None"),
    "body: dict": Bad({"loss": 0.5}, "{'loss': 0.5}"),
    "body: bytes": Bad(b"by\xfftes", "b'by\\xfftes'"),
    "body: exception": Bad(ValueError("bad"), "bad"),
    "body: unprintable": Bad(Unprintable(), "<Unprintable> ()"),
    "body: nothing": Bad("", ""),
    "arguments: of another type": Bad("%d items", "%d items ('many',)", args=("many",)),
    "arguments: too few": Bad("%s of %s", "%s of %s ('one',)", args=("one",)),
    "arguments: too many": Bad("all", "all (1, 2)", args=(1, 2)),
    "arguments: no such name": Bad("%(loss)s", "%(loss)s {'rate': 1}", args=({"rate": 1},)),
    "arguments: a percent sign": Bad("100%", "100% (1,)", args=(1,)),
    "arguments: unprintable": Bad("%s", "%s <tuple>", args=(Unprintable(),)),
    "extra: opaque": with_extra({"given": Opaque()}, attributes={"given": "opaque"}),
    "extra: unprintable": with_extra({"given": Unprintable()}, attributes={"given": "<Unprintable>"}),
    "extra: homeless": with_extra({"given": HOMELESS}, attributes={"given": str(HOMELESS)}),
    "extra: bytes": with_extra({"given": b"by\xfftes"}, attributes={"given": "by\\xfftes"}),
    "extra: time": with_extra(
        {"given": datetime(2026, 1, 2, tzinfo=timezone.utc)}, attributes={"given": "2026-01-02 00:00:00+00:00"}
    ),
    "extra: no number": with_extra(
        {"nan": math.nan, "inf": -math.inf, "deep": [math.nan]},
        attributes={"nan": math.nan, "inf": -math.inf, "deep": [math.nan]},
        in_json={"nan": None, "inf": None, "deep": [None]},
    ),
    "extra: huge integers": with_extra(
        {"largest": 2**63 - 1, "larger": 2**63, "smallest": -(2**63), "huge": 10**5000},
        # Python itself refuses to make a text of more than 4,300 digits.
        attributes={"largest": 2**63 - 1, "larger": str(2**63), "smallest": -(2**63), "huge": plain(10**5000)},
    ),
    "extra: names that are no text": with_extra(
        {1: "one", None: "none", (1, 2): "pair", b"k": "bytes"},
        attributes={"1": "one", "None": "none", "(1, 2)": "pair", "b'k'": "bytes"},
    ),
    # Texts as values: rotel prints names as they are, and an odd one then looks like a part of the value before.
    "extra: odd names": with_extra(
        {"": "1", "a": "2", "a.b": "3", "\ud800": "4", "with a space\n": "5", "\0": "6", "ü": "7"},
        attributes={"": "1", "a": "2", "a.b": "3", "?": "4", "with a space\n": "5", "\0": "6", "ü": "7"},
    ),
    "extra: names that somebody else uses": with_extra(
        {
            "status": "fine",
            "timestamp": "late",
            "zenml.log.id": "other",
            "log.record.uid": "forged",
            "code.line.number": 1,
        }
    ),
    "extra: contains itself": with_extra({"given": CYCLIC}, attributes={"given": plain(CYCLIC)}),
    "extra: nested": with_extra(
        {"given": {1: {2: (Opaque(), None, True)}}}, attributes={"given": {"1": {"2": ["opaque", None, True]}}}
    ),
    "extra: empty": with_extra(
        {"list": [], "dict": {}, "none": None, "text": ""},
        attributes={"list": [], "dict": {}, "none": None, "text": ""},
    ),
    "lone surrogate": Bad("a\ud800b \udcff", "a?b ?", extra={"given": "\udcff"}, attributes={"given": "?"}),
    "NUL": Bad("a\0b", "a\0b", extra={"given": "\0"}, attributes={"given": "\0"}),
    "ANSI colour": Bad("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
    "line breaks": Bad("a\nb\r\nc\u2028d\x85e\x0bf", "a\nb\r\nc\u2028d\x85e\x0bf"),
    "progress bar": Bad("\r 50%|█████  | 5/10", "\r 50%|█████  | 5/10", logger="stderr", level=logging.ERROR),
    "progress bar: several updates": Bad("\r 1 %\r 2 %\r 3 %\n", "\r 1 %\r 2 %\r 3 %", logger="stdout"),
    "level: none": Bad("hello", "hello", level=0),
    "level: its own": Bad("hello", "hello", level=23),
    "level: beyond all": Bad("hello", "hello", level=10**6),
    "exception: unprintable": Bad("hello", "hello", error=UnprintableError(Unprintable())),
    "exception: lone surrogate": Bad("hello", "hello", error=ValueError("\ud800")),
    "too large: text": too_large("x" * 5 * MB),
    "too large: text of 4 bytes a character": too_large("🙂" * (5 * MB // 4)),
    "too large: text that JSON escapes": too_large("\0" * (MB // 2), too_large_for=frozenset({"live"})),
    "too large: arguments": Bad("%s", "x" * 5 * MB, args=("x" * 5 * MB,), too_large_for=EVERYONE),
    "too large: attribute": with_extra({"given": "x" * 5 * MB}, too_large_for=EVERYONE),
    "too large: nested attribute": with_extra({"given": {"a": ["x" * 5 * MB]}}, too_large_for=EVERYONE),
    "too large: name of an attribute": with_extra({"x" * 5 * MB: "given"}, too_large_for=EVERYONE),
    "too large: very many attributes": with_extra(
        {f"name {number}": "x" * 100 for number in range(40_000)}, too_large_for=EVERYONE
    ),
    "too large: exception": Bad("hello", "hello", error=ValueError("x" * 5 * MB), too_large_for=EVERYONE),
}


@dataclass(frozen=True)
class Delivered:
    """What every backend holds once all bad records, and the good ones around them, are delivered.

    Each is in the order of the backend: of the stream's file, of arrival, and of Datadog's search.
    """

    stats: dict[str, dict[str, Any]]
    archive: list[dict[str, Any]]
    archive_entries: list[LogEntry]
    collector: list[Record]
    receiver: list[Record]
    receiver_dropped: list[int]
    live: list[dict[str, Any]]
    live_entries: list[LogEntry]

    def places(self) -> dict[str, int]:
        """Return where each bad record has to be."""
        return {name: 2 * number + 1 for number, name in enumerate(BAD)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an artifact store of the same name."""
    path = tmp_path_factory.mktemp("bad_records")
    kind = StackComponentType.ARTIFACT_STORE
    component = Client().create_stack_component("bad_records", "local", kind, {"path": str(path)})
    yield path
    Client().delete_stack_component(component.id, kind)


@pytest.fixture(scope="module")
def delivered(archive: Path) -> Iterator[Delivered]:
    with (
        pytest.MonkeyPatch.context() as patch,
        start_collector() as collector,
        OtlpReceiver() as receiver,
        # Its thorough checks of megabytes take a busy machine longer than a reader waits.
        Datadog(checked=False) as datadog,
    ):
        # No test depends on the proxy of whoever runs it.
        patch.setenv("NO_PROXY", "127.0.0.1")
        # The servers take megabytes apart, which a busy machine does slowly.
        patience: dict[str, Any] = {"export_timeout_millis": 80_000}
        children: list[ChildConfig] = [
            ArtifactChildConfig(name="archive", type="artifact", artifact_store="bad_records"),
            OtlpChildConfig(name="collector", type="otlp", endpoint=collector.http_endpoint, **patience),
            OtlpChildConfig(
                name="receiver",
                type="otlp",
                endpoint=f"http://127.0.0.1:{receiver.grpc_port}",
                protocol="grpc",
                **patience,
            ),
            DatadogChildConfig(**{"name": "live", "type": "datadog", **datadog.settings, **patience}),
        ]
        store = make_store(*children, flush_timeout_millis=90_000, flush_limit_millis=180_000)
        try:
            yield deliver(store, archive, collector, receiver, datadog)
        finally:
            store.writer.close(5)


def deliver(
    store: CompositeLogStore, archive: Path, collector: Collector, receiver: OtlpReceiver, datadog: Datadog
) -> Delivered:
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    # Each in a millisecond of its own, so that Datadog's search has an order.
    created = time.time() - 60
    for number, bad in enumerate(BAD.values()):
        for place, record in ((2 * number, Bad(f"good {number}", "").record()), (2 * number + 1, bad.record())):
            record.created = created + place / 100
            store.emit(origin, record)
    store.emit(origin, Bad("the last", "").record())
    store.deregister_origin(origin)
    stats = store.stats()
    assert_accounts_add_up(stats)
    from_live = make_store(*store.config.children, primary="live", id=store.id)
    total = 2 * len(BAD) + 1
    return Delivered(
        stats,
        # Not `splitlines`: texts have line breaks of their own.
        [json.loads(line) for line in (archive / "logs" / f"{logs.id}.log").read_bytes().split(b"\n") if line],
        all_entries(store, logs),
        collector.wait_for_records(total),
        receiver.records(),
        [count for request in receiver.requests for count in dropped_attributes(request.payload)],
        datadog.seen()["entries"],
        all_entries(from_live, logs),
    )


def all_entries(store: CompositeLogStore, logs: LogsResponse) -> list[LogEntry]:
    """Read page after page: records of megabytes come few at a time."""
    page = store.fetch(logs, start="oldest", limit=1_000)
    entries = list(page.items)
    while page.items and page.after is not None:
        page = store.fetch(logs, after=page.after)
        entries += page.items
    return entries


def dropped_attributes(payload: bytes) -> list[int]:
    """Return how many attributes each record of an OTLP request says that it lacks."""
    return [
        record.dropped_attributes_count
        for resource_logs in ExportLogsServiceRequest.FromString(payload).resource_logs
        for scope_logs in resource_logs.scope_logs
        for record in scope_logs.log_records
    ]


def test_nothing_is_rejected_or_lost(delivered: Delivered) -> None:
    for name, child in delivered.stats.items():
        assert child["accepted"] == child["delivered"] == 2 * len(BAD) + 1, (name, child)
        assert (child["state"], child["last_error"]) == ("healthy", None), name


def test_what_is_too_large_for_a_backend_is_counted(delivered: Delivered) -> None:
    expected = {
        name: sum(name in bad.too_large_for for bad in BAD.values())
        for name in ("archive", "collector", "receiver", "live")
    }
    assert expected["archive"] == 0
    assert {name: child["shortened"] for name, child in delivered.stats.items()} == expected


def test_every_child_has_all_of_them_in_order(delivered: Delivered) -> None:
    ids = [line["id"] for line in delivered.archive]
    assert len(set(ids)) == 2 * len(BAD) + 1
    assert [line["sequence"] for line in delivered.archive] == list(range(len(ids)))
    assert [str(entry.id) for entry in delivered.archive_entries] == ids
    assert [record.attributes["log.record.uid"] for record in delivered.collector] == ids
    assert [record.attributes["log.record.uid"] for record in delivered.receiver] == ids
    assert [entry["log.record.uid"] for entry in delivered.live] == ids
    assert [str(entry.id) for entry in delivered.live_entries] == ids


def test_the_good_ones_around_them_are_as_they_were(delivered: Delivered) -> None:
    good = [*(f"good {number}" for number in range(len(BAD))), "the last"]
    assert [entry.message for entry in delivered.archive_entries[::2]] == good
    assert [record.body for record in delivered.collector[::2]] == good
    assert [record.body for record in delivered.receiver[::2]] == good
    assert [entry["message"] for entry in delivered.live[::2]] == good


@pytest.mark.parametrize("name", BAD)
def test_the_archive_has_it_whole(delivered: Delivered, name: str) -> None:
    bad, place = BAD[name], delivered.places()[name]
    entry, line = delivered.archive_entries[place], delivered.archive[place]
    if bad.error is None:
        assert entry.message == bad.message
    else:
        assert entry.message.startswith(bad.message)
        assert type(bad.error).__name__ in entry.message
    attributes = {**bad.attributes, **bad.in_json}
    assert {key: line["attributes"][key] for key in attributes} == attributes


@pytest.mark.parametrize("name", BAD)
def test_a_collector_has_as_much_of_it_as_it_can_take(delivered: Delivered, name: str) -> None:
    bad, place = BAD[name], delivered.places()[name]
    record = delivered.receiver[place]
    assert delivered.collector[place].body == record.body
    assert_text(record.body, without_escapes(bad.message), "receiver" in bad.too_large_for)
    # Unlike the numbers themselves, their representations are equal where they are no numbers.
    assert repr({key: record.attributes[key] for key in bad.attributes}) == repr(dict(bad.attributes))
    assert record.attributes["zenml.log.source"] == "step"
    if bad.error is not None:
        assert record.attributes["exception.type"] == type(bad.error).__name__


@pytest.mark.parametrize("name", BAD)
def test_datadog_has_as_much_of_it_as_it_can_take(delivered: Delivered, name: str) -> None:
    bad, place = BAD[name], delivered.places()[name]
    entry = delivered.live[place]
    assert_text(entry["message"], without_escapes(bad.message), "live" in bad.too_large_for)
    attributes = {**bad.attributes, **bad.in_json}
    assert {key: entry[key] for key in attributes} == attributes
    assert entry["zenml.log.source"] == "step"
    assert entry["ddsource"] == "zenml"
    if bad.error is not None:
        assert entry["exception.type"] == type(bad.error).__name__
    # The reader puts what the exception has beneath the message, as the archive does.
    assert delivered.live_entries[place].message.startswith(entry["message"])


def assert_text(text: str, whole: str, may_be_shortened: bool) -> None:
    """Check that it is the whole text, or a part of it with a mark that says how much is missing."""
    if text == whole:
        return
    assert may_be_shortened
    mark = MARK.search(text)
    assert mark is not None
    kept = text[: mark.start()]
    assert whole.startswith(kept)
    assert len(kept.encode()) + int(mark[1]) == len(whole.encode())


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if bad.too_large_for])
def test_what_is_shortened_has_a_mark_that_says_by_how_much(delivered: Delivered, name: str) -> None:
    bad, place = BAD[name], delivered.places()[name]
    if "receiver" in bad.too_large_for:
        texts = repr(delivered.receiver[place].attributes) + str(delivered.receiver[place].body)
        assert "shortened by" in texts or delivered.receiver_dropped[place] > 0
    if "live" in bad.too_large_for:
        entry = delivered.live[place]
        assert "shortened by" in repr(entry) or entry["otel.dropped_attributes_count"] > 0
