"""A throw-away ZenML configuration, with the real server and dashboard for it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import requests

from composite_logstore.config import DELIVERY_VARIABLE
from tests.patience import PATIENCE_SECONDS
from tests.programs import Programs

AN_AGENT_DELIVERS = os.environ.get(DELIVERY_VARIABLE) in ("agent", "auto")
"""Whether the environment says that an agent delivers the events of all processes."""
_DELIVERED = re.compile(r'^composite_logstore_agent_events_total\{.*outcome="delivered"\} (\d+)$', re.MULTILINE)
_NOISE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def free_port() -> int:
    """Return a port of this machine's loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Agent:
    """An agent that runs.

    Attributes:
        session: For requests to it.
        url: Where it answers probes.
    """

    session: requests.Session
    url: str

    def is_ready(self) -> bool:
        """Whether it delivers."""
        try:
            return self.session.get(f"{self.url}/readyz", timeout=60).ok
        except requests.ConnectionError:
            return False

    def delivered(self) -> int:
        """Return how many events it has delivered, to all children."""
        return sum(map(int, _DELIVERED.findall(self.session.get(f"{self.url}/metrics", timeout=60).text)))


class ZenML:
    """A ZenML client of its own: nothing of whoever runs it is read or written.

    Attributes:
        directory: Where everything is, configuration, database and artifacts.
        url: Where the server is, once it has been started.
        session: For requests to it. ZenML's local server asks for no login.
    """

    def __init__(self, directory: Path, python: str = sys.executable, programs: Programs | None = None) -> None:
        """Prepare.

        Args:
            directory: An empty directory, to be removed by whoever made it.
            python: The interpreter of the environment to use.
            programs: What `cli` and `python` run, so that it starts at once.
        """
        self.directory = directory
        self.url = ""
        self.session = requests.Session()
        self.session.trust_env = False
        self._python = Path(python)
        self._programs = programs
        self._pid: int | None = None
        (directory / "home").mkdir(parents=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ZENML_")}
        self.env = {
            **kept,
            "HOME": str(directory / "home"),
            "ZENML_CONFIG_PATH": str(directory / "config"),
            "ZENML_ANALYTICS_OPT_IN": "false",
            "ZENML_AUTO_OPEN_DASHBOARD": "false",
            "ZENML_ENABLE_REPO_INIT_WARNINGS": "false",
            "ZENML_LOGGING_COLORS_DISABLED": "true",
            # So that rich breaks no line of an error message.
            "COLUMNS": "1000",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            # A proxy of this machine has no business with its loopback interface.
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def cli(self, *arguments: str, fails: bool = False, timeout: float = PATIENCE_SECONDS) -> str:
        """Run the real `zenml` command and return all that it printed.

        Args:
            arguments: What comes after `zenml`.
            fails: Whether it has to fail.
            timeout: How long it may take, in seconds.
        """
        return self._run([self._program("zenml"), *arguments], fails, timeout)

    def python(self, *arguments: str, fails: bool = False, timeout: float = PATIENCE_SECONDS) -> str:
        """Run a Python program and return all that it printed. The arguments are those of `cli`."""
        return self._run([self._program("python"), *arguments], fails, timeout)

    def composite_logstore(self, *arguments: str, timeout: float = PATIENCE_SECONDS) -> str:
        """Run `composite-logstore`, which has to succeed, and return what it printed to stdout alone.

        Args:
            arguments: What comes after `composite-logstore`.
            timeout: How long it may take, in seconds.
        """
        command = [self._program("composite-logstore"), *arguments]
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def _program(self, name: str) -> str:
        return str(self._programs.folder / name if self._programs else self._python.with_name(name))

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a Python program and return the process, with its output in a pipe."""
        return subprocess.Popen(
            [str(self._python), *arguments],
            env=self.env,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextmanager
    def agent(self, *options: str) -> Iterator[Agent]:
        """Run `composite-logstore agent`, which has to work from the first moment and to end in order.

        It runs in this environment, which has the packages of all children, even if this ZenML's own has not.

        Args:
            options: What comes after `composite-logstore agent`.
        """
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "composite_logstore", "agent", "--health-address", address, *options]
        # A child may print all that it gets: too much for a pipe that nobody reads.
        with TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                env=self.env,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            agent = Agent(self.session, f"http://{address}")
            try:
                end = time.monotonic() + PATIENCE_SECONDS
                while not (is_ready := agent.is_ready()) and process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                if is_ready:
                    yield agent
                    process.terminate()
                    process.wait(PATIENCE_SECONDS)
            except Exception:
                output.seek(0)
                print(f"The agent has printed:\n{output.read()}", file=sys.stderr)
                raise
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            assert process.returncode == 0, output.read()

    @contextmanager
    def chosen_agent(self, *options: str) -> Iterator[None]:
        """Run an agent if the environment says that one delivers. Something has to be delivered by it.

        Args:
            options: What comes after `composite-logstore agent`.
        """
        if not AN_AGENT_DELIVERS:
            yield
            return
        with self.agent(*options) as agent:
            yield
            assert agent.delivered() > 0

    def _run(self, command: list[str], fails: bool, timeout: float) -> str:
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        output = _NOISE.sub("", done.stdout)
        if (done.returncode != 0) is not fails:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
        return output

    def start_server(self) -> None:
        """Start the server and its dashboard, and connect this configuration to it: takes about 10 s."""
        port = free_port()
        try:
            # It waits for another program, which imports ZenML and makes a database.
            arguments = ("--local", "--ip-address", "127.0.0.1", "--port", str(port))
            self.cli("login", *arguments, timeout=3 * PATIENCE_SECONDS)
        finally:
            # ZenML runs it as a daemon and notes its process id here.
            pid_file = self.directory / "config" / "zen_server" / "daemon" / "service.pid"
            if pid_file.exists():
                self._pid = int(pid_file.read_text())
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: Any) -> Any:
        """Ask the server's REST API and return its answer.

        Args:
            path: What comes after `/api/v1`.
            parameters: The query.
        """
        response = self.session.get(f"{self.url}/api/v1{path}", params=parameters, timeout=60)
        if not response.ok:
            raise AssertionError(f"GET {path} answered {response.status_code}: {response.text}")
        return response.json()

    def streams(self, run_id: str) -> dict[str, dict[str, Any]]:
        """Return the log streams of a run and its steps: a source → ZenML's model of the stream."""
        streams = self.get(f"/runs/{run_id}", hydrate=True)["resources"]["log_collection"]
        for step in self.get("/steps", pipeline_run_id=run_id, hydrate=True)["items"]:
            streams += step["resources"]["log_collection"]
        return {stream["body"]["source"]: stream for stream in streams}

    def server_log(self) -> str:
        """Return what the server has logged, to show where a test failed."""
        log = self.directory / "config" / "zen_server" / "daemon" / "service.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def stop(self) -> None:
        """Stop the server, and wait until it has ended."""
        self.session.close()
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            try:
                os.kill(pid, sign)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    os.kill(pid, 0)
                    time.sleep(0.05)
            except ProcessLookupError:
                return

    def __enter__(self) -> ZenML:
        """Start the server."""
        try:
            self.start_server()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self.stop()


USER, PASSWORD = "default", "the-dashboards-password"


class HostedZenML(ZenML):
    """A client of a ZenML server that runs elsewhere: in an environment of its own, with users who log in.

    Attributes:
        session: For requests to the server, logged in.
    """

    def __init__(self, directory: Path, server_python: str = sys.executable, programs: Programs | None = None) -> None:
        """Prepare.

        Args:
            directory: An empty directory, to be removed by whoever made it.
            server_python: The interpreter of the server's environment.
            programs: What `cli` and `python` run, so that it starts at once.
        """
        super().__init__(directory, programs=programs)
        self._server_python = server_python
        self._server: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        """Start the server, and have the client log in: takes about 10 s."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        log = self.directory / "server.log"
        # What a container of ZenML's server is given; and this machine's disk, or it could not read a local artifact
        # store.
        environment = {
            **self.env,
            "ZENML_CONFIG_PATH": str(self.directory / "server"),
            "ZENML_SERVER": "true",
            "ZENML_SERVER_AUTO_ACTIVATE": "true",
            "ZENML_SERVER_ALLOW_LOCAL_FILE_ACCESS": "true",
            "ZENML_LOCAL_STORES_PATH": str(self.directory / "config" / "local_stores"),
            "ZENML_DEFAULT_USER_PASSWORD": PASSWORD,
        }
        if self._server_python != sys.executable:
            # Of this environment nothing may be found there.
            environment.pop("PYTHONPATH", None)
        command = [self._server_python, "-m", "uvicorn", "zenml.zen_server.zen_server_api:app"]
        with log.open("wb") as output:
            self._server = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"],
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._is_ready():
            if self._server.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"The server does not come up:\n{self.server_log()}")
            time.sleep(0.1)
        login = {"username": USER, "password": PASSWORD}
        token = self.session.post(f"{self.url}/api/v1/login", data=login, timeout=60).json()["access_token"]
        self.session.headers["Authorization"] = f"Bearer {token}"
        self.env.update({"ZENML_STORE_URL": self.url, "ZENML_STORE_USERNAME": USER, "ZENML_STORE_PASSWORD": PASSWORD})

    def _is_ready(self) -> bool:
        try:
            return self.session.get(f"{self.url}/ready", timeout=5).ok
        except requests.ConnectionError:
            return False

    def server_log(self) -> str:
        """Return what the server has logged, to show where a test failed."""
        return (self.directory / "server.log").read_text(errors="replace")

    def stop(self) -> None:
        """Stop the server, and wait until it has ended."""
        self.session.close()
        server, self._server = self._server, None
        if server is not None:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
