"""What all commands have in common: tables that fit the terminal, examples, and how much they print."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from zenml.logger import _ZenMLStdoutStream

from composite_logstore.catalog.errors import NoAnswerError
from composite_logstore.cli import console
from composite_logstore.cli.console import Command, say, show_table, warn
from composite_logstore.cli.main import main
from composite_logstore.launch.command import _Filled
from composite_logstore.names import counted
from tests.simulated_zenml import SimulatedZenML

LONG = "a-name-that-is-longer-than-anybody-would-expect-it-to-be-in-a-table"
SENTENCE = "the export failed since the server at the other end has closed the connection, and is tried again"


def commands(group: click.Group = main, *words: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *words, name)
        else:
            yield " ".join((*words, name)), command


COMMANDS = dict(commands())

# The columns of each table, those with numbers, and a row of it that needs much room.
TABLES = {
    "check": (
        ["Child", "Type", "Settings", "Secrets", "Write", "Read", "Clock"],
        [],
        [f"{LONG} (primary)", "from-elsewhere", "problem", "warning", "60,000 ms", "cannot be read", "warning"],
    ),
    "child list": (
        ["Child", "Type", "Role", "Setting", "Value"],
        [],
        [LONG, "datadog", "primary", "api_key", LONG * 4],
    ),
    "explain": (
        ["What", "By", "Events", "Size", "Example"],
        ["Events", "Size"],
        ["withheld", "collapse_repeats", "1,234,567", "1,023.4 MB", SENTENCE],
    ),
    "rejected list": (
        ["Child", "Events", "Since", "On disk", "Reason"],
        ["Events", "On disk"],
        [LONG, "1,234,567", "2026-11-28 22:05", "1,023.4 MB", SENTENCE],
    ),
    "status": (
        ["Child", "State", *(amounts := ["Rate", "Backlog", "Oldest", "Withheld", "Redacted", "Rejected", "Dropped"])],
        amounts,
        [LONG, "unavailable", "12,345/s", "1,234,567", "119 min", "1,234,567", "12,345", "1,234", "1,234"],
    ),
    "migrate": (["Stage", "", "What", "To undo"], [], ["backfill", "next", SENTENCE, SENTENCE]),
    "spool": (
        ["Log store", "Process", "Child", "Streams", "Events", "On disk", "Age", "Why"],
        ["Streams", "Events", "On disk", "Age"],
        [LONG, "e484fc949bcb028", LONG, "12,345", "12,345,678", "1,023.4 MB", "119 min", SENTENCE],
    ),
    "verify": (
        [
            "Child",
            *(
                numbers := [
                    "Streams",
                    "Events",
                    "Missing",
                    "Arriving",
                    "Excluded by rule",
                    "Duplicated",
                    "Out of order",
                    "Different",
                ]
            ),
        ],
        numbers,
        [LONG, "12,345", "1,234,567", "1,234", "0", "163", "0", "12", "0"],
    ),
    "differences": (
        ["Stream", "Kind", "Child", "Event", "Message", "Detail"],
        [],
        [f"{LONG}/step", "out of order", LONG, "0198f1d2-1c2b-8abc-9def-0123456789ab", SENTENCE, SENTENCE],
    ),
    "characters of two cells": (["Child", "Why"], [], ["日本語" * 20, "日本語 " * 30]),
}


def drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, table: str) -> list[str]:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    columns, numbers, row = TABLES[table]
    show_table(columns, [row, ["x"] * len(columns)], numbers)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_fits_the_terminal_and_loses_nothing(
    table: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = drawn(monkeypatch, capsys, width, table)
    assert max(map(cell_len, lines)) <= width
    _, numbers, row = TABLES[table]
    assert sorted("".join(lines).replace(" ", "").replace("─", "")) == sorted(
        "".join([*row, *(column.upper() for column in TABLES[table][0]), *"x" * len(row)]).replace(" ", "")
    )
    # A number on two lines looks like two.
    for column, cell in zip(TABLES[table][0], row, strict=True):
        if column in numbers:
            assert any(cell in line for line in lines)


def test_a_word_is_divided_only_where_a_table_has_no_other_way_to_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the name of a writer, which people copy: the sentences in other columns take more lines."""
    row = ["logs", "e484fc949bcb028", "collector", "1", "1,200", "4.2 MB", "119 s", SENTENCE]
    monkeypatch.setitem(TABLES, "spool", (*TABLES["spool"][:2], row))
    words = " ".join(drawn(monkeypatch, capsys, 80, "spool")).split()
    assert set(row[:-1]) - {"4.2 MB", "119 s"} <= set(words)
    assert set(SENTENCE.split()) <= set(words)


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for table, (columns, numbers, row) in TABLES.items():
        show_table(columns, [row], numbers)
        assert len(capsys.readouterr().out.splitlines()) == 3, table


