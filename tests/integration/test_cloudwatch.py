"""The `cloudwatch` child on moto's server: the contract, several writers, and copies to and from an archive."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest

from composite_logstore import (
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.testing import ExporterContract, Fault, ReaderContract, make_events
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from tests import simulation
from tests.copying import move_there_and_back
from tests.servers.cloudwatch import CloudWatch

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server() -> Iterator[CloudWatch]:
    with CloudWatch() as server:
        yield server


@pytest.fixture
def cloudwatch(server: CloudWatch, monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudWatch]:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.mend()
    server.limits.clear()
    server.operations.clear()
    yield server
    assert server.limits == []


def child_of(server: CloudWatch, **settings: object) -> CloudwatchChildConfig:
    given = {"name": "aws", "type": "cloudwatch", "export_timeout_millis": 60_000, **server.settings, **settings}
    return CloudwatchChildConfig.model_validate(given)


class TestCloudwatch(ExporterContract, ReaderContract):
    patience_seconds: ClassVar[float] = 60.0

    @pytest.fixture
    def child(self, cloudwatch: CloudWatch) -> CloudwatchChildConfig:
        return child_of(cloudwatch)

    @pytest.fixture
    def faults(self, cloudwatch: CloudWatch) -> Mapping[str, Fault]:
        @contextmanager
        def failing(operation: str, status: int, code: str = "") -> Iterator[None]:
            cloudwatch.fail(operation, status, code)
            yield
            cloudwatch.mend()

        put, get = "PutLogEvents", "GetLogEvents"
        return {
            "hangs up": Fault(partial(failing, "", 0), RetryableError, LogStoreUnavailableError),
            "throttled": Fault(partial(failing, put, 400, "ThrottlingException"), RetryableError),
            "fails": Fault(partial(failing, put, 500, "InternalFailure"), RetryableError),
            "unavailable": Fault(partial(failing, put, 503, "ServiceUnavailableException"), RetryableError),
            "wrong key": Fault(partial(failing, put, 400, "UnrecognizedClientException"), UnavailableError),
            "not allowed": Fault(partial(failing, put, 400, "AccessDeniedException"), UnavailableError),
            "invalid": Fault(partial(failing, put, 400, "InvalidParameterException"), RejectedError),
            "too large for a proxy": Fault(partial(failing, put, 413), TooLargeError),
            "not an endpoint": Fault(partial(failing, put, 404), UnavailableError),
            "stream deleted": Fault(partial(failing, put, 400, "ResourceNotFoundException"), RetryableError),
            "throttled reading": Fault(partial(failing, get, 400, "ThrottlingException"), None, LogStoreRateLimitError),
            "reading not allowed": Fault(partial(failing, get, 400, "AccessDeniedException"), None, LogStoreError),
            "reading fails": Fault(partial(failing, get, 503), None, LogStoreUnavailableError),
        }


def test_what_a_log_store_delivers_is_fetched(cloudwatch: CloudWatch) -> None:
    """Two processes write to one stream: two log stores, with a writer each."""
    child = child_of(cloudwatch, log_stream_prefix="delivered/", log_group=f"group-{uuid4()}", retention_days=30)
    stores = [simulation.make_store(child) for _ in range(2)]
    logs = simulation.make_logs(stores[0])
    for number, store in enumerate(stores):
        origin = store.register_origin("step", logs, {})
        for message in range(40):
            text = f"message {message} of {number}"
            record = logging.LogRecord("train", logging.WARNING, "/code/train.py", 42, text, (), None, "fit")
            store.emit(origin, record)
        store.deregister_origin(origin)
    page = stores[0].fetch(logs, start="oldest", limit=100)
    for store in stores:
        assert store.stats()["aws"]["delivered"] == 40
        store.cleanup()

    assert sorted(entry.message for entry in page.items) == sorted(
        f"message {message} of {number}" for message in range(40) for number in range(2)
    )
    for number in range(2):
        own = [entry.message for entry in page.items if entry.message.endswith(f"of {number}")]
        assert own == [f"message {message} of {number}" for message in range(40)]
    assert cloudwatch.operations.count("CreateLogGroup") == cloudwatch.operations.count("PutRetentionPolicy") == 1


def test_a_stream_moves_from_an_archive_and_back(cloudwatch: CloudWatch, tmp_path: Path) -> None:
    move_there_and_back(child_of(cloudwatch), tmp_path)


def test_a_permission_that_is_missing_is_named(cloudwatch: CloudWatch) -> None:
    child = child_of(cloudwatch, log_group=f"group-{uuid4()}")
    exporter = child.create_exporter()
    events = make_events(["a"])
    cloudwatch.fail("CreateLogGroup", 400, "AccessDeniedException")
    with pytest.raises(UnavailableError, match=r"does not exist.*logs:CreateLogGroup"):
        exporter.export(events)
    cloudwatch.mend()
    assert exporter.export(events) == 0
    exporter.close()


def test_the_backend_tells_its_time(cloudwatch: CloudWatch) -> None:
    moment = child_of(cloudwatch).backend_time()
    assert moment is not None
    assert abs(moment.timestamp() - time.time()) < 600
