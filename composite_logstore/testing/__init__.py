"""Tools to test backends, and programs that use log stores.

Contains the contract of exporters and readers as tests to inherit, events for them, simulated time, and a backend that
fails. The names below are public; `docs/testing-a-backend.md` shows how to use them. They are imported on first use:
the contracts need pytest, the rest does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composite_logstore.testing.backend import FAULTS, SimulatedBackend, SimulatedChildConfig
    from composite_logstore.testing.clock import SimulatedClock
    from composite_logstore.testing.contract import Fault, Received
    from composite_logstore.testing.events import make_event, make_events, make_logs, make_stream
    from composite_logstore.testing.exporter_contract import ExporterContract
    from composite_logstore.testing.reader_contract import ReaderContract

_HOMES = {
    "ExporterContract": "exporter_contract",
    "FAULTS": "backend",
    "Fault": "contract",
    "ReaderContract": "reader_contract",
    "Received": "contract",
    "SimulatedBackend": "backend",
    "SimulatedChildConfig": "backend",
    "SimulatedClock": "clock",
    "make_event": "events",
    "make_events": "events",
    "make_logs": "events",
    "make_stream": "events",
}

__all__ = [
    "FAULTS",
    "ExporterContract",
    "Fault",
    "ReaderContract",
    "Received",
    "SimulatedBackend",
    "SimulatedChildConfig",
    "SimulatedClock",
    "make_event",
    "make_events",
    "make_logs",
    "make_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    if home.endswith("contract"):
        import pytest

        # So that a failed `assert` in a contract shows its values, as in a test module.
        pytest.register_assert_rewrite(
            *(f"{__name__}.{module}" for module in ("contract", "exporter_contract", "reader_contract"))
        )
    return getattr(import_module(home), name)
