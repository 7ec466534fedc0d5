"""A run that is killed in the middle of its step: the next run of the stack delivers what it has left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.collector import Collector
from tests.servers.datadog import Datadog
from tests.servers.zenml_server import AN_AGENT_DELIVERS, ZenML
from tests.watching import wait_until

pytestmark = pytest.mark.e2e

PROGRAM = Path(__file__).with_name("killed.py")
LINES = 1000


@pytest.fixture
def write_ahead(zenml: ZenML) -> Iterator[None]:
    zenml.cli("log-store", "update", "logs", "--primary=archive", "--durability=write_ahead")
    yield
    zenml.cli("log-store", "update", "logs", "--durability=spill")


@pytest.mark.usefixtures("write_ahead")
def test_the_next_run_delivers_what_a_killed_one_has_left(
    zenml: ZenML, collector: Collector, datadog: Datadog, tmp_path: Path
) -> None:
    killed = zenml.popen(str(PROGRAM), str(tmp_path / "killed"), str(LINES), "kill")
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    run_id, *said = (tmp_path / "killed").read_text().splitlines()
    assert len(said) == LINES // 2 + 1
    stream = zenml.streams(run_id)["step"]["id"]
    before = [entry["message"] for entry in lines_of(zenml, stream)]
    # An agent may have delivered it already.
    assert AN_AGENT_DELIVERS or len(before) < len(said)

    zenml.python(str(PROGRAM), str(tmp_path / "next"), str(LINES))
    wait_until(lambda: len(lines_of(zenml, stream)) >= len(said), "the archive has what was left")
    entries = lines_of(zenml, stream)
    assert [entry["message"] for entry in entries] == said
    ids = [entry["id"] for entry in entries]
    assert len(set(ids)) == len(ids)

    next_id, *next_said = (tmp_path / "next").read_text().splitlines()
    next_stream = zenml.streams(next_id)["step"]["id"]
    assert [entry["message"] for entry in lines_of(zenml, next_stream)] == next_said

    def received() -> list[Any]:
        return [record.attributes for record in collector.records() if record.attributes["zenml.log.id"] == stream]

    def shown() -> list[Any]:
        return [entry for entry in datadog.seen()["entries"] if entry["zenml.log.id"] == stream]

    for held in (received, shown):
        # Some may be there twice: copies, with the same uid.
        wait_until(lambda held=held: set(ids) <= {of["log.record.uid"] for of in held()}, "they have it too")
        sequences = list(dict.fromkeys(of["zenml.log.sequence"] for of in held()))
        assert sequences == list(range(len(sequences)))


def lines_of(zenml: ZenML, stream: str) -> list[dict[str, Any]]:
    """Return what the step has logged, as the server shows it: what ZenML logs itself is left out."""
    page = zenml.get(f"/logs/{stream}/entries", start="oldest", limit=10 * LINES)
    return [entry for entry in page["items"] if entry["name"] == "train.loop"]
