"""What anybody named or logged is shown by the commands, and obeyed by no terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from zenml.config.global_config import GlobalConfiguration

import composite_logstore
from composite_logstore import RetryableError, UnavailableError, operations
from composite_logstore.cli.console import Command
from composite_logstore.cli.main import main
from composite_logstore.event import Stream
from composite_logstore.inert import INDENT, inert, inert_json, message_of, paragraph
from composite_logstore.testing import SimulatedBackend, SimulatedClock, make_events
from composite_logstore.zenml import LogStoreUnavailableError
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child
from tests.unit.test_backfilling import archive, write
from tests.unit.test_cli import Machine, machine  # noqa: F401 - a fixture

# All that a terminal obeys, and all that is there and not seen. A line break is looked at by itself.
OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0001\U000e0020-\U000e007f]"
)
SURROGATES = range(0xD801, 0xDFFF)
CHARACTERS = [chr(n) for n in range(0xFFFF) if OBEYED.match(chr(n)) and n not in SURROGATES] + [
    "\U000e0001",
    "\U000e0041",
]

HOSTILE = {
    "carriage return": "50%\r2026-01-01 00:00:00.000 CRITICAL forged",
    "backspace": "a\x08\x08\x08\x08forged",
    "line break": "one\n2026-01-01 00:00:00.000 CRITICAL forged",
    "next line": "one\x85forged",
    "separators": "one\u2028two\u2029three\x0bfour\x0cfive",
    "title": "\x1b]0;forged\x07",
    "clipboard": "\x1b]52;c;Zm9yZ2Vk\x1b\\",
    "link": "\x1b]8;;https://forged.example\x1b\\here\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H\x1b[3J",
    "colour": "\x1b[31mred\x1b[0m",
    "eight bits": "\x9b2J\x9d0;forged\x9c\x90q\x9c",
    "device control": "\x1bP$q\x1b\\\x1b_G\x1b\\\x1b^x\x1b\\\x1bc\x1b[6n\x1b[?1049h",
    "delete": "a\x7f",
    "null": "a\x00b",
    "direction": "\u202egpj.exe\u2066\u2069\u200f\u061c",
    "no width": "a\u200bb\u200c\u200d\u2060\ufeff\u00ad",
    "tags": "\U000e0001\U000e0041",
    "markup": "[bold red]big[/bold red] [link=https://forged.example]x[/link] [/]",
}


def is_inert(text: str) -> bool:
    return not OBEYED.search(text)


@pytest.mark.parametrize("text", [*CHARACTERS, *HOSTILE.values()], ids=ascii)
def test_nothing_is_left_that_would_be_obeyed(text: str) -> None:
    text = f"before{text}after"
    assert is_inert(inert(text))
    assert "\n" not in inert(text, "")
    assert is_inert(paragraph(text).replace("\t", ""))
    assert is_inert(inert_json({text: [text]}))
    assert json.loads(inert_json({text: [text]})) == {text: [text]}
    assert message_of(RetryableError(text)).startswith("before")
    assert is_inert(message_of(RetryableError(text)))
    assert "\n" not in message_of(RetryableError(text))


@pytest.mark.parametrize(
    "text", ["größer, 日本\u3000語, 1\xa0000", "👍🏽 ❤️", "عربي עברית हिन्दी", "e\u0301", "a/b\\n {} % [x]"]
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert inert(text) == inert(text, "") == paragraph(text) == text
    assert json.loads(inert_json(text)) == text


@given(st.text(st.characters()))
def test_json_says_the_same_in_printable_characters(text: str) -> None:
    assert json.loads(inert_json([text])) == [text]
    assert is_inert(inert_json([text]))


@given(st.text(st.characters()), st.booleans())
def test_no_line_of_a_message_passes_for_another_message(text: str, colours: bool) -> None:
    first, *others = paragraph(text, colours).split("\n")
    assert all(line.startswith(INDENT) for line in others)
    assert is_inert(re.sub("\x1b\\[[0-9;:]*m|\t", "", "".join([first, *others])))


def test_a_traceback_stays_readable() -> None:
    text = 'it failed\r\nTraceback (most recent call last):\r\n\tFile "/a.py", line 3\nValueError: \x1b[31mno\n'
    assert paragraph(text).splitlines() == [
        "it failed",
        "    Traceback (most recent call last):",
        '    \tFile "/a.py", line 3',
        r"    ValueError: \x1b[31mno",
    ]


def test_colours_are_let_through_alone_and_end_with_the_message() -> None:
    text = "\x1b[1;31mred\x1b[0m \x1b[38:2::1:2:3mtrue\x1b[2J\x1b]0;title\x07\r\x9b31m"
    assert paragraph(text, True) == (
        "\x1b[1;31mred\x1b[0m \x1b[38:2::1:2:3mtrue" + r"\x1b[2J\x1b]0;title\x07\r\x9b31m" + "\x1b[0m"
    )
    assert paragraph("plain", True) == "plain"


def test_what_a_backend_answers_is_bounded_where_it_is_repeated() -> None:
    assert len(message_of(RetryableError("x" * 10_000_000))) <= 2_000


# The commands


class Hostile:
    """A ZenML in which everything that has a name is called so, and all that is logged says so."""

    def __init__(self, text: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = text
        self.zenml = SimulatedZenML.take_place(monkeypatch)
        self.name = f"name {text}"
        self.children = [archive(name, root) for name in "ab"]
        self.store = self.zenml.register(*self.children, name=self.name)
        run = self.zenml.begin_run(self.name)
        for of, source in ((run, text), (run, "client"), (self.zenml.begin_step(run, text), "step")):
            stream = Stream(self.zenml.open_stream(of, source, self.store.id).id, {}, None)
            events = make_events([f"message {text}", f"other {text}"], stream, writer=f"{stream.id.int:032x}"[:15])
            write(self.children[0], events)
            write(self.children[1], [events[1]._replace(message=f"differs {text}")])

    def run(self, *arguments: str, input: str | None = None) -> Result:
        result = self.zenml.run_command(*arguments, input=input)
        assert result.output
        return result


@pytest.fixture(params=HOSTILE.values(), ids=list(HOSTILE))
def hostile(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    return Hostile(request.param, tmp_path, monkeypatch)


def assert_inert(result: Result) -> None:
    for text in (result.stdout, result.stderr):
        assert is_inert(text.replace("\t", "")), ascii(text)
        # Neither in a table nor elsewhere does a line begin with what somebody called something.
        assert not re.search("^2026-01-01 00:00:00", text, re.MULTILINE)


COMMANDS: list[Callable[[Hostile], list[str]]] = [
    lambda it: ["logs", it.name],
    lambda it: ["logs", it.name, "--raw"],
    lambda it: ["logs", it.name, "--output", "json"],
    lambda it: ["logs", it.name, "--step", it.text],
    lambda it: ["logs", it.name, "--step", f"x{it.text}"],
    lambda it: ["logs", it.name, "--source", f"x{it.text}"],
    lambda it: ["logs", it.name, "--from", "b"],
    lambda it: ["logs", it.name, "--from", f"x{it.text}"],
    lambda it: ["logs", f"x{it.text}"],
    lambda it: ["logs", it.name, "--output", f"nowhere{it.text}/x.log"],
    lambda it: ["child", "list", f"x{it.text}"],
    lambda it: ["child", "set", "logs", f"x{it.text}", f"{it.text}=1"],
    # No argument of a process has this character.
    lambda it: ["validate", f"nowhere{it.text}".replace("\0", "")],
    lambda it: ["explain", it.name, "b", "--run", it.name],
    lambda it: ["explain", it.name, "b", "--run", it.name, "--output", "json"],
    lambda it: ["explain", it.name, f"x{it.text}"],
    lambda it: ["verify", it.name, "--all"],
    lambda it: ["verify", it.name, "--all", "--output", "json"],
    lambda it: ["verify", it.name, "--run", f"x{it.text}"],
    lambda it: ["verify", it.name, "--child", f"x{it.text}", "--all"],
    lambda it: ["backfill", it.name, "--from", "a", "--to", "b", "--all"],
    lambda it: ["backfill", it.name, "--from", "a", "--to", "b", "--all", "--output", "json"],
    lambda it: ["backfill", it.name, "--from", "a", "--to", f"x{it.text}", "--all"],
    lambda it: ["check", it.name],
    lambda it: ["check", it.name, "--output", "json"],
    lambda it: ["check", f"x{it.text}"],
    lambda it: ["promote", it.name, "b"],
    lambda it: ["promote", it.name, "b", "--force"],
    lambda it: ["promote", it.name, "b", "--force", "--yes", "--output", "json"],
    lambda it: ["promote", it.name, f"x{it.text}"],
    lambda it: ["migrate", "s", "--to", f"@{it.text}"],
    lambda it: ["migrate", "s", "--to", f"{{{it.text}"],
    lambda it: ["spool", "list", "--component", f"x{it.text}"],
    lambda it: ["spool", "drain", "--component", f"x{it.text}"],
]


def test_every_command_is_inert(hostile: Hostile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    # The first use of a configuration has ZenML say so, in colour.
    GlobalConfiguration()
    shown = ""
    for command in COMMANDS:
        arguments = command(hostile)
        result = hostile.run(*arguments, input="n\n")
        if "--raw" in arguments:
            result.stdout_bytes = re.sub(rb"\x1b\[[0-9;:]*m", b"", result.stdout_bytes)
        assert_inert(result)
        shown += result.output
    # It is shown, and not left out.
    assert inert(hostile.text, "\t") in shown or hostile.text in shown or "forged" in shown


def test_json_says_what_was_logged(hostile: Hostile) -> None:
    lines = [json.loads(line) for line in hostile.run("logs", hostile.name, "--output", "json").stdout.splitlines()]
    assert {line["message"] for line in lines} == {f"message {hostile.text}", f"other {hostile.text}"}
    assert {line["run"] for line in lines} == {hostile.name}
    assert hostile.text in {line["source"] for line in lines}


def test_each_entry_begins_a_line_and_nothing_else_does(hostile: Hostile) -> None:
    lines = hostile.run("logs", hostile.name).stdout.split("\n")[:-1]
    assert len([line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ", line)]) == 6
    assert all(line.startswith((INDENT, "20")) for line in lines)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_what_dead_processes_left_is_shown_inert(machine: Machine, text: str) -> None:  # noqa: F811
    backend = SimulatedBackend()
    store = machine.register(make_child("a", backend), make_child("b"), name=f"logs {text}")
    machine.leave(store, [text], "ab")
    machine.leave(uuid4(), [text], "ab")
    backend.fault = UnavailableError(f"the key {text} is wrong")
    for arguments in (["list"], ["drain"], ["list"], ["purge"]):
        result = CliRunner().invoke(main, ["spool", *arguments], input="y\n")
        assert result.output
        assert_inert(result)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_what_goes_wrong_is_said_inert(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with SimulatedClock():
        zenml = SimulatedZenML.take_place(monkeypatch)
        backend = SimulatedBackend()
        store = zenml.register(make_child("a", backend))
        zenml.open_stream(zenml.begin_run("run"), "client", store.id)
        backend.fault = LogStoreUnavailableError(f"no route to {text}")
        assert_inert(zenml.run_command("logs", "run"))
        backend.fault = UnavailableError(f"the key {text} is wrong")
        assert_inert(zenml.run_command("check", "logs"))
        assert_inert(zenml.run_command("check", "logs", "--output", "json"))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_pipeline_s_own_terminal_does_not_obey_a_backend(text: str, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from tests.simulation import make_logs as logs_of
    from tests.simulation import make_store

    backend = SimulatedBackend()
    backend.fault = UnavailableError(f"the answer is {text}")
    with SimulatedClock():
        store = make_store(make_child("a", backend))
        logs = logs_of(store)
        origin = store.register_origin("a", logs, {})
        store.emit(origin, logging.makeLogRecord({"msg": "hello"}))
        store.deregister_origin(origin)
        last_error = store.stats()["a"]["last_error"]
    assert is_inert(last_error)
    assert "\n" not in last_error
    said = [record.getMessage() for record in caplog.records if "unavailable" in record.getMessage()]
    assert len(said) == 1
    assert is_inert(said[0])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_an_error_is_inert_whoever_prints_it(text: str) -> None:
    promotion: Any = None
    for error in (
        operations.OperationError(text),
        operations.ArgumentError("store", text),
        operations.NoAnswerError(text),
        operations.MoveStoppedError(text),
        operations.PromotionRefusedError(text, promotion),
        operations.BackfillStoppedError(text),
    ):
        assert str(error) == paragraph(text)
        assert error.message == text


@pytest.mark.parametrize(
    "error", [operations.OperationError, operations.NoAnswerError, lambda text: operations.ArgumentError("x", text)]
)
def test_an_error_s_message_is_made_inert_once(error: Callable[[str], Exception]) -> None:
    def fail() -> None:
        raise error("one\ntwo")

    assert re.search(r"one\n {4}two\n", CliRunner().invoke(Command("command", callback=fail)).stderr)


def test_nothing_is_printed_past_what_makes_it_inert() -> None:
    """Each way to print, to ask and to fail is in `console.py`, but for the lines of `logs`."""
    ways = re.compile(
        r"click\.(echo|secho|confirm|prompt)\(|\bprint\(|sys\.std(out|err)\.write"
        r"|(ClickException|UsageError|BadParameter|\.fail)\("
    )
    core = Path(composite_logstore.__file__).parent
    files = [file for room in ("catalog", "cli", "operations") for file in sorted((core / room).glob("*.py"))]

    def found() -> Iterator[str]:
        for file in files:
            for line in file.read_text().splitlines():
                harmless = re.search(
                    r"""(click\.(confirm|UsageError|BadParameter)|\.fail)\(("[^"{]*"[,)]|paragraph\()""", line
                )
                if ways.search(line) and file.name != "console.py" and not harmless:
                    yield f"{file.name}: {line.strip()}"

    assert list(found()) == ["logs.py: click.echo(line, color=True if colours else None)"]
