"""The pipeline that the demo runs.

    python pipeline.py REPORT [EPOCHS]

The step is like any other: it knows nothing of the log store. What comes after it writes down how the log
store fared, for the demo to show: only the process that logs knows.
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from zenml import pipeline, step
from zenml.client import Client

from composite_logstore import CompositeLogStore

EPOCHS = 5
BATCHES = 600
BATCH_SECONDS = 0.0025
CATCH_UP_SECONDS = 180.0

logger = logging.getLogger("training")


@step(enable_cache=False)
def train(epochs: int) -> float:
    logger.setLevel(logging.INFO)
    print(f"Training: {epochs} epochs of {BATCHES} batches")
    loss = 4.0
    for epoch in range(1, epochs + 1):
        for batch in range(1, BATCHES + 1):
            time.sleep(BATCH_SECONDS)
            loss *= 0.999
            logger.info("epoch %d, batch %d: loss %.4f", epoch, batch, loss)
            if batch % 20 == 0:
                show_progress(epoch, batch)
        print(file=sys.stderr)
        if epoch == 1:
            warnings.warn("the learning rate is high for so small a model", stacklevel=1)
        if epoch == 3:
            logger.warning("the loss falls more slowly than in the epoch before")
        try:
            save_checkpoint(epoch)
        except OSError:
            logger.exception("no checkpoint of epoch %d; the training goes on", epoch)
        print(f"epoch {epoch} is done")
    print(f"Trained: the loss is {loss:.4f}")
    return loss


def show_progress(epoch: int, batch: int) -> None:
    """Draw a progress bar as the usual libraries do: over and over on one line of stderr."""
    done = batch * 30 // BATCHES
    print(f"\repoch {epoch} |{'#' * done}{'.' * (30 - done)}| {batch}/{BATCHES}", end="", file=sys.stderr, flush=True)


def save_checkpoint(epoch: int) -> None:
    if epoch == 2:
        raise OSError("no space left on device")
    logger.info("checkpoint of epoch %d saved", epoch)


@pipeline(enable_cache=False)
def training(epochs: int = EPOCHS) -> None:
    train(epochs)


def watch_the_end() -> dict[str, Any]:
    """Return what will tell how the step's end went: ZenML waits in it for the log store's flush."""
    watched: dict[str, Any] = {}
    flush = CompositeLogStore.flush

    def watching(self: CompositeLogStore, blocking: bool = True) -> None:
        watched["pending_before"] = pending(self)
        start = time.monotonic()
        flush(self, blocking)
        watched["end_seconds"] = time.monotonic() - start
        watched["pending_after"] = pending(self)

    CompositeLogStore.flush = watching  # type: ignore[method-assign]
    return watched


def pending(store: CompositeLogStore) -> dict[str, int]:
    return {name: child["pending"] for name, child in store.stats().items()}


def main() -> None:
    watched = watch_the_end()
    run = training(*map(int, sys.argv[2:]))
    assert run is not None
    report = {"run_id": str(run.id), **watched}
    store = Client().active_stack.log_store
    assert isinstance(store, CompositeLogStore)
    # A process that lives on delivers what a child missed, once its backend is back.
    end = time.monotonic() + CATCH_UP_SECONDS
    while any(pending(store).values()) and time.monotonic() < end:
        time.sleep(0.05)
    report["stats"] = store.stats()
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
