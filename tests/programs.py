"""Programs that start at once: a process that has imported ZenML forks for each, and each is itself otherwise.

To import ZenML takes seconds, more than most of its commands. What is run is the same: the same arguments, environment,
directory, streams and exit code, in a process of its own.
"""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import gc, json, os, runpy, signal, socket, struct, sys

import zenml.zen_stores.sql_zen_store
import zenml.integrations.s3.artifact_stores
import s3fs
from zenml.cli.cli import cli
from zenml.pipelines import pipeline_definition
from composite_logstore.cli import main
from composite_logstore.operations import backfill, check, drain, migrate, promote, tail, verify
import composite_logstore.log_store
import composite_logstore_artifact.exporter
import composite_logstore_artifact.reader
from sqlalchemy.orm import configure_mappers

configure_mappers()
# No forked process goes through all that again when it collects garbage, as it does at its end.
gc.collect()
gc.freeze()


def run(program, arguments):
    sys.argv = [program, *arguments]
    sys.modules["__main__"].__file__ = os.path.join(os.path.dirname(sys.executable), program)
    if program == "python":
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        {"zenml": cli, "composite-logstore": main.main}[program].main(args=arguments, prog_name=program)


def serve(asked):
    content, streams, _, _ = socket.recv_fds(asked, 1 << 20, 3)
    program, directory, environment, *arguments = json.loads(content)
    worker = os.fork()
    if worker:
        _, status = os.waitpid(worker, 0)
        asked.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
        os._exit(0)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    try:
        run(program, arguments)
    finally:
        sys.stdout.flush()


with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(asked)
            sys.exit()
        asked.close()
"""

_CLIENT = """#!{python} -IS
import json, os, socket, sys

asking = socket.socket(socket.AF_UNIX)
asking.connect({address!r})
content = json.dumps([os.path.basename(sys.argv[0]), os.getcwd(), dict(os.environ), *sys.argv[1:]]).encode()
socket.send_fds(asking, [content], [0, 1, 2])
answer = asking.recv(1)
sys.exit(answer[0] if answer else 1)
"""


class Programs:
    """Offers `zenml`, `composite-logstore` and `python` as programs, whichever ZenML they are for.

    Attributes:
        folder: Where they are, for the `PATH`.
    """

    def __init__(self, env: dict[str, str], directory: Path) -> None:
        """Start the process, and wait until it has imported everything.

        Args:
            env: The environment in which that process imports ZenML.
            directory: Where it works.
        """
        # The path of a socket has to be short.
        self._temporary = tempfile.TemporaryDirectory(prefix="programs-")
        self.folder = Path(self._temporary.name)
        address = str(self.folder / "socket")
        for name in ("zenml", "composite-logstore", "python"):
            program = self.folder / name
            program.write_text(_CLIENT.format(python=sys.executable, address=address))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, address], env=env, cwd=directory, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()
        self._temporary.cleanup()
