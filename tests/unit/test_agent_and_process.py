"""A process and the machine's real agent: what one hands over, the other delivers."""

from __future__ import annotations

from typing import Any

from composite_logstore import UnavailableError
from composite_logstore.operations.agent import Agent
from tests.agents import Place
from tests.simulation import assert_accounts_add_up


def stats(place: Place, child: str = "live") -> dict[str, Any]:
    found = place.store.stats()
    assert_accounts_add_up(found)
    return found[child]


def flush_beside(place: Place, agent: Agent) -> None:
    """Flush as the end of a step does, while the agent works in its own process."""
    is_over = False

    def work() -> None:
        while not is_over:
            agent.look()
            place.clock.advance(0.25)

    place.clock.start(work, "agent")
    place.store.flush()
    is_over = True
    place.clock.advance(1)


def test_the_agent_delivers_and_the_process_accounts_for_it(place: Place) -> None:
    agent = place.agent()
    place.start(delivery="agent")
    place.log("one", "two")
    began = place.clock.now()
    flush_beside(place, agent)
    assert place.clock.now() - began < 3
    assert place.delivered("archive") == place.delivered("live") == ["one", "two"]
    found = stats(place)
    assert (found["accepted"], found["delivered"], found["pending"], found["state"]) == (2, 2, 0, "healthy")
    agent.end()


def test_the_state_of_a_child_is_the_agent_s(place: Place) -> None:
    agent = place.agent()
    place.start(delivery="agent")
    place.backends["live"].fault = UnavailableError("the key is wrong")
    place.log("one")
    place.work(agent, 2)
    found = stats(place)
    assert (found["state"], found["pending"], found["delivered"]) == ("unavailable", 1, 0)
    assert "the key is wrong" in found["last_error"]
    assert stats(place, "archive")["delivered"] == 1
    place.backends["live"].fault = None
    place.work(agent, 90)
    assert (stats(place)["state"], stats(place)["delivered"]) == ("healthy", 1)
    agent.end()


def test_delivery_goes_to_and_fro_in_the_middle_of_logging(place: Place) -> None:
    place.start(delivery="auto")
    said = []

    def log() -> None:
        said.append(str(len(said)))
        place.log(said[-1])

    for _ in range(3):
        log()
        place.clock.advance(2)
        log()
        agent = place.agent()
        for _ in range(8):
            log()
            place.work(agent, 0.5)
        log()
        agent.end()
        log()
        place.clock.advance(2)
    log()
    place.store.flush()
    assert place.delivered("archive") == place.delivered("live") == said
    found = stats(place)
    assert (found["accepted"], found["delivered"], found["pending"], found["dropped"]) == (len(said), len(said), 0, 0)
