"""A pipeline that writes down what it logs, independently of the log store.

    pipeline.py DIRECTORY LINES [pause]

It leaves `report.json` in the directory. With `pause` the step stops in its middle, once all of its first
half is delivered, and the process at its end, until the test lets it go on: `middle` and `end` appear when
they wait, and hold how much the collector has taken; they go on when the test has made `middle-go` and
`end-go`.
"""

# Annotations are not postponed, since older releases of ZenML take those of a step as they are.
import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from zenml import pipeline, step
from zenml.client import Client
from zenml.utils import logging_utils

from composite_logstore import CompositeLogStore

DIRECTORY = Path(sys.argv[1])
LINES = int(sys.argv[2])
PAUSE = sys.argv[3:] == ["pause"]

logger = logging.getLogger("train.loop")
said: list[dict[str, Any]] = []
flushes: list[float] = []


# Before 0.93.1, ZenML's context has no method for it.
active = getattr(logging_utils.LoggingContext, "get", None) or logging_utils.active_logging_context.get


def note(**fields: Any) -> None:
    """Write down what is said, with the stream that is active."""
    context = active()
    if context is not None and not context._disabled and fields["message"].strip():
        said.append({"source": context.log_model.source, **fields})


class Recorder(logging.Handler):
    """Writes down every record of a logger."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            # As ZenML's own stores show it.
            stacktrace = "".join(traceback.format_exception(error)).rstrip()
            message += f"\n{type(error).__name__}: {error}\n{stacktrace}"
        note(
            message=message,
            level=record.levelno,
            name=record.name,
            filename=record.pathname,
            lineno=record.lineno,
            earliest=round(record.created * 1e6),
            latest=round(record.created * 1e6),
        )


def record_prints(name: str, level: int) -> None:
    """Write down the lines and updates of progress bars that are printed: on top of ZenML's own wrapper."""
    stream = getattr(sys, name)
    write = stream.write
    parts: list[str] = []
    # When the first part was printed.
    times: list[int] = []

    def recorded(text: str) -> Any:
        earliest = time.time()
        result = write(text)
        if not any(parts):
            times[:] = int(earliest * 1e6), int(time.time() * 1e6) + 1
        parts.append(text)
        if text.endswith("\n") or text.startswith("\r"):
            message = "".join(parts).strip("\r\n")
            parts.clear()
            note(
                message=message,
                level=level,
                name=name,
                filename=None,
                lineno=None,
                earliest=times[0],
                latest=times[1],
            )
        return result

    stream.write = recorded


def time_flushes() -> None:
    """Write down how long each flush takes."""
    flush = CompositeLogStore.flush

    def timed(self: CompositeLogStore, blocking: bool = True) -> None:
        start = time.monotonic()
        flush(self, blocking)
        flushes.append(time.monotonic() - start)

    CompositeLogStore.flush = timed  # type: ignore[method-assign]


def wait_for_test(place: str) -> None:
    """Stop until the test lets it go on."""
    if PAUSE:
        store = Client().active_stack.log_store
        assert isinstance(store, CompositeLogStore)
        if place == "middle":
            store.writer.flush(timeout=100, limit=100)
        written = DIRECTORY / f"{place}.part"
        written.write_text(str(store.stats()["collector"]["delivered"]))
        written.rename(DIRECTORY / place)
        end = time.monotonic() + 120
        while not (DIRECTORY / f"{place}-go").exists() and time.monotonic() < end:
            time.sleep(0.02)


def wait_for_summary(run_id: Any) -> None:
    """Wait until the summary that is published in the background is there: the process's end does not wait long."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        (found,) = Client().list_run_steps(pipeline_run_id=run_id, hydrate=True).items
        if found.run_metadata.get("log_store.archive", {}).get("as_of") == "the last flush":
            break
        time.sleep(0.1)


@step(enable_cache=False)
def train() -> None:
    logger.setLevel(logging.DEBUG)
    logger.debug("details")
    logger.info("arguments: %s and %05.2f", "text", 3.14159)
    logger.warning("Grüße, 日本語, 🙂, e\u0301 and \u200bzero width")
    logger.error("several\nlines\n\tand a tab, \"quotes\", \\ and {'braces': [1]}")
    logger.critical("\x1b[31mred\x1b[0m")
    logger.info("x" * 20_000)
    logger.info("with attributes", extra={"epoch": 3, "rate": 0.5})
    print("printed")
    print("printed", "in", "parts", sep=" - ")
    print("on stderr", file=sys.stderr)
    warnings.warn("a warning", stacklevel=1)
    logging.captureWarnings(True)
    warnings.warn("a warning that is logged", stacklevel=1)
    logging.captureWarnings(False)
    try:
        raise ValueError("the loss is not a number")
    except ValueError:
        logger.exception("caught")
    for number in range(LINES):
        logger.info("line %d", number)
        if number % 100 == 0:
            print(f"\r{number * 100 // LINES:3d} %", end="", file=sys.stderr)
        if number == LINES // 2:
            wait_for_test("middle")
    print("\r100 %", file=sys.stderr)
    logger.info("done")


@pipeline(enable_cache=False)
def training() -> None:
    train()


if __name__ == "__main__":
    logging.getLogger().addHandler(Recorder())
    record_prints("stdout", logging.INFO)
    record_prints("stderr", logging.ERROR)
    time_flushes()
    run = training()
    assert run is not None
    store = Client().active_stack.log_store
    assert isinstance(store, CompositeLogStore)
    stats = [store.stats()]
    wait_for_test("end")
    end = time.monotonic() + 120
    while any(child["pending"] for child in store.stats().values()) and time.monotonic() < end:
        time.sleep(0.1)
    stats.append(store.stats())
    if not PAUSE:
        wait_for_summary(run.id)
    report = {"run_id": str(run.id), "said": said, "flushes": flushes, "stats": stats}
    (DIRECTORY / "report.json").write_text(json.dumps(report))
