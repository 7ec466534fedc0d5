"""`composite-logstore logs`: the logs of a run or a step in the terminal, and what comes as it runs."""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import TYPE_CHECKING, cast
from uuid import UUID

import click
from zenml.utils.time_utils import utc_now

from composite_logstore import clock
from composite_logstore.artifact_store import open_artifact_store
from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, asking_zenml, nearest
from composite_logstore.catalog.runs import RunStream, find_run, streams_of_run
from composite_logstore.catalog.stores import FLAVOR, RegisteredStore, find_store, load_store
from composite_logstore.cli.console import Command, output_option, say_json, warn
from composite_logstore.cli.options import Level, Moment
from composite_logstore.inert import inert, paragraph

if TYPE_CHECKING:
    from zenml.log_stores import BaseLogStore
    from zenml.models import LogEntry, LogsEntriesFilter, PipelineRunResponse

POLL_SECONDS = 2.0
"""How often `--follow` asks for what is new."""
SETTLE_SECONDS = 10.0
"""How long `--follow` goes on without anything new once the run has ended: its last logs are on their way."""
GIVE_UP_SECONDS = 300.0
"""How long `--follow` goes on while a log store cannot be read."""
# All streams together have this many entries in memory, whatever their number.
_MOST_ENTRIES = 20_000
_LARGEST_PAGE = 2_000
_SMALLEST_PAGE = 20

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Stream:
    """One stream that is read from its oldest entry on, a page at a time, as far as it goes.

    Attributes:
        of: The stream, and the run or step whose it is.
        missing: Why there is nothing of it where it is looked for, empty if there is.
        quiet_since: Since when there has been nothing new, by the clock that never goes back.
    """

    def __init__(self, of: RunStream, store: BaseLogStore, wanted: LogsEntriesFilter, limit: int) -> None:
        """Begin.

        Args:
            of: The stream.
            store: What to read it with.
            wanted: What to read.
            limit: The most entries of a page.
        """
        from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore

        self.of = of
        self.missing = ""
        self.quiet_since = clock.current.now()
        self._store = store
        self._wanted = wanted
        self._limit = limit
        # ZenML's own log store of artifact stores knows no filters, and no cursors.
        self._is_filtered_here = isinstance(store, ArtifactLogStore)
        self._buffer: deque[LogEntry] = deque()
        self._after: str | None = None
        self._without_cursor = 0
        self._is_at_end = False
        self._time = _EPOCH

    @property
    def began(self) -> datetime:
        """When it began, or some time before that: ZenML's server and who logs may disagree about the time."""
        return self.of.logs.created.replace(tzinfo=timezone.utc) - timedelta(minutes=1)

    def look_again(self) -> None:
        """Look for more, though there was no more."""
        self._is_at_end = False

    def time_of_next(self) -> datetime | None:
        """Return the time of the next entry, None if there is none. Never goes back: a writer's order is kept.

        Raises:
            zenml.exceptions.LogStoreError: It cannot be read.
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
                page = self._store.fetch(self.of.logs, start="oldest", limit=self._limit, filter_=wanted)
            else:
                page = self._store.fetch(self.of.logs, after=self._after)
        except DoesNotExistException as error:
            self.missing, self._is_at_end = str(error), True
            return
        self.missing = ""
        items = page.items
        if self._after is None and page.after is None:
            items, self._without_cursor = items[self._without_cursor :], len(items)
            self._is_at_end = True
        elif page.after in (None, self._after):
            # Its place is kept: later there may be something after it.
            self._is_at_end = True
        else:
            # Without entries, too: a log store looks through so much at a time.
            self._after = page.after
        if items:
            self.quiet_since = clock.current.now()
        self._buffer.extend(entry for entry in items if not self._is_filtered_here or _is_wanted(entry, self._wanted))


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


def merged(streams: Iterable[Stream]) -> Iterator[tuple[Stream, LogEntry]]:
    """Yield what there is of all streams, by time, each stream in its own order.

    A stream is opened when its time has come: a run may have thousands of steps, one after the other. If one cannot
    be read, nothing of the others is lost: whoever begins anew goes on where this ended.

    Raises:
        zenml.exceptions.LogStoreError: A stream cannot be read.
    """
    waiting = deque(sorted(streams, key=lambda stream: stream.began))
    number = count()
    opened: list[tuple[datetime, int, Stream]] = []

    def line_up(stream: Stream) -> None:
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
    """What to read each stream with: the log store that collected it, or another that may have a copy."""

    def __init__(self, child: str | None, store: RegisteredStore | None) -> None:
        """Begin.

        Args:
            child: The child to read from; each log store's primary if not given.
            store: The log store to read all streams from; that which collected each if not given.
        """
        self._child = child
        self._store = store
        self._stores: dict[UUID | None, BaseLogStore | str] = {}

    def claim(self, stream: RunStream) -> RunStream:
        """Return the stream as one that the log store collected which it is read from."""
        if self._store is None:
            return stream
        logs = stream.logs.model_copy(deep=True)
        logs.get_body().log_store_id = self._store.store.id
        return replace(stream, logs=logs)

    def of(self, stream: RunStream) -> BaseLogStore | str:
        """Return what to read the stream with, or why there is nothing of the kind.

        Raises:
            NoAnswerError: ZenML cannot be asked, or the log store cannot be loaded here.
        """
        if self._store is not None:
            return self._part_of(self._store)
        key = stream.logs.log_store_id or stream.logs.artifact_store_id
        if key not in self._stores:
            with asking_zenml():
                self._stores[key] = self._find(stream)
        return self._stores[key]

    def _find(self, stream: RunStream) -> BaseLogStore | str:
        from zenml.client import Client
        from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore
        from zenml.log_stores.base_log_store import BaseLogStore
        from zenml.stack import StackComponent

        zen_store = Client().zen_store
        if stream.logs.log_store_id is None:
            if stream.logs.artifact_store_id is None:
                return "no log store has collected them"
            if self._child:
                return "ZenML's own log store has collected them, which has no children"
            model = zen_store.get_stack_component(stream.logs.artifact_store_id)
            return ArtifactLogStore.from_artifact_store(artifact_store=open_artifact_store(model))
        model = zen_store.get_stack_component(stream.logs.log_store_id)
        if model.flavor_name == FLAVOR:
            return self._part_of(load_store(model))
        if self._child:
            return f"log store '{model.name}' of flavor '{model.flavor_name}' has collected them, which has no children"
        try:
            return cast(BaseLogStore, StackComponent.from_model(model))
        except Exception as error:
            raise NoAnswerError(f"log store '{model.name}' cannot be loaded here ({type(error).__name__})") from error

    def _part_of(self, found: RegisteredStore) -> BaseLogStore | str:
        if self._child is None:
            return found.store
        known = [child.name for child in found.config.children]
        if self._child not in known:
            return f"log store '{found.name}' has no child '{self._child}'{nearest(self._child, known)}"
        if why := found.config.child(self._child).unreadable:
            return f"child '{self._child}' of log store '{found.name}' cannot be read: {why}"
        return found.reading_from(self._child)


# The command


@click.command(cls=Command)
@click.argument("run")
@click.option("--step", metavar="NAME", help="Only this step's.")
@click.option("--source", metavar="NAME", help="Only the streams with this source, such as 'step' or 'client'.")
@click.option("--from", "child", metavar="CHILD", help="Read from this child, and not from the primary.")
@click.option(
    "--store", metavar="STORE", help="Read from this log store, which may have copies, whichever collected them."
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes until the run has ended.")
@click.option("--since", type=Moment(), help="Only what was logged since then: a time, or how long ago, such as '90m'.")
@click.option("--until", type=Moment(), help="Only what was logged until then.")
@click.option("--level", type=Level(), help="Only this level and those above it.")
@click.option("--search", metavar="TEXT", help="Only what has this text; how exactly, the backend decides.")
@click.option("--raw", "colours", is_flag=True, help="Let messages have the colours that they were logged with.")
@output_option
def logs(
    run: str,
    step: str | None,
    source: str | None,
    child: str | None,
    store: str | None,
    follow: bool,
    since: datetime | None,
    until: datetime | None,
    level: str | None,
    search: str | None,
    colours: bool,
    output: str,
) -> None:
    """Show the logs of the run RUN, given by its name or id, or those of one of its steps.

    They come by time, from the log store that collected them. What a terminal would obey is shown, and the further
    lines of a message are indented. With '--output json' each is a line of JSON.

    Exits with 0 if they were shown, with 1 if there are none where they were looked for, with 2 if it was called
    wrongly, with 3 if ZenML or the backend cannot be asked, and with 130 if a Ctrl-C ended it.
    """
    from zenml.models import LogsEntriesFilter

    if colours and output == "json":
        raise click.UsageError("'--raw' is for people; '--output json' has messages as they were logged.")
    if follow and until:
        raise click.UsageError("'--follow' goes on until the run has ended, and '--until' ends before: give one.")
    wanted = LogsEntriesFilter(search=search, level=level, since=since, until=until)  # type: ignore[arg-type]
    try:
        found = find_run(run)
        readers = Readers(child, find_store(store, "store") if store else None)
        showing = _Showing(found, step, source, readers, wanted, output, colours)
        showing.begin()
        if follow and not _has_settled(found):
            showing.follow()
        else:
            showing.show()
    except KeyboardInterrupt:
        sys.exit(130)
    showing.end()


def _has_settled(run: PipelineRunResponse) -> bool:
    """Return whether the run ended so long ago that nothing of it is on its way any more."""
    if run.in_progress:
        return False
    return run.end_time is None or utc_now() - run.end_time.replace(tzinfo=None) > timedelta(seconds=GIVE_UP_SECONDS)


class _Showing:
    """What is shown of a run, and how far that is."""

    def __init__(
        self,
        run: PipelineRunResponse,
        step: str | None,
        source: str | None,
        readers: Readers,
        wanted: LogsEntriesFilter,
        output: str,
        colours: bool,
    ) -> None:
        self._run = run
        self._step = step
        self._source = source
        self._readers = readers
        self._wanted = wanted
        self._streams: dict[UUID, Stream] = {}
        self._unread: dict[str, str] = {}
        self._settled: set[UUID] = set()
        self._clock = clock.current
        self._colours = colours
        self._print = _say_as_json if output == "json" else self._say

    def begin(self) -> None:
        """Find the streams.

        Raises:
            ArgumentError: There is no such step or source, or none of them can be read so.
        """
        self._find()
        if self._streams or self._run.in_progress:
            return
        if self._unread:
            raise ArgumentError("child", next(iter(self._unread.values())))
        every = list(streams_of_run(self._run))
        steps = {stream.step_name for stream in every if stream.step_name}
        if self._step is not None and self._step not in steps:
            raise ArgumentError(
                "step", f"run '{self._run.name}' has no step '{self._step}'{nearest(self._step, steps)}"
            )
        sources = {stream.logs.source for stream in every if self._step in (None, stream.step_name)}
        if self._source is not None and sources:
            what = f"there are no logs with source '{self._source}'{nearest(self._source, sources)}"
            raise ArgumentError("source", what)

    def _find(self) -> None:
        new = []
        for stream in map(self._readers.claim, streams_of_run(self._run, self._step, self._source)):
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
                self._unread[stream.label] = store
            else:
                self._streams[stream.logs.id] = Stream(stream, store, self._wanted, limit)

    def show(self) -> None:
        """Show what there is.

        Raises:
            NoAnswerError: A log store cannot be read.
        """
        from zenml.exceptions import LogStoreError

        try:
            self._show(self._streams.values())
        except (LogStoreError, ValueError, NotImplementedError) as error:
            raise NoAnswerError(str(error)) from None

    def _show(self, streams: Iterable[Stream]) -> None:
        for stream, entry in merged(streams):
            self._print(stream.of, entry)

    def follow(self) -> None:
        """Show what there is and what comes, until the run has ended and its last logs have come.

        Raises:
            NoAnswerError: ZenML or a log store cannot be asked for `GIVE_UP_SECONDS`.
        """
        from zenml.exceptions import LogStoreError

        if not self._streams:
            warn("There is nothing of the kind yet; waiting ...")
        awake = self._clock.signal()
        trouble_since: float | None = None
        while True:
            begin = self._clock.now()
            try:
                self._show(self._open())
                self._run = find_run(str(self._run.id))
                self._find()
                trouble_since = None
            except (LogStoreError, NoAnswerError) as error:
                if trouble_since is None:
                    trouble_since = begin
                    warn(f"{error} Trying again ...")
                elif begin - trouble_since >= GIVE_UP_SECONDS:
                    raise NoAnswerError(str(error)) from None
            except (ValueError, NotImplementedError) as error:
                raise NoAnswerError(str(error)) from None
            if trouble_since is None and not self._run.in_progress and not self._open():
                return
            # What takes long is not asked for more often than it can be answered.
            awake.wait(max(POLL_SECONDS, 2 * (self._clock.now() - begin)))

    def _open(self) -> list[Stream]:
        """Return the streams that more may come of: those whose step has ended are soon left alone."""
        now = self._clock.now()
        for id, stream in self._streams.items():
            if stream.of.in_progress:
                stream.quiet_since = now
            elif now - stream.quiet_since > SETTLE_SECONDS:
                self._settled.add(id)
        streams = [stream for id, stream in self._streams.items() if id not in self._settled]
        for stream in streams:
            stream.look_again()
        return streams

    def end(self) -> None:
        """Say what could not be shown, and exit with 1 if there was nothing at all."""
        missing = {stream.of.label: stream.missing for stream in self._streams.values() if stream.missing}
        if missing:
            warn(f"Nothing was found of {', '.join(sorted(missing))}: {next(iter(missing.values()))}")
        if self._unread:
            warn(f"Not read: {', '.join(sorted(self._unread))}: {next(iter(self._unread.values()))}")
        if not self._streams and not self._unread:
            warn(f"Run '{self._run.name}' has no logs of that kind.")
        if len(missing) == len(self._streams):
            sys.exit(1)

    def _say(self, of: RunStream, entry: LogEntry) -> None:
        level = entry.level.name if entry.level else ""
        time = entry.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if entry.timestamp else ""
        whose = f" [{inert(of.label, '')}]" if len(self._streams) > 1 else ""
        message = paragraph(entry.message, self._colours)
        click.echo(
            f"{click.style(time, dim=True)} {click.style(f'{level:8}', fg=_COLOURS.get(level))}{whose} {message}",
            # Those who ask for colours may have them in a pipe, too.
            color=True if self._colours else None,
        )


_COLOURS = {"DEBUG": "blue", "WARN": "yellow", "ERROR": "red", "CRITICAL": "red"}


def _say_as_json(of: RunStream, entry: LogEntry) -> None:
    say_json(
        {
            "timestamp": entry.timestamp.isoformat() if entry.timestamp else None,
            "level": entry.level.name if entry.level else None,
            "message": entry.message,
            "logger": entry.name,
            "file": entry.filename,
            "line": entry.lineno,
            "id": str(entry.id),
            "run": of.run_name,
            "step": of.step_name or None,
            "source": of.logs.source,
            "logs_id": str(of.logs.id),
        }
    )
