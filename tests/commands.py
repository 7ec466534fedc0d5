"""Runs commands of `composite-logstore` one after the other in one process, since importing ZenML takes seconds."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from tests.patience import PATIENCE_SECONDS
from tests.servers.zenml_server import ZenML

# Each line contains a command, or code that uses ZenML's client.
_PROGRAM = """
import json, os, sys, traceback
from click.testing import CliRunner
from composite_logstore.cli.main import main
from zenml.client import Client
from zenml.enums import StackComponentType as Type

client = Client()
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    asked = json.loads(line)
    if "code" in asked:
        try:
            exec(asked["code"])
            answer = [0, "", ""]
        except Exception:
            answer = [1, "", traceback.format_exc()]
    else:
        done = CliRunner().invoke(main, asked["arguments"], input=asked["input"])
        crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
        answer = [repr(done.exception) if crashed else done.exit_code, done.stdout, done.stderr]
    print(json.dumps(answer), file=answers, flush=True)
"""

_UPDATE = """
found = client.get_stack_component(Type.LOG_STORE, "logs")
children = [{{**one, **({values} if one["name"] == {child!r} else {{}})}} for one in found.configuration["children"]]
client.update_stack_component(found.id, Type.LOG_STORE, configuration={{"children": children}})
"""


class Done(NamedTuple):
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs commands against a ZenML.

    Attributes:
        zenml: The ZenML.
    """

    def __init__(self, zenml: ZenML) -> None:
        self.zenml = zenml
        program = zenml.directory / "commands.py"
        program.write_text(_PROGRAM)
        self._program = program
        self._log = program.with_suffix(".log")
        self._process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(self._program)],
                env=self.zenml.env,
                cwd=self.zenml.directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _ask(self, **question: Any) -> Done:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            answer = stdout.readline()
            assert answer, self._log.read_text(errors="replace")[-4000:]
        except BaseException:
            # A test that ran out of time. The next test would read this one's late answer as its own.
            self.close()
            self._process = self._started()
            raise
        return Done(*json.loads(answer))

    def command(self, *arguments: str, input: str = "") -> Done:
        """Run a command.

        Args:
            arguments: The command and its arguments.
            input: What is typed.
        """
        return self._ask(arguments=arguments, input=input)

    def do(self, code: str) -> None:
        """Run code that uses ZenML's `client`, and `Type` for the types of components."""
        done = self._ask(code=code)
        assert not done.returncode, done.stderr

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "composite_logstore", *arguments],
            env=self.zenml.env,
            cwd=self.zenml.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def values(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Return the JSON that a command prints."""
        done = self.command(*arguments, "--output", "json")
        assert done.returncode == code, done
        values = json.loads(done.stdout)
        assert isinstance(values, dict)
        return values

    def update(self, child: str, **values: Any) -> None:
        """Change settings of a child of the log store `logs`."""
        self.do(_UPDATE.format(child=child, values=repr(values)))

    def make_fleet(self, settings: dict[str, Any]) -> None:
        """Make the runs of `tests.fleet`."""
        self.do(f"from tests.fleet import make; make({settings!r})")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Query ZenML's database directly."""
        (database,) = self.zenml.directory.glob("**/zenml.db")
        with closing(sqlite3.connect(database)) as connection:
            return connection.execute(sql).fetchall()

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()


def wait_until(happens: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for the effect of another process."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.02)
