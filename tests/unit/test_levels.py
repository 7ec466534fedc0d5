"""The level of what is printed to stderr: a setting, or what each line says of itself."""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from typing import Any

import pytest
from loguru import logger as loguru_logger
from zenml.logger import ZenMLLoggingHandler

from composite_logstore.capture import zenml_handler
from composite_logstore.capture.levels import LOOKED_AT_CHARACTERS, detect_level
from composite_logstore.capture.record import captured, note
from composite_logstore.testing import SimulatedBackend
from tests.events import make_stream
from tests.simulation import make_child, make_logs, make_store

D, I, W, E, C = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL  # noqa: E741

SAID = [
    # loguru
    ("2026-01-31 12:00:00.123 | INFO     | train:fit:1 - found no ERROR", I),
    ("2026-01-31 12:00:00.123 | SUCCESS  | train:fit:1 - done", I),
    ("2026-01-31 12:00:00.123 | TRACE    | train:fit:1 - in", D),
    ("\x1b[32m2026-01-31 12:00:00\x1b[0m | \x1b[33m\x1b[1mWARNING \x1b[0m | \x1b[36mtrain\x1b[0m - slow", W),
    # Abseil, glog, klog, TensorFlow, PyTorch
    ("I0131 12:00:00.123456 140 train.py:12] reading", I),
    ("W20260131 12:00:00.123456 140 reader.cc:1] slow", W),
    ("E0000 00:00:1769860800.123456   12345 cuda_dnn.cc:8310] Unable to register", E),
    ("F0131 12:00:00.1 1 check.cc:1] Check failed", C),
    ("2026-01-31 12:00:00.000000: W tensorflow/core/platform/x.cc:1] slow", W),
    ("[W socket.cpp:464] [c10d] The server socket cannot be initialized", W),
    ("[rank0]:[W0131 12:00:00.123 ProcessGroupNCCL.cpp:12] Warning: leaked", W),
    ("[rank0]:[E1031 12:00:00.123 ProcessGroupNCCL.cpp:12] timeout", E),
    # Python's defaults
    ("WARNING:root:slow", W),
    ("DEBUG:trainer.loop:in", D),
    ("2026-01-31 12:00:00,000 - trainer - ERROR - broken", E),
    ("2026-01-31 12:00:00,000 - trainer - INFO - no ERROR", I),
    ("2026-01-31 12:00:00,000 trainer CRITICAL broken", C),
    ("2026-01-31 12:00:00,000 INFO trainer: reading", I),
    ("/code/train.py:12: UserWarning: deprecated\n  warn()", W),
    ("Traceback (most recent call last):\n  File", E),
    ("[rank0]: Traceback (most recent call last):", E),
    ("something happened\nTraceback (most recent call last):", E),
    ("ValueError: bad", E),
    ("torch.cuda.OutOfMemoryError: out of memory", E),
    ("KeyboardInterrupt", E),
    ("Exception in thread Thread-1:", E),
    ("Fatal Python error: Segmentation fault", C),
    # uvicorn, Hydra, Hugging Face, vLLM, rich, Spark, nginx, Rust, wandb, compilers
    ("INFO:     Started server process [1]", I),
    ('\x1b[32mINFO\x1b[0m:     127.0.0.1:1 - "GET /error HTTP/1.1" 500', I),
    ("ERROR:    Exception in ASGI application\nTraceback (most recent call last):", E),
    ("[2026-01-31 12:00:00,000][trainer][INFO] - reading", I),
    ("[WARNING|trainer.py:123] 2026-01-31 12:00:00,000 >> slow", W),
    ("WARNING 01-31 12:00:00 llm_engine.py:72] slow", W),
    ("[12:00:00] WARNING  slow", W),
    ("26/01/31 12:00:00 WARN NativeCodeLoader: Unable to load", W),
    ("2026/01/31 12:00:00 [error] 12#12: broken", E),
    ("2026-01-31T12:00:00.000Z ERROR trainer: broken", E),
    ("wandb: WARNING slow", W),
    ("(pid=123) 2026-01-31 12:00:00,000 WARNING worker.py:1 -- slow", W),
    ("(TrainActor pid=123, ip=10.0.0.1) INFO:     Started server process [1]", I),
    ("[default0]:ERROR:root:broken", E),
    ("[rank3]: ValueError: bad", E),
    ("(INFO) reading", I),
    ("[1] ERROR broken", E),
    ("[LightGBM] [Warning] slow", W),
    ("2026-01-31 12:00:00,000 [main] ERROR trainer - broken", E),
    ("2026-01-31T12:00:00.000Z\tERROR\ttrainer\tbroken", E),
    ("node-1:123:456 [0] NCCL WARN slow", W),
    ("train.c:12:3: error: expected ';'", E),
    ("2026-01-31 12:00:00 [warning  ] slow                 step=3", W),
    ("ts=2026-01-31 level=error msg=broken", E),
    # JSON lines
    ('{"level": "warning", "message": "slow"}', W),
    ('{"message": "{\\"level\\":\\"error\\"}", "severity": "INFO"}', I),
    ('{"request": {"level": "error"}, "levelname": "DEBUG"}', D),
    ('{"tags": [1, {"level": "error"}], "level": 30}', W),
    ('{"log": {"level": "error"}}', E),
    ('{"log.level": "WARN"}', W),
    (json.dumps({"level": "error", "stack": "x" * 5 * LOOKED_AT_CHARACTERS}), E),
]

