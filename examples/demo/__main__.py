"""Shows what the composite log store does, with real servers on this machine.

    python -m examples.demo

With STAY=1 in the environment, the servers stay until Ctrl-C when the story has been told. With
COMPOSITE_LOGSTORE_DELIVERY=agent, an agent delivers from the beginning. Nothing but a temporary directory is written,
no traffic leaves the machine, and all is removed at the end.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from examples.demo.account import (
    Archived,
    Comparison,
    Failure,
    account_table,
    check_accounts,
    check_deliveries,
    has_pages,
    is_last_words,
    log_table,
    step_end,
)
from tests.servers.collector import Collector, find_rotel, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import AN_AGENT_DELIVERS, ZenML

PIPELINE = Path(__file__).with_name("pipeline.py")
KILL_AFTER = 500
"""How many events the collector gets before it is killed."""
DEAD_FOR = 1000
"""How many events the other children get before the collector is started again."""
KILLED_EPOCHS = 10_000
"""How many epochs the pipeline trains that is killed. It must not end before it is killed, however late its events get
to a child on a machine that is under load: a stream that has ended gets no last words."""
WAIT_SECONDS = 180.0
POLL_SECONDS = 0.2
"""Asking a backend for all that it has costs it time, which the pipeline needs."""


class Narrator:
    """Tells what happens, in one line each.

    Attributes:
        console: Where to.
    """

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else 110
        self.console = Console(width=width, markup=False, highlight=False, emoji=False)
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        self.console.print(f"{self.seconds:5.1f} s  {text}", soft_wrap=True)

    def show(self, text: str) -> None:
        """Show what a user would type or write."""
        for line in text.splitlines():
            self.console.print(f"         {line}", style="cyan", soft_wrap=True)


def main() -> int:
    """Run the demo, and clean up whatever happens. Return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    narrator = Narrator()
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="composite-logstore-demo-"))
            # Whatever else makes a temporary file on the way, it is removed with the rest.
            os.environ["TMPDIR"] = tempfile.tempdir = directory
            stack.callback(_end_processes, directory)
            demonstrate(narrator, Path(directory), stack)
    except KeyboardInterrupt:
        narrator.say("Interrupted. All processes are ended, and the temporary directory is removed.")
        return 130
    except Exception as error:
        reason = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        narrator.console.print(f"The demo failed: {reason}", style="bold red", soft_wrap=True)
        return 1
    narrator.say("Done. All processes are ended, and the temporary directory is removed.")
    return 0


def demonstrate(narrator: Narrator, directory: Path, stack: ExitStack) -> None:
    """Tell the story from its beginning to its end."""
    collector = stack.enter_context(start_collector())
    narrator.say(f"A collector takes OTLP at {collector.http_endpoint}: {collector.name}.")
    if find_rotel() is None:
        narrator.say("(The collector rotel has no wheel for this machine, so that stands in for it.)")
    datadog = stack.enter_context(Datadog())
    narrator.say(f"A stand-in for Datadog takes logs, and searches them, at {datadog.url}.")
    zenml = ZenML(directory / "zenml")
    narrator.say("ZenML gets a throw-away configuration, and its real server:")
    narrator.show("$ zenml login --local --ip-address 127.0.0.1")
    stack.enter_context(zenml)
    register(narrator, zenml, collector, datadog)
    if AN_AGENT_DELIVERS:
        narrator.say("An agent delivers what all processes log:")
        narrator.show("$ composite-logstore agent")
        stack.enter_context(zenml.chosen_agent())

    report, before, killed_at = run_pipeline(narrator, zenml, collector, datadog)
    stats = report["stats"]
    console = narrator.console
    if not has_pages():
        console.print(account_table(stats))
        console.print(step_end(report))
        check_deliveries(stats)
        narrator.say(
            "This release of ZenML returns no pages of logs, so the demo does not compare what the backends hold."
        )
        return
    archived = Archived.read(zenml, report["run_id"])
    since_killed = {id for id, logged_at in archived.times.items() if logged_at > killed_at}
    _wait("the collector has what was logged since it was killed", lambda: since_killed <= set(_ids(collector)))

    console.print()
    console.print(account_table(stats))
    console.print(step_end(report))
    check_accounts(stats, archived)
    if {entry["log.record.uid"] for entry in datadog.seen()["entries"]} != archived.times.keys():
        raise Failure("the stand-in for Datadog does not hold the events that the archive holds")
    console.print("The archive and the stand-in for Datadog hold the same events, each under the same id.")
    console.print(Comparison.of(archived, before, _ids(collector)).sentences())
    console.print()
    console.print(log_table(archived.step, 5))
    console.print()
    kill_pipeline(narrator, zenml, datadog)
    if os.environ.get("STAY"):
        stay(narrator, zenml, report["run_id"])


