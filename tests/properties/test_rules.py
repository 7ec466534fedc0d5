"""Rules against the comparison: what a child got through its processor is all that it should have, and no less."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore.parity.compare import compare
from composite_logstore.parity.scan import open_source
from composite_logstore.testing import make_logs, make_stream
from tests.artifact_stores import FolderArchive
from tests.copying import copy
from tests.events import SECOND, make_events

LOGGERS = ("train", "urllib3.pool", "stdout")
MESSAGES = ("heartbeat", "\x1b[32mheartbeat\x1b[0m", "loss 1", "loss 2")
LEVELS = (10, 20, 30, 40)

matchers = st.fixed_dictionaries(
    {},
    optional={
        "logger": st.sampled_from(["train", "urllib3.*", "*o*"]),
        "level": st.sampled_from(["DEBUG", "INFO", "ERROR"]),
        "message": st.sampled_from(["^heartbeat$", "loss", "[12]$"]),
        "step": st.sampled_from(["train*", "other"]),
        "attributes": st.sampled_from([{"tenant": "a"}, {"tenant": "*"}, {"zenml.log.source": "step"}]),
    },
).filter(bool)
rules = st.fixed_dictionaries(
    {},
    optional={
        "min_level": st.sampled_from(["INFO", "WARNING"]),
        "ansi": st.sampled_from(["keep", "strip"]),
        "drop": st.lists(matchers, max_size=3),
        "keep": st.lists(matchers, max_size=3),
        "sample": st.fixed_dictionaries(
            {"ratio": st.sampled_from([0.1, 0.5, 0.9]), "below": st.sampled_from(["INFO", "ERROR"])}
        ),
        "collapse_repeats": st.fixed_dictionaries({"window_millis": st.sampled_from([1, 5_000, 60_000])}),
    },
)
kinds = st.tuples(
    st.sampled_from(LOGGERS), st.sampled_from(LEVELS), st.sampled_from(MESSAGES), st.sampled_from(["", "a", "b"])
)


@settings(deadline=None)
@given(
    rules,
    st.lists(kinds, min_size=1, max_size=40),
    st.sampled_from([1, SECOND, 7 * SECOND]),
    st.integers(1, 10),
    st.data(),
)
def test_what_was_delivered_is_clean_and_what_was_removed_is_missing(
    rules: dict[str, Any], logged: list[tuple[str, int, str, str]], step_nanos: int, batch_size: int, data: Any
) -> None:
    stream = make_stream(**{"zenml.step.run.name": "trainer"})
    events = make_events([message for _, _, message, _ in logged], stream, step_nanos=step_nanos)
    events = [
        event._replace(logger_name=logger, level=level, attributes={"tenant": tenant} if tenant else {})
        for event, (logger, level, _, tenant) in zip(events, logged, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        every, some, copied = (
            FolderArchive.model_validate(
                {"name": name, "type": "artifact", "root": str(root / name), **({} if name == "every" else rules)}
            )
            for name in ("every", "some", "copied")
        )
        processor = some.create_processor()
        wanted = [event for event in events if some.wants(event.level)]
        got = []
        for begin in range(0, len(wanted), batch_size):
            processor.commit(batch := processor.process(wanted[begin : begin + batch_size]))
            got += batch.events
        told_last = processor.last_of(stream)
        removed = data.draw(st.sets(st.sampled_from([event.sequence for event in got]))) if got else set()

        exporter = every.create_exporter()
        exporter.export(events)
        exporter.close()
        exporter = some.create_exporter()
        if left := [event for event in got if event.sequence not in removed]:
            exporter.export(left)
        exporter.end_stream(stream)
        if told_last:
            exporter.export(told_last)
        exporter.close()

        result = compare(make_logs(stream), "", [open_source(every), open_source(some)], stream=stream)
        assert {named.sequence for named in result.differences} == removed
        assert {named.kind for named in result.differences} <= {"missing"}
        assert result.children["some"].excluded == len(events) - len(got) - len(told_last)

        # A backfill fills that, and a second one copies nothing.
        copy(every, some, stream, root / "one")
        result = compare(make_logs(stream), "", [open_source(every), open_source(some)], stream=stream)
        assert result.children["some"].differences == 0
        assert copy(every, some, stream, root / "other").copied == 0

        # So does one into an empty child.
        copy(every, copied, stream, root / "one")
        result = compare(make_logs(stream), "", [open_source(every), open_source(copied)], stream=stream)
        assert result.children["copied"].differences == 0
        assert copy(every, copied, stream, root / "other").copied == 0
