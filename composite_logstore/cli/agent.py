"""`composite-logstore agent`."""

from __future__ import annotations

import resource
import signal
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from composite_logstore.cli.console import Command, say, warn

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command(
    cls=Command,
    examples=["agent", "agent --spool-directory /spool --health-address :8080", "agent --store logs"],
)
@click.option(
    "--spool-directory",
    metavar="DIRECTORY",
    help="Where the log stores have their spools; if not given, the folder below ZenML's configuration folder.",
)
@click.option(
    "--store", "stores", metavar="NAME", multiple=True, help="Only this log store, by name or id. Can be repeated."
)
@click.option(
    "--health-address",
    metavar="HOST:PORT",
    help="Answer /healthz, /readyz and /metrics there. Without HOST on the loopback interface alone.",
)
def agent(spool_directory: str | None, stores: tuple[str, ...], health_address: str | None) -> None:
    """Deliver the logs of this machine's processes.

    Delivers what killed processes leave, at once, and what running processes log if their 'delivery' is 'agent' or
    'auto'. Uses the present settings of each log store. Runs until SIGTERM or Ctrl-C; the spool keeps what is not
    delivered by then.

    Exit code: 0, 1 if another agent works there or the directory cannot be used, 2 for wrong usage.
    """
    from composite_logstore.operations.agent import Agent
    from composite_logstore.operations.agent_health import Health, parsed_address

    if health_address is not None:
        parsed_address(health_address)
    _raise_limit_of_files()
    one = Agent(spool_directory, stores, warn=warn, tell=lambda text: say(text, style="info"))
    with ExitStack() as stack:
        ended = stack.enter_context(_signals())
        one.begin()
        stack.callback(one.end)
        if health_address is not None:
            health = Health(one, health_address)
            stack.callback(health.close)
            say(f"Answers probes at {health.address}.")
        say(f"Delivers the logs of processes that write to {one.directory}. Ctrl-C or SIGTERM ends it.")
        one.run(ended)
    say("Ended. What is not delivered stays in the spool.", style="info")


def _raise_limit_of_files() -> None:
    """Open as many files as the system allows: some are needed for each process that the agent delivers for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Have SIGTERM and SIGINT set an event instead of ending the process at once."""
    ended = threading.Event()

    def note(*_: Any) -> None:
        ended.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
