"""Ray's tasks and actors log to the step's stream: a real Ray, in an environment beside this one's packages."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.servers.zenml_server import ZenML

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("ray_program.py")
# As in the program, which imports Ray.
RANKS = 2

pytestmark = [pytest.mark.integration, pytest.mark.deep]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that has Ray, and all that this one has."""
    folder = tmp_path_factory.mktemp("ray") / "venv"
    venv.create(folder)
    (site,) = folder.glob("lib/*/site-packages")
    # With the `.pth` files there: one of them leads to this checkout.
    (site / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input", "ray==2.60.*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"Ray cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.fixture(scope="module")
def report(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program reports."""
    folder = tmp_path_factory.mktemp("joining")
    zenml = ZenML(folder / "zenml", python)
    zenml.env |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    # However slow the machine is, no worker of Ray's is given up.
    zenml.env["RAY_worker_register_timeout_seconds"] = "600"
    zenml.python(str(PROGRAM), str(folder / "report.json"), timeout=900)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def entries(report: dict[str, Any], step: str, process: int) -> list[tuple[str, int, str, int | None]]:
    """Return the message, level, logger and rank of the entries of a process in a step."""
    return [
        (entry["message"], entry["level"], entry["name"], entry["attributes"].get("zenml.log.rank"))
        for entry in report["steps"][step]["entries"]
        if entry.get("attributes", {}).get("process.pid") == process
    ]


def said(what: str, rank: int | None = None) -> list[tuple[str, int, str, int | None]]:
    return [
        (f"printed {what}", 20, "stdout", rank),
        (f"on stderr {what}", 40, "stderr", rank),
        (f"logged {what}", 30, "worker", rank),
    ]


def test_an_actor_logs_to_the_step_that_runs_with_its_rank(report: dict[str, Any]) -> None:
    assert report["actors"] == report["actors again"]
    assert len(set(report["actors"])) == RANKS
    for rank, process in enumerate(report["actors"]):
        assert entries(report, "first", process) == said("one", rank)
        assert entries(report, "second", process) == said("two", rank)


def test_a_task_logs_to_its_step(report: dict[str, Any]) -> None:
    assert entries(report, "first", report["task"]) == said("in a task")


def test_with_a_hook_no_task_has_to_join(report: dict[str, Any]) -> None:
    assert entries(report, "third", report["hooked"]) == said("by way of the hook")


def test_that_ray_ends_its_workers_is_no_event(report: dict[str, Any]) -> None:
    processes = {*report["actors"], report["task"], report["hooked"]}
    names = [
        entry["name"]
        for step in report["steps"].values()
        for entry in step["entries"]
        if entry.get("attributes", {}).get("process.pid") in processes
    ]
    assert names
    assert "composite_logstore" not in names
