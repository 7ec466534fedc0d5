"""Runs a command as if `composite-logstore run` were not there: its output, exit code and signals are its own."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from composite_logstore.capture.open_streams import VARIABLE
from composite_logstore.capture.process import PID, attributes
from composite_logstore.joining import find_in_time, is_below_run
from composite_logstore.launch.collector import Collector
from composite_logstore.line_breaks import fill

NOT_FOUND = 127
NOT_EXECUTABLE = 126
"""The exit codes of shells for a command that does not exist, or cannot be run."""

# What others send to `run` is meant for the command.
_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCONT,
    signal.SIGWINCH,
)
_FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH)


def run(command: list[str], capture_fd: bool) -> int:
    """Run a command, and collect what it and the processes below it log and print as logs of the step.

    If there is no step, or ZenML cannot be reached, the command runs all the same: it takes the place of this process.

    Args:
        command: The command and its arguments.
        capture_fd: Whether to collect what is written to descriptors 1 and 2, too.

    Returns:
        The command's exit code. If a signal has killed the command, the same signal ends this process at its exit.
    """
    _say_on_stderr()
    text = os.environ.get(VARIABLE, "")
    if not text:
        _logger.warning("No step has started this command (%s is not set), so its logs are not collected.", VARIABLE)
    is_collected_above = is_below_run() and not (capture_fd and not os.environ.get("COMPOSITE_LOGSTORE_CAPTURES"))
    ending = _Ending()
    joined = find_in_time(text) if text and not is_collected_above else None
    if joined is None:
        return _replace_this_process(command)
    collector = Collector(joined.take, capture_fd)
    given = attributes()
    outputs = collector.outputs(given) if capture_fd else []
    relay = _Relay(collector)
    descriptors: dict[str, Any] = {}
    if outputs:
        descriptors = {"stdout": outputs[0].writing, "stderr": outputs[1].writing}
    try:
        process = subprocess.Popen(command, env=collector.environment(os.environ), **descriptors)
    except OSError as error:
        collector.close()
        return _refused(command, error)
    given[PID] = process.pid
    if outputs:
        collector.watch(outputs)
    relay.begin(process)
    code = _wait(process)
    collector.close()
    if code < 0:
        joined.take(_last_words(command[0], process.pid, -code), given)
    with contextlib.suppress(Exception):
        joined.flush()
    return ending.as_exit_code(code)


def _last_words(command: str, pid: int, number: int) -> logging.LogRecord:
    """Return the record that says that a signal has killed the command. All that it had sent was collected."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "without a name"
    text = f"The command '{command}' (process {pid}) was killed by signal {number} ({name})."
    return logging.LogRecord("composite_logstore", logging.ERROR, "", 0, text, (), None)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the command's exit code, and let signal handlers run meanwhile.

    A handler runs in the main thread, between two instructions of Python. A signal that the kernel hands to another
    thread, or that arrives just before a system call, does not interrupt the main thread's call: the handler would
    run after the command's end. So the main thread waits for a byte, and the interpreter writes one at each signal:
    https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd
    """
    receiving, sending = socket.socketpair()
    with receiving, sending:
        sending.setblocking(False)

        def wait() -> None:
            process.wait()
            with contextlib.suppress(BlockingIOError):
                # Bytes that fill the buffer wake the main thread, too.
                sending.send(b"\0")

        before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        try:
            thread = threading.Thread(target=wait, name="composite-logstore command", daemon=True)
            thread.start()
            while process.returncode is None:
                receiving.recv(4096)
            thread.join()
        finally:
            signal.set_wakeup_fd(before)
    return process.returncode


_logger = logging.getLogger("composite_logstore.run")


def _say_on_stderr() -> None:
    """Print warnings to stderr and nothing else: the output is the command's. Importing ZenML would print, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Filled("composite-logstore: %(message)s"))
    logging.getLogger().addHandler(handler)


class _Filled(logging.Formatter):
    """Divides lines between words where a terminal would divide them within one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not sys.stderr.isatty():
            return text
        return fill(text, shutil.get_terminal_size().columns)


def _replace_this_process(command: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Python ignores these, and the command would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        return _refused(command, error)


def _refused(command: list[str], error: OSError) -> int:
    _logger.warning("The command '%s' cannot be run: %s.", command[0], error.strerror or error)
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


class _Relay:
    """Passes the signals that this process gets on to the command."""

    def __init__(self, collector: Collector) -> None:
        """Keep signals until the command runs."""
        self._collector = collector
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []
        for number in _FORWARDED:
            # What is ignored here, as after `nohup`, is ignored by the command, too.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._relay)

    def begin(self, process: subprocess.Popen[bytes]) -> None:
        """Pass signals on to this process, also those that have come before."""
        self._process = process
        while self._waiting:
            self._send(self._waiting.pop(0))

    def _relay(self, number: int, frame: object) -> None:
        if number == signal.SIGWINCH:
            self._collector.resize()
        if self._process is None:
            self._waiting.append(number)
        elif number not in _FROM_KEYBOARD or not _is_in_foreground():
            self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            # It may have ended.
            with contextlib.suppress(OSError):
                self._process.send_signal(number)


def _is_in_foreground() -> bool:
    """Return whether a terminal sends its signals to this process, and so to the command, which is in its group."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            return os.tcgetpgrp(descriptor) == os.getpgrp()
    return False


class _Ending:
    """Ends this process as the command has ended."""

    def __init__(self) -> None:
        """Register the last exit handler: the first that is registered runs last."""
        self._signal = 0
        atexit.register(self._end)

    def as_exit_code(self, code: int) -> int:
        """Return the exit code for a command's, which is negative if a signal has killed it."""
        if code >= 0:
            return code
        self._signal = -code
        return 128 - code

    def _end(self) -> None:
        if self._signal:
            # One core dump is enough.
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            with contextlib.suppress(OSError, ValueError):
                signal.signal(self._signal, signal.SIG_DFL)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os.kill(os.getpid(), self._signal)
