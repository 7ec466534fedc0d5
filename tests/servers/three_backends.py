"""Three real backends, one of each kind, that can fail: what they hold is theirs, whoever dies."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from zenml.client import Client
from zenml.enums import StackComponentType

from composite_logstore import ChildConfig
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.servers.datadog import Datadog
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import OtlpReceiver
from tests.watching import LAST_WORDS

CHILDREN = ("archive", "collector", "live")


class Held(NamedTuple):
    """One copy of an event, as a backend holds it."""

    stream: str
    uid: str
    writer: str
    sequence: int
    message: str


@dataclass(frozen=True)
class Servers:
    """What there need be only one of.

    Attributes:
        archive: The name of an artifact store in a folder.
        folder: The folder.
        receiver: Takes what comes over OTLP.
        datadog: The stand-in.
    """

    archive: str
    folder: Path
    receiver: OtlpReceiver
    datadog: Datadog

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Servers]:
        kind = StackComponentType.ARTIFACT_STORE
        component = Client().create_stack_component(folder.name, "local", kind, {"path": str(folder)})
        # Nobody waits for Datadog's thorough checks here.
        with OtlpReceiver() as receiver, Datadog(checked=False) as datadog:
            yield cls(component.name, folder, receiver, datadog)
        Client().delete_stack_component(component.id, kind)


class ThreeBackends:
    """The backends of one log store: `archive`, `collector` and `live`, each of which can fail by itself.

    Attributes:
        servers: Where the events go.
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._proxies = {
            "collector": FaultyProxy(servers.receiver.http_port),
            "live": FaultyProxy(servers.datadog.port),
        }

    def __enter__(self) -> ThreeBackends:
        for proxy in self._proxies.values():
            proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies.values():
            proxy.__exit__()

    def children(self, **settings: Any) -> list[ChildConfig]:
        """Return the children, which are to have these settings."""
        collector, live = (f"http://127.0.0.1:{proxy.port}" for proxy in self._proxies.values())
        datadog = {**self.servers.datadog.settings, "endpoint": f"{live}/api/v2/logs", "api_endpoint": live}
        return [
            ArtifactChildConfig(name="archive", type="artifact", artifact_store=self.servers.archive, **settings),
            OtlpChildConfig(name="collector", type="otlp", endpoint=collector, **settings),
            DatadogChildConfig(**{"name": "live", "type": "datadog", **datadog, **settings}),
        ]

    def fail(self, child: str, fault: str) -> None:
        """Let something be wrong with a child's backend: one of the proxy's faults, in the archive a file in its way.

        That one only while no process writes there.
        """
        if child == "archive":
            if self._logs.exists():
                self._logs.rename(self._away)
            self._logs.parent.mkdir(parents=True, exist_ok=True)
            self._logs.touch()
        else:
            self._proxies[child].fault = fault

    def mend(self, child: str) -> None:
        """Let all be well with a child's backend."""
        if child == "archive":
            if self._logs.is_file():
                self._logs.unlink()
                if self._away.exists():
                    self._away.rename(self._logs)
        elif self._proxies[child].fault is not None:
            self._proxies[child].fault = None

    @property
    def _logs(self) -> Path:
        return self.servers.folder / "logs"

    @property
    def _away(self) -> Path:
        return self.servers.folder / "logs-away"

    def held(self, streams: Collection[UUID]) -> dict[str, list[Held]]:
        """Return what each child's backend holds of the streams: in the order of arrival, copies and all.

        Without the entries that say that a process has died.
        """
        wanted = {str(id) for id in streams}
        held = {
            "archive": [held for stream in wanted for held in self._archived(stream)],
            "collector": [
                _from_attributes(record.attributes, record.body)
                for record in self.servers.receiver.records()
                if record.attributes["zenml.log.id"] in wanted
            ],
            "live": [
                _from_attributes(entry, entry["message"])
                for entry in self.servers.datadog.seen()["entries"]
                if entry["zenml.log.id"] in wanted
            ],
        }
        return {name: [one for one in copies if LAST_WORDS not in one.message] for name, copies in held.items()}

    def _archived(self, stream: str) -> Iterable[Held]:
        file = self._logs / f"{stream}.log"
        for line in file.read_bytes().split(b"\n") if file.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                # A process that was killed while it wrote has left half a line. No reader shows it.
                continue
            yield Held(stream, entry["id"], entry["writer"], entry["sequence"], entry["message"])


def _from_attributes(attributes: dict[str, Any], message: str) -> Held:
    names = ("zenml.log.id", "log.record.uid", "zenml.log.writer", "zenml.log.sequence")
    return Held(*(attributes[name] for name in names), message)


def without_copies(held: Iterable[Held]) -> list[Held]:
    """Return the first copy of each event, once it is sure that the others say the same."""
    first: dict[str, Held] = {}
    for copy in held:
        assert first.setdefault(copy.uid, copy) == copy
    return list(first.values())


def assert_in_order(events: Iterable[Held]) -> None:
    """Check that each writer's events of each stream came in their order, with none missing before the last."""

    def origin(event: Held) -> tuple[str, str]:
        return event.writer, event.stream

    for _, run in groupby(sorted(events, key=origin), origin):
        sequences = [event.sequence for event in run]
        assert sequences == list(range(len(sequences)))
