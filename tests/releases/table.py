"""The table of docs/compatibility.md: a column for each release, of which a run may have found only some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

BEGIN = "<!-- `make test-releases` writes this table. -->\n"
END = "<!-- The end of the table. -->\n"

Columns = Mapping[str, Mapping[str, str]]


def heading(release: str) -> str:
    """Return the heading of a release's column."""
    client, _, server = release.partition(":")
    return f"{client}, server {server}" if server else client


def read(page: str) -> dict[str, dict[str, str]]:
    """Return the columns of the table of a page: a heading → a row → its cell."""
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not rows:
        return {}
    first, _, *others = rows
    return {name: {row[0]: row[place] for row in others} for place, name in enumerate(first) if place}


def rewrite(page: str, found: Columns, releases: Iterable[str]) -> str:
    """Return the page with other columns for the releases that were found, and those of the others as they were.

    Args:
        page: The page.
        found: A release → a row → its cell.
        releases: All releases, in the order of their columns.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "the page has no place for the table"
    assert end, "the table has no end"
    columns = {**read(page), **{heading(release): dict(column) for release, column in found.items()}}
    names = [name for name in map(heading, releases) if name in columns]
    # What was found just now comes first: its rows have the names of today.
    order = [columns[name] for name in map(heading, found)] + [columns[name] for name in names]
    rows = list(dict.fromkeys(row for column in order for row in column))
    lines = [["", *names], *([row, *(columns[name].get(row, "?") for name in names)] for row in rows)]
    lines.insert(1, ["---"] * (len(names) + 1))
    table = "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
