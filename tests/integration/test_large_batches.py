"""What cannot take a batch as large as it is, on real sockets: a proxy, a link, a backend that is slow.

Whatever it is, and whatever is said of it, every event arrives, in order, after a bounded number of tries.
"""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from grpc import StatusCode

from composite_logstore import ChildConfig, CompositeLogStore
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.deep import mostly_deep
from tests.servers.datadog import Datadog
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import Answer, OtlpReceiver
from tests.servers.reverse_proxy import CUTS, ReverseProxy
from tests.simulation import make_child, make_logs, make_store
from tests.watching import wait_until

pytestmark = pytest.mark.integration

HTTP, GRPC, DATADOG = "http", "grpc", "datadog"
EVENTS = 80
HASTY: dict[str, Any] = {
    "schedule_delay_millis": 10,
    "export_timeout_millis": 300,
    "retry_initial_interval_millis": 10,
    "retry_max_interval_millis": 40,
}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    with Datadog(checked=False) as datadog:
        yield datadog


class Backend:
    """A backend, and the child that sends to it."""

    def __init__(self, kind: str, request: pytest.FixtureRequest) -> None:
        self.kind = kind
        self.server: Any = request.getfixturevalue("datadog" if kind == DATADOG else "receiver")
        self.port: int = getattr(self.server, {HTTP: "http_port", GRPC: "grpc_port", DATADOG: "port"}[kind])

    def child(self, port: int, bundle: str | None = None, **settings: Any) -> ChildConfig:
        """Return a child that sends to a port, with TLS if there is a bundle of authorities."""
        url = f"{'https' if bundle else 'http'}://127.0.0.1:{port}"
        settings = {**HASTY, **settings}
        if self.kind == DATADOG:
            settings = {**self.server.settings, "endpoint": f"{url}/api/v2/logs", **settings}
            return DatadogChildConfig(name="child", type="datadog", **settings)
        settings |= {"protocol": "grpc" if self.kind == GRPC else "http/protobuf", "certificate_file": bundle}
        return OtlpChildConfig(name="child", type="otlp", endpoint=url, **settings)

    def taken(self, logs_id: str) -> list[str]:
        """Return the messages that it has of a stream, as they came."""
        if self.kind == DATADOG:
            entries = self.server.seen()["entries"]
            return [entry["message"] for entry in entries if entry["zenml.log.id"] == logs_id]
        return [record.body for record in self.server.records() if record.attributes["zenml.log.id"] == logs_id]


@contextmanager
def logging_to(child: ChildConfig) -> Iterator[Any]:
    """Give what logs messages to a store with this child, and the store."""
    store = make_store(make_child("primary"), child)
    logs = make_logs(store)
    origin = store.register_origin("step", logs, {})

    def say(messages: list[str]) -> None:
        for message in messages:
            store.emit(origin, logging.LogRecord("train", logging.INFO, "/t.py", 1, message, (), None, "fit"))

    try:
        yield say, store, str(logs.id)
    finally:
        store.writer.close(1)


def stats_of(store: CompositeLogStore) -> dict[str, Any]:
    return store.stats()["child"]


def noise(count: int, size: int) -> list[str]:
    """Return messages that no compression makes much smaller."""
    source = random.Random(0)
    return [f"{number} {source.randbytes(size // 2).hex()}" for number in range(count)]


