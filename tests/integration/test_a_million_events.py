"""A loss of one event in a million is found by `verify`, and named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import Stream
from tests.artifact_stores import FolderArchive, local_store
from tests.events import make_events
from tests.simulated_zenml import SimulatedZenML

pytestmark = pytest.mark.integration

EVENTS = 1_000_000
LOST = 654_321


def lines(one: bytes) -> Iterator[bytes]:
    """Yield blocks of lines, made of the one that the exporter has written for event 0."""
    pattern = one.replace(b"%", b"%%")
    pattern = re.sub(rb'(?<="message":"epoch )0', b"%(number)d", pattern)
    pattern = re.sub(rb'("id":"[0-9a-f-]{24})0{12}', rb"\g<1>%(number)012x", pattern)
    pattern = re.sub(rb'("sequence":|"number":)0(?=,)', rb"\g<1>%(number)d", pattern)
    assert pattern.count(b"%(number)") == 4
    for first in range(0, EVENTS, 10_000):
        yield b"".join(pattern % {b"number": number} for number in range(first, first + 10_000))


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that does not stay: it is to hold most of a gigabyte."""
    with TemporaryDirectory(prefix="a-million-events-") as folder:
        yield Path(folder)


@pytest.mark.deep
def test_one_lost_event_in_a_million_is_found_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zenml = SimulatedZenML.take_place(monkeypatch)
    children = [FolderArchive(name=name, type="artifact", root=str(folder / name)) for name in ("a", "b")]
    store = zenml.register(*children)
    run = zenml.begin_run("trained")
    logs = zenml.open_stream(run, "client", store.id)
    stream = Stream(logs.id, {}, None)
    exporters = [child.create_exporter() for child in children]
    event = make_events(["epoch 0"], stream)[0]
    for exporter in exporters:
        exporter.export([event])
    one, other = (Path(prepare_logs_uri(local_store(folder / name), logs.id)) for name in ("a", "b"))
    (written,) = one.read_bytes().splitlines(keepends=True)
    # The template makes what the exporter would write.
    second = make_events(["epoch 0", "epoch 1"], stream)[1]._replace(time_unix_nano=event.time_unix_nano)
    exporters[0].export([second])
    for exporter in exporters:
        exporter.close()
    blocks = lines(written)
    begin = next(blocks)
    assert begin.startswith(one.read_bytes())
    with one.open("wb") as whole, other.open("wb") as lacking:
        for place, block in enumerate((begin, *blocks)):
            whole.write(block)
            if place == LOST // 10_000:
                of_block = block.splitlines(keepends=True)
                lost = of_block.pop(LOST % 10_000)
                block = b"".join(of_block)
            lacking.write(block)

    found = zenml.run_command("verify", "logs", "--all", "--output", "json")

    assert found.exit_code == 1, found.stderr
    values = json.loads(found.stdout)
    assert (values["children"]["a"]["events"], values["children"]["b"]["events"]) == (EVENTS, EVENTS - 1)
    (named,) = values["events"]
    assert (named["kind"], named["child"], named["message"]) == ("missing", "b", f"epoch {LOST}")
    assert named["uid"] == json.loads(lost)["id"]
