"""Writes the report of a verify: one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from composite_logstore.inert import inert
from composite_logstore.names import counted
from composite_logstore.parity.result import DELAYS_SECONDS
from composite_logstore.parity.summary import NAMED, ParitySummary

_COLUMNS = 120
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 180, 46, 26
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#475569")


def write_report(path: Path, summary: ParitySummary) -> None:
    """Write the page. Texts from logs and names are escaped, and the page loads nothing from elsewhere."""
    path.write_text(_page(summary), encoding="utf-8", errors="replace")


def _page(summary: ParitySummary) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if summary.differences > summary.over_budget:
        verdict, kind = f"{summary.differences:,} differences", "bad"
    elif summary.differences:
        verdict, kind = f"{summary.over_budget:,} missing events may have been over a budget", "unsure"
    elif summary.not_compared or not summary.streams:
        verdict, kind = "Not everything could be compared", "unsure"
    else:
        verdict, kind = "Parity", "good"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>Parity of {_inert(summary.log_store)}</title>
<style>{_STYLE}</style></head><body>
<h1>Parity of <q>{_inert(summary.log_store)}</q></h1>
<p class="{kind}">{verdict}</p>
<p>{counted(summary.streams, "stream")}, compared on {now} in {summary.seconds:.1f} s.</p>
{_table(["Child", *columns(summary)], counts(summary))}
<h2>Completeness over time</h2>
<p>For each period: the events that the child holds, as a share of those that the most complete child holds.</p>
{_completeness(summary)}
<h2>Delay between emission and arrival</h2>
{_delays(summary)}
<h2>Worst streams</h2>
{_table(("Stream", "Child", "Differences"), [(label, name, f"{number:,}") for number, label, name in summary.worst])}
<h2>Events that differ</h2>
{_table(("Stream", "Kind", "Child", "Event", "Time", "Message", "Detail"), _events(summary))}
<h2>Not compared</h2>
{_table(("Stream", "Child", "Why"), summary.not_compared[:NAMED])}
</body></html>
"""


_COUNTS = {
    "Streams": "streams",
    "Events": "events",
    "Missing": "missing",
    "Over budget": "over_budget",
    "Arriving": "arriving",
    "Excluded by rule": "excluded",
    "Duplicated": "duplicated",
    "Out of order": "out_of_order",
    "Different": "different",
}
"""The columns of numbers in a comparison's table → the attributes of `ChildSummary`."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1e293b;background:#fff}
h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em}
table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{text-align:left;padding:.3em .6em;border-bottom:1px solid #e2e8f0;vertical-align:top;overflow-wrap:anywhere}
.good,.bad,.unsure{display:inline-block;padding:.2em .8em;border-radius:1em;font-weight:600;color:#fff}
.good{background:#15803d}
.bad{background:#b91c1c}.unsure{background:#b45309}
svg{width:100%;height:auto}svg text{font-size:11px;fill:#64748b}
"""


