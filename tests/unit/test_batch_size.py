from __future__ import annotations

from collections.abc import Callable

import pytest

from composite_logstore.delivery.batch_size import BatchSize


def converge(size: BatchSize, may_pass: Callable[[int], bool], exports: int) -> tuple[list[int], int]:
    """Return the sizes of exports that got through, and how many broke off, of a backlog without end."""
    passed, broken = [], 0
    for _ in range(exports):
        if may_pass(size.limit):
            passed.append(size.limit)
            size.taken(size.limit)
        else:
            broken += 1
            size.broken_off(size.limit)
    return passed, broken


def test_one_that_breaks_off_once_is_tried_again_as_it_is() -> None:
    size = BatchSize(1000)
    assert not size.broken_off(1000)
    size.taken(1000)
    assert not size.broken_off(1000)
    assert size.limit == 1000


def test_one_that_breaks_off_again_is_halved_and_then_halved_each_time_down_to_one_event() -> None:
    size = BatchSize(1000)
    limits = []
    size.broken_off(1000)
    while size.broken_off(size.limit):
        limits.append(size.limit)
    assert limits == [500, 250, 125, 62, 31, 15, 7, 3, 1]
    assert size.limit == 1


def test_batches_approach_the_size_that_has_failed_in_steps() -> None:
    size = BatchSize(1000)
    size.too_large(640)
    limits = converge(size, lambda events: events < 640, exports=8)[0]
    assert limits == [320, 360, 400, 440, 480, 520, 560, 600]


def test_once_that_size_gets_through_batches_soon_have_as_many_events_as_are_set() -> None:
    size = BatchSize(1000)
    while size.limit > 1:
        size.too_large(size.limit)
    size.too_large(1)
    limits = converge(size, lambda events: True, exports=12)[0]
    assert limits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000]


def test_batches_that_do_not_use_the_limit_say_nothing_about_it() -> None:
    size = BatchSize(1000)
    size.too_large(200)
    for _ in range(50):
        size.taken(99)
    assert size.limit == 100


def test_a_size_that_has_got_through_is_tried_twice() -> None:
    """A connection that was idle is closed now and then, and that has nothing to do with size."""
    size = BatchSize(1000)
    size.too_large(1000)
    size.taken(500)
    assert not size.broken_off(400)
    assert size.limit == 562
    assert size.broken_off(400)
    assert size.limit == 200


def test_a_size_that_has_failed_before_is_not() -> None:
    size = BatchSize(1000)
    size.too_large(600)
    converge(size, lambda events: events < 600, exports=8)
    assert size.limit == 600
    assert size.broken_off(size.limit)


@pytest.mark.parametrize("most", [1, 2, 20, 500, 1000, 20_000])
@pytest.mark.parametrize("fits", [1, 2, 7, 300, 5_000])
def test_whatever_fits_is_found_and_most_exports_get_through(most: int, fits: int) -> None:
    size = BatchSize(most)
    passed, broken = converge(size, lambda events: events <= fits, exports=300)
    assert max(passed) == min(most, fits) or max(passed) > 0.95 * fits
    assert min(passed) >= min(most, fits) // 2
    assert broken <= 1 + most.bit_length() + len(passed) / 6
