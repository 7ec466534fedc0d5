"""What can be lost, and when: each way in which a process can die, in each mode of `durability`.

Meanwhile the collector refuses connections, Datadog takes them and never answers, and the archive is well.
When the process is dead all backends are well again, and the next process of the same log store starts.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import ChildConfig
from tests import crashing
from tests.crashing import LogStoreSettings, Nursery, Said, backlogs_in, deliver_backlog, name_of
from tests.servers.three_backends import CHILDREN, Held, Servers, ThreeBackends, assert_in_order, without_copies
from tests.simulation import assert_accounts_add_up

pytestmark = [pytest.mark.integration, pytest.mark.process]

HASTY: dict[str, Any] = {
    "schedule_delay_millis": 50,
    # A child is unavailable at its first failure, so that no process waits for it at its end.
    "retry_initial_interval_millis": 100,
    "retry_max_interval_millis": 100,
    "export_timeout_millis": 1_000,
}

LAST_SECONDS = 1.0
# What a busy machine may add to it.
MARGIN_SECONDS = 1.0
LONG_SECONDS = LAST_SECONDS + MARGIN_SECONDS + 1.0
SHORT_SECONDS = 0.5

# Exit codes; minus the signal where there was one.
ORDERLY = {"end of program": 0, "sys.exit": 3, "exception": 1, "end of program after a fork": 0}
SUDDEN = {
    # An orderly end, but there may be no memory left to bring the last events to disk with.
    "MemoryError": 1,
    "SIGTERM": -signal.SIGTERM,
    "SIGKILL": -signal.SIGKILL,
    "os._exit": 3,
    "abort for want of memory": -signal.SIGABRT,
    "SIGKILL after a fork": -signal.SIGKILL,
}
CODES = ORDERLY | SUDDEN
IS_LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Death:
    """A process that has died, and the one after it.

    Attributes:
        emitted: The events for which `emit` returned in the first, and in the processes that it forked.
        died_at: When it died, and when those did that it had forked.
        code: Its exit code, or minus the signal.
        output: What it printed.
        spool: The folders that it left in the spool.
        held: What each child's backend holds in the end, without copies.
    """

    emitted: list[Said]
    died_at: list[float]
    code: int
    output: str
    spool: list[Path]
    held: Mapping[str, list[Held]]

    def missing(self, child: str) -> list[Said]:
        """Return what was emitted and the child's backend does not have."""
        names = {name_of(event.message) for event in self.held[child]}
        return [said for said in self.emitted if said.text not in names]


def hasty_children(backends: ThreeBackends, **settings: int) -> list[ChildConfig]:
    archive, *others = backends.children(**HASTY, **settings)
    # It is well, however busy the machine is.
    return [archive.model_copy(update={"export_timeout_millis": 10_000}), *others]


def die(nursery: Nursery, servers: Servers, folder: Path, mode: str, way: str) -> Death:
    folder.mkdir()
    spool, output = folder / "spool", folder / "output"
    # What is lost of its last second is only seen if there is more than that.
    seconds = LONG_SECONDS if mode == "spill" and way in SUDDEN else SHORT_SECONDS
    last, forks, _ = way.partition(" after a fork")
    with ThreeBackends(servers) as backends:
        settings = {"durability": mode, "spool_directory": str(spool)}
        log_store = LogStoreSettings(hasty_children(backends), settings)
        backends.fail("collector", "refused")
        backends.fail("live", "silent")
        program = crashing.fork_and_die if forks else crashing.log_and_die
        process = nursery.start(program, log_store, seconds, last, output=output)
        code = process.wait()
        printed, left = output.read_text(), backlogs_in(spool)
        for child in ("collector", "live"):
            backends.mend(child)
        deliver_backlog(nursery, log_store, spool, folder / "next")
        held = {child: without_copies(copies) for child, copies in backends.held(log_store.streams).items()}
    for events in held.values():
        assert_in_order(events)
    return Death(process.emitted, [said.time for said in process.said("dying")], code, printed, left, held)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers.running(tmp_path_factory.mktemp("deaths")) as servers:
        yield servers


