from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from composite_logstore import shorten


def test_what_fits_is_left_as_it_is() -> None:
    assert shorten("é" * 10, 20) == "é" * 10


def test_the_mark_says_by_how_much() -> None:
    shortened = shorten("x" * 1000, 100)
    kept = shortened.count("x")
    assert shortened == "x" * kept + f"… [shortened by {1000 - kept} bytes]"


@given(st.text(), st.integers(min_value=0, max_value=200))
def test_the_result_always_fits(text: str, max_bytes: int) -> None:
    assert len(shorten(text, max_bytes).encode()) <= max_bytes
