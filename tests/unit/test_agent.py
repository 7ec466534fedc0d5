"""The agent: it delivers what dead processes leave, with the present settings, and leaves the living alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from click.testing import CliRunner

from composite_logstore import LogEvent, UnavailableError
from composite_logstore.catalog.errors import ArgumentError, OperationError
from composite_logstore.cli.main import main
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.operations import agent_health
from composite_logstore.operations.agent import ALIVE_SECONDS, SETTINGS_SECONDS, Agent
from composite_logstore.operations.agent_health import Health, metrics, parsed_address
from composite_logstore.spool import lock
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.reader import SegmentReader
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig
from tests.agents import Living, Place
from tests.patience import PATIENCE_SECONDS
from tests.watching import wait_until

# Deaths


def test_what_a_dead_process_has_left_is_delivered_to_all_children_within_two_seconds(place: Place) -> None:
    place.leave("one", "last words")
    agent = place.agent()
    place.work(agent, 2)
    assert place.delivered("archive") == place.delivered("live") == ["one", "last words"]
    assert place.folders == []
    agent.end()


def test_a_death_is_noticed_though_the_process_was_alive_when_the_agent_began(place: Place) -> None:
    place.backends["live"].fault = UnavailableError("gone")
    place.start()
    place.log("one")
    agent = place.agent()
    place.work(agent, 5)
    assert agent.processes[0][1:] == (1, 0)
    assert place.delivered("live") == []
    place.log("last words")
    place.die()
    place.backends["live"].fault = None
    place.work(agent, 2)
    assert place.delivered("live") == ["one", "last words"]
    assert place.folders == []


def test_one_process_after_the_other_is_delivered_while_the_agent_runs(place: Place) -> None:
    for number in range(5):
        place.leave(f"{number}")
    agent = place.agent()
    place.work(agent, 3)
    assert place.delivered("archive") == [*map(str, range(5))]
    assert place.folders == []
    counts = {one.child: dict(one.outcomes) for one in agent.delivered}
    assert counts["live"] == {"delivered": 5, "rejected": 0, "dropped": 0, "withheld": 0}
    agent.end()


def test_a_folder_that_another_process_recovers_is_delivered_once(place: Place) -> None:
    place.leave("one")
    (folder,) = place.folders
    sibling = Spool.recover(folder)
    assert sibling is not None
    agent = place.agent()
    place.work(agent, 3)
    assert place.delivered("archive") == []
    # It dies before it has delivered anything.
    sibling.abandon()
    place.work(agent, 2)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_a_folder_that_another_process_locks_for_a_moment_is_delivered(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.leave("one")
    recover = Spool.recover
    looks = []

    def held(folder: Path) -> Spool | None:
        # As `composite-logstore spool list` does: it locks the folder after the agent has found it free.
        other = recover(folder) if not looks else None
        looks.append(folder)
        try:
            return recover(folder)
        finally:
            if other is not None:
                other.abandon()

    monkeypatch.setattr(Spool, "recover", held)
    agent = place.agent()
    place.work(agent, 3)
    assert place.delivered("archive") == ["one"]
    assert len(looks) == 2
    assert len([text for text in place.told if "has left" in text]) == 1
    agent.end()


def test_a_lock_that_was_exchanged_does_not_hide_the_death_of_its_process(place: Place) -> None:
    place.backends["live"].fault = UnavailableError("gone")
    place.start()
    place.log("one")
    agent = place.agent()
    place.work(agent, 1)
    (folder,) = place.folders
    (folder / "owner.lock").unlink()
    place.clock.advance(3)
    place.work(agent, 3)
    assert place.delivered("live") == []
    place.die()
    place.backends["live"].fault = None
    place.work(agent, 2)
    assert place.delivered("live") == ["one"]


def test_a_folder_that_cannot_be_read_delays_no_later_one(place: Place) -> None:
    place.leave("one")
    (bad,) = place.folders
    bad.chmod(0o777)
    agent = place.agent()
    place.work(agent, 1)
    assert len([text for text in place.said if str(bad) in text]) == 1
    agent.end()
    place.said.clear()
    place.leave("two")
    agent = place.agent()
    place.work(agent, 2)
    assert place.delivered("archive") == ["two"]
    bad.chmod(0o700)
    place.work(agent, 120)
    assert place.delivered("archive") == ["two", "one"]
    agent.end()


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOENT])
def test_a_directory_that_cannot_be_read_for_a_moment_is_looked_at_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    place.leave("one")
    (folder,) = place.folders
    sibling = Spool.recover(folder)
    assert sibling is not None
    os.utime(folder.parent, (1e9, 1e9))
    agent = place.agent()
    place.work(agent, 1)
    with monkeypatch.context() as patch:
        stat = os.stat

        def fail(path: Any, **options: Any) -> os.stat_result:
            if path == folder.parent:
                raise OSError(error, os.strerror(error))
            return stat(path, **options)

        patch.setattr(os, "stat", fail)
        place.work(agent, 1)
    sibling.abandon()
    place.work(agent, 2)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_a_folder_that_is_tried_again_delays_no_later_death(place: Place) -> None:
    place.leave("one")
    (bad,) = place.folders
    place.leave("two")
    (other,) = {*place.folders} - {bad}
    alive = Spool.recover(other)
    assert alive is not None
    bad.chmod(0o777)
    agent = place.agent()
    place.work(agent, 2)
    assert len(place.said) == 1
    alive.abandon()
    place.work(agent, 2)
    assert place.delivered("archive") == ["two"]
    agent.end()


# Settings


def test_the_present_settings_decide_who_gets_what_was_left(place: Place) -> None:
    place.settings["live"] = {"enabled": False}
    place.leave("one")
    agent = place.agent()
    place.work(agent, 3)
    assert (place.delivered("archive"), place.delivered("live")) == (["one"], [])
    assert len(place.folders) == 1
    place.settings.clear()
    place.work(agent, SETTINGS_SECONDS + 5)
    assert (place.delivered("archive"), place.delivered("live")) == (["one"], ["one"])
    assert place.folders == []
    agent.end()


def test_what_waits_for_no_present_child_is_read_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.settings["live"] = {"enabled": False}
    place.leave("one")
    scans: list[SegmentReader] = []
    scan = SegmentReader.scan

    def counted(reader: SegmentReader) -> Any:
        scans.append(reader)
        return scan(reader)

    monkeypatch.setattr(SegmentReader, "scan", counted)
    agent = place.agent()
    place.work(agent, 300)
    assert len(scans) == 1
    agent.end()


def test_without_zenml_it_waits_and_delivers_once_it_answers(place: Place) -> None:
    place.trouble = ConnectionError("gone")
    place.leave("one")
    agent = place.agent()
    place.work(agent, 60)
    assert place.delivered("archive") == []
    assert not agent.knows_settings
    place.trouble = None
    place.work(agent, SETTINGS_SECONDS + 5)
    assert place.delivered("archive") == ["one"]
    assert len(place.said) == 2
    agent.end()


def test_it_keeps_the_settings_that_it_has_while_zenml_is_away(place: Place) -> None:
    place.leave("one")
    agent = place.agent()
    place.trouble = ConnectionError("gone")
    place.work(agent, 60)
    assert place.delivered("archive") == ["one"]
    assert agent.knows_settings
    assert agent.zenml_error
    agent.end()


def test_a_log_store_that_is_registered_later_is_asked_for(place: Place) -> None:
    place.is_registered = False
    place.leave("one")
    agent = place.agent()
    place.work(agent, 10)
    place.is_registered = True
    place.work(agent, 10)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_only_the_named_log_stores_are_delivered(place: Place) -> None:
    place.leave("one")
    with pytest.raises(ArgumentError, match="logs"):
        place.agent("log")
    agent = place.agent("logs")
    place.work(agent, 2)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_a_log_store_whose_spool_is_elsewhere_is_named(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    agent = Agent(None, warn=said.append)
    agent.begin()
    assert len(said) == 1
    assert str(place.disk) in said[0]
    agent.end()


# Backends


def test_a_backend_s_trouble_is_told_when_it_begins_and_when_it_ends(place: Place) -> None:
    place.leave("one")
    place.backends["live"].fault = UnavailableError("no route")
    agent = place.agent()
    place.work(agent, 120)
    assert len(place.said) == 1
    assert "'live'" in place.said[0]
    assert "no route" in place.said[0]
    (live,) = [one for one in agent.delivered if one.child == "live"]
    assert (live.pending, live.state) == (1, "unavailable")
    place.backends["live"].fault = None
    place.work(agent, 120)
    assert len(place.said) == 2
    assert place.delivered("live") == ["one"]
    agent.end()


def test_at_the_end_what_is_not_delivered_stays_for_the_next_agent(place: Place) -> None:
    place.leave("one")
    place.backends["live"].fault = UnavailableError("gone")
    agent = place.agent()
    place.work(agent, 2)
    agent.end()
    (folder,) = place.folders
    assert place.delivered("archive") == ["one"]
    left = Spool.recover(folder)
    assert left is not None
    left.abandon()
    place.backends["live"].fault = None
    agent = place.agent()
    place.work(agent, 2)
    assert (place.delivered("archive"), place.delivered("live")) == (["one"], ["one"])
    agent.end()


def test_an_agent_that_is_killed_while_it_delivers_loses_nothing(place: Place) -> None:
    place.leave(*map(str, range(20)))
    for child, seconds in (("archive", 0.5), ("live", 1.0), ("live", 3.0)):
        place.backends[child].fault = UnavailableError("gone")
        place.work(place.agent(), seconds)
        # It dies as a process does: its threads stop, and its locks are free.
        place.die()
        place.backends[child].fault = None
    agent = place.agent()
    place.work(agent, 3)
    for child in ("archive", "live"):
        assert [*dict.fromkeys(place.delivered(child))] == [*map(str, range(20))]
    assert place.folders == []
    agent.end()


def test_a_child_has_one_exporter_for_all_processes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    create = SimulatedChildConfig.create_exporter

    def counted(config: SimulatedChildConfig) -> SimulatedBackend:
        made.append(config.name)
        return create(config)

    for number in range(5):
        place.leave(f"{number}")
    monkeypatch.setattr(SimulatedChildConfig, "create_exporter", counted)
    agent = place.agent()
    place.work(agent, 3)
    assert place.delivered("archive") == [*map(str, range(5))]
    assert sorted(made) == ["archive", "live"]
    agent.end()


def test_while_one_process_is_retried_the_others_of_the_child_wait(place: Place) -> None:
    for number in range(5):
        place.leave(f"{number}")
    place.backends["live"].fault = "refused"
    before = place.backends["live"].exports
    agent = place.agent()
    place.work(agent, 3)
    assert place.delivered("archive") == [*map(str, range(5))]
    # As many as one process alone would make.
    assert place.backends["live"].exports - before <= 4
    assert [one.pending for one in agent.delivered] == [0, 5]
    place.backends["live"].fault = None
    place.work(agent, 60)
    assert place.delivered("live") == [*map(str, range(5))]
    agent.end()


def test_a_process_whose_events_alone_cannot_be_exported_holds_no_other_up_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        place.leave(f"{number}")
    take = SimulatedBackend.export

    def choosy(backend: SimulatedBackend, batch: Sequence[LogEvent]) -> int:
        if batch[0].message == "0":
            raise TypeError("a defect")
        return take(backend, batch)

    monkeypatch.setattr(SimulatedBackend, "export", choosy)
    agent = place.agent()
    place.work(agent, 240)
    assert place.delivered("live") == [*map(str, range(1, 5))]
    agent.end()


# One agent for a directory


def test_a_second_agent_is_refused_until_the_first_has_ended(place: Place) -> None:
    agent = place.agent()
    with pytest.raises(OperationError, match="another agent"):
        place.agent()
    agent.end()
    place.agent().end()


def test_a_folder_that_others_can_write_is_refused_with_what_to_do(place: Place) -> None:
    (place.disk / "agent").mkdir(parents=True)
    (place.disk / "agent").chmod(0o777)
    with pytest.raises(OperationError, match="chmod 700"):
        place.agent()


def test_another_user_s_folder_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.disk / "agent").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OperationError, match="belongs to user"):
        place.agent()


# Probes


def ask(address: str, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_probes_are_answered(place: Place) -> None:
    place.trouble = ConnectionError("gone")
    place.leave("one")
    agent = place.agent()
    health = Health(agent, ":0")
    try:
        assert health.address.startswith("127.0.0.1:")
        place.work(agent, 1)
        assert ask(health.address, "/healthz")[0] == 200
        assert ask(health.address, "/readyz")[0] == 503
        place.trouble = None
        place.work(agent, SETTINGS_SECONDS + 5)
        assert ask(health.address, "/readyz")[0] == 200
        assert ask(health.address, "/other")[0] == 404
        status, text = ask(health.address, "/metrics?a=b")
        assert status == 200
        labels = 'log_store="logs",child="live",outcome="delivered"'
        assert f"composite_logstore_agent_events_total{{{labels}}} 1\n" in text
        place.clock.advance(ALIVE_SECONDS + 1)
        assert ask(health.address, "/healthz")[0] == 503
    finally:
        health.close()
        agent.end()


def test_no_counter_goes_back_while_the_settings_change(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> list[str]:
        return [line for line in metrics(agent) if line.startswith("composite_logstore_agent_events_total")]

    def observed(recovery: Recovery) -> list[dict[str, ChildStats]]:
        if not probes:
            # As if another thread answered a probe just now.
            probes.append([])
            probes[:] = [counted()]
        return stats(recovery)

    probes: list[list[str]] = []
    stats = Recovery.stats
    agent = place.agent()
    process = Living(place)
    process.log("one")
    place.work(agent, 2)
    before = counted()
    assert len(before) == 8
    place.settings["live"] = {"min_level": "ERROR"}
    monkeypatch.setattr(Recovery, "stats", observed)
    place.work(agent, SETTINGS_SECONDS + 5)
    assert probes == [before]
    assert counted() == before
    agent.end()


def test_every_line_of_the_metrics_is_a_sample_or_about_one(place: Place) -> None:
    agent = place.agent()
    lines = [*metrics(agent)]
    assert "composite_logstore_agent_zenml_reachable 1" in lines
    assert all(line.startswith(("# HELP ", "# TYPE ", "composite_logstore_agent_")) for line in lines)
    agent.end()


def test_a_file_system_without_locks_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "lock_file", refuse)
    with pytest.raises(OperationError, match=os.strerror(errno.ENOLCK)):
        place.agent()


@pytest.mark.parametrize(
    ("address", "parsed"),
    [(":80", ("127.0.0.1", 80)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("[::1]:80", ("::1", 80)), ("a.b:1", ("a.b", 1))],
)
def test_an_address_without_a_host_is_the_loopback_interface(address: str, parsed: tuple[str, int]) -> None:
    assert parsed_address(address) == parsed


@pytest.mark.parametrize(
    "address", ["", "80", "a", "a:", "a:b", "a:70000", "http://a:80", "a:80/", "a@b:80", "[::1:80"]
)
def test_any_other_address_is_wrong_usage(address: str) -> None:
    result = CliRunner().invoke(main, ["agent", "--health-address", address])
    assert result.exit_code == 2
    assert "--health-address" in result.stderr


def test_an_address_in_use_is_named(place: Place) -> None:
    agent = place.agent()
    health = Health(agent, ":0")
    with pytest.raises(OperationError, match=health.address):
        Health(agent, health.address)
    health.close()
    agent.end()


@pytest.mark.parametrize(("is_second", "code"), [(True, 1), (False, 2)])
def test_the_command_ends_at_once_if_it_cannot_work(place: Place, is_second: bool, code: int) -> None:
    first = place.agent() if is_second else None
    result = CliRunner().invoke(main, ["agent", "--spool-directory", str(place.disk), "--store", "lgos"])
    assert result.exit_code == code, result.output
    if first is not None:
        first.end()


def test_no_more_than_eight_requests_are_answered_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_health, "REQUEST_SECONDS", PATIENCE_SECONDS)
    agent = place.agent()
    health = Health(agent, ":0")
    host, _, port = health.address.rpartition(":")
    with ExitStack() as stack:
        held = [stack.enter_context(create_connection((host, int(port)), 60)) for _ in range(9)]
        # They say nothing. The last one is closed at once, the others wait for a request.
        assert held[-1].recv(1) == b""
        held[0].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert held[0].recv(12) == b"HTTP/1.0 200"
    health.close()
    agent.end()


def test_a_client_that_sends_slowly_does_not_hold_a_request_for_long(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_health, "REQUEST_SECONDS", 0.1)
    agent = place.agent()
    health = Health(agent, ":0")
    host, _, port = health.address.rpartition(":")
    with create_connection((host, int(port)), 0.01) as connection:

        def is_closed() -> bool:
            try:
                connection.sendall(b"a")
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(is_closed, "the end of a request that never ends")
    health.close()
    agent.end()


@pytest.mark.parametrize(
    "request_line", [b"POST /metrics HTTP/1.0", b"GARBAGE", b"GET /metrics HTTP/1.0\r\n" + b"a: b\r\n" * 200]
)
def test_other_requests_are_refused(place: Place, request_line: bytes) -> None:
    agent = place.agent()
    health = Health(agent, ":0")
    host, _, port = health.address.rpartition(":")
    with create_connection((host, int(port)), 60) as connection:
        connection.sendall(request_line + b"\r\n\r\n")
        assert b"composite_logstore_agent" not in connection.recv(10_000)
    health.close()
    agent.end()