SAYS_NOTHING = [
    "",
    "\n",
    "{",
    '{"message": "an ERROR',
    "[1, 2",
    "100%|██████████| 10/10 [00:00<00:00, 1.2it/s]",
    "\r 10%|#   | 1/10",
    "Error loading is not an issue",
    "there was No ERROR here",
    "info about the run",
    "test_INFO passed, error-rate 0",
    "compression level=9",
    "Debug mode: on",
]


@pytest.mark.parametrize(("printed", "level"), SAID)
def test_a_line_that_names_its_level_has_it(printed: str, level: int) -> None:
    assert detect_level(printed) == level


@pytest.mark.parametrize("printed", SAYS_NOTHING)
def test_a_line_that_names_no_level_is_no_error(printed: str) -> None:
    assert detect_level(printed) == logging.INFO


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
@pytest.mark.parametrize("serialize", [False, True])
def test_what_loguru_itself_prints_has_its_level(level: str, serialize: bool) -> None:
    printed = io.StringIO()
    sink = loguru_logger.add(printed, level=0, serialize=serialize, colorize=not serialize)
    try:
        loguru_logger.log(level, "no ERROR, no INFO")
    finally:
        loguru_logger.remove(sink)
    assert detect_level(printed.getvalue()) == logging.getLevelName(level)


@pytest.mark.parametrize("level", [D, I, W, E, C])
@pytest.mark.parametrize(
    "form",
    [
        logging.BASIC_FORMAT,
        "%(asctime)s - %(name)s - %(levelname)s - %(message)s",
        "%(asctime)s %(levelname)-8s %(name)s:%(lineno)d %(message)s",
        "[%(asctime)s] [%(levelname)s] %(message)s",
        "%(levelname)s: %(message)s",
        "%(levelname)s %(message)s",
        "%(asctime)s | %(levelname)s | %(message)s",
        "[%(process)d] %(name)s: %(levelname)s: %(message)s",
    ],
)
def test_a_line_of_pythons_formatter_has_its_records_level(form: str, level: int) -> None:
    record = logging.LogRecord("trainer", level, "/code/train.py", 1, "an ERROR, an INFO", (), None)
    assert detect_level(logging.Formatter(form).format(record)) == level


def test_what_pythons_warnings_print_is_a_warning() -> None:
    assert detect_level(warnings.formatwarning("old", DeprecationWarning, "/code/train.py", 3, "call()")) == W


@pytest.mark.parametrize(
    "unit",
    [
        "\x1b[",
        "\x1b[1",
        '\\"',
        "{",
        '{"a":[',
        "a.",
        "ERROR ",
        "level=",
        "a/",
        "1:",
        ": 1: ",
        "x ERROR",
        " ",
        "(pid=1",
        " pid=",
    ],
)
@pytest.mark.parametrize("start", ["", "{", '{"', "[W ", "I0131 "])
def test_the_longest_and_oddest_line_takes_no_time(start: str, unit: str) -> None:
    line = start + unit * 1_000_000
    begin = time.process_time()
    detect_level(line)
    assert time.process_time() - begin < 0.05


def printed(text: str, setting: Any, name: str = "stderr") -> tuple[int, str]:
    level = logging.INFO if name == "stdout" else logging.ERROR
    record = logging.LogRecord(name, level, "", 0, text, (), None, "")
    stream = make_stream()
    stream.stderr_level = setting
    event = captured(note(record), stream)
    return event.level, event.level_name


