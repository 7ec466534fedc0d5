"""`serve_from_artifact_store`: what ZenML registers of a stream, and who finds it by that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.exceptions import StackValidationError
from zenml.log_stores import ArtifactLogStore
from zenml.models import LogsResponse
from zenml.utils.logging_utils import generate_logs_request

from composite_logstore import CompositeLogStore
from composite_logstore.log_store import pinned
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_component.config import ComponentChildConfig
from composite_logstore_component.exporter import EmittingExporter
from tests.simulation import make_child, make_store

pytestmark = pytest.mark.integration

LOG_STORE = StackComponentType.LOG_STORE
ARTIFACT_STORE = StackComponentType.ARTIFACT_STORE
MESSAGES = [f"message {number}" for number in range(5)]


@step(enable_cache=False)
def train() -> None:
    for message in MESSAGES:
        logging.getLogger("train").warning(message)


@pipeline(enable_cache=False)
def training() -> None:
    train()


@pytest.fixture(scope="module", autouse=True)
def flavor() -> Iterator[None]:
    flavor = Client().create_flavor("composite_logstore.CompositeLogStoreFlavor", LOG_STORE)
    yield
    Client().delete_flavor(str(flavor.id))


@contextmanager
def active_stack(artifact_store: str | None = None, **settings: Any) -> Iterator[CompositeLogStore]:
    """Make a stack the active one whose log store has an archive, and these further settings."""
    client, name = Client(), f"serving-{uuid4().hex[:8]}"
    archive = {"name": "archive", "type": "artifact", **({"artifact_store": artifact_store} if artifact_store else {})}
    settings = {"primary": "archive", "children": [archive], **settings}
    client.create_stack_component(name, "composite", LOG_STORE, settings)
    components = {StackComponentType.ORCHESTRATOR: "default", ARTIFACT_STORE: "default", LOG_STORE: name}
    before = client.active_stack_model.id
    client.activate_stack(client.create_stack(name, components).id)
    try:
        store = client.active_stack.log_store
        assert isinstance(store, CompositeLogStore)
        yield store
    finally:
        client.activate_stack(before)
        client.delete_stack(name)
        client.delete_stack_component(name, LOG_STORE)


def stock(logs: LogsResponse) -> list[str]:
    """Return what a server finds that knows nothing of this package."""
    store = ArtifactLogStore.from_artifact_store(Client().active_stack.artifact_store)
    return [entry.message for entry in store.fetch(logs).items]


def test_zenml_registers_where_a_stream_is_in_the_artifact_store() -> None:
    with active_stack(serve_from_artifact_store=True):
        artifact_store = Client().active_stack.artifact_store
        request = generate_logs_request("step")
        assert request.uri == f"{artifact_store.path}/logs/{request.id}.log"
        assert (request.artifact_store_id, request.log_store_id) == (artifact_store.id, None)


def test_without_the_mode_it_registers_the_log_store() -> None:
    with active_stack() as store:
        assert not isinstance(store, ArtifactLogStore)
        request = generate_logs_request("step")
        assert (request.uri, request.artifact_store_id, request.log_store_id) == (None, None, store.id)


def test_a_run_can_be_read_by_zenml_itself_and_here_with_filters_too() -> None:
    with active_stack(serve_from_artifact_store=True) as store:
        run = training()
        assert run is not None
        (logs,) = [logs for logs in run.steps["train"].log_collection or [] if logs.source == "step"]
        assert stock(logs) == MESSAGES
        page = store.fetch(logs, limit=2)
        assert [entry.message for entry in page.items] == MESSAGES[-2:]
        assert [entry.message for entry in store.fetch(logs, before=page.before).items] == MESSAGES[-4:-2]
        found = store.fetch(logs, filter_=LogsEntriesFilter(search="message 3"))
        assert [entry.message for entry in found.items] == ["message 3"]


def test_streams_of_one_s_own_can_be_read_by_zenml_itself_too() -> None:
    with active_stack(serve_from_artifact_store=True) as store:
        run = training()
        assert run is not None
        for _ in range(2):
            logs_id = store.activate(run.id, source="elsewhere")
            logging.getLogger("train").warning("from elsewhere")
            store.deactivate()
        logs = Client().zen_store.get_logs(logs_id)
        assert (logs.log_store_id, logs.source) == (None, "elsewhere")
        # Both times it was one stream.
        assert stock(logs) == ["from elsewhere"] * 2


def test_streams_from_before_the_mode_can_be_read_here() -> None:
    with active_stack() as store:
        run = training()
        assert run is not None
        (logs,) = [logs for logs in run.steps["train"].log_collection or [] if logs.source == "step"]
        model = Client().update_stack_component(
            store.name, LOG_STORE, configuration={"serve_from_artifact_store": "true"}
        )
        served = CompositeLogStore.from_model(model)
        assert isinstance(served, ArtifactLogStore)
        assert isinstance(served, CompositeLogStore)
        assert [entry.message for entry in served.fetch(logs).items] == MESSAGES


def test_an_archive_elsewhere_is_refused_before_a_run(tmp_path: Any) -> None:
    Client().create_stack_component("elsewhere", "local", ARTIFACT_STORE, {"path": str(tmp_path)})
    with active_stack("elsewhere", serve_from_artifact_store=True), pytest.raises(StackValidationError) as refused:
        Client().active_stack.validate()
    assert (
        "child 'archive': 'artifact_store' is 'elsewhere', but with 'serve_from_artifact_store' ZenML's server looks "
        "in that of the stack, 'default'; leave 'artifact_store' out, or give the stack that artifact store"
    ) in str(refused.value)
    Client().delete_stack_component("elsewhere", ARTIFACT_STORE)


@pytest.mark.parametrize("by", ["name", "id"])
def test_an_archive_that_names_the_stack_s_own_artifact_store_is_accepted(by: str) -> None:
    name = "default" if by == "name" else str(Client().active_stack.artifact_store.id)
    with active_stack(name, serve_from_artifact_store=True):
        Client().active_stack.validate()


def test_as_a_child_of_another_it_is_what_it_is() -> None:
    with active_stack(serve_from_artifact_store=True) as served:
        child = ComponentChildConfig(name="inner", type="component", component=served.name, schedule_delay_millis=0)
        assert pinned(child.requirements) == served.requirements
        exporter = child.create_exporter()
        assert isinstance(exporter, EmittingExporter)
        exporter.close()
        store = make_store(child, make_child("other"))
        assert not isinstance(store, ArtifactLogStore)


def test_the_archive_s_own_artifact_store_comes_with_what_it_needs() -> None:
    Client().create_stack_component("bucket", "s3", ARTIFACT_STORE, {"path": "s3://bucket"})
    archive = ArtifactChildConfig(name="archive", type="artifact", artifact_store="bucket")
    assert any(requirement.startswith("s3fs") for requirement in archive.requirements)
    assert "composite-logstore" in archive.requirements
    nowhere = ArtifactChildConfig(name="archive", type="artifact", artifact_store="nowhere")
    assert nowhere.requirements == {"composite-logstore"}
    Client().delete_stack_component("bucket", ARTIFACT_STORE)
