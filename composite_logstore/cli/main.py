"""The command `composite-logstore`.

The modules of the commands import neither ZenML nor an operation, which takes seconds: help and completion need none.
"""

from __future__ import annotations

import atexit
import gc
from functools import partial

import click

from composite_logstore.cli.agent import agent
from composite_logstore.cli.backfill import backfill
from composite_logstore.cli.check import check
from composite_logstore.cli.child import child
from composite_logstore.cli.collector_config import collector_config
from composite_logstore.cli.console import Program
from composite_logstore.cli.explain import explain
from composite_logstore.cli.logs import logs
from composite_logstore.cli.migrate import migrate
from composite_logstore.cli.promote import promote
from composite_logstore.cli.rejected import rejected
from composite_logstore.cli.run import run
from composite_logstore.cli.spool import spool
from composite_logstore.cli.status import status
from composite_logstore.cli.validate import schema, validate
from composite_logstore.cli.verify import verify

# Python's own thresholds let it look through the million objects of ZenML's import again and again, which takes a third
# of a short command's time. Cycles of so many objects wait until they are collected, which is little memory.
_THRESHOLDS = (50_000, 20, 100)


@click.group(cls=Program)
@click.version_option(package_name="composite-logstore")
@click.pass_context
def main(context: click.Context) -> None:
    """Manage log stores of ZenML's flavor `composite`."""
    context.call_on_close(partial(gc.set_threshold, *gc.get_threshold()))
    gc.set_threshold(*_THRESHOLDS)
    # Nor once more at the end, when the operating system takes all memory back.
    atexit.register(gc.freeze)


main.add_command(agent)
main.add_command(backfill)
main.add_command(check)
main.add_command(child)
main.add_command(collector_config)
main.add_command(explain)
main.add_command(logs)
main.add_command(migrate)
main.add_command(promote)
main.add_command(rejected)
main.add_command(run)
main.add_command(schema)
main.add_command(spool)
main.add_command(status)
main.add_command(validate)
main.add_command(verify)
