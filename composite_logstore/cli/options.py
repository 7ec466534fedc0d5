"""The times that options take."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import click

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Moment(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A point in time: one of ISO 8601, this machine's time where it names no zone, or how long ago it was: `90m`."""

    name = "time"

    def convert(self, value: str | datetime, param: click.Parameter | None, context: click.Context | None) -> datetime:
        """Return the point in time."""
        if isinstance(value, datetime):
            return value
        try:
            if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value.strip()):
                return datetime.now(timezone.utc) - timedelta(**{_UNITS[match[2]]: float(match[1])})
            # Before Python 3.11 it knows no `Z`.
            return datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip())).astimezone(timezone.utc)
        except (ValueError, OverflowError, OSError):
            self.fail("give a time such as '2026-05-01T12:30', or how long ago it was: '30s', '90m', '2h', '7d'")
