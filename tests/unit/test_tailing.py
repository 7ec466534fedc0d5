"""The agent delivers what living processes log, while they log: in order, once, and each child by itself."""

from __future__ import annotations

import errno
import os
from importlib import import_module
from typing import Any

import orjson
import pytest

from composite_logstore import RejectedError, UnavailableError
from composite_logstore.delivery import tailing
from composite_logstore.operations import agent_tails
from composite_logstore.operations.agent import END_SECONDS, LOOK_SECONDS, SETTINGS_SECONDS
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import decode_line, encode_line
from composite_logstore.spool.lock import DELIVERY_LOCK, LOCK
from tests.agents import Living, Place
from tests.events import make_events, make_stream

AGENT = import_module("composite_logstore.operations.agent")


def numbers(first: int, before: int) -> list[str]:
    return [*map(str, range(first, before))]


def test_what_a_living_process_logs_is_delivered_while_it_logs(place: Place) -> None:
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 2)
    assert place.delivered("archive") == place.delivered("live") == ["one"]
    process.log("two", "three")
    place.work(agent, 2)
    assert place.delivered("archive") == place.delivered("live") == ["one", "two", "three"]
    assert (process.position("archive"), process.account("live", "delivered")) == (3, 3)
    assert process.account("live", "before") == 3
    agent.end()
    assert process.spool.take_delivery()


def test_segments_follow_each_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4096)
    process = Living(place)
    agent = place.agent()
    for first in range(0, 100, 10):
        process.log(*numbers(first, first + 10))
        place.work(agent, 0.5)
    place.work(agent, 2)
    assert place.delivered("archive") == numbers(0, 100)
    assert process.account("archive", "delivered") == 100
    agent.end()


def test_the_process_s_last_words_are_delivered_at_once_and_its_folder_is_removed(place: Place) -> None:
    process = Living(place)
    agent = place.agent()
    process.log("one")
    place.work(agent, 2)
    process.log("last words")
    process.die()
    place.work(agent, 1)
    assert place.delivered("archive") == place.delivered("live") == ["one", "last words"]
    assert place.folders == []
    assert len(place.backends["live"].ended) == 1
    agent.end()


def test_what_is_due_is_delivered_before_a_batch_has_waited(place: Place) -> None:
    for child in place.children:
        place.settings[child] = {"schedule_delay_millis": 60_000}
    process = Living(place)
    agent = place.agent()
    process.log("one")
    place.work(agent, 5)
    assert place.delivered("live") == []
    process.flush()
    place.work(agent, 1)
    assert place.delivered("live") == ["one"]
    assert process.account("live", "before") == 1
    agent.end()


def test_an_unavailable_child_delays_no_sibling_and_gets_all_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_tails, "MOST_BYTES", 20_000)
    monkeypatch.setattr(agent_tails, "_LEAST_BYTES", 20_000)
    place.backends["live"].fault = UnavailableError("gone")
    process = Living(place)
    agent = place.agent()
    for first in range(0, 3000, 300):
        process.log(*numbers(first, first + 300))
        place.work(agent, 2)
    assert place.delivered("archive") == numbers(0, 3000)
    assert process.position("live") == 0
    (recovery,) = [home._recovery for home in agent._homes.values()]
    assert recovery is not None
    (journal,) = recovery.journals
    live = next(delivery for delivery in journal.deliveries if delivery.name == "live")
    # What waits is on disk.
    assert len(live.queue) < 300
    assert live.stats().pending == 3000
    place.backends["live"].fault = None
    place.work(agent, 120)
    assert place.delivered("live") == numbers(0, 3000)
    process.log("more")
    place.work(agent, 2)
    assert place.delivered("live") == [*numbers(0, 3000), "more"]
    assert process.account("live", "delivered") == 3001
    agent.end()


def test_the_next_agent_continues_where_the_last_has_ended(place: Place) -> None:
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 2)
    agent.end()
    process.log("two")
    agent = place.agent()
    place.work(agent, 2)
    assert place.delivered("archive") == ["one", "two"]
    assert process.account("archive", "delivered") == 2
    agent.end()


def test_an_agent_that_was_killed_before_it_wrote_the_account_counts_nothing_twice(place: Place) -> None:
    process = Living(place)
    process.log("one", "two", "three")
    agent = place.agent()
    place.work(agent, 2)
    account = process.spool.account()
    agent.end()
    process.spool.write_account({name: one._replace(before=1, delivered=1) for name, one in account.items()})
    process.log("four")
    agent = place.agent()
    place.work(agent, 2)
    assert place.delivered("archive") == ["one", "two", "three", "four"]
    assert process.account("archive", "delivered") == 4
    agent.end()


