"""`composite-logstore logs`, in simulated time, with simulated runs and backends."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zenml.enums import ExecutionStatus
from zenml.exceptions import DoesNotExistException
from zenml.models import LogsResponse

from composite_logstore.catalog.runs import RunStream
from composite_logstore.cli.main import main
from composite_logstore.cli.options import Moment
from composite_logstore.event import Stream as EventStream
from composite_logstore.operations.tail import GIVE_UP_SECONDS, POLL_SECONDS, QUIET_SECONDS, TailedStream, merged
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock, make_events
from composite_logstore.zenml import LogEntry, LogsEntriesResponse, LogStoreUnavailableError
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child

TAIL = import_module("composite_logstore.operations.tail")

SECOND = 1_000_000_000


class World:
    """A ZenML with one log store, whose backends get their events directly."""

    def __init__(self, zenml: SimulatedZenML, clock: SimulatedClock) -> None:
        self.zenml = zenml
        self.clock = clock
        self.store = zenml.register(make_child("a"), make_child("b"))
        self.numbers: dict[Any, int] = {}

    def log(self, logs: LogsResponse, messages: Any, second: float = 0, child: str = "a", level: int = 20) -> None:
        """Put events into a backend, the first one this many seconds after the beginning of the stream."""
        begun = int(logs.created.replace(tzinfo=timezone.utc).timestamp())
        first = self.numbers.get(logs.id, 0)
        self.numbers[logs.id] = first + len(messages)
        writer = f"{logs.id.int:032x}"[:15]
        stream = EventStream(logs.id, {})
        start = int((begun + second) * SECOND) - first * SECOND
        backend(child).received += make_events(
            messages, stream, first=first, writer=writer, start_unix_nano=start, step_nanos=SECOND, levels=[level]
        )

    def stream(self, of: SimpleNamespace, source: str) -> LogsResponse:
        return self.zenml.open_stream(of, source, self.store.id)

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        """Call a function after this many seconds."""
        signal = self.clock.signal()

        def wait() -> None:
            signal.wait(seconds)
            do()

        self.clock.start(wait, f"at {seconds}")

    def run(self, *arguments: str) -> Result:
        return self.zenml.run_command("logs", *arguments)

    def said(self, *arguments: str) -> list[str]:
        """Return the messages that the command shows."""
        result = self.run(*arguments, "--output", "json")
        assert result.exit_code == 0, result.output
        return [json.loads(line)["message"] for line in result.stdout.splitlines()]


def backend(name: str) -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with SimulatedClock() as clock:
        yield World(SimulatedZenML.take_place(monkeypatch), clock)


def end(run: SimpleNamespace, *steps: SimpleNamespace) -> None:
    run.in_progress = False
    run.end_time = datetime.now(timezone.utc).replace(tzinfo=None)
    for step in steps:
        step.status = ExecutionStatus.COMPLETED


# Showing


def test_the_streams_of_a_run_are_merged_by_time_and_labelled(world: World) -> None:
    run = world.zenml.begin_run("run")
    client = world.stream(run, "client")
    train = world.stream(world.zenml.begin_step(run, "train"), "step")
    world.log(client, ["begin"])
    world.log(train, ["epoch 1", "epoch 2"], second=5)
    world.log(client, ["end"], second=9)
    lines = world.run("run").stdout.splitlines()
    assert [line.split("  ", 1)[1].strip() for line in lines] == [
        "[client] begin",
        "[train/step] epoch 1",
        "[train/step] epoch 2",
        "[client] end",
    ]
    assert " INFO " in lines[0]
    assert "[" not in world.run("run", "--step", "train").stdout
    (first, *_) = world.run(str(run.id), "--output", "json").stdout.splitlines()
    entry = json.loads(first)
    assert (entry["run"], entry["step"], entry["source"], entry["level"]) == ("run", None, "client", "INFO")
    assert datetime.fromisoformat(entry["timestamp"]).replace(tzinfo=None) == client.created


def test_many_pages_of_many_streams_are_shown_completely_and_in_order(world: World) -> None:
    run = world.zenml.begin_run("run")
    for number in range(30):
        logs = world.stream(world.zenml.begin_step(run, f"step-{number}"), "step")
        world.log(logs, [f"{number} {line}" for line in range(700)], second=number)
    said = world.said("run")
    assert len(said) == 30 * 700
    assert [line for line in said if line.startswith("7 ")] == [f"7 {line}" for line in range(700)]
    when = [int(line.split()[0]) + int(line.split()[1]) for line in said]
    assert when == sorted(when)


def test_a_stream_is_opened_when_the_others_reach_its_beginning(world: World) -> None:
    opened = []

    class Store:
        def fetch(self, logs: LogsResponse, **_: Any) -> LogsEntriesResponse:
            opened.append(logs.source)
            return LogsEntriesResponse(items=[LogEntry(message=logs.source, timestamp=logs.created)])

    streams = []
    for number in (2, 0, 1):
        world.zenml.now = datetime(2026, 5, 1, number, tzinfo=timezone.utc)
        logs = world.stream(SimpleNamespace(log_collection=[]), f"source {number}")
        streams.append(TailedStream(RunStream(logs, logs.id, "run"), Store(), SimpleNamespace(), 100))  # type: ignore[arg-type]
    shown = merged(streams)
    assert next(shown)[1].message == "source 0"
    assert opened == ["source 0"]
    assert [entry.message for _, entry in shown] == ["source 1", "source 2"]


def test_filters_are_applied(world: World) -> None:
    run = world.zenml.begin_run("run")
    logs = world.stream(run, "client")
    world.log(logs, ["apple", "pear"])
    world.log(logs, ["apple pie", "plum"], second=60, level=logging.ERROR)
    begun = logs.created.replace(tzinfo=timezone.utc)
    assert world.said("run", "--search", "apple") == ["apple", "apple pie"]
    assert world.said("run", "--level", "warning") == ["apple pie", "plum"]
    assert world.said("run", "--since", (begun + timedelta(seconds=30)).isoformat()) == ["apple pie", "plum"]
    assert world.said("run", "--until", (begun + timedelta(seconds=30)).isoformat()) == ["apple", "pear"]
    assert world.said("run", "--source", "client", "--level", "40", "--search", "plum") == ["plum"]


def test_logs_are_read_from_the_named_child_even_if_it_is_disabled(world: World) -> None:
    world.zenml.register(make_child("a"), make_child("off", enabled=False), name="other", id=world.store.id)
    world.zenml.models.pop(0)
    run = world.zenml.begin_run("run")
    logs = world.stream(run, "client")
    world.log(logs, ["of a"])
    world.log(logs, ["of off"], child="off")
    assert world.said("run") == ["of a"]
    assert world.said("run", "--from", "off") == ["of off"]


class Stock:
    """A log store of another flavor, which can only read from the beginning of a stream."""

    def __init__(self, entries: list[LogEntry]) -> None:
        self.entries = entries

    def fetch(self, logs: LogsResponse, start: Any = None, limit: Any = None, filter_: Any = None) -> Any:
        return LogsEntriesResponse(items=self.entries)


def test_logs_of_zenml_s_own_log_stores_are_shown_but_these_have_no_children(world: World) -> None:
    other = world.zenml.register_other("stock", "datadog", Stock([LogEntry(message="stock")]))
    run = world.zenml.begin_run("run")
    world.zenml.open_stream(run, "client", other)
    assert world.said("run") == ["stock"]
    result = world.run("run", "--from", "a")
    assert result.exit_code == 2
    assert "log store 'stock' of flavor 'datadog'" in result.stderr
    # Log stores without that child are named.
    world.log(world.stream(world.zenml.begin_step(run, "train"), "step"), ["of a"])
    result = world.run("run", "--from", "a")
    assert (result.exit_code, "of a" in result.stdout) == (0, True)
    assert "Not read: client: log store 'stock'" in result.stderr


# Errors


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("new_york")
@pytest.mark.parametrize("options", [[], ["--follow"]])
@pytest.mark.parametrize(
    ("entry", "charset"),
    [
        (LogEntry(message="x", timestamp=datetime(1, 1, 1)), "utf-8"),
        (LogEntry(message="x", timestamp=datetime(1, 1, 1, tzinfo=timezone.utc)), "utf-8"),
        (LogEntry(message="日本"), "latin-1"),
    ],
)
def test_an_entry_that_cannot_be_shown_gives_no_answer(
    world: World, entry: LogEntry, charset: str, options: list[str]
) -> None:
    other = world.zenml.register_other("stock", "datadog", Stock([LogEntry(message="first"), entry]))
    run = world.zenml.begin_run("run", in_progress=bool(options))
    world.zenml.open_stream(run, "client", other)
    result = CliRunner(charset=charset).invoke(main, ["logs", "run", *options])
    assert (result.exit_code, "first" in result.stdout) == (3, True), result.exception
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rnu"], 2, "there is no run 'rnu' (did you mean 'run'?)"),
        (["run", "--step", "tain"], 2, "run 'run' has no step 'tain' (did you mean 'train'?)"),
        (["run", "--source", "clinet"], 2, "no logs with source 'clinet' (did you mean 'client'?)"),
        (["run", "--from", "x"], 2, "log store 'logs' has no child 'x'; there are: a, b"),
        (["run", "--level", "LOUD"], 2, "give one of DEBUG, INFO"),
        (["run", "--since", "yesterday"], 2, "give a time such as"),
        (["run", "--follow", "--until", "1h"], 2, "'--follow' and '--until'"),
        (["empty"], 1, "Run 'empty' has no such logs."),
    ],
)
def test_wrong_usage(world: World, arguments: list[str], code: int, words: str) -> None:
    run = world.zenml.begin_run("run")
    world.stream(run, "client")
    world.stream(world.zenml.begin_step(run, "train"), "step")
    world.zenml.begin_run("empty")
    result = world.run(*arguments)
    assert (result.exit_code, words in result.stderr) == (code, True), result.output


def test_a_backend_that_cannot_be_read_gives_no_answer(world: World) -> None:
    run = world.zenml.begin_run("run")
    world.stream(run, "client")
    backend("a").fault = "refused"
    result = world.run("run")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "the backend cannot be reached" in result.stderr
    world.zenml.trouble = ConnectionError()
    assert world.run("run").exit_code == 3


def lose(world: World, gone: LogsResponse) -> None:
    """Let the primary say that it does not have a stream."""
    fetch = world.store.fetch

    def refuse(logs: LogsResponse, **how: Any) -> LogsEntriesResponse:
        if logs.id == gone.id:
            raise DoesNotExistException("nothing was archived")
        return fetch(logs, **how)

    world.store.fetch = refuse  # type: ignore[method-assign, assignment]


def test_a_stream_that_is_missing_from_a_child_is_named(world: World) -> None:
    run = world.zenml.begin_run("run")
    world.log(world.stream(run, "client"), ["hello"])
    gone = world.stream(run, "orchestrator")
    lose(world, gone)
    result = world.run("run")
    assert (result.exit_code, "hello" in result.stdout) == (0, True)
    assert "orchestrator: nothing was archived" in result.stderr
    assert world.run("run", "--source", "orchestrator").exit_code == 1


def test_follow_waits_for_a_step_to_begin_and_says_so(world: World) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    world.at(30, lambda: end(run))
    result = world.run("run", "--follow", "--step", "train")
    assert result.exit_code == 1
    assert "waiting ..." in result.stderr


@pytest.mark.parametrize("text", ["1x", "", "2026-13-01", "99999999999d", "-5m"])
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="give a time"):
        Moment().convert(text, None, None)


def test_times_are_local_or_relative() -> None:
    zone = datetime.now().astimezone().tzinfo
    at = Moment().convert("2026-05-01T12:30", None, None)
    assert at.astimezone(zone).strftime("%H:%M") == "12:30"
    assert Moment().convert("2026-05-01T12:30Z", None, None) == datetime(2026, 5, 1, 12, 30, tzinfo=timezone.utc)
    ago = datetime.now(timezone.utc) - Moment().convert("90m", None, None)
    assert abs(ago - timedelta(minutes=90)) < timedelta(minutes=1)


# Nothing found


def test_a_run_that_the_primary_never_had_is_looked_for_in_the_other_children(world: World) -> None:
    run = world.zenml.begin_run("my run")
    train = world.stream(world.zenml.begin_step(run, "train"), "step")
    world.log(train, ["epoch 1"], child="b")
    for options in ([], ["--output", "json"], ["--step", "train"]):
        result = world.run("my run", *options)
        assert (result.exit_code, result.stdout) == (1, ""), options
        assert "Child 'a' of log store 'logs' was asked, and has no such logs of run 'my run'." in result.stderr
        again = shlex.split(result.stderr.splitlines()[-1])
        assert again[:3] == ["composite-logstore", "logs", "my run"]
        assert again[-2:] == ["--from", "b"]
        assert ("--step" in again) == ("--step" in options)
    found = world.zenml.run_command(*again[1:])
    assert (found.exit_code, "epoch 1" in found.stdout) == (0, True)


def test_the_child_that_was_named_is_the_one_that_was_asked(world: World) -> None:
    logs = world.stream(world.zenml.begin_run("run"), "client")
    world.log(logs, ["hello"])
    result = world.run("run", "--from", "b")
    assert result.exit_code == 1
    assert "Child 'b' of log store 'logs' was asked" in result.stderr
    assert result.stderr.splitlines()[-1].split() == ["composite-logstore", "logs", "run", "--from", "a"]
    other = world.run("run", "logs", "--from", "b")
    assert other.stderr.splitlines()[-1].split()[-4:] == ["run", "logs", "--from", "a"]


def test_without_logs_anywhere_each_child_is_named(world: World) -> None:
    world.zenml.register(make_child("a"), make_child("b"), make_child("c"), name="other", id=world.store.id)
    world.zenml.models.pop(0)
    world.stream(world.zenml.begin_run("run"), "client")
    backend("c").fault = "refused"
    result = world.run("run")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Child 'a' of log store 'logs' was asked" in result.stderr
    assert "Nor has child 'b'." in result.stderr
    assert "Child 'c' cannot be read: the backend cannot be reached: refused." in result.stderr
    assert "logs run STORE" in result.stderr


def test_logs_of_a_step_that_logged_nothing_are_not_looked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.stream(world.zenml.begin_run("run"), "client")
    monkeypatch.setattr(TAIL, "logged_events", lambda logs: 0)
    backend("b").fault = "refused"
    result = world.run("run")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'b'" not in result.stderr
    assert "STORE" not in result.stderr


def test_logs_that_a_filter_excludes_are_not_called_missing(world: World) -> None:
    logs = world.stream(world.zenml.begin_run("run"), "client")
    world.log(logs, ["hello"])
    world.log(logs, ["hello"], child="b")
    result = world.run("run", "--search", "farewell")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has logs of run 'run', but none that you asked for" in result.stderr
    assert "--from" not in result.stderr


def test_what_the_log_store_itself_says_is_no_log(world: World) -> None:
    notice = LogEntry(message="Nothing is left here.", name="composite_logstore")
    other = world.zenml.register_other("stock", "datadog", Stock([notice]))
    world.zenml.open_stream(world.zenml.begin_run("run"), "client", other)
    result = world.run("run")
    assert (result.exit_code, "Nothing is left here." in result.stdout) == (1, True)
    assert "The log store that collected them was asked" in result.stderr


def test_a_stream_that_is_missing_although_others_are_shown_is_looked_for(world: World) -> None:
    run = world.zenml.begin_run("run")
    world.log(world.stream(run, "client"), ["hello"])
    gone = world.stream(run, "orchestrator")
    world.log(gone, ["moved"], child="b")
    lose(world, gone)
    result = world.run("run")
    assert (result.exit_code, "hello" in result.stdout) == (0, True)
    assert "has not all logs of run 'run'" in result.stderr
    assert "composite-logstore logs run --from b" in result.stderr


# --follow


def test_follow_shows_new_logs_and_steps_until_the_run_has_ended(world: World) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    client = world.stream(run, "client")
    world.log(client, ["begin"])
    steps = []

    def step_begins() -> None:
        steps.append(world.zenml.begin_step(run, "train"))
        world.log(world.stream(steps[0], "step"), ["epoch 1"], second=5)

    def more() -> None:
        world.log(run_logs(steps[0]), ["epoch 2"], second=9)

    def run_ends() -> None:
        world.log(client, ["end"], second=20)
        end(run, *steps)

    # Logs that arrive after the end of the run.
    def late() -> None:
        world.log(client, ["the very end"], second=21)

    for seconds, do in ((5, step_begins), (9, more), (20, run_ends), (20 + QUIET_SECONDS - 2, late)):
        world.at(seconds, do)
    begin = world.clock.now()
    assert world.said("run", "--follow") == ["begin", "epoch 1", "epoch 2", "end", "the very end"]
    assert world.clock.now() - begin < 20 + 3 * QUIET_SECONDS


def run_logs(of: SimpleNamespace) -> LogsResponse:
    logs = of.log_collection[0]
    assert isinstance(logs, LogsResponse)
    return logs


def test_follow_asks_no_more_often_than_necessary(world: World) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    world.stream(run, "client")
    world.at(600, lambda: end(run))
    world.said("run", "--follow")
    assert world.zenml.asked.count("get_pipeline_run") <= 620 / POLL_SECONDS


def test_follow_stops_asking_for_steps_that_have_ended(world: World) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    step = world.zenml.begin_step(run, "train")
    logs = world.stream(step, "step")
    step.status = ExecutionStatus.COMPLETED
    asked: list[Any] = []
    fetch = world.store.fetch

    def count(of: LogsResponse, **how: Any) -> LogsEntriesResponse:
        asked.append(of.id)
        return fetch(of, **how)

    world.store.fetch = count  # type: ignore[method-assign, assignment]
    world.at(600, lambda: end(run))
    world.said("run", "--follow")
    assert set(asked) == {logs.id}
    assert len(asked) <= QUIET_SECONDS / POLL_SECONDS + 2


def test_follow_ends_at_once_for_a_run_that_ended_long_ago(world: World) -> None:
    run = world.zenml.begin_run("run")
    run.end_time = datetime(2020, 1, 1)
    world.log(world.stream(run, "client"), ["hello"])
    begin = world.clock.now()
    assert world.said("run", "--follow") == ["hello"]
    assert world.clock.now() == begin


def test_follow_loses_and_repeats_nothing_after_an_outage(world: World) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    logs = [world.stream(run, source) for source in ("client", "orchestrator")]
    for number, each in enumerate(logs):
        world.log(each, [f"{number} {line}" for line in range(3000)])
    pages = 0
    fetch = world.store.fetch

    def fail_at_times(of: LogsResponse, **how: Any) -> LogsEntriesResponse:
        nonlocal pages
        pages += 1
        if pages % 3 == 0:
            raise LogStoreUnavailableError("not now")
        return fetch(of, **how)

    world.store.fetch = fail_at_times  # type: ignore[method-assign, assignment]

    def zenml_fails() -> None:
        world.zenml.trouble = ConnectionError()

    def zenml_is_back() -> None:
        world.zenml.trouble = None
        world.log(logs[0], ["0 end"], second=9000)
        end(run)

    world.at(30, zenml_fails)
    world.at(60, zenml_is_back)
    result = world.run("run", "--follow", "--output", "json")
    assert result.exit_code == 0, result.output
    said = [json.loads(line)["message"] for line in result.stdout.splitlines()]
    assert sorted(said) == sorted([*(f"{number} {line}" for number in (0, 1) for line in range(3000)), "0 end"])
    assert [line for line in said if line.startswith("0")] == [*(f"0 {line}" for line in range(3000)), "0 end"]
    assert "not now Trying again ..." in result.stderr


def test_follow_gives_up_on_a_long_outage(world: World) -> None:
    world.stream(world.zenml.begin_run("run", in_progress=True), "client")
    backend("a").fault = "refused"
    begin = world.clock.now()
    result = world.run("run", "--follow")
    assert result.exit_code == 3
    assert GIVE_UP_SECONDS <= world.clock.now() - begin < GIVE_UP_SECONDS + 60
    assert result.stderr.count("Trying again") == 1


def test_ctrl_c_ends_it_cleanly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.zenml.begin_run("run", in_progress=True)
    world.log(world.stream(run, "client"), ["begin"])
    asked = world.zenml.get_pipeline_run

    def interrupt(*arguments: Any, **how: Any) -> Any:
        if "list_run_steps" in world.zenml.asked:
            raise KeyboardInterrupt
        return asked(*arguments, **how)

    monkeypatch.setattr(world.zenml, "get_pipeline_run", interrupt)
    result = world.run("run", "--follow")
    assert result.exit_code == 130
    assert "begin" in result.stdout
    assert result.stderr == ""


def test_a_rank_selects_the_processes_of_a_distributed_training(world: World) -> None:
    run = world.zenml.begin_run("train")
    logs = world.stream(run, "step")
    world.log(logs, ["the step itself", "rank 0", "rank 1", "rank 2", "rank 1 again"])
    received = backend("a").received
    for place, rank in ((1, 0), (2, 1), (3, 2), (4, 1)):
        received[place] = received[place]._replace(metadata={"zenml.log.rank": rank})
    assert world.said("train") == ["the step itself", "rank 0", "rank 1", "rank 2", "rank 1 again"]
    assert world.said("train", "--rank", "1") == ["rank 1", "rank 1 again"]
    assert world.said("train", "--rank", "0", "--rank", "2") == ["rank 0", "rank 2"]
    assert world.said("train", "--rank", "1", "--search", "again") == ["rank 1 again"]
    shown = [line.split(" [")[-1] for line in world.run("train").stdout.splitlines()]
    assert [line.partition("] ")[0] for line in shown[1:]] == ["rank 0", "rank 1", "rank 2", "rank 1"]
    ranks = [json.loads(line)["rank"] for line in world.run("train", "--output", "json").stdout.splitlines()]
    assert ranks == [None, 0, 1, 2, 1]
    nothing = world.run("train", "--rank", "7")
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    assert world.run("train", "--rank", "-1").exit_code == 2
