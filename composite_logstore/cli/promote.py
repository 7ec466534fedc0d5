"""`composite-logstore promote`: makes a child the primary of its log store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click

from composite_logstore.catalog.stores import NoAnswer, RegisteredStore, asking_zenml, find_store, in_words, mistake
from composite_logstore.cli.console import Failed, ask, output_option, say, say_json, warn


class Verdict(NamedTuple):
    """Whether a child may become the primary.

    Attributes:
        may: Whether it may.
        reason: Why, in a sentence without its full stop: what was compared, or what it lacks.
    """

    may: bool
    reason: str


Verify = Callable[[RegisteredStore, str], Verdict]
"""Compares the child of that name with the primary of the log store."""


def _compare(store: RegisteredStore, child: str) -> Verdict:
    from composite_logstore.cli.verify import compare_with_primary

    primary = store.config.primary
    summary = compare_with_primary(store, child)
    lacks = summary.children[child]
    if summary.not_compared:
        label, name, why = summary.not_compared[0]
        return Verdict(False, f"not everything could be compared: child '{name}', {label}: {why.rstrip('.')}")
    if lacks.differences:
        of = f"{lacks.missing:,} events are missing, {lacks.out_of_order:,} out of order, {lacks.different:,} different"
        return Verdict(False, f"compared with '{primary}', {of}; `composite-logstore verify` names them")
    return Verdict(True, f"it has all that '{primary}' has: {lacks.events:,} events of {summary.streams:,} streams")


verify: Verify = _compare
"""Whom to ask, where it is not forced."""


@click.command()
@click.argument("store")
@click.argument("child")
@click.option("--force", is_flag=True, help="Whatever the child lacks.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
def promote(store: str, child: str, force: bool, yes: bool, output: str) -> None:
    """Make CHILD the primary of the log store STORE: from then on logs are read from it.

    Only if it has all that the primary has, unless it is forced. Nothing else changes: every child gets what it got,
    and runs that log go on. Says how to go back.

    Exits with 0 if it is the primary, with 1 if it may not become it or the question was answered with no, with 2 if
    it was called wrongly, and with 3 if ZenML cannot be asked.
    """
    found = find_store(store)
    before = found.config.primary
    config = found.child(child)
    if child == before:
        _done(found, before, None, output)
        return
    if not config.enabled:
        raise mistake("CHILD", f"child '{child}' of log store '{found.name}' is disabled; enable it, or name another")
    if config.unreadable:
        raise mistake("CHILD", f"child '{child}' of log store '{found.name}': {config.unreadable}")
    verdict = None if force else verify(found, child)
    if verdict is not None and not verdict.may:
        if output == "json":
            say_json(_as_json(found, before, before, verdict))
        raise Failed(f"child '{child}' is not made the primary: {verdict.reason}. '--force' does it.")
    if not config.wants_all:
        warn(f"What the 'min_level' or 'progress' of child '{child}' keeps from it will not be shown any more.")
    if not yes:
        ask(f"Read the logs of log store '{found.name}' from '{child}' and no longer from '{before}'?", abort=True)
    update_settings(found, settings_to_promote(found, child))
    _done(find_store(str(found.store.id)), before, verdict, output)


def settings_to_promote(found: RegisteredStore, child: str) -> dict[str, Any]:
    """Return what changes if a child becomes the primary. One that was there to fall back on changes places with it."""
    fallback = found.config.fetch_fallback
    settings: dict[str, Any] = {"primary": child}
    if child in fallback:
        settings["fetch_fallback"] = [found.config.primary if name == child else name for name in fallback]
    return settings


def update_settings(found: RegisteredStore, settings: dict[str, Any]) -> None:
    """Change some settings of a log store in ZenML.

    Raises:
        NoAnswer: It cannot be done.
    """
    from zenml.exceptions import IllegalOperationError

    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType

        try:
            # What somebody else has changed meanwhile stays: ZenML merges these settings into those that it has.
            Client().update_stack_component(found.store.id, StackComponentType.LOG_STORE, configuration=settings)
        except IllegalOperationError:
            raise NoAnswer(f"ZenML does not let you update log store '{found.name}'; ask who may.") from None
        except ValueError as error:
            raise NoAnswer(f"log store '{found.name}' cannot be updated from here: {in_words(error)}") from None


def _way_back(found: RegisteredStore, before: str) -> str:
    return f"composite-logstore promote {found.name} {before} --force"


def _done(found: RegisteredStore, before: str, verdict: Verdict | None, output: str) -> None:
    primary = found.config.primary
    if output == "json":
        say_json(_as_json(found, primary, before, verdict))
    elif primary == before:
        say(f"Child '{primary}' is the primary of log store '{found.name}' already.")
    else:
        if verdict is not None:
            say(f"Verified: {verdict.reason}.")
        say(f"Child '{primary}' is the primary of log store '{found.name}' now; it was '{before}'.")
        say(f"To go back: {_way_back(found, before)}")


def _as_json(found: RegisteredStore, primary: str, before: str, verdict: Verdict | None) -> dict[str, Any]:
    return {
        "log_store": {"id": str(found.store.id), "name": found.name},
        "primary": primary,
        "before": before,
        "verdict": verdict._asdict() if verdict else None,
        "to_go_back": _way_back(found, before) if primary != before else None,
    }
