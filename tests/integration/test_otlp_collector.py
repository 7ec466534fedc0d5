"""The OTLP backend against a real collector, over HTTP and gRPC, with and without TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from composite_logstore import Exporter, LogEvent, RetryableError, TooLargeError, UnavailableError
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.connection import Connection
from composite_logstore_otlp.over_grpc import GrpcTransport
from composite_logstore_otlp.over_http import HttpTransport
from tests.deep import mostly_deep
from tests.events import make_events, make_stream
from tests.servers.collector import Collector, Rotel, find_rotel, start_collector
from tests.servers.otlp_receiver import Record
from tests.servers.tls_proxy import TlsProxy

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
PROTOCOLS = ["http/protobuf", "grpc"]
AWKWARD = [
    "",
    "one\ntwo\r\nthree",
    "\x00 and \x1b[31mred\x1b[0m",
    "ünï 😀",
    "Attributes:\n     -> a: Str(b)",
    "x" * MIB,
]


@dataclass
class Tls:
    """TLS in front of a collector: its ports by protocol, and the files of who connects."""

    ports: dict[str, int]
    strict_ports: dict[str, int]
    authority: str
    other_authority: str
    client_key: str
    client_certificate: str


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with start_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def tls(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    directory = tmp_path_factory.mktemp("certificates")
    authority, other = trustme.CA(), trustme.CA()
    client = authority.issue_cert("client@example.com")
    server = authority.issue_cert("localhost", "127.0.0.1")
    files = {
        "ca.pem": authority.cert_pem,
        "other.pem": other.cert_pem,
        "key.pem": client.private_key_pem,
        "cert.pem": client.cert_chain_pems[0],
    }
    for name, blob in files.items():
        blob.write_to_path(directory / name)
    with ExitStack() as stack:
        ports: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for strict in (False, True):
            for protocol, port, name in (
                ("http/protobuf", collector.http_port, "http/1.1"),
                ("grpc", collector.grpc_port, "h2"),
            ):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.set_alpn_protocols([name])
                server.configure_cert(context)
                if strict:
                    context.verify_mode = ssl.CERT_REQUIRED
                    authority.configure_trust(context)
                ports[strict][protocol] = stack.enter_context(TlsProxy(context, port)).port
        yield Tls(ports[False], ports[True], *(str(directory / name) for name in files))


def make_exporter(protocol: str, endpoint: str, **settings: Any) -> Exporter:
    config = OtlpChildConfig(name="collector", type="otlp", **{"protocol": protocol, "endpoint": endpoint, **settings})
    return config.create_exporter()


def endpoint_of(collector: Collector, protocol: str) -> str:
    return collector.http_endpoint if protocol == "http/protobuf" else f"http://{collector.grpc_endpoint}"


def various_events(marker: str) -> list[LogEvent]:
    """Events that differ in all that an event can have, of two streams, with loggers that alternate."""
    streams = [make_stream(**{"zenml.run": marker}), make_stream(**{"zenml.run": marker, "zenml.step": "fit"})]
    events = []
    for number, message in enumerate([*AWKWARD, *(f"step {number}" for number in range(1_000))]):
        changes: dict[str, Any] = {
            "logger_name": ("train", "stdout", "zenml")[number // 2 % 3],
            "level": (10, 20, 25, 30, 40, 50)[number % 6],
            "level_name": ("DEBUG", "INFO", "NOTICE", "WARNING", "ERROR", "CRITICAL")[number % 6],
            "attributes": {"text": "a\nb", "yes": True, "no": None, "whole": -number, "part": number / 7, "empty": ""},
            "metadata": {"zenml.run": "from emit"} if number % 5 == 0 else {},
        }
        if number % 2:
            changes["trace"] = TraceContext((1 << 100) + number, (1 << 60) + number, 1)
        if number % 7 == 0:
            changes["exception"] = ExceptionInfo("ValueError", "bad", "Traceback\n  File\nValueError: bad\n")
        events += make_events([message], streams[number % 2], first=number, **changes)
    return events


def expected(event: LogEvent) -> Record:
    trace = event.trace
    return Record(
        body=event.message,
        severity_number=event.severity_number,
        severity_text=event.severity_text,
        attributes={**event.details, **event.stream.attributes, **event.metadata, **event.identity},
        trace_id=f"{trace.trace_id:032x}" if trace else "",
        span_id=f"{trace.span_id:016x}" if trace else "",
        flags=trace.flags if trace else 0,
        time_unix_nano=event.time_unix_nano,
        observed_time_unix_nano=event.time_unix_nano,
        scope=event.logger_name,
        resource={},
    )


def received_of(collector: Collector, events: list[LogEvent]) -> list[Record]:
    """What the collector got of these events, as soon as that is all of them."""
    ids = {event.stream.attributes["zenml.log.id"] for event in events}
    total = len(collector.records())
    records = [record for record in collector.records() if record.attributes["zenml.log.id"] in ids]
    if len(records) < len(events):
        collector.wait_for_records(total + len(events) - len(records))
        records = [record for record in collector.records() if record.attributes["zenml.log.id"] in ids]
    return records


@pytest.mark.parametrize("compression", mostly_deep(["gzip", "none"]))
@pytest.mark.parametrize("secure", mostly_deep([True, False]), ids=["tls", "plain"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_record_arrives_as_it_is_and_in_order(
    collector: Collector, tls: Tls, protocol: str, secure: bool, compression: str
) -> None:
    settings: dict[str, Any] = {"compression": compression, "resource_attributes": {"team": "a", "size": 7}}
    endpoint = endpoint_of(collector, protocol)
    if secure:
        endpoint = f"https://localhost:{tls.ports[protocol]}"
        settings["certificate_file"] = tls.authority
    exporter = make_exporter(protocol, endpoint, **settings)
    events = various_events(f"{protocol} {secure} {compression}")
    assert exporter.export(events[:500]) == 0
    assert exporter.export(events[500:]) == 0
    exporter.close()
    records = received_of(collector, events)
    assert [record._replace(resource={}) for record in records] == [expected(event) for event in events]
    assert records[0].resource["service.name"] == "zenml"
    assert (records[0].resource["team"], records[0].resource["size"]) == ("a", 7)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_certificate(collector: Collector, tls: Tls, protocol: str) -> None:
    endpoint = f"https://localhost:{tls.strict_ports[protocol]}"
    files = {"client_key_file": tls.client_key, "client_certificate_file": tls.client_certificate}
    exporter = make_exporter(protocol, endpoint, certificate_file=tls.authority, **files)
    assert exporter.export(make_events(["one"])) == 0
    exporter.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_the_client_certificate_that_is_wanted(tls: Tls, protocol: str) -> None:
    endpoint = f"https://localhost:{tls.strict_ports[protocol]}"
    exporter = make_exporter(protocol, endpoint, certificate_file=tls.authority)
    # Over HTTP the server may have closed the connection before its complaint is read.
    with pytest.raises(UnavailableError if protocol == "grpc" else (UnavailableError, RetryableError)):
        exporter.export(make_events(["one"]))
    exporter.close()


def test_a_client_certificate_and_key_in_one_file(collector: Collector, tls: Tls, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(Path(tls.client_key).read_bytes() + Path(tls.client_certificate).read_bytes())
    for protocol in PROTOCOLS:
        endpoint = f"https://localhost:{tls.strict_ports[protocol]}"
        exporter = make_exporter(protocol, endpoint, certificate_file=tls.authority, client_certificate_file=str(both))
        assert exporter.export(make_events(["one"])) == 0
        exporter.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_of_another_authority_is_not_trusted(tls: Tls, protocol: str) -> None:
    endpoint = f"https://localhost:{tls.ports[protocol]}"
    for settings in ({"certificate_file": tls.other_authority}, {}):
        exporter = make_exporter(protocol, endpoint, **settings)
        with pytest.raises(UnavailableError, match="certificate"):
            exporter.export(make_events(["one"]))
        exporter.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_tls_where_there_is_tls(tls: Tls, protocol: str) -> None:
    exporter = make_exporter(protocol, f"http://localhost:{tls.ports[protocol]}")
    with pytest.raises(RetryableError):
        exporter.export(make_events(["one"]))
    exporter.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_collector_that_is_killed_and_comes_back(protocol: str) -> None:
    with start_collector() as collector:
        exporter = make_exporter(protocol, endpoint_of(collector, protocol))
        stream = make_stream()
        exporter.export(make_events(["before"], stream))
        collector.wait_for_records(1)
        collector.kill()
        for _ in range(3):
            with pytest.raises(RetryableError):
                exporter.export(make_events(["after"], stream, first=1))
        collector.start()
        for _ in range(20):
            try:
                exporter.export(make_events(["after"], stream, first=1))
                break
            except RetryableError:
                # The delivery waits longer than this before it tries again.
                collector.wait_for_records(2, timeout_seconds=0.1)
        assert [record.body for record in collector.wait_for_records(2)] == ["before", "after"]
        exporter.close()


def test_a_request_beyond_the_collector_s_limit(collector: Collector) -> None:
    config = OtlpChildConfig(name="c", type="otlp", endpoint=f"http://{collector.grpc_endpoint}", protocol="grpc")
    over_grpc = GrpcTransport(Connection.of(config))
    with pytest.raises(TooLargeError):
        over_grpc.send(b"\0" * (4 * MIB + 1), 5)
    over_grpc.close()
    if not isinstance(collector, Rotel):
        return
    over_http = HttpTransport(Connection.of(OtlpChildConfig(name="c", type="otlp", endpoint=collector.http_endpoint)))
    with pytest.raises(TooLargeError):
        over_http.send(b"\0" * (20 * MIB + 1), 5)
    over_http.close()


@pytest.mark.parametrize("kind", [Rotel, Collector])
def test_either_collector_gives_the_same_records(kind: type[Collector]) -> None:
    if kind is Rotel and find_rotel() is None:
        pytest.skip("rotel has no wheel for this machine")
    events = various_events("same")
    with kind() as collector:
        for protocol in PROTOCOLS:
            exporter = make_exporter(protocol, endpoint_of(collector, protocol))
            exporter.export(events)
            exporter.close()
        records = [record._replace(resource={}) for record in collector.wait_for_records(2 * len(events))]
    assert records == 2 * [expected(event) for event in events]
