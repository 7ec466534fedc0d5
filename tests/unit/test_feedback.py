"""Logs of the workers, their backends and the libraries below never become events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from zenml.utils.logging_utils import LoggingContext

from composite_logstore import CompositeLogStore, LogEvent, RetryableError
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.simulation import make_child, make_logs, make_store


class Chatty(SimulatedBackend):
    """Logs as urllib3, grpc and s3fs do, from its own thread and from threads that it starts."""

    def export(self, batch: Sequence[LogEvent]) -> int:
        logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=0))")
        logging.getLogger("composite_logstore.delivery.worker").error("from the worker")
        helper = threading.Thread(target=logging.getLogger("fsspec").warning, args=("from the io thread",))
        helper.start()
        helper.join()
        return super().export(batch)

    def close(self) -> None:
        logging.getLogger("grpc").warning("channel closed")
        super().close()


def context(store: CompositeLogStore, monkeypatch: pytest.MonkeyPatch) -> LoggingContext:
    """Return ZenML's logging context, which turns logs into events of the store."""
    client = SimpleNamespace(active_stack=SimpleNamespace(log_store=store, artifact_store=SimpleNamespace(id=None)))
    monkeypatch.setattr("zenml.utils.logging_utils.Client", lambda: client)
    logs = make_logs(store)
    return LoggingContext(name=str(logs.id), log_model=logs)


def test_logs_of_backends_become_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Chatty()
    store = make_store(make_child("chatty", backend, max_export_batch_size=1))
    with context(store, monkeypatch):
        for number in range(20):
            logging.getLogger("train").warning("step %d", number)
        store.flush()
    store.writer.close(1.0)
    backend.wait_for_close()
    assert backend.messages == [f"step {number}" for number in range(20)]


def test_the_warning_of_a_flush_in_a_step_becomes_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    with SimulatedClock():
        living, dead, hung = SimulatedBackend(), SimulatedBackend(), SimulatedBackend()
        dead.fault = RetryableError("connection refused")
        hung.fault = "silent"
        store = make_store(
            make_child("living", living), make_child("dead", dead), make_child("hung", hung), flush_timeout_millis=50
        )
        with context(store, monkeypatch):
            logging.getLogger("train").warning("step")
            store.flush()
            store.flush()
        hung.fault = None
        store.flush()
    assert living.messages == ["step"]
