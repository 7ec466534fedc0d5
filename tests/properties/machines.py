"""Runs state machines, and checks that they find planted bugs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.properties.planted import BUGS, DURABILITY_BUGS, MEMORY_BUGS, POLICY_BUGS, RULE_BUGS


def run(machine: type[RuleBasedStateMachine], examples: int, steps: int, **options: Any) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, **options)
    )


def assert_found(
    bug: str, monkeypatch: pytest.MonkeyPatch, machine: type[RuleBasedStateMachine], examples: int, steps: int
) -> None:
    """Plant a bug, and check that the machine finds it."""
    (BUGS | MEMORY_BUGS | POLICY_BUGS | DURABILITY_BUGS | RULE_BUGS)[bug](monkeypatch)
    with pytest.raises(AssertionError):
        run(machine, examples, steps, phases=[Phase.generate], database=None, report_multiple_bugs=False)
