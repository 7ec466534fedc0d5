"""A pipeline whose steps start processes in every way.

    joining_program.py REPORT

It writes into the report, as JSON, what the archive has of each step, and what the steps have found out.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

import composite_logstore
from composite_logstore.capture.open_streams import VARIABLE
from composite_logstore.capture.process import RANK

# What a launcher starts for each rank. It has no file, as the programs of some launchers have none.
WORKER = """
import logging, os, sys, threading
import composite_logstore
composite_logstore.join()
print("printed")
print("on stderr", file=sys.stderr)
logging.getLogger("worker").warning("logged")
thread = threading.Thread(target=print, args=("in a thread",))
thread.start()
thread.join()
if os.environ["RANK"] == "1":
    # As a launcher does once another rank has failed.
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
"""

# The same, and it needs nothing: `composite-logstore run` is around its launcher.
UNAWARE = """
import ctypes, logging
logging.basicConfig()
logging.getLogger("worker").warning("logged below run")
print("printed", "below", "run")
libc = ctypes.CDLL(None)
libc.puts(b"from C below run")
libc.fflush(None)
"""

LAUNCHER = """
import os, subprocess, sys
worker, ranks = sys.argv[1], int(sys.argv[2])
processes = [
    subprocess.Popen([sys.executable, "-c", worker], env={**os.environ, "RANK": str(rank)}) for rank in range(ranks)
]
sys.exit(max(process.wait() for process in processes) or 5)
"""

RANKS = 2
# The last one kills itself.
KILLED_RANK = 1
RANKS_BELOW_RUN = 4
# Of a rank with both: four entries of one that joins, and three of one below `run`.
ENTRIES_OF_RANK = 7

report: dict[str, Any] = {}
pools: dict[str, Any] = {}


def say(what: str) -> int:
    """Log and print, in whichever process or thread this runs."""
    logging.getLogger("pool").warning("logged %s", what)
    print("printed", what, flush=True)
    return os.getpid()


def joined(what: str) -> int:
    composite_logstore.join()
    return say(what)


def launch() -> list[tuple[int, str, str]]:
    """Start a process for each rank, all at once, as `torchrun` does."""
    started = []
    for rank in range(RANKS):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        command = [sys.executable, "-c", WORKER]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [(process, *process.communicate()) for process in started]
    return [(process.returncode, stdout, stderr) for process, stdout, stderr in ended]


def as_fork(what: str) -> int:
    """Log from a forked process and from a thread of it."""
    thread = threading.Thread(target=say, args=(f"{what} thread",))
    thread.start()
    thread.join()
    return say(what)


def run_launcher() -> tuple[int, str]:
    """Start a launcher that knows nothing of log stores, and `run` around it."""
    command = [sys.executable, "-m", "composite_logstore", "run", "--capture-fd", "--"]
    command += [sys.executable, "-c", LAUNCHER, UNAWARE, str(RANKS_BELOW_RUN)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


@step(enable_cache=False)
def first() -> None:
    report["variable"] = os.environ[VARIABLE]
    with ThreadPoolExecutor(1) as side:
        # Both import ZenML: one for each processor.
        run = side.submit(run_launcher)
        report["ranks"] = launch()
        report["run"] = run.result()
    pools["spawn"] = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pools["fork"] = multiprocessing.get_context("fork").Pool(1)
    report["spawn"] = pools["spawn"].submit(joined, "spawn one").result()
    report["fork"] = pools["fork"].apply(as_fork, ("fork one",))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(composite_logstore.in_context(say), "in context").result()
        pool.submit(say, "adopted").result()


@step(enable_cache=False)
def second() -> None:
    # The pools have outlived the first step.
    found: list[Future[int]] = [pools["spawn"].submit(say, "spawn two")]
    report["spawn again"] = found[0].result()
    report["fork again"] = pools["fork"].apply(as_fork, ("fork two",))
    pools["spawn"].shutdown()
    pools["fork"].close()
    pools["fork"].join()


@pipeline(enable_cache=False)
def training() -> None:
    first()
    second(after=["first"])


def main() -> None:
    client = Client()
    client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
    settings = {"primary": "archive", "children": [{"name": "archive", "type": "artifact"}], "adopt_threads": True}
    client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, settings)
    components: dict[StackComponentType, Any] = {
        StackComponentType.ORCHESTRATOR: "default",
        StackComponentType.ARTIFACT_STORE: "default",
        StackComponentType.LOG_STORE: "logs",
    }
    client.create_stack("logging", components)
    client.activate_stack("logging")
    run = training()
    assert run is not None
    report["variable afterwards"] = os.environ.get(VARIABLE)
    report["pid"] = os.getpid()
    folder = Path(client.active_stack.artifact_store.path, "logs")
    end = time.monotonic() + 60
    # The step's process delivers what the killed rank has left.
    while time.monotonic() < end:
        report["steps"] = archived(client, run.id, folder)
        found = [entry.get("attributes", {}).get(RANK) for entry in report["steps"]["first"]["entries"]]
        # One more tells that the killed rank has ended.
        if (found.count(0), found.count(KILLED_RANK)) == (ENTRIES_OF_RANK, ENTRIES_OF_RANK + 1):
            break
        time.sleep(0.2)
    Path(sys.argv[1]).write_text(json.dumps(report))


def archived(client: Client, run_id: Any, folder: Path) -> dict[str, Any]:
    """Return what the archive has of each step, without duplicates: what a killed process sent may be sent again."""
    steps = {}
    for name, model in client.get_pipeline_run(run_id).steps.items():
        streams = [logs for logs in client.get_run_step(model.id).log_collection or [] if logs.source == "step"]
        entries = {}
        for logs in streams:
            for line in (folder / f"{logs.id}.log").read_bytes().split(b"\n"):
                # A line may be under way, or what a killed process has left of one.
                with suppress(ValueError):
                    entry = json.loads(line)
                    entries[entry["id"]] = entry
        steps[name] = {"streams": len(streams), "entries": list(entries.values())}
    return steps


if __name__ == "__main__":
    main()
