"""`make test-releases`: which releases it runs, what it says of those it cannot run, and the table that it writes."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import tests.releases.__main__ as matrix
from composite_logstore import zenml
from tests.releases.table import BEGIN, END, heading, read, rewrite

PAGE = f"Before.\n\n{BEGIN}{END}\nAfter.\n"


def done(code: int = 0, stdout: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[subprocess.CompletedProcess[str]]:
    """What uv answers, one call after the other; with success when there is nothing left."""
    answers: list[subprocess.CompletedProcess[str]] = []
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "uv", lambda *_: answers.pop(0) if answers else done())
    return answers


def test_all_run_unless_some_are_named() -> None:
    assert matrix.chosen("") == list(matrix.RELEASES)
    assert matrix.chosen("0.98.0 0.93.0") == ["0.98.0", "0.93.0"]
    assert matrix.chosen("turn") == [matrix.todays()]


@pytest.mark.parametrize("wish", ["0.92.0", "0.93", "all"])
def test_what_is_not_in_the_matrix_is_refused(wish: str) -> None:
    with pytest.raises(SystemExit, match=f"{wish}.*0.93.0"):
        matrix.chosen(f"0.93.0 {wish}")


def test_each_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    today = datetime(2026, 12, 31, 23, 59, tzinfo=timezone.utc)
    had = []
    for days in range(2 * len(matrix.IN_TURN)):

        class Clock:
            now = staticmethod(lambda _, days=days: today + timedelta(days=days))

        monkeypatch.setattr(matrix, "datetime", Clock)
        had.append(matrix.todays())
    assert had[: len(had) // 2] == had[len(had) // 2 :]
    assert sorted(had) == sorted([*matrix.IN_TURN] * 2)


def test_it_spans_the_releases_that_the_package_says_it_was_tested_with() -> None:
    releases = [release for release in matrix.RELEASES if ":" not in release]
    assert (releases[0], releases[-1]) == (zenml.OLDEST_TESTED, zenml.NEWEST_TESTED)


def test_a_client_is_older_than_its_server() -> None:
    pairs = [release.split(":") for release in matrix.RELEASES if ":" in release]
    assert pairs
    for client, server in pairs:
        assert {client, server} <= set(matrix.RELEASES)
        assert matrix.RELEASES.index(client) < matrix.RELEASES.index(server)


@pytest.mark.parametrize(
    ("fails", "said", "has_failed"),
    [
        (0, "no interpreter", False),
        (1, "No solution found: there is no version of zenml==0.93.0", False),
        (2, "No solution found: zenml==0.93.0 and click>=9 are incompatible", True),
        (2, "error sending request: operation timed out", False),
    ],
)
def test_only_what_does_not_fit_together_is_a_failure(
    answers: list[subprocess.CompletedProcess[str]], fails: int, said: str, has_failed: bool
) -> None:
    answers += [*[done()] * fails, done(1, said)]
    outcome = matrix.run("0.93.0", [], "2", [])
    assert outcome.has_failed is has_failed
    assert said in outcome.said
    assert ("NOT RUN" in outcome.said) is not has_failed
    assert not outcome.column


def test_a_machine_without_uv_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix.sys, "executable", str(tmp_path / "python"))
    outcome = matrix.run("0.93.0", [], "2", [])
    assert not outcome.has_failed
    assert "uv" in outcome.said


def test_the_exit_code_and_the_last_lines_tell_each_release(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PAGE", page)
    outcomes = {
        "0.93.0": matrix.Outcome("0.93.0", "passed: 3 passed", column={"cursors": "no"}),
        "0.95.1": matrix.Outcome("0.95.1", "NOT RUN, since it cannot be installed here:\nmore"),
        "0.98.0": matrix.Outcome("0.98.0", "FAILED: 1 failed", has_failed=True),
    }
    monkeypatch.setattr(matrix, "run", lambda release, *_: outcomes[release])
    for wishes, code in (("0.93.0 0.95.1", 0), ("0.93.0 0.98.0", 1)):
        with pytest.raises(SystemExit) as ended:
            matrix.main(wishes, "2")
        assert ended.value.code == code
        last = capsys.readouterr().out.splitlines()[-2:]
        for release, line in zip(wishes.split(), last, strict=True):
            assert line == f"ZenML {release}: {outcomes[release].said.splitlines()[0]}"
    assert read(page.read_text()) == {"0.93.0": {"cursors": "no"}}


@pytest.mark.parametrize(
    ("pip", "expected"),
    [
        ("", {}),
        ("global.index-url='https://index.example/simple'", {"UV_DEFAULT_INDEX": "https://index.example/simple"}),
        (":env:.index-url='https://a.example'\nglobal.timeout='9'", {"UV_DEFAULT_INDEX": "https://a.example"}),
        ("global.cert='/ca.pem'", {"SSL_CERT_FILE": "/ca.pem"}),
    ],
)
def test_uv_finds_packages_where_pip_does(pip: str, expected: dict[str, str]) -> None:
    assert matrix.uv_environment(pip, {"HOME": "/home"}) == {"HOME": "/home", **expected}


def test_what_is_set_for_uv_itself_stays() -> None:
    own = {"UV_DEFAULT_INDEX": "https://own.example", "SSL_CERT_FILE": "/own.pem"}
    assert matrix.uv_environment("global.index-url='https://a.example'\nglobal.cert='/ca.pem'", own) == own


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "results.xml"
    assert "no report" in matrix.counts(report)
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>')
    assert matrix.counts(report) == "4 passed, 2 failed, 3 skipped"


# The table

ALL = ["0.93.0", "0.98.0", "0.93.0:0.98.0"]


def test_a_table_is_written_between_its_marks_and_read_again() -> None:
    found: dict[str, Any] = {release: {"cursors": "no", "ranks": "yes"} for release in ALL}
    page = rewrite(PAGE, found, ALL)
    assert page.startswith(f"Before.\n\n{BEGIN}\n| | 0.93.0 | 0.98.0 | ")
    assert page.endswith(f"\n{END}\nAfter.\n")
    assert read(page) == {heading(release): column for release, column in found.items()}
    assert rewrite(page, found, ALL) == page


def test_a_run_of_some_releases_leaves_the_others_as_they_were() -> None:
    page = rewrite(PAGE, {release: {"cursors": "no"} for release in ALL}, ALL)
    page = rewrite(page, {"0.98.0": {"ranks": "yes", "cursors": "yes"}}, ALL)
    assert read(page) == {
        heading("0.93.0"): {"ranks": "?", "cursors": "no"},
        heading("0.98.0"): {"ranks": "yes", "cursors": "yes"},
        heading("0.93.0:0.98.0"): {"ranks": "?", "cursors": "no"},
    }


def test_a_release_that_has_left_the_matrix_leaves_the_table() -> None:
    page = rewrite(PAGE, {release: {"cursors": "no"} for release in ALL}, ALL)
    assert list(read(rewrite(page, {}, ALL[:1]))) == ["0.93.0"]


def test_the_page_has_each_release_of_the_matrix() -> None:
    table = read(matrix.PAGE.read_text())
    assert list(table) == list(map(heading, matrix.RELEASES))
    for column in table.values():
        assert "?" not in column.values()


def quoted(page: str) -> str:
    return " ".join(line.removeprefix("> ") for line in page.splitlines() if line.startswith("> "))


def test_the_page_tells_what_the_log_store_says_of_a_newer_release(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("zenml.__version__", "0.99.0")
    monkeypatch.setattr(zenml, "_has_warned", False)
    zenml.warn_if_untested(said.append)
    assert said == [quoted(matrix.PAGE.read_text())]
