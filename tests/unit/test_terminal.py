"""Which lines a terminal would show, and which of them update a progress bar."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable

import pytest

from composite_logstore.capture.terminal import MOST_CHARACTERS, Shown, Terminal
from composite_logstore.capture.tracebacks import Tracebacks


def shown(*parts: str) -> list[Shown]:
    """Return what is shown of a text in parts, and of what is held at its end."""
    terminal, tracebacks = Terminal(), Tracebacks()
    for part in parts:
        terminal.write(part, None)
    terminal.rest()
    for one in terminal.out:
        tracebacks.add(one)
    tracebacks.end()
    return list(tracebacks.out)


def texts(*parts: str) -> list[str]:
    return [one.text for one in shown(*parts)]


def bars(*parts: str) -> list[list[str]]:
    """Return the updates of each progress bar, in the order in which the bars began."""
    found: dict[int, list[str]] = {}
    for one in shown(*parts):
        found.setdefault(one.bar, []).append(one.text)
    return list(found.values())


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("\n\n  \none", ["one"]),
        ("  one  \n", ["  one  "]),
        ("a\tb\vc\u2028d\x85e\n", ["a\tb\vc\u2028d\x85e"]),
        ("\x1b[31mred\x1b[0m and \x1b[1;32mgreen\x1b[m\n", ["\x1b[31mred\x1b[0m and \x1b[1;32mgreen\x1b[m"]),
        ("\x1b]8;;https://a\x1b\\link\x1b]8;;\x1b\\\n", ["\x1b]8;;https://a\x1b\\link\x1b]8;;\x1b\\"]),
        ("match\x1b[Ked\n", ["matched"]),
        ("a\x1b[3Cb\n", ["a   b"]),
        ("\x1b[?25lhidden\x1b[?25h\n", ["hidden"]),
        ("100 % of \x1b\n", ["100 % of "]),
        ("\x1b[12\n34\n", ["[12", "34"]),
    ],
)
def test_text_that_is_only_appended_is_shown_as_it_is(printed: str, expected: list[str]) -> None:
    found = shown(printed)
    assert [one.text for one in found] == expected
    assert not any(one.bar for one in found)


@pytest.mark.parametrize(
    "movement",
    [
        "\x1b[A",
        "\n\x1b[A",
        "\x1b[1A\x1b[2K",
        "\r",
        "\b\b",
        "\r\x1b[K",
        "\x1b[2J\x1b[H",
        "\x1b[?25l",
        "\x1b[5;10H",
        "\x1b[s\x1b[u",
        "\x1b7\x1b8",
        "\x9bA",
        "\x1b[10D\x1b[5C\x1b[B\x1b[3G\x1b[E\x1b[F\x1bM",
        "\r" + " " * 80 + "\r",
        "\x1b[31m\x1b[0m",
        "\x1b]0;a title\x07",
        "\x1b(B",
    ],
)
def test_a_movement_alone_is_nothing(movement: str) -> None:
    assert shown(movement, movement, "\n") == []


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("\r 0%\r50%\r100%\n", [" 0%", "50%", "100%"]),
        ("0%\r50%\r100%\r\n", ["0%", "50%", "100%"]),
        ("0%\r50%\r", ["0%", "50%"]),
        ("|\b/\b-\b", ["|", "/", "-"]),
        ("50%\b\b\b60%\n", ["50%", "60%"]),
        # What a shorter text leaves of a longer one stays.
        ("abcdef\rxyz\n", ["abcdef", "xyzdef"]),
        ("abcdef\rxyz\x1b[K\n", ["abcdef", "xyz"]),
        ("abcdef\r\x1b[2Kxyz\n", ["abcdef", "xyz"]),
        ("abc\x1b[2Gx\n", ["abc", "axc"]),
        ("abc\x1b[2Dx\n", ["abc", "axc"]),
        ("\x1b[sabc\x1b[ux\n", ["abc", "xbc"]),
        ("\n50%\x1b[A\n60%\x1b[A", ["50%", "60%"]),
        ("10%\n\x1b[A20%\x1b[K\n", ["10%", "20%"]),
        ("10%\n\x1b[F20%\n", ["10%", "20%"]),
        ("\r\x1b[32m50%\x1b[0m\r\x1b[32m60%\x1b[0m\n", ["\x1b[32m50%\x1b[0m", "\x1b[32m60%\x1b[0m"]),
        ("\r同じ\rab\n", ["同じ", "abじ"]),
        ("\r50%\r50%\r50%\n", ["50%"]),
        ("\r50%   \r60%\n", ["50%", "60%"]),
    ],
)
def test_what_is_drawn_over_is_shown_before(printed: str, expected: list[str]) -> None:
    assert texts(printed) == expected


def test_a_row_that_is_drawn_over_is_one_bar() -> None:
    assert bars("\r10%\r20%\n", "\r30%\r40%\n") == [["10%", "20%"], ["30%", "40%"]]


def test_a_bar_in_the_place_of_one_that_is_complete_is_another_one() -> None:
    assert bars("\r 50%\r100%\r" + " " * 9 + "\r  0%\r100%\r") == [[" 50%", "100%"], ["  0%", "100%"]]


def test_bars_that_take_turns_in_a_row_are_told_apart_by_their_labels() -> None:
    parts = [f"\r{name}: {number:3d}%|" for number in (10, 50, 100) for name in ("train", "valid")]
    assert bars(*parts) == [[f"{name}:  10%|", f"{name}:  50%|", f"{name}: 100%|"] for name in ("train", "valid")]


def test_a_bar_that_names_what_it_is_at_becomes_few_bars() -> None:
    names = [f"{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]
    assert len(bars(*(f"\r{name}: {place}%" for place, name in enumerate(names[:99])))) <= 10
    assert len(bars(*(f"\rreading {name}" for name in names))) == 1
    assert len(bars(*(f"\rEpoch {number}/9: loss 0.{number}" for number in range(9)))) == 1


def test_bars_below_each_other_are_told_apart() -> None:
    step = "\router {0}%\n\rinner {0}%\x1b[A"
    assert bars(*(step.format(number) for number in (10, 20, 30))) == [
        ["outer 10%", "outer 20%", "outer 30%"],
        ["inner 10%", "inner 20%", "inner 30%"],
    ]


def test_a_screen_that_is_drawn_from_its_top_has_one_bar_for_each_row() -> None:
    frame = "\x1b[Hcpu {0}\x1b[K\nmemory {0}\x1b[K\n"
    (first, *cpu), (second, *memory) = bars(*(frame.format(number) for number in "123"))
    assert [first, *cpu] == ["cpu 1", "cpu 2", "cpu 3"]
    assert [second, *memory] == ["memory 1", "memory 2", "memory 3"]


def test_a_line_after_a_bar_is_none_of_its_updates() -> None:
    found = shown("\r50%\r100%\n", "done\n")
    assert [(one.text, one.bar > 1) for one in found] == [("50%", True), ("100%", True), ("done", False)]


def test_lines_rows_and_sequences_have_bounds() -> None:
    assert [len(text) for text in texts("x" * (2 * MOST_CHARACTERS + 5) + "\n")] == [MOST_CHARACTERS] * 2 + [5]
    assert "".join(texts("\r" + "y" * 40_000 + "\n")) == "y" * 40_000
    assert texts("\x1b[99999999Cend\n\x1b[99999999A", "\x1b]" + "z" * 10_000)[0].endswith("end")
    terminal = Terminal()
    for number in range(1_000):
        terminal.write(f"\r{number}\n\n", None)
    assert terminal.size < 1_000


# Tracebacks


def fail() -> None:
    try:
        raise KeyError("one")
    except KeyError as error:
        raise ValueError("two\nwith a second line\n\nand a fourth") from error


def fail_in_a_group() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("exception groups are new in Python 3.11")
    errors = []
    for raises in (fail, lambda: 1 / 0):
        try:
            raises()
        except Exception as error:
            errors.append(error)
    raise ExceptionGroup("both", errors)  # noqa: F821 - in Python 3.10 it does not exist


def fail_meanwhile() -> None:
    try:
        fail()
    except ValueError:
        {}["missing"]  # type: ignore[misc]


def fail_with_notes() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("notes are new in Python 3.11")
    error = ValueError("one")
    error.add_note("a note\nof two lines")
    raise error


def recur(depth: int = 50) -> None:
    recur(depth - 1) if depth else fail()


@pytest.mark.parametrize(
    "failing",
    [fail, fail_in_a_group, fail_meanwhile, fail_with_notes, recur, lambda: compile("a b", "f", "exec")],
)
def test_a_traceback_is_one_entry_with_all_its_causes(failing: Callable[[], object]) -> None:
    file = io.StringIO()
    file.write("before\n")
    try:
        failing()
    except Exception:
        traceback.print_exc(file=file)
        whole = traceback.format_exc()
        file.write("after\n")
        assert texts(file.getvalue()) == ["before", whole.rstrip(), "after"]


def test_neighbouring_tracebacks_are_two_entries() -> None:
    one = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: bad\n'
    assert texts(one + one) == [one.rstrip()] * 2
    assert texts(f"{one}\nnext\n") == [one.rstrip(), "next"]


def test_a_thread_s_traceback_begins_with_the_thread() -> None:
    text = 'Exception in thread Thread-1 (work):\nTraceback (most recent call last):\n  File "a"\nmy.Error\n'
    assert texts(f"{text}after\n") == [text.rstrip(), "after"]
    assert texts("Exception in thread Thread-1 (work):\nnothing\n") == [
        "Exception in thread Thread-1 (work):",
        "nothing",
    ]


def test_a_warning_has_its_line_of_code() -> None:
    text = "/code/train.py:3: UserWarning: careful\n  warnings.warn('careful')\n"
    assert texts(f"{text}{text}after\n") == [text.rstrip(), text.rstrip(), "after"]
    assert texts("train.py:3: FutureWarning: careful\nafter\n") == ["train.py:3: FutureWarning: careful", "after"]


def test_a_traceback_that_does_not_end_hides_no_later_line() -> None:
    assert texts('Traceback (most recent call last):\n  File "a"\nloss = 0.5, all is well\n') == [
        'Traceback (most recent call last):\n  File "a"',
        "loss = 0.5, all is well",
    ]
    head = "Traceback (most recent call last):\n"
    found = texts(head + '  File "a"\n' * 400_000)
    assert len(found) > 1
    assert max(map(len, found)) < 2 * MOST_CHARACTERS
