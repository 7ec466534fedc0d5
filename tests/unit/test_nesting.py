"""However log stores are nested, each is visited once, and only so many, so deep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore import nested_in, reading_through
from composite_logstore.reading import nesting
from composite_logstore.reading.nesting import DEEPEST, MOST
from composite_logstore.zenml import LogStoreError, LogStoreUnavailableError

Graph = list[list[int]]
"""For each log store, those that it reads through."""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Circles, diamonds, chains, and the same one named twice."""
    size = draw(st.integers(1, 30))
    near = st.integers(0, 3)
    anywhere = st.integers(0, size - 1)
    graph: Graph = []
    for number in range(size):
        below = draw(st.lists(near if draw(st.booleans()) else anywhere, max_size=4))
        # Mostly downwards, so that not everything is a circle.
        is_downwards = draw(st.integers(0, 9)) > 0
        graph.append([min(size - 1, number + 1 + one if is_downwards else one) for one in below])
    return graph


def model(number: int) -> Any:
    return SimpleNamespace(id=UUID(int=number), name=f"s{number}")


def below(graph: Graph, top: int) -> set[int]:
    found, waiting = set(), [top]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += graph[one]
    return found


def depth(graph: Graph, top: int, path: tuple[int, ...] = ()) -> int:
    """Return how deep the nesting goes, as far as it matters; too deep if there is a circle."""
    if top in path or len(path) > DEEPEST:
        return DEEPEST + 1
    return 1 + max((depth(graph, one, (*path, top)) for one in set(graph[top])), default=0)


@settings(max_examples=100)
@given(graphs())
def test_a_log_store_is_refused_if_it_contains_itself_or_too_much_and_is_else_known_as_a_whole(graph: Graph) -> None:
    expected = below(graph, 0)
    asked: list[int] = []

    def find(found: Any) -> list[Any]:
        asked.append(found.id.int)
        return [model(one) for one in graph[found.id.int]]

    if depth(graph, 0) <= DEEPEST and len(expected) <= MOST:
        assert {found.id.int for found in nested_in(model(0), find)} == expected
        assert sorted(asked) == sorted(expected)
    else:
        with pytest.raises(ValueError, match=r"contains itself|too deeply|too many"):
            nested_in(model(0), find)
        assert len(asked) == len(set(asked)) <= MOST + 1


@settings(max_examples=100)
@given(graphs(), st.sets(st.integers(0, 29)))
def test_a_page_asks_each_log_store_once_and_only_so_many_so_deep(graph: Graph, answering: set[int]) -> None:
    asked: list[int] = []
    words: list[str] = []

    def read(number: int, level: int) -> bool:
        """Read as a composite does: from the first of those below that answers."""
        for one in graph[number]:
            try:
                with reading_through(UUID(int=one), f"s{one}"):
                    asked.append(one)
                    assert level <= DEEPEST
                    if one in answering or read(one, level + 1):
                        return True
                    raise LogStoreUnavailableError("gone")
            except LogStoreError as error:
                words.append(str(error))
        return False

    with nesting.page(UUID(int=0)):
        read(0, 1)
    assert len(asked) == len(set(asked)) <= MOST
    assert 0 not in asked
    assert max(map(len, words), default=0) < 100
    assert nesting._page.get() is None


def test_one_that_answers_may_be_asked_again_for_the_same_page() -> None:
    """A page of nothing but duplicates is followed by another one."""
    with nesting.page(UUID(int=0)):
        for _ in range(3 * MOST):
            with reading_through(UUID(int=1), "one"), reading_through(UUID(int=2), "two"):
                pass


def test_the_next_page_asks_again() -> None:
    for _ in range(2):
        with nesting.page(UUID(int=0)), pytest.raises(ZeroDivisionError), reading_through(UUID(int=1), "one"):
            raise ZeroDivisionError


@pytest.mark.parametrize(("error", "may_be_later"), [(LogStoreUnavailableError("gone"), True), (ValueError(), False)])
def test_whether_it_may_be_read_later_is_said_again(error: Exception, may_be_later: bool) -> None:
    with nesting.page(UUID(int=0)):
        with pytest.raises(type(error)), reading_through(UUID(int=1), "one"):
            raise error
        with pytest.raises(LogStoreError) as raised, reading_through(UUID(int=1), "one"):
            pass
        assert isinstance(raised.value, LogStoreUnavailableError) is may_be_later


def test_what_is_read_by_itself_is_no_part_of_a_page() -> None:
    """Nobody else asks for what `verify` reads."""
    with reading_through(UUID(int=1), "one"):
        with pytest.raises(LogStoreError, match="contains itself"), reading_through(UUID(int=1), "one"):
            pass
        with reading_through(UUID(int=2), "two"):
            pass
    assert nesting._page.get() is None
