"""Follow the guides in docs/ from beginning to end: each command prints the output that its page shows.

`make guides` follows them too, and writes the output into the pages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs import Programs
from tests.servers.clickhouse import ClickHouse, RotelToClickHouse, is_installed
from tests.servers.collector import start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.faulty import FaultyProxy
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from tests.servers.zenml_server import ZenML
from tests.watching import wait_until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:`(\w+\.\w+)`[^`\n]*:\n\n)?```(\w*)\n(.*?)```", re.DOTALL)
WRITES = os.environ.get("GUIDES") == "write"
SHELL = ["bash", "-euo", "pipefail", "-c"]


class Reader:
    """A reader who follows a guide."""

    def __init__(self, directory: Path, programs: Programs, there: dict[str, str], counts_differ: bool = False) -> None:
        """Begin with ZenML alone.

        Args:
            directory: An empty directory.
            programs: The commands of ZenML and of this package.
            there: A text on the page → the text of this test's servers that replaces it, such as an address.
            counts_differ: Whether the numbers of runs and events differ each time.
        """
        self.zenml = ZenML(directory / "zenml")
        self.zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
        self.directory = directory
        self._there = there
        self._counts_differ = counts_differ
        self.env = {**self.zenml.env, "PATH": f"{programs.folder}:{self.zenml.env['PATH']}"}

    def follow(self, page: str, until: str | None = None, since: str | None = None) -> None:
        """Follow a page: write its files, run its commands, and compare their output.

        With `GUIDES=write` in the environment, write their output into the page instead.

        Args:
            page: The page.
            until: The heading before which to stop.
            since: The heading at which to begin.
        """
        path = ROOT / "docs" / page
        text = path.read_text()
        begin = text.index(f"## {since}\n") if since else 0
        end = text.index(f"## {until}\n") if until else len(text)
        printed = ""
        blocks = list(BLOCK.finditer(text, begin, end))
        assert blocks
        written, done = "", 0
        for block in blocks:
            name, language, content = block.groups()
            if language == "text":
                written += text[done : block.start(3)] + printed
                done = block.end(3)
                is_true = WRITES or has_lines(printed, content, self._counts_differ)
                assert is_true, f"{page} shows:\n{content}\nprinted was:\n{printed}"
                continue
            for stand_in, real in self._there.items():
                content = content.replace(stand_in, real)
            if name:
                (self.directory / name).write_text(content)
            else:
                printed = self.for_the_page(self.run(content))
        if WRITES:
            path.write_text(written + text[done:])

    def for_the_page(self, printed: str) -> str:
        for stand_in, real in self._there.items():
            printed = printed.replace(real, stand_in)
        printed = printed.replace(self.env["ZENML_CONFIG_PATH"], "~/.config/zenml").replace(f"{self.directory}/", "")
        return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())

    def run(self, commands: str) -> str:
        """Run commands, answer their questions with yes, and return their output."""
        done = subprocess.run(
            [*SHELL, commands],
            input="y\n" * 10,
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self.env,
            timeout=250,
        )
        assert done.returncode == 0, (commands, done.stdout, done.stderr[-4000:])
        return done.stdout


# Parts of the output that differ each time: moments, ids, durations, sizes, rates, processes, and the first run.
VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?(\+\d\d:\d\d)?)?"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{15}\b"
    r"|\b\d[\d.,]*( ?(ms|s|min|h|kB|MB)|/s)\b|run '[^']*'|process \d+|─+"
)
# How much there is, in sentences and in the first two columns of `verify`: it differs while pipelines run beside.
COUNTS = re.compile(r"\b\d[\d,]*(?= (?:events|streams|already)\b)|(?<=\S  )\s*\d+ +\d+(?=(?: +\d+){6}$)")


def has_lines(printed: str, expected: str, counts_differ: bool = False) -> bool:
    """Return whether each of the expected lines was printed, in this order; others may lie between them."""

    def stable(line: str) -> str:
        return " ".join(VOLATILE.sub("…", COUNTS.sub("… ", line) if counts_differ else line).split())

    found = iter([stable(line) for line in printed.splitlines()])
    # How often a command waits is a matter of timing.
    return all(stable(line) in found for line in expected.splitlines() if not line.endswith("Waiting ..."))


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("s3  6  64  7  0  0  0  0  0", "s3  6  64  0  0  0  0  0  0"),
        ("2026-11-27 17:18:54.296 INFO  [train/step] epoch 3", "2026-11-27 17:18:54.296 INFO  [train/step] epoch 20"),
        ("exit code 3", "exit code 1"),
    ],
)
@pytest.mark.parametrize("counts_differ", [True, False])
def test_other_numbers_are_noticed(printed: str, expected: str, counts_differ: bool) -> None:
    assert has_lines(expected, expected, counts_differ)
    assert not has_lines(printed, expected, counts_differ)


def test_counts_are_noticed_unless_pipelines_run_beside() -> None:
    for printed, expected in (
        ("earlier      12     130  0  0  0  0  0  0", "earlier       6      64  0  0  0  0  0  0"),
        ("copied 0 events, which held 162 already", "copied 65 events, which held 32 already"),
    ):
        assert has_lines(printed, expected, True)
        assert not has_lines(printed, expected)


@contextmanager
def runs_all_the_time(reader: Reader) -> Iterator[list[str]]:
    """Run the pipeline again and again, each time in a process of its own, and yield the names of the runs."""
    runs: list[str] = []
    failed: list[str] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set() and not failed:
            name = f"run-{len(runs)}"
            done = subprocess.run(
                ["python", "train.py", name],
                cwd=reader.directory,
                env=reader.env,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if done.returncode:
                failed.append(done.stderr[-4000:])
            runs.append(name)
            # The commands of the guide need the machine too.
            over.wait(10)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield runs
    finally:
        over.set()
        thread.join()
    assert not failed, failed


COUNT = """
import json, sys
from click.testing import CliRunner
from composite_logstore.cli.main import main

