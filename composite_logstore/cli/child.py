"""`composite-logstore child`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
    ask,
    dry_run_option,
    output_option,
    say,
    say_json,
    show_differences,
    show_table,
    warn,
    yes_option,
)
from composite_logstore.inert import paragraph

if TYPE_CHECKING:
    from composite_logstore.operations import ChildChange


@click.group()
def child() -> None:
    """List and change the children of a log store."""


class Settings(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A setting as `KEY=VALUE`; or all settings of a child, as JSON or as `@` and a file."""

    name = "settings"

    def convert(
        self, value: str | dict[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the settings, under the key `""` if they are all settings of a child."""
        if isinstance(value, dict):
            return value
        from composite_logstore.operations.settings_file import read_settings
        from composite_logstore.settings_text import parse_settings

        if value.startswith(("@", "{")):
            try:
                settings = read_settings(value[1:]) if value.startswith("@") else parse_settings(value)
            except (operations.ArgumentError, ValueError) as error:
                self.fail(paragraph(str(error)), param, ctx)
            if not isinstance(settings, dict):
                self.fail("give an object with the settings of one child", param, ctx)
            return {"": settings}
        name, separator, text = value.partition("=")
        if not separator or not name:
            # It may be a secret, so it is not repeated.
            self.fail("give KEY=VALUE, such as 'name=monitor' or 'min_level=INFO', or @FILE", param, ctx)
        try:
            return {name: parse_settings(text)}
        except ValueError:
            return {name: text}


def _joined(settings: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], bool]:
    """Return the settings, and whether they are all settings of a child.

    Raises:
        click.UsageError: They are given in two ways at once.
    """
    wholes = [one[""] for one in settings if "" in one]
    if wholes and len(settings) > 1:
        raise click.UsageError("Give either settings as KEY=VALUE, or all settings as JSON or @FILE.")
    if wholes:
        return wholes[0], True
    return {name: value for one in settings for name, value in one.items()}, False


@child.command("list", cls=Command, examples=["child list logs"])
@click.argument("store")
@output_option
def list_(store: str, output: str) -> None:
    """List the children of a log store with their settings.

    Values of fields for secrets are masked; references to ZenML secrets are shown.

    Exit code: 0 if they were listed, 2 for wrong usage, 3 if ZenML cannot be reached.
    """
    children = operations.list_children(store)
    if output == "json":
        say_json([asdict(one) for one in children])
        return
    rows = []
    for one in children:
        first = [one.name, one.type, one.role]
        for name, value in one.settings.items() or [("", "")]:
            rows.append([*first, name, value])
            first = ["", "", ""]
    show_table(["Child", "Type", "Role", "Setting", "Value"], rows)


@child.command(
    "add",
    cls=Command,
    examples=["child add logs name=s3 type=artifact artifact_store=bucket", "child add logs @live.json --dry-run"],
)
@click.argument("store")
@click.argument("settings", metavar="KEY=VALUE...|JSON|@FILE", nargs=-1, required=True, type=Settings())
@dry_run_option
@yes_option
@output_option
def add(store: str, settings: tuple[dict[str, Any], ...], dry_run: bool, yes: bool, output: str) -> None:
    """Add a child to a log store.

    A VALUE is JSON, or else a text. FILE contains the settings of one child as JSON or YAML. Checks them as
    registration does, shows the change, and asks.

    Exit code: 0 if the child was added, 1 if it was refused or you answered no, 2 for wrong usage, 3 if ZenML cannot be
    reached.
    """
    joined, _ = _joined(settings)
    _tell(operations.add_child(store, joined, dry_run=dry_run, confirm=_confirm(yes, output)), output, yes)


@child.command(
    "set",
    cls=Command,
    examples=[
        "child set logs live min_level=WARNING 'tags=[\"env:prod\"]'",
        "child set logs live enabled=false --unset tags",
        "child set logs live 'api_key={{datadog.key}}' --dry-run",
    ],
)
@click.argument("store")
@click.argument("child")
@click.argument("settings", metavar="[KEY=VALUE...|JSON|@FILE]", nargs=-1, type=Settings())
@click.option("--unset", metavar="KEY", multiple=True, help="Give this setting its default again. Can be repeated.")
@dry_run_option
@yes_option
@output_option
def set_(
    store: str,
    child: str,
    settings: tuple[dict[str, Any], ...],
    unset: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Change settings of one child.

    Its other settings, and the other children, stay as they are. A VALUE is JSON, or else a text. JSON or FILE contains
    all settings of the child: what is missing there is dropped, and the command says so. Checks the settings as
    registration does, shows the change, and asks.

    Exit code: 0 if the child has these settings, 1 if it was refused or you answered no, 2 for wrong usage, 3 if ZenML
    cannot be reached.
    """
    joined, whole = _joined(settings)
    if not joined and not unset:
        raise click.UsageError("Give a setting as KEY=VALUE, or '--unset KEY'.")
    change = operations.set_child(
        store, child, joined, unset=unset, whole=whole, dry_run=dry_run, confirm=_confirm(yes, output)
    )
    _tell(change, output, yes)


@child.command("remove", cls=Command, examples=["child remove logs collector"])
@click.argument("store")
@click.argument("child")
@dry_run_option
@yes_option
@output_option
def remove(store: str, child: str, dry_run: bool, yes: bool, output: str) -> None:
    """Remove a child from a log store.

    Its backend keeps the events that it has. Events that wait for the child on a machine stay there, and
    'composite-logstore spool list' shows them. The primary cannot be removed.

    Exit code: 0 if the child was removed, 1 if it was refused or you answered no, 2 for wrong usage, 3 if ZenML cannot
    be reached.
    """
    _tell(operations.remove_child(store, child, dry_run=dry_run, confirm=_confirm(yes, output)), output, yes)


def _confirm(yes: bool, output: str) -> operations.ConfirmChange | None:
    def confirm(change: ChildChange) -> bool:
        _show(change, stderr=output == "json")
        return ask(f"Update log store '{change.store.name}'?")

    return None if yes else confirm


def _show(change: ChildChange, stderr: bool = False) -> None:
    show_differences(change.differences, stderr)
    if change.dropped:
        names = ", ".join(f"'{name}'" for name in change.dropped)
        warn(f"Child '{change.child}' loses settings that were not named; they get their defaults again: {names}.")


def _tell(change: ChildChange, output: str, yes: bool) -> None:
    if output == "json":
        say_json(
            {
                "log_store": {"id": str(change.store.id), "name": change.store.name},
                "child": change.child,
                "differences": [asdict(one) for one in change.differences],
                "dropped": change.dropped,
                "changed": change.is_done,
            }
        )
        return
    if yes or not change.is_done:
        _show(change)
    if change.is_done:
        say(f"Log store '{change.store.name}' is updated. Runs that begin from now on use it.", style="success")
    elif change.differences:
        say(NOTHING_CHANGED)
    else:
        say(f"Child '{change.child}' has these settings already.")
