"""A pipeline that prints its secrets.

leaking_program.py FOLDER

It registers all that it needs in its own ZenML. Archives are below the folder: one gets everything, one nothing secret.
"""

import json
import os
import sys
from base64 import b64encode

from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

FOLDER = sys.argv[1]


@step
def leak() -> None:
    """Print secrets in several ways: what a step is given, what it asks for, and what it prepares of them."""
    given = os.environ["API"]
    print("given", given, flush=True)
    print("half of", given[:5], end="")
    print(given[5:])
    print("header", b64encode(f"user:{given}".encode()).decode())
    print("asked for", Client().get_secret("vault").secret_values["deep"])


@pipeline(enable_cache=False, secrets=["door"])
def leaking() -> None:
    """Run the step."""
    leak()


if __name__ == "__main__":
    client = Client()
    client.create_secret("door", {"API": "hunter2-given"})
    client.create_secret("vault", {"deep": "hunter2-asked"})
    kind = StackComponentType.LOG_STORE
    client.create_flavor("composite_logstore.CompositeLogStoreFlavor", kind)
    for name in ("whole", "masked"):
        path = os.path.join(FOLDER, name)
        os.mkdir(path)
        client.create_stack_component(name, "local", StackComponentType.ARTIFACT_STORE, {"path": path})
    children = [
        {"name": "whole", "type": "artifact", "artifact_store": "whole"},
        {"name": "masked", "type": "artifact", "artifact_store": "masked", "redact": {}},
    ]
    settings = {"primary": "whole", "children": json.dumps(children)}
    client.create_stack_component("logs", "composite", kind, settings)
    components = {"orchestrator": "default", "artifact_store": "whole", "log_store": "logs"}
    client.create_stack("leaking", {StackComponentType(name): component for name, component in components.items()})
    client.activate_stack("leaking")
    leaking()
    print(json.dumps(client.active_stack.log_store.stats()["masked"]))  # type: ignore[attr-defined]
