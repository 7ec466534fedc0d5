"""The side of `composite-logstore run` that takes in what processes send, and what is written to descriptors."""

from __future__ import annotations

import codecs
import json
import logging
import os
import pty
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from composite_logstore.capture.process import PID, RANK
from composite_logstore.event import ExceptionInfo
from composite_logstore.launch.sender import LENGTH, MOST_BYTES

Take: TypeAlias = Callable[[logging.LogRecord, dict[str, Any]], object]
"""Takes in a record and the attributes of the process that it is from."""

END_SECONDS = 5.0
"""How long to read what ended processes have left behind."""
HELD_SECONDS = 1.0
"""How long a part of a line waits for its rest."""
_MOST_HELD = 1 << 16
"""How many characters a line may have; the rest is the next one."""
_MOST_PROCESSES = 1_000
# Descriptors: those of `run` itself, and for each process a connection and the ends of two pipes.
_OWN_DESCRIPTORS = 100
_DESCRIPTORS_EACH = 4
_READ_BYTES = 1 << 16

_LEVELS = {1: ("stdout", logging.INFO), 2: ("stderr", logging.ERROR)}

# Writes on what daemons write, once `run` itself has ended: their descriptors must not break.
_TEE = """
import os, select, sys
terminals = dict(zip(map(int, sys.argv[1::2]), map(int, sys.argv[2::2])))
while terminals:
    for end in select.select(list(terminals), [], [])[0]:
        try:
            content = os.read(end, 65536)
            is_over = not content
            while content:
                content = content[os.write(terminals[end], content):]
        except OSError:
            is_over = True
        if is_over:
            os.close(end)
            del terminals[end]
"""


class Output:
    """One descriptor of a process, whose bytes are all passed to the terminal, and whose lines are all logged.

    Attributes:
        writing: The end for the process; -1 once it has it.
    """

    def __init__(self, descriptor: int, terminal: int, attributes: dict[str, Any], take: Take) -> None:
        """Make the pipe, or a pseudo-terminal in place of a terminal: programs behave differently without one."""
        self.terminal = terminal
        self.attributes = attributes
        self._name, self._level = _LEVELS[descriptor]
        self._take = take
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._held_since = 0.0
        if os.isatty(terminal):
            self.reading, self.writing = pty.openpty()
            # No byte is changed here; the terminal does what terminals do.
            tty.setraw(self.writing)
            self.resize()
        else:
            self.reading, self.writing = os.pipe()
        status = os.fstat(self.writing)
        self.identity = status.st_dev, status.st_ino

    def resize(self) -> None:
        """Give a pseudo-terminal the size of the terminal."""
        # The thread that reads may have closed it.
        with suppress(OSError, ValueError):
            import fcntl
            import termios

            size = fcntl.ioctl(self.terminal, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self.reading, termios.TIOCSWINSZ, size)

    @property
    def seconds(self) -> float | None:
        """How long a part of a line may wait for its rest, None if there is no part."""
        return max(0.0, self._held_since + HELD_SECONDS - time.monotonic()) if self._held else None

    def read(self) -> bool:
        """Read what there is. Returns whether there may be more."""
        try:
            content = os.read(self.reading, _READ_BYTES)
        except OSError:
            # A pseudo-terminal that nobody has open any more.
            content = b""
        if not content:
            self._add(self._decoder.decode(b"", True))
            self.show_held()
            self.close()
            return False
        is_shown = self._show(content)
        self._add(self._decoder.decode(content))
        if not is_shown:
            # No program reads the terminal any more: let the command know it, as it would without `run`.
            self.show_held()
            self.close()
        return is_shown

    def close(self) -> None:
        """Let go of the descriptors."""
        for end in (self.reading, self.writing):
            if end >= 0:
                os.close(end)
        self.reading = self.writing = -1

    def hand_over(self) -> None:
        """Let go of the end that the process has now."""
        os.close(self.writing)
        self.writing = -1

    def show_held(self) -> None:
        """Log the part of a line whose rest has not come."""
        held, self._held = self._held, ""
        self._log(held)

    def _show(self, content: bytes) -> bool:
        while content:
            try:
                content = content[os.write(self.terminal, content) :]
            except BlockingIOError:
                poller = select.poll()
                poller.register(self.terminal, select.POLLOUT)
                poller.poll()
            except OSError:
                return False
        return True

    def _add(self, text: str) -> None:
        *lines, rest = text.split("\n")
        for line in lines:
            held, self._held = self._held, ""
            self._log(f"{held}{line}\n")
        if rest:
            if not self._held:
                self._held_since = time.monotonic()
            self._held += rest
            while len(self._held) >= _MOST_HELD:
                part, self._held = self._held[:_MOST_HELD], self._held[_MOST_HELD:]
                self._log(part)

    def _log(self, text: str) -> None:
        if text.strip():
            # Whatever happens, the pipe has to be read: the command would wait for ever.
            with suppress(Exception):
                self._take(logging.LogRecord(self._name, self._level, "", 0, text, (), None, ""), self.attributes)


