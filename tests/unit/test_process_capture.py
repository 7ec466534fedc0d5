from __future__ import annotations

import contextvars
import io
import logging
import logging.config
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from composite_logstore.capture import process
from composite_logstore.capture.process import PID, RANK, ProcessCapture, attributes, rank
from tests.hostile import VALUES, make_record, without

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "LOCAL_RANK", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    monkeypatch.setattr(process, "_found", None)
    monkeypatch.setattr(process, "_missed", None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, 0),
        ({"RANK": "7", "LOCAL_RANK": "3"}, 7),
        ({"OMPI_COMM_WORLD_RANK": "5"}, 5),
        ({"PMIX_RANK": "5"}, 5),
        ({"PMI_RANK": "4"}, 4),
        ({"SLURM_PROCID": "12", "LOCAL_RANK": "0"}, 12),
        ({"SLURM_PROCID": "12", "SLURM_NTASKS": "16"}, 12),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "LOCAL_RANK": "2"}, 2),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": ""}, None),
        ({"RANK": "one", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "-1"}, None),
        ({"RANK": "²"}, None),
        ({"RANK": "9" * 30}, None),
    ],
)
def test_the_rank_is_the_launcher_s(
    environment: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank() == expected
    assert attributes() == ({PID: os.getpid()} if expected is None else {PID: os.getpid(), RANK: expected})


def test_a_rank_that_is_set_later_is_found_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank() is None
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3
    # A process keeps its rank, whatever it does to its environment.
    monkeypatch.delenv("RANK")
    assert rank() == 3


def test_the_rank_is_the_one_that_the_program_gave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False, get_rank=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)
    assert rank() is None
    distributed.is_initialized = lambda: True
    assert rank() == 2


@contextmanager
def collecting() -> Iterator[list[tuple[str, int, str]]]:
    """Collect from this process, with streams of its own: pytest replaces the streams before each test's body."""
    records: list[tuple[str, int, str]] = []

    def take(record: logging.LogRecord) -> None:
        if record.getMessage().strip():
            records.append((record.name, record.levelno, record.getMessage()))

    capture = ProcessCapture(take)
    with pytest.MonkeyPatch.context() as patch:
        # Python's own streams take attributes, `StringIO` does not.
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), write_through=True))
        capture.attach()
        try:
            yield records
        finally:
            capture.detach()


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def printed(name: str) -> str:
    return str(getattr(sys, name).buffer.getvalue().decode())


def test_records_and_prints_of_every_thread_are_collected() -> None:
    with collecting() as collected:

        def say(who: str) -> None:
            logging.getLogger("train").warning("logged by %s", who)
            print(f"printed by {who}")
            print(f"on stderr by {who}", file=sys.stderr)

        say("main")
        in_thread(lambda: say("thread"))
        assert collected == [
            (name, level, f"{what} by {who}")
            for who in ("main", "thread")
            for name, level, what in (
                ("train", logging.WARNING, "logged"),
                ("stdout", logging.INFO, "printed"),
                ("stderr", logging.ERROR, "on stderr"),
            )
        ]
        assert printed("stdout") == "printed by main\nprinted by thread\n"


def test_what_a_handler_prints_is_no_print() -> None:
    with collecting() as collected:
        logger = logging.getLogger("test.doubled")
        handler = logging.StreamHandler(sys.stderr)
        logger.addHandler(handler)
        logger.warning("once")
        logger.removeHandler(handler)
        print("then printed", file=sys.stderr)
        assert collected == [("test.doubled", 30, "once"), ("stderr", 40, "then printed")]
        assert printed("stderr") == "once\nthen printed\n"


def test_neither_a_logger_without_propagation_nor_a_new_configuration_loses_records() -> None:
    with collecting() as collected:
        logger = logging.getLogger("test.alone")
        logger.propagate = False
        logger.addHandler(logging.StreamHandler(io.StringIO()))
        logger.warning("alone")
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"handlers": []}})
            logging.getLogger("test.after").warning("after")
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        assert collected == [("test.alone", 30, "alone"), ("test.after", 30, "after")]


def test_loggers_and_handlers_stay_as_they_are() -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.Logger.callHandlers, sys.stdout.write
    capture = ProcessCapture(lambda record: None)
    capture.attach()
    assert (root.level, list(root.handlers)) == before[:2]
    capture.detach()
    assert (root.level, list(root.handlers), logging.Logger.callHandlers, sys.stdout.write) == before


def test_levels_and_filters_hold() -> None:
    with collecting() as collected:
        logger = logging.getLogger("test.levels")
        logger.setLevel(logging.WARNING)
        logger.info("too low")
        logger.addFilter(lambda record: "not this" not in record.getMessage())
        logger.warning("not this")
        assert collected == []


