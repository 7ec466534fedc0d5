"""`migrate` moves the logs of ZenML's own log stores, and those at Datadog, to each backend; `verify` proves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.migrating import House, names
from tests.servers.backends import NAMES, backends
from tests.servers.cloudwatch import CloudWatch
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import ZenML

pytestmark = [pytest.mark.integration, pytest.mark.deep]

EPOCHS = [f"epoch {number}" for number in range(5)]


@pytest.fixture(scope="module")
def servers() -> Iterator[ExitStack]:
    with ExitStack() as servers:
        yield servers


@pytest.fixture(scope="module")
def datadog(servers: ExitStack) -> Datadog:
    return servers.enter_context(Datadog())


@pytest.fixture(scope="module")
def children(servers: ExitStack) -> dict[str, dict[str, Any]]:
    """The settings of a child for each backend."""
    return {name: backend.child for name, backend in servers.enter_context(backends()).items()}


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory, datadog: Datadog, children: dict[str, Any], servers: ExitStack
) -> Iterator[House]:
    zenml = ZenML(tmp_path_factory.mktemp("moves") / "zenml")
    zenml.env |= CloudWatch().environment
    house = House(zenml)
    house.make_datadog_store("stock-datadog", datadog)
    live = {"name": "live", "type": "datadog", **datadog.settings}
    live |= {"api_key": API_KEY, "application_key": APPLICATION_KEY}
    house.do(
        "from composite_logstore.operations.migrate import _register_flavor; _register_flavor()\n"
        "client.create_stack_component('at-datadog', 'composite', Type.LOG_STORE, "
        f"{ {'primary': 'live', 'children': [live]}!r})"
    )
    yield house
    house.close()


@pytest.mark.parametrize(
    ("store", "backend"),
    [
        *((None, backend) for backend in NAMES),
        *(("stock-datadog", backend) for backend in NAMES),
        *(("at-datadog", backend) for backend in NAMES),
    ],
)
def test_a_stack_moves_and_verify_proves_it(
    house: House, children: dict[str, dict[str, Any]], store: str | None, backend: str
) -> None:
    """None is ZenML's default store, in the artifact store; `at-datadog` is our own child for Datadog."""
    stack = f"{backend}-{store}"
    if store == "at-datadog":
        house.do(
            f"found = client.get_stack_component(Type.LOG_STORE, {store!r})\n"
            f"client.create_stack_component({stack!r}, 'composite', Type.LOG_STORE, found.configuration)"
        )
        store = stack
    house.do(f"make_stack({stack!r}, {store!r}); run({stack!r}, 'before {stack}')")
    house.move(stack, "--stop-after", "switch", to=children[backend])
    house.do(f"run({stack!r}, 'between {stack}')")
    moved = house.move(stack, to=backend)
    assert names(moved) == ["watch", "backfill", "verify", "promote", "retire"], moved
    assert moved["backfill"]["copied"] > 5
    assert moved["verify"]["children"][backend]["missing"] == 0
    assert moved["verify"]["children"][backend]["different"] == 0
    house.do(f"run({stack!r}, 'after {stack}')")
    for run in ("before", "between", "after"):
        messages = house.messages(f"{run} {stack}")
        # ZenML's store for Datadog keeps milliseconds, and no order within one.
        assert (sorted(messages) if store == "stock-datadog" else messages) == EPOCHS, json.dumps(moved)
