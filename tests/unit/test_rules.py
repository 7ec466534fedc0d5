from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import testing
from composite_logstore.child_types import parse_child
from composite_logstore.event import ExceptionInfo, LogEvent
from composite_logstore.processing.expressions import ExpressionSet, compiled
from composite_logstore.processing.processor import Processor
from composite_logstore.processing.repeats import REPEATED, Repeats
from composite_logstore.processing.rules import Rules
from composite_logstore.processing.settings import Matcher, RepeatSettings
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.artifact_stores import FolderArchive
from tests.events import NOON, make_events, make_stream
from tests.simulation import assert_accounts_add_up, make_child, make_store
from tests.unit.test_log_store import log, register


def event_with(message: str = "hello", level: int = logging.INFO, logger: str = "train", **changes: Any) -> LogEvent:
    (event,) = make_events([message], changes.pop("stream", None))
    return event._replace(level=level, logger_name=logger, **changes)


def wants(event: LogEvent, **settings: Any) -> bool:
    child = make_child("a", **settings)
    processed = child.create_processor().process([event])
    assert child.create_selector().wants(event) == bool(processed.events)
    assert sum(processed.withheld.values()) == 1 - len(processed.events)
    return bool(processed.events)


STREAM = make_stream(
    **{
        "zenml.log.source": "step",
        "zenml.step.run.name": "train_model",
        "zenml.pipeline.name": "nightly",
        "team": "vision",
    }
)


@pytest.mark.parametrize(
    ("matcher", "matching", "other"),
    [
        ({"logger": "urllib3.*"}, {"logger": "urllib3.connectionpool"}, {"logger": "urllib3"}),
        ({"logger": "stdout"}, {"logger": "stdout"}, {"logger": "stderr"}),
        ({"logger": "a[1].?"}, {"logger": "a[1].b"}, {"logger": "a1.b"}),
        ({"message": "^beat"}, {"message": "beat 7"}, {"message": "heartbeat"}),
        ({"message": "(?i)HEART"}, {"message": "heartbeat"}, {"message": "beat"}),
        ({"message": "loss=nan"}, {"message": "\x1b[31mloss=\x1b[0mnan"}, {"message": "loss"}),
        ({"attributes": {"epoch": "1*"}}, {"attributes": {"epoch": 12}}, {"attributes": {"epoch": 21}}),
        ({"attributes": {"epoch": "*"}}, {"attributes": {"epoch": ""}}, {"attributes": {}}),
        ({"attributes": {"team": "vision"}}, {"stream": STREAM}, {}),
        ({"source": "step"}, {"stream": STREAM}, {"stream": make_stream(**{"zenml.log.source": "client"})}),
        ({"step": "train_*"}, {"stream": STREAM}, {}),
        ({"pipeline": "nightly"}, {"stream": STREAM}, {}),
        ({"logger": "a", "message": "b"}, {"logger": "a", "message": "b"}, {"logger": "a", "message": "c"}),
    ],
    ids=lambda part: "+".join(part),
)
def test_a_matcher_matches_what_all_it_says_applies_to(
    matcher: dict[str, Any], matching: dict[str, Any], other: dict[str, Any]
) -> None:
    match, no_match = event_with(**matching), event_with(**other)
    assert not wants(match, drop=[matcher])
    assert wants(no_match, drop=[matcher])
    assert wants(match, keep=[matcher])
    assert not wants(no_match, keep=[matcher])


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
def test_drop_drops_a_level_and_those_below_and_keep_keeps_it_and_those_above(level: int) -> None:
    assert wants(event_with(level=level), drop=[{"level": "INFO"}]) == (level > logging.INFO)
    assert wants(event_with(level=level), keep=[{"level": "INFO"}]) == (level >= logging.INFO)


def test_drop_wins_and_the_first_matcher_that_matches_is_the_reason() -> None:
    child = make_child("a", keep=[{"logger": "train"}], drop=[{"message": "x"}, {"message": "noise"}, {"logger": "t*"}])
    events = [event_with("a noise"), event_with("hello"), event_with("hello", logger="other")]
    assert child.create_processor().process(events).withheld == {"drop.1": 1, "drop.2": 1, "keep": 1}


