"""What became of the pipeline's log: the children's accounts, and what their backends really hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from tests.servers.zenml_server import ZenML

COLUMNS = ("state", "accepted", "delivered", "rejected", "dropped", "pending")


class Failure(Exception):
    """Something is not as the demo promises."""


@dataclass(frozen=True)
class Archived:
    """What ZenML's server returns of a run, from the primary.

    Attributes:
        step: The entries of the step's own stream, oldest first.
        times: The id of each event of all streams → when it was logged.
    """

    step: list[dict[str, Any]]
    times: dict[str, datetime]

    @classmethod
    def read(cls, zenml: ZenML, run_id: str) -> Archived:
        """Ask the server for all streams of the run, page by page."""
        streams = {source: _entries(zenml, stream["id"]) for source, stream in zenml.streams(run_id).items()}
        entries = [entry for stream in streams.values() for entry in stream]
        times = {entry["id"]: datetime.fromisoformat(entry["timestamp"].replace("Z", "+00:00")) for entry in entries}
        return cls(streams["step"], times)


def _entries(zenml: ZenML, stream_id: str) -> list[dict[str, Any]]:
    path = f"/logs/{stream_id}/entries"
    page = zenml.get(path, start="oldest", limit=1000)
    entries: list[dict[str, Any]] = page["items"]
    while page["items"] and page["after"]:
        page = zenml.get(path, after=page["after"], limit=1000)
        entries += page["items"]
    return entries


def account_table(stats: dict[str, dict[str, Any]]) -> Table:
    """Return the table of the children's own accounts."""
    table = Table(
        "child", "state", title="What became of the events, as the log store counts them", title_justify="left"
    )
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    for name, child in stats.items():
        table.add_row(name, *(_number(child[column]) for column in COLUMNS))
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def step_end(report: dict[str, Any]) -> str:
    """Say how long the step's end took, and what there was to deliver in it."""
    text = (
        f"The step's end took {report['end_seconds']:.2f} s: in it the log store delivered what was still pending, "
        f"{_counts(report['pending_before'])}."
    )
    if any(report["pending_after"].values()):
        text += f" It did not wait for all of it: {_counts(report['pending_after'])} came afterwards."
    return text


def _counts(pending: dict[str, int]) -> str:
    return ", ".join(f"{count:,} for {name}" for name, count in pending.items() if count) or "nothing"


def log_table(entries: list[dict[str, Any]], count: int) -> Table:
    """Return the first and the last entries of a stream, as ZenML's server returned them."""
    title = f"The step's log from ZenML's server: {len(entries):,} entries, the first and the last {count}"
    table = Table("time (UTC)", "level", "message", title=title, title_justify="left")
    table.caption = "What goes to stderr is an ERROR to ZenML, a progress bar too."
    table.caption_justify = "left"
    for entry in entries[:count]:
        table.add_row(*_cells(entry))
    table.add_row("...", "...", "...")
    for entry in entries[-count:]:
        table.add_row(*_cells(entry))
    return table


def _cells(entry: dict[str, Any]) -> tuple[Text, ...]:
    level = logging.getLevelName(entry["level"])
    # Texts, since a message may look like rich's own markup.
    return Text(entry["timestamp"][11:23]), Text(level), Text(entry["message"].strip())


def is_last_words(entry: dict[str, Any]) -> bool:
    """Whether an entry says that a process was killed."""
    return "ended without closing its logs" in entry["message"]


def has_pages() -> bool:
    """Whether ZenML's server returns logs in pages: releases before 0.97 do not."""
    from zenml import models

    return hasattr(models, "LogsEntriesResponse")


def check_deliveries(stats: dict[str, dict[str, Any]]) -> None:
    """Fail if a child has not delivered every event."""
    for name, child in stats.items():
        if not 0 < child["delivered"] == child["accepted"]:
            raise Failure(f"child '{name}' has not delivered everything: {child}")


def check_accounts(stats: dict[str, dict[str, Any]], archived: Archived) -> None:
    """Fail if a child has not delivered every event, or the archive does not hold them."""
    check_deliveries(stats)
    if len(archived.times) != stats["archive"]["delivered"]:
        raise Failure(f"the server returns {len(archived.times)} events of {stats['archive']['delivered']}")


@dataclass(frozen=True)
class Comparison:
    """What the collector got, by the events' ids, beside what the archive holds.

    Attributes:
        total: How many events there are.
        before: How many the collector got before it was killed.
        after: How many more it got since it was started again.
        missing: How many it does not have.
        twice: How many it got more than once.
    """

    total: int
    before: int
    after: int
    missing: int
    twice: int

    @classmethod
    def of(cls, archived: Archived, before: Iterable[str], received: list[str]) -> Comparison:
        """Compare.

        Args:
            archived: What the archive holds.
            before: The ids that the collector had when it was killed.
            received: The ids that it got in all.
        """
        ids = set(received)
        first = set(before)
        return cls(
            len(archived.times),
            len(first),
            len(ids - first),
            len(archived.times.keys() - ids),
            len(received) - len(ids),
        )

    def sentences(self) -> str:
        """Say it, and what may be lost in such a crash and what may not."""
        text = (
            f"Of {self.total:,} events the collector got {self.before:,} before it was killed and {self.after:,} "
            "after it was started again, among them all that were logged while it was dead. "
        )
        if self.missing:
            text += (
                f"{self.missing:,} died with it: it had acknowledged them and not yet passed them on. "
                "What a backend has acknowledged is not sent again: that loss is the backend's. "
            )
        else:
            text += (
                "None is missing. (A collector may lose in a crash what it has acknowledged and not yet passed on: "
                "that is not sent again.) "
            )
        if self.twice:
            text += (
                f"{self.twice:,} arrived twice: the collector died after it took them and before it said so, "
                "and delivery is at least once. "
            )
        return text.rstrip()
