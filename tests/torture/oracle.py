"""Tells what has gone wrong: from what processes have said, and what the backends have in the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.crashing import Said
from tests.servers.three_backends import Held

LAST_SECONDS = 1.0
"""What `spill` may lose."""

TOLERANCE_SECONDS = 0.25
"""How much older a lost event may seem: from the return of `emit` to when it is said, and from the decision to kill
to the kill, a busy machine takes its time."""

NOT_WHOLE = "not whole:"
"""What the name of an event begins with whose message is not what was logged."""

ON_THE_WAY_SECONDS = 0.5
"""How long what a forked process says may be on its way to its parent. What is then, goes with the parent."""


@dataclass(frozen=True)
class End:
    """The end of a process.

    Attributes:
        at: When, in seconds.
        is_sudden: Whether it was killed, or ended itself without ceremony.
        pauses: From when to when it was stopped, or the machine had something else to do.
    """

    at: float
    is_sudden: bool
    pauses: Sequence[tuple[float, float]] = ()

    def ran_since(self, moment: float) -> float:
        """Return how many seconds the process ran between a moment and its end; negative if the moment came later."""
        ran, to = 0.0, self.at
        # From the last one on; they may overlap.
        for begin, end in sorted(self.pauses, reverse=True, key=lambda pause: pause[1]):
            if end > moment:
                ran += max(0.0, to - end)
                to = min(to, max(begin, moment))
        return ran + to - moment


@dataclass(frozen=True)
class Logged:
    """What was logged under one name.

    Attributes:
        name: The name.
        durability: That of the log store.
        backends: The backends that were to have it.
        emitted: The events for which `emit` returned.
        end: The end of the process that had the journal.
        fork: The end of the process that logged, if that is another one.
        remarks: What else there is to know of it, in words.
    """

    name: str
    durability: str
    backends: Collection[str]
    emitted: Sequence[Said]
    end: End
    fork: End | None = None
    remarks: Sequence[str] = ()

    def may_lack(self, said: Said) -> bool:
        """Return whether the event may be lost with the process that it was logged in, or with that one's parent."""
        age = self.end.ran_since(said.time)
        if self.durability == "memory":
            return True
        if self.fork and self.end.is_sudden and -TOLERANCE_SECONDS < age < ON_THE_WAY_SECONDS:
            return True
        if self.durability == "write_ahead":
            return False
        last = LAST_SECONDS + TOLERANCE_SECONDS
        if self.fork and self.end.at < said.time + TOLERANCE_SECONDS:
            # Its parent is gone, so it is a writer of its own.
            return self.fork.ran_since(said.time) < last
        return self.end.is_sudden and age < last


class Walk(NamedTuple):
    """A stream as `fetch` shows it, page by page.

    Attributes:
        oldest_first: The ids and names of its entries, page after page from its beginning.
        newest_first: The same from its end, in the same order.
    """

    oldest_first: Sequence[tuple[str, str]]
    newest_first: Sequence[tuple[str, str]]


@dataclass
class Evidence:
    """All there is to judge by.

    Attributes:
        logged: What was logged, under each name.
        excused: The names of the events that were destroyed on disk.
        held: A backend → what it holds, in the order of arrival, copies and all.
        shown: A backend that can be read → each of the streams, as it is shown.
        by_time: The backends that do not promise a writer's order where its clock steps.
        stats: A process that ended in order → a child and its writer → the child's last account.
        destroyed: How many times something was destroyed on disk.
        threads: A process → the threads that it lacked.
        damage: The files that processes have set aside, but for those in which something was destroyed.
        other: What else went wrong, in words.
    """

    logged: Sequence[Logged]
    excused: Collection[str] = ()
    held: Mapping[str, Sequence[Held]] = field(default_factory=dict)
    shown: Mapping[str, Mapping[str, Walk]] = field(default_factory=dict)
    by_time: Collection[str] = ()
    stats: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    destroyed: int = 0
    threads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    damage: Sequence[str] = ()
    other: Sequence[str] = ()


def _views(evidence: Evidence) -> Iterable[tuple[str, str, list[str]]]:
    """Yield a backend, what is said of it, and the names of the events that it then has, without copies."""
    for backend, held in evidence.held.items():
        yield backend, f"{backend} holds", list({copy.uid: copy.message for copy in held}.values())
    for backend, walks in evidence.shown.items():
        yield backend, f"{backend} shows", [name for walk in walks.values() for _, name in walk.oldest_first]


def oldest_lost(evidence: Evidence) -> float:
    """Return how old an event was, in seconds, that `spill` lost of a process's own, at the most."""
    oldest = 0.0
    for backend, _, names in _views(evidence):
        there = set(names)
        for logged in evidence.logged:
            if logged.durability == "spill" and backend in logged.backends and not logged.fork and logged.end.is_sudden:
                lost = {said for said in logged.emitted if said.text not in there and said.text not in evidence.excused}
                oldest = max([oldest, *(logged.end.ran_since(said.time) for said in lost)])
    return oldest


