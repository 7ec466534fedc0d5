"""A process's folder while an agent may deliver its events: the lock of the delivery, the account, what is due."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from composite_logstore.event import LogEvent
from composite_logstore.spool import lock
from composite_logstore.spool.account import ACCOUNT, ChildAccount, read_account
from composite_logstore.spool.folder import Spool, Standing
from composite_logstore.spool.format import DUE, encode_line
from composite_logstore.spool.lock import AGENT, DELIVERY_LOCK, FolderLock, agent_works
from composite_logstore.spool.private_folder import PrivateFolder
from tests.events import WRITER, make_events
from tests.forks import idle_fork

ACCOUNT_OF_A = ChildAccount(
    since=2,
    before=9,
    state="retrying",
    delivered=3,
    rejected=2,
    rejected_not_kept=1,
    dropped=1,
    withheld=1,
    shortened=1,
    rejected_reasons={"too old": 2},
    withheld_reasons={"budget": 1},
    redacted={"key": 2},
    last_error="connection refused",
)


def create(tmp_path: Path, is_shared: bool = True) -> Spool:
    return Spool.create(tmp_path / "component", WRITER, ["a", "b"], is_shared)


def hand_over(tmp_path: Path) -> Spool:
    spool = create(tmp_path)
    spool.give_delivery()
    return spool


def die(spool: Spool) -> None:
    """Do what a kill does to the process: its locks are free."""
    assert spool.lock is not None
    spool.lock.release()
    spool.give_delivery()


def tail(folder: Path) -> Spool:
    spool = Spool.tail(folder)
    assert spool is not None
    return spool


def roomy(size: int) -> bool:
    return True


# The lock of the delivery


def test_nobody_else_delivers_what_the_process_itself_delivers(tmp_path: Path) -> None:
    spool = create(tmp_path)
    assert Spool.tail(spool.folder) is None


def test_one_agent_delivers_what_the_process_has_handed_over(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    agent = tail(spool.folder)
    assert Spool.tail(spool.folder) is None
    assert not spool.take_delivery()
    agent.abandon()
    assert spool.take_delivery()
    assert spool.take_delivery()
    assert Spool.tail(spool.folder) is None


def test_a_process_that_shares_nothing_has_no_such_lock(tmp_path: Path) -> None:
    spool = create(tmp_path, is_shared=False)
    assert {path.name for path in spool.folder.iterdir()} == {"owner.lock", "a.settled", "b.settled"}
    with pytest.raises(FileNotFoundError):
        Spool.tail(spool.folder)


def test_a_dead_process_s_folder_is_recovered_unless_an_agent_delivers_it(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    agent = tail(spool.folder)
    assert not agent.inherit()
    die(spool)
    assert Spool.recover(spool.folder) is None
    agent.abandon()
    found = Spool.recover(spool.folder)
    assert found is not None
    assert Spool.tail(spool.folder) is None
    assert found.reader.damage == []


def test_the_agent_inherits_the_folder_of_a_process_that_dies(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    spool.segments.append(make_events(["last words"])[0], roomy)
    agent = tail(spool.folder)
    assert not agent.inherit()
    die(spool)
    assert agent.inherit()
    assert Spool.recover(spool.folder) is None
    found = [event for event in Spool.look(spool.folder).reader.scan() if isinstance(event, LogEvent)]
    assert [event.message for event in found] == ["last words"]


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    spool = create(tmp_path)
    with idle_fork():
        spool.give_delivery()
        assert Spool.tail(spool.folder) is not None


@pytest.mark.parametrize("is_handed_over", [False, True])
def test_a_lock_that_is_taken_away_is_restored(tmp_path: Path, is_handed_over: bool) -> None:
    spool = create(tmp_path)
    if is_handed_over:
        spool.give_delivery()
    (spool.folder / DELIVERY_LOCK).unlink()
    assert spool.standing() is Standing.CHANGED
    assert spool.mend(lambda first, last: [])
    assert spool.standing() is Standing.IN_PLACE
    assert (Spool.tail(spool.folder) is not None) is is_handed_over


def test_no_agent_takes_a_lock_before_it_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = create(tmp_path)
    (spool.folder / DELIVERY_LOCK).unlink()
    lock_file = lock.lock_file

    def look(descriptor: int) -> bool:
        # An agent looks at this very moment.
        with monkeypatch.context() as patch:
            patch.setattr(lock, "lock_file", lock_file)
            with pytest.raises(FileNotFoundError):
                Spool.tail(spool.folder)
        return lock_file(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(lock, "lock_file", look)
        assert spool.mend(lambda first, last: [])
    assert spool.delivers_here
    assert Spool.tail(spool.folder) is None


@pytest.mark.process
@pytest.mark.parametrize("take", [Spool.recover, Spool.tail])
def test_a_process_that_is_forked_while_a_lock_is_taken_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[Path], Spool | None]
) -> None:
    spool = hand_over(tmp_path)
    if take == Spool.recover:
        die(spool)
    lock_file = lock.lock_file

    with ExitStack() as processes:

        def fork(descriptor: int) -> bool:
            is_locked = lock_file(descriptor)
            processes.enter_context(idle_fork())
            return is_locked

        with monkeypatch.context() as patch:
            patch.setattr(lock, "lock_file", fork)
            first = take(spool.folder)
        assert first is not None
        # As the end of a process does it.
        lock.release_all()
        assert take(spool.folder) is not None


def test_a_process_that_is_forked_while_a_folder_is_given_back_does_not_keep_it(tmp_path: Path) -> None:
    with PrivateFolder.make(tmp_path / AGENT) as folder:
        held = FolderLock.acquire(folder, is_own=True)
    assert held is not None
    copy = os.dup(held.file)
    held.release()
    with PrivateFolder.open(tmp_path / AGENT) as folder:
        again = FolderLock.acquire(folder)
    assert again is not None
    again.release()
    os.close(copy)


def test_a_process_that_is_forked_during_a_look_keeps_no_agent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrivateFolder.make(tmp_path / AGENT) as folder:
        agent = FolderLock.acquire(folder, is_own=True)
    assert agent is not None
    assert agent_works(tmp_path)
    agent.release()
    copies: list[int] = []
    flock = fcntl.flock

    def fork(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        copies.append(os.dup(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fork)
        assert not agent_works(tmp_path)
    with PrivateFolder.open(tmp_path / AGENT) as folder:
        agent = FolderLock.acquire(folder)
    assert agent is not None
    agent.release()
    for copy in copies:
        os.close(copy)


# What an agent writes


def test_the_agent_s_positions_are_the_process_s(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    agent = tail(spool.folder)
    agent.acknowledge("a", 7)
    assert (spool.acknowledged("a"), spool.acknowledged("b")) == (7, 0)


def test_an_agent_removes_no_file_of_a_living_process(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    events = make_events(["x" * 1_000_000] * 10)
    for event in events:
        spool.segments.append(event, roomy)
    agent = tail(spool.folder)
    for child in "ab":
        agent.acknowledge(child, 10)
    agent.segments.tidy()
    assert [event.number for event in spool.reader.read(-1, 100)] == [event.number for event in events]
    die(spool)
    assert agent.inherit()
    agent.acknowledge("a", 11)
    agent.acknowledge("b", 11)
    agent.segments.tidy()
    # How far the last one goes is known to those who have read it.
    assert len(list(spool.folder.glob("*.log"))) == 1


def test_an_account_is_read_as_it_was_written(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    assert spool.account() == {}
    agent = tail(spool.folder)
    agent.write_account({"a": ACCOUNT_OF_A})
    assert spool.account() == {"a": ACCOUNT_OF_A}
    agent.write_account({"a": ACCOUNT_OF_A._replace(delivered=4), "b": ACCOUNT_OF_A})
    assert spool.account() == {"a": ACCOUNT_OF_A._replace(delivered=4), "b": ACCOUNT_OF_A}
    assert agent.account() == spool.account()


def test_long_texts_are_shortened_and_their_counts_stay(tmp_path: Path) -> None:
    spool = create(tmp_path)
    reasons = {f"{letter}{'x' * 10_000}": 1 for letter in "ab"}
    spool.write_account({"a": ACCOUNT_OF_A._replace(rejected_reasons=reasons, last_error="y" * 10_000)})
    found = spool.account()["a"]
    assert sum(found.rejected_reasons.values()) == 2
    assert all(len(text) <= 500 for text in [*found.rejected_reasons, found.last_error or ""])


GOOD = ACCOUNT_OF_A._asdict()
WRONG: dict[str, Any] = {
    "no object": [1, 2],
    "another format": {"account": 2, "children": {"a": GOOD}},
    "no children": {"account": 1},
    "children that are no object": {"account": 1, "children": [GOOD]},
    "too many children": {"account": 1, "children": {f"c{number}": GOOD for number in range(200)}},
    "a name that no child has": {"account": 1, "children": {"../a": GOOD}},
    "a child that is no object": {"account": 1, "children": {"a": 5}},
    "a missing number": {"account": 1, "children": {"a": {key: GOOD[key] for key in GOOD if key != "before"}}},
    "one field more": {"account": 1, "children": {"a": {**GOOD, "more": 1}}},
    "a negative number": {"account": 1, "children": {"a": {**GOOD, "dropped": -1}}},
    "a huge number": {"account": 1, "children": {"a": {**GOOD, "delivered": 2**63}}},
    "a truth value as a number": {"account": 1, "children": {"a": {**GOOD, "shortened": True}}},
    "a fraction": {"account": 1, "children": {"a": {**GOOD, "before": 1.5}}},
    "an unknown state": {"account": 1, "children": {"a": {**GOOD, "state": "fine"}}},
    "an error that is no text": {"account": 1, "children": {"a": {**GOOD, "last_error": 5}}},
    "reasons that do not add up": {"account": 1, "children": {"a": {**GOOD, "rejected_reasons": {"too old": 1}}}},
    "reasons that are no numbers": {"account": 1, "children": {"a": {**GOOD, "redacted": {"key": "two"}}}},
    "too many reasons": {"account": 1, "children": {"a": {**GOOD, "redacted": {str(n): 1 for n in range(1_000)}}}},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_account_that_no_agent_writes_counts_as_missing(tmp_path: Path, what: str) -> None:
    spool = create(tmp_path)
    (spool.folder / ACCOUNT).write_bytes(encode_line(orjson.dumps(WRONG[what])))
    (spool.folder / ACCOUNT).chmod(0o600)
    assert spool.account() == {}


@pytest.mark.parametrize("change", [lambda data: data[:-10], lambda data: b"", lambda data: data.replace(b"3", b"4")])
def test_a_damaged_account_counts_as_missing(tmp_path: Path, change: Any) -> None:
    spool = create(tmp_path)
    spool.write_account({"a": ACCOUNT_OF_A})
    path = spool.folder / ACCOUNT
    path.write_bytes(change(path.read_bytes()))
    assert spool.account() == {}


def test_an_account_that_others_can_write_or_that_is_a_link_counts_as_missing(tmp_path: Path) -> None:
    spool = create(tmp_path)
    spool.write_account({"a": ACCOUNT_OF_A})
    path = spool.folder / ACCOUNT
    path.chmod(0o666)
    assert spool.account() == {}
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert spool.account() == {}


def test_an_account_takes_the_place_of_whatever_has_its_name(tmp_path: Path) -> None:
    spool = create(tmp_path)
    (spool.folder / ACCOUNT).mkdir()
    (spool.folder / "account.new").mkdir()
    spool.write_account({"a": ACCOUNT_OF_A})
    assert spool.account() == {"a": ACCOUNT_OF_A}


def test_a_child_whose_account_is_wrong_does_not_cost_the_others_theirs(tmp_path: Path) -> None:
    spool = create(tmp_path)
    children = {"a": {**GOOD, "state": "fine"}, "b": GOOD}
    (spool.folder / ACCOUNT).write_bytes(encode_line(orjson.dumps({"account": 1, "children": children})))
    (spool.folder / ACCOUNT).chmod(0o600)
    with PrivateFolder.open(spool.folder) as folder:
        assert read_account(folder) == {"b": ACCOUNT_OF_A}


# What is due


def test_the_agent_sees_what_is_due(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    agent = tail(spool.folder)
    assert agent.due == 0
    spool.demand(12)
    assert agent.due == spool.due == 12


def test_nothing_is_due_if_the_file_is_damaged_or_gone_and_a_living_process_restores_it(tmp_path: Path) -> None:
    spool = hand_over(tmp_path)
    agent = tail(spool.folder)
    spool.demand(12)
    (spool.folder / DUE).write_bytes(b"x" * 30)
    assert agent.due == 0
    spool.demand(13)
    (spool.folder / DUE).unlink()
    assert agent.due == 0
    assert spool.standing() is Standing.CHANGED
    spool.mend(lambda first, last: [])
    assert agent.due == 13


def test_a_process_that_shares_nothing_demands_nothing(tmp_path: Path) -> None:
    spool = create(tmp_path, is_shared=False)
    spool.demand(5)
    assert not (spool.folder / DUE).exists()


def test_these_files_are_no_damage(tmp_path: Path) -> None:
    spool = create(tmp_path)
    spool.write_account({"a": ACCOUNT_OF_A})
    (spool.folder / "account.new").write_bytes(b"a kill left this")
    die(spool)
    found = Spool.recover(spool.folder)
    assert found is not None
    assert (found.reader.damage, found.children) == ([], ["a", "b"])
    found.acknowledge("a", 1)
    found.acknowledge("b", 1)
    found.close()
    assert not spool.folder.exists()
