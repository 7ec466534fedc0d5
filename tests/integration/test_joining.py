"""All processes and threads of a step log to the step's stream: real pipelines, launchers and pools."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.integration.joining_program import KILLED_RANK, RANKS, RANKS_BELOW_RUN
from tests.servers.zenml_server import ZenML

PROGRAM = Path(__file__).with_name("joining_program.py")

PRINTED = ["printed", "in a thread"]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program reports, with the entries of each step as (message, level, logger, attributes)."""
    folder = tmp_path_factory.mktemp("joining")
    zenml = ZenML(folder / "zenml")
    zenml.python(str(PROGRAM), str(folder / "report.json"), timeout=280)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def entries(report: dict[str, Any], step: str, **wanted: Any) -> list[tuple[str, int, str]]:
    """Return the message, level and logger of the entries of a step with these attributes."""
    found = []
    for entry in report["steps"][step]["entries"]:
        attributes = entry.get("attributes", {})
        if all(attributes.get(name.replace("_", ".", 1)) == value for name, value in wanted.items()):
            found.append((entry["message"], entry["level"], entry["name"]))
    return found


def said(what: str) -> list[tuple[str, int, str]]:
    return [(f"logged {what}", 30, "pool"), (f"printed {what}", 20, "stdout")]


def of_rank(report: dict[str, Any], rank: int, below_run: bool) -> list[dict[str, Any]]:
    """Return the entries of a rank in the first step."""
    entries = report["steps"]["first"]["entries"]
    found = [entry for entry in entries if entry.get("attributes", {}).get("zenml.log.rank") == rank]
    return [entry for entry in found if ("below run" in entry["message"]) is below_run]


def test_each_rank_of_a_launcher_is_in_the_step_s_one_stream_even_if_it_is_killed(report: dict[str, Any]) -> None:
    assert report["steps"]["first"]["streams"] == 1
    pids = set()
    for rank in range(RANKS):
        entries = of_rank(report, rank, below_run=False)
        pids |= {entry["attributes"]["process.pid"] for entry in entries}
        own, others = entries[:4], entries[4:]
        assert [(entry["message"], entry["level"], entry["name"]) for entry in own] == [
            ("printed", 20, "stdout"),
            ("on stderr", 40, "stderr"),
            ("logged", 30, "worker"),
            ("in a thread", 20, "stdout"),
        ]
        told_of_its_end = [(entry["level"], entry["name"]) for entry in others]
        assert told_of_its_end == ([(40, "composite_logstore")] if rank == KILLED_RANK else [])
    assert len(pids) == RANKS
    assert report["pid"] not in pids


def test_below_run_no_program_has_to_join_and_c_is_collected_with_its_rank(report: dict[str, Any]) -> None:
    pids = set()
    for rank in range(RANKS_BELOW_RUN):
        entries = of_rank(report, rank, below_run=True)
        pids |= {entry["attributes"]["process.pid"] for entry in entries}
        assert sorted((entry["message"], entry["level"], entry["name"]) for entry in entries) == [
            ("from C below run", 20, "stdout"),
            ("logged below run", 30, "worker"),
            ("printed below run", 20, "stdout"),
        ]
    assert len(pids) == RANKS_BELOW_RUN
    code, stdout = report["run"]
    assert code == 5
    # Where Python does not buffer, nor lets C do so, each word is a write of its own, and another rank's may follow.
    found = [stdout.count(text) for text in ("from C below run", "printed", "below", "run")]
    assert found == [RANKS_BELOW_RUN, RANKS_BELOW_RUN, 2 * RANKS_BELOW_RUN, 2 * RANKS_BELOW_RUN]
    assert "ZenML" not in stdout


def test_the_output_of_each_rank_stays_as_it_is(report: dict[str, Any]) -> None:
    assert [code for code, _, _ in report["ranks"]] == [0, -signal.SIGKILL]
    for _, stdout, stderr in report["ranks"]:
        assert stderr == "on stderr\n"
        # ZenML's own handler prints what is logged, as in the step's process.
        assert [line for line in stdout.splitlines() if line in PRINTED] == PRINTED


@pytest.mark.parametrize("kind", ["spawn", "fork"])
def test_a_pool_logs_to_the_step_that_runs(kind: str, report: dict[str, Any]) -> None:
    pid = report[kind]
    assert report[f"{kind} again"] == pid != report["pid"]
    threads = [said(f"{kind} {number} thread") if kind == "fork" else [] for number in ("one", "two")]
    assert entries(report, "first", process_pid=pid) == threads[0] + said(f"{kind} one")
    assert entries(report, "second", process_pid=pid) == threads[1] + said(f"{kind} two")


def test_threads_log_to_the_step_in_context_and_where_they_are_adopted(report: dict[str, Any]) -> None:
    found = entries(report, "first")
    assert [entry for entry in found if entry in said("in context")] == said("in context")
    assert [entry for entry in found if entry in said("adopted")] == said("adopted")


def test_the_environment_names_the_stream_while_the_step_runs_and_holds_no_secret(report: dict[str, Any]) -> None:
    store_id, stream_id, board = report["variable"].split(":", 2)
    assert UUID(store_id) != UUID(stream_id)
    # The step's process has removed it.
    assert not Path(board).exists()
    assert report["variable afterwards"] is None