for run in json.loads(sys.argv[1]):
    found = CliRunner().invoke(main, ["logs", run, *sys.argv[2:], "--search", "epoch", "--output", "json"])
    messages = [json.loads(line)["message"] for line in found.stdout.splitlines()]
    print("> " + json.dumps([run, messages]))
"""


def messages_of(reader: Reader, runs: list[str], *options: str) -> dict[str, list[str]]:
    """Return the messages that `logs` shows for each run."""
    (reader.directory / "count.py").write_text(COUNT)
    printed = reader.run(shlex.join(["python", "count.py", json.dumps(runs), *options]))
    return dict(json.loads(line[2:]) for line in printed.splitlines() if line.startswith("> "))


LONG = """
import time
from pathlib import Path
from train import logger
from zenml import pipeline, step

@step(enable_cache=False)
def train_long() -> None:
    for epoch in range(1, 21):
        logger.info("epoch %d", epoch)
        if epoch == 10:
            Path("middle").touch()
            while not Path("go").exists():
                time.sleep(0.05)

@pipeline
def training_long() -> None:
    train_long()

if __name__ == "__main__":
    training_long.with_options(run_name="long")()
"""


def test_the_quick_start(tmp_path: Path, programs: Programs) -> None:
    reader = Reader(tmp_path, programs, {})
    reader.follow("../README.md", since="Quick start", until="Promises")
    listed = json.loads(reader.run("composite-logstore child list logs --output json"))
    assert [child["name"] for child in listed] == ["archive", "second", "collector", "live"]


@pytest.mark.deep
def test_a_move_to_another_backend_while_pipelines_run(tmp_path: Path, programs: Programs) -> None:
    with s3_server() as s3:
        there = {"_id=...": f"_id={ACCESS_KEY}", "_access_key=...": f"_access_key={SECRET_KEY}"}
        there |= {"https://s3.example.com": s3.endpoint, "s3://logs/": f"s3://{s3.bucket}/"}
        reader = Reader(tmp_path, programs, there, counts_differ=True)
        page = "migration.md"
        reader.follow(page, until="The new backend")
        (tmp_path / "long.py").write_text(LONG)
        long = subprocess.Popen(["python", "long.py"], cwd=tmp_path, env=reader.env)
        try:
            with runs_all_the_time(reader) as runs:
                reader.follow(page, since="The new backend", until="Backfill and verify")
                # A run that began before the switch is still in progress.
                assert (tmp_path / "middle").exists()
                threading.Timer(10, (tmp_path / "go").touch).start()
                reader.follow(page, since="Backfill and verify")
                begun_after = len(runs) + 1
                while len(runs) <= begun_after:
                    time.sleep(0.1)
            assert long.wait(timeout=120) == 0
        finally:
            (tmp_path / "go").touch()
            long.kill()
            long.wait()

        # On a busy machine, a run's last events may be left on disk at its process's end.
        reader.run("composite-logstore spool drain production-logs")
        every = ["before", "between", "long", *runs]
        epochs = [f"epoch {number}" for number in range(1, 21)]
        assert messages_of(reader, every, "production-logs", "--from", "s3") == dict.fromkeys(every, epochs)
        # As in the dashboard: each run from the log store that collected it.
        assert messages_of(reader, every) == dict.fromkeys(every, epochs)
        # The last one ran after the earlier log store was retired.
        (last,) = messages_of(reader, runs[-1:], "production-logs", "--from", "earlier").values()
        assert last == []


@pytest.mark.deep
@pytest.mark.skipif(not is_installed(), reason="there is no engine of ClickHouse for this machine")
def test_a_move_to_clickhouse(tmp_path: Path, programs: Programs) -> None:
    with ClickHouse() as clickhouse, RotelToClickHouse(clickhouse) as collector:
        there = {"https://otlp.example.com:4318": collector.http_endpoint}
        there |= {"https://clickhouse.example.com:8443": clickhouse.url}
        there |= {"--password=...": "--password=right", "$CLICKHOUSE_PASSWORD": "right"}
        reader = Reader(tmp_path, programs, there)
        reader.follow("clickhouse.md")
        for run in ("before", "between"):
            found = messages_of(reader, [run], "production-logs", "--from", "clickhouse")
            assert found == {run: [f"epoch {number}" for number in range(1, 21)]}


@pytest.mark.deep
def test_redundant_delivery(tmp_path: Path, programs: Programs) -> None:
    with s3_server() as s3, FaultyProxy(int(s3.endpoint.rpartition(":")[2])) as network:
        there = {"_id=...": f"_id={ACCESS_KEY}", "_access_key=...": f"_access_key={SECRET_KEY}"}
        there |= {"https://s3.example.com": f"http://127.0.0.1:{network.port}", "s3://logs/": f"s3://{s3.bucket}/"}
        reader = Reader(tmp_path, programs, there)
        page = "redundancy.md"
        reader.follow(page, until="One of them goes away")
        network.fault = "refused"
        reader.follow(page, since="One of them goes away", until="It comes back")
        network.fault = None
        reader.follow(page, since="It comes back")


@pytest.mark.deep
def test_an_archive_and_live_monitoring(tmp_path: Path, programs: Programs) -> None:
    with start_collector() as collector, Datadog() as datadog:
        settings = {name: datadog.settings[name] for name in ("endpoint", "api_endpoint")}
        there = {
            "--api_key=...": f"--api_key={API_KEY}",
            "--application_key=...": f"--application_key={APPLICATION_KEY}",
        }
        there |= {"https://otlp.example.com:4318": collector.http_endpoint}
        there |= {'"site": "datadoghq.eu"': json.dumps(settings)[1:-1]}
        reader = Reader(tmp_path, programs, there)
        page = "archive-and-monitoring.md"
        reader.follow(page, until="When monitoring is down")
        messages = [record.body for record in collector.records()]
        assert messages.count("epoch 5") == 1
        assert not [message for message in messages if "gradients" in message]
        collector.kill()
        datadog.stop()
        reader.follow(page, since="When monitoring is down")


@pytest.mark.deep
def test_keep_everything_and_send_what_matters(tmp_path: Path, programs: Programs) -> None:
    with Datadog() as datadog:
        settings = {name: datadog.settings[name] for name in ("endpoint", "api_endpoint")}
        there = {
            "--api_key=...": f"--api_key={API_KEY}",
            "--application_key=...": f"--application_key={APPLICATION_KEY}",
            '"site": "datadoghq.eu"': json.dumps(settings)[1:-1],
        }
        reader = Reader(tmp_path, programs, there)
        reader.follow("keep-everything-send-what-matters.md")
        sent = json.dumps(datadog.seen())
        assert "sw0rdfish" not in sent


@pytest.mark.deep
def test_the_last_words_of_a_killed_run(tmp_path: Path, programs: Programs) -> None:
    reader = Reader(tmp_path, programs, {"gpu-7": socket.gethostname()})
    page, last = "last-words.md", "Its last words"
    reader.follow(page, until="An agent")
    with reader.zenml.agent():
        reader.follow(page, since="A run is killed", until=last)
        wait_until(lambda: "No undelivered events" in reader.run("composite-logstore spool list"), "all is delivered")
        reader.follow(page, since=last)