def _inert(text: str) -> str:
    return escape(inert(text))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_inert(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    if not body:
        return "<p>None.</p>"
    return "<table><tr>" + "".join(f"<th>{_inert(name)}</th>" for name in columns) + f"</tr>\n{body}</table>"


def columns(summary: ParitySummary) -> list[str]:
    """Return the names of the columns of numbers in a comparison's table."""
    return [name for name in _COUNTS if name != "Over budget" or summary.over_budget]


def counts(summary: ParitySummary) -> list[list[str]]:
    """Return the rows of a comparison's table: each child's name, and its numbers."""
    shown = columns(summary)
    return [
        [name, *(f"{getattr(child, _COUNTS[column]):,}" for column in shown)]
        for name, child in summary.children.items()
    ]


def _events(summary: ParitySummary) -> list[tuple[str, ...]]:
    return [
        (
            label,
            named.kind,
            named.child,
            named.event,
            _moment(named.time_unix_nano / 1e9) if named.time_unix_nano else "",
            named.message,
            named.detail,
        )
        for label, named in summary.named
    ]


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return ""


def _completeness(summary: ParitySummary) -> str:
    minutes = sorted({minute for child in summary.children.values() for minute in child.most if minute > 0})
    if not minutes:
        return "<p>There are no events.</p>"
    first, step = minutes[0], (minutes[-1] - minutes[0]) // _COLUMNS + 1
    columns = (minutes[-1] - first) // step + 1
    marks = []
    for colour, (name, child) in zip(cycle(_COLOURS), summary.children.items(), strict=False):
        held, most = [0] * columns, [0] * columns
        for minute, number in child.most.items():
            if minute > 0:
                most[(minute - first) // step] += number
                held[(minute - first) // step] += child.held[minute]
        for place, (has, all_) in enumerate(zip(held, most, strict=True)):
            if all_:
                share = min(1.0, has / all_)
                x, y = _x(place, columns), _y(share)
                title = f"{name}, {_moment((first + place * step) * 60)}: {has:,} of {all_:,} ({share:.2%})"
                marks.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{_inert(title)}</title></circle>'
                )
    labels = "".join(f'<text x="4" y="{_y(share) + 4:.0f}">{share:.0%}</text>' for share in (0, 0.5, 1))
    begin, end = _moment(first * 60)[:16], _moment(minutes[-1] * 60)[:16]
    times = f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{begin}</text>'
    times += f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{end} UTC</text>'
    return _legend(summary.children) + _svg(labels + times + "".join(marks))


def _delays(summary: ParitySummary) -> str:
    known = {name: child.delays for name, child in summary.children.items() if any(child.delays)}
    unknown = [name for name in summary.children if name not in known]
    words = f"<p>Not known of {_inert(', '.join(unknown))}: only an archive of objects notes when events arrived.</p>"
    note = words if unknown else ""
    if not known:
        return note
    bounds = [f"≤ {bound:g} s" for bound in DELAYS_SECONDS] + [f"> {DELAYS_SECONDS[-1]:g} s"]
    rows = []
    for place, label in enumerate(bounds):
        shares = [f"{delays[place]:,} ({delays[place] / sum(delays):.1%})" for delays in known.values()]
        rows.append((label, *shares))
    marks = []
    wide = (_WIDTH - _LEFT) / len(bounds)
    for colour, (number, (name, delays)) in zip(cycle(_COLOURS), enumerate(known.items()), strict=False):
        thin = wide * 0.8 / len(known)
        for place, events in enumerate(delays):
            share = events / sum(delays)
            x, y = _LEFT + place * wide + number * thin, _y(share)
            title = _inert(f"{name}, {bounds[place]}: {events:,} ({share:.1%})")
            marks.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{thin:.1f}" height="{_y(0) - y:.1f}" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
    names = "".join(
        f'<text x="{_LEFT + place * wide:.0f}" y="{_HEIGHT - 6}">{_inert(label)}</text>'
        for place, label in enumerate(bounds)
    )
    return note + _legend(known) + _svg(names + "".join(marks)) + _table(("Delay", *known), rows)


def _legend(names: Iterable[str]) -> str:
    parts = zip(cycle(_COLOURS), names, strict=False)
    return "<p>" + " ".join(f'<span style="color:{colour}">●</span> {_inert(name)}' for colour, name in parts) + "</p>"


def _svg(content: str) -> str:
    axis = f'<line x1="{_LEFT}" y1="{_y(0)}" x2="{_WIDTH}" y2="{_y(0)}" stroke="#cbd5e1"/>'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{axis}{content}</svg>'


def _x(place: int, columns: int) -> float:
    return _LEFT + 6 + (_WIDTH - _LEFT - 12) * (place + 0.5) / columns


def _y(share: float) -> float:
    return 10 + (_HEIGHT - _BOTTOM - 10) * (1 - share)
