"""`make demo`, as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import requests

from examples.demo import __main__ as demo
from examples.demo.account import Failure
from tests.patience import PATIENCE_SECONDS
from tests.servers.collector import find_rotel
from tests.servers.datadog import API_KEY, APPLICATION_KEY

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
ROW = r"│ {child} +│ healthy +│ +([\d,]+) │ +([\d,]+) │ +0 │ +0 │ +0 │"


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The directory for the demo's temporary files, by which its processes are known too."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return temporary


@pytest.fixture
def start(temporary: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the demo, with further variables in its environment."""
    started: list[subprocess.Popen[str]] = []

    def start(**variables: str) -> subprocess.Popen[str]:
        env = {**os.environ, "TMPDIR": str(temporary), "PYTHONUTF8": "1", **variables}
        program = subprocess.Popen(
            [sys.executable, "-m", "examples.demo"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        started.append(program)
        return program

    yield start
    for program in started:
        if program.poll() is None:
            program.terminate()
        program.communicate(timeout=PATIENCE_SECONDS)


def processes(temporary: Path) -> list[psutil.Process]:
    """Return the processes of the demo: what it starts has a temporary directory within the one it was given."""
    return [
        process
        for process in psutil.process_iter(["environ", "cmdline"])
        if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(temporary))
    ]


def assert_nothing_left(temporary: Path) -> None:
    assert processes(temporary) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.deep
@pytest.mark.parametrize("hidden", [False, True], ids=["collector", "receiver"])
def test_demo(hidden: bool, temporary: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    variables = {}
    if hidden:
        # A module without the collector's binary beside it: as if there were no wheel for this machine.
        (tmp_path / "rotel.py").touch()
        variables["PYTHONPATH"] = str(tmp_path)
    program = start(**variables)
    output, _ = program.communicate(timeout=10 * PATIENCE_SECONDS)
    assert program.returncode == 0, output
    assert ("has no wheel for this machine" in output) is (hidden or find_rotel() is None)
    for child in ("archive", "collector", "live"):
        accounts = re.search(ROW.format(child=child), output)
        assert accounts is not None, output
        assert accounts[1] == accounts[2]
        assert int(accounts[1].replace(",", "")) > 3000
    assert re.search(r"The step's end took \d+\.\d\d s", output)
    assert "all that were logged while it was dead" in " ".join(output.split())
    assert output.index("Training: 5 epochs") < output.index("Trained: the loss is")
    last_words = re.search(r"(\d+\.\d) s later ZenML's server shows its last words", output)
    assert last_words is not None, output
    assert "ended without closing its logs" in output
    assert API_KEY not in output
    assert APPLICATION_KEY not in output
    assert_nothing_left(temporary)


@pytest.mark.deep
def test_it_stays_until_it_is_interrupted(temporary: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    program = start(STAY="1")
    assert program.stdout is not None
    lines = []
    for line in program.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    assert program.poll() is None, lines
    address = next(match for line in lines if (match := re.search(r"(http://127\.0\.0\.1:\d+)/projects/\S+", line)))
    assert requests.get(address[0], timeout=60).ok
    assert requests.get(f"{address[1]}/api/v1/info", timeout=60).ok
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=PATIENCE_SECONDS)
    assert program.returncode == 0, output
    assert_nothing_left(temporary)


@pytest.mark.deep
def test_interrupted_while_the_server_starts(temporary: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    program = start()
    end = time.monotonic() + 60
    # Not even ZenML knows the server's process yet.
    while not any("zenml.services.local.local_daemon_entrypoint" in p.info["cmdline"] for p in processes(temporary)):
        assert time.monotonic() < end
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=PATIENCE_SECONDS)
    assert program.returncode == 130, output
    assert "Interrupted" in output
    assert_nothing_left(temporary)


def test_a_pipeline_that_ends_before_it_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tmp_path / "pipeline.py"
    pipeline.write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "PIPELINE", pipeline)
    monkeypatch.setattr(demo, "WAIT_SECONDS", PATIENCE_SECONDS)
    zenml: Any = SimpleNamespace(directory=tmp_path, env=dict(os.environ))
    datadog: Any = SimpleNamespace(seen=lambda: {"entries": []})
    with pytest.raises(Failure, match="the pipeline ended with 3 before it was killed"):
        demo.kill_and_read(demo.Narrator(), zenml, datadog)