@pytest.fixture(scope="module")
def death(
    nursery: Nursery, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Death]]:
    """Tells what came of a process: by its mode, and the way in which it died."""
    folder = tmp_path_factory.mktemp("processes")
    with ThreadPoolExecutor(12) as pool:
        # They mostly wait, so they die side by side; first those that take longest.
        deaths = {
            (mode, way): pool.submit(die, nursery, servers, folder / f"{mode} {way}", mode, way)
            for mode in ("spill", "write_ahead", "memory")
            for way in reversed(CODES)
            if IS_LINUX or "memory" not in way.lower()
        }

        def death(mode: str, way: str) -> Death:
            if (mode, way) not in deaths:
                pytest.skip("only Linux keeps to a limit on a process's memory")
            death = deaths[mode, way].result()
            assert death.code == CODES[way]
            assert death.emitted
            return death

        yield death


def is_of_the_last_second(death: Death, said: Said) -> bool:
    """Return whether something was said in the last second of the process, or of one that it had forked."""
    return any(
        died_at - LAST_SECONDS - MARGIN_SECONDS < said.time < died_at + MARGIN_SECONDS for died_at in death.died_at
    )


def losses_said(death: Death) -> list[str]:
    return [line for line in death.output.splitlines() if "could not be delivered" in line]


# memory


@pytest.mark.parametrize("way", ORDERLY)
def test_memory_says_in_one_line_what_is_left_at_an_orderly_end(death: Callable[[str, str], Death], way: str) -> None:
    ended = death("memory", way)
    number = len(ended.emitted)
    (line,) = losses_said(ended)
    assert f": {number} for child 'collector', {number} for child 'live'." in line
    assert ended.missing("archive") == []
    assert ended.missing("collector") == ended.missing("live") == ended.emitted
    assert ended.spool == []


@pytest.mark.parametrize("way", SUDDEN)
def test_memory_loses_what_is_pending_at_a_sudden_death(death: Callable[[str, str], Death], way: str) -> None:
    died = death("memory", way)
    assert len(died.missing("archive")) < len(died.emitted)
    assert died.missing("collector") == died.missing("live") == died.emitted
    assert died.spool == []


# spill


@pytest.mark.parametrize("way", ORDERLY)
def test_spill_loses_nothing_at_an_orderly_end(death: Callable[[str, str], Death], way: str) -> None:
    ended = death("spill", way)
    assert losses_said(ended) == []
    assert ended.spool
    for child in CHILDREN:
        assert ended.missing(child) == []


@pytest.mark.parametrize("way", SUDDEN)
def test_spill_loses_at_most_the_last_second_at_a_sudden_death(death: Callable[[str, str], Death], way: str) -> None:
    died = death("spill", way)
    assert died.spool
    assert sum(not is_of_the_last_second(died, said) for said in died.emitted) > 10
    for child in CHILDREN:
        assert [said for said in died.missing(child) if not is_of_the_last_second(died, said)] == []


# write_ahead


@pytest.mark.parametrize("way", [way for way in CODES if way != "SIGKILL after a fork"])
def test_write_ahead_loses_nothing_at_any_death(death: Callable[[str, str], Death], way: str) -> None:
    died = death("write_ahead", way)
    assert died.spool
    for child in CHILDREN:
        assert died.missing(child) == []


def test_write_ahead_loses_what_forked_processes_are_telling_a_parent_that_is_killed(
    death: Callable[[str, str], Death],
) -> None:
    died = death("write_ahead", "SIGKILL after a fork")
    killed_at = died.died_at[0]
    for child in CHILDREN:
        for said in died.missing(child):
            # Thread 0 is the parent's own; the others are on by themselves when it is gone.
            assert not said.text.startswith("a/0/")
            assert abs(said.time - killed_at) < MARGIN_SECONDS
    assert any(said.time > killed_at + MARGIN_SECONDS for said in died.emitted)


