"""What a `print` costs in a step, through ZenML's wrapper of stdout: `python -m benchmarks.printing`.

A `print` writes twice, the text and the newline. The children do nothing. Times are of the thread that prints, so other
work on the machine matters less; what is compared is measured in turn, and the fastest round counts.
"""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from zenml.log_stores import OtelLogStoreConfig
from zenml.log_stores.base_log_store import BaseLogStore
from zenml.logger import _wrapped_write

from benchmarks.stores import ENDPOINT, NullLogStore, NullOtelLogStore, composite, make, null_children
from tests.simulation import Context

LINES, ROUNDS = 2_000, 30


def printing(store: BaseLogStore | None) -> Callable[[], float]:
    """Return a function that prints lines in a step of a log store, and returns the microseconds of each."""
    file = io.StringIO()
    # What is printed goes nowhere else.
    file.write = _wrapped_write(lambda text: len(text), "stdout")  # type: ignore[method-assign]
    context: Any = nullcontext() if store is None else Context(store)  # type: ignore[arg-type]

    def run() -> float:
        with context:
            begin = time.thread_time()
            for number in range(LINES):
                print("epoch 3, batch", number, file=file)
            return (time.thread_time() - begin) / LINES * 1e6

    return run


def main() -> None:
    """Print the microseconds of each way."""
    logging.getLogger().setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as disk:
        works = {
            "outside of a step": printing(None),
            "a log store that does nothing": printing(make(NullLogStore, OtelLogStoreConfig(endpoint=ENDPOINT))),
            "composite log store, an entry for each line": printing(composite(disk, *null_children(3))),
            "composite log store, an entry for each write": printing(
                composite(disk, *null_children(3), join_lines=False)
            ),
            "ZenML, one log store": printing(make(NullOtelLogStore, OtelLogStoreConfig(endpoint=ENDPOINT))),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                times[name].append(work())
    for name, taken in times.items():
        print(f"{name:46} {min(taken):6.1f} µs")


if __name__ == "__main__":
    main()