def test_an_exception_counts_as_a_part_of_the_message() -> None:
    event = event_with("failed", exception=ExceptionInfo("RuntimeError", "CUDA out of memory", "Traceback …"))
    assert not wants(event, drop=[{"message": "out of memory"}])


def test_an_expression_cannot_take_for_ever() -> None:
    event = event_with("a" * 100_000 + "b")
    assert wants(event, drop=[{"message": "(a+)+$"}, {"message": "(a|aa)+$"}, {"message": "(.*)*x"}])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drop": [{"message": "a(b"}]}, ("drop.0.message", "position 2")),
        ({"drop": [{"message": "(?<=x)y"}]}, ("drop.0.message", "position 1", "look-around")),
        ({"drop": [{"message": r"(\w)\1"}]}, ("drop.0.message", "back-references")),
        ({"keep": [{"message": "x" * 1_001}]}, ("keep.0.message", "1,000")),
        ({"drop": [{}]}, ("drop.0", "empty")),
        ({"drop": [{"loger": "x"}]}, ("drop.0.loger", "'logger'")),
        ({"drop": [{"level": "LOUD"}]}, ("drop.0.level", "DEBUG")),
        ({"sample": {"ratio": 0}}, ("sample.ratio", "at least 0.000001")),
        ({"sample": {"ratio": 1e-30}}, ("sample.ratio", "at least 0.000001")),
        ({"sample": {"ratio": True}}, ("sample.ratio", "not true")),
        ({"sample": {"ratio": 1}}, ("sample.ratio", "below 1")),
        ({"sample": {"ratio": float("nan")}}, ("sample.ratio", "at least 0.000001")),
        ({"sample": {"ratio": float("inf")}}, ("sample.ratio", "below 1")),
        ({"sample": {"ratio": 0.5, "below": "x"}}, ("sample.below", "DEBUG")),
        ({"collapse_repeats": {"window_millis": 0}}, ("collapse_repeats.window_millis",)),
        ({"drop": [{"logger": "x"}] * 101}, ("drop", "100")),
    ],
    ids=str,
)
def test_a_mistake_names_the_child_the_field_and_the_fix(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="child 'live'") as raised:
        parse_child(1, {"name": "live", "type": "simulated", **settings})
    for word in words:
        assert word in str(raised.value)


# Sampling


def test_sampling_takes_its_part_of_what_is_below_a_level() -> None:
    child = make_child("a", sample={"ratio": 0.1})
    events = [event._replace(level=logging.INFO) for event in make_events(["x"] * 20_000)]
    kept = child.create_processor().process(events)
    assert 1_800 < len(kept.events) < 2_200
    assert kept.withheld == {"sample": 20_000 - len(kept.events)}
    warnings = [event._replace(level=logging.WARNING) for event in events]
    assert child.create_processor().process(warnings).events == warnings


def test_a_larger_ratio_takes_the_same_events_and_more() -> None:
    events = make_events(["x"] * 1_000)

    def sampled(ratio: float) -> set[int]:
        child = make_child("a", sample={"ratio": ratio, "below": "CRITICAL"})
        return {event.number for event in child.create_processor().process(events).events}

    assert sampled(0.1) < sampled(0.2) < sampled(0.9)


