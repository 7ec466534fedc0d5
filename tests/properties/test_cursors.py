"""Whatever a cursor says, it reads what a page of its stream may have, or is the mistake of whoever wrote it."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.models import LogsResponse

from composite_logstore import CompositeLogStore, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.reading.cursor import LARGEST_SEEN, Cursor, within_bounds
from composite_logstore.testing import SimulatedBackend
from composite_logstore.zenml import LogsEntriesFilter
from tests.artifact_stores import FolderArchive
from tests.events import make_events
from tests.simulation import make_child, make_logs, make_store


class Read(NamedTuple):
    """A log store, a stream of it, and what there is of that where it may be read."""

    store: CompositeLogStore
    logs: LogsResponse
    text: str


@pytest.fixture(scope="module", params=["file", "objects"])
def read(request: pytest.FixtureRequest) -> Iterator[Read]:
    """Beside it is another stream in the same archive, and another child that has more of this one."""
    with tempfile.TemporaryDirectory() as root:
        archive = FolderArchive(name="archive", type="artifact", root=root, is_file=request.param == "file")
        hidden = SimulatedBackend()
        store = make_store(archive, make_child("hidden", hidden), make_child("spare"), fetch_fallback=["spare"])
        logs = make_logs(store)
        exporter = archive.create_exporter()
        for first in range(0, 30, 10):
            said = [f"said {number}" for number in range(first, first + 10)]
            exporter.export(make_events(said, Stream(logs.id, {}), first))
            exporter.export(make_events(["secret"] * 10, Stream(make_logs(store).id, {}), first))
        exporter.close()
        hidden.received += make_events(["secret"] * 30, Stream(logs.id, {}), level=10)
        path = Path(root) / "logs" / f"{logs.id}.log"
        files = [path] if path.is_file() else sorted(path.iterdir())
        yield Read(store, logs, "".join(file.read_text() for file in files))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["archive", "hidden", "spare", "", "../archive", "none"])
numbers = st.integers(-(1 << 70), 1 << 70) | st.sampled_from([0, 1, 1e9, 10**9, 50_000, 50_001, True, "5"])
tokens = st.one_of(
    st.text(max_size=20),
    st.builds("{}:{}".format, st.sampled_from(["", "..", "/etc/passwd", "x.log"]) | st.text(max_size=9), numbers),
    st.integers(0, 20_000).map(":{}".format),
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["before", "after"]),
    st.dictionaries(st.sampled_from(list(Cursor.model_fields)), json_values, max_size=2),
    st.fixed_dictionaries({}, optional={"child": names, "limit": numbers, "token": tokens, "filter": json_values}),
    st.integers(0, 1_000),
    st.sampled_from([None, "x", "", "A", "=", "\x00", "\u00fc", "!"]),
)
def test_a_forged_cursor_reads_what_a_page_may_have_or_is_refused(
    read: Read, way: str, odd: dict[str, Any], forged: dict[str, Any], place: int, damage: str | None
) -> None:
    page = read.store.fetch(read.logs, start="newest" if way == "before" else "oldest", limit=7)
    cursor = getattr(page, way)
    fields = json.loads(base64.urlsafe_b64decode(cursor)) | odd | forged
    text = base64.urlsafe_b64encode(json.dumps(fields).encode("utf-8", "surrogatepass")).decode()
    if damage is not None:
        place %= len(text)
        text = text[:place] + damage + text[place + 1 :]

    try:
        found = read.store.fetch(read.logs, **{way: text})
    except ValueError:
        return

    # The place may be within a line: then its end is shown.
    assert all(entry.message in read.text for entry in found.items)
    assert "secret" not in str(found.items)
    assert len(found.items) <= fields["limit"] <= 50_000
    for other in (found.before, found.after):
        assert other is None or Cursor.decode(other).child in ("archive", "spare")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii"), min_size=1, max_size=64),
        st.lists(st.tuples(st.integers(0, (1 << 62) - 300), st.integers(0, 99)), min_size=1, max_size=20),
        max_size=30,
    ),
    st.integers(1, 200),
    st.sampled_from(["newer", "older"]),
)
def test_what_was_returned_is_remembered_as_far_as_there_is_room(
    found: dict[str, list[tuple[int, int]]], times: int, direction: Any
) -> None:
    seen = {
        f"{writer[:60]}{number}": Intervals(sorted((first, first + length) for first, length in intervals))
        for writer, intervals in found.items()
        for number in range(times)
    }
    kept = within_bounds(seen, direction)
    cursor = Cursor(
        log_store_id=UUID(int=0),
        logs_id=UUID(int=1),
        child="archive",
        direction=direction,
        limit=1_000,
        filter=LogsEntriesFilter(),
        token=":0",
        seen=kept,
    )

    text = cursor.encode()
    assert len(text) < 4 / 3 * (1.25 * LARGEST_SEEN + 400)
    again = Cursor.decode(text)
    assert {w: list(found) for w, found in again.seen.items()} == {w: list(found) for w, found in kept.items()}
    # Nothing is taken for returned that was not; and what came last is remembered first.
    for writer, intervals in kept.items():
        assert set(intervals) <= set(seen[writer])
        assert list(seen[writer])[-1 if direction == "newer" else 0] in list(intervals)
    assert list(kept) == list(seen)[len(seen) - len(kept) :]
    assert kept or not seen
