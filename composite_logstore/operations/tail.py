"""Reads the logs of a run, from all its streams by time, and follows them while the run is in progress."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import TYPE_CHECKING, cast
from uuid import UUID

from composite_logstore import clock
from composite_logstore.artifact_store import open_artifact_store
from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, asking_zenml, nearest
from composite_logstore.catalog.runs import RunStream, find_run, streams_of_run
from composite_logstore.catalog.stores import FLAVOR, RegisteredStore, find_store, load_store
from composite_logstore.operations.asking import ANSWER_SECONDS, ask
from composite_logstore.reading.nothing import logged_events
from composite_logstore.reading.ranks import rank_of
from composite_logstore.zenml import answers_pages, fetch_page, moved

if TYPE_CHECKING:
    from zenml.log_stores import BaseLogStore

    from composite_logstore.zenml import LogEntry, LogsEntriesFilter

POLL_SECONDS = 2.0
"""How often to ask for new entries while following."""
QUIET_SECONDS = 10.0
"""How long to follow a stream without new entries once its run or step has ended: logs may still be on their way."""
GIVE_UP_SECONDS = 300.0
"""How long to keep trying while a log store cannot be read."""
# All streams together hold this many entries in memory, however many streams there are.
_MOST_ENTRIES = 20_000
_LARGEST_PAGE = 2_000
_SMALLEST_PAGE = 20

# About so many streams the other children are asked, if there are no entries.
_MOST_ASKED = 20
NOTICES = "composite_logstore"
"""The logger of entries by which the log store itself says something, such as that others are missing."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def tail(
    run: str,
    *,
    step: str | None = None,
    source: str | None = None,
    child: str | None = None,
    store: str | None = None,
    wanted: LogsEntriesFilter | None = None,
    ranks: Collection[int] = (),
    notice: Callable[[str], None] | None = None,
) -> Tail:
    """Find the log streams of a run, to read them by time.

    Examples:
        >>> [entry.message for stream, entry in tail("train-1", step="fit").entries()]
        ['epoch 1', 'epoch 2', 'epoch 3']

    Args:
        run: The run's name or id.
        step: Only the logs of this step.
        source: Only the streams with this source, such as `step` or `client`.
        child: Read from this child instead of the primary.
        store: Read from this log store, which may hold copies, no matter which log store collected the logs.
        wanted: Only these entries.
        ranks: Only the entries of the processes of a distributed training with these ranks; all if empty.
        notice: Is told sentences for people, such as that a log store is unavailable and reading is tried again.

    Raises:
        ArgumentError: There is no such run, step, source, log store or child.
        NoAnswerError: ZenML cannot be reached, or a log store cannot be loaded here.
    """
    from composite_logstore.zenml import LogsEntriesFilter

    readers = Readers(child, find_store(store) if store else None)
    return Tail(run, step, source, readers, wanted or LogsEntriesFilter(), ranks, notice or (lambda text: None))


@dataclass
class Whereabouts:
    """The children that hold logs which the one that was asked does not have.

    Attributes:
        asked: What was asked for them: `child 'live' of log store 'logs'`.
        holders: The children, by name, that hold some of them.
        without: The children that hold none of them.
        troubles: A child's name → why it could not be read.
        is_filtered: Whether the child that was asked holds some, but none that was wanted.
        is_silent: Whether nothing was logged, as the metadata of the steps says. Then no child is asked.
    """

    asked: str = ""
    holders: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)
    is_filtered: bool = False
    is_silent: bool = False