@pytest.mark.deep
def test_every_process_samples_the_same_events() -> None:
    program = """
from tests.events import make_events
from tests.simulation import make_child
child = make_child("a", sample={"ratio": 0.3})
print([event.number for event in child.create_processor().process(make_events(["x"] * 200)).events])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# Repeats


def collapsing(**settings: Any) -> dict[str, Any]:
    return {"collapse_repeats": {"window_millis": 10_000}, **settings}


def counts(events: list[LogEvent]) -> list[tuple[str, object]]:
    return [(event.message, event.metadata.get(REPEATED, 1)) for event in events]


def test_equal_messages_in_a_window_become_one_with_a_count() -> None:
    child = make_child("a", **collapsing())
    processor = child.create_processor()
    batch = processor.process(make_events(["a", "a", "b", "a", "a"]))
    assert counts(batch.events) == [("a", 4), ("b", 1)]
    assert batch.withheld == {"collapse_repeats": 3}


def test_later_repeats_are_counted_by_the_next_one_that_is_shown() -> None:
    processor = make_child("a", **collapsing()).create_processor()
    first = make_events(["a"])
    for batch in (first, make_events(["a"] * 5, first[0].stream, first=1)):
        processor.commit(processor.process(batch))
    (later,) = make_events(["a"], first[0].stream, first=6)
    later = later._replace(time_unix_nano=first[0].time_unix_nano + 10_000_000_000)
    assert counts(processor.process([later]).events) == [("a", 6)]


def test_a_batch_that_is_not_committed_leaves_no_trace() -> None:
    processor = make_child("a", **collapsing()).create_processor()
    events = make_events(["a"] * 4)
    assert counts(processor.process(events).events) == counts(processor.process(events).events) == [("a", 4)]
    # After a split, the first half is sent alone.
    processor.commit(first := processor.process(events[:2]))
    processor.commit(second := processor.process(events[2:]))
    assert (counts(first.events), second.events) == ([("a", 2)], [])
    assert counts(processor.last_of(events[0].stream)) == [("a", 2)]
    assert processor.last_of(events[0].stream) == []


@pytest.mark.parametrize("change", [{"level": 30}, {"logger_name": "other"}, {"message": "b"}, {"writer": "f" * 15}])
def test_events_that_differ_are_no_repeats(change: dict[str, Any]) -> None:
    processor = make_child("a", **collapsing()).create_processor()
    one, other = make_events(["a", "a"])
    assert len(processor.process([one, other._replace(**change)]).events) == 2


def test_of_what_is_remembered_there_is_a_bound() -> None:
    processor = make_child("a", **collapsing()).create_processor()
    events = make_events([f"m{number}" for number in range(3_000)])
    processor.commit(processor.process(events))
    assert len(processor.process(events).events) >= 2_000


def test_a_stream_s_last_repeats_are_shown_and_counted_at_its_end() -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        store = make_store(make_child("a", backend, schedule_delay_millis=10, **collapsing()))
        origin = register(store)
        log(store, origin, "retrying")
        clock.advance(1)
        log(store, origin, *["retrying"] * 7)
        clock.advance(1)
        assert store.stats()["a"]["withheld"] == 7
        store.deregister_origin(origin)
        clock.advance(1)
        assert counts(backend.received) == [("retrying", 1), ("retrying", 7)]
        stats = store.stats()
        assert_accounts_add_up(stats)
        assert (stats["a"]["delivered"], stats["a"]["withheld"]) == (2, 6)


# Odd rules


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drop": [{"message": "x"}, {"logger": "*"}]}, ("'drop.1'", "every event")),
        ({"drop": [{"level": "CRITICAL"}]}, ("'drop.0'", "every event")),
        ({"drop": [{"level": "INFO"}], "min_level": "WARNING"}, ("'drop.0'", "'min_level'")),
        ({"sample": {"ratio": 0.1}, "min_level": "WARNING"}, ("'sample'", "'min_level'")),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_meant_is_warned_of(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    (warning,) = make_store(make_child("other"), make_child("a", **settings)).config.warnings
    for word in ("child 'a'", *words):
        assert word in warning


def test_a_primary_that_gets_nothing_is_warned_of() -> None:
    warnings = make_store(make_child("a", drop=[{"logger": "*"}])).config.warnings
    assert any("primary" in warning for warning in warnings)


def test_usual_rules_are_not_warned_of() -> None:
    rules: dict[str, Any] = {"drop": [{"level": "INFO"}, {"logger": "a.*"}], "sample": {"ratio": 0.5}}
    assert make_store(make_child("other"), make_child("a", **rules, min_level="DEBUG")).config.warnings == []


# Any of them

STREAM_WITHOUT_STEP = make_stream(**{"zenml.log.source": "step"})
HEARTBEAT = Matcher(message="^heartbeat")


@pytest.mark.parametrize(
    ("drop", "keep", "reason"),
    [
        ([HEARTBEAT], [], None),
        ([Matcher(message="^hello")], [], "drop.0"),
        ([HEARTBEAT, Matcher(logger="lib.*")], [], "drop.1"),
        ([Matcher(logger="lib")], [], None),
        ([Matcher(logger="lib.*", level="DEBUG")], [], None),
        ([Matcher(logger="lib.*", level="INFO")], [], "drop.0"),
        ([], [HEARTBEAT], "keep"),
        ([], [HEARTBEAT, Matcher(logger="lib.*")], None),
        ([], [Matcher(level="WARNING")], "keep"),
        ([Matcher(message="hello")], [Matcher(logger="lib.*")], "drop.0"),
        ([Matcher(message="hello")], [Matcher(logger="other")], "drop.0"),
        ([HEARTBEAT], [Matcher(logger="other")], "keep"),
        ([Matcher(source="st*")], [], "drop.0"),
        ([Matcher(step="*")], [], None),
        ([Matcher(attributes={"zenml.log.source": "step"})], [], "drop.0"),
        ([Matcher(attributes={"unknown": "*"})], [], None),
    ],
)
def test_keep_chooses_and_drop_takes_away(drop: list[Matcher], keep: list[Matcher], reason: str | None) -> None:
    rules = Rules(drop, keep)
    event = event_with("hello", logger="lib.sub", stream=STREAM_WITHOUT_STEP)
    assert rules.reason(event) == reason
    assert rules.wants(event) == (reason is None)


def test_expressions_that_are_too_large_together_search_one_by_one() -> None:
    together = ExpressionSet([r"\pL{300}x", "b"])
    assert list(together.matching("xb")) == [1]
    assert list(together.matching("x")) == []


@pytest.mark.parametrize(
    ("pattern", "place"),
    [("a(b", 2), ("[z-a]", 2), ("(?<=x)y", 1), (r"(\w)\1", 5), ("\ud800", 1), (r"\pL[z-a]", 5), (r"\pX", 1)],
)
def test_an_invalid_expression_is_refused_with_its_position(pattern: str, place: int) -> None:
    with pytest.raises(ValueError, match=f"position {place}:"):
        compiled(pattern)


def test_an_expression_that_is_too_large_is_called_that() -> None:
    with pytest.raises(ValueError, match="is too large"):
        compiled(r"\pL{900}")


@pytest.mark.parametrize("seed", range(50))
def test_whatever_the_batches_and_retries_the_shown_events_stand_for_all(seed: int) -> None:
    rand, stream = random.Random(seed), make_stream()
    events = testing.make_events(
        rand.choices("ab", k=40), stream, start_unix_nano=NOON, step_nanos=rand.choice([0, 1_000_000, 40_000_000])
    )
    settings = RepeatSettings(window_millis=rand.choice([1, 50, 500]))
    step, alone = Repeats(settings), Repeats(settings)
    processor = Processor([step])
    shown, withheld, begin = [], 0, 0
    while begin < len(events):
        end = rand.randint(begin + 1, len(events))
        batch = processor.process(events[begin:end])
        if rand.random() < 0.4:
            # It failed, and is tried again, perhaps with another size.
            continue
        processor.commit(batch)
        shown += batch.events
        withheld += batch.withheld.total()
        begin = end
    assert len(shown) + withheld == len(events)
    assert [event.number for event in shown] == [event.number for event in events if alone.expects(event)]
    assert sum(event.metadata.get(REPEATED, 1) for event in shown + step.last_of(stream)) == len(events)


def test_the_last_repeats_are_in_an_archive_too(tmp_path: Path) -> None:
    archive = FolderArchive(name="a", type="artifact", root=str(tmp_path), is_file=True, **collapsing())
    with SimulatedClock() as clock:
        store = make_store(archive)
        origin = register(store)
        for messages in (["beat"], ["beat"] * 3, ["later"]):
            log(store, origin, *messages)
            clock.advance(2)
        store.deregister_origin(origin)
        clock.advance(2)
        (file,) = tmp_path.rglob("*.log")
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert [line["message"] for line in lines] == ["beat", "later", "beat"]
        assert store.stats()["a"]["delivered"] == len(lines)