def roomier(log_store: LogStoreSettings) -> LogStoreSettings:
    """Return the settings for the next process: its own events must not push out those that the first one has left."""
    return replace(log_store, settings={**log_store.settings, "spool_max_bytes": 64 * 1024 * 1024})


def test_write_ahead_counts_as_dropped_what_spool_max_bytes_has_no_room_for(
    nursery: Nursery, servers: Servers, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    in_memory = 20
    with ThreeBackends(servers) as backends:
        settings = {"durability": "write_ahead", "spool_directory": str(spool), "spool_max_bytes": 16 * 1024 * 1024}
        children = hasty_children(backends, max_queue_size=in_memory // 2, max_export_batch_size=in_memory // 2)
        log_store = LogStoreSettings(children, settings)
        backends.fail("collector", "refused")
        backends.fail("live", "silent")
        # About twice as much as there is room for.
        process = nursery.start(crashing.log_and_wait, log_store, 1_000, 32_000, output=tmp_path / "output")
        assert process.wait_until_said("stats")
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for child in ("collector", "live"):
            backends.mend(child)
        deliver_backlog(nursery, roomier(log_store), spool, tmp_path / "next")
        held = backends.held(log_store.streams)
    stats = json.loads(process.said("stats")[0].text)
    assert_accounts_add_up(stats)
    emitted = [said.text for said in process.emitted]
    for child in CHILDREN:
        names = [name_of(event.message) for event in without_copies(held[child])]
        names.remove("next/0/0")
        lost = len(emitted) - len(names)
        # The oldest had to make room, and no other.
        assert names == emitted[lost:]
        # A batch that is just being exported counts as pending until that has ended, and may yet be delivered.
        assert stats[child]["dropped"] <= lost <= stats[child]["dropped"] + in_memory // 2
    assert stats["archive"]["dropped"] == 0
    assert stats["collector"]["dropped"] > 100


def test_write_ahead_has_on_disk_or_counts_as_dropped_what_waits_for_a_child(
    nursery: Nursery, servers: Servers, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    with ThreeBackends(servers) as backends:
        settings = {"durability": "write_ahead", "spool_directory": str(spool), "spool_max_bytes": 16 * 1024 * 1024}
        # All of it fits into the queues, and half of it on disk.
        log_store = LogStoreSettings(hasty_children(backends, max_export_batch_size=50), settings)
        backends.fail("collector", "refused")
        backends.fail("live", "silent")
        process = nursery.start(crashing.log_and_wait, log_store, 1_000, 32_000, output=tmp_path / "output")
        assert process.wait_until_said("stats")
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for child in ("collector", "live"):
            backends.mend(child)
        deliver_backlog(nursery, roomier(log_store), spool, tmp_path / "next")
        held = backends.held(log_store.streams)
    stats = json.loads(process.said("stats")[0].text)
    for child in CHILDREN:
        names = {name_of(event.message) for event in held[child]}
        lost = [said.text for said in process.emitted if said.text not in names]
        # A batch that is just being exported counts as pending until that has ended, and may yet be delivered.
        assert len(lost) <= stats[child]["dropped"] + 50
    assert stats["collector"]["dropped"] > 100


# Any


def test_what_is_logged_right_before_the_end_is_delivered(nursery: Nursery, servers: Servers, tmp_path: Path) -> None:
    with ThreeBackends(servers) as backends:
        # A batch would wait for a minute.
        log_store = LogStoreSettings(backends.children(schedule_delay_millis=60_000), {"durability": "memory"})
        process = nursery.start(crashing.log_and_end, log_store, output=tmp_path / "output")
        assert process.wait() == 0
        held = backends.held(log_store.streams)
    for child in CHILDREN:
        assert [name_of(event.message) for event in held[child]] == ["a/0/0"]
    assert (tmp_path / "output").read_text() == ""
