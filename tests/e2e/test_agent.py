"""The agent, as a command of its own: a killed run's last line is on the page, though no other run follows."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_crash import LINES, PROGRAM, lines_of
from tests.servers.zenml_server import ZenML
from tests.watching import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def write_ahead(zenml: ZenML) -> Iterator[None]:
    zenml.cli("log-store", "update", "logs", "--primary=archive", "--durability=write_ahead")
    yield
    zenml.cli("log-store", "update", "logs", "--durability=spill")


@pytest.mark.usefixtures("write_ahead")
def test_the_last_line_of_a_killed_run_is_on_the_page(zenml: ZenML, tmp_path: Path) -> None:
    agent = zenml.popen("-m", "composite_logstore", "agent", "--store", "logs", "--health-address", ":0")
    assert agent.stdout is not None
    lines = iter(agent.stdout.readline, "")
    assert any("Delivers what dead processes leave" in line for line in lines)
    killed = zenml.popen(str(PROGRAM), str(tmp_path / "killed"), str(LINES), "kill")
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    run_id, *said = (tmp_path / "killed").read_text().splitlines()
    stream = zenml.streams(run_id)["step"]["id"]
    wait_until(lambda: len(lines_of(zenml, stream)) >= len(said), "the archive has what was left")
    assert [entry["message"] for entry in lines_of(zenml, stream)] == said

    agent.send_signal(signal.SIGTERM)
    rest, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0, rest