def server_context(leaf: trustme.LeafCert, kind: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"] if kind == GRPC else ["http/1.1"])
    leaf.configure_cert(context)
    return context


@pytest.mark.parametrize("is_secure", mostly_deep([False, True]), ids=["plain", "TLS"])
@pytest.mark.parametrize("kind", [HTTP, GRPC, DATADOG])
@pytest.mark.parametrize("cut", CUTS)
def test_a_proxy_that_takes_no_large_bodies(
    kind: str,
    cut: str,
    is_secure: bool,
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    backend = Backend(kind, request)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    context = server_context(authority.issue_cert("127.0.0.1"), kind) if is_secure else None
    # Where the proxy says or does something, nobody has to wait for a timeout, which a busy machine might bring about.
    patience = {} if cut == "stalls" else {"export_timeout_millis": 20_000}
    with (
        ReverseProxy(backend.port, context) as proxy,
        logging_to(backend.child(proxy.port, str(bundle) if is_secure else None, **patience)) as (say, store, logs_id),
    ):
        # The first export loads libraries, which may take longer than an export may.
        say(["first"])
        wait_until(lambda: stats_of(store)["delivered"] == 1, "all is well at first")

        proxy.most_bytes, proxy.cut = 100_000, cut
        messages = noise(EVENTS, size=8_000)
        say(messages)
        wait_until(lambda: stats_of(store)["pending"] == 0, "all is delivered")

        stats = stats_of(store)
        assert (stats["state"], stats["delivered"], stats["rejected"]) == ("healthy", EVENTS + 1, 0)
        # 640 kB: three or four halvings, and here and there one that batches have grown to.
        assert 0 < proxy.cuts <= 12
        taken = backend.taken(logs_id)
        assert list(dict.fromkeys(taken)) == ["first", *messages]
        if cut != "stalls":
            # What is cut never arrives.
            assert len(taken) == EVENTS + 1


@pytest.mark.parametrize("kind", [HTTP, GRPC, DATADOG])
def test_a_link_that_carries_less_than_a_batch_in_the_time_of_an_export(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backend = Backend(kind, request)
    with FaultyProxy(backend.port) as proxy, logging_to(backend.child(proxy.port)) as (say, store, logs_id):
        say(["first"])
        wait_until(lambda: stats_of(store)["delivered"] == 1, "all is well at first")
        proxy.bytes_per_second = 500_000
        proxy.fault = "narrow"
        messages = noise(EVENTS, size=8_000)
        say(messages)
        wait_until(lambda: stats_of(store)["pending"] == 0, "all is delivered")
        assert (stats_of(store)["state"], stats_of(store)["rejected"]) == ("healthy", 0)
        taken = backend.taken(logs_id)
        assert list(dict.fromkeys(taken)) == ["first", *messages]
        # What the system has of a body is still sent when nobody waits for the answer, so each try may arrive.
        assert len(taken) <= 6 * EVENTS


@pytest.mark.parametrize("kind", [HTTP, GRPC])
def test_a_backend_that_needs_too_long_for_a_batch_gets_no_more_than_a_few_copies(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backend = Backend(kind, request)
    receiver: OtlpReceiver = backend.server
    receiver.judge = lambda records: Answer(delay_seconds=0.002 * len(records))
    try:
        with logging_to(backend.child(backend.port)) as (say, store, logs_id):
            say([str(number) for number in range(1_000)])
            wait_until(lambda: stats_of(store)["pending"] == 0, "all is delivered")
            assert stats_of(store)["state"] == "healthy"
            copies = Counter(backend.taken(logs_id))
            assert set(copies) == {str(number) for number in range(1_000)}
            assert max(copies.values()) <= 8
            assert sum(copies.values()) <= 5_000
    finally:
        receiver.judge = None


@pytest.mark.parametrize("kind", [HTTP, GRPC])
def test_a_backend_that_rejects_everything(kind: str, request: pytest.FixtureRequest) -> None:
    backend = Backend(kind, request)
    receiver: OtlpReceiver = backend.server
    requests = len(receiver.requests)
    receiver.judge = lambda records: Answer(
        400, {"Content-Type": "text/plain"}, b"no tenant", StatusCode.INVALID_ARGUMENT, "no tenant"
    )
    patient: dict[str, Any] = {"export_timeout_millis": 10_000, "retry_initial_interval_millis": 200}
    try:
        with logging_to(backend.child(backend.port, **patient, retry_max_interval_millis=60_000)) as (
            say,
            store,
            logs_id,
        ):
            say([str(number) for number in range(2_000)])
            wait_until(lambda: stats_of(store)["rejected"] >= 10, "it is known that it rejects everything")
            assert stats_of(store)["state"] == "unavailable"
            time.sleep(1)
            stats = stats_of(store)
            assert len(receiver.requests) - requests <= 60
            assert 10 <= stats["rejected"] <= 20
            assert stats["pending"] == 2_000 - stats["rejected"]
            assert "no tenant" in stats["last_error"]
            receiver.judge = None
            wait_until(lambda: stats_of(store)["pending"] == 0, "all else is delivered")
            stats = stats_of(store)
            assert (stats["state"], stats["dropped"]) == ("healthy", 0)
            assert backend.taken(logs_id) == [str(number) for number in range(stats["rejected"], 2_000)]
    finally:
        receiver.judge = None
