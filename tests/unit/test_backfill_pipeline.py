"""Backfill as a pipeline: how runs are divided, what slices remember, and how their results are added up."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from zenml.enums import ExecutionStatus, StackComponentType

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError
from composite_logstore.catalog.runs import RunStream
from composite_logstore.catalog.stores import RegisteredStore
from composite_logstore.operations import backfill_pipeline, pipeline_launch
from composite_logstore.operations.backfill_pipeline import PIPELINE, RESULT, SliceLedger, deal, merge
from composite_logstore.operations.copying import Totals
from composite_logstore.operations.pipeline_launch import copy_as_pipeline, refuse_second
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.selection import Selection
from composite_logstore.parity.result import BackfillStoppedError
from composite_logstore.testing import make_logs, make_stream
from composite_logstore_artifact.config import ArtifactChildConfig
from tests.simulation import make_child, make_store

RUNS = [UUID(int=number) for number in range(10)]


@pytest.mark.parametrize(("runs", "slices", "sizes"), [(10, 3, [4, 3, 3]), (2, 10, [1, 1]), (0, 5, [0])])
def test_each_run_belongs_to_one_slice(runs: int, slices: int, sizes: list[int]) -> None:
    sent = {str(RUNS[0]): {"stream": {"writer": [[0, 9]]}}}
    dealt = deal(RUNS[:runs], slices, sent)
    assert [len(slice["runs"]) for slice in dealt] == sizes
    assert sorted(run for slice in dealt for run in slice["runs"]) == [str(run) for run in RUNS[:runs]]
    assert [slice["sent"] for slice in dealt] == [sent if str(RUNS[0]) in slice["runs"] else {} for slice in dealt]


def test_a_slice_passes_on_its_own_ledger_and_the_earlier_one(tmp_path: Path) -> None:
    stream = make_stream()
    run_id, logs_id = str(RUNS[0]), str(stream.id)
    ledger = SliceLedger(tmp_path / "first", {})
    of_run = RunStream(make_logs(stream), RUNS[0], "run")
    assert list(ledger.following([of_run])) == [of_run]
    assert ledger.as_dict() == {}

    earlier = {run_id: {logs_id: {"a": [[0, 4]], "b": [[7, 7]]}}}
    again = SliceLedger(tmp_path / "second", earlier)
    with closing(again.ledger) as known:
        assert list(known.sent(logs_id, "a")) == [(0, 4)]
        assert sorted(known.writers(logs_id)) == ["a", "b"]
    assert list(again.following([of_run])) == [of_run]
    assert again.as_dict() == earlier


def test_the_ledgers_of_several_slices_are_merged() -> None:
    one = {"run": {"stream": {"a": [[0, 4]], "b": [[0, 0]]}}}
    other = {"run": {"stream": {"a": [[3, 9]]}, "more": {"c": [[1, 1]]}}, "another": {"s": {"d": [[2, 3]]}}}
    assert merge([one, other]) == {
        "run": {"stream": {"a": [[0, 9]], "b": [[0, 0]]}, "more": {"c": [[1, 1]]}},
        "another": {"s": {"d": [[2, 3]]}},
    }


class Zen:
    """The part of ZenML's client that these functions use."""

    def __init__(self, **answers: Any) -> None:
        self.__dict__.update(answers)

    def get_pipeline(self, name: str) -> Any:
        assert name == PIPELINE
        return SimpleNamespace(id=1)


def page(*items: Any) -> Any:
    answer = SimpleNamespace(items=list(items), total_pages=1, index=1)
    return lambda **_: answer


@pytest.fixture
def registered() -> RegisteredStore:
    store = make_store(make_child("archive"), make_child("live"))
    return RegisteredStore(store, SimpleNamespace(id=store.id, name=store.name))  # type: ignore[arg-type]


def backfill_run(flavor: str, **parameters: Any) -> Any:
    components = {StackComponentType.ORCHESTRATOR: [SimpleNamespace(flavor_name=flavor)]}
    stack, config = SimpleNamespace(components=components), SimpleNamespace(parameters=parameters)
    return SimpleNamespace(id=UUID(int=5), name="backfill-1", stack=stack, config=config)


