"""What a training loop loses to logging, and how many records of threads that share a ZenML context get through.

    python -m benchmarks.training loop|threads|torch NAME PLACES ITERATIONS

prints it as JSON. `torch` is a loop of PyTorch that logs ten lines a step, on a GPU where there is one.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from statistics import median
from typing import Any

from zenml.log_stores.base_log_store import BaseLogStore, BaseLogStoreOrigin
from zenml.utils.logging_utils import LoggingContext

from benchmarks.contenders import CONTENDERS
from benchmarks.stores import NullLogStore, NullOtelLogStore, composite, make, make_logs, null_children

RATE = 10_000
"""Records a second, of the loop that logs to nobody."""

NOWHERE = "no logging"
NULL = "ZenML, a log store that does nothing"


class Forwarding(NullLogStore):
    """Hands records to one of those who deliver."""

    contender: Any = None
    counter: Any = None

    @property
    def origin_class(self) -> type[BaseLogStoreOrigin]:
        return BaseLogStoreOrigin

    def emit(self, origin: Any, record: logging.LogRecord, metadata: dict[str, Any] | None = None) -> None:
        if self.counter is not None:
            next(self.counter)
        if self.contender is not None:
            self.contender.emit(record)


@contextmanager
def zenml_context(store: BaseLogStore) -> Iterator[None]:
    """Collect records as ZenML does it in a step."""
    context = LoggingContext("step", make_logs(store))
    context._log_store = store
    with context:
        yield


def quiet_console() -> None:
    """Leave out ZenML's console: it is the same for everybody, and not what is measured."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if "Console" in type(handler).__name__:
            root.removeHandler(handler)
    root.setLevel(logging.INFO)


def work(size: int) -> int:
    """Compute for a while."""
    total = 0
    for number in range(size):
        total += number * number % 7
    return total


def calibrated() -> int:
    """Return how much to compute for a loop that does so `RATE` times a second."""
    size = 1_000
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(200):
            work(size)
        size = max(1, int(size / ((time.perf_counter() - begin) / 200 * RATE)))
    return size


def loop_seconds(size: int, iterations: int, is_logging: bool) -> float:
    """Return how long the loop takes."""
    log = logging.getLogger("train").info
    begin = time.perf_counter()
    for number in range(iterations):
        work(size)
        if is_logging:
            log("epoch %d, loss %.3f", number, 0.5)
    return time.perf_counter() - begin


