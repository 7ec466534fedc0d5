"""The page of the command line shows a session of each command: in a terminal of 80 columns, with real servers.

`make guides` writes what the commands print into the page.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.cells import cell_len

from composite_logstore.ansi import without_escapes
from tests.integration.test_guides import ROOT, VOLATILE, WRITES, Reader
from tests.patience import PATIENCE_SECONDS
from tests.programs import Programs
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.watching import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.deep]

PAGE = ROOT / "docs" / "command-line.md"
HEADING_OR_SESSION = re.compile(r"^## (.*)$|^```\n\$ (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
COLUMNS = 80
# Where no backend is, however long one waits.
NOWHERE = "http://127.0.0.1:9"

TRAIN = """
import logging, sys, time
from pathlib import Path
from zenml import pipeline, step

logger = logging.getLogger("train")

@step(enable_cache=False)
def fit() -> None:
    for epoch in range(1, 4):
        print(f"epoch {epoch}")
    logger.warning("the loss is not a number")
    while sys.argv[1] == "long" and not Path("go").exists():
        time.sleep(0.05)

@pipeline
def training() -> None:
    fit()

if __name__ == "__main__":
    training.with_options(run_name=sys.argv[1])()
"""

MISTAKEN = [
    {"name": "archive", "type": "artifact"},
    {"name": "live", "type": "datadog", "sight": "datadoghq.eu", "api_key": "{{datadog.api_key}}"},
    {"name": "collector", "type": "otlp", "endpoint": "collector:4318"},
]


class Terminal:
    """A terminal of 80 columns, in which somebody works who answers each question with yes."""

    def __init__(self, reader: Reader) -> None:
        """Sit down at it."""
        self._reader = reader
        of_pipes = ("COLUMNS", "NO_COLOR", "ZENML_LOGGING_COLORS_DISABLED")
        self._env = {name: value for name, value in reader.env.items() if name not in of_pipes}
        self._env |= {"TERM": "xterm-256color"}

    def run(self, command: str) -> str:
        """Run a command, and return what is on the terminal once it has ended. A command that waits gets a Ctrl-C."""
        own, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        env = self._env
        if command.startswith(("composite-logstore run", "composite-logstore agent")):
            # Not one of the programs that start at once: these have imported ZenML, and get no signals.
            env = {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=its,
            stdout=its,
            stderr=its,
            cwd=self._reader.directory,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its)
        shown, answered, is_interrupted = b"", 0, False
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            if not select.select([own], [], [], max(0.0, give_up_at - time.monotonic()))[0]:
                process.kill()
                raise AssertionError(f"{command} does not end:\n{shown.decode(errors='replace')}")
            try:
                shown += os.read(own, 1 << 16)
            except OSError:
                # Its end has been closed.
                break
            while answered < shown.count(b"[y/N]: "):
                answered += 1
                os.write(own, b"y\n")
            if b": delivers what" in shown and not is_interrupted:
                is_interrupted = True
                os.killpg(process.pid, signal.SIGINT)
        os.close(own)
        process.wait()
        lines = [_last_drawn(line) for line in _without_progress(shown.decode()).replace("\r\n", "\n").split("\n")]
        return "\n".join(lines)


def _without_progress(shown: str) -> str:
    """Return what is left of a text on a terminal when a bar or a status that was drawn again and again is gone."""
    # Rich hides the cursor while it draws, and erases what it has drawn.
    return re.sub(r"\x1b\[\?25l.*?\x1b\[\?25h(\r\x1b\[1A\x1b\[2K)*", "", shown, flags=re.DOTALL)


def _last_drawn(line: str) -> str:
    return without_escapes(line).rpartition("\r")[2].rstrip()


@contextmanager
def _a_run_in_progress(reader: Reader) -> Iterator[None]:
    with subprocess.Popen(["python", "train.py", "long"], cwd=reader.directory, env=reader.env) as process:
        time.sleep(1)
        try:
            wait_until(
                lambda: json.loads(reader.run("composite-logstore status logs --output json"))["processes"],
                "the run writes its status",
            )
            yield
        finally:
            (reader.directory / "go").touch()
            assert process.wait(PATIENCE_SECONDS) == 0


def words(printed: str, heading: str) -> list[str]:
    """Return the words of what was printed, without what differs each time, such as where a line ends."""
    text = VOLATILE.sub("…", " ".join(printed.split()))
    if heading == "composite-logstore status":
        # How it is at this moment.
        text = re.sub(r"healthy|retrying|unavailable|\d+ ?", "… ", text)
    return re.sub(r"\d{19}", "…", text).split()


def too_long(printed: str) -> list[str]:
    """Return the lines that a terminal divides in the middle of a word, but for commands to copy and long words."""
    found = [line for line in printed.splitlines() if cell_len(line) > COLUMNS]
    return [line for line in found if " " in line.strip() and "composite-logstore " not in line]


def test_the_page_shows_a_session_of_each_command(tmp_path: Path, programs: Programs) -> None:
    with Datadog(checked=False) as datadog:
        settings = {name: datadog.settings[name] for name in ("endpoint", "api_endpoint")}
        there = {"http://collector:4318": NOWHERE, "https://dd.example.com": datadog.url}
        reader = Reader(tmp_path, programs, there)
        terminal = Terminal(reader)
        (tmp_path / "train.py").write_text(TRAIN)
        (tmp_path / "children.json").write_text(json.dumps(MISTAKEN))
        children = [
            {"name": "archive", "type": "artifact"},
            {"name": "second", "type": "artifact", "artifact_store": "disk"},
            {"name": "live", "type": "datadog", "api_key": "{{datadog.api_key}}", **settings}
            | {"application_key": "{{datadog.application_key}}"},
            {"name": "former", "type": "otlp", "endpoint": NOWHERE},
        ]
        (tmp_path / "all.json").write_text(json.dumps(children))
        reader.run(
            f"zenml secret create datadog --api_key={API_KEY} --application_key={APPLICATION_KEY}\n"
            'zenml artifact-store register disk --flavor local --path="$PWD/disk"\n'
            "zenml log-store flavor register composite_logstore.CompositeLogStoreFlavor\n"
            "zenml log-store register logs --flavor composite --primary=archive --children=@all.json\n"
            "zenml stack register production -o default -a default --log_store logs --set\n"
        )
        text = PAGE.read_text()
        written, done, heading = "", 0, ""
        for found in HEADING_OR_SESSION.finditer(text):
            if found[1]:
                heading = found[1]
                if heading == "composite-logstore logs":
                    reader.run("python train.py train-1")
                if heading == "composite-logstore rejected list":
                    datadog.fail("intake", 400, times=100)
                    reader.run("python train.py train-2")
                    datadog.control(mend=True)
                continue
            command = found[2].replace("http://collector:4318", NOWHERE)
            if heading == "composite-logstore status":
                with _a_run_in_progress(reader):
                    printed = terminal.run(command)
            else:
                printed = terminal.run(command)
            printed = reader.for_the_page(printed)
            assert WRITES or not too_long(printed), printed
            # Warnings may lie between.
            shown = iter(words(printed, heading))
            is_true = WRITES or all(word in shown for word in words(found[3], heading))
            assert is_true, f"$ {found[2]}\n{found[3]}\nprinted was:\n{printed}"
            written += text[done : found.start(3)] + printed
            done = found.end(3)
        if WRITES:
            PAGE.write_text(written + text[done:])
