"""Finds the artifact store of a stream: the configured one, or the one of the run's own stack.

It is looked up each time, since a stack's artifact store can be exchanged. Old runs then refer to the new one.
"""

from __future__ import annotations

import difflib
import os
import time
from typing import TYPE_CHECKING
from uuid import UUID

from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.enums import StackComponentType
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import UnavailableError, open_artifact_store
from composite_logstore.zenml import hook_of

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore
    from zenml.models import ComponentResponse, LogsResponse, PipelineRunResponse

    from composite_logstore import Stream


REMEMBERED_SECONDS = 5.0
"""How long an artifact store is reused, in seconds. A lookup and the connection take half a second, and reading many
streams needs one for each. It is not reused for longer, since a service connector's token expires."""

_stores: dict[str, tuple[float, BaseArtifactStore]] = {}
# Filesystems of fsspec do not work in a forked process.
os.register_at_fork(after_in_child=_stores.clear)


class ArtifactStoreNotFoundError(LookupError):
    """The artifact store does not exist. The message says how to mend it."""


class ArtifactStoreNotUsableError(Exception):
    """The artifact store exists, but cannot be used on this machine. The message says how to mend it."""


def find_named(name: str) -> BaseArtifactStore:
    """Return the artifact store with this name or id.

    Raises:
        ArtifactStoreNotFoundError: There is none.
        ArtifactStoreNotUsableError: Its integration is not installed, or its path cannot be used.
    """
    return _opened(name)


def requirements_of(name: str) -> set[str]:
    """Return the packages that a remote step needs for the artifact store; none if that cannot be found out here."""
    try:
        return set(find_named(name).requirements)
    except (ArtifactStoreNotFoundError, ArtifactStoreNotUsableError):
        return set()


def find_for_stream(stream: Stream) -> BaseArtifactStore:
    """Return the artifact store of the stack with which the stream is written.

    Raises:
        ArtifactStoreNotFoundError: It no longer exists.
        ArtifactStoreNotUsableError: Its integration is not installed, or its path cannot be used.
    """
    active = Client().active_stack.artifact_store
    if stream.artifact_store_id in (None, active.id):
        return active
    return _opened(str(stream.artifact_store_id))


def find_for_logs(logs: LogsResponse) -> BaseArtifactStore:
    """Return the artifact store of the stack of these logs' run.

    Raises:
        ArtifactStoreNotFoundError: It cannot be determined, or no longer exists.
        ArtifactStoreNotUsableError: Its integration is not installed, or its path cannot be used.
    """
    if logs.artifact_store_id:
        return _opened(str(logs.artifact_store_id))
    try:
        run = _run_of(logs)
    except KeyError:
        raise ArtifactStoreNotFoundError("the run of these logs no longer exists") from None
    if run is None:
        raise ArtifactStoreNotFoundError("these logs belong to no run that ZenML knows of")
    components = run.stack.components.get(StackComponentType.ARTIFACT_STORE) if run.stack else None
    if not components:
        raise ArtifactStoreNotFoundError(f"the stack of run '{run.name}' no longer exists")
    return _opened(str(components[0].id))


def is_in_progress(logs: LogsResponse) -> bool:
    """Return whether the run of these logs is known to be in progress."""
    try:
        run = _run_of(logs)
    except Exception:
        return False
    return run is not None and not run.status.is_finished


def is_where_it_was(logs: LogsResponse, artifact_store: BaseArtifactStore) -> bool:
    """Return whether these logs would be in this artifact store if there were any.

    Since they began, neither the log store nor the stack or the artifact store was changed, and the artifact store is
    one that has logs: a local one is another folder on each machine.
    """
    try:
        run, zen_store = _run_of(logs), Client().zen_store
        if run is None or run.stack is None:
            return False
        changes = [run.stack.updated, zen_store.get_stack_component(artifact_store.id).updated]
        if logs.log_store_id is not None:
            changes.append(zen_store.get_stack_component(logs.log_store_id).updated)
        if max(changes) > logs.created:
            return False
        folder = os.path.dirname(prepare_logs_uri(artifact_store, logs.id))
        return bool(artifact_store.isdir(folder) and artifact_store.listdir(folder))
    except Exception:
        return False


def find_model(name: str) -> ComponentResponse:
    """Return ZenML's model of the artifact store with this name or ID.

    Raises:
        ArtifactStoreNotFoundError: There is none.
    """
    try:
        if ENV_ZENML_SERVER not in os.environ:
            return _find_by_name(name)
        # On the server, a user must not read through a component that the user may not read.
        from zenml.zen_server.rbac.endpoint_utils import verify_permissions_and_get_entity
        from zenml.zen_server.utils import zen_store

        id = _uuid(name) or _find_by_name(name).id
        model = verify_permissions_and_get_entity(id=id, get_method=zen_store().get_stack_component)
    except KeyError:
        raise ArtifactStoreNotFoundError(
            f"there is no artifact store '{name}'{_nearest(name)}; name one that `zenml artifact-store list` shows, or "
            f"register it"
        ) from None
    if model.type != StackComponentType.ARTIFACT_STORE:
        raise ArtifactStoreNotFoundError(f"stack component '{name}' is not an artifact store; name one that is")
    return model


def _nearest(name: str) -> str:
    """Return the artifact store that was probably meant, as a hint. On the server its name might be none of theirs."""
    if ENV_ZENML_SERVER in os.environ:
        return ""
    known = [store.name for store in Client().list_stack_components(type=StackComponentType.ARTIFACT_STORE).items]
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _find_by_name(name: str) -> ComponentResponse:
    return Client().get_stack_component(
        StackComponentType.ARTIFACT_STORE, name_id_or_prefix=name, allow_name_prefix_match=False
    )


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _opened(name: str) -> BaseArtifactStore:
    """Return the artifact store with this name or ID, from the cache if it was opened a moment ago."""
    if ENV_ZENML_SERVER in os.environ:
        # No cache on the server: the next reader may be another user, without permission.
        return _load(find_model(name))
    now = time.monotonic()
    known_until, store = _stores.get(name, (0.0, None))
    if store is None or now >= known_until:
        store = _load(find_model(name))
        _stores[name] = now + REMEMBERED_SECONDS, store
    return store


def _load(model: ComponentResponse) -> BaseArtifactStore:
    try:
        return open_artifact_store(model)
    except ImportError as error:
        flavor = model.flavor_name
        raise ArtifactStoreNotUsableError(
            f"artifact store '{model.name}' cannot be loaded here; install what its flavor '{flavor}' needs "
            f"(`zenml integration install {flavor}`)"
        ) from error
    except UnavailableError as error:
        raise ArtifactStoreNotUsableError(f"artifact store '{model.name}': {error}") from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        # Loading a local artifact store creates its folder.
        raise ArtifactStoreNotUsableError(
            f"artifact store '{model.name}' cannot be opened here ({error.strerror}); check its path"
        ) from error


def _run_of(logs: LogsResponse) -> PipelineRunResponse | None:
    zen_store = Client().zen_store
    run_id = logs.pipeline_run_id
    if run_id is None and logs.step_run_id:
        run_id = zen_store.get_run_step(logs.step_run_id).pipeline_run_id
    if run_id is None and (hook_id := hook_of(logs)):
        run_id = zen_store.get_hook_invocation(hook_id, hydrate=False).pipeline_run_id
    return zen_store.get_run(run_id, hydrate=False) if run_id else None
