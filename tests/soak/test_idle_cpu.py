"""A process that logs nothing costs next to nothing, whether its backends are well or down. `tests/unit/test_idle.py`
counts how often its threads wake up; this is what they really take.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver

SECONDS = 30
"""How long the process is looked at, after as long that it has to come to rest."""
MOST_OF_A_CORE = 0.01

_PROGRAM = f"""
import json, logging, sys, time
from composite_logstore import CompositeHandler

settings = json.loads(sys.argv[1])
handler = CompositeHandler("idle", settings.pop("children"), **settings)
logger = logging.Logger("train")
logger.addHandler(handler)
for number in range(1_000):
    logger.info("%d", number)
time.sleep({SECONDS})
before = time.process_time()
time.sleep({SECONDS})
used = time.process_time() - before
print(json.dumps({{"used": used, "stats": handler.stats()}}), flush=True)
"""


@contextmanager
def ports(are_well: bool) -> Iterator[dict[str, int]]:
    """Yield where the backends listen, or where nothing does."""
    with ExitStack() as stack:
        if are_well:
            receiver = stack.enter_context(OtlpReceiver())
            datadog = stack.enter_context(Datadog(checked=False))
            yield {"http": receiver.http_port, "grpc": receiver.grpc_port, "datadog": datadog.port}
            return
        # Bound, so that nobody else listens there.
        closed = {name: stack.enter_context(socket.socket()) for name in ("http", "grpc", "datadog")}
        for each in closed.values():
            each.bind(("127.0.0.1", 0))
        yield {name: each.getsockname()[1] for name, each in closed.items()}


@pytest.mark.deep
@pytest.mark.parametrize("durability", ["memory", "spill", "write_ahead"])
@pytest.mark.parametrize("are_well", [True, False], ids=["healthy", "down"])
def test_an_idle_process_uses_a_hundredth_of_a_core_at_most(
    tmp_path: Path, durability: str, are_well: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with ports(are_well) as port:
        children: list[dict[str, Any]] = [
            {"name": "http", "type": "otlp", "endpoint": f"http://127.0.0.1:{port['http']}"},
            {"name": "grpc", "type": "otlp", "endpoint": f"http://127.0.0.1:{port['grpc']}", "protocol": "grpc"},
            {
                "name": "datadog",
                "type": "datadog",
                "api_key": API_KEY,
                "application_key": APPLICATION_KEY,
                "endpoint": f"http://127.0.0.1:{port['datadog']}/api/v2/logs",
                "api_endpoint": f"http://127.0.0.1:{port['datadog']}",
            },
        ]
        settings = {"children": children, "durability": durability, "spool_directory": str(tmp_path)}
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(settings)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=10 * SECONDS,
        )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nidle, {durability}, {'healthy' if are_well else 'down'}: {said['used'] / SECONDS:.2%} of a core")
    for name, child in said["stats"].items():
        assert child["accepted"] == 1_000, name
        assert child["delivered"] == (1_000 if are_well else 0), (name, child)
        assert (child["state"] == "healthy") == are_well, (name, child)
    assert said["used"] / SECONDS <= MOST_OF_A_CORE
