"""However a text is split into writes, the same lines are shown of it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from composite_logstore.ansi import without_escapes
from composite_logstore.capture.terminal import Shown, Terminal
from composite_logstore.capture.tracebacks import Tracebacks

TRACEBACK = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    fit()
KeyError: 'rate'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 5, in <module>
    fit()
ValueError: bad
"""
PIECES = (
    *("a", "loss 0.5", " ", "\n", "\r", "\r\n", "\b", "\t", "同", "é", "100%", "50%", TRACEBACK),
    *("\x1b", "\x1b[", "\x1b[A", "\x1b[2A", "\x1b[B", "\x1b[3C", "\x1b[D", "\x1b[5G", "\x1b[K", "\x1b[2K", "\x1b[1K"),
    *("\x1b[J", "\x1b[2J", "\x1b[H", "\x1b[2;3H", "\x1b[E", "\x1b[F", "\x1b[s", "\x1b[u", "\x1b[31m", "\x1b[0m"),
    *("\x1b[2X", "\x1b7", "\x1b8", "\x1bM", "\x1b]8;;x\x1b\\", "\x1b]0;x\x07", "\x1b(B", "\x9b1A", "\x1b[?25l"),
    *("train.py:3: UserWarning: x\n  code\n", "Exception in thread A:\n", "\n\x1b[A"),
)
texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def shown(parts: list[str]) -> list[tuple[str, int]]:
    terminal, tracebacks = Terminal(), Tracebacks()
    found: list[Shown] = []
    for part in parts:
        terminal.write(part, None)
        while terminal.out:
            tracebacks.add(terminal.out.popleft())
    terminal.rest()
    for one in terminal.out:
        tracebacks.add(one)
    tracebacks.end()
    found += tracebacks.out
    # The numbers of bars differ between two terminals, but not their order.
    numbers: dict[int, int] = {0: 0}
    return [(one.text, numbers.setdefault(one.bar, len(numbers))) for one in found]


@settings(max_examples=400)
@given(texts, st.lists(st.integers(0, 300), max_size=6))
@example(f"a\n{TRACEBACK}b\n", [1, 40, 200])
@example("one\na\x1b[u", [4])
@example("\r 10%\r 20%\x1b[2Kdone\n", [5, 9, 10])
def test_the_same_lines_are_shown_of_a_text_in_any_parts(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[begin:end] for begin, end in pairwise(places)]
    whole = shown([text])
    assert shown(parts) == whole
    assert shown(list(text)) == whole
    for line, _ in whole:
        assert without_escapes(line).strip()


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1), max_size=10))
def test_lines_without_control_characters_are_shown_as_they_are(lines: list[str]) -> None:
    assert shown([f"{line}\n" for line in lines]) == [(line, 0) for line in lines if line.strip()]
