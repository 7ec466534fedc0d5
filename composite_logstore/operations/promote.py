"""Makes a child the primary of its log store, so that logs are read from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from composite_logstore.catalog.errors import ArgumentError, OperationError
from composite_logstore.catalog.stores import RegisteredStore, find_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.names import command, counted, quoted
from composite_logstore.operations.progress import ProgressCallback, Reporter
from composite_logstore.operations.verify import compare_with_primary

Confirm = Callable[[str], bool]
"""Answers a question; False ends the operation before it changes anything."""


class Verdict(NamedTuple):
    """Whether a child may become the primary.

    Attributes:
        may: Whether it may.
        reason: Why, without a full stop: what was compared, or what is missing from the child.
    """

    may: bool
    reason: str


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion.

    Attributes:
        store: The log store.
        primary: The primary's name now, as ZenML has it; after a dry run the name that it would be.
        before: The primary's name before.
        verdict: The result of the comparison, None if there was none.
        dry_run: Whether nothing was changed, since it was only asked what would be.
    """

    store: RegisteredStore
    primary: str
    before: str
    verdict: Verdict | None = None
    dry_run: bool = False


class PromotionRefusedError(OperationError):
    """Events are missing from the child, something could not be compared, or the answer was no.

    Attributes:
        promotion: How things stand: nothing has changed.
    """

    def __init__(self, message: str, promotion: Promotion) -> None:
        super().__init__(message)
        self.promotion = promotion


def promote(
    store: str,
    child: str,
    *,
    force: bool = False,
    dry_run: bool = False,
    confirm: Confirm | None = None,
    progress: ProgressCallback | None = None,
) -> Promotion:
    """Make a child the primary, if it holds all events that the primary holds.

    Nothing else changes: every child keeps receiving its events, also from runs in progress. If the child was a
    fallback for reading, it changes places with the earlier primary.

    Examples:
        >>> promote("logs", "live").before
        'archive'

    Args:
        store: The log store's name or id.
        child: The child's name.
        force: Whether to promote the child without comparing it with the primary.
        dry_run: Whether to make all checks, ask nothing and change nothing.
        confirm: Is asked before anything changes.
        progress: Is told how far the comparison is.

    Raises:
        ArgumentError: There is no such log store or child, or the child is disabled or cannot be read.
        NoAnswerError: ZenML or a child cannot be reached.
        PromotionRefusedError: Events would no longer be visible, something could not be compared, or the answer was no.
    """
    found = find_store(store)
    before = found.config.primary
    if child == before:
        return Promotion(found, before, before, dry_run=dry_run)
    if not found.child(child).enabled:
        raise ArgumentError(
            "child", f"child '{child}' of log store '{found.name}' is disabled; enable it, or name another"
        )
    config = found.readable_child(child)
    report = Reporter(progress)
    verdict = None if force else judge(found, child, report)
    unchanged = Promotion(found, before, before, verdict, dry_run)
    if verdict is not None and not verdict.may:
        raise PromotionRefusedError(
            f"child '{child}' was not made the primary: {verdict.reason}. 'force' promotes it anyway", unchanged
        )
    if not config.wants_all:
        report.notice(f"Events that {quoted(config.excluded_by)} of child '{child}' excludes will no longer be shown.")
    settings = settings_to_promote(found, child)
    if dry_run:
        found.check_update(settings)
        return Promotion(found, child, before, verdict, dry_run)
    if confirm and not confirm(f"Read the logs of log store '{found.name}' from '{child}' instead of '{before}'?"):
        raise PromotionRefusedError("The answer was no; nothing has changed.", unchanged)
    found.update(settings)
    now = find_store(str(found.id))
    return Promotion(now, now.config.primary, before, verdict)


def judge(found: RegisteredStore, child: str, report: Reporter) -> Verdict:
    """Compare a child with the primary, and return whether it may take the primary's place."""
    primary = found.config.primary
    summary = compare_with_primary(found, child, report)
    result = summary.children[child]
    if summary.not_compared:
        return Verdict(False, summary.why_not_compared())
    reasons = []
    if result.excluded:
        reasons.append(excluded(found.child(child), result.excluded, summary.children[primary].events))
    if result.differences:
        over = f", of which {result.over_budget:,} may have been over 'budget'" if result.over_budget else ""
        reasons.append(
            f"compared with '{primary}': {counted(result.missing, 'event')} missing{over}, {result.out_of_order:,} out "
            f"of order, {result.different:,} different; `{command('verify', found.name, '--all')}` names them"
        )
    if reasons:
        return Verdict(False, "; ".join(reasons))
    events, streams = counted(result.events, "event"), counted(summary.streams, "stream")
    return Verdict(True, f"it holds all events of '{primary}': {events} of {streams}")


def excluded(child: ChildConfig, events: int, of: int) -> str:
    """Say how many of the primary's events become invisible once a child is the primary, and by which rule."""
    named = quoted(child.excluded_by)
    return f"{events:,} of {counted(of, 'event')} will not be visible: {named} of child '{child.name}' excludes them"


def settings_to_promote(found: RegisteredStore, child: str) -> dict[str, Any]:
    """Return the settings that make a child the primary; a fallback changes places with the earlier primary."""
    fallback = found.config.fetch_fallback
    settings: dict[str, Any] = {"primary": child}
    if child in fallback:
        settings["fetch_fallback"] = [found.config.primary if name == child else name for name in fallback]
    return settings