def slowdown(
    seconds: Callable[[int, bool], float], iterations: int, is_logging: bool, flush: Callable[[], object]
) -> float:
    """Run a loop without logging and with it, in turn, and return how much longer it takes, as a share.

    Args:
        seconds: Runs it, so many times round and with or without logging, and returns how many seconds that took.
        iterations: How many times round, in all rounds without logging together.
        is_logging: Whether it logs where it is said to log.
        flush: Returns when everything is delivered: what waits is not carried over into the loop that does not log.
    """
    seconds(iterations // 10, True)
    ratios = []
    for _ in range(3):
        alone = seconds(iterations // 3, False)
        ratios.append(seconds(iterations // 3, is_logging) / alone)
        flush()
    return median(ratios) - 1


def flush_of(store: Forwarding) -> Callable[[], object]:
    """Return the flush of the contender who gets the records, if there is one."""
    return store.contender.flush if store.contender else lambda: None


def loop(name: str, places: dict[str, str], iterations: int) -> dict[str, float]:
    """Run the loop once without logging and once with it, in turn, and return the slowdown."""
    store = make(Forwarding, None)
    assert isinstance(store, Forwarding)
    if name in CONTENDERS:
        store.contender = CONTENDERS[name](places)
    size = calibrated()
    with zenml_context(store):
        slower = slowdown(partial(loop_seconds, size), iterations, name != NOWHERE, flush_of(store))
    return {"slowdown": slower}


LINES = 10
"""Lines a step of the loop of PyTorch."""


def torch_seconds(torch: Any, device: str, iterations: int, is_logging: bool) -> float:
    """Return how long a loop takes that launches many small kernels and waits for them once a step."""
    log = logging.getLogger("train").info
    weights = torch.randn(512, 512, device=device) / 512**0.5
    found = torch.randn(512, 512, device=device)
    begin = time.perf_counter()
    for number in range(iterations):
        for _ in range(32):
            found = torch.tanh(found @ weights)
        loss = found.mean().item()
        if is_logging:
            for line in range(LINES):
                log("epoch %d, line %d, loss %.3f", number, line, loss)
    return time.perf_counter() - begin


def torch_loop(name: str, places: dict[str, str], iterations: int) -> dict[str, float | str]:
    """Do the same as `loop` with PyTorch, if it is installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return {"skipped": "PyTorch is not installed"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = make(Forwarding, None)
    assert isinstance(store, Forwarding)
    if name in CONTENDERS:
        store.contender = CONTENDERS[name](places)
    with zenml_context(store):
        slower = slowdown(partial(torch_seconds, torch, device), iterations, name != NOWHERE, flush_of(store))
    return {"slowdown": slower, "device": torch.cuda.get_device_name() if device == "cuda" else device}


THREADED = {
    NULL: lambda disk: make(NullLogStore, None),
    "composite log store, three children": lambda disk: composite(disk, *null_children(3)),
    "ZenML, one log store": lambda disk: make(NullOtelLogStore, _otel()),
    "ZenML, three log stores": lambda disk: [make(NullOtelLogStore, _otel()) for _ in range(3)],
}


def _otel() -> Any:
    from zenml.log_stores import OtelLogStoreConfig

    from benchmarks.stores import ENDPOINT

    return OtelLogStoreConfig(endpoint=ENDPOINT)


class Counting:
    """Passes records on to some log stores, and counts them."""

    def __init__(self, stores: list[BaseLogStore]) -> None:
        self._stores = stores
        self._origins: list[Any] = []
        self.counted = count()
        self.id = stores[0].id
        self.name = stores[0].name

    def register_origin(self, name: str, log_model: Any, metadata: dict[str, Any]) -> Any:
        self._origins = [store.register_origin(name, log_model, dict(metadata)) for store in self._stores]
        return self._origins[0]

    def deregister_origin(self, origin: Any, blocking: bool = True) -> None:
        for store, one in zip(self._stores, self._origins, strict=True):
            store.deregister_origin(one, blocking=blocking)

    def emit(self, origin: Any, record: logging.LogRecord, metadata: Any = None) -> None:
        next(self.counted)
        for store, one in zip(self._stores, self._origins, strict=True):
            store.emit(one, record, metadata)


def threads(name: str, iterations: int) -> dict[str, float]:
    """Log and print from four threads that share a context, and return which share of it reached `emit`."""
    with tempfile.TemporaryDirectory() as disk:
        made = THREADED[name](disk)
        counting = Counting(made if isinstance(made, list) else [made])
        log = logging.getLogger("train").info
        with zenml_context(counting):  # type: ignore[arg-type]
            together = threading.Barrier(4)

            def run() -> None:
                together.wait()
                for number in range(iterations):
                    log("epoch %d, loss %.3f", number, 0.5)
                    print("epoch", number)

            context = contextvars.copy_context()
            running = [threading.Thread(target=context.copy().run, args=(run,)) for _ in range(4)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
    # A print of two values is four writes, two of which are blank: those ZenML passes on to nobody.
    return {"reached_emit": next(counting.counted) / (4 * 3 * iterations)}


def main() -> None:
    kind, name, places, iterations = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    answer = os.dup(1)
    # What is logged and printed goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    quiet_console()
    result: dict[str, Any]
    if kind == "threads":
        result = threads(name, iterations)
    else:
        result = (torch_loop if kind == "torch" else loop)(name, places, iterations)
    os.write(answer, b"\n" + json.dumps(result).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
