"""The agent, as a command of its own: a killed run's last line is on the page, though no other run follows."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_crash import LINES, PROGRAM, lines_of
from tests.servers.zenml_server import AN_AGENT_DELIVERS, ZenML
from tests.watching import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def write_ahead(zenml: ZenML) -> Iterator[None]:
    zenml.cli("log-store", "update", "logs", "--primary=archive", "--durability=write_ahead")
    yield
    zenml.cli("log-store", "update", "logs", "--durability=spill")


def newest(zenml: ZenML, stream: str) -> dict[str, Any]:
    """Return the last entry of a stream, as the server shows it."""
    entries: list[dict[str, Any]] = zenml.get(f"/logs/{stream}/entries", start="oldest", limit=1_000)["items"]
    return entries[-1]


@pytest.mark.usefixtures("write_ahead")
def test_the_last_line_of_a_killed_run_is_on_the_page(zenml: ZenML, tmp_path: Path) -> None:
    # If the environment says that an agent delivers, one runs already.
    with nullcontext() if AN_AGENT_DELIVERS else zenml.agent("--store", "logs"):
        _kill_and_read(zenml, tmp_path)


def _kill_and_read(zenml: ZenML, tmp_path: Path) -> None:
    killed = zenml.popen(str(PROGRAM), str(tmp_path / "killed"), str(LINES), "kill")
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    run_id, *said = (tmp_path / "killed").read_text().splitlines()
    stream = zenml.streams(run_id)["step"]["id"]
    wait_until(lambda: len(lines_of(zenml, stream)) >= len(said), "the archive has what was left")
    assert [entry["message"] for entry in lines_of(zenml, stream)] == said
    # And behind it that the process has died.
    wait_until(lambda: "ended without closing its logs" in newest(zenml, stream)["message"], "the entry is there")
    assert newest(zenml, stream)["level"] == logging.ERROR
