"""The commands of `composite-logstore rejected`, with real files, simulated time and backends, and no ZenML."""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from composite_logstore import LogEvent, RejectedError, UnavailableError
from composite_logstore.backend import BACKFILLED
from composite_logstore.child_types import UnknownChild
from composite_logstore.cli.main import main
from composite_logstore.operations.inventory import LogStore
from composite_logstore.processing import known_secrets
from composite_logstore.spool import rejected as on_disk
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.rejected import RejectedFolder
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock, make_events
from tests.events import NOON, make_stream
from tests.simulation import make_child
from tests.unit import test_cli
from tests.unit.test_cli import INVENTORY


class Machine(test_cli.Machine):
    """A machine with a log store that has rejected events."""

    def register(self, *children: Any, **settings: Any) -> LogStore:
        return super().register(*children, id=self.stores[0].id if self.stores else None, **settings)

    @property
    def folder(self) -> RejectedFolder:
        return RejectedFolder(self.disk / str(self.stores[0].id))

    def reject(self, messages: Sequence[str], child: str = "a", reason: str = "too old", **how: Any) -> list[LogEvent]:
        """Leave rejected events of a process."""
        among = how.pop("among", 1)
        events = make_events(messages, writer=how.pop("writer", secrets.token_hex(8)[:15]), **how)
        self.folder.keep(child, [RejectedEvent(event, reason, NOON, 1, among) for event in events])
        return events

    def kept(self, child: str = "a") -> list[tuple[str, str]]:
        lines = self.folder.read(child)
        return [(line.rejected.event.message, line.rejected.reason) for line in lines if line.rejected]

    def run(self, *arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, ["rejected", *arguments], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    def values(self, *arguments: str, code: int = 0) -> Any:
        done = self.run(*arguments, "--output", "json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)


@pytest.fixture
def machine(tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    machine = Machine(tmp_path / "spool", clock)
    monkeypatch.setattr(INVENTORY, "registered", machine.registered)
    return machine


def backend(name: str = "a") -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


class Judging(SimulatedBackend):
    """Rejects the events of which a function says so: alone, or by name, or only by number."""

    def __init__(self, says: str, *bad: str) -> None:
        super().__init__()
        self.says = says
        self.bad = set(bad)

    def export(self, batch: Sequence[LogEvent]) -> int:
        bad = [event for event in batch if event.message in self.bad]
        if not bad:
            return super().export(batch)
        if self.says == "nothing":
            raise RejectedError("still bad")
        super().export([event for event in batch if event.message not in self.bad])
        if self.says == "which":
            raise RejectedError("still bad", events=bad)
        raise RejectedError("still bad", len(bad))


# list


def test_list_counts_by_child_and_reason(machine: Machine) -> None:
    machine.register(make_child("a"), make_child("b"))
    machine.reject(["1", "2"])
    machine.reject(["3"], reason="no mapping")
    machine.reject(["4"], "b", among=2)
    done = machine.run("list", "logs")
    assert done.exit_code == 0
    for words in ("too old", "no mapping", "--uncertain"):
        assert words in done.output
    first, second = machine.values("list", "logs")["children"]
    assert (first["child"], first["events"], first["reasons"]) == ("a", 3, {"too old": 2, "no mapping": 1})
    assert (first["streams"], first["oldest"], first["obstacle"]) == (2, NOON / 1e9, "")
    assert (second["child"], second["uncertain"]) == ("b", 1)
    assert [one["child"] for one in machine.values("list", "logs", "b")["children"]] == ["b"]


@pytest.mark.parametrize(
    ("settings", "words"), [({"durability": "memory"}, "'memory'"), ({"rejected_max_bytes": 0}, "is 0"), ({}, "")]
)
def test_list_says_that_none_are_kept(machine: Machine, settings: dict[str, Any], words: str) -> None:
    machine.register(make_child("a"), **settings)
    done = machine.run("list", "logs")
    assert "No rejected events" in done.output
    assert ("not kept" in done.output) == bool(words)
    assert words in done.output
    assert words in machine.values("list", "logs")["not_kept"]


def test_list_names_what_cannot_be_read_and_what_made_room(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    folder = RejectedFolder(machine.disk / str(store.id), 20_000)
    for event in make_events(["x" * 500] * 60):
        folder.keep("a", [RejectedEvent(event, "no", NOON)])
    (file, *_) = sorted(folder.path.glob("*.log"))
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    (one,) = machine.values("list", "logs")["children"]
    assert one["damaged"] == 1
    assert one["events"] + one["discarded"] + one["damaged"] == 60


@pytest.mark.parametrize("command", ["list", "show", "retry", "purge"])
def test_wrong_names_are_refused_with_the_nearest(machine: Machine, command: str) -> None:
    machine.register(make_child("live"))
    done = machine.run(command, "log")
    assert done.exit_code == 2
    assert "logs" in done.stderr
    done = machine.run(command, "logs", "lvie")
    assert done.exit_code == 2
    assert "live" in done.stderr


# show


def test_show_prints_every_field_and_is_harmless_for_a_terminal(machine: Machine) -> None:
    machine.register(make_child("a"))
    evil = "\x1b]0;owned\x07 \u202e"
    (event,) = machine.reject([f"line\n{evil}"], reason=f"no {evil}", attributes={"loss": evil})
    done = machine.run("show", "logs")
    assert done.exit_code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(done.output)
    for words in ("line", "owned", "loss", event.uid, str(event.stream.id)):
        assert words in done.output
    (one,) = machine.values("show", "logs", "a")["events"]
    assert (one["child"], one["event"]["message"], one["is_certain"]) == ("a", event.message, True)
    assert one["event"]["attributes"] == {"loss": evil}
    assert one["event"]["stream_attributes"] == event.stream.attributes


def test_show_is_bounded_and_says_so(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(list("abc"))
    done = machine.run("show", "logs", "--limit", "2")
    assert "--limit" in done.output
    shown = machine.values("show", "logs", "--limit", "2")
    assert ([one["event"]["message"] for one in shown["events"]], shown["is_complete"]) == (["a", "b"], False)


# retry


def test_retry_sends_them_with_the_present_settings_and_removes_them(machine: Machine) -> None:
    machine.register(make_child("a", ansi="strip"))
    events = machine.reject(["\x1b[1mone\x1b[0m", "two"])
    done = machine.run("retry", "logs")
    assert done.exit_code == 0, done.output
    assert "2 events of child 'a' delivered" in done.output
    assert backend().messages == ["one", "two"]
    assert [event.uid for event in backend().received] == [event.uid for event in events]
    assert backend().received[0].stream.attributes == events[0].stream.attributes
    # A reader that expects a writer's events in order takes them for no duplicates.
    assert all(event.metadata[BACKFILLED] for event in backend().received)
    assert (machine.kept(), backend().closed) == ([], 1)
    assert list(machine.folder.path.glob("*.log")) == []
    assert "No rejected events" in machine.run("retry", "logs").output


@pytest.mark.parametrize("says", ["nothing", "which"])
def test_events_that_are_rejected_again_stay_with_the_new_reason(machine: Machine, says: str) -> None:
    machine.register(make_child("a", Judging(says, "bad")))
    machine.reject(["one", "bad", "two", "three"])
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], one["rejected"], one["remaining"]) == (3, {"still bad": 1}, 1)
    assert backend().messages == ["one", "two", "three"]
    assert machine.kept() == [("bad", "still bad")]
    # Once the mapping is mended, it is taken.
    backend().bad.clear()  # type: ignore[attr-defined]
    assert machine.run("retry", "logs").exit_code == 0
    assert machine.kept() == []


def test_if_the_backend_does_not_say_which_they_stay_as_uncertain_until_asked_for(machine: Machine) -> None:
    machine.register(make_child("a", Judging("how many", "bad")))
    machine.reject(["one", "bad"])
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], one["rejected"], one["remaining"]) == (1, {"still bad": 1}, 2)
    backend().bad.clear()  # type: ignore[attr-defined]
    assert machine.values("retry", "logs", code=1)["children"][0]["delivered"] == 0
    assert machine.values("retry", "logs", "--uncertain")["children"][0]["delivered"] == 2
    assert machine.kept() == []


def test_while_zenml_cannot_be_asked_for_secrets_nothing_is_sent(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.register(make_child("a", redact={}))
    machine.reject(["one"], stream=make_stream(**{"zenml.step.run.id": str(uuid4())}))
    monkeypatch.setattr(known_secrets, "_unreached", known_secrets._Unreached(inf, "connection refused"))
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert "connection refused" in one["obstacle"]
    assert machine.kept() == [("one", "too old")]
    assert backend().exports == 0


def test_what_the_settings_withhold_stays(machine: Machine) -> None:
    machine.register(make_child("a", min_level="ERROR"))
    machine.reject(["info", "error"], levels=(20, 40))
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], sum(one["withheld"].values()), one["remaining"]) == (1, 1, 1)
    assert backend().messages == ["error"]
    assert machine.kept() == [("info", "too old")]


