"""Parity against a plain model: sets and lists of everything, in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import LogEvent, Scanned, Stream
from composite_logstore.event import ExceptionInfo
from composite_logstore.intervals import Intervals
from composite_logstore.parity.compare import compare
from composite_logstore.parity.holding import Holding
from composite_logstore.parity.result import NAMED, StreamParity
from composite_logstore.parity.scan import Source, open_source
from composite_logstore.processing.known_secrets import KnownSecrets
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.redaction import Masks, Redact
from composite_logstore.processing.settings import RedactSettings
from composite_logstore.testing import SimulatedBackend, make_logs, make_stream
from composite_logstore_artifact import reader as artifact_reader
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import local_store
from tests.events import make_events
from tests.simulation import make_child

WRITERS = ("0123456789abcde", "fedcba987654321")

numbers = st.integers(0, 40) | st.integers(1020, 1030) | st.integers(5000, 5003)
# What a child holds: a writer, a number, and whether it says something else than it should.
records = st.tuples(st.sampled_from(WRITERS), numbers, st.sampled_from([False, False, False, True]))
held = st.lists(records, max_size=40) | st.builds(
    lambda length, changed: [(WRITERS[0], number, number in changed) for number in range(length)],
    st.integers(0, 60),
    st.sets(st.integers(0, 59), max_size=3),
)


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """What is read again is found in the middle of a stream, too, and not only at its beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("composite_logstore.parity.holding._STRETCH", 5)
        for name, size in {"_SCANNED_LINES": 1, "_FIRST_BLOCK": 700, "_LARGEST_BLOCK": 700}.items():
            patch.setattr(artifact_reader, name, size)
        yield


def events_of(records: Sequence[tuple[str, int, bool]], stream: Stream) -> list[LogEvent]:
    return [
        make_events([f"{'changed' if is_changed else 'said'} {number}"], stream, number, writer)[0]
        for writer, number, is_changed in records
    ]


def simulated(name: str, events: Sequence[LogEvent]) -> Source:
    backend = SimulatedBackend()
    backend.received += events
    return open_source(make_child(name, backend))


def archived(name: str, events: Sequence[LogEvent], stream: Stream, root: Path) -> Source:
    store = local_store(root / name)
    path = Path(prepare_logs_uri(store, stream.id))
    os.makedirs(path.parent)
    path.write_bytes(b"".join(map(encode, events)))
    reader = ArtifactReader(find=lambda logs: store)
    return Source(name, reader, True, ArtifactChildConfig(name=name, type="artifact"), reader.close)


def check(result: StreamParity, children: dict[str, list[LogEvent]]) -> None:
    """Hold the result to the model."""
    everything: set[tuple[str, int]] = set()
    first: dict[str, dict[tuple[str, int], str]] = {}
    for name, events in children.items():
        first[name] = {}
        for event in events:
            first[name].setdefault((event.writer, event.sequence), event.message)
        everything |= set(first[name])
    for writer in WRITERS:
        highest = max((number for of, number in everything if of == writer), default=-1)
        everything |= {(writer, number) for number in range(highest + 1)}
    for place, (name, events) in enumerate(children.items()):
        child = result.children[name]
        late, highest_of = 0, dict.fromkeys(WRITERS, -1)
        seen = set()
        for event in events:
            key = (event.writer, event.sequence)
            late += key not in seen and event.sequence < highest_of[event.writer]
            seen.add(key)
            highest_of[event.writer] = max(highest_of[event.writer], event.sequence)
        different = 0
        for key, message in first[name].items():
            reference = next(first[other][key] for other in list(children)[: place + 1] if key in first[other])
            different += message != reference
        assert not child.error
        assert (child.events, child.missing) == (len(first[name]), len(everything - set(first[name])))
        assert (child.duplicated, child.out_of_order) == (len(events) - len(first[name]), late)
        assert child.different == different
        assert sum(child.minutes.values()) == child.events
        named = [one for one in result.differences if one.child == name and one.kind == "missing"]
        assert len(named) == min(NAMED, child.missing)
        assert {(one.writer, one.sequence) for one in named} <= everything - set(first[name])
        changed = [one for one in result.differences if one.child == name and one.kind == "different"]
        assert all(one.detail.startswith("message") for one in changed)
        assert len(changed) == min(NAMED, different)


@given(st.lists(held, min_size=1, max_size=3))
def test_children_read_page_by_page(records: list[list[tuple[str, int, bool]]]) -> None:
    stream = make_stream()
    children = {f"child-{place}": events_of(of_child, stream) for place, of_child in enumerate(records)}
    sources = [simulated(name, events) for name, events in children.items()]
    check(compare(make_logs(stream), "", sources), children)


