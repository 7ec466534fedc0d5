"""`verify` and `backfill` under trouble: growing streams, outages, hostile texts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console
from zenml.exceptions import AuthorizationException
from zenml.models import LogsResponse

from composite_logstore import LogEvent, RetryableError, Scanned, Stream, UnavailableError, operations
from composite_logstore.cli import progress
from composite_logstore.inert import inert
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.selection import state_folder
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.result import BackfillStoppedError
from composite_logstore.testing import SimulatedBackend, make_stream
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import FolderArchive
from tests.events import make_events
from tests.simulated_zenml import SimulatedZenML
from tests.unit.test_backfilling import BACKENDS, WriteOnly, archive, copy, write

VERIFY = ("verify", "logs", "--all", "--output", "json")
BACKFILL = ("backfill", "logs", "--from", "a", "--to", "b", "--all", "--output", "json")


class Growing(ArtifactReader):
    """Reads an archive that grows as soon as it is read."""

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        LATER.pop(logs.id, lambda: None)()
        yield from super().scan(logs, token)


LATER: dict[UUID, Any] = {}


class GrowingArchive(FolderArchive):
    """An archive whose streams grow while they are scanned."""

    def create_reader(self) -> ArtifactReader:
        store = self.store()
        return Growing(find=lambda logs: store, is_in_progress=lambda logs: False)


class Place:
    """A log store with two archives, and runs."""

    def __init__(self, zenml: SimulatedZenML, root: Path) -> None:
        self.zenml = zenml
        self.a, self.b = (GrowingArchive(name=name, type="artifact", root=str(root / name)) for name in ("a", "b"))
        self.store = zenml.register(self.a, self.b)

    def run(self, name: str, in_a: int, in_b: int, in_progress: bool = False) -> Stream:
        """Make a run with this many events in each archive."""
        run = self.zenml.begin_run(name, in_progress)
        stream = Stream(self.zenml.open_stream(run, "client", self.store.id).id, {}, None)
        for child, number in ((self.a, in_a), (self.b, in_b)):
            if number:
                self.write(child, stream, 0, number)
        return stream

    def write(self, child: GrowingArchive, stream: Stream, begin: int, end: int) -> None:
        """Write events to an archive."""
        write(child, make_events([f"event {number}" for number in range(end)], stream)[begin:])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    zenml = SimulatedZenML.take_place(monkeypatch)
    return Place(zenml, tmp_path)


def test_events_missing_at_the_end_of_a_growing_stream_are_arriving(place: Place) -> None:
    stream = place.run("running", 10, 7, in_progress=True)
    # Events arrive between the reading of the two children.
    LATER[stream.id] = lambda: LATER.update({stream.id: lambda: place.write(place.b, stream, 7, 12)})
    found = place.zenml.run_command(*VERIFY)
    values = json.loads(found.stdout)
    assert found.exit_code == 0, found.stdout
    assert {name: (child["missing"], child["arriving"]) for name, child in values["children"].items()} == {
        "a": (0, 2),
        "b": (0, 0),
    }
    shown = place.zenml.run_command(*VERIFY[:3])
    assert "2 events at the end of streams in progress" in shown.stdout


def test_a_gap_in_a_growing_stream_is_missing(place: Place) -> None:
    stream = place.run("running", 10, 5, in_progress=True)
    place.write(place.b, stream, 7, 10)
    found = place.zenml.run_command(*VERIFY)
    assert found.exit_code == 1
    assert json.loads(found.stdout)["children"]["b"]["missing"] == 2


@pytest.mark.parametrize("command", [VERIFY, BACKFILL])
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (
            AuthorizationException("the token"),
            "log in with `zenml login`.",
        ),
        (
            ConnectionError("https://user:key@host"),
            "ZenML cannot be reached (ConnectionError); `zenml status` says more.",
        ),
    ],
)
def test_without_zenml_nothing_happens(place: Place, command: tuple[str, ...], trouble: Exception, words: str) -> None:
    place.zenml.trouble = trouble
    done = place.zenml.run_command(*command)
    assert done.exit_code == 3
    assert words in done.stderr
    assert "key" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", [VERIFY, BACKFILL])
def test_progress_survives_the_loss_of_the_server(place: Place, command: tuple[str, ...]) -> None:
    held = 0 if command is BACKFILL else 5
    streams = [place.run(f"run-{number}", 5, held) for number in range(7)]

    def go() -> None:
        place.zenml.trouble = AuthorizationException("logged out")

    LATER[streams[2].id] = go
    stopped = place.zenml.run_command(*command)
    assert stopped.exit_code == 3
    assert "log in with `zenml login`" in stopped.stderr

    place.zenml.trouble = None
    rest = place.zenml.run_command(*command)
    assert rest.exit_code == 0, rest.stderr
    assert "Resuming an interrupted" in rest.stderr
    values = json.loads(rest.stdout)
    if command is BACKFILL:
        # The first page of runs is already copied.
        assert (values["copied"], values["streams"]) == (20, 7)
    else:
        assert (values["parity"], values["streams"]) == (True, 7)
    assert json.loads(place.zenml.run_command(*VERIFY).stdout)["parity"]


@pytest.mark.parametrize("command", [VERIFY, BACKFILL])
def test_ctrl_c_before_the_log_store_is_found_aborts(
    place: Place, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.zenml.trouble = KeyboardInterrupt()
    done = place.zenml.run_command(*command)
    assert (done.exit_code, done.stdout, done.stderr.strip()) == (1, "", "Aborted!")
    place.zenml.trouble = None
    # Before the earlier log stores are known, nothing has begun either.
    monkeypatch.setattr(import_module("composite_logstore.operations.verify"), "collectors", interrupt)
    if command is VERIFY:
        assert place.zenml.run_command(*command).exit_code == 1


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_verify_has_begun_keeps_the_earlier_report(place: Place, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("the earlier report")
    place.zenml.trouble = KeyboardInterrupt()
    assert place.zenml.run_command("verify", "logs", "--all", "--html", str(report)).exit_code == 1
    assert report.read_text() == "the earlier report"


def test_a_report_in_no_folder_is_refused_before_the_work(place: Place, tmp_path: Path) -> None:
    done = place.zenml.run_command("verify", "logs", "--all", "--html", str(tmp_path / "nowhere" / "report.html"))
    assert done.exit_code == 2
    assert "nowhere" in done.stderr
    assert place.zenml.asked == []


def test_a_report_that_cannot_be_written_costs_no_result(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("run", 5, 4)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("composite_logstore.cli.report.write_report", fail)
    done = place.zenml.run_command("verify", "logs", "--all", "--html", str(tmp_path / "report.html"))
    assert done.exit_code == 1
    assert "Differences were found." in done.stdout
    assert "No space left on device" in done.stderr
    assert "Report:" not in done.stdout


def test_an_interrupted_command_with_anew_is_resumed_without_it(place: Place) -> None:
    for command in (VERIFY, BACKFILL):
        LATER[place.run("run", 5, 5).id] = interrupt
        done = place.zenml.run_command(*command, "--anew")
        assert done.exit_code == 3
        assert "Run the same command without --anew to resume." in done.stderr


# --dry-run


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_dry_run_of_backfill_counts_what_would_be_copied_and_copies_nothing(place: Place, tmp_path: Path) -> None:
    place.run("one", 10, 7)
    place.run("two", 5, 0)
    place.run("running", 3, 0, in_progress=True)
    before = files(tmp_path)
    would = place.zenml.run_command(*BACKFILL, "--dry-run")
    assert would.exit_code == 1
    values = json.loads(would.stdout)
    assert (values["dry_run"], values["copied"], values["there"], values["in_progress"]) == (True, 8, 7, 1)
    assert files(tmp_path) == before
    shown = place.zenml.run_command(*BACKFILL[:-2], "--dry-run")
    assert "8 events of 2 streams would be copied to 'b'; already there: 7." in shown.stdout
    assert "nothing has changed" in shown.stdout
    # The real run does what the dry run said.
    done = json.loads(place.zenml.run_command(*BACKFILL).stdout)
    assert {**done, "seconds": 0, "dry_run": True} == {**values, "seconds": 0}
    again = place.zenml.run_command(*BACKFILL, "--dry-run")
    assert json.loads(again.stdout)["copied"] == 0


def test_a_dry_run_of_backfill_leaves_the_notes_of_an_interrupted_one(place: Place) -> None:
    streams = [place.run(f"run-{number}", 5, 0) for number in range(7)]
    LATER[streams[3].id] = interrupt
    assert place.zenml.run_command(*BACKFILL).exit_code == 3
    for options in ([], ["--anew"]):
        would = json.loads(place.zenml.run_command(*BACKFILL, "--dry-run", *options).stdout)
        # Three streams are copied already: what is in an archive counts as there.
        assert would["copied"] == 20
    rest = place.zenml.run_command(*BACKFILL)
    assert "Resuming an interrupted" in rest.stderr
    assert json.loads(rest.stdout)["copied"] == 20


def test_a_dry_run_of_backfill_counts_what_a_child_that_cannot_be_read_would_get(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = WriteOnly(name="c", type="write-only", min_level="ERROR")
    sent = BACKENDS["c"] = SimulatedBackend()
    place.zenml.register(place.a, target, name="other", id=place.store.id)
    place.zenml.models.pop(0)
    stream = Stream(place.zenml.open_stream(place.zenml.begin_run("run"), "client", place.store.id).id, {}, None)
    events = make_events(["x"] * 10, stream)
    write(place.a, [event._replace(level=40) if event.sequence % 2 else event for event in events])
    command = ("backfill", "other", "--from", "a", "--to", "c", "--all", "--output", "json")
    would = json.loads(place.zenml.run_command(*command, "--dry-run").stdout)
    assert (would["copied"], would["unwanted"], sent.received) == (5, 5, [])
    assert json.loads(place.zenml.run_command(*command).stdout)["copied"] == len(sent.received) == 5


def test_a_dry_run_of_backfill_checks_what_a_real_run_checks(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("run", 5, 0)

    def dry_run(*options: str) -> Any:
        return place.zenml.run_command(*BACKFILL[:-2], *options, "--dry-run")

    assert dry_run("--to", "x").exit_code == dry_run("--to", "a").exit_code == 2
    with open_ledger(state_folder("backfill"), place.store.id, "b", 0.0):
        refused = dry_run()
        assert (refused.exit_code, "another backfill to child 'b'" in refused.stderr) == (3, True)

    def refuse(self: Any) -> None:
        raise UnavailableError("secret 'dd' does not exist; create it")

    with monkeypatch.context() as patch:
        patch.setattr(GrowingArchive, "create_exporter", refuse)
        refused = dry_run()
        assert (refused.exit_code, "secret 'dd' does not exist" in refused.stderr) == (3, True)
    stack = SimpleNamespace(name="prod", orchestrator=SimpleNamespace(name="old", supports_dynamic_pipelines=False))
    place.zenml.active_stack = stack  # type: ignore[attr-defined]
    refused = dry_run("--pipeline")
    assert (refused.exit_code, "orchestrator 'old'" in refused.stderr) == (2, True)
    stack.orchestrator.supports_dynamic_pipelines = True
    assert "5 events of 1 stream would be copied" in dry_run("--pipeline").stdout


@pytest.mark.parametrize("command", [VERIFY, BACKFILL])
def test_ctrl_c_later_shows_the_result_so_far(place: Place, command: tuple[str, ...]) -> None:
    LATER[place.run("run", 5, 5).id] = interrupt
    done = place.zenml.run_command(*command)
    assert done.exit_code == 3
    assert "Interrupted. Run the same command again to resume." in done.stderr
    assert json.loads(done.stdout)["log_store"] == "logs"


class Terminal(Console):
    """A terminal."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(file=io.StringIO(), force_terminal=True, width=120)

    @property
    def shown(self) -> str:
        """All that was written to it."""
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(progress, "console", lambda stderr: terminal)
    return terminal