def test_a_second_pipeline_that_copies_to_the_child_is_refused(
    registered: RegisteredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, live = str(registered.store.id), registered.child("live")
    for others in (
        [],
        [backfill_run("kubernetes", store=store, target="archive")],
        [backfill_run("kubernetes", store=str(uuid4()), target="live")],
        # ZenML shows a pipeline as in progress forever if it was killed with its process.
        [backfill_run("local", store=store, target="live")],
    ):
        zen = Zen(list_pipeline_runs=page(*others))
        monkeypatch.setattr("zenml.client.Client", lambda zen=zen: zen)
        refuse_second(registered, live)
    zen = Zen(list_pipeline_runs=page(backfill_run("kubernetes", store=store, target="live")))
    monkeypatch.setattr("zenml.client.Client", lambda: zen)
    with pytest.raises(NoAnswerError, match=r"'backfill-1' .* child 'live'; .*zenml pipeline runs stop 0000"):
        refuse_second(registered, live)


def test_an_orchestrator_without_dynamic_pipelines_is_refused(
    registered: RegisteredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator = SimpleNamespace(name="cron", supports_dynamic_pipelines=False)
    zen = Zen(active_stack=SimpleNamespace(name="old", orchestrator=orchestrator))
    monkeypatch.setattr("zenml.client.Client", lambda: zen)
    everything = Selection()
    source, target = registered.child("archive"), registered.child("live")
    with pytest.raises(ArgumentError, match="orchestrator 'cron' of the active stack 'old'"):
        copy_as_pipeline(registered, source, target, everything, Totals(), Reporter(None))


def ended(name: str, status: ExecutionStatus, **told: Any) -> Any:
    return SimpleNamespace(name=name, status=status, run_metadata={RESULT: told} if told else {})


DONE = {**Totals(copied=5, there=2, streams=3).as_dict(), "stopped": ""}
STOPPED = {**Totals(copied=1, rejected={"no": 2}).as_dict(), "stopped": "child 'live' takes no events: it is full"}
PLAN = ended("plan", ExecutionStatus.COMPLETED, slices=3, runs=9, stopped="")


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([PLAN, *[ended(f"s{n}", ExecutionStatus.COMPLETED, **DONE) for n in range(3)]], ""),
        (
            [PLAN, ended("s0", ExecutionStatus.COMPLETED, **DONE), ended("s1", ExecutionStatus.FAILED, **STOPPED)],
            "2 of 3 slices did not finish: child 'live' takes no events: it is full",
        ),
        (
            [PLAN, *[ended("s0", ExecutionStatus.COMPLETED, **DONE)] * 2, ended("s2", ExecutionStatus.FAILED)],
            "1 of 3 slices did not finish: step 's2' ended with status 'failed'",
        ),
        ([ended("plan", ExecutionStatus.FAILED, stopped="no such child")], "no such child"),
        ([], "no slice has begun"),
    ],
)
def test_results_of_slices_are_added_up_and_the_first_failure_is_named(
    steps: list[Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zenml.client.Client", lambda: Zen(list_run_steps=page(*steps)))
    totals = Totals()
    run = SimpleNamespace(id=RUNS[0], name="backfill-1", status=ExecutionStatus.FAILED)
    with pytest.raises(BackfillStoppedError, match=f"^{why}$") if why else nullcontext():
        pipeline_launch._gather(run, totals, False)  # type: ignore[arg-type]
    slices = [step for step in steps if "copied" in step.run_metadata.get(RESULT, {})]
    assert totals.copied == sum(step.run_metadata[RESULT]["copied"] for step in slices)
    assert totals.left_out == (2 if any(step.name == "s1" for step in steps) and "full" in why else 0)


def test_the_metadata_of_a_slice_does_not_name_the_log_store(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"copied": 5, "there": 2, "unwanted": 0, "unidentified": 0, "too_old": 0, "rejected": {}, "absent": 0}
    counts |= {"streams": 3, "in_progress": 0}
    totals = Totals(log_store="logs", copied=5, there=2, streams=3)
    assert totals.as_dict() == counts
    # So slices that an earlier version of this package ran are added up, too.
    steps = ended("plan", ExecutionStatus.COMPLETED, slices=1), ended("s0", ExecutionStatus.COMPLETED, **counts)
    monkeypatch.setattr("zenml.client.Client", lambda: Zen(list_run_steps=page(*steps)))
    run: Any = SimpleNamespace(id=RUNS[0], name="backfill-1", status=ExecutionStatus.COMPLETED)
    gathered = Totals(log_store="logs")
    pipeline_launch._gather(run, gathered, False)
    assert gathered == totals


def test_a_pipeline_that_continues_unwatched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zenml.client.Client", lambda: Zen(list_run_steps=page(PLAN)))
    run = SimpleNamespace(id=RUNS[0], name="backfill-1", status=ExecutionStatus.RUNNING)
    with pytest.raises(BackfillStoppedError, match=f"run 'backfill-1' .*`zenml pipeline runs stop {RUNS[0]}`"):
        pipeline_launch._gather(run, Totals(), True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("is_remote", "flavor", "is_refused"), [(True, "local", True), (True, "s3", False), (False, "local", False)]
)
@pytest.mark.parametrize("named", ["files", None])
def test_a_local_artifact_store_of_another_machine_stops_the_slice(
    is_remote: bool, flavor: str, is_refused: bool, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator = SimpleNamespace(config=SimpleNamespace(is_remote=is_remote))
    zen = Zen(
        active_stack=SimpleNamespace(orchestrator=orchestrator),
        get_stack_component=lambda kind, name, allow_name_prefix_match: SimpleNamespace(flavor_name=flavor),
    )
    monkeypatch.setattr("zenml.client.Client", lambda: zen)
    backfill_pipeline._is_local.cache_clear()
    components = {StackComponentType.ARTIFACT_STORE: [SimpleNamespace(id=RUNS[1])]}
    run: Any = SimpleNamespace(name="run-1", stack=SimpleNamespace(components=components))
    child = ArtifactChildConfig(name="archive", type="artifact", artifact_store=named)
    if not is_refused:
        backfill_pipeline._check_place(child, run)
        return
    with pytest.raises(BackfillStoppedError, match="child 'archive' keeps run 'run-1' in a local artifact store"):
        backfill_pipeline._check_place(child, run)