class Tail:
    """The logs of a run, and how far they have been read.

    Attributes:
        run: The run, as ZenML knew it when it was last asked.
        unread: The labels of streams that cannot be read, and why.
        shown: The number of entries so far, without those by which the log store itself says something.
    """

    def __init__(
        self,
        run: str,
        step: str | None,
        source: str | None,
        readers: Readers,
        wanted: LogsEntriesFilter,
        ranks: Collection[int],
        notice: Callable[[str], None],
    ) -> None:
        """Find the streams; the arguments are those of `tail`."""
        self.run = find_run(run)
        self.unread: dict[str, str] = {}
        self.shown = 0
        self._step = step
        self._source = source
        self._readers = readers
        self._wanted = wanted
        self._ranks = frozenset(ranks)
        self._notice = notice
        self._streams: dict[UUID, TailedStream] = {}
        self._ended: set[UUID] = set()
        self._clock = clock.current
        self._find()
        if not self._streams and not self.run.in_progress:
            self._explain_nothing()

    @property
    def streams(self) -> int:
        """The number of streams that are read."""
        return len(self._streams)

    @property
    def missing(self) -> dict[str, str]:
        """The labels of streams of which the log store has no entries, and why."""
        return {stream.of.label: stream.missing for stream in self._streams.values() if stream.missing}

    def entries(self, follow: bool = False) -> Iterator[tuple[RunStream, LogEntry]]:
        """Yield the entries by time, each with its stream.

        Args:
            follow: Whether to wait for new entries until the run has ended and its last logs have arrived.

        Raises:
            NoAnswerError: ZenML or a log store cannot be reached; while following, for `GIVE_UP_SECONDS`.
        """
        from composite_logstore.zenml import LogStoreError

        if follow and not self._is_long_over():
            yield from self._follow()
            return
        try:
            yield from self._read(self._streams.values())
        except (LogStoreError, ValueError, NotImplementedError) as error:
            raise NoAnswerError(str(error)) from None

    def _read(self, streams: Iterable[TailedStream]) -> Iterator[tuple[RunStream, LogEntry]]:
        for stream, entry in merged(streams):
            self.shown += entry.name != NOTICES
            yield stream.of, entry

    def whereabouts(self) -> Whereabouts:
        """Find out where the logs are, if nothing was found or some streams are `missing`.

        Asks the other children that can be read, each for one entry, about some of the streams: for a few seconds.
        """
        from composite_logstore.zenml import LogsEntriesFilter

        found = Whereabouts()
        streams = list(self._streams.values())
        if self.shown:
            streams = [stream for stream in streams if stream.missing]
        elif len(streams) <= _MOST_ASKED and all(logged_events(stream.of.logs) == 0 for stream in streams):
            found.is_silent = True
            return found
        ends = time.monotonic() + ANSWER_SECONDS
        holds: dict[str, bool] = {}
        for stream in streams[:_MOST_ASKED]:
            store, asked = self._readers.asked(stream.of)
            found.asked = found.asked or asked
            if store is None or (seconds := ends - time.monotonic()) <= 0:
                continue
            first = self._readers.child_of(store)
            others = [one for one in store.config.children if not one.unreadable and one.name != first]
            is_filtered = bool(self._ranks) or self._wanted != LogsEntriesFilter()
            children = [store.config.child(first), *others] if is_filtered else others
            for name, answer in ask(children, stream.of.logs, seconds).items():
                if answer.trouble:
                    found.troubles.setdefault(name, answer.trouble)
                elif name == first:
                    found.is_filtered |= answer.holds
                else:
                    holds[name] = holds.get(name, False) or answer.holds
        found.holders = [name for name, does in holds.items() if does]
        found.without = [name for name, does in holds.items() if not does]
        return found

    def _follow(self) -> Iterator[tuple[RunStream, LogEntry]]:
        from composite_logstore.zenml import LogStoreError

        if not self._streams:
            self._notice("No such logs yet; waiting ...")
        awake = self._clock.signal()
        trouble_since: float | None = None
        while True:
            begin = self._clock.now()
            try:
                yield from self._read(self._open())
                self.run = find_run(str(self.run.id))
                self._find()
                trouble_since = None
            except (LogStoreError, NoAnswerError) as error:
                message = error.message if isinstance(error, NoAnswerError) else str(error)
                if trouble_since is None:
                    trouble_since = begin
                    self._notice(f"{message} Trying again ...")
                elif begin - trouble_since >= GIVE_UP_SECONDS:
                    raise NoAnswerError(message) from None
            except (ValueError, NotImplementedError) as error:
                raise NoAnswerError(str(error)) from None
            if trouble_since is None and not self.run.in_progress and not self._open():
                return
            # A slow log store is asked less often, so that it spends no more than half of its time on this.
            awake.wait(max(POLL_SECONDS, 2 * (self._clock.now() - begin)))

    def _is_long_over(self) -> bool:
        """Return whether the run ended so long ago that no logs are on their way any more."""
        from zenml.utils.time_utils import utc_now

        if self.run.in_progress:
            return False
        ended = self.run.end_time
        return ended is None or utc_now() - ended.replace(tzinfo=None) > timedelta(seconds=GIVE_UP_SECONDS)

    def _open(self) -> list[TailedStream]:
        """Return the streams that may get new entries; a stream drops out soon after its step or run has ended."""
        now = self._clock.now()
        for id, stream in self._streams.items():
            if stream.of.in_progress:
                stream.quiet_since = now
            elif now - stream.quiet_since > QUIET_SECONDS:
                self._ended.add(id)
        streams = [stream for id, stream in self._streams.items() if id not in self._ended]
        for stream in streams:
            stream.look_again()
        return streams

    def _find(self) -> None:
        """Ask ZenML for the streams, of which a run in progress gets more."""
        new = []
        for stream in map(self._readers.claim, streams_of_run(self.run, self._step, self._source)):
            known = self._streams.get(stream.logs.id)
            if known is None:
                new.append(stream)
            else:
                known.of = stream
        number = len(self._streams) + len(new)
        limit = max(_SMALLEST_PAGE, min(_LARGEST_PAGE, _MOST_ENTRIES // max(1, number)))
        for stream in new:
            store = self._readers.of(stream)
            if isinstance(store, str):
                self.unread[stream.label] = store
            else:
                self._streams[stream.logs.id] = TailedStream(stream, store, self._wanted, limit, self._ranks)

    def _explain_nothing(self) -> None:
        """Say why the run has no stream that can be read, if an argument is to blame.

        Raises:
            ArgumentError: There is no such step or source, or no stream can be read from that child.
        """
        if self.unread:
            raise ArgumentError("child", next(iter(self.unread.values())))
        every = list(streams_of_run(self.run))
        steps = {stream.step_name for stream in every if stream.step_name}
        if self._step is not None and self._step not in steps:
            raise ArgumentError("step", f"run '{self.run.name}' has no step '{self._step}'{nearest(self._step, steps)}")
        sources = {stream.logs.source for stream in every if self._step in (None, stream.step_name)}
        if self._source is not None and sources:
            hint = nearest(self._source, sources)
            raise ArgumentError("source", f"there are no logs with source '{self._source}'{hint}")


class TailedStream:
    """One stream, read page by page from its oldest entry.

    Attributes:
        of: The stream, and the run or step that it belongs to.
        missing: Why the log store has no entries of it, empty if it has.
        quiet_since: The time of the last new entry, in seconds of the monotonic clock.
    """

    def __init__(
        self,
        of: RunStream,
        store: BaseLogStore,
        wanted: LogsEntriesFilter,
        limit: int,
        ranks: Collection[int] = (),
    ) -> None:
        """Prepare to read.

        Args:
            of: The stream.
            store: The log store to read it from.
            wanted: Which entries to read.
            limit: The most entries of a page.
            ranks: The ranks of the processes to read the entries of; all if empty.
        """
        from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore

        self.of = of
        self.missing = ""
        self.quiet_since = clock.current.now()
        self._store = store
        self._wanted = wanted
        self._limit = limit
        self._ranks = ranks
        # ZenML's own log store of artifact stores supports neither filters nor cursors.
        self._is_filtered_here = isinstance(store, ArtifactLogStore) or not answers_pages(store)
        self._buffer: deque[LogEntry] = deque()
        self._after: str | None = None
        self._without_cursor = 0
        self._is_at_end = False
        self._time = _EPOCH

    @property
    def began(self) -> datetime:
        """A time before the first entry, with a minute's margin since the clocks of ZenML and the run may differ."""
        return self.of.logs.created.replace(tzinfo=timezone.utc) - timedelta(minutes=1)

    def look_again(self) -> None:
        """Look for new entries at the next read."""
        self._is_at_end = False

    def time_of_next(self) -> datetime | None:
        """Return the time of the next entry, None if there is none.

        The time never decreases, so that merging by it keeps the order of each stream.

        Raises:
            zenml.exceptions.LogStoreError: The stream cannot be read.
        """
        while not self._buffer and not self._is_at_end:
            self._read()
        if not self._buffer:
            return None
        time = self._buffer[0].timestamp
        if time is not None:
            self._time = max(self._time, time if time.tzinfo else time.replace(tzinfo=timezone.utc))
        return self._time

    def pop(self) -> LogEntry:
        """Return the next entry."""
        return self._buffer.popleft()

    def _read(self) -> None:
        from zenml.exceptions import DoesNotExistException

        wanted = None if self._is_filtered_here else self._wanted
        try:
            if self._after is None:
                page = fetch_page(self._store, self.of.logs, start="oldest", limit=self._limit, filter_=wanted)
            else:
                page = fetch_page(self._store, self.of.logs, after=self._after)
        except DoesNotExistException as error:
            self.missing, self._is_at_end = str(error), True
            return
        self.missing = ""
        items = page.items
        if self._after is None and page.after is None:
            items, self._without_cursor = items[self._without_cursor :], len(items)
            self._is_at_end = True
        elif page.after in (None, self._after):
            # The cursor is kept: later there may be entries after it.
            self._is_at_end = True
        else:
            # Even if the page is empty: a log store scans a limited amount at a time.
            self._after = page.after
        if items:
            self.quiet_since = clock.current.now()
        self._buffer.extend(entry for entry in items if self._is_wanted(entry))

    def _is_wanted(self, entry: LogEntry) -> bool:
        if self._ranks and rank_of(entry) not in self._ranks and entry.name != NOTICES:
            return False
        return not self._is_filtered_here or _is_wanted(entry, self._wanted)


def _is_wanted(entry: LogEntry, wanted: LogsEntriesFilter) -> bool:
    time = entry.timestamp
    if time is not None and time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    return (
        (wanted.search is None or wanted.search.lower() in entry.message.lower())
        and (wanted.level is None or (entry.level is not None and entry.level.value >= wanted.level.value))
        and (wanted.since is None or (time is not None and time >= wanted.since))
        and (wanted.until is None or (time is not None and time <= wanted.until))
    )


def merged(streams: Iterable[TailedStream]) -> Iterator[tuple[TailedStream, LogEntry]]:
    """Yield the entries of all streams by time, each stream in its own order.

    A stream is opened when the others have reached its beginning, since a run may have thousands of steps, one after
    the other. If a stream cannot be read, no entry is lost: another call continues where this one ended.

    Raises:
        zenml.exceptions.LogStoreError: A stream cannot be read.
    """
    waiting = deque(sorted(streams, key=lambda stream: stream.began))
    number = count()
    opened: list[tuple[datetime, int, TailedStream]] = []

    def line_up(stream: TailedStream) -> None:
        time = stream.time_of_next()
        if time is not None:
            heapq.heappush(opened, (time, next(number), stream))

    while waiting or opened:
        while waiting and (not opened or waiting[0].began <= opened[0][0]):
            line_up(waiting.popleft())
        if opened:
            stream = heapq.heappop(opened)[2]
            yield stream, stream.pop()
            line_up(stream)


class Readers:
    """Chooses the log store to read each stream from: the one that collected it, or one that may hold a copy."""

    def __init__(self, child: str | None, store: RegisteredStore | None) -> None:
        """Prepare to read.

        Args:
            child: The child to read from; each log store's primary if not given.
            store: The log store to read all streams from; the collector of each if not given.
        """
        self._child = child
        self._store = store
        self._stores: dict[UUID | None, BaseLogStore | str] = {}
        self._composites: dict[UUID | None, RegisteredStore] = {}

    def claim(self, stream: RunStream) -> RunStream:
        """Return the stream as if it had been collected by the log store that it is read from."""
        if self._store is None:
            return stream
        return replace(stream, logs=moved(stream.logs, log_store_id=self._store.store.id))

    def of(self, stream: RunStream) -> BaseLogStore | str:
        """Return the log store to read a stream from, or the reason why there is none.

        Raises:
            NoAnswerError: ZenML cannot be reached, or the log store cannot be loaded here.
        """
        if self._store is not None:
            return self._part_of(self._store)
        if stream.collector not in self._stores:
            with asking_zenml():
                self._stores[stream.collector] = self._find(stream)
        return self._stores[stream.collector]

    def _find(self, stream: RunStream) -> BaseLogStore | str:
        from zenml.client import Client
        from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore
        from zenml.log_stores.base_log_store import BaseLogStore
        from zenml.stack import StackComponent

        zen_store = Client().zen_store
        if stream.logs.log_store_id is None:
            if stream.logs.artifact_store_id is None:
                return "no log store collected these logs"
            if self._child:
                return "ZenML's own log store collected these logs, and it has no children"
            model = zen_store.get_stack_component(stream.logs.artifact_store_id)
            return ArtifactLogStore.from_artifact_store(artifact_store=open_artifact_store(model))
        model = zen_store.get_stack_component(stream.logs.log_store_id)
        if model.flavor_name == FLAVOR:
            self._composites[stream.collector] = found = load_store(model)
            return self._part_of(found)
        if self._child:
            return (
                f"log store '{model.name}' of flavor '{model.flavor_name}' collected these logs, and it has no children"
            )
        try:
            return cast(BaseLogStore, StackComponent.from_model(model))
        except Exception as error:
            raise NoAnswerError(f"log store '{model.name}' cannot be loaded here ({type(error).__name__})") from error

    def asked(self, stream: RunStream) -> tuple[RegisteredStore | None, str]:
        """Return the composite log store that a stream was read from, if it was one, and what was asked, in words."""
        found = self._store or self._composites.get(stream.collector)
        if found is None:
            return None, "the log store that collected them"
        return found, f"child '{self.child_of(found)}' of log store '{found.name}'"

    def child_of(self, found: RegisteredStore) -> str:
        """Return the name of the child that a composite log store is read from."""
        return self._child or found.config.primary

    def _part_of(self, found: RegisteredStore) -> BaseLogStore | str:
        if self._child is None:
            return found.store
        known = [child.name for child in found.config.children]
        if self._child not in known:
            return f"log store '{found.name}' has no child '{self._child}'{nearest(self._child, known)}"
        if why := found.config.child(self._child).unreadable:
            return f"child '{self._child}' of log store '{found.name}' cannot be read: {why}"
        return found.reading_from(self._child)
