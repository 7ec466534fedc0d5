"""Each way in which a backend fails, on real sockets and real files: what it costs, and whom.

The archive is the primary and the mirror a sibling; both are well. A third child meets the fault.
`docs/faults.md` has what is seen here as a table.

Random sequences of faults print their seed; `FAULT_SEED` in the environment plays one again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import random
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.io.local_filesystem import LocalFilesystem
from zenml.models import LogsResponse

from composite_logstore import ChildConfig, CompositeLogStore
from composite_logstore.delivery import writers
from composite_logstore.testing import SimulatedClock
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.deep import mostly_deep
from tests.servers import datadog as datadog_server
from tests.servers.datadog import Datadog
from tests.servers.faulty import FAULTS as SOCKET_FAULTS
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import Answer, OtlpReceiver, Record
from tests.servers.s3 import S3Server, s3_server
from tests.servers.tls_proxy import TlsProxy
from tests.simulation import assert_accounts_add_up, make_logs, make_store
from tests.watching import accounts_watched, fetched, wait_until

pytestmark = pytest.mark.integration

HTTP, GRPC, DATADOG, FILE, S3 = "otlp over HTTP", "otlp over gRPC", "datadog", "artifact in a folder", "artifact on S3"
TOGETHER = (HTTP, GRPC, DATADOG, FILE)
SECRET = "test-collector-key"
SECRETS = (SECRET, datadog_server.API_KEY, datadog_server.APPLICATION_KEY)
NOWHERE = "backend.invalid"
BAD = "poison"
FULL = Path("/dev/full")
FLUSH_SECONDS = 0.3
# What a busy machine may add to a flush.
MARGIN_SECONDS = 2.0

# What the settings are where nobody sets them.
PATIENT: dict[str, Any] = {
    "schedule_delay_millis": 1_000,
    "max_export_batch_size": None,
    "export_timeout_millis": 10_000,
    "retry_initial_interval_millis": 500,
    "retry_max_interval_millis": 30_000,
}

# So that much happens in a short time. The third failure in a row finds the wait at its longest.
HASTY: dict[str, Any] = {
    "schedule_delay_millis": 10,
    "max_export_batch_size": 20,
    "export_timeout_millis": 1_000,
    "retry_initial_interval_millis": 50,
    "retry_max_interval_millis": 200,
}


# What there is


class Names:
    """What resolves names, in place of the system: no query leaves this machine.

    gRPC does not ask Python, but the system: for that there is a file in the place of `/etc/hosts`.

    Attributes:
        hosts: The file, if there is one.
    """

    def __init__(self) -> None:
        self.hosts: Path | None = None
        self._known = True
        self._resolve = socket.getaddrinfo

    @property
    def known(self) -> bool:
        """Whether names that end in `.invalid` have an address."""
        return self._known

    @known.setter
    def known(self, known: bool) -> None:
        self._known = known
        if self.hosts:
            self.hosts.write_text(f"127.0.0.1 localhost {NOWHERE if known else ''}\n")

    def __call__(self, host: Any, *arguments: Any, **named: Any) -> Any:
        if str(host).endswith(".invalid"):
            if not self._known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return self._resolve(host, *arguments, **named)


class Disk:
    """The disk beneath a folder: when it is full, the device that always is takes the place of its files.

    Attributes:
        folder: The folder.
        is_full: Whether the disk is full.
    """

    def __init__(self, folder: Path, open_file: Callable[..., Any]) -> None:
        self.folder = folder
        self.is_full = False

        # ZenML looks at the signature of what opens files.
        @wraps(open_file)
        def open_on_disk(path: str, mode: str = "r") -> Any:
            is_affected = self.is_full and mode != "rb" and path.startswith(str(folder))
            return open_file(str(FULL) if is_affected else path, mode)

        self.open = open_on_disk


@dataclass
class Certificates:
    """An authority that the children trust, and its certificates for this machine and for another one."""

    bundle: str
    right: trustme.LeafCert
    wrong: trustme.LeafCert


@dataclass
class Surroundings:
    """What the tests of this file share: servers that are well, and where nothing goes wrong."""

    archive: str
    folder_store: str
    folder: Path
    mirror: OtlpReceiver
    datadog: Datadog
    certificates: Certificates
    names: Names = field(init=False)
    disk: Disk = field(init=False)


def artifact_store(name: str, flavor: str, **settings: Any) -> str:
    kind = StackComponentType.ARTIFACT_STORE
    return Client().create_stack_component(name, flavor, kind, settings).name


@pytest.fixture(scope="module")
def module_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    authority = trustme.CA()
    bundle = tmp_path_factory.mktemp("certificates") / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    certificates = Certificates(
        str(bundle), authority.issue_cert("127.0.0.1", "localhost"), authority.issue_cert("elsewhere.example")
    )
    folder = tmp_path_factory.mktemp("folder")
    names = ["faults-archive", "faults-folder"]
    paths = [tmp_path_factory.mktemp("archive"), folder]
    for name, path in zip(names, paths, strict=True):
        artifact_store(name, "local", path=str(path))
    with OtlpReceiver() as mirror, Datadog(checked=False) as datadog:
        yield Surroundings(names[0], names[1], folder, mirror, datadog, certificates)
    for name in names:
        Client().delete_stack_component(name, StackComponentType.ARTIFACT_STORE)


@pytest.fixture
def surroundings(module_surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    # No test depends on the proxy of whoever runs it.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.invalid")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", module_surroundings.certificates.bundle)
    module_surroundings.names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", module_surroundings.names)
    module_surroundings.disk = Disk(module_surroundings.folder, LocalFilesystem.open)
    monkeypatch.setattr(LocalFilesystem, "open", staticmethod(module_surroundings.disk.open))
    before = set(writers._writers)
    yield module_surroundings
    module_surroundings.datadog.control(forget=True)
    for key in set(writers._writers) - before:
        del writers._writers[key]


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[S3Server, FaultyProxy, str]]:
    """S3, reached through a proxy, and the name of the artifact store there."""
    with s3_server() as server, FaultyProxy(int(server.endpoint.rpartition(":")[2])) as proxy:
        name = artifact_store(
            "faults-s3",
            "s3",
            path=f"s3://{server.bucket}/store",
            key="test-access-key",
            secret="test-secret-key",
            client_kwargs={"endpoint_url": f"http://127.0.0.1:{proxy.port}", "region_name": "us-east-1"},
            config_kwargs={"retries": {"max_attempts": 0}},
        )
        yield server, proxy, name
        Client().delete_stack_component(name, StackComponentType.ARTIFACT_STORE)


# Whom a fault meets


class Target:
    """The child that a fault meets, with its backend.

    Attributes:
        name: Which backend.
        config: The child's settings.
        faults: What can happen to it at any time.
    """

    name: str
    config: ChildConfig
    faults: Sequence[str] = ()

    def begin(self, fault: str, logs: LogsResponse) -> None:
        """Let something be wrong from now on."""
        raise NotImplementedError

    def heal(self) -> None:
        """Let nothing be wrong any more."""
        raise NotImplementedError

    def taken(self, logs: LogsResponse) -> list[tuple[str, str]]:
        """Return what the backend has of a stream, as it came: the uid and the message of each event."""
        raise NotImplementedError

    def asked(self) -> int:
        """Return how many requests the backend has had."""
        raise NotImplementedError

    @property
    def may_have_copies(self) -> bool:
        """Whether an acknowledgement may have been lost."""
        return False


REFUSALS = ("500", "429", "400 for one bad record", "403")


class OnASocket(Target):
    """A backend behind a proxy."""

    faults = (*SOCKET_FAULTS, *REFUSALS)

    def __init__(self, surroundings: Surroundings, port: int, fault: str, stack: ExitStack) -> None:
        self._surroundings = surroundings
        self._scheme, self._host = "http", "127.0.0.1"
        if fault == "TLS with the wrong name":
            self._scheme = "https"
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.set_alpn_protocols(["h2", "http/1.1"] if self.name == GRPC else ["http/1.1"])
            surroundings.certificates.right.configure_cert(self._context)
            port = stack.enter_context(TlsProxy(self._context, port)).port
        if fault == "DNS failure":
            self._host = NOWHERE
        self.proxy = stack.enter_context(FaultyProxy(port))
        self._url = f"{self._scheme}://{self._host}:{self.proxy.port}"

    def begin(self, fault: str, logs: LogsResponse) -> None:
        if fault in SOCKET_FAULTS:
            self.proxy.fault = fault
        elif fault == "TLS with the wrong name":
            self._surroundings.certificates.wrong.configure_cert(self._context)
            self.proxy.fault = None
        elif fault == "DNS failure":
            self._surroundings.names.known = False
            self.proxy.fault = None
        else:
            self.refuse(fault)

    def heal(self) -> None:
        self._surroundings.names.known = True
        if self._scheme == "https":
            self._surroundings.certificates.right.configure_cert(self._context)
        if self.proxy.fault:
            self.proxy.fault = None
        self.refuse(None)

    def refuse(self, fault: str | None) -> None:
        """Have the server answer with one of `REFUSALS`, or none."""
        raise NotImplementedError

    @property
    def may_have_copies(self) -> bool:
        return self.proxy.lost > 0


def retry_info(seconds: int) -> tuple[tuple[str, bytes], ...]:
    detail = AnyMessage()
    detail.Pack(RetryInfo(retry_delay=Duration(seconds=seconds)))
    status = Status(code=StatusCode.RESOURCE_EXHAUSTED.value[0], details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()),)


# As a collector says it over HTTP.
BAD_RECORD = Answer(
    400, {}, Status(message="a bad record").SerializeToString(), StatusCode.INVALID_ARGUMENT, "a bad record"
)


class Otlp(OnASocket):
    ANSWERS: dict[str | None, Answer] = {  # noqa: RUF012 mutable, but nobody changes it
        "500": Answer(500, code=StatusCode.INTERNAL, details="out of order"),
        "429": Answer(429, code=StatusCode.RESOURCE_EXHAUSTED, details="too many requests"),
        "429 with Retry-After": Answer(
            429, {"Retry-After": "40"}, code=StatusCode.RESOURCE_EXHAUSTED, trailers=retry_info(40)
        ),
        # Some servers repeat the key that they do not know.
        "403": Answer(
            403,
            {"Content-Type": "text/plain"},
            f"no such key: {SECRET}".encode(),
            StatusCode.PERMISSION_DENIED,
            f"no such key: {SECRET}",
        ),
    }

    def __init__(
        self, protocol: str, surroundings: Surroundings, fault: str, stack: ExitStack, **settings: Any
    ) -> None:
        self.name = GRPC if protocol == "grpc" else HTTP
        self._receiver = stack.enter_context(OtlpReceiver())
        port = self._receiver.grpc_port if protocol == "grpc" else self._receiver.http_port
        super().__init__(surroundings, port, fault, stack)
        if self._scheme == "https":
            settings["certificate_file"] = surroundings.certificates.bundle
        self.config = OtlpChildConfig(
            **{
                "name": protocol[:4],
                "type": "otlp",
                "protocol": protocol,
                "endpoint": self._url,
                "headers": {"authorization": f"Bearer {SECRET}"},
                **settings,
            }
        )

    def refuse(self, fault: str | None) -> None:
        def judge(records: list[Record]) -> Answer:
            if fault == "400 for one bad record":
                bad = any(BAD in record.body for record in records)
                return BAD_RECORD if bad else Answer()
            return self.ANSWERS[fault]

        self._receiver.judge = judge if fault else None

    def taken(self, logs: LogsResponse) -> list[tuple[str, str]]:
        return received(self._receiver, logs)

    def asked(self) -> int:
        return len(self._receiver.requests)


def received(receiver: OtlpReceiver, logs: LogsResponse) -> list[tuple[str, str]]:
    return [
        (record.attributes["log.record.uid"], record.body)
        for record in receiver.records()
        if record.attributes["zenml.log.id"] == str(logs.id)
    ]


class ToDatadog(OnASocket):
    name = DATADOG

    def __init__(self, surroundings: Surroundings, fault: str, stack: ExitStack, **settings: Any) -> None:
        self._datadog = surroundings.datadog
        super().__init__(surroundings, self._datadog.port, fault, stack)
        self.config = DatadogChildConfig(
            **{
                "name": "live",
                "type": "datadog",
                **self._datadog.settings,
                "endpoint": f"{self._url}/api/v2/logs",
                "api_endpoint": self._url,
                **settings,
            }
        )

    def refuse(self, fault: str | None) -> None:
        if fault is None:
            self._datadog.control(mend=True)
        elif fault == "400 for one bad record":
            self._datadog.control(refuse=BAD)
        else:
            # Else it says that its limit is reset in 7 seconds.
            headers = {"X-RateLimit-Reset": ""}
            if fault == "429 with Retry-After":
                headers["Retry-After"] = "40"
            self._datadog.fail("intake", int(fault[:3]), 1_000_000, headers)

    def taken(self, logs: LogsResponse) -> list[tuple[str, str]]:
        entries = self._datadog.seen()["entries"]
        return [
            (entry["log.record.uid"], entry["message"]) for entry in entries if entry["zenml.log.id"] == str(logs.id)
        ]

    def asked(self) -> int:
        asked: int = self._datadog.seen()["requests"]["intake"]
        return asked


class InAFolder(Target):
    """An archive in a folder: one file for each stream."""

    name = FILE
    faults = ("permission denied", *(["disk full"] if FULL.exists() else []))

    def __init__(self, surroundings: Surroundings, **settings: Any) -> None:
        store, self._disk = surroundings.folder_store, surroundings.disk
        self.config = ArtifactChildConfig(**{"name": "folder", "type": "artifact", "artifact_store": store, **settings})
        self._logs = self._disk.folder / "logs"

    def begin(self, fault: str, logs: LogsResponse) -> None:
        if fault == "disk full":
            self._disk.is_full = True
        else:
            self._logs.mkdir(exist_ok=True)
            self._logs.chmod(0)

    def heal(self) -> None:
        self._disk.is_full = False
        if self._logs.exists():
            self._logs.chmod(0o700)

    def taken(self, logs: LogsResponse) -> list[tuple[str, str]]:
        return parsed((self._logs / f"{logs.id}.log").read_bytes())


def parsed(content: bytes) -> list[tuple[str, str]]:
    lines = []
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # What was left of a line when the disk was full, or nothing.
        lines.append((entry["id"], entry["message"]))
    return lines


class OnS3(Target):
    """An archive on S3: an object for each export."""

    name = S3
    faults = ("refused", "silent", "late", "reset", "cut")

    def __init__(self, s3: tuple[S3Server, FaultyProxy, str], **settings: Any) -> None:
        self._server, self._proxy, store = s3
        self.config = ArtifactChildConfig(**{"name": "s3", "type": "artifact", "artifact_store": store, **settings})

    def begin(self, fault: str, logs: LogsResponse) -> None:
        self._proxy.fault = fault

    def heal(self) -> None:
        self._proxy.fault = None

    def taken(self, logs: LogsResponse) -> list[tuple[str, str]]:
        store = self._server.artifact_store()
        folder = f"{store.path}/logs/{logs.id}.log"
        content = b""
        for name in sorted(str(name) for name in store.listdir(folder)):
            with store.open(f"{folder}/{name}", "rb") as file:
                content += file.read()
        return parsed(content)


@contextmanager
def target_of(
    backend: str, fault: str, surroundings: Surroundings, request: pytest.FixtureRequest, **settings: Any
) -> Iterator[Target]:
    settings = {**HASTY, **settings}
    with ExitStack() as stack:
        if backend == DATADOG:
            yield ToDatadog(surroundings, fault, stack, **settings)
        elif backend == FILE:
            with as_an_ordinary_user():
                yield InAFolder(surroundings, **settings)
        elif backend == S3:
            yield OnS3(request.getfixturevalue("s3"), **settings)
        else:
            yield Otlp("grpc" if backend == GRPC else "http/protobuf", surroundings, fault, stack, **settings)


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Let permissions hold for this thread, and for those that it starts, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("the tests run as root, to whom this system denies nothing")
    # https://man7.org/linux/man-pages/man2/capset.2.html
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


# What is done


class Step:
    """Says numbered lines, and remembers them."""

    def __init__(self, store: CompositeLogStore) -> None:
        self._store = store
        self._noise = random.Random(0)
        self.logs = make_logs(store)
        self.said: list[str] = []
        self.begin()

    def begin(self) -> None:
        """Register the stream, as ZenML does where a step begins."""
        self._origin = self._store.register_origin(str(self.logs.id), self.logs, {})

    def say(self, count: int, bad: int | None = None) -> None:
        """Say some lines, of which the one with the number `bad` is bad."""
        for number in range(count):
            # Noise, which no compression makes small.
            line = f"{BAD if number == bad else 'line'} {len(self.said)} {self._noise.randbytes(60).hex()}"
            record = logging.LogRecord("train", logging.INFO, "/code/train.py", 1, line, (), None, "fit")
            self._store.emit(self._origin, record)
            self.said.append(line)

    def end(self) -> float:
        """Deregister the stream, as ZenML does where a step ends, and return how many seconds that takes."""
        begin = time.monotonic()
        self._store.deregister_origin(self._origin)
        return time.monotonic() - begin


def store_with(surroundings: Surroundings, *targets: Target) -> CompositeLogStore:
    return make_store(
        ArtifactChildConfig(
            name="archive", type="artifact", artifact_store=surroundings.archive, schedule_delay_millis=10
        ),
        OtlpChildConfig(
            name="mirror",
            type="otlp",
            protocol="http/protobuf",
            endpoint=surroundings.mirror.http_endpoint,
            schedule_delay_millis=10,
        ),
        *(target.config for target in targets),
        flush_timeout_millis=int(FLUSH_SECONDS * 1000),
        flush_limit_millis=2_000,
    )


@contextmanager
def closed_after(store: CompositeLogStore) -> Iterator[None]:
    try:
        yield
    finally:
        store.writer.close(1)


# What must hold


def assert_siblings_have_all(store: CompositeLogStore, surroundings: Surroundings, step: Step) -> None:
    """Check that all is as in a run without a fault, but for the child that the fault meets."""
    assert fetched(store, step.logs) == step.said
    assert [message for _, message in received(surroundings.mirror, step.logs)] == step.said
    for name in ("archive", "mirror"):
        stats = store.stats()[name]
        assert stats == {
            "state": "healthy",
            "accepted": len(step.said),
            "delivered": len(step.said),
            "rejected": 0,
            "rejected_not_kept": 0,
            "dropped": 0,
            "withheld": 0,
            "pending": 0,
            "shortened": 0,
            "rejected_reasons": {},
            "withheld_reasons": {},
            "redacted": {},
            "last_error": None,
        }


def assert_taken(target: Target, step: Step, rejected: int = 0) -> bool:
    """Check that the backend has all but what it rejected, in order, and say whether there are copies.

    What it took without being heard, and rejected when it was sent again, it has all the same.
    """
    taken = target.taken(step.logs)
    # A copy has the uid of its original.
    once = list(dict.fromkeys(taken))
    assert len({uid for uid, _ in once}) == len(once)
    messages = [message for _, message in once]
    missing = set(step.said) - set(messages)
    assert messages == [line for line in step.said if line not in missing]
    assert len(missing) == rejected or (len(missing) < rejected and target.may_have_copies)
    assert all(BAD in line for line in missing)
    return len(taken) > len(once)


def assert_no_secret_in(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text


# Each fault in turn


@dataclass(frozen=True)
class Seen:
    """What was seen of a child while it met a fault.

    Attributes:
        states: Its states, from the fault's beginning until all was delivered; without `healthy` at either end.
        stats: Its account at the end of a step, while the fault lasted.
        copies: Whether its backend had an event twice in the end.
        may_have_copies: Whether an acknowledgement may have been lost, until all was delivered.
    """

    states: list[str]
    stats: dict[str, Any]
    copies: bool
    may_have_copies: bool


def meet(target: Target, fault: str, surroundings: Surroundings, begins_well: bool = True, lines: int = 50) -> Seen:
    """Let a step run into a fault, and out of it; check what holds whatever the fault is."""
    store = store_with(surroundings, target)
    child = target.config.name
    rejected = int(fault == "400 for one bad record")

    def account() -> dict[str, Any]:
        return store.stats()[child]

    step = Step(store)
    with closed_after(store), accounts_watched(store, child) as states:
        if begins_well:
            step.say(30)
            # The first export loads libraries, which may take longer than an export may.
            wait_until(lambda: account()["delivered"] == 30 and account()["state"] == "healthy", "all is well at first")
            states.clear()
        target.begin(fault, step.logs)
        try:
            step.say(lines, bad=lines // 2 if rejected else None)
            if rejected:
                wait_until(lambda: account()["pending"] == 0, "all but the bad record is delivered")
            else:
                wait_until(lambda: account()["state"] == "unavailable", "the fault is known to last")
            # Nobody waits for a child that is known to be unavailable.
            assert step.end() < FLUSH_SECONDS + MARGIN_SECONDS
            stats = account()
            assert_siblings_have_all(store, surroundings, step)
            assert_no_secret_in(repr(store.stats()))
        finally:
            target.heal()
        wait_until(lambda: account()["pending"] == 0, "all that waited is delivered")
        step.begin()
        step.say(10)
        step.end()
        wait_until(lambda: account()["pending"] == 0, "what comes later is delivered")
        # Before the child closes its connections.
        may_have_copies = target.may_have_copies

    assert_siblings_have_all(store, surroundings, step)
    copies = assert_taken(target, step, rejected)
    end = account()
    assert (end["state"], end["dropped"], end["shortened"]) == ("healthy", 0, 0)
    assert (end["delivered"], end["rejected"]) == (len(step.said) - rejected, rejected)
    in_turn = [state for state, _ in groupby(states)]
    met = in_turn[in_turn[0] == "healthy" : len(in_turn) - (in_turn[-1] == "healthy")]
    return Seen(met, stats, copies, may_have_copies)


RETRIED = ("retrying", "unavailable")
"""The states of a child that is tried again and again: in the end the waits are at their longest."""
AT_ONCE = ("unavailable",)
"""The state of a child that somebody must mend, or whose export does not return in time."""
WELL: tuple[str, ...] = ()
EITHER = None
"""s3fs tries again by itself: it depends on the machine's speed whether that takes longer than an export may."""