def test_an_empty_table_has_its_headers(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["Child", "Events"], [], ["Events"])
    assert "EVENTS" in capsys.readouterr().out


# Sentences


PATH = "/home/somebody/.config/zenml/composite_logstore/spool/b91229f7-9388-4532-961e-3b13c8362753/e484fc949bcb028"
COMMAND = f"composite-logstore migrate production --to s3 --name {LONG} --since 2026-01-31 --undo"


@pytest.fixture(params=[80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """That of a terminal without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def assert_divided_between_words(lines: list[str], text: str, width: int) -> None:
    assert [word for line in lines for word in line.split()] == text.split()
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("text", [SENTENCE * 3, f"{SENTENCE}:\n{SENTENCE}, {SENTENCE}", "日本語 " * 30])
def test_a_sentence_is_divided_between_words(text: str, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    warn(text)
    for printed in capsys.readouterr():
        assert_divided_between_words(printed.splitlines(), text, width)


def test_what_people_copy_stays_whole(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{SENTENCE}: {PATH}")
    say(f"This continues:\n{COMMAND}")
    say(f"To go back: {COMMAND}")
    say(f"{SENTENCE}; `{COMMAND}` mends it")
    lines = capsys.readouterr().out.splitlines()
    assert PATH in lines
    assert [line for line in lines if COMMAND in line] == [f"    {COMMAND}", f"To go back: {COMMAND}", f"`{COMMAND}`"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["logs", "train-1", "--follow", "--output", "train-1.log"],
        ["logs", "train-1", "--since", "the day before yesterday, or perhaps the day before that, in the evening"],
    ],
)
def test_an_error_is_divided_between_words(arguments: list[str], width: int) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    whole = CliRunner(env={"FORCE_COLOR": None}).invoke(main, arguments).stderr.splitlines()
    assert_divided_between_words(lines, " ".join(whole), max(80, width))
    assert max(map(len, whole)) > 80


def test_a_question_is_divided_between_words(width: int) -> None:
    done = CliRunner().invoke(click.Command("ask", callback=lambda: console.ask(SENTENCE)), input="y\n")
    # Before 8.3 Click echoes the answer to stdout.
    assert_divided_between_words(done.output.splitlines(), f"{SENTENCE} [y/N]: y", width)


def test_what_run_warns_of_is_divided_between_words(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    record = logging.LogRecord("run", logging.WARNING, "", 0, SENTENCE, (), None)
    text = _Filled("composite-logstore: %(message)s").format(record)
    assert_divided_between_words(text.splitlines(), f"composite-logstore: {SENTENCE}", width)


def test_what_run_warns_of_keeps_its_lines_and_commands(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    record = logging.LogRecord("run", logging.WARNING, "", 0, f"{SENTENCE}\n{COMMAND}", (), None)
    text = _Filled("composite-logstore: %(message)s").format(record)
    assert text.splitlines()[-1] == COMMAND
    assert_divided_between_words(text.splitlines()[:-1], f"composite-logstore: {SENTENCE}", width)


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(0, "event", "0 events"), (1, "event", "1 event"), (1_200, "stream", "1,200 streams"), (2, "entry", "2 entries")],
)
def test_a_number_of_things_has_the_right_plural(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected


def test_no_message_counts_things_in_another_way() -> None:
    package = Path(console.__file__).parents[1]
    plural = re.compile(r"""f["'].*\{(?!counted)[^{}]*:,\} (events|streams|slices|runs|pieces|lines|entries)\b""")
    sources = {path: path.read_text().splitlines() for path in package.rglob("*.py")}
    found = [f"{path}: {line.strip()}" for path, lines in sources.items() for line in lines if plural.search(line)]
    assert found == []


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_examples_that_are_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("live.json", "s3.json"):
        Path(file).write_text('{"name": "s3", "type": "artifact"}')
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.examples
    done = CliRunner().invoke(main, [*name.split(), "--help"])
    for example in command.examples:
        assert f"  composite-logstore {example}\n" in done.stdout
        words = shlex.split(example.partition(" >")[0])
        assert words[: len(name.split())] == name.split()
        # It is parsed as a call would be.
        command.make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", ["", *COMMANDS, "spool", "child"])
def test_the_help_fits_the_terminal_and_is_not_cut_off(name: str) -> None:
    done = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=80)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "..." not in re.sub(r"\[?(ARGS|STORE|COMMAND|KEY=VALUE)\]?( \[ARGS)?\]?\.\.\.", "", done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_shows_a_session_of_each_command_at_80_columns(name: str) -> None:
    """What the commands print there is written by tests/integration/test_sessions.py."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    section = page.partition(f"\n## composite-logstore {name}\n")[2].partition("\n## ")[0]
    (printed,) = re.findall(rf"^```\n\$ composite-logstore {name}\b.*\n((?:.*\n)*?)```$", section, re.MULTILINE)
    assert printed
    assert max(map(cell_len, printed.splitlines())) <= 80


# How much is printed


@pytest.mark.parametrize("option", ["-q", "--quiet", "-v", "--verbose"])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_quiet_or_verbose(name: str, option: str) -> None:
    done = CliRunner().invoke(main, [*name.split(), option, "--help"])
    assert done.exit_code == 0
    assert option in done.stdout


def talk() -> None:
    say("result")
    say("hint", style="info")
    warn("warning")
    with console.status("progress"):
        pass


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_quiet_command_prints_results_and_warnings(is_quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    done = CliRunner().invoke(Command("talk", callback=talk), ["--quiet"] if is_quiet else [])
    assert "result" in done.stdout
    assert "warning" in done.stderr
    assert ("hint" in done.stdout) is not is_quiet
    assert ("progress" in done.stderr) is not is_quiet


def fail() -> None:
    try:
        raise ConnectionError("https://user:a-secret@host")
    except ConnectionError as error:
        raise NoAnswerError("ZenML cannot be reached") from error


def test_a_verbose_command_says_where_an_error_comes_from_but_no_secret() -> None:
    command = Command("fail", callback=fail)
    short, long = CliRunner().invoke(command, []), CliRunner().invoke(command, ["-v"])
    assert short.exit_code == long.exit_code == 3
    assert "ConnectionError" not in short.output
    for words in ("NoAnswerError", "builtins.ConnectionError", f"{__file__}:", "in fail"):
        assert words in long.stderr
    assert "a-secret" not in long.output


def test_promote_hints_at_the_way_back_unless_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    zenml = SimulatedZenML.take_place(monkeypatch)
    children = [{"name": name, "type": "artifact", "artifact_store": name} for name in ("archive", "live")]
    for name, quiet in (("one", []), ("two", ["--quiet"])):
        zenml.register_settings({"primary": "archive", "children": children}, name=name)
        done = zenml.run_command("promote", name, "live", "--force", "--yes", *quiet)
        assert done.exit_code == 0
        assert ("To go back" in done.stdout) is not bool(quiet)
        assert "is now the primary" in done.stdout


# Completion


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("composite-logstore va", {"validate"}),
        ("composite-logstore spool ", {"list", "drain", "purge"}),
        ("composite-logstore child set --", {"--unset", "--dry-run", "--yes", "--output", "--help"}),
        ("composite-logstore migrate prod --stop-after b", {"build", "backfill"}),
    ],
)
def test_the_shell_completes_as_the_page_says(words: str, offered: set[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    variable = "_COMPOSITE_LOGSTORE_COMPLETE"
    assert f'eval "$({variable}=bash_source composite-logstore)"' in page
    env = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        variable: "bash_complete",
    }
    done = CliRunner(env=env).invoke(main, prog_name="composite-logstore")
    found = {line.rpartition(",")[2] for line in done.stdout.splitlines()}
    assert offered <= found
    assert all(one.startswith(words.rpartition(" ")[2]) for one in found)


def test_causes_that_lead_back_to_an_error_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    error, cause = ValueError("a"), KeyError("b")
    error.__cause__, cause.__cause__ = cause, error
    console._say_where(error)
    assert capsys.readouterr().err.splitlines() == ["builtins.ValueError", "builtins.KeyError"]


@pytest.mark.parametrize("is_imported_before", [True, False])
def test_what_zenml_logs_meanwhile_is_on_stderr(is_imported_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def import_zenml() -> None:
        # What importing ZenML does.
        handler = logging.StreamHandler(_ZenMLStdoutStream())
        logging.getLogger().addHandler(handler)

    def work() -> None:
        if not is_imported_before:
            import_zenml()
        logging.getLogger("zenml").warning("another release")
        say("result")

    if is_imported_before:
        import_zenml()
    make = logging.getLogRecordFactory()
    for _ in range(2):
        done = CliRunner().invoke(Command("work", callback=work))
        assert done.exit_code == 0
        assert "another release" in done.stderr
        assert "another release" not in done.stdout
    # Afterwards all is as it was.
    assert logging.getLogRecordFactory() is make
    for handler in logging.getLogger().handlers:
        assert isinstance(handler, logging.StreamHandler)
        assert isinstance(handler.stream, _ZenMLStdoutStream)