def kill_pipeline(narrator: Narrator, zenml: ZenML, datadog: Datadog) -> None:
    """Kill the pipeline in its middle, and read its last words from the server."""
    commands = ["zenml log-store update logs --durability=write_ahead"]
    if AN_AGENT_DELIVERS:
        narrator.say("Now each line is to survive:")
    else:
        narrator.say("Now each line is to survive, and an agent to deliver what killed processes leave:")
        commands.append("composite-logstore agent")
    narrator.show("\n".join(f"$ {command}" for command in commands))
    zenml.cli("log-store", "update", "logs", "--durability=write_ahead")
    with nullcontext() if AN_AGENT_DELIVERS else zenml.agent():
        kill_and_read(narrator, zenml, datadog)


def kill_and_read(narrator: Narrator, zenml: ZenML, datadog: Datadog) -> None:
    """Kill the pipeline, beside an agent, and read its last words."""
    null = subprocess.DEVNULL
    command = [sys.executable, str(PIPELINE), str(zenml.directory / "never.json"), str(KILLED_EPOCHS)]
    program = subprocess.Popen(command, env=zenml.env, cwd=zenml.directory, stdout=null, stderr=null)
    try:
        known = {entry["zenml.log.id"] for entry in datadog.seen()["entries"]}
        found: Counter[str] = Counter()

        def is_training() -> bool:
            new = [entry for entry in datadog.seen()["entries"] if entry["zenml.log.id"] not in known]
            found.clear()
            found.update(entry["zenml.log.id"] for entry in new if "loss" in entry["message"])
            return found.total() >= KILL_AFTER

        def check() -> None:
            if program.poll() is not None:
                raise Failure(f"the pipeline ended with {program.returncode} before it was killed")

        _wait("the pipeline trains once more", is_training, check)
        program.kill()
        began = time.monotonic()
        narrator.say("The pipeline runs once more, and is killed in its middle with -9.")
        ((stream, _),) = found.most_common(1)

        def last_words() -> list[dict[str, Any]]:
            entries = zenml.get(f"/logs/{stream}/entries", start="newest", limit=5)["items"]
            return sorted(entries, key=lambda entry: str(entry["timestamp"]))

        try:
            _wait("the server shows that it was killed", lambda: any(map(is_last_words, last_words())))
        except Failure as failure:
            ends = "".join(f"\n{entry['timestamp']} {entry['message']}" for entry in last_words())
            raise Failure(f"{failure}. The step's log ends with:{ends}") from None
        seconds = time.monotonic() - began
        narrator.say(f"{seconds:.1f} s later ZenML's server shows its last words:")
        for entry in last_words()[-3:]:
            narrator.show(f"{entry['timestamp'][11:23]} {entry['message']}")
    finally:
        program.kill()
        program.wait()


def stay(narrator: Narrator, zenml: ZenML, run_id: str) -> None:
    """Say where everything is, and leave it running until somebody has seen enough."""
    narrator.say(f"The dashboard, which asks for no login: {zenml.url}/projects/default/runs/{run_id}")
    narrator.say("The command line, in another terminal:")
    narrator.show(f"$ export ZENML_CONFIG_PATH={zenml.env['ZENML_CONFIG_PATH']}")
    narrator.show(f"$ {Path(sys.executable).with_name('composite-logstore')} check logs")
    narrator.say("All servers stay until you press Ctrl-C.")
    try:
        while True:
            time.sleep(WAIT_SECONDS)
    except KeyboardInterrupt:
        return