def test_a_child_gets_only_what_it_wants_and_is_acknowledged_the_rest(place: Place) -> None:
    place.settings["live"] = {"min_level": "ERROR"}
    process = Living(place)
    agent = place.agent()
    process.log(*numbers(0, 10))
    place.work(agent, 2)
    assert (place.delivered("archive"), place.delivered("live")) == (numbers(0, 10), [])
    assert process.position("live") == process.account("live", "before") == 10
    agent.end()


def test_a_process_that_delivers_by_itself_is_left_alone(place: Place) -> None:
    process = Living(place)
    assert process.spool.take_delivery()
    process.log("one")
    agent = place.agent()
    place.work(agent, 5)
    assert place.delivered("archive") == []
    process.spool.give_delivery()
    place.work(agent, 3)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_a_lock_that_was_taken_away_is_given_up(place: Place) -> None:
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 2)
    (process.spool.folder / DELIVERY_LOCK).unlink()
    process.spool.mend(lambda first, last: [])
    # The process has made it again, and takes it.
    assert process.spool.take_delivery()
    process.log("two")
    place.work(agent, 5)
    assert process.account("archive", "before") == 1
    process.spool.give_delivery()
    place.work(agent, 70)
    assert place.delivered("archive")[-1] == "two"
    agent.end()


def test_a_folder_that_is_gone_is_forgotten(place: Place) -> None:
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 2)
    os.rename(process.spool.folder, place.disk / "elsewhere")
    other = Living(place, "f" * 15)
    other.log("other")
    place.work(agent, 5)
    assert place.delivered("archive") == ["one", "other"]
    agent.end()


def test_damage_counts_as_dropped_once_and_hides_nothing(place: Place) -> None:
    process = Living(place)
    agent = place.agent()
    process.log("one", "two", "three")
    (path,) = process.spool.folder.glob("*.log")
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(data.index(b'"two"'))
        file.write(b'"wto"')
    place.work(agent, 3)
    assert place.delivered("archive") == ["one", "three"]
    assert process.account("archive", "dropped") == 1
    process.die()
    place.work(agent, 2)
    assert place.folders == []
    assert len([text for text in place.said if "cannot be read" in text]) == 1
    agent.end()


def test_a_line_that_is_being_written_is_read_once_it_is_complete(place: Place) -> None:
    process = Living(place)
    process.log("one", "two")
    (path,) = process.spool.folder.glob("*.log")
    data = path.read_bytes()
    begin = data.index(b'"two"')
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\0\0\0")
    agent = place.agent()
    agent.look()
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(data[begin : begin + 3])
    place.work(agent, 2)
    assert place.delivered("archive") == ["one", "two"]
    assert process.account("archive", "dropped") == 0
    agent.end()


def test_more_processes_than_can_be_open_at_once_are_taken_in_turn(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AGENT, "most_tailed", lambda: 2)
    processes = [Living(place, f"{number:x}" * 15) for number in range(1, 6)]
    for process in processes:
        process.log("one")
    agent = place.agent()
    place.work(agent, 120)
    assert place.delivered("archive") == ["one"] * 5
    for process in processes:
        process.log("two")
    place.work(agent, 120)
    assert place.delivered("archive") == ["one"] * 5 + ["two"] * 5
    agent.end()


def test_a_dead_process_that_waits_for_other_settings_keeps_no_other_waiting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AGENT, "most_tailed", lambda: 1)
    place.settings["live"] = {"enabled": False}
    processes = [Living(place, f"{number:x}" * 15) for number in range(1, 4)]
    for process in processes:
        process.log("one")
    agent = place.agent()
    place.work(agent, 1)
    assert place.delivered("archive") == ["one"]
    processes[1].die()
    place.work(agent, 60)
    assert place.delivered("archive") == ["one"] * 3
    agent.end()


def test_changed_settings_apply_to_living_processes(place: Place) -> None:
    process = Living(place)
    place.settings["live"] = {"enabled": False}
    agent = place.agent()
    process.log("one")
    place.work(agent, 2)
    assert (place.delivered("archive"), place.delivered("live")) == (["one"], [])
    place.settings.clear()
    place.work(agent, SETTINGS_SECONDS + 5)
    assert (place.delivered("archive"), place.delivered("live")) == (["one"], ["one"])
    assert process.account("archive", "delivered") == process.account("live", "delivered") == 1
    agent.end()


