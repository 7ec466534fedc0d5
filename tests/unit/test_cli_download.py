"""`composite-logstore logs --output FILE`: a file that is complete, or not there."""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from zenml.models import LogsResponse

from composite_logstore import Bounds
from composite_logstore.cli import download as download_module
from composite_logstore.cli import logs as logs_module
from composite_logstore.cli.download import FormatOrFile, download
from composite_logstore.zenml import LogStoreUnavailableError
from tests.unit.test_cli_logs import World, backend, end, world

__all__ = ["world"]


@pytest.fixture
def stream(world: World) -> LogsResponse:
    run = world.zenml.begin_run("run")
    step = world.zenml.begin_step(run, "train")
    logs = world.stream(step, "step")
    end(run, step)
    return logs


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


def content(path: str) -> str:
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("path", ["run.log", "run.log.gz", "./run", "run.txt"])
def test_a_file_gets_what_is_shown_without_colours(world: World, stream: LogsResponse, path: str) -> None:
    world.log(stream, ["epoch 1", "two\nlines", "a \x1b[31mred\x1b[0m word", "\r ünï 🎉"])
    shown = world.run("run").stdout
    done = world.run("run", "--output", path)
    assert done.exit_code == 0
    assert content(path) == shown
    assert path.removeprefix("./") in done.stdout
    assert "4 entries" in done.stdout
    assert "epoch" not in done.stdout
    assert world.run("run", "--output", path, "--force", "-q").stdout == ""


def test_a_file_of_raw_text_keeps_the_colours(world: World, stream: LogsResponse) -> None:
    world.log(stream, ["a \x1b[31mred\x1b[0m word"])
    assert world.run("run", "--raw", "--output", "run.log").exit_code == 0
    assert "\x1b[31mred" in content("run.log")


@pytest.mark.parametrize("path", ["run.jsonl", "run.json", "run.jsonl.gz"])
def test_a_file_of_json_has_a_line_for_each_entry(world: World, stream: LogsResponse, path: str) -> None:
    world.log(stream, ["epoch 1", "epoch 2"])
    assert world.run("run", "--output", path).exit_code == 0
    assert content(path) == world.run("run", "--output", "json").stdout
    assert [json.loads(line)["message"] for line in content(path).splitlines()] == ["epoch 1", "epoch 2"]


def test_a_whole_log_of_many_pages_is_downloaded(
    world: World, stream: LogsResponse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounds, "ENTRIES_BYTES", 100)
    world.log(stream, [f"line {number}" for number in range(300)])
    world.run("run", "--output", "run.log.gz")
    assert [line.split()[-1] for line in content("run.log.gz").splitlines()] == [str(number) for number in range(300)]


def test_a_file_that_is_there_is_replaced_only_by_force(world: World, stream: LogsResponse) -> None:
    world.log(stream, ["new"])
    Path("run.log").write_text("old")
    refused = world.run("run", "--output", "run.log")
    assert (refused.exit_code, content("run.log")) == (2, "old")
    assert "--force" in refused.stderr
    assert world.run("run", "--output", "run.log", "--force").exit_code == 0
    assert "new" in content("run.log")


def test_where_nothing_was_logged_there_is_no_file(world: World, stream: LogsResponse) -> None:
    Path("old.log").write_text("old")
    assert world.run("run", "--output", "run.log").exit_code == 1
    assert world.run("run", "--output", "old.log", "--force").exit_code == 1
    assert os.listdir() == ["old.log"]
    assert content("old.log") == "old"


@pytest.mark.parametrize("error", [LogStoreUnavailableError("away"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_no_file(
    world: World, stream: LogsResponse, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    world.log(stream, ["one", "two"])
    shown = logs_module._as_text
    said: list[str] = []

    def show(*arguments: Any) -> str:
        if said:
            raise error
        said.append(shown(*arguments))
        return said[-1]

    if isinstance(error, KeyboardInterrupt):
        monkeypatch.setattr(logs_module, "_as_text", show)
    else:
        backend("a").fault = error
    assert world.run("run", "--output", "run.log").exit_code == (130 if isinstance(error, KeyboardInterrupt) else 3)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "yaml"], "text or json"),
        (["--output", "nowhere/run.log"], "nowhere"),
        (["--output", "."], "folder"),
        (["--output", "run.log", "--follow"], "--follow"),
        (["--output", "run.jsonl", "--raw"], "--raw"),
        (["--output", "json", "--raw"], "--raw"),
        (["--force"], "--output"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_read(
    world: World, stream: LogsResponse, arguments: list[str], words: str
) -> None:
    refused = world.run("run", *arguments)
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert os.listdir() == []


def test_a_folder_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module.tempfile, "mkstemp", full)
    with pytest.raises(click.FileError) as raised:
        download(Path("run.log"), force=False).__enter__()
    assert "run.log" in raised.value.format_message()


def test_a_disk_that_gets_full_is_named_and_leaves_no_file() -> None:
    def write() -> None:
        with download(Path("run.log"), force=False) as file:
            file._file.close()
            file._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
            file.write("x" * 10_000)

    with pytest.raises(click.FileError) as raised:
        write()
    assert "run.log" in raised.value.format_message()
    assert os.listdir() == []


def test_the_file_has_the_rights_of_any_new_file() -> None:
    before = os.umask(0o027)
    try:
        with download(Path("run.log"), force=False) as file:
            file.write("x")
            file.is_complete = True
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("run.log").st_mode) == 0o640


@pytest.mark.parametrize("value", ["text", "json"])
def test_a_format_is_no_file(value: str) -> None:
    Path(value).write_text("a file of that name")
    assert FormatOrFile().convert(value, None, None) == value