def judge(evidence: Evidence) -> list[str]:
    """Return what is wrong, a line for each."""
    found = list(evidence.other)
    for backend, has, names in _views(evidence):
        found += _lost(evidence, backend, has, set(names))
    for backend, held in evidence.held.items():
        found += _wrong_copies(backend, held)
    for backend, walks in evidence.shown.items():
        sent_again = {
            uid for uid, copies in Counter(copy.uid for copy in evidence.held.get(backend, ())).items() if copies > 1
        }
        for stream, walk in walks.items():
            where = f"{backend}, stream {stream}"
            found += _shown_wrongly(where, walk)
            if backend not in evidence.by_time:
                found += _out_of_order(f"{where}, from the oldest on", walk.oldest_first)
                # From there the copy that arrived last is met first, which may be after later events.
                arrived_once = [(uid, name) for uid, name in walk.newest_first if uid not in sent_again]
                found += _out_of_order(f"{where}, from the newest on", arrived_once)
    found += _invented(evidence)
    for process, stats in evidence.stats.items():
        found += _wrong_account(process, stats, len(evidence.excused) + evidence.destroyed)
    found += [
        f"{process}: thread '{thread}' is not alive" for process, lacks in evidence.threads.items() for thread in lacks
    ]
    found += [f"what nobody had destroyed was taken for damage: {file}" for file in evidence.damage]
    return found


def _lost(evidence: Evidence, backend: str, has: str, there: set[str]) -> Iterable[str]:
    for logged in evidence.logged:
        if backend not in logged.backends:
            continue
        lost = [
            said
            for said in logged.emitted
            if said.text not in there and said.text not in evidence.excused and not logged.may_lack(said)
        ]
        if lost:
            first, last = lost[0], lost[-1]
            remarks = [
                f"{logged.end.ran_since(first.time):.2f} to {logged.end.ran_since(last.time):.2f} s before the end",
                f"the process {'died' if logged.end.is_sudden else 'ended in order'}",
                *logged.remarks,
            ]
            yield (
                f"{has} all but {len(lost)} of {len(logged.emitted)} events that are safe with {logged.durability}: "
                f"{first.text} to {last.text}; {'; '.join(remarks)}"
            )


def _wrong_copies(backend: str, held: Iterable[Held]) -> Iterable[str]:
    first: dict[str, Held] = {}
    last: dict[tuple[str, str], int] = {}
    for copy in held:
        if copy.uid in first:
            if first[copy.uid] != copy:
                yield f"{backend} has two events with one id: {first[copy.uid].message} and {copy.message}"
            continue
        first[copy.uid] = copy
        writer = copy.writer, copy.stream
        if copy.sequence <= last.get(writer, -1):
            yield f"{backend} got {copy.message} after a later event of its writer"
        last[writer] = copy.sequence
    yield from _twice(f"{backend}, by other ids", (copy.message for copy in first.values()))


def _twice(where: str, names: Iterable[str]) -> Iterable[str]:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        yield f"{where}: {len(twice)} events are there more than once, such as {twice[0]}"


def _shown_wrongly(where: str, walk: Walk) -> Iterable[str]:
    yield from _twice(f"{where}, from the oldest on", (name for _, name in walk.oldest_first))
    yield from _twice(f"{where}, from the newest on", (name for _, name in walk.newest_first))
    # Where one of two copies is left out, it is the one that is met later.
    oldest_first, newest_first = dict(walk.oldest_first), dict(walk.newest_first)
    if oldest_first != newest_first:
        yield (
            f"{where}: from the oldest on {len(oldest_first)} entries, from the newest on {len(newest_first)}; "
            f"{len(oldest_first.keys() - newest_first)} are in the first alone, "
            f"{len(newest_first.keys() - oldest_first)} in the other"
        )


def _out_of_order(where: str, entries: Iterable[tuple[str, str]]) -> Iterable[str]:
    # An id is a writer and a number; a name ends with the number of the thread's event.
    for what, place in (("writer", _writer_and_number), ("thread", _thread_and_number)):
        last: dict[str, tuple[int, str]] = defaultdict(lambda: (-1, ""))
        for id, name in entries:
            if name.startswith(NOT_WHOLE):
                continue
            whose, number = place(id, name)
            if number < last[whose][0]:
                yield f"{where}: {name} comes after {last[whose][1]} of the same {what}"
            last[whose] = number, name


def _writer_and_number(id: str, name: str) -> tuple[str, int]:
    hexadecimal = id.replace("-", "")
    return hexadecimal[:16], int(hexadecimal[16:], 16) & ((1 << 62) - 1)


def _thread_and_number(id: str, name: str) -> tuple[str, int]:
    # A forked process whose parent died goes on as a writer of its own, and between writers there is no order.
    thread, _, number = name.rpartition("/")
    return f"{_writer_and_number(id, name)[0]} {thread}", int(number)


def _invented(evidence: Evidence) -> Iterable[str]:
    emitted = {said.text for logged in evidence.logged for said in logged.emitted}
    for _, has, names in _views(evidence):
        extra: dict[str, int] = defaultdict(int)
        for name in set(names) - emitted:
            if name.startswith(NOT_WHOLE):
                yield f"{has} an event that is {name}"
            extra[name.rpartition("/")[0]] += 1
        # What a thread was about to say when it died.
        for thread, number in extra.items():
            if number > 1:
                yield f"{has} {number} events that {thread} never logged"


def _wrong_account(process: str, stats: Mapping[str, Mapping[str, Any]], excused: int) -> Iterable[str]:
    for child, account in stats.items():
        parts = [account[part] for part in ("delivered", "rejected", "dropped", "withheld", "pending")]
        if account["accepted"] != sum(parts) or min(parts) < 0:
            yield f"{process}: the account of '{child}' does not add up: {dict(account)}"
        if account["rejected"]:
            yield f"{process}: {account['rejected']} events of '{child}' were rejected: {account['rejected_reasons']}"
        if account["dropped"] > excused:
            yield f"{process}: {account['dropped']} events of '{child}' were dropped, {excused} were destroyed"