def test_a_process_that_dies_while_settings_change_and_an_export_is_under_way_is_delivered(place: Place) -> None:
    process = Living(place)
    agent = place.agent()
    place.backends["live"].fault = "silent"
    process.log("one")
    place.work(agent, 2)
    place.settings["archive"] = {"min_level": "DEBUG"}
    place.work(agent, SETTINGS_SECONDS + 5)
    process.log("last words")
    process.die()
    place.work(agent, 5)
    place.backends["live"].fault = None
    place.work(agent, 5)
    assert place.delivered("archive") == place.delivered("live") == ["one", "last words"]
    assert place.folders == []
    agent.end()


def test_changed_settings_apply_to_a_folder_that_was_to_be_tried_again_while_an_export_is_under_way(
    place: Place,
) -> None:
    place.leave("one")
    (bad,) = place.folders
    bad.chmod(0o777)
    process = Living(place)
    agent = place.agent()
    place.backends["live"].fault = "silent"
    process.log("two")
    place.work(agent, 2)
    bad.chmod(0o700)
    place.settings["archive"] = {"min_level": "DEBUG"}
    place.work(agent, SETTINGS_SECONDS + 5)
    assert "one" in place.delivered("archive")
    place.backends["live"].fault = None
    agent.end()


def test_settings_that_are_new_when_a_process_begins_apply_at_once(place: Place) -> None:
    place.is_registered = False
    agent = place.agent()
    place.work(agent, 2)
    place.is_registered = True
    process = Living(place)
    process.log("one")
    place.work(agent, 2)
    assert place.delivered("archive") == place.delivered("live") == ["one"]
    place.settings["live"] = {"enabled": False}
    later = Living(place, "f" * 15)
    later.log("two")
    place.work(agent, 3)
    process.log("three")
    place.work(agent, 2)
    assert (place.delivered("archive"), place.delivered("live")) == (["one", "two", "three"], ["one"])
    agent.end()


def test_many_processes_that_begin_have_zenml_asked_about_once_a_second(place: Place) -> None:
    agent = place.agent()
    before = place.asked
    for number in range(40):
        Living(place, f"{number:015x}")
        place.work(agent, LOOK_SECONDS)
    assert 5 <= place.asked - before <= 10
    place.work(agent, 2)
    before = place.asked
    place.work(agent, SETTINGS_SECONDS - 1)
    assert place.asked - before <= 1
    agent.end()


def test_a_full_disk_stops_no_delivery(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(spool: Spool, account: Any) -> None:
        raise OSError(28, os.strerror(28))

    process = Living(place)
    agent = place.agent()
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write_account", full)
        process.log("one")
        place.work(agent, 2)
        process.log("two")
        place.work(agent, 2)
    assert place.delivered("archive") == ["one", "two"]
    assert len(place.said) == 1
    process.log("three")
    place.work(agent, 2)
    assert process.account("archive", "delivered") == 3
    agent.end()


def test_what_had_to_make_room_counts_as_dropped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4096)
    monkeypatch.setattr(agent_tails, "MOST_BYTES", 1000)
    monkeypatch.setattr(agent_tails, "_LEAST_BYTES", 1000)
    place.backends["live"].fault = UnavailableError("gone")
    process = Living(place)
    agent = place.agent()
    for first in range(0, 200, 10):
        process.log(*numbers(first, first + 10))
        place.work(agent, 1)
    for path in sorted(process.spool.folder.glob("*.log"))[:-1]:
        path.unlink()
    place.backends["live"].fault = None
    place.work(agent, 180)
    assert place.delivered("archive") == numbers(0, 200)
    got = place.delivered("live")
    assert got == sorted(got, key=int)
    assert process.account("live", "dropped") == 200 - len(got) > 0
    assert process.account("live", "before") == 200
    agent.end()


def test_urgent_events_are_delivered_without_waiting(place: Place) -> None:
    for child in place.children:
        place.settings[child] = {"schedule_delay_millis": 60_000}
    process = Living(place)
    agent = place.agent()
    process.write(make_events(["calm"], first=0))
    place.work(agent, 3)
    process.write(make_events(["urgent"], first=1, level=40, level_name="ERROR"))
    place.work(agent, 2)
    assert place.delivered("archive") == ["calm", "urgent"]
    agent.end()


def test_an_idle_process_is_noted_no_further(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 3)
    calls: list[object] = []
    monkeypatch.setattr(tailing.TailedJournal, "note", lambda *_, **__: calls.append(1))
    monkeypatch.setattr(tailing.TailedJournal, "heed_due", lambda *_: calls.append(1))
    place.work(agent, 10)
    assert len(calls) <= 10
    agent.end()


def test_streams_that_end_are_ended_while_the_process_goes_on(place: Place) -> None:
    stream = make_stream()
    process = Living(place, stream=stream)
    agent = place.agent()
    process.log("one")
    process.spool.segments.end(stream, lambda size: True)
    place.work(agent, 2)
    assert [one.id for one in place.backends["archive"].ended] == [stream.id]
    process.die()
    place.work(agent, 2)
    assert place.folders == []
    assert len(place.backends["archive"].ended) == 1
    agent.end()