class Case(NamedTuple):
    """A fault, and what is seen of it.

    Attributes:
        backend: Whom it meets.
        fault: What happens.
        states: The states of the child while it lasts.
        error: What its `last_error` is like.
        copies: Whether the backend gets events twice: it took them, and its answer was lost.
    """

    backend: str
    fault: str
    states: tuple[str, ...] | None
    error: str
    copies: bool = False


LATE = r"no answer within 0\.9 seconds"
OVERDUE = r"an export has not returned within 1 s"
CONNECT = r"gRPC UNAVAILABLE: failed to connect to all addresses; .*"
FOLDER, BUCKET = "artifact store 'faults-folder'", "artifact store 'faults-s3'"
CASES = [
    Case(HTTP, "refused", RETRIED, "cannot reach the collector: Connection refused"),
    Case(HTTP, "silent", RETRIED, LATE),
    Case(HTTP, "late", RETRIED, LATE, copies=True),
    Case(HTTP, "reset", RETRIED, "cannot reach the collector: Connection reset by peer"),
    Case(HTTP, "cut", RETRIED, r"the connection to the collector failed \(ConnectionError\)", copies=True),
    Case(HTTP, "trickle", RETRIED, LATE, copies=True),
    Case(HTTP, "429", RETRIED, "the collector answered 429"),
    Case(HTTP, "400 for one bad record", WELL, "the collector answered 400: a bad record"),
    Case(HTTP, "403", AT_ONCE, r"the collector answered 403: no such key: \*\*\*; check the credentials in .*"),
    Case(HTTP, "TLS with the wrong name", AT_ONCE, r"the collector's certificate cannot be trusted \(.*mismatch.*"),
    Case(HTTP, "DNS failure", RETRIED, "cannot reach the collector: Name or service not known"),
    Case(GRPC, "refused", RETRIED, CONNECT + "Connection refused.*"),
    Case(GRPC, "silent", RETRIED, "gRPC DEADLINE_EXCEEDED.*"),
    Case(GRPC, "late", RETRIED, "gRPC DEADLINE_EXCEEDED.*", copies=True),
    Case(GRPC, "reset", RETRIED, "gRPC UNAVAILABLE: .*Connection reset by peer.*"),
    Case(GRPC, "cut", RETRIED, "gRPC UNAVAILABLE: .*", copies=True),
    Case(GRPC, "trickle", RETRIED, "gRPC DEADLINE_EXCEEDED.*", copies=True),
    Case(GRPC, "429", RETRIED, "gRPC RESOURCE_EXHAUSTED: too many requests"),
    Case(GRPC, "400 for one bad record", WELL, "gRPC INVALID_ARGUMENT: a bad record"),
    Case(GRPC, "403", AT_ONCE, r"gRPC PERMISSION_DENIED: no such key: \*\*\*; check the credentials in .*"),
    Case(GRPC, "TLS with the wrong name", AT_ONCE, CONNECT + "Hostname Verification .* and the certificates"),
    Case(DATADOG, "refused", RETRIED, r"cannot reach 127\.0\.0\.1: Connection refused"),
    Case(DATADOG, "silent", RETRIED, r"127\.0\.0\.1 did not answer in time"),
    Case(DATADOG, "late", RETRIED, r"127\.0\.0\.1 did not answer in time", copies=True),
    Case(DATADOG, "reset", RETRIED, r"cannot reach 127\.0\.0\.1: Connection reset by peer"),
    Case(DATADOG, "cut", RETRIED, r"cannot reach 127\.0\.0\.1: .*BadStatusLine.*", copies=True),
    Case(DATADOG, "trickle", RETRIED, r"127\.0\.0\.1 did not answer in time", copies=True),
    Case(DATADOG, "429", RETRIED, "Datadog answers 429"),
    Case(DATADOG, "400 for one bad record", WELL, r"Datadog refuses it as malformed \(400\)"),
    Case(DATADOG, "403", AT_ONCE, r"Datadog refuses the 'api_key' \(403\); check it, and that 'site' is .*"),
    Case(
        DATADOG, "TLS with the wrong name", AT_ONCE, r"the certificate of 127\.0\.0\.1 cannot be trusted \(.*mismatch.*"
    ),
    Case(DATADOG, "DNS failure", RETRIED, r"cannot reach backend\.invalid: Name or service not known"),
    Case(FILE, "disk full", RETRIED, f"{FOLDER} is full; free some space"),
    Case(FILE, "permission denied", AT_ONCE, f"{FOLDER} refuses access; check its credentials, and that they may .*"),
    Case(S3, "refused", EITHER, f"{BUCKET} did not take it: .*|{OVERDUE}"),
    Case(S3, "silent", AT_ONCE, OVERDUE),
    Case(S3, "late", EITHER, OVERDUE),
    Case(S3, "reset", EITHER, f"{BUCKET} did not take it: .*|{OVERDUE}"),
    Case(S3, "cut", EITHER, f"{BUCKET} did not take it: .*|{OVERDUE}"),
]


