"""Agents and processes that are killed at any instant, while backends fail: all that was logged arrives, in order."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.crashing import LogStoreSettings, Nursery, Pipeline, backlogs_in, name_of
from tests.integration.test_process_deaths import hasty_children
from tests.servers.three_backends import Servers, ThreeBackends, assert_in_order, without_copies
from tests.watching import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.process, pytest.mark.deep]

PROCESSES = 4
AGENTS = 5


def log_until_killed(pipeline: Pipeline) -> None:
    pipeline.log_while(lambda: True)


def log_until_told(pipeline: Pipeline) -> None:
    """Log until the test calls `tell`, flush, and report the accounts."""
    told = threading.Event()

    def listen() -> None:
        pipeline.listen()
        told.set()

    threading.Thread(target=listen, daemon=True).start()
    pipeline.log_while(lambda: not told.is_set())
    pipeline.store.flush()
    pipeline.say("stats", json.dumps(pipeline.store.stats()))


def be_agent(pipeline: Pipeline) -> None:
    """Run an agent for the log store, which no ZenML knows, until it is killed."""
    agent: Any = import_module("composite_logstore.operations.agent")
    store = import_module("composite_logstore.operations.inventory").LogStore
    found = [store(pipeline.log_store.id, "logs", pipeline.store.config)]
    agent.registered, agent.check_server = lambda: found, lambda: None
    one = agent.Agent(str(pipeline.log_store.settings["spool_directory"]), warn=lambda text: None)
    one.begin()
    pipeline.say("begun")
    one.run(threading.Event())


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers.running(tmp_path_factory.mktemp("agents")) as servers:
        yield servers


@pytest.mark.parametrize("delivery", ["process", "agent", "auto"])
def test_whoever_is_killed_nothing_is_lost(nursery: Nursery, servers: Servers, tmp_path: Path, delivery: str) -> None:
    rand = random.Random(7)
    spool = tmp_path / "spool"
    with ThreeBackends(servers) as backends:
        settings = {"durability": "write_ahead", "spool_directory": str(spool), "delivery": delivery}
        log_store = LogStoreSettings(hasty_children(backends), settings, streams=[uuid4()])
        backends.fail("collector", "refused")
        backends.fail("live", "silent")
        logging = [
            nursery.start(log_until_killed, log_store, name=f"p{number}", output=tmp_path / f"p{number}")
            for number in range(PROCESSES)
        ]
        for number in range(AGENTS):
            output = tmp_path / f"agent{number}"
            agent = nursery.start(be_agent, log_store, name=f"agent{number}", output=output)
            assert agent.wait_until_said("begun"), output.read_text()
            if number < PROCESSES:
                assert logging[number].wait_until_said("emitted", 20)
                logging[number].kill()
                logging[number].wait()
            if number == 2:
                backends.mend("collector")
            agent.wait_until_said("never", seconds=rand.uniform(0, 1))
            agent.kill()
            agent.wait()
        backends.mend("live")
        patient = [child.model_copy(update={"export_timeout_millis": 30_000}) for child in log_store.children]
        last = nursery.start(be_agent, replace(log_store, children=patient), name="last", output=tmp_path / "last")
        assert last.wait_until_said("begun"), (tmp_path / "last").read_text()
        wait_until(lambda: not backlogs_in(spool), "all that was left is delivered")
        last.kill()
        last.wait()
        emitted = {said.text for process in logging for said in process.emitted}
        assert len(emitted) >= 20 * PROCESSES
        for child, copies in backends.held(log_store.streams).items():
            held = without_copies(copies)
            assert_in_order(held)
            assert emitted <= {name_of(event.message) for event in held}, child


@pytest.mark.parametrize("delivery", ["agent", "auto"])
def test_an_agent_that_is_killed_again_and_again_loses_nothing_of_a_living_process(
    nursery: Nursery, servers: Servers, tmp_path: Path, delivery: str
) -> None:
    rand = random.Random(11)
    spool = tmp_path / "spool"
    with ThreeBackends(servers) as backends:
        settings = {"durability": "write_ahead", "spool_directory": str(spool), "delivery": delivery}
        log_store = LogStoreSettings(hasty_children(backends), settings, streams=[uuid4()])
        logging = nursery.start(log_until_told, log_store, name="p", output=tmp_path / "p")
        assert logging.wait_until_said("emitted", 20)
        for number in range(AGENTS):
            output = tmp_path / f"agent{number}"
            agent = nursery.start(be_agent, log_store, name=f"agent{number}", output=output)
            assert agent.wait_until_said("begun"), output.read_text()
            agent.wait_until_said("never", seconds=rand.uniform(0.3, 2))
            agent.kill()
            agent.wait()
        last = nursery.start(be_agent, log_store, name="last", output=tmp_path / "last")
        assert last.wait_until_said("begun"), (tmp_path / "last").read_text()
        logging.tell()
        assert logging.wait_until_said("stats"), (tmp_path / "p").read_text()
        assert logging.wait() == 0
        wait_until(lambda: not backlogs_in(spool), "all is delivered")
        last.kill()
        last.wait()
        emitted = [said.text for said in logging.emitted]
        (said,) = logging.said("stats")
        for account in json.loads(said.text).values():
            assert account["accepted"] == len(emitted)
            assert account["delivered"] + account["pending"] == len(emitted)
        for child, copies in backends.held(log_store.streams).items():
            held = without_copies(copies)
            assert_in_order(held)
            assert [name_of(event.message) for event in held] == emitted, child


def test_last_words_arrive_within_two_seconds(nursery: Nursery, servers: Servers, tmp_path: Path) -> None:
    with ThreeBackends(servers) as backends:
        settings = {"durability": "write_ahead", "spool_directory": str(tmp_path / "spool"), "delivery": "agent"}
        log_store = LogStoreSettings(hasty_children(backends), settings, streams=[uuid4()])
        agent = nursery.start(be_agent, log_store, name="agent", output=tmp_path / "agent")
        assert agent.wait_until_said("begun"), (tmp_path / "agent").read_text()
        taken = []
        for number in range(3):
            process = nursery.start(log_until_killed, log_store, name=f"p{number}", output=tmp_path / f"p{number}")
            assert process.wait_until_said("emitted", 50)
            process.kill()
            began = time.monotonic()
            process.wait()
            last = process.emitted[-1].text

            def has_arrived(last: str = last) -> bool:
                return all(
                    any(name_of(event.message) == last for event in copies)
                    for copies in backends.held(log_store.streams).values()
                )

            wait_until(has_arrived, "the last words have arrived")
            taken.append(time.monotonic() - began)
        # The machine may be busy now and then.
        assert min(taken) < 2
