"""Backfill as a ZenML pipeline: one mapped step for each slice of the runs, on the orchestrator of any stack.

A run belongs to one slice, so each stream has one writer. Steps get ids and names but no settings: each step loads the
log store itself. Each slice saves what it has sent as an artifact, even if it fails, because the next pipeline may run
on other machines: that pipeline passes it to the slice that gets the run.

The pipeline and its steps are not logged: otherwise the next backfill would copy their logs.
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

from composite_logstore.catalog.errors import OperationError, asking_zenml
from composite_logstore.catalog.runs import RunStream, runs_of_project, streams_of_run
from composite_logstore.catalog.stores import collectors, find_store
from composite_logstore.inert import inert
from composite_logstore.intervals import Intervals
from composite_logstore.operations.copying import Totals, copy_with, ended
from composite_logstore.parity.ledger import REMEMBERED_SECONDS, Ledger
from composite_logstore.parity.result import BackfillStoppedError

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from composite_logstore.child_config import ChildConfig

PIPELINE = "composite_logstore_backfill"

RESULT = "backfill"
"""The name of a step's metadata with its totals, and the reason if it stopped early."""

interrupted = threading.Event()
"""Set to stop the slices that run in threads of this process: Ctrl-C does not reach these."""


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
    """Divide the selected runs into slices.

    Args:
        store: The id of the log store.
        source: The name of the child to copy from.
        target: The name of the child to copy to.
        run: The id of a run, to select only that one.
        since: Only runs still active at or after this time, in ISO 8601.
        until: Only runs that began at or before this time, in ISO 8601.
        slices: The most slices.
        rate: The most events per second, all slices together.
        anew: Whether to forget what earlier slices have sent.
    """
    with _metadata() as told:
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
    """Copy the missing events of a slice's runs.

    Args:
        slice: The id of the log store, the names of the children, the ids of the runs, what earlier slices have sent of
            them, and the most events per second.
    """
    totals = Totals()
    began = time.monotonic()
    with _metadata() as told, TemporaryDirectory() as folder:
        sent = SliceLedger(Path(folder, "ledger.jsonl"), slice["sent"])
        try:
            registered = find_store(slice["store"])
            source, target = registered.child(slice["source"]), registered.child(slice["target"])
            streams = sent.following(_streams(slice["runs"], (source, target)))
            streams = ended(streams, collectors(registered, [source]), source, totals)
            with closing(sent.ledger) as ledger:
                copy_with(
                    ledger, registered, source, target, streams, totals, slice["rate"], _raise_if_interrupted, _sleep
                )
        finally:
            told |= {**totals.as_dict(), "seconds": round(time.monotonic() - began, 3)}
            if totals.copied or totals.rejected:
                save_artifact(sent.as_dict(), ledger_name(slice["store"], slice["target"]))