def test_without_a_fault_everybody_gets_everything_once(
    surroundings: Surroundings, request: pytest.FixtureRequest
) -> None:
    with ExitStack() as stack:
        targets = [stack.enter_context(target_of(backend, "none", surroundings, request)) for backend in TOGETHER]
        store = store_with(surroundings, *targets)
        step = Step(store)
        with closed_after(store):
            step.say(80)
            wait_until(lambda: not any(child["pending"] for child in store.stats().values()), "all is delivered")
            step.end()
            assert_siblings_have_all(store, surroundings, step)
            for target in targets:
                stats = store.stats()[target.config.name]
                assert (stats["delivered"], stats["rejected"], stats["dropped"]) == (80, 0, 0)
                assert not assert_taken(target, step)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.backend}: {case.fault}")
def test_a_fault_costs_its_own_child_time_and_the_others_nothing(
    case: Case, surroundings: Surroundings, request: pytest.FixtureRequest
) -> None:
    if case.fault == "disk full" and not FULL.exists():
        pytest.skip("this system has no /dev/full, which would be a full disk")
    with target_of(case.backend, case.fault, surroundings, request) as target:
        seen = meet(target, case.fault, surroundings)

    assert re.fullmatch(case.error, seen.stats["last_error"], re.DOTALL)
    assert case.states is EITHER or tuple(seen.states) == case.states
    assert seen.copies or not case.copies
    # A busy machine may answer too late where nothing is wrong.
    assert case.copies or seen.may_have_copies or not seen.copies
    assert (seen.stats["accepted"], seen.stats["dropped"]) == (80, 0)
    if case.fault == "400 for one bad record":
        # The batch was split until the record was alone.
        assert (seen.stats["delivered"], seen.stats["rejected"], seen.stats["pending"]) == (79, 1, 0)
        assert list(seen.stats["rejected_reasons"].values()) == [1]
    elif case.backend != S3:
        assert (seen.stats["delivered"], seen.stats["rejected"], seen.stats["pending"]) == (30, 0, 50)