def test_what_exceeds_the_budget_stays(machine: Machine) -> None:
    machine.register(make_child("a", budget={"events": 2, "per": "minute", "then": "stop"}), make_child("b"))
    machine.reject(list("abcde"))
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], sum(one["withheld"].values()), one["remaining"]) == (2, 3, 3)
    assert [message for message, _ in machine.kept()] == list("cde")
    machine.clock.advance(3600)
    assert machine.values("retry", "logs", code=1)["children"][0]["delivered"] == 2
    assert [message for message, _ in machine.kept()] == ["e"]


@pytest.mark.parametrize("says", ["nothing", "which", "how many"])
def test_what_exceeds_the_budget_is_neither_sent_nor_rejected(machine: Machine, says: str) -> None:
    # A notice in place of such an event would be taken for the event.
    machine.register(make_child("a", Judging(says, *"abcde"), budget={"events": 2, "per": "minute", "then": "stop"}))
    machine.reject(list("abcde"))
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], one["rejected"], one["remaining"]) == (0, {"still bad": 2}, 5)
    assert (one["withheld"], backend().messages) == ({"over budget": 3}, [])
    assert sorted(machine.kept()) == [(name, "still bad" if name in "ab" else "too old") for name in "abcde"]


def test_batches_have_one_writer_in_order_and_the_child_s_size(machine: Machine) -> None:
    machine.register(make_child("a", max_export_batch_size=2))
    first, second = sorted(secrets.token_hex(8)[:15] for _ in range(2))
    machine.reject(["0", "1"], writer=first)
    machine.reject(["x"], writer=second, first=9)
    machine.reject(["2", "3", "4"], writer=first, first=2)
    assert machine.run("retry", "logs").exit_code == 0
    assert sorted(backend().messages) == sorted("01234x")
    for batch in backend().batches:
        assert len(batch) <= 2
        assert len({event.writer for event in batch}) == 1
    numbers = [event.number for event in backend().received if event.writer == first]
    assert numbers == [0, 1, 2, 3, 4]


