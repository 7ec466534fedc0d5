"""`composite-logstore run`, with a file in the place of the step's stream.

run_program.py REPORT [--capture-fd] -- COMMAND...
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from composite_logstore.capture.open_streams import VARIABLE
from composite_logstore.launch import command


class FileOfRecords:
    """Takes records in as a step's stream does."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def take(self, record: logging.LogRecord, attributes: dict[str, Any]) -> None:
        if not record.getMessage().strip():
            return
        line = {
            "message": record.getMessage(),
            "level": record.levelno,
            "name": record.name,
            "file": record.pathname,
            "function": record.funcName,
            "exception": record.exc_info,
            "extra": {key: value for key, value in vars(record).items() if key.startswith("extra_")},
            "attributes": dict(attributes),
        }
        os.write(self._file, json.dumps(line).encode() + b"\n")
        if record.getMessage().startswith("signal another thread"):
            # The kernel hands a process's signal to any of its threads.
            assert threading.current_thread() is not threading.main_thread()
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    def flush(self) -> None:
        pass


if __name__ == "__main__":
    report, *options = sys.argv[1 : sys.argv.index("--")]
    os.environ.setdefault(VARIABLE, "a stream")
    command.find_in_time = lambda text: FileOfRecords(report)  # type: ignore[assignment,return-value]
    sys.exit(command.run(sys.argv[sys.argv.index("--") + 1 :], options == ["--capture-fd"]))