def register(narrator: Narrator, zenml: ZenML, collector: Collector, datadog: Datadog) -> None:
    """Set up the stack as a user would."""

    def cli(*arguments: str) -> None:
        narrator.show("$ " + shlex.join(["zenml", *arguments]))
        zenml.cli(*arguments)

    narrator.say("The keys go into a secret, which a child's settings only refer to:")
    keys = zenml.directory / "keys.json"
    keys.touch(mode=0o600)
    keys.write_text(json.dumps({"api_key": API_KEY, "application_key": APPLICATION_KEY}))
    cli("secret", "create", "datadog", "--values=@keys.json")

    references = {"api_key": "{{datadog.api_key}}", "application_key": "{{datadog.application_key}}"}
    children = [
        {"name": "archive", "type": "artifact"},
        {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint},
        {"name": "live", "type": "datadog", **datadog.settings, **references},
    ]
    text = "[\n  " + ",\n  ".join(map(json.dumps, children)) + "\n]"
    (zenml.directory / "children.json").write_text(text)
    narrator.say("children.json:")
    narrator.show(text)
    narrator.say("The flavor, the log store and a stack are registered:")
    cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
    cli("log-store", "register", "logs", "--flavor", "composite", "--primary=archive", "--children=@children.json")
    cli("stack", "register", "demo", "-o", "default", "-a", "default", "--log_store", "logs", "--set")


def run_pipeline(
    narrator: Narrator, zenml: ZenML, collector: Collector, datadog: Datadog
) -> tuple[dict[str, Any], list[str], datetime]:
    """Run the pipeline, and kill the collector in its middle.

    Returns:
        What the pipeline's process wrote down, the ids of the events that the collector had when it was
        killed, and when that was.
    """
    printed, report = zenml.directory / "printed", zenml.directory / "report.json"
    narrator.say("A pipeline trains a model, and logs some thousand lines:")
    narrator.show(f"$ python {PIPELINE.relative_to(PIPELINE.parents[2])} report.json")
    command = [sys.executable, str(PIPELINE), str(report)]
    with printed.open("wb") as output:
        program = subprocess.Popen(
            command, env=zenml.env, cwd=zenml.directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:

        def check() -> None:
            if program.poll() is not None:
                raise Failure(f"the pipeline ended with {program.returncode} and too early:\n{_tail(printed)}")

        _wait("the collector has its first events", lambda: len(collector.records()) >= KILL_AFTER, check)
        collector.kill()
        killed_at = datetime.now(timezone.utc)
        before = _ids(collector)
        narrator.say(f"The collector is killed. It has got {len(before):,} events.")
        seen = len(datadog.seen()["entries"])
        _wait("live goes on", lambda: len(datadog.seen()["entries"]) >= seen + DEAD_FOR, check)
        more = len(datadog.seen()["entries"]) - seen
        collector.start()
        narrator.say(f"The collector is started again. The pipeline has gone on: live has {more:,} events more.")
        try:
            program.wait(2 * WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"the pipeline does not end:\n{_tail(printed)}") from None
    finally:
        program.kill()
        program.wait()
    if program.returncode != 0:
        raise Failure(f"the pipeline ended with {program.returncode}:\n{_tail(printed)}")
    narrator.say("The pipeline has ended.")
    return json.loads(report.read_text()), before, killed_at


def _ids(collector: Collector) -> list[str]:
    return [str(record.attributes["log.record.uid"]) for record in collector.records()]


def _wait(what: str, is_so: Callable[[], bool], check: Callable[[], None] | None = None) -> None:
    """Wait until something is so.

    Args:
        what: What is waited for, for the message if it does not come.
        is_so: Tells whether it is so.
        check: Fails where there is nothing to wait for any more.
    """
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        if check is not None:
            check()
        if time.monotonic() > end:
            raise Failure(f"waited {WAIT_SECONDS:g} s in vain for this: {what}")
        time.sleep(POLL_SECONDS)


def _tail(file: Path) -> str:
    return file.read_text(errors="replace")[-3000:]


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Only once: what follows is the cleaning up, and nothing is to interrupt that.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_processes(directory: str) -> None:
    """End what is left of the processes that were started.

    Usually nothing: whoever started one ends it. But one whose start was interrupted, a ZenML server above
    all, has not been noted by anybody yet, so they are known by the temporary directory that only they have
    in their environment.
    """
    while left := [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("TMPDIR") == directory and process.pid != os.getpid()
    ]:
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)


if __name__ == "__main__":
    sys.exit(main())
