"""The commands while ZenML's server cannot be reached: an answer within seconds, the URL, and no claim."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zenml.config.global_config import GlobalConfiguration
from zenml.enums import StoreType

from composite_logstore.catalog import reach
from composite_logstore.cli.main import main
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child

PATIENCE_SECONDS = 0.3


def connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let ZenML be configured for a server."""
    store = SimpleNamespace(type=StoreType.REST, url=url, verify_ssl=True)
    monkeypatch.setattr(GlobalConfiguration, "store_configuration", property(lambda _: store))


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ANSWER_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(reach, "_answered", {})
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    zenml = SimulatedZenML.take_place(monkeypatch)
    zenml.register(make_child("a"), make_child("b"))
    return zenml


class Front:
    """A listener: a server that answers every question with one status, one that hangs, or one that is gone.

    Attributes:
        asked: How often it was asked.
        known: The path that it answers with success.
    """

    def __init__(self, status: int | None) -> None:
        self.asked = 0
        self.known = ""
        if status is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port = self._listener.getsockname()[1]
            return
        front = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                front.asked += 1
                self.send_response(200 if front.known and self.path.startswith(front.known) else status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if hasattr(self, "_server"):
            self._server.shutdown()
            self._server.server_close()
        else:
            self._listener.close()


@pytest.fixture
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    front = Front(None if request.param == "gone" else request.param)
    if request.param == "gone":
        front.close()
    # The password may not be shown.
    connect(monkeypatch, f"http://user:s3cret@127.0.0.1:{front.port}/zenml")
    yield front
    front.close()


COMMANDS = [
    ("check", "logs"),
    ("logs", "run"),
    ("verify", "logs", "--all"),
    ("backfill", "logs", "--from", "a", "--to", "b", "--all"),
    ("explain", "logs", "b"),
    ("promote", "logs", "b"),
    ("migrate", "stack", "--to", "b"),
]


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("front", ["gone", None, 502, 503, 504], indirect=True, ids=str)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_fails_at_once_and_names_the_url(
    zenml: SimulatedZenML, front: Front, command: tuple[str, ...]
) -> None:
    begin = time.monotonic()
    result = run(*command)
    assert time.monotonic() - begin < PATIENCE_SECONDS + 2
    assert result.exit_code == 3
    assert f"ZenML cannot be reached (http://127.0.0.1:{front.port}/zenml: " in result.stderr
    assert "s3cret" not in result.output
    # ZenML's own client, which would wait for most of a minute, is not even asked.
    assert zenml.asked == []


@pytest.mark.parametrize("front", ["gone"], indirect=True)
def test_the_system_s_words_say_why(zenml: SimulatedZenML, front: Front) -> None:
    assert "/zenml: Connection refused)" in run("check", "logs").stderr


@pytest.mark.parametrize("front", [None], indirect=True)
def test_a_server_that_does_not_answer_gets_a_bounded_time(zenml: SimulatedZenML, front: Front) -> None:
    assert "no answer within 0.3 s" in run("check", "logs").stderr


@pytest.mark.parametrize("front", [404], indirect=True)
def test_another_server_at_this_address_is_told_from_zenml_s(zenml: SimulatedZenML, front: Front) -> None:
    result = run("check", "logs")
    assert result.exit_code == 3
    assert f"http://127.0.0.1:{front.port}/zenml: it answers 404, also at /api/v1/info, where a ZenML" in result.stderr


@pytest.mark.parametrize("front", [404], indirect=True)
def test_a_proxy_need_not_pass_on_the_path_for_health(zenml: SimulatedZenML, front: Front) -> None:
    front.known = "/zenml/api/v1/info"
    assert run("promote", "logs", "a").exit_code == 0


@pytest.mark.parametrize("front", [200, 401], indirect=True)
def test_any_other_answer_is_one_of_a_server_and_is_believed_for_a_while(zenml: SimulatedZenML, front: Front) -> None:
    for _ in range(3):
        assert run("promote", "logs", "a").exit_code == 0
    assert front.asked == 1


@pytest.mark.parametrize("front", ["gone"], indirect=True)
def test_spool_list_claims_nothing_about_folders_that_only_zenml_knows(front: Front) -> None:
    for command in (("list",), ("purge", "--yes")):
        result = run("spool", *command)
        assert result.exit_code == 3
        assert f"http://127.0.0.1:{front.port}/zenml: " in result.stderr
        assert "other folders is unknown" in " ".join(result.stderr.split())
        assert result.stdout == ""
    result = run("spool", "drain")
    assert result.exit_code == 1
    assert f"http://127.0.0.1:{front.port}/zenml: " in result.stderr


def test_a_zenml_without_its_database_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ImportError("It seems like you've installed the `zenml` package without the `local` extra")

    monkeypatch.setattr(GlobalConfiguration, "store_configuration", property(fail))
    result = CliRunner().invoke(main, ["check", "logs"])
    assert result.exit_code == 3
    assert "zenml[local]" in result.stderr