@pytest.mark.parametrize(
    ("setting", "text", "expected"),
    [
        (logging.ERROR, "INFO:root:fine", (40, "ERROR")),
        (logging.INFO, "ERROR:root:broken", (20, "INFO")),
        (logging.WARNING, "hello", (30, "WARNING")),
        ("detect", "WARNING:root:slow", (30, "WARNING")),
        ("detect", "hello", (20, "INFO")),
        ("detect", "\r 10%|#", (20, "INFO")),
    ],
)
def test_the_setting_decides_on_stderr_and_stdout_stays_as_it_is(
    setting: Any, text: str, expected: tuple[int, str]
) -> None:
    assert printed(text, setting) == expected
    assert printed(text, setting, "stdout") == (20, "INFO")


@pytest.mark.parametrize("setting", [logging.ERROR, logging.CRITICAL, "detect"])
def test_what_another_log_store_forwards_keeps_the_level_that_it_has_decided_on(setting: Any) -> None:
    stream = make_stream()
    stream.stderr_level = setting
    record = logging.LogRecord("stderr", logging.WARNING, "", 0, "DEBUG:root:x", (), None, "")
    assert captured(note(record), stream).level == logging.WARNING


def test_the_record_of_a_logger_named_stderr_keeps_its_level() -> None:
    stream = make_stream()
    stream.stderr_level = "detect"
    record = logging.LogRecord("stderr", logging.CRITICAL, "/code/train.py", 1, "INFO: fine", (), None)
    assert captured(note(record), stream).level == logging.CRITICAL


@pytest.mark.parametrize(
    ("given", "level"),
    [({}, 40), ({"stderr_level": "info"}, 20), ({"stderr_level": 50}, 50), ({"stderr_level": "detect"}, 30)],
)
def test_min_level_and_the_children_see_the_level_of_the_setting(given: dict[str, Any], level: int) -> None:
    every, warned = SimulatedBackend(), SimulatedBackend()
    store = make_store(make_child("every", every), make_child("warned", warned, min_level="WARN"), **given)
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    store.emit(origin, logging.LogRecord("stderr", logging.ERROR, "", 0, "WARNING:root:slow\n", (), None, ""))
    store.deregister_origin(origin)
    assert [event.level for event in every.received] == [level]
    assert len(warned.received) == (level >= 30)


@pytest.mark.parametrize("wrong", ["LOUD", "detected", 35, True, None])
def test_another_setting_is_refused_with_the_choices(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"'stderr_level'.*'detect'.*DEBUG"):
        make_store(make_child("a"), stderr_level=wrong)


@pytest.fixture
def _without_zenmls_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [handler for handler in logging.root.handlers if not isinstance(handler, ZenMLLoggingHandler)]
    monkeypatch.setattr(logging.root, "handlers", others)
    monkeypatch.setattr(zenml_handler, "has_warned", False)


@pytest.mark.usefixtures("_without_zenmls_handler")
@pytest.mark.parametrize("prints", [True, False])
def test_a_root_logger_that_lost_zenmls_handler_is_warned_of_once_in_the_logs(
    prints: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    for _ in range(2):
        logs = make_logs(store)
        origin = store.register_origin(str(logs.id), logs, {})
        for _ in range(3 if prints else 0):
            store.emit(origin, logging.LogRecord("stdout", logging.INFO, "", 0, "hello\n", (), None, ""))
        store.deregister_origin(origin)
    warned = [event for event in backend.received if event.logger_name == "composite_logstore"]
    assert len(warned) == 1
    assert warned[0].level == logging.WARNING
    assert "addHandler(zenml.logger.ZenMLLoggingHandler())" in warned[0].message
    assert [record.message for record in caplog.records].count(warned[0].message) == 1


@pytest.mark.parametrize("is_attached", [True, False])
def test_nothing_is_warned_of_while_the_handler_is_there_or_another_handler_collects(
    is_attached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zenml_handler, "has_warned", False)
    monkeypatch.setattr(logging.root, "handlers", [ZenMLLoggingHandler()] if is_attached else [])
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    logs = make_logs(store)
    if is_attached:
        origin = store.register_origin(str(logs.id), logs, {})
        store.emit(origin, logging.LogRecord("stdout", logging.INFO, "", 0, "hello\n", (), None, ""))
        store.deregister_origin(origin)
    else:
        monkeypatch.setattr("composite_logstore.log_store.open_stream", lambda *_: (logs, {}))
        store.activate(logs.id)
        store.deactivate()
    assert not [event for event in backend.received if event.logger_name == "composite_logstore"]
