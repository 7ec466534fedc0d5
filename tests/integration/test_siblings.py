"""Processes of one log store that come and go, in the same folder, while another one logs to a backend that is down."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest

from composite_logstore.spool.folder import Spool
from composite_logstore.testing import SimulatedBackend
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.watching import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.process]

SIBLINGS = 30

# What short processes do: most deliver everything, some die, and each takes over what it finds.
COME_AND_GO = """
import os, random, secrets, sys, time
from pathlib import Path
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.testing import make_events

component, number, end = Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + float(sys.argv[3])

def live(rand):
    while time.monotonic() < end:
        writer = secrets.token_hex(8)[:15]
        spool = Spool.create(component, writer, ["a"])
        for event in make_events(["event"] * 3, writer=writer):
            spool.segments.append(event, lambda size: True)
        time.sleep(rand.uniform(0, 0.02))
        spool.acknowledge("a", 3)
        rand.choice([spool.close, spool.close, spool.abandon])()
        for folder in rand.sample(found := process_folders(component), min(3, len(found))):
            taken_over = Spool.recover(folder)
            if taken_over is not None:
                messages = [item.message for item in taken_over.reader.scan()]
                assert messages in ([], ["event"] * 3), messages
                taken_over.acknowledge("a", 3)
                taken_over.close()

for _ in range(number):
    if not os.fork():
        try:
            live(random.Random(os.getpid()))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
print("begun", flush=True)
sys.exit(max(os.wait()[1] for _ in range(number)))
"""


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.deep)])
@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_siblings_that_come_and_go_cost_nothing_that_is_on_disk(
    tmp_path: Path, request: pytest.FixtureRequest, durability: str, seconds: float
) -> None:
    backend = SimulatedBackend()
    backend.fault = "refused"
    store = make_store(
        make_child("a", backend, max_queue_size=500),
        durability=durability,
        spool_directory=str(tmp_path),
        spool_max_bytes=256 * 2**20,
    )
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    spilling = store.writer._journal.spilling
    assert spilling is not None
    component = tmp_path / str(store.id)
    command = [sys.executable, "-c", COME_AND_GO, str(component), str(SIBLINGS), str(seconds)]
    siblings = subprocess.Popen(
        command, cwd=request.config.rootpath, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert siblings.stdout is not None
        assert siblings.stdout.readline() == "begun\n"
        number, errors = 0, set()
        # Segments of 4 MiB are to be full now and then, and the spool never, however long this takes.
        padding = "x" * int(100_000 / seconds)
        while siblings.poll() is None:
            record = logging.LogRecord("train", 20, "/code/train.py", 1, f"own {number} {padding}", (), None)
            store.emit(origin, record)
            number += 1
            errors.add(repr(spilling.folder.error))
            time.sleep(0.003)
        output = siblings.communicate()[1]
    finally:
        siblings.kill()
        siblings.wait()
    assert siblings.returncode == 0, output
    assert errors == {"None"}

    def on_disk() -> list[str]:
        folders = [folder for folder in component.iterdir() if folder.name == store.writer.writer_id]
        return [
            event.message.partition(" x")[0] for folder in folders for event in Spool.look(folder).reader.read(-1, inf)
        ]

    expected = [f"own {one}" for one in range(number)]
    if durability == "write_ahead":
        assert on_disk() == expected
    wait_until(lambda: on_disk() == expected, "all is on disk")
    backend.fault = None
    wait_until(lambda: store.stats()["a"]["pending"] == 0, "all is delivered")
    own = [message.partition(" x")[0] for message in backend.messages if message.startswith("own")]
    assert own == expected
    assert_accounts_add_up(store.stats())
