"""How much processor time commands take until they end, beside ZenML's own client.

    python -m benchmarks.commands [ROUNDS]

registers a log store with two archives in a ZenML of its own, runs a pipeline, and runs the commands in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

_PIPELINE = """
from zenml import pipeline, step

@step
def fit() -> None:
    print("epoch 1")

@pipeline
def training() -> None:
    fit()

training.with_options(run_name="train-1")()
"""
_SETUP = (
    "zenml artifact-store register disk --flavor local --path={disk}",
    "zenml log-store flavor register composite_logstore.CompositeLogStoreFlavor",
    "zenml log-store register logs --flavor composite --primary=archive --children=@children.json",
    "zenml stack register two -o default -a default --log_store logs --set",
    "python train.py",
)
_CHILDREN = """[{"name": "archive", "type": "artifact"},
{"name": "second", "type": "artifact", "artifact_store": "disk"}]"""
_CLIENT = "from zenml.client import Client; Client().get_pipeline_run('train-1')"
COMMANDS = {
    "ZenML's client finds a run": ["python", "-c", _CLIENT],
    "`zenml pipeline runs list`": ["zenml", "pipeline", "runs", "list"],
    "`composite-logstore --help`": ["composite-logstore", "--help"],
    "`composite-logstore logs train-1`": ["composite-logstore", "logs", "train-1"],
    "`composite-logstore check logs`": ["composite-logstore", "check", "logs"],
}


def cpu_seconds(command: list[str], directory: Path, env: dict[str, str]) -> float:
    """Return the processor time of a command, which is less of a matter of chance than the time on the clock."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=directory, env=env, stdin=null, stdout=null, stderr=null)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


def main(rounds: int) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "children.json").write_text(_CHILDREN)
        (directory / "train.py").write_text(_PIPELINE)
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "ZENML_CONFIG_PATH": str(directory / "zenml"),
            "ZENML_ANALYTICS_OPT_IN": "false",
        }
        for line in _SETUP:
            words = line.format(disk=directory / "disk").split()
            subprocess.run(words, cwd=directory, env=env, check=True, stdout=subprocess.DEVNULL)
        times: dict[str, list[float]] = {label: [] for label in COMMANDS}
        for _ in range(rounds):
            for label, command in COMMANDS.items():
                times[label].append(cpu_seconds(command, directory, env))
    base = median(next(iter(times.values())))
    print("| command | CPU, s | beside ZenML's client |")
    print("|---|---|---|")
    for label, found in times.items():
        print(f"| {label} | {median(found):.2f} | {median(found) / base:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