def test_a_lock_that_is_renewed_while_its_process_lives_hides_no_later_event(place: Place) -> None:
    place.backends["live"].fault = UnavailableError("gone")
    process = Living(place)
    process.log("one")
    agent = place.agent()
    place.work(agent, 2)
    (process.spool.folder / LOCK).unlink()
    process.spool.mend(lambda first, last: [])
    place.work(agent, 2)
    process.log("two")
    place.work(agent, 2)
    assert place.delivered("archive") == ["one", "two"]
    place.backends["live"].fault = None
    place.work(agent, 90)
    assert place.delivered("live") == ["one", "two"]
    process.die()
    place.work(agent, 2)
    assert place.folders == []
    agent.end()


def test_a_folder_is_given_back_once_the_export_under_way_has_returned(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Living(place)
    agent = place.agent()
    place.backends["live"].fault = "silent"
    process.log("one")
    place.work(agent, 1)
    with monkeypatch.context() as patch:

        def no_files(*_: object) -> float:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(tailing.TailedJournal, "grow", no_files)
        place.work(agent, 2)
    # Otherwise its process would export the same events at the same time.
    assert not process.spool.take_delivery()
    place.backends["live"].fault = None
    place.clock.advance(1)
    assert process.spool.take_delivery()
    assert place.delivered("live") == ["one"]
    assert process.position("live") == process.account("live", "delivered") == 1
    process.spool.give_delivery()
    process.log("two")
    place.work(agent, 70)
    assert place.delivered("live") == place.delivered("archive") == ["one", "two"]
    agent.end()


def test_a_folder_that_two_threads_give_back_is_closed_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Living(place)
    agent = place.agent()
    process.log("one")
    place.work(agent, 2)
    (recovery,) = [home._recovery for home in agent._homes.values()]
    assert recovery is not None
    asked: list[tailing.TailedJournal] = []

    def is_done(journal: tailing.TailedJournal) -> bool:
        asked.append(journal)
        if len(asked) == 1:
            recovery.give_back(journal)
        return True

    monkeypatch.setattr(tailing.TailedJournal, "is_done", property(is_done))
    recovery.look_soon()
    place.clock.advance(1)
    assert recovery.journals == []
    assert place.said == []
    assert process.spool.take_delivery()


def test_a_folder_of_another_version_is_left_to_its_process_and_tried_again(place: Place) -> None:
    process = Living(place)
    process.log("one")
    (path,) = process.spool.folder.glob("*.log")
    data = path.read_bytes()
    header = data[: data.index(b"\n") + 1]
    value = decode_line(header)
    newer = encode_line(orjson.dumps({**value, "format": 999}))
    path.write_bytes(newer + data[len(header) :])
    agent = place.agent()
    place.work(agent, 130)
    assert place.delivered("archive") == []
    assert len([text for text in place.said if "version" in text]) == 1
    assert process.spool.take_delivery()
    process.spool.give_delivery()
    path.write_bytes(data)
    place.work(agent, 70)
    assert place.delivered("archive") == ["one"]
    agent.end()


def test_the_end_of_the_agent_waits_only_some_seconds_for_an_export_that_hangs(place: Place) -> None:
    process = Living(place)
    agent = place.agent()
    place.backends["live"].fault = "silent"
    process.log("one")
    place.work(agent, 2)
    began = place.clock.now()
    agent.end()
    assert END_SECONDS <= place.clock.now() - began < END_SECONDS + 1
    assert process.account("archive", "delivered") == 1
    # The delivery stays locked until the export returns.
    assert not process.spool.take_delivery()
    place.backends["live"].fault = None
    place.clock.advance(1)
    assert process.spool.take_delivery()
    assert process.account("live", "delivered") == 1


def test_the_account_of_many_agents_tells_no_more_reasons_apart_than_that_of_one(place: Place) -> None:
    place.backends["live"].faults = [RejectedError("the id 0 is unknown")]
    process = Living(place)
    process.log("bad")
    agent = place.agent()
    place.work(agent, 2)
    agent.end()
    reasons = {f"the id {number} is unknown": 1 for number in range(100)}
    account = process.spool.account()
    account["live"] = account["live"]._replace(rejected=100, rejected_reasons=reasons)
    process.spool.write_account(account)
    place.backends["live"].faults = [RejectedError("the id 100 is unknown")]
    process.log("bad")
    agent = place.agent()
    place.work(agent, 2)
    agent.end()
    assert process.account("live", "rejected") == sum(process.account("live", "rejected_reasons").values()) == 101
