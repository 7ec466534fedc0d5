from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from zenml import get_step_context, pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.io.filesystem_registry import default_filesystem_registry
from zenml.models import PipelineRunResponse

from composite_logstore.reading import gaps
from composite_logstore_artifact.artifact_stores import (
    ArtifactStoreNotFoundError,
    ArtifactStoreNotUsableError,
    find_for_logs,
    find_for_stream,
    find_named,
    is_in_progress,
)
from composite_logstore_artifact.config import ArtifactChildConfig
from tests.artifact_stores import make_logs
from tests.events import make_stream

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UUID]:
    """An artifact store that is registered, and not in the active stack."""
    path = tmp_path_factory.mktemp("other")
    component = Client().create_stack_component(
        "other", "local", StackComponentType.ARTIFACT_STORE, {"path": str(path)}
    )
    yield component.id
    Client().delete_stack_component("other", StackComponentType.ARTIFACT_STORE)


seen_in_progress: list[bool] = []


def after_success() -> None:
    print("it went well")


@step(enable_cache=False)
def one_step() -> int:
    run = get_step_context().pipeline_run
    logs = make_logs(pipeline_run_id=run.id)
    assert not gaps.is_finished(logs)
    seen_in_progress.append(is_in_progress(logs))
    return 1


@pipeline(enable_cache=False)
def one_step_pipeline() -> None:
    # Said at its definition, a hook would have ZenML set up its database while pytest collects.
    one_step.with_options(on_success=after_success)()


def run_on(artifact_store: str) -> PipelineRunResponse:
    client = Client()
    stack = client.create_stack(
        f"stack-{uuid4().hex[:8]}",
        {
            StackComponentType.ORCHESTRATOR: "default",
            StackComponentType.ARTIFACT_STORE: artifact_store,
        },
    )
    active = client.active_stack_model.id
    client.activate_stack(stack.id)
    try:
        run = one_step_pipeline()
    finally:
        client.activate_stack(active)
    assert run is not None
    return run


def test_the_settings_check_that_the_artifact_store_exists(other: UUID) -> None:
    for name in ("other", str(other), "default"):
        ArtifactChildConfig(name="archive", type="artifact", artifact_store=name).check()

    for name in ("othe", str(uuid4()), "nothing"):
        with pytest.raises(
            ValueError, match=f"'artifact_store': there is no artifact store '{name}'.*zenml artifact-store list"
        ):
            ArtifactChildConfig(name="archive", type="artifact", artifact_store=name).check()


def test_registration_refuses_one_that_does_not_exist() -> None:
    Client().create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
    try:
        for name, hint in (("defautl", r" \(did you mean 'default'\?\)"), ("nowhere", "")):
            settings = {"primary": "a", "children": [{"name": "a", "type": "artifact", "artifact_store": name}]}
            with pytest.raises(ValueError, match=f"there is no artifact store '{name}'{hint}"):
                Client().create_stack_component("refused", "composite", StackComponentType.LOG_STORE, settings)
    finally:
        Client().delete_flavor("composite")


def test_by_name_and_by_id(other: UUID) -> None:
    assert find_named("other").id == find_named(str(other)).id == other


def test_the_active_stack_s_is_not_made_again() -> None:
    active = Client().active_stack.artifact_store

    assert find_named("default") is active
    stream = make_stream()
    for stream.artifact_store_id in (None, active.id):
        assert find_for_stream(stream) is active


def test_a_stream_s_own(other: UUID) -> None:
    stream = make_stream()
    stream.artifact_store_id = other
    assert find_for_stream(stream).id == other

    stream.artifact_store_id = uuid4()
    with pytest.raises(ArtifactStoreNotFoundError, match="there is no artifact store"):
        find_for_stream(stream)


def test_a_run_s_own_as_long_as_its_stack_is_there(other: UUID) -> None:
    run = run_on("other")
    assert seen_in_progress == [True]
    [one] = run.steps.values()
    assert run.stack is not None

    [hook] = Client().list_hook_invocations(pipeline_run_id=run.id)

    for logs in (
        make_logs(pipeline_run_id=run.id),
        make_logs(step_run_id=one.id),
        make_logs(hook_invocation_id=hook.id),
    ):
        assert find_for_logs(logs).id == other
        assert not is_in_progress(logs)
        assert gaps.is_finished(logs)
    default = Client().active_stack.artifact_store.id
    assert find_for_logs(make_logs(pipeline_run_id=run.id, artifact_store_id=default)).id == default

    # Looked up live.
    Client().update_stack(run.stack.id, component_updates={StackComponentType.ARTIFACT_STORE: ["default"]})
    assert find_for_logs(make_logs(pipeline_run_id=run.id)).id == default

    Client().delete_stack(run.stack.id)
    with pytest.raises(ArtifactStoreNotFoundError, match=f"the stack of run '{run.name}' no longer exists"):
        find_for_logs(make_logs(pipeline_run_id=run.id))


def test_runs_that_are_not_there() -> None:
    for logs in (make_logs(), make_logs(pipeline_run_id=uuid4()), make_logs(hook_invocation_id=uuid4())):
        with pytest.raises(ArtifactStoreNotFoundError):
            find_for_logs(logs)
        assert not is_in_progress(logs)
        assert not gaps.is_finished(logs)


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kind = StackComponentType.ARTIFACT_STORE
    component = Client().create_stack_component("odd", "local", kind, {"path": str(tmp_path / "file")})
    try:
        with pytest.raises(ArtifactStoreNotUsableError, match=r"'odd' cannot be opened here \(File exists\)"):
            find_named("odd")
    finally:
        Client().delete_stack_component(component.id, kind)


def test_another_bucket_does_not_become_the_filesystem_of_the_pipeline(tmp_path: Path) -> None:
    names = ["first", "second"]
    for name in names:
        Client().create_stack_component(
            name, "s3", StackComponentType.ARTIFACT_STORE, {"path": f"s3://{name}", "key": "test", "secret": "test"}
        )
    try:
        find_named("first")  # as a stack's own would have been
        registered = default_filesystem_registry.get_filesystem_for_path("s3://first/x")

        assert find_named("second").path == "s3://second"

        assert default_filesystem_registry.get_filesystem_for_path("s3://first/x") is registered
    finally:
        for name in names:
            Client().delete_stack_component(name, StackComponentType.ARTIFACT_STORE)