def test_the_page_on_faults_repeats_what_is_seen() -> None:
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    quoted = re.findall(r"`([^`]+)`", page.replace("```", ""))
    for case in CASES:
        assert any(re.fullmatch(case.error, words) for words in quoted), case


@pytest.mark.parametrize("backend", [HTTP, DATADOG])
def test_an_answer_that_ends_after_its_status_was_an_answer(
    backend: str, surroundings: Surroundings, request: pytest.FixtureRequest
) -> None:
    with target_of(backend, "cut", surroundings, request) as target:
        assert isinstance(target, OnASocket)
        target.proxy.kept_bytes = 60
        store = store_with(surroundings, target)
        step = Step(store)
        with closed_after(store):
            target.begin("cut", step.logs)
            step.say(50)
            wait_until(lambda: store.stats()[target.config.name]["delivered"] == 50, "all is delivered")
            step.end()
            assert_siblings_have_all(store, surroundings, step)
        assert not assert_taken(target, step)


# Hours of them


def account(store: CompositeLogStore, target: Target) -> dict[str, Any]:
    stats = store.stats()
    assert_accounts_add_up(stats)
    return stats[target.config.name]


@pytest.mark.parametrize("backend", [HTTP, GRPC, DATADOG])
def test_ten_minutes_of_500(backend: str, surroundings: Surroundings, request: pytest.FixtureRequest) -> None:
    with (
        SimulatedClock() as clock,
        # With the waits that there are by default.
        target_of(backend, "500", surroundings, request, **PATIENT) as target,
    ):
        store = store_with(surroundings, target)

        step = Step(store)
        step.say(10)
        clock.advance(2)
        assert account(store, target)["delivered"] == 10

        target.begin("500", step.logs)
        asked = target.asked()
        for _ in range(60):
            step.say(5)
            clock.advance(10)
            assert account(store, target)["delivered"] == 10
        stats = account(store, target)
        assert stats["state"] == "unavailable"
        assert stats["pending"] == 300
        assert re.search("500|INTERNAL", stats["last_error"])
        # Waits of 15 to 30 seconds, after a few shorter ones.
        assert 20 <= target.asked() - asked <= 50
        before = clock.now()
        step.end()
        assert clock.now() - before < FLUSH_SECONDS
        assert_siblings_have_all(store, surroundings, step)
        assert_no_secret_in(repr(store.stats()))

        target.heal()
        clock.advance(31)
        stats = account(store, target)
        assert (stats["state"], stats["delivered"], stats["pending"]) == ("healthy", 310, 0)
        assert not assert_taken(target, step)


