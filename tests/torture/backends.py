"""The backends of the torture, each of which can fail by itself: what they have taken is theirs, whoever dies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from composite_logstore import ChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.crashing import name_of
from tests.servers.datadog import Datadog
from tests.servers.faulty import FAULTS, FaultyProxy
from tests.servers.otlp_receiver import Answer, OtlpReceiver, Request, decode_request
from tests.servers.three_backends import Held
from tests.torture.oracle import NOT_WHOLE
from tests.torture.programs import FULL, Archive
from tests.watching import LAST_WORDS

NONSENSE = {
    "500": Answer(status=500),
    "503": Answer(status=503, headers={"Retry-After": "1"}),
    "429": Answer(status=429, body=b"\xff" * 1000),
    "403": Answer(status=403),
    "success in words of its own": Answer(body=b"<html>welcome</html>" * 50),
    "no answer": Answer(hang_up=True),
}
"""What a collector may answer, besides what `FAULTS` do to its connections."""

REFUSALS = ("500", "403", "429")
"""What Datadog may answer."""


class Collector(OtlpReceiver):
    """Keeps of what it gets no more than has to be known, and answers nonsense if it is told to.

    Attributes:
        held: What it has taken, in the order of arrival, copies and all.
        nonsense: What it answers, None if all is well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Held] = []
        self.nonsense: Answer | None = None

    def receive(self, request: Request) -> Answer:
        records = decode_request(request.payload)
        answer = self.nonsense or Answer()
        if answer.status == 200 and not answer.hang_up:
            with self._lock:
                self.held += [_held(record.attributes, record.body) for record in records]
        return answer


def _held(attributes: Mapping[str, Any], text: str) -> Held:
    names = ("zenml.log.id", "log.record.uid", "zenml.log.writer", "zenml.log.sequence")
    return Held(*(attributes.get(name) for name in names), name_in(text))  # type: ignore[arg-type]


def name_in(text: str) -> str:
    """Return the name of a message; of one that is not whole, what there is of it. `LAST_WORDS` for last words."""
    if LAST_WORDS in text:
        return LAST_WORDS
    try:
        return name_of(text)
    except (AssertionError, ValueError):
        return f"{NOT_WHOLE} {text[:60]}"


class Backends:
    """An archive in files, one in objects, a collector, and Datadog.

    Attributes:
        NAMES: Their names.
        READABLE: The names of those that can be read.
    """

    NAMES = ("archive", "objects", "collector", "live")
    READABLE = ("archive", "objects", "live")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._collector = Collector()
        self._datadog = Datadog(checked=False)
        self._proxies: dict[str, FaultyProxy] = {}
        for name in ("archive", "objects"):
            (folder / name / "healthy").mkdir(parents=True)
            # Where a folder should be there is a file.
            (folder / name / "obstructed").touch()
            self._point(name, "healthy")

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Backends]:
        """Start those that are servers.

        Args:
            folder: Where the archives are to be.
        """
        backends = cls(folder)
        with ExitStack() as stack:
            collector, datadog = stack.enter_context(backends._collector), stack.enter_context(backends._datadog)
            for name, port in (("collector", collector.http_port), ("live", datadog.port)):
                backends._proxies[name] = stack.enter_context(FaultyProxy(port))
            yield backends

    def child(self, backend: str, name: str, **settings: Any) -> ChildConfig:
        """Return a child of that name that delivers to the backend."""
        if backend not in self._proxies:
            root, is_file = str(self._folder / backend), backend == "archive"
            return Archive(name=name, type="artifact", root=root, is_file=is_file, **settings)
        endpoint = f"http://127.0.0.1:{self._proxies[backend].port}"
        if backend == "collector":
            return OtlpChildConfig(name=name, type="otlp", endpoint=endpoint, **settings)
        datadog = {**self._datadog.settings, "endpoint": f"{endpoint}/api/v2/logs", "api_endpoint": endpoint}
        return DatadogChildConfig(**{"name": name, "type": "datadog", **datadog, **settings})

    def faults(self, backend: str) -> Sequence[str]:
        """Return what can be wrong with a backend."""
        own = {"archive": ("obstructed", FULL), "objects": ("obstructed",), "collector": NONSENSE, "live": REFUSALS}
        return (*own[backend], *(FAULTS if backend in self._proxies else ()))

    def fail(self, backend: str, fault: str) -> None:
        """Let something be wrong with a backend of which all is well."""
        if fault == FULL:
            (self._folder / backend / FULL).touch()
        elif backend not in self._proxies:
            self._point(backend, fault)
        elif fault in FAULTS:
            self._proxies[backend].fault = fault
        elif backend == "collector":
            self._collector.nonsense = NONSENSE[fault]
        else:
            self._datadog.fail("intake", int(fault), times=1_000_000)

    def mend(self, backend: str) -> None:
        """Let all be well with a backend."""
        if backend not in self._proxies:
            self._point(backend, "healthy")
            (self._folder / backend / FULL).unlink(missing_ok=True)
            return
        if self._proxies[backend].fault is not None:
            self._proxies[backend].fault = None
        if backend == "collector":
            self._collector.nonsense = None
        else:
            self._datadog.control(mend=True)

    def _point(self, name: str, where: str) -> None:
        # In one step, for all who are writing there.
        link = self._folder / name / "new"
        link.symlink_to(where)
        link.rename(self._folder / name / "logs")

    def held(self) -> dict[str, list[Held]]:
        """Return what they hold, in the order of arrival, copies and all, without the entries of killed processes."""
        entries = self._datadog.seen()["entries"]
        held = {
            "archive": list(self._lines("archive")),
            "objects": list(self._lines("objects")),
            "collector": list(self._collector.held),
            "live": [_held(entry, entry["message"]) for entry in entries],
        }
        return {name: [one for one in copies if one.message != LAST_WORDS] for name, copies in held.items()}

    def _lines(self, name: str) -> Iterator[Held]:
        folder = self._folder / name / "healthy"
        # Of a stream's objects, sorted names are the order of arrival.
        for file in sorted(file for file in folder.rglob("*.log") if file.is_file()):
            stream = file.relative_to(folder).parts[0].removesuffix(".log")
            for line in file.read_bytes().split(b"\n"):
                # A full disk cuts lines.
                with suppress(ValueError, LookupError, TypeError):
                    entry = orjson.loads(line)
                    said = (entry["id"], entry["writer"], entry["sequence"])
                    yield Held(stream, *said, name_in(entry["message"]))
