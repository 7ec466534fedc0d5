"""gRPC among what is not ours: middle boxes, forks of the user's, certificates that are renewed."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from composite_logstore import RetryableError
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.exporter import OtlpExporter
from tests.events import make_events
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import OtlpReceiver
from tests.servers.tls_proxy import TlsProxy

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def make_exporter(port: int, **settings: Any) -> OtlpExporter:
    settings = {"endpoint": f"127.0.0.1:{port}", "insecure": True, "export_timeout_millis": 1_000, **settings}
    exporter = OtlpChildConfig(name="collector", type="otlp", protocol="grpc", **settings).create_exporter()
    assert isinstance(exporter, OtlpExporter)
    return exporter


def test_a_connection_that_is_open_and_dead_costs_one_export(receiver: OtlpReceiver) -> None:
    with FaultyProxy(receiver.grpc_port) as proxy:
        exporter = make_exporter(proxy.port)
        exporter.export(make_events(["before"]))
        proxy.fault = "dead"
        with pytest.raises(RetryableError):
            exporter.export(make_events(["lost"]))
        exporter.export(make_events(["after"]))
        assert proxy.connections == 2
        exporter.close()


def test_two_children_do_not_share_a_connection(receiver: OtlpReceiver) -> None:
    with FaultyProxy(receiver.grpc_port) as proxy:
        exporters = [make_exporter(proxy.port) for _ in range(2)]
        for exporter in exporters:
            exporter.export(make_events(["one"]))
        assert proxy.connections == 2
        for exporter in exporters:
            exporter.close()


def test_an_outage_is_dialled_once_for_each_export() -> None:
    dialled = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal dialled
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    dialled += 1
                    client.close()

        threading.Thread(target=hang_up, daemon=True).start()
        exporter = make_exporter(listener.getsockname()[1])
        for number in (1, 2):
            with pytest.raises(RetryableError):
                exporter.export(make_events(["one"]))
            # gRPC's own backoff would have dialled again by now.
            time.sleep(1)
            assert dialled == number
        exporter.close()
        listener.shutdown(socket.SHUT_RDWR)


class _CheckingProxy(TlsProxy):
    """Takes only clients whose certificate is of the authority that is trusted now."""

    def __init__(self, own: trustme.LeafCert, trusted: trustme.CA, port: int) -> None:
        self._own = own
        self.trusted = trusted
        super().__init__(self._new_context(), port)

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # With TLS 1.3 a client learns only after the handshake that its certificate is refused.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        context.verify_mode = ssl.CERT_REQUIRED
        self._own.configure_cert(context)
        self.trusted.configure_trust(context)
        return context

    def trust(self, authority: trustme.CA) -> None:
        self.trusted = authority
        self._context = self._new_context()


@pytest.mark.parametrize("replace", ["whole", "removed first", "key apart"])
def test_certificates_that_are_renewed_on_disk(receiver: OtlpReceiver, tmp_path: Path, replace: str) -> None:
    server_authority, old, new = trustme.CA(), trustme.CA(), trustme.CA()
    trusted, certificate, key = tmp_path / "ca.pem", tmp_path / "client.pem", tmp_path / "client.key"
    server_authority.cert_pem.write_to_path(str(trusted))

    def issue(authority: trustme.CA) -> None:
        leaf = authority.issue_cert("client@example.com")
        if replace == "key apart":
            leaf.cert_chain_pems[0].write_to_path(str(certificate))
            leaf.private_key_pem.write_to_path(str(key))
        else:
            leaf.private_key_and_cert_chain_pem.write_to_path(str(certificate))

    issue(old)
    files = {"certificate_file": str(trusted), "client_certificate_file": str(certificate)}
    if replace == "key apart":
        files["client_key_file"] = str(key)
    with (
        _CheckingProxy(server_authority.issue_cert("127.0.0.1"), old, receiver.grpc_port) as proxy,
        FaultyProxy(proxy.port) as network,
    ):
        exporter = make_exporter(network.port, insecure=False, **files)
        exporter.export(make_events(["with the old one"]))
        proxy.trust(new)
        if replace == "removed first":
            certificate.unlink()
            # The connection that is open was made with the certificate that was there.
            exporter.export(make_events(["without one"]))
        issue(new)
        # Ends the connections that there are.
        network.fault = None
        exporter.export(make_events(["with the new one"]))
        exporter.close()


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has gRPC to itself: this process has imported it for the tests' servers."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")} | environment
    return subprocess.run(
        # Python 3.12 warns of a fork beside threads.
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", _PROGRAM + program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=variables,
        check=True,
    )


_PROGRAM = """
import json, os, subprocess, sys, threading
from composite_logstore import RetryableError, UnavailableError
from composite_logstore_otlp.config import OtlpChildConfig
from tests.events import make_events

