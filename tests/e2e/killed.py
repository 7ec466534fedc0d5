"""A pipeline whose process may be killed in the middle of its step.

    killed.py FILE LINES [kill]

It writes the id of its run into the file, and each line that the step has logged.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from zenml import get_step_context, pipeline, step

LINES = int(sys.argv[2])
KILL = sys.argv[3:] == ["kill"]

logger = logging.getLogger("train.loop")


@step(enable_cache=False)
def train() -> None:
    logger.setLevel(logging.INFO)
    # Not through Python's buffers, which die with the process.
    said = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(said, f"{get_step_context().pipeline_run.id}\n".encode())
    for number in range(LINES):
        logger.info("line %d", number)
        os.write(said, f"line {number}\n".encode())
        if KILL and number == LINES // 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pipeline(enable_cache=False)
def training() -> None:
    train()


if __name__ == "__main__":
    training()
