"""Registers a log store and runs the demo's pipeline with it: a shorter one, with one message of 20 KB, some printed
text and some processes more.

    demonstrated.py SETTINGS OUTPUT

It registers everything as the demo does, with these settings of the log store as JSON, and writes the ids of the
run and of the log store.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.utils import source_utils

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
source_utils.set_custom_source_root(str(ROOT))

from examples.demo import pipeline as demo  # noqa: E402  # found by way of the path above

LONG = "weights of epoch 5: " + "0123456789" * 2_048
"""20 KB."""

RANKS = 4

LOADING = """
import traceback

print("shard", rank, "of", ranks, end=": ")
print(512, "rows")
try:
    if rank == 1:
        raise OSError(f"shard {rank} has no labels")
except OSError:
    traceback.print_exc()
"""


def save_checkpoint(epoch: int) -> None:
    save(epoch)
    if epoch == 4:
        load_shards()
    if epoch == 5:
        logging.getLogger("training").info(LONG)
        evaluate()


def evaluate() -> None:
    print("evaluation:", 3, "of", 4, "batches", end="")
    print(", accuracy", 0.91)
    for batch in range(1, 5):
        print(f"\revaluation {batch * 25:3} %", end="", flush=True)
    print()
    try:
        float("n/a")
    except ValueError:
        traceback.print_exc()


def load_shards() -> None:
    """Load one in each of the processes of a distributed training."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=load_shard, args=(rank,)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def load_shard(rank: int) -> None:
    # As a launcher does.
    os.environ["RANK"] = str(rank)
    exec(compile(LOADING, "train.py", "exec"), {"rank": rank, "ranks": RANKS})


if __name__ == "__main__":
    client = Client()
    client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
    settings = json.loads(sys.argv[1])
    logs = client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, settings)
    components = {StackComponentType(kind): "default" for kind in ("orchestrator", "artifact_store")}
    client.create_stack("demo", {**components, StackComponentType.LOG_STORE: "logs"})
    client.activate_stack("demo")
    save, demo.save_checkpoint = demo.save_checkpoint, save_checkpoint
    demo.BATCHES, demo.BATCH_SECONDS = 40, 0.0
    run = demo.training()
    assert run is not None
    Path(sys.argv[2]).write_text(json.dumps({"run": str(run.id), "log store": str(logs.id)}))
