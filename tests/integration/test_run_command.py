"""`composite-logstore run`: the command's output, exit code and signals stay its own, and all of it is collected."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from composite_logstore.capture.open_streams import VARIABLE, Reference
from tests.patience import PATIENCE_SECONDS

PROGRAM = str(Path(__file__).with_name("run_program.py"))

CAPTURES = pytest.mark.parametrize("capture", [[], ["--capture-fd"]], ids=["", "capture-fd"])

pytestmark = pytest.mark.integration


@dataclass
class Run:
    """A `run` that has ended."""

    code: int
    stdout: bytes
    stderr: bytes
    entries: list[dict[str, Any]]

    @property
    def messages(self) -> list[str]:
        return [entry["message"].rstrip("\n") for entry in self.entries]


class Runs:
    """Runs commands, with `run` around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = folder / "report"
        keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "PYTHONPATH")}
        root = str(Path(__file__).resolve().parents[2])
        self.env = {**keep, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", VARIABLE: "a stream"}

    def start(self, options: list[str], *command: str, **keywords: Any) -> subprocess.Popen[bytes]:
        self.report.touch()
        arguments = [sys.executable, PROGRAM, str(self.report), *options, "--", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(arguments, env=self.env, cwd=self.folder, **{**pipes, **keywords})

    def end(self, process: subprocess.Popen[bytes], timeout: float = PATIENCE_SECONDS) -> Run:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Run(process.returncode, stdout, stderr, self.entries())

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.report.read_text().splitlines()]

    def __call__(self, options: list[str], *command: str, **keywords: Any) -> Run:
        return self.end(self.start(options, *command, **keywords))

    def python(self, options: list[str], code: str, *arguments: str) -> Run:
        return self(options, sys.executable, "-c", code, *arguments)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


EVERYTHING = """
import ctypes, logging, os, subprocess, sys, threading
logging.basicConfig(level=logging.INFO, format="formatted %(message)s")
print("printed")
print("on stderr", file=sys.stderr)
try:
    {}["loss"]
except KeyError:
    logging.getLogger("train").exception("caught", extra={"extra_epoch": 3, "extra_odd": object})
thread = threading.Thread(target=print, args=("in a thread",))
thread.start()
thread.join()
sys.stdout.flush()
os.write(1, b"from a descriptor\\n")
libc = ctypes.CDLL(None)
libc.puts(b"from C")
libc.fflush(None)
subprocess.run(["echo", "from a program"])
"""

PYTHON = ["printed", "on stderr", "caught", "in a thread"]
OTHERS = ["from a descriptor", "from C", "from a program"]


@CAPTURES
def test_python_s_records_and_prints_are_collected_and_descriptors_if_that_is_wanted(
    capture: list[str], runs: Runs
) -> None:
    runs.env["RANK"] = "2"
    alone = subprocess.run([sys.executable, "-c", EVERYTHING], env=runs.env, capture_output=True, check=True)
    run = runs.python(capture, EVERYTHING)
    # What is around it shows nothing.
    assert sorted(run.stdout.splitlines()) == sorted(alone.stdout.splitlines())
    assert sorted(run.stderr.splitlines()) == sorted(alone.stderr.splitlines())
    assert run.code == 0
    by_message = {entry["message"].rstrip("\n"): entry for entry in run.entries}
    assert [message for message in run.messages if message in PYTHON] == PYTHON
    assert [message for message in run.messages if message in OTHERS] == (OTHERS if capture else [])
    # Each once, and nothing that a handler has printed.
    assert len(run.messages) == len(PYTHON) + (len(OTHERS) if capture else 0)
    [pid] = {entry["attributes"]["process.pid"] for entry in run.entries}
    assert pid != os.getpid()
    assert {entry["attributes"]["zenml.log.rank"] for entry in run.entries} == {2}
    assert (by_message["printed"]["level"], by_message["printed"]["name"]) == (20, "stdout")
    assert (by_message["on stderr"]["level"], by_message["on stderr"]["name"]) == (40, "stderr")
    caught = by_message["caught"]
    assert (caught["level"], caught["name"], caught["function"]) == (40, "train", "<module>")
    assert caught["exception"][:2] == ["KeyError", "loss"]
    assert "Traceback" in caught["exception"][2]
    assert caught["extra"] == {"extra_epoch": 3, "extra_odd": "<class 'object'>"}


LAUNCHER = """
import os, subprocess, sys
worker = "import logging, os; print('rank ' + os.environ['RANK']); logging.warning('logged')"
processes = [
    subprocess.Popen([sys.executable, "-c", worker], env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    for rank in range(4)
]
sys.exit(max(process.wait() for process in processes))
"""

POOLS = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

def work(method):
    print("pool of", method)

if __name__ == "__main__":
    for method in ("spawn", "fork", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            pool.submit(work, method).result()
        # Its processes are killed as soon as it has the result.
        with multiprocessing.get_context(method).Pool(1) as pool:
            pool.apply(work, ("killed " + method,))
"""


@CAPTURES
def test_each_rank_of_a_launcher_has_its_rank(capture: list[str], runs: Runs) -> None:
    run = runs.python(capture, LAUNCHER)
    assert run.code == 0
    found = sorted((entry["attributes"]["zenml.log.rank"], entry["message"]) for entry in run.entries)
    assert found == sorted((rank, text) for rank in range(4) for text in (f"rank {rank}", "logged"))
    assert len({entry["attributes"]["process.pid"] for entry in run.entries}) == 4


def test_processes_of_pools_are_collected_even_if_they_are_killed_at_once(runs: Runs, tmp_path: Path) -> None:
    program = tmp_path / "pools.py"
    program.write_text(POOLS)
    run = runs([], sys.executable, str(program))
    assert run.code == 0, run.stderr
    methods = [f"{killed}{method}" for method in ("spawn", "fork", "forkserver") for killed in ("", "killed ")]
    assert [message for message in run.messages if message != "pool of"] == methods


@CAPTURES
@pytest.mark.parametrize("code", [0, 77])
def test_the_exit_code_is_the_command_s(code: int, capture: list[str], runs: Runs) -> None:
    assert runs(capture, "sh", "-c", f"exit {code}").code == code


@CAPTURES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_that_kills_the_command_is_how_run_ends(number: int, capture: list[str], runs: Runs) -> None:
    run = runs(capture, "sh", "-c", f"echo last words; kill -{number} $$")
    assert run.code == -number
    assert run.stdout == b"last words\n"
    *messages, killed = run.messages
    assert messages == (["last words"] if capture else [])
    assert run.entries[-1]["level"] == 40
    assert f"signal {number} ({signal.Signals(number).name})" in killed


@pytest.mark.parametrize(
    ("command", "code"), [("/does/not/exist", 127), ("does-not-exist", 127), ("/dev/null", 126), ("/", 126)]
)
def test_a_command_that_cannot_be_run_is_a_shell_s_exit_code_and_one_line(command: str, code: int, runs: Runs) -> None:
    run = runs([], command)
    assert run.code == code
    assert command.encode() in run.stderr
    assert len(run.stderr.splitlines()) == 1


WAITS = """
import signal, sys, time
def stop(number, frame):
    print("got", number, flush=True)
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_run_is_one_to_the_command(number: int, runs: Runs) -> None:
    process = runs.start(
        ["--capture-fd"],
        sys.executable,
        "-c",
        WAITS,
        start_new_session=True,
        # The tests themselves may run below `nohup`.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    run = runs.end(process)
    assert (run.code, run.stdout) == (7, b"got %d\n" % number)


def test_a_signal_that_another_thread_of_run_gets_reaches_the_command(runs: Runs) -> None:
    process = runs.start(
        ["--capture-fd"], sys.executable, "-c", WAITS.replace("ready", "signal another thread"), start_new_session=True
    )
    run = runs.end(process)
    # The command may get the signal before it has written the end of its line.
    assert run.code == 7
    assert run.stdout.endswith(b"got %d\n" % signal.SIGUSR1)


def test_ctrl_c_reaches_the_command_once(runs: Runs) -> None:
    main, terminal = pty.openpty()
    code = WAITS.replace("sys.exit(7)", "time.sleep(0.5)\n    sys.exit(7)")
    process = runs.start(
        [],
        sys.executable,
        "-c",
        code,
        stdin=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.write(main, b"\x03")
    run = runs.end(process)
    os.close(main)
    assert (run.code, run.stdout) == (7, b"got 2\n")


def test_a_flood_arrives_whole_and_takes_no_memory(runs: Runs) -> None:
    run = runs(["--capture-fd"], "sh", "-c", "yes 0123456789 | head -n 30000")
    assert run.stdout == b"0123456789\n" * 30_000
    assert run.messages == ["0123456789"] * 30_000


def test_binary_bytes_and_endless_lines_arrive_unchanged(runs: Runs) -> None:
    content = bytes(range(256)) * 2_000 + b"\xff\xfe\n" + "grüße\n".encode()
    (runs.folder / "content").write_bytes(content)
    run = runs(["--capture-fd"], "cat", "content")
    assert run.stdout == content
    assert run.messages[-1] == "grüße"
    assert max(len(message) for message in run.messages) <= 1 << 16


@CAPTURES
def test_a_command_may_close_its_output(capture: list[str], runs: Runs) -> None:
    run = runs(capture, "sh", "-c", "echo before; exec >&- 2>&-; exit 5")
    assert (run.code, run.stdout) == (5, b"before\n")


@CAPTURES
def test_the_output_appears_at_once(capture: list[str], runs: Runs) -> None:
    process = runs.start(capture, "sh", "-c", "printf 'no newline'; exec sleep 60")
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 100) == b"no newline"
    end = time.monotonic() + 30
    while capture and not runs.entries() and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    run = runs.end(process)
    assert run.code == -signal.SIGTERM
    *printed, end_of_command = run.messages
    assert printed == (["no newline"] if capture else [])
    assert "SIGTERM" in end_of_command


DAEMON = """
import os, sys, time
if os.fork():
    print("parent", flush=True)
    os._exit(4)
os.setsid()
time.sleep(float(sys.argv[1]))
os.write(1, b"daemon\\n")
open(sys.argv[2], "w").close()
"""


@CAPTURES
def test_run_does_not_wait_for_a_daemon_whose_output_still_appears(capture: list[str], runs: Runs) -> None:
    alive = runs.folder / "alive"
    process = runs.start(capture, sys.executable, "-c", DAEMON, "2", str(alive))
    assert process.wait(PATIENCE_SECONDS) == 4
    assert not alive.exists()
    stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
    # It was not broken by the end of `run`.
    assert stdout == b"parent\ndaemon\n"
    end = time.monotonic() + 30
    while not alive.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert alive.exists()


def test_who_closes_the_terminal_ends_the_command_as_without_run(runs: Runs) -> None:
    process = runs.start(["--capture-fd"], "yes")
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    process.stdout = None
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGPIPE
    assert process.stderr is not None
    process.stderr.close()


def terminal_output(main: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while content := os.read(main, 1000):
            yield content


@CAPTURES
def test_a_terminal_stays_one(capture: list[str], runs: Runs) -> None:
    main, terminal = pty.openpty()
    code = "import os, sys; print(sys.stdout.isatty(), os.isatty(1), sys.stdout.name, sys.stdout.encoding)"
    process = runs.start(capture, sys.executable, "-c", code, stdout=terminal)
    os.close(terminal)
    output = b"".join(terminal_output(main))
    os.close(main)
    runs.end(process)
    assert output == b"True True <stdout> utf-8\r\n"


def test_the_environment_s_own_sitecustomize_runs(runs: Runs) -> None:
    (runs.folder / "sitecustomize.py").write_text("import builtins\nbuiltins.customized = 'customized'")
    runs.env["PYTHONPATH"] += os.pathsep + str(runs.folder)
    run = runs.python([], "import sys; print(customized, [path for path in sys.path if 'launch' in path])")
    assert run.stdout == b"customized []\n"


def test_without_a_step_the_command_takes_the_place_of_run(runs: Runs) -> None:
    del runs.env[VARIABLE]
    arguments = [
        sys.executable,
        "-m",
        "composite_logstore",
        "run",
        "--capture-fd",
        "--",
        "sh",
        "-c",
        "echo $$; kill $$",
    ]
    process = subprocess.Popen(arguments, env=runs.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert int(stdout) == process.pid
    assert process.returncode == -signal.SIGTERM
    assert len(stderr.splitlines()) == 1
    assert VARIABLE.encode() in stderr


def test_if_zenml_cannot_be_reached_the_command_runs_and_one_line_says_so(runs: Runs, tmp_path: Path) -> None:
    runs.env |= {
        "HOME": str(tmp_path),
        "ZENML_CONFIG_PATH": str(tmp_path / "zenml"),
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_STORE_URL": "http://127.0.0.1:9",
        "ZENML_STORE_API_KEY": "ZENKEY_a-secret",
        VARIABLE: str(Reference(UUID(int=1), UUID(int=2), "/no/board")),
    }
    arguments = [sys.executable, "-m", "composite_logstore", "run", "--", "sh", "-c", "echo output; exit 9"]
    done = subprocess.run(arguments, env=runs.env, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (9, b"output\n")
    assert len(done.stderr.splitlines()) == 1
    assert b"http://127.0.0.1:9" in done.stderr
    assert b"a-secret" not in done.stderr


def test_join_below_run_does_nothing_more(runs: Runs) -> None:
    code = "import composite_logstore, sys; composite_logstore.join(); print('once'); print('zenml' in sys.modules)"
    assert runs.python([], code).messages == ["once", "False"]