class Collector:
    """Listens to the Python processes below a command, and reads captured descriptors. Each has a thread of its own."""

    def __init__(self, take: Take, captures: bool) -> None:
        """Begin to listen.

        Args:
            take: Takes in all records. It must neither raise nor wait.
            captures: Whether to read what is written to descriptors 1 and 2.
        """
        self._take = take
        self._captures = captures
        # Reentrant: the handler of SIGWINCH may interrupt the code that holds it.
        self._lock = threading.RLock()
        self._outputs: list[Output] = []
        self._threads: list[threading.Thread] = []
        self._folder = tempfile.mkdtemp(prefix="composite-logstore-")
        self.address = os.path.join(self._folder, "run")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(128)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_processes = max(1, min(_MOST_PROCESSES, (most - _OWN_DESCRIPTORS) // _DESCRIPTORS_EACH))
        # Readable once the command has ended.
        self._ended, self._ending = os.pipe()
        self._start(self._listen)

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return an environment in which Python processes send to this collector."""
        site = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
        path = environment.get("PYTHONPATH")
        changed = {
            **environment,
            "PYTHONPATH": f"{site}{os.pathsep}{path}" if path else site,
            "COMPOSITE_LOGSTORE_COLLECTOR": self.address,
        }
        if self._captures:
            changed["COMPOSITE_LOGSTORE_CAPTURES"] = "1"
        return changed

    def outputs(self, attributes: dict[str, Any]) -> list[Output]:
        """Return the two outputs of the command. `watch` begins to read them.

        Args:
            attributes: Those of the records of the command.
        """
        return [Output(descriptor, descriptor, attributes, self._take) for descriptor in (1, 2)]

    def watch(self, outputs: list[Output]) -> None:
        """Read outputs, whose writing ends somebody else has now, until they are closed."""
        for output in outputs:
            output.hand_over()
        with self._lock:
            self._outputs += outputs
        self._start(lambda: self._read(outputs))

    def resize(self) -> None:
        """Give all pseudo-terminals the size of the terminal."""
        with self._lock:
            for output in self._outputs:
                output.resize()

    def close(self) -> None:
        """Take in what is left by ended processes. What daemons write from now on goes to the terminal alone."""
        os.write(self._ending, b".")
        end = time.monotonic() + END_SECONDS
        # The thread that listens may still start others.
        while (alive := [thread for thread in self._threads if thread.is_alive()]) and time.monotonic() < end:
            alive[0].join(max(0.0, end - time.monotonic()))
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._leave_to_daemons()

    def _leave_to_daemons(self) -> None:
        ends = [end for output in self._outputs if output.reading >= 0 for end in (output.reading, output.terminal)]
        if ends:
            with suppress(OSError):
                subprocess.Popen(
                    [sys.executable, "-IS", "-c", _TEE, *map(str, ends)], pass_fds=set(ends), stdin=subprocess.DEVNULL
                )

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="composite-logstore run", daemon=True)
        with self._lock:
            # Started first: one that does not run yet would be taken for one that has ended.
            thread.start()
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    def _listen(self) -> None:
        while True:
            if self._listener.fileno() not in _ready([self._listener.fileno(), self._ended]):
                return
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(0.1)
                continue
            if sum(thread.is_alive() for thread in self._threads) > self._most_processes:
                connection.close()
                continue
            try:
                self._start(lambda connection=connection: self._serve(connection))  # type: ignore[misc]
            except RuntimeError:
                # The system allows no more threads.
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            outputs: list[Output] = []
            while (header := self._receive(connection, LENGTH.size)) is not None:
                (length,) = LENGTH.unpack(header)
                if length > MOST_BYTES or (content := self._receive(connection, length)) is None:
                    return
                attributes, fields = json.loads(content)
                attributes = {name: int(attributes[name]) for name in (PID, RANK) if name in attributes}
                if "ends" in fields:
                    outputs = self._answer(connection, fields["ends"], attributes)
                    continue
                for output in outputs:
                    # Some processes learn their rank late.
                    output.attributes.update(attributes)
                with suppress(Exception):
                    self._take(_record(fields), attributes)

    def _receive(self, connection: socket.socket, length: int) -> bytes | None:
        """Return so many bytes, None if there are no more, or if the command has ended and none are waiting."""
        content = bytearray()
        while len(content) < length:
            if connection.fileno() not in _ready([connection.fileno(), self._ended]):
                return None
            part = connection.recv(min(length - len(content), 1 << 20))
            if not part:
                return None
            content += part
        return bytes(content)

    def _answer(self, connection: socket.socket, ends: list[list[int]], attributes: dict[str, Any]) -> list[Output]:
        """Send a process the terminal's descriptors, and pipes of its own for those that it shares with others."""
        with self._lock:
            self._outputs = [output for output in self._outputs if output.reading >= 0]
            known = {output.identity: output for output in self._outputs}
        outputs = []
        answer = b""
        for descriptor, end in enumerate(ends, start=1):
            shared = known.get((end[0], end[1]))
            if shared is not None:
                outputs.append(Output(descriptor, shared.terminal, attributes, self._take))
            answer += b"0" if shared is None else b"1"
        given = [end for output in outputs for end in (output.terminal, output.writing)]
        socket.send_fds(connection, [answer], given)
        if outputs:
            self.watch(outputs)
        return outputs

    def _read(self, outputs: list[Output]) -> None:
        is_ending = False
        while ends := {output.reading: output for output in outputs if output.reading >= 0}:
            waits = [output.seconds for output in ends.values() if output.seconds is not None]
            watched = [*ends] if is_ending else [*ends, self._ended]
            ready = _ready(watched, 0 if is_ending else min(waits, default=None))
            if is_ending and not ready:
                break
            is_ending = is_ending or self._ended in ready
            for end, output in ends.items():
                if end in ready:
                    output.read()
                elif output.seconds == 0:
                    output.show_held()
        for output in outputs:
            output.show_held()


def _ready(descriptors: Iterable[int], seconds: float | None = None) -> set[int]:
    """Wait until some of the descriptors can be read, or have no writer any more. Returns them."""
    # Not `select`, which knows the first 1,024 descriptors alone.
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poller.poll(None if seconds is None else seconds * 1_000)}


def _record(fields: dict[str, Any]) -> logging.LogRecord:
    """Return a process's record as if it had been made here."""
    extra, exception = fields.pop("extra", {}), fields.pop("exception", None)
    record = logging.makeLogRecord({**extra, **fields})
    record.args = ()
    if exception is not None:
        record.exc_info = ExceptionInfo(*map(str, exception))  # type: ignore[assignment]
    return record
