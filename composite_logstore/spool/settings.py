"""Where a log store's spool is on this machine, and how it is used."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.inert import described
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.private_folder import UntrustedError
from composite_logstore.spool.segments import SpoolFullError


class SpoolSettings(NamedTuple):
    """Where and how events are written to disk.

    Attributes:
        component: The folder of the log store.
        write_ahead: Whether each event is written before `emit` returns.
        max_bytes: How many bytes all processes of the log store may have on this machine.
        rejected_max_bytes: How many bytes of rejected events are kept there, besides.
        is_shared: Whether an agent may deliver the events of living processes.
    """

    component: Path
    write_ahead: bool
    max_bytes: int
    rejected_max_bytes: int = 0
    is_shared: bool = False


def spool_folder(component_id: UUID, config: CompositeLogStoreConfig) -> Path:
    """Return the folder of a log store's spools on this machine."""
    return spool_root(config.spool_directory) / str(component_id)


def spool_root(spool_directory: str | None) -> Path:
    """Return the folder that has a folder for each log store, named by its id."""
    if spool_directory:
        return Path(os.path.expanduser(spool_directory))
    from zenml.config.global_config import GlobalConfiguration

    return Path(GlobalConfiguration().config_directory) / "composite_logstore" / "spool"


def spool_settings(
    component_id: UUID, config: CompositeLogStoreConfig, is_shared: bool = False
) -> SpoolSettings | None:
    """Return where and how a log store's events are written to disk, None if they never are.

    Args:
        component_id: The log store's id.
        config: Its settings.
        is_shared: Whether an agent may deliver the events of this process.
    """
    if config.durability == "memory":
        return None
    folder = spool_folder(component_id, config)
    is_write_ahead = config.durability == "write_ahead"
    return SpoolSettings(folder, is_write_ahead, config.spool_max_bytes, config.rejected_max_bytes, is_shared)


def check_spool(settings: SpoolSettings) -> None:
    """Check that events can be written to disk.

    Raises:
        OSError: They cannot.
    """
    # No process takes a folder of this name for a writer's. If this process dies now, the folder is removed later.
    Spool.create(settings.component, f".hidden-check-{secrets.token_hex(4)}", []).close()


def spool_problem(error: Exception, settings: SpoolSettings) -> str:
    """Return why events cannot be written to disk, and how to fix it."""
    why = (error.strerror or str(error)) if isinstance(error, OSError) else described(error)
    if isinstance(error, UntrustedError):
        fix = error.fix or f"find out who made {error.filename}, and remove it"
    elif isinstance(error, SpoolFullError):
        fix = "raise 'spool_max_bytes', or make its backends reachable, so that they take the waiting events"
    else:
        fix = "make room there, or set 'spool_directory' to a folder that can be written and locked"
    return f"the spool in {settings.component} cannot be used: {why}; {fix}"