@pytest.mark.parametrize("backend", [HTTP, GRPC, DATADOG])
def test_429_with_retry_after_is_obeyed(
    backend: str, surroundings: Surroundings, request: pytest.FixtureRequest
) -> None:
    with SimulatedClock() as clock, target_of(backend, "429", surroundings, request, **PATIENT) as target:
        store = store_with(surroundings, target)

        step = Step(store)
        asked = target.asked()
        target.begin("429 with Retry-After", step.logs)
        step.say(50)
        clock.advance(2)
        assert account(store, target)["state"] == "retrying"
        assert re.search("429|RESOURCE_EXHAUSTED", account(store, target)["last_error"])
        assert target.asked() - asked == 1

        # It says 40 seconds, and is better before that: nobody asks.
        target.heal()
        clock.advance(36)
        assert target.asked() - asked == 1
        # Even a flush only asks for as long as it takes to see that there is no progress.
        step.end()
        assert target.asked() - asked == 1
        assert_siblings_have_all(store, surroundings, step)

        clock.advance(5)
        assert target.asked() - asked == 2
        stats = account(store, target)
        assert (stats["state"], stats["delivered"], stats["pending"]) == ("healthy", 50, 0)
        assert not assert_taken(target, step)


# What needs a namespace of its own

OUTSIDE = "FAULTS_OUTSIDE_NAMESPACE"
"""In the environment of a process that has a namespace: the one that it comes from."""


