"""Our backends and the example keep the contract that `composite_logstore.testing` states."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from grpc import StatusCode
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.io import local_filesystem

from composite_logstore import RejectedError, RetryableError, Stream, TooLargeError, UnavailableError
from composite_logstore.testing import ExporterContract, Fault, ReaderContract, Received
from composite_logstore.testing.exporter_contract import ODD
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.servers.datadog import Datadog
from tests.servers.loki import Loki
from tests.servers.otlp_receiver import Answer, OtlpReceiver
from tests.servers.s3 import S3Server, s3_server
from tests.servers.standin import StandIn
from tests.servers.victorialogs import VictoriaLogs

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of an artifact store that is registered."""
    path = tmp_path_factory.mktemp("conformance") / "store"
    kind = StackComponentType.ARTIFACT_STORE
    component = Client().create_stack_component("conformance", "local", kind, {"path": str(path)})
    yield path
    Client().delete_stack_component(component.id, kind)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    with Datadog() as server:
        yield server


class TestArtifactInAFolder(ExporterContract, ReaderContract):
    @pytest.fixture
    def child(self, folder: Path) -> ArtifactChildConfig:
        return ArtifactChildConfig(name="archive", type="artifact", artifact_store="conformance")

    @pytest.fixture
    def faults(self, folder: Path) -> Mapping[str, Fault]:
        @contextmanager
        def file_in_its_place() -> Iterator[None]:
            moved = folder.rename(folder.with_name("moved"))
            folder.touch()
            yield
            folder.unlink()
            moved.rename(folder)

        return {
            "a file in the folder's place": Fault(file_in_its_place, export=UnavailableError),
            "a full disk": Fault(partial(opening_raises, OSError(errno.ENOSPC, "full")), export=RetryableError),
            "a broken disk": Fault(
                partial(opening_raises, OSError(errno.EIO, "broken")), RetryableError, LogStoreUnavailableError
            ),
            "a folder of somebody else": Fault(
                partial(opening_raises, PermissionError(errno.EACCES, "denied")),
                UnavailableError,
                LogStoreUnavailableError,
            ),
        }


@contextmanager
def opening_raises(error: OSError) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_filesystem, "open", fail, raising=False)
        yield


