"""Whatever becomes of a spool's files: nothing is raised, nothing intact is hidden, nothing is made up."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore.event import LogEvent
from composite_logstore.spool import Damage, Spool
from tests.events import WRITER, make_events, make_stream

places = st.floats(0, 1, exclude_max=True)
cuts = st.tuples(st.just("cut"), places, st.just(b""))
flips = st.tuples(st.just("flip"), places, st.integers(0, 7).map(lambda bit: bytes([1 << bit])))
overwritten = st.tuples(st.just("overwrite"), places, st.binary(min_size=1, max_size=300) | st.just(bytes(300)))
inserted = st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=300))


def changed(data: bytes, change: tuple[str, float, bytes]) -> bytes:
    what, where, value = change
    place = int(where * len(data))
    if what == "cut":
        return data[:place]
    if what == "insert":
        return data[:place] + value + data[place:]
    if what == "flip":
        value = bytes([data[place] ^ value[0]]) if data else b""
    return data[:place] + value + data[place + len(value) :]


def intact(original: bytes, now: bytes) -> set[bytes]:
    """The original lines that are still there, each on a line of its own."""
    return set(original.split(b"\n")) & {line.lstrip(b"\0") for line in now.split(b"\n")[:-1]}


@settings(max_examples=300, deadline=None)
@given(
    messages=st.lists(st.text(max_size=200), min_size=1, max_size=12),
    changes=st.lists(cuts | flips | overwritten | inserted, min_size=1, max_size=3),
    in_position=st.booleans(),
)
def test_what_is_intact_is_read_and_nothing_else(
    messages: list[str], changes: list[tuple[str, float, bytes]], in_position: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool.create(Path(folder), WRITER, ["a"])
        streams = [make_stream(), make_stream()]
        events = [
            make_events([message], streams[place % 2])[0]._replace(number=place, sequence=place // 2)
            for place, message in enumerate(messages)
        ]
        for event in events:
            spool.append(event, lambda size: True)
        spool.settle("a", 1)
        spool.abandon()
        path = spool.folder / "a.settled" if in_position else next(spool.folder.glob("*.log"))
        original = path.read_bytes()
        data = original.rstrip(b"\0")
        for change in changes:
            data = changed(data, change)
        path.write_bytes(data)

        found = Spool.adopt(spool.folder)
        assert found is not None
        assert found.settled("a") in (0, 1)
        items = list(found.scan())
        read = [item for item in items if isinstance(item, LogEvent)]
        known = {event.number: (event.message, event.stream.id, event.sequence) for event in events}
        for event in read:
            assert known[event.number] == (event.message, event.stream.id, event.sequence)
        lines = [line for line in original.split(b"\n") if line[9:10] == b"["]
        expected = intact(original, data) if not in_position else set(lines)
        assert {event.number for event in read} >= {
            number for number, line in enumerate(lines) if line in expected and b'"format"' not in line
        }
        kept = found.set_aside()
        assert all(aside.exists() for damage, aside in kept if damage.length)
        found.abandon()

        # What was set aside is not met again.
        again = Spool.adopt(spool.folder)
        assert again is not None
        assert [item.number for item in again.scan() if isinstance(item, LogEvent)] == [item.number for item in read]
        assert not [item for item in again.damage if isinstance(item, Damage) and item.why != "zeros"]
        again.abandon()