@given(st.lists(held, min_size=1, max_size=3), st.booleans())
def test_archives_and_what_is_no_archive(records: list[list[tuple[str, int, bool]]], is_mixed: bool) -> None:
    stream = make_stream()
    children = {f"child-{place}": events_of(of_child, stream) for place, of_child in enumerate(records)}
    if is_mixed:
        # The pages of the simulated backend show no place in the code.
        children = {
            name: [event._replace(logger_name="", file="", line=0, function="") for event in events]
            for name, events in children.items()
        }
    with tempfile.TemporaryDirectory() as root:
        sources = [archived(name, events, stream, Path(root)) for name, events in children.items()]
        if is_mixed:
            sources[-1] = simulated(sources[-1].name, children[sources[-1].name])
        check(compare(make_logs(stream), "", sources), children)


some_runs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)))


@given(some_runs, some_runs)
def test_runs_are_sets(ones: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    one, other = Intervals(), Intervals()
    plain_one: set[int] = set()
    plain_other: set[int] = set()
    for intervals, plain, added in ((one, plain_one, ones), (other, plain_other, others)):
        for first, length in added:
            intervals.add(first, first + length)
            plain.update(range(first, first + length + 1))

    def numbers(intervals: Intervals) -> set[int]:
        found = [number for first, last in intervals for number in range(first, last + 1)]
        assert found == sorted(set(found))
        assert len(found) == len(intervals)
        return set(found)

    assert numbers(one) == plain_one
    assert numbers(one | other) == plain_one | plain_other
    assert numbers(one - other) == plain_one - plain_other
    for number in range(75):
        assert (number in one) == (number in plain_one)
        assert one.has(number, number + 3) == (set(range(number, number + 4)) <= plain_one)
        assert one.touches(number, number + 3) == bool(set(range(number, number + 4)) & plain_one)


def test_what_is_held_takes_little_more_memory_for_more_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composite_logstore.parity.holding._STRETCH", 16_384)
    stream = make_stream()
    holding = Holding(archived("a", [], stream, tmp_path), stream)
    for first in range(0, 1_000_000, 10_000):
        numbers = range(first, first + 10_000)
        holding.add(Scanned(WRITERS[0], numbers, [1] * 10_000, numbers, None, str(first)))
    assert list(holding.numbers[WRITERS[0]]) == [(0, 999_999)]
    assert len(holding.sums[WRITERS[0]]) == 977
    assert len(holding._stretches) == 51


# Redaction

FOREIGN = "\u00a7"
"""A character that is nowhere else."""

words = st.text("ab 5=_\n\x1b[m", max_size=6)
values = st.sampled_from(["Kq7-sesame", "AKIA" + "ABCD2345" * 2, "mysql://etl:sw0rdfish@db/x", "user=anna", "plain"])
texts = st.builds("".join, st.lists(words | values, min_size=1, max_size=4))
plain_values = st.recursive(
    texts | st.integers(0, 99) | st.just(4_111_222_233_334_444) | st.booleans() | st.none() | st.just(float("nan")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
REDACTIONS = (
    {},
    {"formats": []},
    {"secrets": False},
    {"patterns": [{"name": "colour", "pattern": r"[0-9]m"}]},
    {"patterns": [{"name": "user", "pattern": r"user=(?P<secret>\w+)", "replacement": "somebody"}]},
    {"patterns": [{"name": "card", "pattern": r"\d{16}"}, {"name": "mail", "pattern": "b+", "replacement": "="}]},
)
MUTATED = ("message", "stacktrace", "attribute", "name", "logger_name", "function", "time", "level", "line")


@st.composite
def whole_events(draw: st.DrawFn, stream: Stream) -> LogEvent:
    event = make_events([draw(texts)], stream, draw(st.integers(0, 3)))[0]
    return event._replace(
        exception=draw(st.none() | st.builds(ExceptionInfo, texts, texts, texts)),
        attributes=draw(st.dictionaries(texts, plain_values, max_size=3)),
        logger_name=draw(texts),
        function=draw(texts),
    )


def masked_by(settings: RedactSettings, event: LogEvent) -> LogEvent:
    secrets = KnownSecrets()
    secrets.note("a secret", "Kq7-sesame")
    batch = Processed([event])
    Redact(settings, secrets).process(batch)
    return batch.events[0]


def mutated(data: st.DataObject, event: LogEvent, field: str, masks: Masks) -> LogEvent | None:
    """Return the event with a difference that is in no masked part of it; None if there is no place for one."""

    def other(text: str) -> str:
        pieces = masks.pieces_of(event)(text)
        if pieces == ["", ""]:
            return text
        at = data.draw(st.sampled_from(sorted({0, len(pieces[0]), len(text)})))
        return text[:at] + FOREIGN + text[at:]

    attributes, error = dict(event.attributes), event.exception
    texts = [name for name, value in attributes.items() if isinstance(value, str)]
    match field:
        case "time":
            return event._replace(time_unix_nano=event.time_unix_nano + 5_000_000)
        case "level":
            return event._replace(level=40, level_name="ERROR")
        case "line":
            return event._replace(line=event.line + 1)
        case "stacktrace":
            return error and event._replace(exception=error._replace(stacktrace=other(error.stacktrace)))
        case "attribute":
            return (
                event._replace(attributes={**attributes, texts[0]: other(str(attributes[texts[0]]))}) if texts else None
            )
        case "name":
            return event._replace(attributes={**attributes, FOREIGN: 1})
        case _:
            return event._replace(**{field: other(getattr(event, field))})


@given(st.data(), st.sampled_from(REDACTIONS), st.none() | st.sampled_from(REDACTIONS), st.booleans())
def test_a_redacted_event_differs_in_what_is_not_masked_and_in_nothing_else(
    data: st.DataObject, redact: dict[str, Any], redact_other: dict[str, Any] | None, are_archives: bool
) -> None:
    stream = make_stream()
    event = data.draw(whole_events(stream))
    settings = {"whole": None, "live": RedactSettings.model_validate(redact), "other": None}
    if redact_other is not None:
        settings["other"] = RedactSettings.model_validate(redact_other)
    if data.draw(st.booleans()):
        del settings["whole"]
    events = {name: masked_by(of_child, event) if of_child else event for name, of_child in settings.items()}
    field = data.draw(st.none() | st.sampled_from(MUTATED if are_archives else ("message", "time", "level")))
    changed = mutated(data, events["live"], field, Masks(settings["live"], True)) if field else None
    is_changed = changed not in (None, events["live"])
    events["live"] = changed or events["live"]
    with tempfile.TemporaryDirectory() as root:
        sources = []
        for name, shown in events.items():
            source = archived(name, [shown], stream, Path(root)) if are_archives else simulated(name, [shown])
            config = source.config.model_copy(update={"redact": settings[name]})
            sources.append(source._replace(config=config))
        different = sum(child.different for child in compare(make_logs(stream), "", sources).children.values())
    if "whole" in settings or redact_other is None:
        assert different == is_changed
    else:
        # What one of them masks may be what differs.
        assert different <= is_changed


@pytest.mark.parametrize("are_archives", [True, False])
def test_a_part_of_an_escape_sequence_that_is_masked_is_no_difference(are_archives: bool, tmp_path: Path) -> None:
    stream = make_stream()
    (event,) = make_events(["\x1b[31mred\x1b[0m and more"], stream)
    redact = RedactSettings.model_validate({"patterns": [{"name": "number", "pattern": r"\d\d"}]})
    masked = masked_by(redact, event)
    assert masked.message == "\x1b[[redacted:number]mred\x1b[0m and more"
    for live, different in ((masked, 0), (masked._replace(message=f"{masked.message} twice"), 1)):
        root = tmp_path / str(different)
        if are_archives:
            sources = [archived("whole", [event], stream, root), archived("live", [live], stream, root)]
        else:
            sources = [simulated("whole", [event]), simulated("live", [live])]
        sources[1] = sources[1]._replace(config=sources[1].config.model_copy(update={"redact": redact}))
        assert compare(make_logs(stream), "", sources).children["live"].different == different


@pytest.mark.parametrize("are_archives", [True, False])
def test_redacted_events_are_compared_by_everything_but_what_is_masked(are_archives: bool, tmp_path: Path) -> None:
    stream = make_stream()
    messages = [f"said {number}" for number in range(20)]
    whole = make_events(messages, stream)
    redact = RedactSettings.model_validate({"patterns": [{"name": "own", "pattern": "said [5-9]$"}]})
    step = Redact(redact)
    batch = Processed(list(whole))
    step.process(batch)
    masked = batch.events
    # Neither a change beside what is masked, nor one of a masked event in other fields, is overlooked.
    masked[5] = masked[5]._replace(message=f"{masked[5].message} twice")
    masked[2] = masked[2]._replace(message="changed")
    masked[6] = masked[6]._replace(time_unix_nano=masked[6].time_unix_nano + 5_000_000)
    children = {"live": masked, "archive": whole, "other": [*whole[:7], whole[7]._replace(message="odd"), *whole[8:]]}
    if are_archives:
        sources = [archived(name, events, stream, tmp_path) for name, events in children.items()]
    else:
        sources = [simulated(name, events) for name, events in children.items()]
    sources[0] = sources[0]._replace(config=sources[0].config.model_copy(update={"redact": redact}))
    result = compare(make_logs(stream), "", sources)
    assert {name: (child.missing, child.different) for name, child in result.children.items()} == {
        "live": (0, 2),
        "archive": (0, 1),
        "other": (0, 2),
    }
    details = {(one.child, one.sequence): one.detail for one in result.differences}
    assert {key: detail.partition(":")[0] for key, detail in details.items()} == {
        ("live", 5): "message",
        ("live", 6): "time",
        ("archive", 2): "message",
        ("other", 2): "message",
        ("other", 7): "message",
    }
