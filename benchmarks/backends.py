"""The backends that the benchmarks deliver to, each in a process of its own, on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tests.servers.collector import Collector, find_rotel
from tests.servers.datadog import Datadog
from tests.servers.s3 import s3_server

ROOT = Path(__file__).resolve().parents[1]


class QuietCollector(Collector):
    """rotel, without printing what it receives."""

    name = "rotel"

    def command(self) -> list[str]:
        binary = find_rotel()
        if binary is None:
            raise FileNotFoundError("rotel is not installed: there is no collector to deliver to")
        http, grpc = f"127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        endpoints = ["--otlp-http-endpoint", http, "--otlp-grpc-endpoint", grpc]
        return [str(binary), "start", *endpoints, "--exporter", "blackhole"]


@contextmanager
def backends(with_s3: bool = True) -> Iterator[dict[str, str]]:
    """Start them, and return where they are: `collector`, `datadog`, `folder`, `s3` and `bucket`.

    On a machine with several cores they have all but the first, which is left to the process that logs.
    """
    with ExitStack() as stack:
        # Whatever they start inherits it.
        stack.enter_context(on_cores(set(range(1, os.cpu_count() or 1))))
        collector = stack.enter_context(QuietCollector())
        datadog = stack.enter_context(Datadog(checked=False))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-"))
        places = {"collector": collector.http_endpoint, "datadog": datadog.url, "folder": folder}
        if with_s3:
            s3 = stack.enter_context(s3_server())
            places |= {"s3": s3.endpoint, "bucket": s3.bucket}
        yield places


@contextmanager
def far(places: Mapping[str, str], millis: int) -> Iterator[dict[str, str]]:
    """Put a network of so many milliseconds, there and back, in front of the backends that are reached over one."""
    names = [name for name in places if urlsplit(places[name]).scheme == "http"]
    ports = [urlsplit(places[name]).port for name in names]
    command = [sys.executable, "-m", "benchmarks.backends", str(millis / 2), *map(str, ports)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            here = json.loads(process.stdout.readline())
            moved = {
                name: urlunsplit(urlsplit(places[name])._replace(netloc=f"127.0.0.1:{port}"))
                for name, port in zip(names, here, strict=True)
            }
            yield {**places, **moved}
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Run this process on some cores, where the system lets it choose."""
    if not hasattr(os, "sched_setaffinity") or not cores & os.sched_getaffinity(0):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores & before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    loop = asyncio.get_running_loop()

    def write(data: bytes) -> None:
        if not writer.is_closing():
            writer.write(data)

    while data := await reader.read(1 << 20):
        loop.call_later(seconds, write, data)
    loop.call_later(seconds, writer.close)


async def _serve(seconds: float, ports: Sequence[int]) -> None:
    async def connected(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_pass_on(reader, there_writer, seconds), _pass_on(there_reader, writer, seconds))

    servers = [
        await asyncio.start_server(lambda r, w, port=port: connected(port, r, w), "127.0.0.1", 0)  # type: ignore[misc]
        for port in ports
    ]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    asyncio.run(_serve(float(sys.argv[1]) / 1000, [int(port) for port in sys.argv[2:]]))
