"""`composite-logstore validate` and `composite-logstore schema`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, output_option, say, say_json, show_differences, warn
from composite_logstore.names import counted

if TYPE_CHECKING:
    from composite_logstore.operations import Validation


@click.command(cls=Command, examples=["validate children.json", "validate children.yaml logs"])
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.argument("store", required=False)
@output_option
def validate(file: str, store: str | None, output: str) -> None:
    """Validate settings before they are registered.

    FILE contains a list of children, as 'zenml log-store register' takes it, or an object with all settings of a log
    store: JSON, or YAML if its name ends with '.yaml' or '.yml'; '-' is stdin. Finds every mistake of every child. Asks
    neither ZenML nor a backend. With STORE it asks ZenML, and also shows what an update of that log store would change.

    Exit code: 0 if the settings are valid, 1 if they are not, 2 for wrong usage, 3 if ZenML cannot be reached.
    """
    from composite_logstore.operations.settings_file import read_settings

    try:
        result = operations.validate(read_settings(file), store)
    except ValueError as error:
        result = operations.Validation(mistakes=[str(error)])
    if output == "json":
        say_json({"valid": result.is_valid, **asdict(result), "dropped": [asdict(one) for one in result.dropped]})
    else:
        _show(file if file != "-" else "stdin", result, store)
    if not result.is_valid:
        sys.exit(1)


def _show(file: str, result: Validation, store: str | None) -> None:
    for mistake in result.mistakes:
        say(f"{mistake}.", style="error")
    for warning in result.warnings:
        warn(f"{warning}.")
    if result.unchecked:
        say(f"Not checked, since only ZenML knows it: {'; '.join(result.unchecked)}.", style="info")
    if store is not None:
        changes = "changes:" if result.differences else "changes nothing."
        say(f"An update of log store '{store}' with {file} {changes}")
        show_differences(result.differences)
        if result.dropped:
            names = ", ".join(f"'{one.setting}' of child '{one.child}'" for one in result.dropped)
            warn(f"The list drops settings, which get their defaults again: {names}.")
    if result.is_valid:
        say(f"{file} is valid: {', '.join(result.children)}.", style="success")
    else:
        say(f"{file} is not valid: {counted(len(result.mistakes), 'mistake')}.")


@click.command(cls=Command, examples=["schema > children.schema.json"])
def schema() -> None:
    """Print the JSON Schema of the settings, for editors.

    With it they complete and check a list of children, or an object with all settings of a log store, with all backends
    that are installed here.
    """
    say_json(operations.schema(), indent=2)