def test_an_exporter_never_gets_an_earlier_event_of_a_writer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "_FILE_BYTES", 10)
    machine.register(make_child("a"))
    writer = secrets.token_hex(8)[:15]
    for number in (5, 3, 4, 1):
        machine.reject([str(number)], writer=writer, first=number)
    assert machine.run("retry", "logs").exit_code == 0
    assert backend().messages == ["5", "3", "4", "1"]
    assert backend().closed == 3


def test_an_unavailable_child_takes_none_and_all_stay(machine: Machine) -> None:
    machine.register(make_child("a"), make_child("b"))
    machine.reject(["one"])
    machine.reject(["two"], "b")
    backend().fault = UnavailableError("the key is wrong")
    done = machine.run("retry", "logs")
    assert done.exit_code == 1
    assert "the key is wrong" in done.output
    assert machine.kept() == [("one", "too old")]
    assert backend("b").messages == ["two"]


def test_a_child_that_fails_is_given_up_after_a_while(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    backend().fault = "refused"
    begin = machine.clock.now()
    done = machine.run("retry", "logs")
    assert (done.exit_code, machine.kept()) == (1, [("one", "too old")])
    assert 0 < machine.clock.now() - begin <= 30


def test_a_child_that_fails_for_a_moment_takes_them(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one", "two"])
    backend().faults = [TypeError("a defect"), None]
    assert machine.run("retry", "logs").exit_code == 0
    assert sorted(backend().messages) == ["one", "two"]


def test_an_unknown_error_s_text_is_not_shown(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    backend().fault = ValueError("secret-key")
    done = machine.run("retry", "logs")
    assert "ValueError" in done.output
    assert "secret-key" not in done.output


def test_a_backend_that_rejects_everything_is_asked_few_times(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject([str(number) for number in range(200)])
    backend().fault = "rejects all"
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["rejected"], one["remaining"]) == ({"bad request": 10}, 200)
    assert backend().exports < 50
    assert sorted(int(message) for message, _ in machine.kept()) == list(range(200))


def test_events_of_a_renamed_child_go_through_another(machine: Machine) -> None:
    machine.register(make_child("new"))
    machine.reject(["one"], "old")
    done = machine.run("retry", "logs")
    assert done.exit_code == 1
    assert "no longer configured" in done.output
    assert machine.run("retry", "logs", "old", "--to", "new").exit_code == 0
    assert backend("new").messages == ["one"]
    assert machine.kept("old") == []


@pytest.mark.parametrize(
    ("child", "words"),
    [
        (make_child("a", enabled=False), "disabled"),
        (UnknownChild(name="a", type="gone"), "not installed"),
    ],
)
def test_a_child_that_cannot_take_them_keeps_them(machine: Machine, child: Any, words: str) -> None:
    machine.register(make_child("b"), child)
    machine.reject(["one"])
    done = machine.run("retry", "logs")
    assert done.exit_code == 1
    assert words in done.output
    assert machine.kept() == [("one", "too old")]
    assert machine.run("retry", "logs", "a", "--to", "a").exit_code in (1, 2)
    assert machine.kept() == [("one", "too old")]


def test_a_dry_run_sends_nothing(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one", "two"])
    done = machine.run("retry", "logs", "--dry-run")
    assert done.exit_code == 0
    assert "2 events of child 'a' would be sent" in done.output
    assert (backend().received, len(machine.kept())) == ([], 2)


def test_two_retries_at_once_send_nothing_twice(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    with machine.folder.alone():
        for command in (["retry", "logs"], ["purge", "logs", "--yes"]):
            done = machine.run(*command)
            assert done.exit_code == 3
            assert "another process" in done.stderr
    assert backend().received == []
    assert machine.run("retry", "logs").exit_code == 0
    assert backend().messages == ["one"]


def test_what_is_rejected_meanwhile_stays_for_the_next_retry(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    export = backend().export

    def reject_more(batch: Sequence[LogEvent]) -> int:
        machine.reject(["meanwhile"])
        return export(batch)

    backend().export = reject_more  # type: ignore[method-assign]
    assert machine.values("retry", "logs", code=1)["children"][0]["remaining"] == 1
    assert machine.kept() == [("meanwhile", "too old")]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_retry_that_is_cut_off_loses_none(machine: Machine, after: int) -> None:
    machine.register(make_child("a", max_export_batch_size=1))
    machine.reject(["one", "two", "three"])
    backend().faults = [*[None] * after, KeyboardInterrupt()]
    done = machine.run("retry", "logs")
    assert done.exit_code == 1
    assert "Run the same command again" in done.output
    assert [message for message, _ in machine.kept()] == ["one", "two", "three"][after:]
    assert machine.run("retry", "logs").exit_code == 0
    assert backend().messages == ["one", "two", "three"]


def test_a_kill_between_an_export_and_the_removal_sends_a_batch_twice(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.register(make_child("a"))
    machine.reject(["one", "two"])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RejectedFolder, "remove", die)
    machine.run("retry", "logs")
    monkeypatch.undo()
    monkeypatch.setattr(INVENTORY, "registered", machine.registered)
    assert machine.run("retry", "logs").exit_code == 0
    assert backend().messages == ["one", "two"] * 2


def test_a_full_disk_keeps_what_is_rejected_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.register(make_child("a", Judging("nothing", "bad")))
    machine.reject(["one", "bad"])

    def fail(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(on_disk, "_write_at_end", fail)
    assert machine.run("retry", "logs").exit_code == 1
    assert backend().messages == ["one"]
    assert machine.kept() == [("bad", "too old")]


def test_a_retry_at_the_bound_discards_none(machine: Machine) -> None:
    store = machine.register(make_child("a", Judging("nothing", *map(str, range(40)))), rejected_max_bytes=30_000)
    folder = RejectedFolder(machine.disk / str(store.id), 30_000)
    for event in make_events([str(number) for number in range(100)]):
        folder.keep("a", [RejectedEvent(event, "no", NOON)])
    before = {message for message, _ in machine.kept()}
    assert len(before) < 100
    machine.run("retry", "logs")
    sent = set(backend().messages)
    assert sent | {message for message, _ in machine.kept()} == before


def test_damaged_lines_stay_and_hide_no_other(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one", "two"])
    (file,) = machine.folder.path.glob("*.log")
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    (one,) = machine.values("retry", "logs", code=1)["children"]
    assert (one["delivered"], one["remaining"]) == (1, 1)
    assert machine.run("purge", "logs", "--yes").exit_code == 0
    assert machine.values("list", "logs")["children"] == []


def test_a_folder_that_others_can_write_is_refused(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    machine.folder.path.chmod(0o777)
    for command in ("list", "show", "retry", "purge"):
        done = machine.run(command, "logs")
        assert done.exit_code == 1
        assert "chmod 700" in done.stderr


def test_without_zenml_everything_but_a_retry_works_by_id(machine: Machine, tmp_path: Path) -> None:
    store = machine.register(make_child("a"), spool_directory=None)
    machine.disk = tmp_path / "zenml" / "composite_logstore" / "spool"
    machine.reject(["one"])
    machine.trouble = RuntimeError("down")
    id = str(store.id)
    assert machine.values("list", id)["children"][0]["events"] == 1
    assert machine.values("show", id)["events"][0]["event"]["message"] == "one"
    done = machine.run("retry", id)
    assert done.exit_code == 1
    assert "ZenML cannot be reached" in done.stderr
    assert machine.run("purge", id, "--yes").exit_code == 0


# purge


@pytest.mark.parametrize("answer", ["y", "n"])
def test_purge_shows_the_loss_and_asks(machine: Machine, answer: str) -> None:
    machine.register(make_child("a"), make_child("b"))
    machine.reject(["one", "two"])
    machine.reject(["three"], "b")
    done = machine.run("purge", "logs", "a", input=answer)
    assert "2 rejected events of child 'a'" in done.output
    assert (machine.kept() == []) == (answer == "y")
    assert done.exit_code == (0 if answer == "y" else 1)
    assert len(machine.kept("b")) == 1


def test_a_dry_run_of_purge_deletes_nothing(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.reject(["one"])
    done = machine.run("purge", "logs", "--dry-run")
    assert done.exit_code == 0
    assert "Would be lost for good" in done.output
    assert len(machine.kept()) == 1
    assert machine.values("purge", "logs", "--yes")["purged"][0]["events"] == 1
    assert machine.kept() == []
