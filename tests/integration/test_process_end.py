"""However a process ends, it ends in time, and what it has logged is delivered or counted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deep import mostly_deep
from tests.simulation import assert_accounts_add_up

pytestmark = pytest.mark.process

# Python 3.12.3 starts threads again until all that are no daemons have ended: https://github.com/python/cpython/pull/117029
STARTS_NO_THREAD_AT_THE_END = (3, 12, 0) <= sys.version_info[:3] < (3, 12, 3)

# Three seconds, and the interpreter's own end on a busy machine. Without the limit, it would be a minute or more.
HELD_SECONDS = 30

PRELUDE = """
import atexit, faulthandler, json, logging, os, signal, sys, threading, time
from composite_logstore import RetryableError, log_store
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig
from tests.simulation import make_child, make_logs, make_store

# Needs no ZenML configuration.
log_store._active_artifact_store_id = lambda: None

# Whoever runs the tests may have it ignored, as shells do with what runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What hangs says where.
faulthandler.dump_traceback_later(100, exit=True)

class File(SimulatedBackend):
    # What has arrived outlives the process.
    def export(self, batch):
        result = super().export(batch)
        with open("delivered", "a") as file:
            file.writelines(event.message + "\\n" for event in batch)
        return result

living, dead, hung = File(), SimulatedBackend(), SimulatedBackend()
dead.fault = RetryableError("connection refused")
hung.fault = "silent"
# A batch would wait for a minute: what arrives in time arrives since the process ends.
store = make_store(
    make_child("living", living, schedule_delay_millis=60_000),
    make_child("dead", dead),
    make_child("hung", hung),
    flush_timeout_millis=60_000,
    flush_limit_millis=60_000,
)
logs = make_logs(store)
origin = store.register_origin("step", logs, {})

def log(*messages):
    for message in messages:
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))
"""


class Ended:
    def __init__(self, folder: Path, body: str, interrupt_after: float | None = None) -> None:
        script = folder / "script.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            assert process.stdout is not None
            # Byte by byte: what `readline` has read ahead `communicate` would not see.
            while os.read(process.stdout.fileno(), 1) not in (b"\n", b""):
                pass
            if interrupt_after is not None:
                time.sleep(interrupt_after)
                # Python loses a Ctrl-C that comes in the middle of a weak reference's callback.
                process.send_signal(signal.SIGINT)
                deadline = time.monotonic() + 30
                while not (folder / "interrupted").exists() and time.monotonic() < deadline:
                    time.sleep(0.5)
                    process.send_signal(signal.SIGINT)
            begin = time.monotonic()
            self.output, self.errors = process.communicate(timeout=150)
        finally:
            process.kill()
            process.wait()
        self.seconds = time.monotonic() - begin
        self.code = process.returncode
        delivered = folder / "delivered"
        self.delivered = delivered.read_text().splitlines() if delivered.exists() else []


def on_disk(folder: Path) -> int:
    """Return how many events a process has left in the spool."""
    return sum(segment.read_bytes().count(b'"/code/train.py"') for segment in folder.glob("spool/*/*/*.log"))


@pytest.mark.parametrize(
    ("end", "code"),
    mostly_deep(
        [
            ("threading.Thread(target=lambda: (time.sleep(0.2), log('late'))).start()", 0),
            ("raise KeyboardInterrupt", -signal.SIGINT),
            ("pass", 0),
            ("sys.exit(3)", 3),
            ("raise ValueError('the step failed')", 1),
        ],
    ),
)
def test_an_orderly_end_delivers_what_can_be_delivered_in_three_seconds(tmp_path: Path, end: str, code: int) -> None:
    ended = Ended(tmp_path, f"log('a', 'b', 'c')\nprint('logged', flush=True)\n{end}")
    assert ended.code == code
    assert ended.delivered == ["a", "b", "c"] + ["late"] * ("late" in end)
    # A dead child and one that hangs hold the process for 3 seconds; the rest is the interpreter's own end.
    assert ended.seconds < HELD_SECONDS
    number = len(ended.delivered)
    assert f"{number} for child 'dead', {number} for child 'hung'" in ended.output + ended.errors


@pytest.mark.parametrize(("takes", "is_done"), mostly_deep([(1.0, True), (100.0, False)]))
def test_what_is_to_be_done_for_a_stream_that_has_ended_is_waited_for_in_these_three_seconds(
    tmp_path: Path, takes: float, is_done: bool
) -> None:
    """Such as merging the objects of the archive. Only for a child that has delivered everything."""
    ended = Ended(
        tmp_path,
        f"""
        def end_stream(stream):
            time.sleep({takes})
            open("done", "w").close()
        living.end_stream = end_stream
        dead.fault = hung.fault = None
        log("a")
        store.deregister_origin(origin)
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0
    assert ended.delivered == ["a"]
    assert (tmp_path / "done").exists() == is_done
    assert ended.seconds < HELD_SECONDS


