"""Backfill as a ZenML pipeline: one mapped step for each slice of the runs, on whatever orchestrator the stack has.

A run belongs to one slice, so no stream has two writers. Steps get ids and names, never settings: each loads the log
store itself. What a slice has sent is kept as an artifact, also when it fails, since machines come and go: the next
pipeline hands it to the slice that gets the run.

Neither the pipeline nor its steps are logged: their own logs would be the next thing to be copied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
from zenml import get_step_context, log_metadata, pipeline, save_artifact, step
from zenml.enums import ExecutionMode, StackComponentType

from composite_logstore.parity.backfill import BackfillStoppedError
from composite_logstore.parity.intervals import Intervals
from composite_logstore.parity.ledger import REMEMBERED_SECONDS, Ledger

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from composite_logstore.catalog.stores import RunStream
    from composite_logstore.config import ChildConfig

PIPELINE = "composite_logstore_backfill"

RESULT = "backfill"
"""The metadata of a step that says what became of its events, and why it stopped, if it did."""

interrupted = threading.Event()
"""Set to stop the slices that run in this process: nobody can interrupt their threads."""


@step(enable_cache=False, enable_step_logs=False)
def plan(
    store: str,
    source: str,
    target: str,
    run: str | None,
    since: str | None,
    until: str | None,
    slices: int,
    rate: float | None,
    anew: bool,
) -> list[dict[str, Any]]:
    """Deal out the runs that are meant.

    Args:
        store: The id of the log store.
        source: The name of the child to copy from.
        target: The name of the child to copy to.
        run: The id of a run, if only that one is meant.
        since: Only runs that had not ended by then, as ISO 8601 has it.
        until: Only runs that had begun by then.
        slices: How many slices there may be.
        rate: The most events in a second, of all slices together.
        anew: Whether to forget what earlier slices have sent.
    """
    from composite_logstore.catalog.stores import find_store, runs_of_project

    with _told() as told:
        child = find_store(store).child(target)
        own = get_step_context().pipeline_run.id
        if run is not None:
            runs = [UUID(run)]
        else:
            found = runs_of_project(_moment(since), _moment(until))
            runs = list(dict.fromkeys(one.id for one in found if one.id != own))
        name = ledger_name(store, target)
        if anew:
            save_artifact({}, name, user_metadata={"anew": True})
        dealt = deal(runs, slices, {} if anew else _sent_earlier(name, child.unreadable is not None))
        told |= {"runs": len(runs), "slices": len(dealt)}
    of_all = {"store": store, "source": source, "target": target, "rate": rate / len(dealt) if rate else None}
    return [{**of_all, **slice} for slice in dealt]


@step(enable_cache=False, enable_step_logs=False)
def copy_slice(slice: dict[str, Any]) -> None:
    """Copy what the child lacks of a slice's runs.

    Args:
        slice: The id of the log store, the names of the children, the ids of the runs, what was sent of them, and the
            most events in a second.
    """
    from composite_logstore.catalog.stores import find_store
    from composite_logstore.operations.backfill import Totals, copy_with, ended
    from composite_logstore.operations.selection import log_stores_of

    totals = Totals()
    began = time.monotonic()
    with _told() as told, TemporaryDirectory() as folder:
        sent = SliceLedger(Path(folder, "ledger.jsonl"), slice["sent"])
        try:
            registered = find_store(slice["store"])
            source, target = registered.child(slice["source"]), registered.child(slice["target"])
            streams = sent.following(_streams(slice["runs"], (source, target)))
            streams = ended(streams, log_stores_of(registered, [source]), source, totals)
            with closing(sent.ledger) as ledger:
                copy_with(ledger, registered, source, target, streams, totals, slice["rate"], _go_on, _sleep)
        finally:
            told |= {**totals.as_dict(), "seconds": round(time.monotonic() - began, 3)}
            if totals.copied or totals.rejected:
                save_artifact(sent.as_dict(), ledger_name(slice["store"], slice["target"]))


@pipeline(
    name=PIPELINE,
    dynamic=True,
    enable_cache=False,
    enable_pipeline_logs=False,
    # A slice that fails keeps no other from its end.
    execution_mode=ExecutionMode.CONTINUE_ON_FAILURE,
)
def backfill_pipeline(
    store: str,
    source: str,
    target: str,
    run: str | None = None,
    since: str | None = None,
    until: str | None = None,
    slices: int = 10,
    rate: float | None = None,
    anew: bool = False,
) -> None:
    """Copy to one child what it lacks and another has; the arguments are those of the step `plan`."""
    # As parameters: each argument would become an artifact.
    values: dict[str, Any] = {
        "store": store,
        "source": source,
        "target": target,
        "run": run,
        "since": since,
        "until": until,
    }
    values |= {"slices": slices, "rate": rate, "anew": anew}
    copy_slice.map(plan.with_options(parameters=values)())


def deal(runs: list[UUID], slices: int, sent: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the slices, at least one: each run is in one of them.

    Args:
        runs: The runs.
        slices: How many there may be.
        sent: What was sent earlier: a run's id → a stream's id → a writer → runs of numbers.
    """
    count = max(1, min(slices, len(runs)))
    # Runs of one time tend to be of one size: dealt out in turn, slices are about as large as each other.
    dealt = ([str(run) for run in runs[place::count]] for place in range(count))
    return [{"runs": ids, "sent": {id: sent[id] for id in ids if id in sent}} for ids in dealt]


