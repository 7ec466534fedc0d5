"""Children of type `otel`: exporters of OpenTelemetry and one of our own, with what they really write to."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from zenml.client import Client

from composite_logstore import CompositeLogStore, RetryableError, Stream
from composite_logstore.testing import ExporterContract, Fault, Received, SimulatedBackend
from composite_logstore_otel.config import OtelChildConfig
from tests import line_exporter
from tests.servers.otlp_receiver import Answer, OtlpReceiver, Record
from tests.simulation import make_child, make_logs, make_store

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def otel_child(**settings: Any) -> OtelChildConfig:
    return OtelChildConfig(**{"name": "any", "type": "otel", "schedule_delay_millis": 0, **settings})


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of our own with an exporter."""
    folder = tmp_path / "site"
    folder.mkdir()
    line_exporter.install(folder)
    monkeypatch.syspath_prepend(str(folder))


def level_of(severity_number: int) -> int:
    """DEBUG is 5, INFO is 9, and so on."""
    return (severity_number + 3) // 4 * 10 - 10


@pytest.mark.deep
class TestAnExporterOfAnOwnPackage(ExporterContract):
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "lines"

    @pytest.fixture
    def child(self, site: None, path: Path) -> OtelChildConfig:
        return otel_child(exporter="lines", arguments={"path": str(path), "token": "top-secret"})

    @pytest.fixture
    def received(self, path: Path) -> Callable[[Stream], list[Received]]:
        def look(stream: Stream) -> list[Received]:
            lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
            return [
                Received(
                    line["attributes"]["log.record.uid"],
                    line["attributes"]["zenml.log.writer"],
                    line["attributes"]["zenml.log.sequence"],
                    line["body"],
                    level_of(line["severity_number"]),
                    line["time"],
                )
                for line in lines
                if line["attributes"]["zenml.log.id"] == str(stream.id)
            ]

        return look

    @pytest.fixture
    def faults(self, path: Path) -> Mapping[str, Fault]:
        @contextmanager
        def down(how: str) -> Iterator[None]:
            file = path.with_name("lines.down")
            file.write_text(how)
            yield
            file.unlink()

        return {
            "fails": Fault(partial(down, "fail"), RetryableError),
            "raises": Fault(partial(down, "raise"), RetryableError),
        }


class TestOtlpOfTheSdk(ExporterContract):
    @pytest.fixture
    def child(self, receiver: OtlpReceiver) -> OtelChildConfig:
        arguments = {"endpoint": receiver.http_endpoint + "/v1/logs", "headers": {"key": "top-secret"}, "timeout": 1}
        return otel_child(exporter="otlp_proto_http", arguments=arguments)

    @pytest.fixture
    def received(self, receiver: OtlpReceiver) -> Callable[[Stream], list[Received]]:
        def to_received(record: Record) -> Received:
            attributes = record.attributes
            return Received(
                attributes["log.record.uid"],
                attributes["zenml.log.writer"],
                attributes["zenml.log.sequence"],
                record.body,
                level_of(record.severity_number),
                record.time_unix_nano,
            )

        def look(stream: Stream) -> list[Received]:
            records = receiver.records()
            return [to_received(record) for record in records if record.attributes["zenml.log.id"] == str(stream.id)]

        return look

    @pytest.fixture
    def faults(self, receiver: OtlpReceiver) -> Mapping[str, Fault]:
        @contextmanager
        def answering(status: int) -> Iterator[None]:
            receiver.answers.extend([Answer(status)] * 100)
            yield
            receiver.answers.clear()

        return {
            "busy": Fault(partial(answering, 503), RetryableError),
            "wrong key": Fault(partial(answering, 401), RetryableError),
        }


@pytest.mark.deep
class TestOpenTelemetrysOwnIntoAFile(ExporterContract):
    """The module that the documentation shows."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "logs.jsonl"

    @pytest.fixture
    def child(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OtelChildConfig:
        page = (ROOT / "docs" / "configuration.md").read_text().partition("### An exporter that writes a file")[2]
        (tmp_path / "file_exporter.py").write_text(page.partition("```python\n")[2].partition("```")[0])
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "file_exporter", raising=False)
        return otel_child(exporter="file_exporter.FileExporter", arguments={"path": str(path)})

    @pytest.fixture
    def received(self, path: Path) -> Callable[[Stream], list[Received]]:
        def to_received(line: dict[str, Any]) -> Received:
            since = datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")) - EPOCH
            return Received(
                line["attributes"]["log.record.uid"],
                line["attributes"]["zenml.log.writer"],
                line["attributes"]["zenml.log.sequence"],
                line["body"],
                level_of(line["severity_number"]),
                since // timedelta(microseconds=1) * 1000,
            )

        def look(stream: Stream) -> list[Received]:
            lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
            return [to_received(line) for line in lines if line["attributes"]["zenml.log.id"] == str(stream.id)]

        return look

    @pytest.fixture
    def faults(self) -> Mapping[str, Fault]:
        return {}


@pytest.mark.deep
def test_the_console_exporter_prints_each_event_and_none_comes_back_as_another(tmp_path: Path) -> None:
    """In a process of its own, with ZenML's own capture of what is printed."""
    program = tmp_path / "program.py"
    program.write_text(CONSOLE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "ZENML_CONFIG_PATH": str(tmp_path / "zenml"),
    }
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    printed, _, stats = done.stdout.rpartition("STATS ")
    console = json.loads(stats)["console"]
    assert console["accepted"] == console["delivered"] == 3
    bodies = [line.split('"body": ')[1].strip(',"') for line in printed.splitlines() if '"body": ' in line]
    assert bodies == ["message 0", "message 1", "message 2"]


CONSOLE = """
import json, logging, sys
from types import SimpleNamespace
from zenml.utils import logging_utils
from composite_logstore.testing import SimulatedBackend
from composite_logstore_otel.config import OtelChildConfig
from tests.simulation import make_child, make_logs, make_store

console = OtelChildConfig(name="console", type="otel", exporter="console", schedule_delay_millis=0)
store = make_store(make_child("archive", SimulatedBackend()), console)
stack = SimpleNamespace(log_store=store, artifact_store=SimpleNamespace(id=None))
logging_utils.Client = lambda: SimpleNamespace(active_stack=stack)
logs = make_logs(store)
with logging_utils.LoggingContext(name=str(logs.id), log_model=logs):
    for number in range(3):
        logging.getLogger("train").warning("message %d", number)
        store.flush()
sys.stdout.write("STATS " + json.dumps(store.stats()))
"""


def emit(store: CompositeLogStore, number: int) -> None:
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    for index in range(number):
        store.emit(origin, logging.LogRecord("train", logging.INFO, "/a.py", 1, f"message {index}", (), None))
    store.deregister_origin(origin)


def test_a_key_comes_from_a_secret_and_is_never_shown(receiver: OtlpReceiver) -> None:
    Client().create_secret("otel-exporter", {"token": "top-secret"})
    arguments = {"endpoint": f"{receiver.http_endpoint}/v1/logs", "headers": {"key": "Key {{otel-exporter.token}}"}}
    child = otel_child(exporter="otlp_proto_http", arguments={**arguments, "timeout": 1})
    store = make_store(make_child("archive", SimulatedBackend()), child, primary="archive")
    receiver.answers.append(Answer(401, body=b"not with Key top-secret"))
    emit(store, 5)

    assert "top-secret" not in json.dumps(store.stats())
    assert receiver.requests[0].headers["key"] == "Key top-secret"
    Client().delete_secret("otel-exporter")
