"""Children that do not get every event: what a comparison and a backfill make of their rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import ChildConfig, LogEvent, Stream
from composite_logstore.clock import Clock
from composite_logstore.event import ExceptionInfo
from composite_logstore.parity.compare import compare
from composite_logstore.parity.result import ChildParity, StreamParity
from composite_logstore.parity.scan import Source, open_source
from composite_logstore.processing.budget import NOTICE, Budget, OwnAccount, Told
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.repeats import REPEATED
from composite_logstore.testing import SimulatedBackend, SimulatedClock, make_logs
from tests.artifact_stores import FolderArchive
from tests.copying import copy
from tests.events import NOON, SECOND, make_events, make_stream
from tests.simulation import make_child, make_store
from tests.unit.test_log_store import log, register

MINUTE = {"collapse_repeats": {"window_millis": 60_000}}


def archive(name: str, root: Path, **settings: Any) -> FolderArchive:
    return FolderArchive.model_validate(
        {"name": name, "type": "artifact", "root": str(root / name), "is_file": True, **settings}
    )


def write(child: ChildConfig, events: Sequence[LogEvent]) -> None:
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.close()


def deliver(child: ChildConfig, events: Sequence[LogEvent], batch_size: int = 3) -> list[LogEvent]:
    """Return what the child's worker would export of some events of one stream."""
    processor = child.create_processor()
    delivered: list[LogEvent] = []
    for begin in range(0, len(events), batch_size):
        batch = processor.process(list(events[begin : begin + batch_size]))
        processor.commit(batch)
        delivered += batch.events
    return delivered + processor.last_of(events[0].stream)


def compared(stream: Stream, *children: ChildConfig | Source) -> StreamParity:
    sources = [child if isinstance(child, Source) else open_source(child) for child in children]
    return compare(make_logs(stream), "", sources, stream=stream)


def counts(child: ChildParity) -> dict[str, int]:
    return {name: getattr(child, name) for name in ("missing", "excluded", "different", "out_of_order", "duplicated")}


CLEAN = {"missing": 0, "different": 0, "out_of_order": 0, "duplicated": 0}


def different_events(stream: Stream) -> list[LogEvent]:
    events = make_events([f"step {number % 7}" for number in range(60)], stream, levels=(10, 20, 30, 40))
    for place in range(0, 60, 5):
        events[place] = events[place]._replace(logger_name="urllib3.pool", attributes={"tenant": "a"})
    for place in range(0, 60, 9):
        error = ExceptionInfo("ValueError", "no", "Traceback")
        events[place] = events[place]._replace(exception=error, message="\x1b[31mfailed\x1b[0m")
    return events


RULES: dict[str, dict[str, Any]] = {
    "drop by logger": {"drop": [{"logger": "urllib3.*"}]},
    "drop by level and message": {"drop": [{"level": "INFO", "message": "step [12]$"}]},
    "drop by the exception": {"drop": [{"message": "ValueError"}]},
    "drop by an attribute": {"drop": [{"attributes": {"tenant": "a"}}]},
    "drop by an attribute of the stream": {"drop": [{"step": "train*", "level": "DEBUG"}]},
    "keep by level": {"keep": [{"level": "ERROR"}, {"logger": "urllib3.*"}]},
    "keep by an attribute": {"keep": [{"attributes": {"tenant": "*"}}]},
    "sample": {"sample": {"ratio": 0.3, "below": "WARNING"}},
    "repeats": MINUTE,
    "without escapes": {"ansi": "strip", **MINUTE},
    "all": {
        "min_level": "INFO",
        "drop": [{"logger": "urllib3.*"}],
        "keep": [{"step": "train*"}],
        "sample": {"ratio": 0.6, "below": "ERROR"},
        **MINUTE,
    },
}


@pytest.mark.parametrize("rules", RULES)
def test_what_rules_exclude_is_not_missing_and_what_they_let_pass_is(rules: str, tmp_path: Path) -> None:
    stream = make_stream(**{"zenml.step.run.name": "trainer"})
    events = different_events(stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **RULES[rules])
    write(every, events)
    got = deliver(some, [event for event in events if some.wants(event.level)])
    assert 0 < len(got) < len(events)
    lost = next(event for event in got[1:] if REPEATED not in event.metadata)

    for others in ([every], [every, archive("third", tmp_path / "third", **RULES[rules])]):
        place = tmp_path / str(len(others))
        child = archive("some", place, **RULES[rules])
        for other in others[1:]:
            write_in_pieces(other, got)
        write_in_pieces(child, [event for event in got if event is not lost])
        found = compared(stream, *others, child).children
        assert counts(found["all"]) == {**CLEAN, "excluded": 0}
        assert counts(found["some"]) == {**CLEAN, "missing": 1, "excluded": len(events) - len(got)}
        write_in_pieces(child, [lost._replace(metadata={"zenml.log.backfilled": True})])
        assert counts(compared(stream, *others, child).children["some"])["missing"] == 0


