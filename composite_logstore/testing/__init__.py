"""For the tests of backends and of what is built on log stores: simulated time, and a backend that fails.

The names below are public; `docs/writing-a-backend.md` shows their use.
"""

from __future__ import annotations

from composite_logstore.testing.backend import FAULTS, SimulatedBackend, SimulatedChildConfig
from composite_logstore.testing.clock import SimulatedClock

__all__ = ["FAULTS", "SimulatedBackend", "SimulatedChildConfig", "SimulatedClock"]