@pytest.mark.parametrize("is_pipeline", [False, True])
def test_no_bar_is_painted_over_the_output_of_a_pipeline(
    place: Place, terminal: Terminal, is_pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backfill(*_: object, progress: Any, **__: object) -> None:
        Reporter(progress).notice("Running as pipeline run 'x' on stack 'y'.")
        Reporter(progress).count(5)

    monkeypatch.setattr(operations, "backfill", backfill)
    done = place.zenml.run_command(*BACKFILL, *["--pipeline"] * is_pipeline)
    assert "Running as pipeline run 'x'" in done.stderr
    assert ("5 events" in terminal.shown) == (not is_pipeline)
    assert bool(terminal.shown) == (not is_pipeline)


def test_a_terminal_shows_which_children_are_checked(terminal: Terminal) -> None:
    with progress.Bars("migrate") as bars, Reporter(bars.show).checking(["archive", "\x1b[2Jlive"]):
        bars.refresh()
    assert r"checking archive, \x1b[2Jlive" in terminal.shown


def test_an_outage_stops_the_copy_and_causes_no_duplicates(tmp_path: Path) -> None:
    stream = make_stream()
    a, b = archive("a", tmp_path), WriteOnly(name="b", type="write-only", max_export_batch_size=10)
    write(a, make_events([str(number) for number in range(100)], stream))

    class GoesAway(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            if len(self.received) == 30:
                raise RetryableError("connection refused")
            return super().export(batch)

    backend = BACKENDS["b"] = GoesAway()
    waited: list[float] = []
    with pytest.raises(BackfillStoppedError, match="child 'b' takes no events: connection refused"):
        copy(a, b, stream, tmp_path, clock=lambda: sum(waited), sleep=waited.append)
    assert 30 <= sum(waited) <= 60
    rest = BACKENDS["b"] = SimulatedBackend()
    assert copy(a, b, stream, tmp_path).copied == 70
    assert [event.sequence for event in [*backend.received, *rest.received]] == list(range(100))


def test_slices_need_a_pipeline(place: Place) -> None:
    done = place.zenml.run_command(*BACKFILL, "--slices", "3")
    assert done.exit_code == 2
    assert "'--slices' needs '--pipeline'" in done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\x9b2J\r\x7f", r"\x9b2J\r\x7f"),
        ("two\nlines, größer, 日本", "two\nlines, größer, 日本"),
    ],
)
def test_control_characters_are_shown_escaped(text: str, shown: str) -> None:
    assert inert(text) == shown
