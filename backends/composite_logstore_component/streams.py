"""Describes a stream to another log store as if that had written it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zenml.client import Client
from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore, prepare_logs_uri
from zenml.log_stores.otel.otel_log_store import OtelLogStore
from zenml.utils.time_utils import utc_now

from composite_logstore.zenml import make_logs, moved

if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from zenml.log_stores import BaseLogStore
    from zenml.models import LogsResponse

    from composite_logstore import Stream


def extends_artifact(store: BaseLogStore) -> TypeIs[ArtifactLogStore]:
    """Return whether it is a log store in an artifact store. `isinstance()` would be true for a composite, too."""
    return ArtifactLogStore in type(store).__mro__


def extends_otel(store: BaseLogStore) -> TypeIs[OtelLogStore]:
    """Return whether the log store has an exporter of its own."""
    return OtelLogStore in type(store).__mro__


def as_its_own(logs: LogsResponse, store: BaseLogStore) -> LogsResponse:
    """Return the stream as if the log store had written it.

    Args:
        logs: The stream, as ZenML's server describes it.
        store: The log store.
    """
    place: dict[str, object] = {"log_store_id": store.id}
    if extends_artifact(store):
        artifact_store = store._artifact_store
        place = {"artifact_store_id": artifact_store.id, "uri": prepare_logs_uri(artifact_store, logs.id)}
    return moved(logs, **place)


def describe(stream: Stream, store: BaseLogStore) -> LogsResponse:
    """Return a stream that is being written, as ZenML's server would describe it to the log store.

    Args:
        stream: The stream. ZenML does not know the streams of programs that are no pipelines.
        store: The log store.
    """
    try:
        logs = Client().zen_store.get_logs(stream.id)
    except KeyError:
        logs = make_logs(stream.id, str(stream.attributes.get("zenml.log.source", "")), utc_now())
    return as_its_own(logs, store)