@pytest.mark.parametrize("durability", mostly_deep(["spill", "memory"]))
def test_an_exporter_that_needs_an_executor_has_one(tmp_path: Path, durability: str) -> None:
    """As s3fs does, to look up a host's name. Executors are gone before the first exit handler runs."""
    ended = Ended(
        tmp_path,
        f"""
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(1)
        class Remote(File):
            def export(self, batch):
                try:
                    return pool.submit(super().export, batch).result()
                except RuntimeError as error:
                    raise RetryableError("no executor") from error
        store = make_store(
            make_child("remote", Remote(), schedule_delay_millis=60_000),
            make_child("dead", dead),
            durability={durability!r},
            spool_directory=os.path.abspath("spool"),
        )
        logs = make_logs(store)
        origin = store.register_origin("step", logs, {{}})
        log("a", "b")
        # Its executor is made later than the log store's handler.
        threading.Thread(target=lambda: (time.sleep(0.1), log("c"))).start()
        log("d")
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0, ended.errors
    assert ended.seconds < HELD_SECONDS
    if STARTS_NO_THREAD_AT_THE_END:
        # The executor has none yet.
        assert ended.delivered == []
        assert "4 for child 'remote'" in ended.output + ended.errors
        assert on_disk(tmp_path) == (4 if durability == "spill" else 0)
    else:
        assert ended.delivered[:3] == ["a", "b", "d"]


@pytest.mark.parametrize("fails", mostly_deep(["Writer.flush", "Summaries.wait", "Recovery.stop", "Worker.stop"]))
def test_each_step_of_the_end_is_guarded_by_itself(tmp_path: Path, fails: str) -> None:
    """Whatever one of them raises, what is not delivered is on disk, and a line says so."""
    ended = Ended(
        tmp_path,
        f"""
        from composite_logstore.delivery.recovery import Recovery
        from composite_logstore.delivery.step_metadata import Summaries
        from composite_logstore.delivery.worker import Worker
        from composite_logstore.delivery.writer import Writer

        disk = os.path.abspath("spool")
        for _ in range(2):
            store = make_store(make_child("dead", dead), durability="spill", spool_directory=disk)
            origin = store.register_origin("step", make_logs(store), {{}})
            log("a", "b")

        def fail(*_, **__):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        {fails} = fail
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0, ended.errors
    assert (ended.output + ended.errors).count("2 for child 'dead'") == 2
    assert on_disk(tmp_path) == 4
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("is_flooded", mostly_deep([True, False]))
def test_what_is_logged_while_the_interpreter_ends_raises_nothing(tmp_path: Path, is_flooded: bool) -> None:
    ended = Ended(
        tmp_path,
        f"""
        class Late:
            def __del__(self):
                log("from a finalizer")
        late = Late()
        atexit.register(log, "from an exit handler")
        log("a")
        def tick():
            while True:
                log("tick")
                time.sleep(0 if {is_flooded} else 0.01)
        threading.Thread(target=tick, daemon=True).start()
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0
    assert "Traceback" not in ended.errors
    # The thread may log faster than a busy machine delivers.
    if not (is_flooded and "child 'living': events are dropped" in ended.output + ended.errors):
        assert ended.delivered[0] == "a"
        assert "from an exit handler" in ended.delivered


@pytest.mark.parametrize("durability", mostly_deep(["spill", "memory"]))
def test_an_exit_handler_that_logs_the_first_event_of_all(tmp_path: Path, durability: str) -> None:
    """Python 3.12 starts no thread by then: what is not delivered is counted, and on disk where there is a spool."""
    ended = Ended(
        tmp_path,
        f"""
        store = make_store(
            make_child("living", living), durability={durability!r}, spool_directory=os.path.abspath("spool")
        )
        origin = store.register_origin("step", make_logs(store), {{}})
        atexit.register(log, "first")
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0, ended.errors
    assert "Traceback" not in ended.errors
    if ended.delivered:
        assert ended.delivered == ["first"]
        return
    assert "1 for child 'living'" in ended.output + ended.errors
    assert on_disk(tmp_path) == (durability == "spill")


def test_a_step_in_a_forked_process_prints_through_its_parent(tmp_path: Path) -> None:
    ended = Ended(
        tmp_path,
        """
        import multiprocessing
        def work(number):
            log(f"worker {number}")
        if __name__ == "__main__":
            log("a")
            context = multiprocessing.get_context("fork")
            with context.Pool(2) as pool:
                pool.map(work, range(20))
            log("z")
            print("logged", flush=True)
        """,
    )
    assert ended.code == 0
    assert ended.delivered[0] == "a"
    assert sorted(ended.delivered[1:]) == sorted([*(f"worker {number}" for number in range(20)), "z"])


def test_a_part_of_a_line_arrives_when_its_process_ends(tmp_path: Path) -> None:
    """Also in a process of `multiprocessing`, which skips the exit handlers."""
    ended = Ended(
        tmp_path,
        """
        import multiprocessing
        from tests.simulation import Context
        def work():
            print("worker", "line")
            print("worker part", end="")
        if __name__ == "__main__":
            Context(store).__enter__()
            worker = multiprocessing.get_context("fork").Process(target=work)
            worker.start()
            worker.join()
            print("printed", flush=True)
            print("part", end="")
        """,
    )
    assert ended.code == 0
    # What a forked process says may arrive after what its parent says later.
    of_worker = [message for message in ended.delivered if message.startswith("worker")]
    assert of_worker == ["worker line", "worker part"]
    assert [message for message in ended.delivered if message not in of_worker] == ["printed", "part"]


@pytest.mark.parametrize("seed", mostly_deep(random.randrange(10**6) for _ in range(4)), ids=lambda seed: "random")
def test_a_ctrl_c_at_any_point_leaves_the_accounts_right(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    ended = Ended(
        tmp_path,
        """
        try:
            print("logging", flush=True)
            number = 0
            while True:
                log(str(number))
                number += 1
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        open("interrupted", "w").close()
        hung.fault = None
        store.writer.flush(2, 2)
        print(json.dumps({"stats": store.stats(), "number": number}), flush=True)
        """,
        interrupt_after=random.Random(seed).uniform(0, 0.3),
    )
    assert ended.code == 0, ended.errors
    said: dict[str, Any] = json.loads(next(line for line in ended.output.splitlines() if line.startswith("{")))
    for child in said["stats"].values():
        assert_accounts_add_up({"": child})
        # The event in whose middle the Ctrl-C came is there, or it is not.
        assert child["accepted"] in (said["number"], said["number"] + 1)
    numbers = [int(line) for line in ended.delivered]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= said["stats"]["living"]["delivered"]


@pytest.mark.parametrize("place", mostly_deep(["the import of a backend", "an export"]))
def test_a_thread_that_is_in_pydantic_at_the_end_does_not_abort_the_process(tmp_path: Path, place: str) -> None:
    (tmp_path / "slow_models.py").write_text(
        textwrap.dedent(
            """
            import builtins
            from pydantic import BaseModel, field_validator
            class Model(BaseModel):
                number: int
                @field_validator("number")
                @classmethod
                def spend_time(cls, number):
                    return sum(range(10_000)) and number
            while hasattr(builtins, "is_endless"):
                Model(number=1)
            """
        )
    )
    ended = Ended(
        tmp_path,
        f"""
        import builtins, slow_models
        def validate(batch):
            if {place!r} == "an export":
                while True:
                    slow_models.Model(number=1)
            builtins.is_endless = True
            del sys.modules["slow_models"]
            import slow_models as again
        hung.fault = None
        hung.export = validate
        log("a")
        print("logged", flush=True)
        """,
    )
    assert ended.code == 0, ended.errors[-2000:]
    assert ended.delivered == ["a"]