def namespaces() -> str:
    return f"{os.readlink('/proc/self/ns/mnt')} {os.readlink('/proc/self/ns/net')}"


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """None in a process that has mounts and a network of its own; else what the tests that need them say there."""
    if sys.platform != "linux":
        pytest.skip("only Linux has namespaces: no small disk can be filled, no DNS can fail")
    if outside := os.environ.get(OUTSIDE):
        # Nothing may be mounted where others would see it.
        assert not set(namespaces().split()) & set(outside.split())
        # Its loopback interface is down yet: https://man7.org/linux/man-pages/man7/netdevice.7.html
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
        return None
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this machine gives nobody a namespace (unshare): no small disk can be filled, no DNS can fail")
    tests = [test_dns_fails_for_grpc, test_a_disk_is_full_in_the_middle_of_a_line]
    # There, the folder of all test runs seems to be somebody else's.
    folder = tmp_path_factory.mktemp("namespace")
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"--basetemp={folder}"]
        + [f"{Path(__file__).relative_to(request.config.rootpath)}::{test.__name__}" for test in tests],
        cwd=request.config.rootpath,
        env={**os.environ, OUTSIDE: namespaces()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return done.stdout


def is_inside(outcome: str | None, request: pytest.FixtureRequest) -> bool:
    """Say whether this process is the one in which to run the test; check that it passed there, otherwise."""
    assert outcome is None or re.search(rf"^PASSED .*::{request.node.name}$", outcome, re.MULTILINE), outcome
    return outcome is None


@pytest.mark.deep
def test_dns_fails_for_grpc(outcome: str | None, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not is_inside(outcome, request):
        return
    surroundings: Surroundings = request.getfixturevalue("surroundings")
    surroundings.names.hosts = tmp_path / "hosts"
    surroundings.names.known = False
    subprocess.run(["mount", "--bind", surroundings.names.hosts, "/etc/hosts"], check=True)
    with target_of(GRPC, "DNS failure", surroundings, request) as target:
        # Once there is a connection, gRPC knows the address and asks no more.
        seen = meet(target, "DNS failure", surroundings, begins_well=False)
    assert re.fullmatch(r"gRPC UNAVAILABLE: errors resolving backend\.invalid:.*", seen.stats["last_error"])
    assert tuple(seen.states) == RETRIED
    assert not seen.copies


def test_a_disk_is_full_in_the_middle_of_a_line(outcome: str | None, request: pytest.FixtureRequest) -> None:
    if not is_inside(outcome, request):
        return
    surroundings: Surroundings = request.getfixturevalue("surroundings")
    folder = surroundings.folder
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)

    class OnASmallDisk(InAFolder):
        def begin(self, fault: str, logs: LogsResponse) -> None:
            room = os.statvfs(folder)
            (folder / "ballast").write_bytes(b"x" * (room.f_bavail * room.f_bsize - 12_000))

        def heal(self) -> None:
            (folder / "ballast").unlink(missing_ok=True)

    target = OnASmallDisk(surroundings, **HASTY)
    seen = meet(target, "disk full", surroundings, lines=100)
    assert seen.stats["last_error"] == f"{FOLDER} is full; free some space"
    assert 30 < seen.stats["delivered"] + seen.stats["pending"] == 130
    assert not seen.copies
    (file,) = (folder / "logs").glob("*.log")
    # What there was room for is left of a line; the line itself comes after it.
    assert len(file.read_bytes().splitlines()) > len(parsed(file.read_bytes())) == 140


# Any of them, in any order


def seeds(first: int, count: int) -> list[int]:
    return [int(os.environ["FAULT_SEED"])] if "FAULT_SEED" in os.environ else list(range(first, first + count))


@pytest.mark.parametrize("seed", mostly_deep(seeds(0, 10), kept=3))
def test_random_faults(seed: int, surroundings: Surroundings, request: pytest.FixtureRequest) -> None:
    meet_random_faults(seed, 6, surroundings, request)


@pytest.mark.deep
@pytest.mark.parametrize("seed", seeds(1_000, 100))
def test_many_random_faults(seed: int, surroundings: Surroundings, request: pytest.FixtureRequest) -> None:
    meet_random_faults(seed, 20, surroundings, request)


def meet_random_faults(seed: int, count: int, surroundings: Surroundings, request: pytest.FixtureRequest) -> None:
    """Let a step run into faults of four children, one after the other or several at once."""
    print(f"FAULT_SEED={seed}")
    rng = random.Random(seed)
    with ExitStack() as stack:
        targets = [stack.enter_context(target_of(backend, "any", surroundings, request)) for backend in TOGETHER]
        store = store_with(surroundings, *targets)
        stack.enter_context(closed_after(store))
        step = Step(store)

        def rejected(target: Target) -> int:
            number: int = store.stats()[target.config.name]["rejected"]
            return number

        with accounts_watched(store, "mirror"):
            try:
                for _ in range(count):
                    target = rng.choice(targets)
                    fault = rng.choice(target.faults)
                    print(f"{target.name}: {fault}")
                    target.begin(fault, step.logs)
                    lines = rng.randrange(1, 60)
                    step.say(lines, bad=rng.choice([None, lines // 2]))
                    # Random, too, is how long it lasts.
                    threading.Event().wait(rng.uniform(0, 0.4))
                    if rng.random() < 0.6:
                        rng.choice(targets).heal()
                    if rng.random() < 0.4:
                        assert step.end() < store.config.flush_limit_millis / 1000 + MARGIN_SECONDS
                        step.begin()
            finally:
                for target in targets:
                    target.heal()
            wait_until(lambda: not any(child["pending"] for child in store.stats().values()), "all is delivered")
            step.end()
        assert_siblings_have_all(store, surroundings, step)
        assert_no_secret_in(repr(store.stats()))
        for target in targets:
            stats = store.stats()[target.config.name]
            assert (stats["state"], stats["dropped"]) == ("healthy", 0)
            if assert_taken(target, step, rejected(target)):
                assert target.may_have_copies, "there are copies, though no acknowledgement was lost"
