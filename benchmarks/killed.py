"""How long after `kill -9` a run's last line, and the entry that says so, are on the page of ZenML's server.

It starts ZenML's server and an agent, kills a logging pipeline again and again, and asks the server for the step's page
every 20 ms. It takes about ten seconds a round. The lowest, the median and the highest time, as a table.

    python -m benchmarks.killed [rounds]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.servers.zenml_server import ZenML

ROUNDS = 10
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.02
ENTRY = "ended without closing its logs"
PROGRAM = """
import logging, os, sys, time
from zenml import get_step_context, pipeline, step

@step(enable_cache=False)
def train() -> None:
    logger = logging.getLogger("train")
    logger.setLevel(logging.INFO)
    said = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(said, f"{get_step_context().pipeline_run.id}\\n".encode())
    for number in range(100_000):
        logger.info("line %d", number)
        os.write(said, f"line {number}\\n".encode())
        time.sleep(0.01)

@pipeline(enable_cache=False)
def training() -> None:
    train()

if __name__ == "__main__":
    training()
"""


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="composite-logstore-bench-") as directory:
        zenml = ZenML(Path(directory) / "zenml")
        program = Path(directory) / "program.py"
        program.write_text(PROGRAM)
        with zenml:
            children = json.dumps([{"name": "archive", "type": "artifact"}])
            zenml.cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
            settings = ("--primary=archive", f"--children={children}", "--durability=write_ahead")
            zenml.cli("log-store", "register", "logs", "--flavor", "composite", *settings)
            zenml.cli("stack", "register", "killed", "-o", "default", "-a", "default", "--log_store", "logs", "--set")
            with zenml.agent():
                found = [killed(zenml, program, Path(directory) / str(number)) for number in range(rounds)]
    print("| on the page after `kill -9` | lowest | median | highest |\n|---|---|---|---|")
    for name, times in zip(("the last line", "the entry"), zip(*found, strict=True), strict=True):
        print(f"| {name} | {min(times):.2f} s | {median(times):.2f} s | {max(times):.2f} s |")


def killed(zenml: ZenML, program: Path, report: Path) -> tuple[float, float]:
    """Kill a pipeline. Returns after how many seconds its last line is on the page, and the entry."""
    process = zenml.popen(str(program), str(report))
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not report.exists() or len(report.read_text().splitlines()) < 100:
            assert time.monotonic() < end, process.poll()
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        at = time.monotonic()
    process.wait()
    run_id, *said = report.read_text().splitlines()
    stream = zenml.streams(run_id)["step"]["id"]
    times: dict[str, float] = {}
    while len(times) < 2:
        assert time.monotonic() < at + WAIT_SECONDS, times
        shown = page(zenml, stream)
        now = time.monotonic() - at
        for what, is_there in (("line", said[-1] in shown), ("entry", any(ENTRY in text for text in shown))):
            if is_there:
                times.setdefault(what, now)
        time.sleep(POLL_SECONDS)
    return times["line"], times["entry"]


def page(zenml: ZenML, stream: str) -> list[str]:
    """Return the last messages of a stream, as the server shows them."""
    answer: Any = zenml.get(f"/logs/{stream}/entries", start="newest", limit=20)
    return [entry["message"] for entry in answer["items"]]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
