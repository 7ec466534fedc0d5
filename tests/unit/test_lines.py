"""Whole lines of what is printed in a step, through ZenML's own wrappers of stdout and stderr."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm, trange
from zenml.logger import _wrapped_write

from composite_logstore import zenml
from composite_logstore.ansi import without_escapes
from composite_logstore.capture import lines
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.patience import PATIENCE_SECONDS
from tests.simulation import Context, Machine, assert_accounts_add_up, dispatch, make_child, make_store
from tests.watching import wait_until


def wrapped(name: str) -> io.StringIO:
    """Return a stream that ZenML has wrapped."""
    stream = io.StringIO()
    stream.write = _wrapped_write(stream.write, name)  # type: ignore[method-assign]
    return stream


@pytest.fixture(autouse=True)
def _streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if "clock" not in request.fixturenames:
        # On a busy machine a second may pass between two prints.
        monkeypatch.setattr(lines, "HELD_SECONDS", PATIENCE_SECONDS)
    for name in ("stdout", "stderr"):
        # Not another object in its place: pytest puts its own back before the test begins. ZenML has wrapped it only if
        # it was imported while pytest captured.
        stream = getattr(sys, name)
        monkeypatch.setattr(stream, "write", _wrapped_write(partial(type(stream).write, stream), name))
    # ZenML asks the root logger, which remembers what it has answered until a level is set in this way.
    caplog.set_level(logging.INFO)


class Step:
    """A step that prints: a context, and what its child gets."""

    def __init__(self, **settings: Any) -> None:
        self.backend, self.live = SimulatedBackend(), SimulatedBackend()
        self.store = make_store(
            # Children of two stores that have one name would share a backend.
            make_child(f"all-{id(self)}", self.backend),
            make_child(f"live-{id(self)}", self.live, progress="latest", min_level="INFO"),
            **settings,
        )
        self.context = Context(self.store)

    def __enter__(self) -> Step:
        self.context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.__exit__(None, None, None)
        assert_accounts_add_up(self.store.stats())

    @property
    def messages(self) -> list[str]:
        return self.backend.messages

    def shown(self) -> list[str]:
        """Return the messages of now, after a flush."""
        self.store.flush()
        return self.messages


def log(message: str) -> None:
    dispatch(logging.LogRecord("train", logging.INFO, "/code/train.py", 1, message, (), None))


def test_two_prints_and_a_traceback_are_three_entries() -> None:
    with Step() as step:
        print("one", 1)
        print("two")
        try:
            raise ValueError("bad")
        except ValueError:
            traceback.print_exc()
            whole = traceback.format_exc()
    assert step.messages == ["one 1", "two", whole.rstrip()]
    assert [event.level for event in step.backend.received] == [20, 20, 40]


def test_parts_of_a_line_are_joined() -> None:
    with Step() as step:
        print("a", "b", sep=" - ")
        print("  indented", end="")
        print(" line", end="\n\n")
        print(end="  ")
        print("after blanks")
        sys.stdout.writelines(["c", "d\n", "e\n"])
        print("f\ng\r\nh")
        print()
        print("i", end="")
    assert step.messages == ["a - b", "  indented line", "  after blanks", "cd", "e", "f", "g", "h", "i"]


def test_lines_of_stdout_and_stderr_are_apart() -> None:
    with Step() as step:
        print("out", end=" ")
        print("error", end=" ", file=sys.stderr)
        print("put")
        print("message", file=sys.stderr)
    assert step.messages == ["out put", "error message"]


def test_a_line_has_the_time_of_its_first_part() -> None:
    with Step() as step:
        before = time.time_ns()
        print("a", end="")
        between = time.time_ns()
        time.sleep(0.002)
        print("b")
    (event,) = step.backend.received
    assert before - 1_000_000 <= event.time_unix_nano <= between + 1_000_000


def test_a_part_becomes_an_entry_after_a_second(clock: SimulatedClock) -> None:
    with Step() as step:
        print("waiting", end="", flush=True)
        clock.advance(0.9)
        assert step.messages == []
        clock.advance(0.2)
        assert step.messages == ["waiting"]
        print(" no more")
        clock.advance(0.1)
        assert step.messages == ["waiting", " no more"]


def test_an_open_traceback_becomes_an_entry_after_a_second(clock: SimulatedClock) -> None:
    with Step() as step:
        try:
            raise ValueError("bad")
        except ValueError:
            traceback.print_exc()
        clock.advance(1.1)
        assert [message.splitlines()[-1] for message in step.messages] == ["ValueError: bad"]


def test_while_nothing_is_printed_no_thread_wakes_up(clock: SimulatedClock) -> None:
    with Step():
        print("one")
        clock.advance(10)
        waits = []
        wait_until_before = clock.wait_until
        clock.wait_until = lambda *arguments: (waits.append(1), wait_until_before(*arguments))[1]  # type: ignore[method-assign]
        clock.advance(300)
        assert len(waits) <= 1 + 2 * 300


def test_a_logger_s_record_comes_after_what_its_thread_has_printed() -> None:
    with Step() as step:
        print("one")
        log("two")
        try:
            raise ValueError("bad")
        except ValueError:
            traceback.print_exc()
        log("three")
        print("\r 50%", end="", file=sys.stderr)
        log("four")
        sys.stderr.write(warnings.formatwarning("careful", UserWarning, __file__, 1))
        print("five")
        print("part", end="")
        log("six")
        print(" of a line")
    heads = [message.partition("\n")[0].rpartition(": ")[2] for message in step.messages]
    expected = ["one", "two", "three", " 50%", "four", "careful", "five", "six", "part of a line"]
    assert heads[:2] + heads[3:] == expected
    assert step.messages[2].endswith("ValueError: bad")


def test_threads_do_not_mix_their_lines() -> None:
    together = threading.Barrier(8)

    def work(name: str) -> None:
        together.wait()
        for number in range(50):
            print(name, end="")
            print("", number, end=":\n", sep=" ")

    with Step() as step:
        # In a context of its own each: ZenML drops what one thread prints while another is in `emit` of the same one.
        threads = []
        for name in "abcdefgh":
            context = contextvars.copy_context()
            own = Context(step.store)
            own._origin = step.context._origin
            context.run(zenml.activate, own)
            threads.append(threading.Thread(target=context.run, args=(work, name)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = {name: [f"{name} {number}:" for number in range(50)] for name in "abcdefgh"}
    found: dict[str, list[str]] = {}
    for message in step.messages:
        found.setdefault(message[0], []).append(message)
    assert found == expected


def test_a_thread_that_ends_in_the_middle_of_a_line_does_not_begin_another_thread_s_line() -> None:
    with Step() as step:
        for text in ("one", "two"):
            thread = threading.Thread(
                target=contextvars.copy_context().run, args=(lambda text=text: print(text, end=""),)
            )
            thread.start()
            thread.join()
    assert step.messages == ["one", "two"]


def test_tasks_of_one_thread_keep_their_lines() -> None:
    async def work(name: str) -> None:
        for number in range(3):
            print(name, number)
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(work("a"), work("b"))

    with Step() as step:
        asyncio.run(both())
    assert sorted(step.messages) == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2"]


def test_streams_and_log_stores_keep_their_lines() -> None:
    with Step() as outer:
        print("outer", end=" ")
        with Step() as inner, Step() as innermost:
            print("innermost", end="")
            print(" line")
        print("line")
    assert outer.messages == ["outer line"]
    assert inner.messages == []
    assert innermost.messages == ["innermost line"]


def test_the_newline_is_seen_whichever_object_stdout_is(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = io.StringIO()
    before = sys.stdout
    with contextlib.redirect_stdout(elsewhere), Step() as step:
        print("not ZenML's")
        print("one", file=before)
        monkeypatch.setattr(sys, "stdout", wrapped("stdout"))
        print("two")
        print("three", file=before)
    assert step.messages == ["one", "two", "three"]
    assert elsewhere.getvalue() == "not ZenML's\n"


def test_a_print_that_goes_through_a_further_wrapper_is_whole() -> None:
    written = []
    write = sys.stdout.write

    def tee(text: str) -> int:
        written.append(text)
        return write(text)

    with Step() as step:
        sys.stdout.write = tee  # type: ignore[method-assign]
        print("a", "b")
    assert step.messages == ["a b"]
    assert written == ["a", " ", "b", "\n"]


def test_a_stream_handler_s_line_with_a_traceback_is_two_entries() -> None:
    logger = logging.Logger("own")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    with Step() as step:
        logger.info("one")
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("failed")
        logger.info("two")
    assert [message.partition("\n")[0] for message in step.messages] == [
        "one",
        "failed",
        "Traceback (most recent call last):",
        "two",
    ]


def test_a_line_that_never_ends_is_bounded() -> None:
    with Step() as step:
        for _ in range(40):
            print("x" * 100_000, end="")
    assert sum(map(len, step.messages)) == 4_000_000
    assert max(map(len, step.messages)) <= 1 << 20


def test_many_lines_that_do_not_end_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_MOST_PENS", 4)
    with Step() as step:
        for number in range(10):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lambda number=number: print(number, end=""),))
            thread.start()
            thread.join()
        assert len(step.store.writer.lines._pens) <= 5
    assert sorted(step.messages) == [str(number) for number in range(10)]


def test_a_signal_s_handler_may_print_in_the_middle_of_a_print() -> None:
    with Step() as step:
        append = step.store.writer.lines._append
        calls = iter(["from a handler"])

        def interrupted(stream: Any, said: Any) -> object:
            for text in calls:
                print(text)
            return append(stream, said)

        step.store.writer.lines._append = interrupted
        print("one")
        print("two")
    assert step.messages == ["one", "from a handler", "two"]


def test_a_ctrl_c_in_the_middle_loses_no_later_line() -> None:
    with Step() as step:
        append = step.store.writer.lines._append
        step.store.writer.lines._append = interrupting = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            print("one")
        assert interrupting is not append
        step.store.writer.lines._append = append
        print("two")
        print("three", end="")
    assert step.messages[-2:] == ["two", "three"]


def test_with_write_ahead_a_line_is_on_disk_when_its_newline_is_written(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    store = machine.start()

    def run() -> None:
        Context(store).__enter__()
        print("whole", "line")
        print("part", end="")
        machine.die()

    contextvars.copy_context().run(run)
    machine.backends["a"].fault = None
    machine.start()
    machine.log("next")
    clock.advance(60)
    assert sorted(machine.backends["a"].messages) == ["next", "whole line"]


@pytest.mark.process
def test_a_forked_process_begins_with_empty_lines_and_loses_none_of_its_own() -> None:
    with Step() as step:
        print("of the parent", end="")
        if (child := os.fork()) == 0:
            try:
                print("of the", "child")
                print("unfinished", end="")
                step.store.flush(blocking=False)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print(" alone")
        wait_until(lambda: len(step.shown()) == 3, "all three lines arrive")
    assert sorted(step.messages) == ["of the child", "of the parent alone", "unfinished"]


def test_without_join_lines_each_write_is_an_entry() -> None:
    with Step(join_lines=False) as step:
        print("a", "b")
        print("\x1b[A", end="")
        print("\r 50%", end="")
    assert step.messages == ["a", "b", "\r 50%"]
    assert [event.progress for event in step.backend.received] == [False, False, True]


def test_a_record_of_stdout_that_nothing_printed_is_whole() -> None:
    with Step() as step:
        origin = step.context._origin
        assert origin is not None
        for text in ("one", "two"):
            step.store.emit(origin, logging.LogRecord("stdout", logging.INFO, "", 0, text, (), None))
    assert step.messages == ["one", "two"]


# Progress bars


def last_of_each_bar(backend: SimulatedBackend) -> list[str]:
    """Return the last update of each bar, in the order in which the bars began."""
    last: dict[int, str] = {}
    for event in backend.received:
        if event.progress:
            last[int(event.progress)] = event.message
    return list(last.values())


def one_each_second(backend: SimulatedBackend) -> int:
    """Return how many updates there are if each bar has one in each second."""
    return len({(event.progress, event.time_unix_nano // 10**9) for event in backend.received if event.progress})


def starts(messages: list[str]) -> list[str]:
    return [message.partition("|")[0] for message in messages]


def test_tqdm_s_bars_are_updates_and_lines_between_them_are_lines() -> None:
    with Step() as step:
        for number in trange(20, mininterval=0):
            if number == 10:
                print("half")
    assert [event.message for event in step.backend.received if not event.progress] == ["half"]
    assert starts([event.message for event in step.backend.received if event.progress]) == [
        *(f"{number:3d}%" for number in range(0, 100, 5)),
        "100%",
        "100%",
    ]
    assert [event.level for event in step.live.received] == [logging.INFO] * len(step.live.received)
    assert starts(last_of_each_bar(step.live)) == ["100%"]


@pytest.mark.parametrize("leave", [True, False])
def test_each_bar_s_last_update_is_kept(leave: bool) -> None:
    with Step() as step:
        for number in range(3):
            for _ in trange(4, desc=f"bar {number}", mininterval=0, leave=leave):
                pass
    assert starts(last_of_each_bar(step.live)) == [f"bar {number}: 100%" for number in range(3)]


def test_nested_bars_are_told_apart_and_movements_are_nothing() -> None:
    with Step() as step, tqdm(total=2, desc="outer", mininterval=0) as outer:
        inner = tqdm(total=50, desc="inner", position=1, leave=False, mininterval=0)
        for _ in range(50):
            inner.update()
        outer.update(2)
        outer.refresh()
        inner.close()
    assert all("%" in message and "\x1b" not in message for message in step.messages)
    assert {message.partition(":")[0] for message in last_of_each_bar(step.live)} == {"outer", "inner"}
    assert any("100%" in message and "inner" in message for message in step.live.messages)
    assert any("100%" in message and "outer" in message for message in step.live.messages)
    assert len(step.live.messages) == one_each_second(step.backend) < len(step.messages)


def test_bars_of_several_threads_are_told_apart() -> None:
    with Step() as step:
        threads = []
        for position in range(3):
            context = contextvars.copy_context()
            own = Context(step.store)
            own._origin = step.context._origin
            context.run(zenml.activate, own)

            def work(position: int = position) -> None:
                for _ in trange(20, desc=f"thread {position}", position=position, mininterval=0):
                    pass

            threads.append(threading.Thread(target=context.run, args=(work,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(message.startswith("thread ") for message in step.messages)
    shown = step.live.messages
    for position in range(3):
        assert any(message.startswith(f"thread {position}: 100%") for message in shown)
    assert len(shown) == one_each_second(step.backend)


def test_a_bar_that_ends_without_a_newline_shows_its_last_update(clock: SimulatedClock) -> None:
    with Step() as step:
        for number in (10, 20, 30):
            sys.stderr.write(f"\r{number}%")
        clock.advance(4)
        assert step.messages == ["10%", "20%", "30%"]
        assert step.live.messages[-1] == "30%"
        # The last update is held for a second, as long as an update waits for a later one: the one before may be out.
        assert len(step.live.messages) - one_each_second(step.backend) in (0, 1)


def test_a_warning_behind_an_unfinished_bar_is_an_entry_of_its_own(clock: SimulatedClock) -> None:
    with Step() as step:
        sys.stderr.write("\r 50%")
        clock.advance(0.1)
        sys.stderr.write("the loss is not a number\n")
        sys.stderr.write("\r 60%")
        clock.advance(0.1)
        sys.stderr.write("\r 70%")
        clock.advance(1.5)
        sys.stderr.write("\r 80%")
    found = [event for event in step.backend.received if event.message in (" 60%", " 70%", " 80%")]
    assert len({event.progress for event in found}) == 1
    assert [(event.message, bool(event.progress)) for event in step.backend.received] == [
        (" 50%", True),
        ("the loss is not a number", False),
        (" 60%", True),
        (" 70%", True),
        (" 80%", True),
    ]


@pytest.mark.parametrize("draw", [lambda: sys.stderr.write("\x1b[A"), lambda: print("\x1b[1A\x1b[2K", end="\r")])
def test_a_movement_alone_is_no_event(draw: Callable[[], object]) -> None:
    with Step() as step:
        for _ in range(30):
            draw()
    assert step.messages == []
    assert all(child["accepted"] == 0 for child in step.store.stats().values())


RECORDED: dict[str, list[str]] = json.loads((Path(__file__).parents[1] / "recorded_bars.json").read_text())
"""What programs write that are too heavy to be installed here."""


@pytest.mark.parametrize(
    ("program", "lines", "updates"),
    [
        ("keras", ["Epoch 1/2"], [f"{number}/5" for number in range(1, 6)]),
        (
            "huggingface_hub",
            [],
            [*(f"model.safetensors: {number:3d}%" for number in range(0, 101, 25)), "model.safetensors: 100%"],
        ),
    ],
)
def test_the_bars_of_other_programs(program: str, lines: list[str], updates: list[str]) -> None:
    with Step() as step:
        for text in RECORDED[program]:
            sys.stdout.write(text)
    events = step.backend.received
    assert [event.message for event in events if not event.progress] == lines
    shown = [without_escapes(event.message) for event in events if event.progress]
    assert [text[: len(update)] for text, update in zip(shown, updates, strict=True)] == updates
    assert len({event.progress for event in events if event.progress}) == 1
    assert without_escapes(step.live.messages[-1]) == shown[-1]


def test_rich_s_bars_are_told_apart_and_its_lines_are_shown() -> None:
    console = Console(file=sys.stderr, force_terminal=True, width=60, color_system="standard")
    with Step() as step, Progress(console=console, auto_refresh=False) as progress:
        tasks = [progress.add_task(f"task {number}", total=4) for number in range(2)]
        for number in range(4):
            for task in tasks:
                progress.advance(task)
            progress.print(f"step {number}")
            progress.refresh()
    texts = [without_escapes(event.message) for event in step.backend.received]
    assert [text for text in texts if text.startswith("step")] == [f"step {number}" for number in range(4)]
    assert all(text.startswith(("step", "task 0 ", "task 1 ")) for text in texts)
    for number in range(2):
        assert any(text.startswith(f"task {number} ") and "100%" in text for text in texts)
        assert any(
            text.startswith(f"task {number} ") and "100%" in text for text in map(without_escapes, step.live.messages)
        )
