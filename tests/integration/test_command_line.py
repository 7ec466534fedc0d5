"""The real command line delivers the events of a real process that was killed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.servers.otlp_receiver import Answer, OtlpReceiver
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

MESSAGES = [f"line {number}" for number in range(500)]

REGISTER = """
import json, sys
from zenml.client import Client
from zenml.enums import StackComponentType

client = Client()
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, json.loads(sys.argv[1]))
"""

LOG = """
import logging, os, signal
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack import StackComponent
from tests.simulation import make_logs

store = StackComponent.from_model(Client().get_stack_component(StackComponentType.LOG_STORE, "logs"))
logs = make_logs(store)
origin = store.register_origin("step", logs, {})
for number in range(500):
    store.emit(origin, logging.LogRecord("train", 20, "", 0, f"line {number}", (), None))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.deep
def test_events_of_a_killed_process_are_listed_and_drained_even_in_two_goes(tmp_path: Path) -> None:
    zenml = ZenML(tmp_path / "zenml")
    zenml.env["PYTHONPATH"] = str(Path(__file__).parents[2])
    with OtlpReceiver() as receiver:
        receiver.judge = lambda records: Answer(status=503)
        children = [
            {"name": "archive", "type": "artifact", "artifact_store": "default"},
            {"name": "collector", "type": "otlp", "endpoint": receiver.http_endpoint, "max_export_batch_size": 100},
        ]
        settings = {"primary": "archive", "durability": "write_ahead", "children": children}
        program = tmp_path / "program.py"
        for text, is_killed in ((REGISTER, False), (LOG, True)):
            program.write_text(text)
            zenml.python(str(program), json.dumps(settings), fails=is_killed)

        listed = zenml.python("-m", "composite_logstore", "spool", "list")
        assert re.search(r" collector +1 +500 .* not delivered yet", listed), listed

        begun = len(receiver.requests)
        first = drain(zenml)
        while len(receiver.requests) == begun:
            assert first.poll() is None
            time.sleep(0.05)
        receiver.judge = lambda records: Answer(delay_seconds=0.5)
        while not receiver.records():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=PATIENCE_SECONDS)
        assert (first.returncode, "Interrupted." in output) == (1, True), output
        assert 0 < len(receiver.records()) < len(MESSAGES)

        receiver.judge = None
        second = drain(zenml)
        output, _ = second.communicate(timeout=PATIENCE_SECONDS)
        assert (second.returncode, output.splitlines()[-1]) == (0, "No undelivered events."), output
        assert [record.body for record in receiver.records()] == MESSAGES
    (file,) = (tmp_path / "zenml").glob("**/logs/*.log")
    assert [json.loads(line)["message"] for line in file.read_text().splitlines()] == MESSAGES


def drain(zenml: ZenML) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "composite_logstore", "spool", "drain"],
        env=zenml.env,
        cwd=zenml.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The tests may run with the signal ignored, as shells start background jobs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
