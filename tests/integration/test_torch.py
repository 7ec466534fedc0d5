"""Real launchers: PyTorch's, Accelerate's and Lightning's, and joblib's pools, in an environment that has neither this
package nor ZenML.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.capture.open_streams import VARIABLE

PROGRAM = str(Path(__file__).with_name("run_program.py"))
RANKS = 4

pytestmark = [pytest.mark.integration, pytest.mark.deep]

TRAIN = """
import logging, os, torch
import torch.distributed as dist

logging.basicConfig(level=logging.INFO)
dist.init_process_group("gloo")
total = torch.ones(1) * dist.get_rank()
dist.all_reduce(total)
rank = dist.get_rank()
print(f"the sum is {int(total.item())}")
logging.getLogger("train").info("rank %d is done", rank)
os.write(1, b"descriptor of rank %d\\n" % rank)
dist.destroy_process_group()
"""

# Without a launcher's variables, as in PyTorch's own tutorial.
SPAWN = """
import os, sys, tempfile, torch.distributed as dist, torch.multiprocessing as mp

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    print(f"spawned {rank}")
    dist.destroy_process_group()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder + "/store",), nprocs=2)
"""

JOBLIB = """
from joblib import Parallel, delayed

def work(number):
    print(f"job {number}")
    return number

if __name__ == "__main__":
    assert Parallel(n_jobs=2, backend="loky")(delayed(work)(number) for number in range(4)) == list(range(4))
"""

ACCELERATE = """
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}")
accelerator.wait_for_everyone()
accelerator.end_training()
"""

# It starts its second rank itself.
LIGHTNING = """
import lightning, torch

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, number):
        return self.layer(batch[0]).sum()

    def on_train_end(self):
        print(f"rank {self.global_rank} is trained")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)))
    options = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", **options).fit(Model(), data)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with PyTorch for CPUs."""
    folder = tmp_path_factory.mktemp("torch")
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    wheels = ["torch==2.13.0+cpu", "numpy", "joblib", "accelerate", "lightning"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-input", *wheels], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        pytest.skip(f"PyTorch for CPUs cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python


def run(folder: Path, *command: str) -> tuple[str, list[dict[str, Any]]]:
    """Run a command below `run`, and return its output and what was collected."""
    report = folder / "report"
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), VARIABLE: "a stream", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, PROGRAM, str(report), "--capture-fd", "--", *command],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in report.read_text().splitlines()]


def test_all_ranks_of_torch_distributed_are_collected(python: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    stdout, entries = run(tmp_path, *launcher, "train.py")
    ranked = [entry for entry in entries if "zenml.log.rank" in entry["attributes"]]
    for rank in range(RANKS):
        of_rank = [entry for entry in ranked if entry["attributes"]["zenml.log.rank"] == rank]
        assert len({entry["attributes"]["process.pid"] for entry in of_rank}) == 1
        assert sorted((entry["message"].rstrip("\n"), entry["name"]) for entry in of_rank) == [
            (f"descriptor of rank {rank}", "stdout"),
            (f"rank {rank} is done", "train"),
            ("the sum is 6", "stdout"),
        ]
    assert stdout.count("the sum is 6\n") == RANKS
    assert sum("descriptor of rank" in line for line in stdout.splitlines()) == RANKS
    # The launcher's own events are nobody's logs.
    assert not any("torchelastic" in entry["message"] for entry in entries)


def test_ranks_that_only_torch_knows_are_collected(python: str, tmp_path: Path) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)
    _, entries = run(tmp_path, python, "spawn.py")
    found = {entry["message"]: entry["attributes"].get("zenml.log.rank") for entry in entries}
    assert {message: rank for message, rank in found.items() if message.startswith("spawned")} == {
        "spawned 0": 0,
        "spawned 1": 1,
    }


def test_the_processes_of_joblib_are_collected(python: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBLIB)
    _, entries = run(tmp_path, python, "jobs.py")
    assert sorted(entry["message"] for entry in entries if entry["message"].startswith("job")) == [
        f"job {number}" for number in range(4)
    ]


def test_the_ranks_of_accelerate_are_collected(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(ACCELERATE)
    # Its option `--cpu` starts one process.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    _, entries = run(tmp_path, python, "-m", "accelerate.commands.launch", *options, "train.py")
    found = {entry["message"]: entry["attributes"].get("zenml.log.rank") for entry in entries}
    assert {message: rank for message, rank in found.items() if message.startswith("process")} == {
        "process 0 of 2": 0,
        "process 1 of 2": 1,
    }


def test_the_ranks_and_the_bar_of_lightning_are_collected(python: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LIGHTNING)
    _, entries = run(tmp_path, python, "train.py")
    found = {entry["message"]: entry["attributes"].get("zenml.log.rank") for entry in entries}
    assert {message: rank for message, rank in found.items() if message.endswith("is trained")} == {
        "rank 0 is trained": 0,
        "rank 1 is trained": 1,
    }
    # Its bar is tqdm's, or rich's where that is installed.
    bars = [entry["message"] for entry in entries if "4/4" in entry["message"]]
    assert bars
    assert all("Epoch 0" in bar for bar in bars)