@pipeline(
    name=PIPELINE,
    dynamic=True,
    enable_cache=False,
    enable_pipeline_logs=False,
    # A slice that fails does not stop the others.
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
    """Copy missing events from one child to another; the arguments are those of the step `plan`."""
    # Parameters, since ZenML makes an artifact of each argument.
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
    """Return the slices, at least one; each run is in one of them.

    Args:
        runs: The runs.
        slices: The most slices.
        sent: What earlier slices have sent: a run's id → a stream's id → a writer → intervals of numbers.
    """
    count = max(1, min(slices, len(runs)))
    # Runs of about the same time tend to have about the same size: dealt out in turn, they make slices of one size.
    dealt = ([str(run) for run in runs[place::count]] for place in range(count))
    return [{"runs": ids, "sent": {id: sent[id] for id in ids if id in sent}} for ids in dealt]


def ledger_name(store: str, target: str) -> str:
    """Return the name of the artifacts that record what was sent to a child."""
    return f"composite_logstore_backfill_{store}_{target}"


class SliceLedger:
    """A record of what this slice and earlier ones have sent of its runs.

    Attributes:
        ledger: The ledger that the copy writes to.
    """

    def __init__(self, path: Path, sent: dict[str, Any]) -> None:
        """Create the record.

        Args:
            path: The ledger's file.
            sent: What earlier slices have sent: a run's id → a stream's id → a writer → intervals of numbers.
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
        """Yield streams, and remember which run each belongs to."""
        for stream in streams:
            self._run_of[str(stream.logs.id)] = str(stream.run_id)
            yield stream

    def as_dict(self) -> dict[str, Any]:
        """Return what was sent: a run's id → a stream's id → a writer → intervals of numbers."""
        found: dict[str, Any] = {}
        with closing(Ledger(self._path, 0.0)) as whole:
            for logs_id, run_id in self._run_of.items():
                for writer in whole.writers(logs_id):
                    runs = [list(run) for run in whole.sent(logs_id, writer)]
                    found.setdefault(run_id, {}).setdefault(logs_id, {})[writer] = runs
        return found


def merge(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what several slices have sent: a run's id → a stream's id → a writer → intervals of numbers."""
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
    """Return what earlier slices have sent since the last pipeline that began anew.

    Args:
        name: The name of their artifacts.
        for_ever: Whether old artifacts count too, as they must for a child that cannot be read.

    Raises:
        BackfillStoppedError: An artifact cannot be read.
    """
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
                f"cannot read what an earlier pipeline has sent: version {version.version} of artifact '{name}' "
                f"({type(error).__name__}). '--anew' ignores it"
            ) from error
    return merge(found)


def _streams(runs: list[str], children: Iterable[ChildConfig]) -> Iterator[RunStream]:
    from zenml.client import Client

    for run_id in runs:
        _raise_if_interrupted(0)
        with asking_zenml():
            try:
                run = Client().get_pipeline_run(UUID(run_id))
            except KeyError:
                # Somebody has deleted it with its logs.
                continue
        for child in children:
            _check_place(child, run)
        yield from streams_of_run(run)


def _check_place(child: ChildConfig, run: PipelineRunResponse) -> None:
    """Refuse a run whose events a child holds in files on another machine: here the child would seem empty.

    Raises:
        BackfillStoppedError: The files are on another machine.
    """
    from zenml.client import Client

    if not Client().active_stack.orchestrator.config.is_remote:
        return
    name = getattr(child, "artifact_store", None) or getattr(child, "component", None)
    if name is None and hasattr(child, "artifact_store") and run.stack:
        name = str(run.stack.components[StackComponentType.ARTIFACT_STORE][0].id)
    if name and _is_local(name):
        raise BackfillStoppedError(
            f"child '{child.name}' keeps run '{run.name}' in a local artifact store, which this step cannot reach from "
            f"its machine. Copy the run without '--pipeline'"
        )


@lru_cache(maxsize=100)
def _is_local(name: str) -> bool:
    from zenml.client import Client

    try:
        found = Client().get_stack_component(StackComponentType.ARTIFACT_STORE, name, allow_name_prefix_match=False)
    except (KeyError, ValueError):
        return False
    return found.flavor_name == "local"


def _raise_if_interrupted(number: int) -> None:
    if interrupted.is_set():
        raise BackfillStoppedError("interrupted")


def _sleep(seconds: float) -> None:
    if interrupted.wait(seconds):
        raise BackfillStoppedError("interrupted")


@contextmanager
def _metadata() -> Iterator[dict[str, Any]]:
    """Give a dictionary that becomes the step's metadata, together with the reason if the step fails."""
    told: dict[str, Any] = {}
    stopped = "interrupted"
    try:
        yield told
        stopped = ""
    except (OperationError, BackfillStoppedError) as error:
        stopped = inert(error.message, "")
        raise
    except Exception as error:
        # Only the error's class: its message may contain a URL with a secret.
        stopped = type(error).__name__
        raise
    finally:
        log_metadata({RESULT: {**told, "stopped": stopped}})


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