def ledger_name(store: str, target: str) -> str:
    """Return the name of the artifacts that say what was sent to a child."""
    return f"composite_logstore_backfill_{store}_{target}"


class SliceLedger:
    """What was sent of a slice's runs, here and earlier.

    Attributes:
        ledger: It, as a copy notes it.
    """

    def __init__(self, path: Path, sent: dict[str, Any]) -> None:
        """Begin with what was sent earlier.

        Args:
            path: Where to keep it meanwhile.
            sent: A run's id → a stream's id → a writer → runs of numbers.
        """
        self._path = path
        self._run_of: dict[str, str] = {}
        now = time.time()
        with path.open("wb") as file:
            for streams in sent.values():
                for logs_id, writers in streams.items():
                    for writer, runs in writers.items():
                        line = {"time": now, "stream": logs_id, "writer": writer, "runs": runs}
                        file.write(orjson.dumps(line) + b"\n")
        self.ledger = Ledger(path, 0.0)

    def following(self, streams: Iterable[RunStream]) -> Iterator[RunStream]:
        """Yield streams, and remember whose they are."""
        for stream in streams:
            self._run_of[str(stream.logs.id)] = str(stream.run_id)
            yield stream

    def as_dict(self) -> dict[str, Any]:
        """Return it: a run's id → a stream's id → a writer → runs of numbers."""
        found: dict[str, Any] = {}
        with closing(Ledger(self._path, 0.0)) as whole:
            for logs_id, run_id in self._run_of.items():
                for writer in whole.writers(logs_id):
                    runs = [list(run) for run in whole.sent(logs_id, writer)]
                    found.setdefault(run_id, {}).setdefault(logs_id, {})[writer] = runs
        return found


def merge(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what several slices have sent: a run's id → a stream's id → a writer → runs of numbers."""
    merged: dict[str, Any] = {}
    for ledger in ledgers:
        for run, streams in ledger.items():
            for logs_id, writers in streams.items():
                known = merged.setdefault(run, {}).setdefault(logs_id, {})
                for writer, runs in writers.items():
                    both = Intervals(sorted(map(tuple, [*known.get(writer, []), *runs])))
                    known[writer] = [list(run) for run in both]
    return merged


def _sent_earlier(name: str, for_ever: bool) -> dict[str, Any]:
    """Return what earlier slices have sent, since the last time that it was to be forgotten."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    since = datetime.now(timezone.utc) - timedelta(seconds=REMEMBERED_SECONDS)
    found = []
    for version in depaginate(Client().list_artifact_versions, artifact=name, sort_by="desc:created", hydrate=True):
        if version.run_metadata.get("anew"):
            break
        if not for_ever and version.created.replace(tzinfo=timezone.utc) < since:
            break
        try:
            found.append(version.load())
        except Exception as error:
            raise BackfillStoppedError(
                f"what an earlier pipeline has sent cannot be read: version {version.version} of artifact '{name}' "
                f"({type(error).__name__}). With '--anew' it counts for nothing"
            ) from error
    return merge(found)


def _streams(runs: list[str], children: Iterable[ChildConfig]) -> Iterator[RunStream]:
    from zenml.client import Client

    from composite_logstore.catalog.stores import asking_zenml, streams_of_run

    for run_id in runs:
        _go_on(0)
        with asking_zenml():
            try:
                run = Client().get_pipeline_run(UUID(run_id))
            except KeyError:
                # It was deleted meanwhile, and its logs with it.
                continue
        for child in children:
            _check_place(child, run)
        yield from streams_of_run(run)


def _check_place(child: ChildConfig, run: PipelineRunResponse) -> None:
    """Raise if what a child has of a run is in files on another machine: here it would seem to have nothing.

    Raises:
        BackfillStoppedError: It is so.
    """
    from zenml.client import Client

    if not Client().active_stack.orchestrator.config.is_remote:
        return
    name = getattr(child, "artifact_store", None) or getattr(child, "component", None)
    if name is None and hasattr(child, "artifact_store") and run.stack:
        name = str(run.stack.components[StackComponentType.ARTIFACT_STORE][0].id)
    if name and _is_local(name):
        raise BackfillStoppedError(
            f"child '{child.name}' keeps run '{run.name}' in an artifact store that is on one machine alone, and this "
            f"step runs on another. Copy it without '--pipeline'"
        )


@lru_cache(maxsize=100)
def _is_local(name: str) -> bool:
    from zenml.client import Client

    try:
        found = Client().get_stack_component(StackComponentType.ARTIFACT_STORE, name, allow_name_prefix_match=False)
    except (KeyError, ValueError):
        return False
    return found.flavor_name == "local"


def _go_on(number: int) -> None:
    if interrupted.is_set():
        raise BackfillStoppedError("interrupted")


def _sleep(seconds: float) -> None:
    if interrupted.wait(seconds):
        raise BackfillStoppedError("interrupted")


@contextmanager
def _told() -> Iterator[dict[str, Any]]:
    """Give what is to become the step's metadata, with the reason if it fails."""
    from click import ClickException

    told: dict[str, Any] = {}
    stopped = "interrupted"
    try:
        yield told
        stopped = ""
    except ClickException as error:
        stopped = error.message
        raise
    except BackfillStoppedError as error:
        stopped = str(error)
        raise
    except Exception as error:
        # No more than its name: its words may hold what is in a URL.
        stopped = type(error).__name__
        raise
    finally:
        log_metadata({RESULT: {**told, "stopped": stopped}})


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
