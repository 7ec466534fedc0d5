"""Cases of one kind, most of which only the deep run has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_deep(cases: Iterable[Any], kept: int = 1) -> list[Any]:
    """Return the cases of a parameter, with all but the first marked as deep.

    Args:
        cases: The cases: values, or tuples of values for several parameters.
        kept: How many of them `make test` runs.
    """
    cases = list(cases)
    deep = pytest.mark.deep
    return [
        *cases[:kept],
        *(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=deep) for case in cases[kept:]),
    ]