def write_in_pieces(child: ChildConfig, events: Sequence[LogEvent]) -> None:
    """Write events that need not be in order."""
    for event in events:
        write(child, [event])


def test_a_repeat_whose_first_is_not_there_is_one_event_that_is_missing(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["retrying"] * 10, stream, step_nanos=SECOND)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **MINUTE)
    write(every, events)
    result = compared(stream, every, some)
    assert counts(result.children["some"]) == {**CLEAN, "missing": 1, "excluded": 9}
    assert [named.sequence for named in result.differences] == [0]


def test_an_equal_event_after_the_window_is_missing(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["retrying"] * 10, stream, step_nanos=20 * SECOND)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **MINUTE)
    write(every, events)
    write(some, events[:1])
    # Shown are those of second 0, 60, 120 and 180.
    assert [named.sequence for named in compared(stream, every, some).differences] == [3, 6, 9]


def test_where_a_child_does_not_show_ids_a_sampled_event_is_missing_and_says_why(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events([f"event {number}" for number in range(20)], stream)
    # The numbers of the journal are others than those of the stream.
    events = [event._replace(number=event.number + 1_000) for event in events]
    sampled = archive("some", tmp_path, sample={"ratio": 0.5})
    write(sampled, deliver(sampled, events))
    held = compared(stream, sampled).children["some"].events
    backend = SimulatedBackend()
    backend.received += events
    source = open_source(make_child("pages", backend))

    found = compared(stream, source, sampled).children["some"]
    assert (found.missing, found.excluded) == (0, 20 - held)

    source.scanner.entry_of = lambda content: content.entry.model_copy(update={"id": stream.id})  # type: ignore[method-assign]
    result = compared(stream, source, sampled)
    assert (result.children["some"].missing, result.children["some"].excluded) == (20 - held, 0)
    assert all("'sample'" in named.detail for named in result.differences if named.kind == "missing")


def test_pages_do_not_show_attributes_so_what_is_kept_by_them_is_expected(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["a", "b"], stream)
    backend = SimulatedBackend()
    backend.received += events
    some = archive("some", tmp_path, keep=[{"attributes": {"tenant": "*"}}, {"message": "c"}])
    assert compared(stream, open_source(make_child("pages", backend)), some).children["some"].missing == 2


@pytest.mark.parametrize(
    "rules",
    [
        {"keep": [{"attributes": {"tenant": "*"}, "message": "^a"}, {"message": "^b"}]},
        {"drop": [{"attributes": {"tenant": "x"}, "message": "^a"}]},
        {"drop": [{"attributes": {"tenant": "x", "zenml.log.source": "step"}, "message": "^a"}]},
        {"sample": {"ratio": 0.000001, "below": "WARNING"}},
    ],
    ids=["keep", "drop", "drop of a stream", "sample"],
)
def test_only_an_event_that_may_rightly_be_missing_says_why(rules: dict[str, Any], tmp_path: Path) -> None:
    stream = make_stream(**{"zenml.log.source": "step"})
    events = make_events(["a", "b", "a"], stream, levels=(20, 40, 20))
    backend = SimulatedBackend()
    backend.received += [event._replace(number=event.number + 1_000) for event in events]
    source = open_source(make_child("pages", backend))
    source.scanner.entry_of = lambda content: content.entry.model_copy(update={"id": stream.id})  # type: ignore[method-assign]
    result = compared(stream, source, archive("some", tmp_path, **rules))
    details = {named.sequence: named.detail for named in result.differences if named.kind == "missing"}
    assert details.keys() == {0, 1, 2}
    assert details[1] == ""
    assert f"'{next(iter(rules))}'" in details[0] == details[2]
    assert "'pages'" in details[0]


def test_of_masked_events_only_they_say_that_rules_may_exclude_them(tmp_path: Path) -> None:
    stream = make_stream()
    key = "AKIA" + "ABCD2345" * 2
    events = make_events(["one", f"two {key}", "three"], stream)
    masked, whole = archive("masked", tmp_path, redact={"secrets": False}), archive("whole", tmp_path)
    write(masked, deliver(masked, events))
    write(whole, events)
    some = archive("some", tmp_path, drop=[{"message": "key"}])
    for others, doubtful in (([masked], {1}), ([masked, whole], set()), ([whole, masked], set())):
        named = [one for one in compared(stream, *others, some).differences if one.child == "some"]
        assert [one.sequence for one in named] == [0, 1, 2]
        assert {one.sequence for one in named if "'drop'" in one.detail} == doubtful


class WallClock(Clock):
    """Tells the time of the event that is delivered."""

    seconds = 0.0

    def time(self) -> float:
        return self.seconds


def within_budget(child: ChildConfig, events: Sequence[LogEvent]) -> list[LogEvent]:
    """Return what a child's worker exports of some events, each at its own time."""
    clock = WallClock()
    assert child.budget is not None
    budget = Budget(child.budget, OwnAccount(), Told(), clock, lambda _: None)
    exported = []
    for event in events:
        clock.seconds = event.time_unix_nano / SECOND
        batch = Processed([event])
        budget.process(batch)
        budget.commit(batch)
        exported += batch.events
    return exported


# Each of three minutes has ten events; the budget is for six of them, and the seventh is replaced by the notice.
@pytest.mark.parametrize("are_archives", [True, False])
@pytest.mark.parametrize("then", ["stop", "warnings_only", "sample"])
def test_what_a_budget_has_withheld_is_missing_and_counted_as_that(
    then: str, are_archives: bool, tmp_path: Path
) -> None:
    stream = make_stream()
    begin = NOON // (60 * SECOND) * 60
    events = [
        event._replace(time_unix_nano=(begin + 60 * (place // 10)) * SECOND + place)
        for place, event in enumerate(make_events(["x"] * 30, stream, levels=(20, 30, 20)))
    ]
    settings = {"budget": {"events": 6, "per": "minute", "then": then}}
    every, some = archive("all", tmp_path), archive("some", tmp_path, **settings)
    got = within_budget(some, events)
    notices = [event.sequence for event in got if NOTICE in event.attributes]
    # Those of a budget with something left are missing if they are lost: one between the first and the last notice.
    lost = {1, 12}
    got = [event for event in got if event.sequence not in lost]
    if are_archives:
        write(every, events)
        write(some, got)
        sources: list[ChildConfig | Source] = [every, some]
    else:
        backends = {"all": SimulatedBackend(), "some": SimulatedBackend()}
        backends["all"].received += events
        backends["some"].received += got
        sources = [open_source(make_child("all", backends["all"]))]
        sources += [open_source(make_child("some", backends["some"], **settings))]
    result = compared(stream, *sources)
    held = {event.sequence for event in got} - set(notices)
    missing = {event.sequence for event in events} - held - set(notices)
    assert len(notices) == 3
    child = result.children["some"]
    assert counts(child) == {**CLEAN, "missing": len(missing), "excluded": 3}
    assert child.over_budget == len(missing - lost) > 0
    assert counts(result.children["all"]) == {**CLEAN, "excluded": 0}
    explained = {named.sequence for named in result.differences if "budget" in named.detail}
    assert explained == missing - lost


def test_what_is_missing_without_a_notice_is_lost_whatever_the_budget(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["a", "b"], stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, budget={"events": 1})
    write(every, events)
    write(some, events[:1])
    result = compared(stream, every, some)
    assert counts(result.children["some"]) == {**CLEAN, "missing": 1, "excluded": 0}
    assert result.children["some"].over_budget == 0


@pytest.mark.parametrize("seed", range(12))
def test_all_settings_together_explain_what_is_not_there_but_what_was_lost(seed: int, tmp_path: Path) -> None:
    rand, stream = random.Random(seed), make_stream()
    words = ["retrying", "ready", "mysql://etl:sw0rdfish@db/x", "urllib3"]
    events = [
        event._replace(time_unix_nano=NOON + place * 7 * SECOND, attributes={"n": place % 3})
        for place, event in enumerate(make_events(rand.choices(words, k=60), stream, levels=(10, 20, 30, 20)))
    ]
    settings = {
        "budget": {
            "events": rand.randint(1, 9),
            "per": "minute",
            "then": rand.choice(["stop", "warnings_only", "sample"]),
        },
        **rand.choice([{}, {"redact": {}}]),
        **rand.choice([{}, {"drop": [{"message": "urllib3"}]}]),
        **rand.choice([{}, {"sample": {"ratio": 0.5}}]),
        **rand.choice([{}, {"collapse_repeats": {"window_millis": 20_000}}]),
    }
    every, some = archive("all", tmp_path), archive("some", tmp_path, **settings)
    got = within_budget(some, deliver(some, events, batch_size=1)[: len(events)])
    # What stands for others at the end comes out of order, and is left out here.
    got = list({event.sequence: event for event in reversed(got)}.values())[::-1]
    write(every, events)
    write_in_pieces(some, got)
    found = compared(stream, every, some).children["some"]
    assert (found.different, found.missing - found.over_budget) == (0, 0)
    # One that stands for others may be a repeat itself, the last one of its stream.
    own = [event for event in got if NOTICE not in event.attributes and REPEATED not in event.metadata]
    lost = rand.choice(own)
    again = archive("some", tmp_path / "again", **settings)
    write_in_pieces(again, [event for event in got if event is not lost])
    found = compared(stream, every, again).children["some"]
    assert (found.different, found.missing - found.over_budget) in ((0, 1), (0, 0))
    notices = [event.sequence for event in got if NOTICE in event.attributes]
    if not notices or lost.sequence < notices[0]:
        assert found.missing - found.over_budget == 1


def test_a_notice_is_copied_to_no_other_child(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events([f"event {number}" for number in range(10)], stream)
    some, other = archive("some", tmp_path, budget={"events": 3, "then": "stop"}), archive("other", tmp_path)
    write(some, within_budget(some, events))
    assert copy(some, other, stream, tmp_path).copied == 3
    held = [content for chunk in open_source(other).scanner.scan(make_logs(stream)) for content in chunk.contents]
    assert len(held) == 3


def test_a_named_event_is_masked_as_in_the_children_that_mask_it(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["connect to mysql://etl:sw0rdfish@db/x"] * 2, stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, redact={})
    write(every, events)
    write(some, deliver(some, events[1:]))
    (named,) = compared(stream, every, some).differences
    assert (named.kind, named.sequence) == ("missing", 0)
    assert named.message == "connect to mysql://etl:[redacted:url_password]@db/x"


def test_after_a_backfill_nothing_is_missing_that_a_budget_has_withheld(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events([f"event {number}" for number in range(10)], stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, budget={"events": 3, "then": "stop"})
    write(every, events)
    write(some, within_budget(some, events))
    assert compared(stream, every, some).children["some"].over_budget == 6
    done = copy(every, some, stream, tmp_path)
    assert (done.copied, done.there) == (6, 4)
    found = compared(stream, every, some).children["some"]
    assert (counts(found), found.over_budget) == ({**CLEAN, "excluded": 1}, 0)


@pytest.mark.parametrize("rules", RULES)
def test_a_backfill_copies_what_the_rules_let_pass_and_once(rules: str, tmp_path: Path) -> None:
    stream = make_stream(**{"zenml.step.run.name": "trainer"})
    events = different_events(stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **RULES[rules])
    write(every, events)
    shown = len(deliver(some, [event for event in events if some.wants(event.level)], batch_size=1))

    done = copy(every, some, stream, tmp_path)
    assert (done.copied, done.unwanted) == (shown, len(events) - shown)
    again = copy(every, some, stream, tmp_path / "again")
    assert (again.copied, again.there, again.unwanted) == (0, shown, len(events) - shown)
    assert counts(compared(stream, every, some).children["some"]) == {**CLEAN, "excluded": len(events) - shown}


@pytest.mark.parametrize("rules", RULES)
def test_a_backfill_fills_what_a_delivery_has_lost_and_no_more(rules: str, tmp_path: Path) -> None:
    stream = make_stream(**{"zenml.step.run.name": "trainer"})
    events = different_events(stream)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **RULES[rules])
    write(every, events)
    got = deliver(some, [event for event in events if some.wants(event.level)])
    write_in_pieces(some, [event for place, event in enumerate(got) if place % 3])
    assert 0 < copy(every, some, stream, tmp_path).copied <= -(-len(got) // 3)
    assert compared(stream, every, some).children["some"].differences == 0
    assert copy(every, some, stream, tmp_path / "again").copied == 0


def test_a_copied_event_says_for_how_many_it_stands(tmp_path: Path) -> None:
    stream = make_stream()
    events = make_events(["retrying", *["other"] * 3, *["retrying"] * 5], stream, step_nanos=SECOND)
    every, some = archive("all", tmp_path), archive("some", tmp_path, **MINUTE)
    write(every, events)
    copy(every, some, stream, tmp_path)
    source = open_source(some)
    contents = [content for chunk in source.scanner.scan(make_logs(stream)) for content in chunk.contents]
    held = [event for content in contents if (event := source.scanner.event_of(content, stream))]
    told = [(event.sequence, {**event.attributes, **event.metadata}.get(REPEATED, 1)) for event in held]
    assert told == [(0, 1), (1, 1), (3, 2), (8, 5)]


def test_a_stream_s_last_repeats_reach_an_archive_although_later_events_did(tmp_path: Path) -> None:
    child = archive("some", tmp_path, **MINUTE, schedule_delay_millis=10)
    with SimulatedClock() as clock:
        store = make_store(child)
        origin = register(store)
        for message in ("retrying", "retrying", "done"):
            log(store, origin, message)
            clock.advance(1)
        store.deregister_origin(origin)
        clock.advance(1)
        assert store.stats()["some"]["delivered"] == 3
        written = b"".join(path.read_bytes() for path in (tmp_path / "some").rglob("*.log"))
        assert written.count(b'"retrying"') == 2