@pytest.mark.deep
class TestArtifactOnS3(ExporterContract, ReaderContract):
    @pytest.fixture
    def stores(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
        """The artifact stores that ZenML knows, by name."""
        stores: dict[str, object] = {"s3": s3.artifact_store()}
        for module in ("exporter", "artifact_stores"):
            monkeypatch.setattr(f"composite_logstore_artifact.{module}.find_named", lambda name: stores[name])
        return stores

    @pytest.fixture
    def child(self, stores: dict[str, object]) -> ArtifactChildConfig:
        return ArtifactChildConfig(name="archive", type="artifact", artifact_store="s3")

    @pytest.fixture
    def faults(self, s3: S3Server, stores: dict[str, object]) -> Mapping[str, Fault]:
        @contextmanager
        def other_store(**settings: str) -> Iterator[None]:
            right, stores["s3"] = stores["s3"], s3.artifact_store(**settings)
            yield
            stores["s3"] = right

        return {"a wrong key": Fault(partial(other_store, secret="wrong"), None, LogStoreUnavailableError)}


class TestOtlp(ExporterContract):
    @pytest.fixture
    def receiver(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with OtlpReceiver() as receiver:
            yield receiver

    @pytest.fixture(params=["http/protobuf", "grpc"])
    def child(self, request: pytest.FixtureRequest, receiver: OtlpReceiver) -> OtlpChildConfig:
        endpoint = receiver.http_endpoint if request.param == "http/protobuf" else f"http://{receiver.grpc_endpoint}"
        return OtlpChildConfig(
            name="collector",
            type="otlp",
            protocol=request.param,
            endpoint=endpoint,
            headers={"authorization": "Bearer top-secret"},
            export_timeout_millis=3_000,
        )

    @pytest.fixture
    def received(self, receiver: OtlpReceiver) -> Callable[[Stream], list[Received]]:
        def look(stream: Stream) -> list[Received]:
            return [
                Received(
                    record.attributes["log.record.uid"],
                    record.attributes["zenml.log.writer"],
                    record.attributes["zenml.log.sequence"],
                    record.body,
                    # DEBUG is 5, INFO is 9, and so on.
                    (record.severity_number + 3) // 4 * 10 - 10,
                    record.time_unix_nano,
                )
                for record in receiver.records()
                if record.attributes["zenml.log.id"] == str(stream.id)
            ]

        return look

    @pytest.fixture
    def faults(self, receiver: OtlpReceiver) -> Mapping[str, Fault]:
        @contextmanager
        def answering(answer: Answer) -> Iterator[None]:
            receiver.answers.extend([answer] * 100)
            yield
            receiver.answers.clear()

        def answer(status: int, code: StatusCode, **settings: float) -> Callable[[], AbstractContextManager[object]]:
            # A server that repeats what it was sent.
            said = "not with top-secret"
            return partial(answering, Answer(status, body=said.encode(), code=code, details=said, **settings))

        return {
            "busy": Fault(answer(503, StatusCode.UNAVAILABLE), RetryableError),
            "wrong key": Fault(answer(401, StatusCode.UNAUTHENTICATED), UnavailableError),
            "not an endpoint": Fault(answer(404, StatusCode.UNIMPLEMENTED), UnavailableError),
            "malformed": Fault(answer(400, StatusCode.INVALID_ARGUMENT), RejectedError),
            "silent": Fault(answer(200, StatusCode.OK, delay_seconds=4.0), RetryableError),
        }


class TestDatadog(ExporterContract, ReaderContract):
    @pytest.fixture
    def child(self, datadog: Datadog, monkeypatch: pytest.MonkeyPatch) -> DatadogChildConfig:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        datadog.control(forget=True)
        return DatadogChildConfig(name="live", type="datadog", export_timeout_millis=60_000, **datadog.settings)

    @pytest.fixture
    def faults(self, datadog: Datadog) -> Mapping[str, Fault]:
        @contextmanager
        def killed() -> Iterator[None]:
            datadog.kill()
            yield
            datadog.start()

        @contextmanager
        def answering(path: str, status: int) -> Iterator[None]:
            datadog.fail(path, status, times=3)
            yield

        return {
            "killed": Fault(killed, RetryableError, LogStoreUnavailableError),
            "rate limit": Fault(partial(answering, "intake", 429), export=RetryableError),
            "wrong key": Fault(partial(answering, "intake", 403), export=UnavailableError),
            "too large for a proxy": Fault(partial(answering, "intake", 413), export=TooLargeError),
            "rate limit of the search": Fault(partial(answering, "search", 429), read=LogStoreRateLimitError),
            "wrong application key": Fault(partial(answering, "search", 403), read=LogStoreError),
            "broken search": Fault(partial(answering, "search", 502), read=LogStoreUnavailableError),
        }


@pytest.fixture(scope="module")
def loki() -> Iterator[Loki]:
    with Loki() as server:
        yield server


@pytest.fixture(scope="module")
def victorialogs() -> Iterator[VictoriaLogs]:
    with VictoriaLogs() as server:
        yield server


def faults_of(server: StandIn, search: str) -> Mapping[str, Fault]:
    """The faults of reading that stand-ins share."""

    @contextmanager
    def killed() -> Iterator[None]:
        server.stop()
        yield
        server.start()

    @contextmanager
    def answering(status: int, body: bytes) -> Iterator[None]:
        server.fail(search, status, body, times=3)
        yield
        server.mend()

    return {
        "killed": Fault(killed, RetryableError, LogStoreUnavailableError),
        "rate limit": Fault(partial(answering, 429, b"too many outstanding requests"), None, LogStoreRateLimitError),
        "no permission": Fault(partial(answering, 403, b"not with top-secret"), None, LogStoreError),
        "broken": Fault(partial(answering, 502, b"<html>"), None, LogStoreUnavailableError),
        "another server": Fault(partial(answering, 200, b"<html>hello</html>"), None, LogStoreError),
        "broken off": Fault(partial(answering, 200, b'{"status": "success", "data"'), None, LogStoreError),
    }


class TestLoki(ReaderContract):
    @pytest.fixture
    def child(self, loki: Loki, monkeypatch: pytest.MonkeyPatch) -> OtlpChildConfig:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        loki.forget()
        read = {"type": "loki", "query_url": loki.url, "api_key": "top-secret"}
        return OtlpChildConfig(name="loki", type="otlp", endpoint=f"{loki.url}/otlp/v1/logs", read=read)

    @pytest.fixture
    def faults(self, loki: Loki) -> Mapping[str, Fault]:
        return faults_of(loki, "/loki/api/v1/query_range")


class TestVictoriaLogs(ReaderContract):
    @pytest.fixture
    def child(self, victorialogs: VictoriaLogs, monkeypatch: pytest.MonkeyPatch) -> OtlpChildConfig:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        victorialogs.forget()
        # VictoriaLogs drops an event whose attribute has a name of more than 128 bytes.
        monkeypatch.setitem(ODD, "odd names", {"attributes": {"": 1, " ": 2, "ünï": 3, "\x00": 4, "x" * 100: 5}})  # type: ignore[arg-type]
        endpoint = f"{victorialogs.url}/insert/opentelemetry/v1/logs"
        read = {"type": "victorialogs", "url": victorialogs.url, "api_key": "top-secret"}
        return OtlpChildConfig(name="victoria", type="otlp", endpoint=endpoint, read=read)

    @pytest.fixture
    def faults(self, victorialogs: VictoriaLogs) -> Mapping[str, Fault]:
        return faults_of(victorialogs, "/select/logsql/query")


@pytest.mark.deep
def test_the_example_backend() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/backend/test_lines.py"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert process.returncode == 0, process.stdout + process.stderr
