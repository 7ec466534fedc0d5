"""Verifies that the children of a log store hold the same events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from typing import IO

import orjson
from pydantic import TypeAdapter

from composite_logstore.catalog.errors import NoAnswerError
from composite_logstore.catalog.runs import RunStream
from composite_logstore.catalog.stores import RegisteredStore, collectors, find_store, may_hold, open_child
from composite_logstore.child_config import ChildConfig
from composite_logstore.names import counted
from composite_logstore.operations.asking import ask
from composite_logstore.operations.copying import stream_of
from composite_logstore.operations.progress import ProgressCallback, Reporter
from composite_logstore.operations.selection import Selection, state_folder
from composite_logstore.parity.compare import compare
from composite_logstore.parity.result import StreamParity
from composite_logstore.parity.scan import Source
from composite_logstore.parity.summary import ParitySummary
from composite_logstore.spool.lock import lock_file

_SAVED = TypeAdapter(StreamParity)


def verify(
    store: str,
    selection: Selection | None = None,
    children: Sequence[str] = (),
    *,
    anew: bool = False,
    progress: ProgressCallback | None = None,
    summary: ParitySummary | None = None,
) -> ParitySummary:
    """Compare the events of each stream in all children of a log store, by their ids.

    When it is interrupted, the next call with the same arguments resumes from saved progress on this machine.

    Examples:
        >>> summary = verify("logs", Selection(run="train-1"))
        >>> summary.differences
        0

    Args:
        store: The log store's name or id.
        selection: The streams to compare; all streams of the active project if not given.
        children: The names of the children to compare; all enabled children that can be read if empty.
        anew: Whether to discard saved progress and start over.
        progress: Is told how far the comparison is.
        summary: Receives the result, and holds the result so far if the call is interrupted.

    Raises:
        ArgumentError: There is no such log store, child or run, or a child cannot be read.
        NoAnswerError: ZenML or a child cannot be reached, no child can be read, or the same verify already runs.
    """
    selection = selection or Selection()
    found = find_store(store)
    chosen = _choose(found, children)
    report = Reporter(progress)
    comparison = Comparison(found, chosen, report)
    summary = ParitySummary() if summary is None else summary
    summary.begin(found.name, [child.name for child in chosen])
    began = time.monotonic()
    with _saved_progress(_key(found, selection, chosen), anew) as (before, file), comparison:
        try:
            if before:
                report.notice(f"Resuming an interrupted verify, which compared {counted(len(before), 'stream')}.")
            for stream in selection.streams(comparison.collectors, report):
                result = before.get(str(stream.logs.id))
                if result is None:
                    result = comparison.compare(stream)
                    if result.was_compared and not stream.run_in_progress:
                        file.write(orjson.dumps(result, option=orjson.OPT_NON_STR_KEYS) + b"\n")
                        file.flush()
                summary.add(result)
        finally:
            summary.seconds = time.monotonic() - began
    for child in chosen:
        if summary.children[child.name].missing:
            if child.known_losses:
                summary.hints.append(f"child '{child.name}' is missing events. {child.known_losses}")
            if over := summary.children[child.name].over_budget:
                missing = counted(summary.children[child.name].missing, "event")
                summary.hints.append(
                    f"child '{child.name}' is missing {missing}, of which its 'budget' may have withheld {over:,}: its "
                    f"log says that it was used up then"
                )
    return summary


def compare_with_primary(found: RegisteredStore, child: str, report: Reporter) -> ParitySummary:
    """Compare a child with the primary, in all runs of the active project.

    Ends as soon as one of them cannot be read, and says so in `not_compared`: then the rest proves nothing.

    Raises:
        ArgumentError: One of them cannot be read, whatever its backend does.
        NoAnswerError: ZenML cannot be reached.
    """
    chosen = _choose(found, (found.config.primary, child))
    summary = ParitySummary(found.name, [one.name for one in chosen])
    comparison = Comparison(found, chosen, report)
    streams = Selection().streams(comparison.collectors, report)
    first = next(streams, None)
    if first is None:
        return summary
    holders = [one for one in chosen if may_hold(one, first.collector, comparison.collectors)]
    for name, answer in ask(holders, first.logs).items():
        if answer.trouble:
            summary.not_compared.append((f"{first.run_name} {first.label}", name, answer.trouble))
    if summary.not_compared:
        return summary
    with comparison:
        for stream in chain([first], streams):
            result = comparison.compare(stream)
            summary.add(result)
            if any(one.error for one in result.children.values()):
                break
    return summary


class Comparison:
    """Compares streams in some children of a log store; holds the children open as a context manager.

    Attributes:
        collectors: The log stores whose streams the children may hold, as `catalog.stores.collectors` returns them.
    """

    def __init__(self, found: RegisteredStore, children: Sequence[ChildConfig], report: Reporter) -> None:
        """Prepare to compare these children, and to report how many events are read."""
        self.collectors = collectors(found, list(children))
        self._found = found
        self._children = children
        self._report = report
        self._sources: list[Source] = []
        self._closing = ExitStack()

    def __enter__(self) -> Comparison:
        """Open the children.

        Raises:
            NoAnswerError: A child cannot be opened.
        """
        with ExitStack() as opened:
            for child in self._children:
                self._sources.append(opened.enter_context(closing(open_child(child))))
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def compare(self, stream: RunStream) -> StreamParity:
        """Compare the events that the children hold of a stream."""
        sources = [one for one in self._sources if may_hold(one.config, stream.collector, self.collectors)]
        # Rules may ask for what the stream says of itself, which ZenML is asked for.
        has_rules = any(one.config.drop or one.config.keep for one in sources)
        return compare(
            stream.logs,
            f"{stream.run_name} {stream.label}",
            sources,
            stream.run_in_progress,
            self._report.count,
            stream_of(stream, self._found) if has_rules else None,
        )


def _choose(found: RegisteredStore, names: Sequence[str]) -> list[ChildConfig]:
    """Return the children to compare.

    Raises:
        ArgumentError: There is no such child, or it cannot be read.
        NoAnswerError: No child can be read.
    """
    chosen = [found.readable_child(name, "children") for name in dict.fromkeys(names)]
    chosen = chosen or [child for child in found.config.enabled_children if not child.unreadable]
    if not chosen:
        raise NoAnswerError(f"log store '{found.name}' has no enabled child that can be read.")
    return chosen


def _key(found: RegisteredStore, selection: Selection, children: Sequence[ChildConfig]) -> str:
    """Return the name under which progress is saved: the same for the same command, also when `2h` is later by then."""
    is_everything = selection == Selection()
    meant = [selection.run, selection.since is not None, selection.until is not None, is_everything]
    key = orjson.dumps([meant, [child.model_dump(mode="json") for child in children]])
    return f"{found.id}-{hashlib.sha256(key).hexdigest()[:16]}"


@contextmanager
def _saved_progress(name: str, is_anew: bool) -> Iterator[tuple[dict[str, StreamParity], IO[bytes]]]:
    """Give the results of an interrupted verify by the ids of their streams, and a file to save more of them in.

    The file is deleted at the end, unless an exception passes.

    Raises:
        NoAnswerError: The same verify already runs.
    """
    folder = state_folder("verify")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with open(path, "a+b") as file:
        if not lock_file(file.fileno()):
            raise NoAnswerError("the same verify already runs on this machine; wait for it, or stop it")
        if is_anew:
            file.truncate(0)
        file.seek(0)
        before = {}
        for line in file.read().splitlines():
            try:
                result = _SAVED.validate_json(line)
            except ValueError:
                # A process that was killed left half a line.
                continue
            before[result.logs_id] = result
        if before:
            file.write(b"\n")
        yield before, file
        path.unlink()
