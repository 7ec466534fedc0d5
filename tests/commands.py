"""Commands of `composite-logstore`, one after the other in one process: to import ZenML takes most of their time."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any, NamedTuple

from tests.servers.zenml_server import ZenML

# What a line says is a command's arguments, or, if it is an object, what to change of a child.
_PROGRAM = """
import json, os, sys
from click.testing import CliRunner
from composite_logstore.cli.main import main
from zenml.client import Client
from zenml.enums import StackComponentType

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def update(child, values):
    found = Client().get_stack_component(StackComponentType.LOG_STORE, "logs")
    children = [{**one, **(values if one["name"] == child else {})} for one in found.configuration["children"]]
    Client().update_stack_component(found.id, StackComponentType.LOG_STORE, configuration={"children": children})
    return [0, "", ""]


for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, dict):
        answer = update(**asked)
    else:
        done = CliRunner().invoke(main, asked)
        crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
        answer = [repr(done.exception) if crashed else done.exit_code, done.stdout, done.stderr]
    print(json.dumps(answer), file=answers, flush=True)
"""


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs commands on the log store `logs` of a ZenML."""

    def __init__(self, zenml: ZenML) -> None:
        self.zenml = zenml
        program = zenml.directory / "commands.py"
        program.write_text(_PROGRAM)
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            env=zenml.env,
            cwd=zenml.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _ask(self, question: Any) -> Done:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        return Done(*json.loads(stdout.readline()))

    def command(self, *arguments: str) -> Done:
        """Run a command."""
        return self._ask(arguments)

    def values(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Return what a command prints for programs."""
        done = self.command(*arguments, "--output", "json")
        assert done.returncode == code, done
        values = json.loads(done.stdout)
        assert isinstance(values, dict)
        return values

    def update(self, child: str, **values: Any) -> None:
        """Change settings of a child."""
        self._ask({"child": child, "values": values})

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask ZenML's database itself."""
        (database,) = self.zenml.directory.glob("**/zenml.db")
        with closing(sqlite3.connect(database)) as connection:
            return connection.execute(sql).fetchall()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)
