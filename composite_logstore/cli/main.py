"""The command `composite-logstore`."""

from __future__ import annotations

import click

from composite_logstore.cli.backfill import backfill
from composite_logstore.cli.check import check
from composite_logstore.cli.logs import logs
from composite_logstore.cli.migrate import migrate
from composite_logstore.cli.promote import promote
from composite_logstore.cli.spool import spool
from composite_logstore.cli.verify import verify


@click.group()
@click.version_option(package_name="composite-logstore")
def main() -> None:
    """Manage log stores of ZenML's flavor `composite`."""


main.add_command(backfill)
main.add_command(check)
main.add_command(logs)
main.add_command(migrate)
main.add_command(promote)
main.add_command(spool)
main.add_command(verify)
