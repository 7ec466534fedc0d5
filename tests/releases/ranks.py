"""A pipeline whose step starts processes, which log too, and a stream beside the run.

`ranks.py FILE` writes the id of the run into the file.
"""

# Annotations are not postponed, since older releases of ZenML take those of a step as they are.
import logging
import os
import subprocess
import sys
from pathlib import Path

from zenml import pipeline, step
from zenml.client import Client

from composite_logstore import CompositeLogStore

# It delivers before it ends: an end does not wait long on a busy machine.
JOINED = """
import logging
import composite_logstore
from composite_logstore.delivery.writers import _writers
composite_logstore.join()
logging.getLogger("worker").warning("joined")
for writer in list(_writers.values()):
    writer.flush(timeout=100, limit=100)
"""

UNAWARE = "print('below run')"


@step(enable_cache=False)
def train() -> None:
    logging.getLogger("train").warning("in the step")
    for rank, command in enumerate(
        (
            [sys.executable, "-c", JOINED],
            [sys.executable, "-m", "composite_logstore", "run", "--", sys.executable, "-c", UNAWARE],
        )
    ):
        subprocess.run(command, env={**os.environ, "RANK": str(rank)}, check=True)


@pipeline(enable_cache=False)
def training() -> None:
    train()


if __name__ == "__main__":
    run = training()
    assert run is not None
    store = Client().active_stack.log_store
    assert isinstance(store, CompositeLogStore)
    store.activate(run.id, source="elsewhere")
    logging.getLogger("train").warning("beside it")
    store.deactivate()
    Path(sys.argv[1]).write_text(str(run.id))
