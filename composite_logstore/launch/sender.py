"""Sends what a Python process logs and prints to `composite-logstore run`.

This module, and those that it is given, need the standard library alone: they run in processes of any environment.
"""

from __future__ import annotations

import array
import io
import json
import logging
import os
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Any

LENGTH = struct.Struct(">I")
MOST_BYTES = 1024**3
"""How many bytes one frame may have: more than a record, whose texts are bounded, takes even if all is escaped."""
SEND_SECONDS = 10.0
"""How long a record waits for `run` before this process sends no more."""

_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_FIELDS = ("name", "levelname", "pathname", "lineno", "funcName", "created", "thread")


class Sender:
    """The connection of one process. Never raises."""

    def __init__(self, address: str, process: Any, plain: Any) -> None:
        """Connect.

        Args:
            address: The path of the socket.
            process: The module `composite_logstore.capture.process`.
            plain: The module `composite_logstore.plain`.
        """
        self._address = address
        self._attributes = process.attributes
        self._plain = plain
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._connect()
        os.register_at_fork(after_in_child=self._after_fork_in_child)

    @property
    def is_connected(self) -> bool:
        """Whether `run` takes records."""
        return self._socket is not None

    def send(self, record: logging.LogRecord) -> None:
        """Send a record."""
        attributes, fields = self._attributes(), self._fields_of(record)
        content = json.dumps([attributes, fields]).encode()
        with self._lock:
            if self._socket is not None:
                try:
                    self._socket.sendall(LENGTH.pack(len(content)) + content)
                except OSError:
                    # Half a frame may have been sent, so nothing more can follow.
                    self._close()

    def _fields_of(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return a record's values as JSON can hold them, whatever they are."""
        plain = self._plain
        fields: dict[str, Any] = plain.plain_mapping({name: getattr(record, name, None) for name in _FIELDS})
        fields["levelno"] = plain.whole(getattr(record, "levelno", 0), plain.LOWEST_LEVEL, plain.HIGHEST_LEVEL)
        try:
            message = record.getMessage()
        except Exception:
            message = " ".join(plain.text_of(getattr(record, name, "")) for name in ("msg", "args"))
        fields["msg"] = plain.shorten(plain.text_of(message), plain.MOST_BYTES)
        extra = {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}
        if extra:
            fields["extra"] = plain.plain_mapping(extra)
        with suppress(Exception):
            if record.exc_info:
                fields["exception"] = plain.plain_exception(record.exc_info)
        return fields

    def redirect(self) -> None:
        """Let Python's streams write to the terminal itself, if `run` captures the descriptors."""
        if self._socket is None:
            return
        ends = []
        for descriptor in (1, 2):
            try:
                status = os.fstat(descriptor)
                ends.append([status.st_dev, status.st_ino])
            except OSError:
                ends.append([0, 0])
        content = json.dumps([self._attributes(), {"ends": ends}]).encode()
        self._socket.sendall(LENGTH.pack(len(content)) + content)
        descriptors = array.array("i")
        answer, ancillary, _, _ = self._socket.recvmsg(2, socket.CMSG_SPACE(4 * descriptors.itemsize))
        for _, _, data in ancillary:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        given = list(descriptors)
        for descriptor in given:
            os.set_inheritable(descriptor, False)
        for place, name in enumerate(("stdout", "stderr")):
            if answer[place : place + 1] == b"1":
                terminal, pipe = given.pop(0), given.pop(0)
                _redirect(place + 1, name, terminal, pipe)

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(SEND_SECONDS)
            connection.connect(self._address)
        except OSError:
            connection.close()
        else:
            self._socket = connection

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _after_fork_in_child(self) -> None:
        # Two processes must not write to one connection.
        self._lock = threading.Lock()
        was_connected = self.is_connected
        self._close()
        if was_connected:
            self._connect()


def _redirect(descriptor: int, name: str, terminal: int, pipe: int) -> None:
    stream = getattr(sys, name)
    stream.flush()
    raw = io.FileIO(terminal, "w")
    raw.name = f"<{name}>"
    is_direct = bool(getattr(stream, "write_through", False))
    buffer: Any = raw if is_direct else io.BufferedWriter(raw)
    redirected: Any = io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=is_direct,
    )
    redirected.mode = "w"
    os.dup2(pipe, descriptor)
    os.close(pipe)
    setattr(sys, name, redirected)
    setattr(sys, f"__{name}__", redirected)


sender: Sender | None = None
"""The process's own, None if it does not belong to a `run`."""


def begin(address: str, process: Any, plain: Any) -> None:
    """Send what this process logs and prints from now on, in all of its threads.

    Args:
        address: The path of the socket.
        process: The module `composite_logstore.capture.process`.
        plain: The module `composite_logstore.plain`.
    """
    global sender
    sender = Sender(address, process, plain)
    if sender.is_connected:
        if os.environ.get("COMPOSITE_LOGSTORE_CAPTURES"):
            with suppress(Exception):
                sender.redirect()
        process.ProcessCapture(sender.send).attach()