def test_zenml_collects_what_has_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collected:
        from composite_logstore import zenml

        context: Any = SimpleNamespace(_disabled=True)

        def run() -> None:
            zenml.activate(context)
            logging.getLogger("train").warning("with a context")
            print("with a context")

        contextvars.Context().run(run)
        assert collected == []


@pytest.mark.parametrize("name", ["composite-logstore child", "fsspecIO"])
def test_what_exporters_log_and_print_is_left_out(name: str) -> None:
    with collecting() as collected:

        def say() -> None:
            logging.getLogger("urllib3").warning("Retrying")
            print("printed by an exporter")

        thread = threading.Thread(target=say, name=f"{name} 1")
        thread.start()
        thread.join()
        logging.getLogger("composite_logstore.delivery").warning("Child 'a' is unavailable")
        assert collected == []


def test_no_failure_reaches_the_program_and_no_record_causes_others_without_end() -> None:
    calls: list[str] = []

    def fail(record: logging.LogRecord) -> None:
        calls.append(record.getMessage())
        logging.getLogger("other").error("about a record")
        raise ValueError("defect")

    capture = ProcessCapture(fail)
    capture.attach()
    try:
        logging.getLogger("train").warning("hello")
        logging.getLogger("train").warning("again")
    finally:
        capture.detach()
    assert calls == ["hello", "about a record", "again", "about a record"]


class Silent(logging.Handler):
    """Does nothing, where another one's formatter would raise."""

    def emit(self, record: logging.LogRecord) -> None:
        pass


def test_what_is_logged_while_a_record_is_taken_in_follows_it() -> None:
    class Value:
        def __str__(self) -> str:
            logger.warning("shown")
            return "value"

    logger = logging.Logger("test")
    logger.addHandler(Silent())
    messages: list[str] = []
    capture = ProcessCapture(lambda record: messages.append(record.getMessage()))
    capture.attach()
    try:
        logger.warning("the %s", Value())
        logger.warning("next")
    finally:
        capture.detach()
    assert messages == ["the value", "shown", "next"]


@pytest.mark.parametrize("value", sorted(VALUES))
def test_whatever_a_record_s_names_are_it_is_collected(value: str) -> None:
    logger = logging.Logger("test")
    logger.addHandler(Silent())
    odd = [make_record(name=VALUES[value]()), make_record(threadName=VALUES[value]()), without("name", "threadName")]
    collected: list[logging.LogRecord] = []
    capture = ProcessCapture(collected.append)
    capture.attach()
    try:
        for record in odd:
            logger.handle(record)
    finally:
        capture.detach()
    assert [id(record) for record in collected] == [id(record) for record in odd]


@pytest.mark.parametrize("is_worker", [True, False])
def test_what_ray_s_workers_print_for_ray_is_left_out(is_worker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(global_worker=SimpleNamespace(mode=int(is_worker)), WORKER_MODE=1)
    monkeypatch.setitem(sys.modules, "ray._private.worker", ray)
    for_ray = [
        ":job_id:01000000",
        ":actor_name:Trainer",
        ":task_name:fit",
        '{"__magic_token__": "__ray_tqdm_m", "x": 3}',
    ]
    with collecting() as collected:
        for text in (*for_ray, "fit :task_name:"):
            print(f"{text}\n", end="", file=sys.stderr)
        assert [message.rstrip("\n") for _, _, message in collected] == [
            *([] if is_worker else for_ray),
            "fit :task_name:",
        ]
        # Ray reads it there.
        assert printed("stderr").count("\n") == len(for_ray) + 1


class OddText(str):
    """A text none of whose own methods can be relied on."""

    def startswith(self, *_: Any) -> bool:
        raise RuntimeError


def test_a_text_that_is_a_string_of_another_class_is_printed_and_collected() -> None:
    with collecting() as collected:
        sys.stdout.write(OddText("epoch 1\n"))
        assert printed("stdout") == "epoch 1\n"
        assert [message for _, _, message in collected] == ["epoch 1\n"]


@pytest.mark.parametrize("stream", [None, object(), SimpleNamespace(write=None), io.StringIO()])
def test_a_stream_that_cannot_be_wrapped_is_left_alone(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    capture = ProcessCapture(lambda record: None)
    capture.attach()
    capture.detach()
    assert sys.stdout is stream


def test_a_logger_that_a_library_keeps_for_itself_is_left_out() -> None:
    with collecting() as collected:
        logger = logging.getLogger("test.kept")
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]
        logger.warning("nobody sees this")
        logger.handlers = [logging.StreamHandler(io.StringIO())]
        logger.handlers[0].setLevel(logging.ERROR)
        logger.warning("nor this")
        logger.error("but this")
        logging.getLogger("test.kept.child").error("and this")
        logger.propagate = True
        logger.handlers = [logging.NullHandler()]
        logger.warning("and this, too")
    assert [message for _, _, message in collected] == ["but this", "and this", "and this, too"]