receiver, nobody, silent = sys.argv[1:]

def make_exporter(endpoint=receiver, insecure=True):
    # What answers may be as slow as the machine.
    answers = endpoint == receiver and insecure
    settings = {"endpoint": endpoint, "insecure": insecure, "export_timeout_millis": 20_000 if answers else 1_000}
    return OtlpChildConfig(name="collector", type="otlp", protocol="grpc", **settings).create_exporter()

def outcome_of(attempt):
    try:
        attempt()
    except (RetryableError, UnavailableError) as error:
        return type(error).__name__
    return "delivered"
"""


@pytest.fixture
def endpoints(receiver: OtlpReceiver) -> Iterator[tuple[str, str, str]]:
    """A receiver, one that refuses connections, and one that accepts them and never answers."""
    with socket.socket() as nobody, socket.create_server(("127.0.0.1", 0)) as silent:
        nobody.bind(("127.0.0.1", 0))
        ports = (receiver.grpc_port, nobody.getsockname()[1], silent.getsockname()[1])
        yield tuple(f"127.0.0.1:{port}" for port in ports)  # type: ignore[misc]


@pytest.mark.process
def test_the_user_s_process_and_terminal_are_left_alone(endpoints: tuple[str, str, str]) -> None:
    program = """
exporter = make_exporter()
end = threading.Event()

def export():
    while not end.is_set():
        exporter.export(make_events(["one"]))

exports = threading.Thread(target=export)
exports.start()
# `preexec_fn` makes it a fork, with all that is registered for forks.
codes = {subprocess.run(["true"], preexec_fn=lambda: None).returncode for _ in range(60)}
end.set()
exports.join()
print("codes", *codes, flush=True)

child = os.fork()
if not child:
    attempts = (lambda: exporter.export(make_events(["two"])), make_exporter)
    print("forked", *map(outcome_of, attempts), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", outcome_of(lambda: exporter.export(make_events(["three"]))))

for endpoint, insecure in ((nobody, True), (silent, True), (receiver, False)):
    failing = make_exporter(endpoint, insecure)
    print(*{outcome_of(lambda: failing.export(make_events(["one"]))) for _ in range(3)})
"""
    done = run(program, *endpoints)
    assert done.stdout.splitlines() == [
        "codes 0",
        "forked UnavailableError UnavailableError",
        "parent delivered",
        "RetryableError",
        "RetryableError",
        "UnavailableError",
    ]
    assert done.stderr == ""


def test_what_the_user_has_set_for_grpc_stands(endpoints: tuple[str, str, str]) -> None:
    program = """
from grpc._cython import cygrpc

print(outcome_of(lambda: make_exporter().export(make_events(["one"]))))
print(cygrpc.is_fork_support_enabled(), os.environ["GRPC_ENABLE_FORK_SUPPORT"], "GRPC_VERBOSITY" in os.environ)
"""
    done = run(program, *endpoints, GRPC_ENABLE_FORK_SUPPORT="1")
    assert done.stdout.split() == ["delivered", "True", "1", "False"]
