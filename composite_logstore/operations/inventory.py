"""Lists the events that processes left undelivered on this machine, and why they wait."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from uuid import UUID

from composite_logstore.catalog.errors import ArgumentError, nearest
from composite_logstore.catalog.reach import check_server, why_unreached
from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import UnknownChild
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery.progress_bars import Bar, bar_of, second_of
from composite_logstore.event import LogEvent
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.lock import is_alive
from composite_logstore.spool.private_folder import fix_of
from composite_logstore.spool.settings import spool_folder, spool_root

IN_USE = "in use by a running process"
_NOT_DELIVERED = "not delivered yet"


@dataclass(frozen=True)
class LogStore:
    """A log store that may have events on this machine.

    Attributes:
        id: The log store's id.
        name: The log store's name, None if ZenML does not know it.
        config: The log store's settings, None if they are unknown.
        why: Why the settings are unknown.
    """

    id: UUID
    name: str | None = None
    config: CompositeLogStoreConfig | None = None
    why: str = ""

    @property
    def label(self) -> str:
        """The name, or else the id."""
        return self.name or str(self.id)

    @property
    def children(self) -> dict[str, ChildConfig]:
        """The children by name; none if the settings are unknown."""
        return {child.name: child for child in self.config.children} if self.config else {}


@dataclass(frozen=True)
class Inventory:
    """The folders of log stores on this machine.

    Attributes:
        folders: A folder → its log store, whether the folder contains anything or not.
        zenml_error: Why ZenML could not be reached, empty if it could. Without it log stores have no names, and
            folders of those with a `spool_directory` of their own are not found.
    """

    folders: dict[Path, LogStore]
    zenml_error: str = ""

    def select(self, stores: Sequence[str], children: Sequence[str]) -> dict[Path, LogStore]:
        """Return the folders of some log stores.

        Args:
            stores: The names or ids of the log stores; all if empty.
            children: Names of children. The folders are not selected by them, but each must be the name of a child.

        Raises:
            ArgumentError: There is no such log store or child.
        """
        selected = self.folders
        if stores:
            known = {key: store.id for store in selected.values() for key in (store.label, str(store.id))}
            for name in stores:
                if name not in known:
                    hint = "; without ZenML, give its id" if self.zenml_error else ""
                    raise ArgumentError("stores", f"there is no log store '{name}'{nearest(name, known)}{hint}")
            ids = {known[name] for name in stores}
            selected = {home: store for home, store in selected.items() if store.id in ids}
        names = {name for home, store in selected.items() for name in {*store.children, *children_in(home)}}
        for name in children:
            if name not in names:
                raise ArgumentError("children", f"there is no child '{name}'{nearest(name, names)}")
        return selected


def inventory() -> Inventory:
    """Find the folders of log stores on this machine; `backlogs` reads them.

    If ZenML cannot be reached, it finds the folders below ZenML's configuration folder alone.

    Examples:
        >>> [store.label for store in inventory().folders.values()]
        ['logs']
    """
    try:
        check_server()
        stores = registered()
    except Exception as error:
        return Inventory(_folders([], "ZenML cannot be reached"), why_unreached(error))
    return Inventory(_folders(stores, "the log store is no longer registered"))


def registered() -> list[LogStore]:
    """Ask ZenML for the log stores.

    Raises:
        Exception: ZenML cannot be reached, for any reason.
    """
    from zenml.client import Client
    from zenml.enums import StackComponentType
    from zenml.utils.pagination_utils import depaginate

    found = depaginate(
        Client().list_stack_components, type=StackComponentType.LOG_STORE, flavor="composite", hydrate=True
    )
    return [_read(component.id, component.name, component.configuration) for component in found]


def _read(id: UUID, name: str, settings: dict[str, object]) -> LogStore:
    try:
        return LogStore(id, name, CompositeLogStoreConfig.model_validate(settings))
    except ValueError:
        # Another version of this package or of a backend wrote the settings. The error's message does not help here.
        return LogStore(id, name, why="its settings cannot be read by the version that is installed here")


def _folders(stores: list[LogStore], why_unknown: str) -> dict[Path, LogStore]:
    """Return the folders of log stores on this machine.

    Args:
        stores: The log stores that ZenML knows.
        why_unknown: Why other log stores have no name.
    """
    default = spool_root(None)
    found = {
        spool_folder(store.id, store.config) if store.config else default / str(store.id): store for store in stores
    }
    by_id = {store.id: store for store in stores}
    # Folders of log stores that are gone, or that have had another `spool_directory`.
    for root in sorted({default, *(folder.parent for folder in found)}):
        try:
            others = sorted(root.iterdir())
        except OSError:
            continue
        for folder in others:
            id = uuid_of(folder.name)
            if id and folder not in found:
                found[folder] = by_id.get(id) or LogStore(id, why=why_unknown)
    return found


def uuid_of(text: str) -> UUID | None:
    """Return the id that a text is, None if it is none."""
    try:
        return UUID(text)
    except ValueError:
        return None


class ChildBacklog:
    """The events that wait for one child in the folder of one process.

    Attributes:
        child: The name that the child had when the process began.
        why: Why the events wait.
        events: The number of events that wait.
        streams: The streams that they belong to.
        oldest: The time of the oldest event, in nanoseconds since the epoch.
    """

    def __init__(self, child: str, config: ChildConfig | None, why: str, acknowledged_before: int) -> None:
        """Begin to count.

        Args:
            child: The child's name.
            config: The child's settings; without them every event counts.
            why: Why the events wait.
            acknowledged_before: The child has acknowledged all events below this number.
        """
        self.child = child
        self.why = why
        self.events = 0
        self.streams: set[UUID] = set()
        self.oldest: float = inf
        self._acknowledged_before = acknowledged_before
        self._config = config
        # A progress bar → the second of its last update: of a thinned bar one update a second counts.
        self._seconds: dict[Bar, int] = {}

    def count(self, event: LogEvent) -> None:
        """Count an event if it waits for the child."""
        if event.number < self._acknowledged_before:
            return
        if self._config and not self._config.wants(event.level, bool(event.progress)):
            return
        if event.progress and self._config and self._config.is_thinned:
            key, second = bar_of(event), second_of(event)
            if self._seconds.get(key) == second:
                return
            self._seconds[key] = second
        self.events += 1
        self.streams.add(event.stream.id)
        self.oldest = min(self.oldest, event.time_unix_nano)


@dataclass
class Backlog:
    """The folder of one process, dead or alive; or a log store's whole folder if it cannot be read.

    Attributes:
        store: The log store.
        home: The log store's folder.
        process: The name of the process's folder within it, empty for the whole folder.
        barred: Why other processes must not touch the folder, empty if they may.
        unattended: Why no process of the log store will deliver the events, empty if one will.
        parts: What waits for each child.
        bytes: How many bytes the events take on disk.
        damaged: How many pieces cannot be read.
        is_readable: Whether the folder can be read.
    """

    store: LogStore
    home: Path
    process: str = ""
    barred: str = ""
    unattended: str = ""
    parts: list[ChildBacklog] = field(default_factory=list)
    bytes: int = 0
    damaged: int = 0
    is_readable: bool = True

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.home / self.process

    @property
    def holds_events(self) -> bool:
        """Whether events wait in the folder, or may wait there."""
        return not self.is_readable or any(part.events for part in self.parts)


def backlogs(folders: dict[Path, LogStore], children: Sequence[str] = ()) -> list[Backlog]:
    """Read the folders of log stores, and return what waits there.

    Examples:
        >>> [(one.store.label, part.child, part.events, part.why)
        ...  for one in backlogs(inventory().folders) for part in one.parts]
        [('logs', 'live', 3, 'not delivered yet')]

    Args:
        folders: The folders, from an `Inventory`.
        children: Only what waits for these children; for all if empty.
    """
    found = [backlog for home, store in folders.items() for backlog in _backlogs_in(home, store)]
    for backlog in found:
        backlog.parts = [part for part in backlog.parts if part.events and (not children or part.child in children)]
    return found


def _backlogs_in(home: Path, store: LogStore) -> Iterator[Backlog]:
    """Yield the backlogs in a log store's folder, oldest folders first."""
    try:
        found = process_folders(home)
    except OSError as error:
        yield Backlog(store, home, barred=_unreadable(error), is_readable=False)
        return
    for folder in found:
        if (backlog := backlog_in(home, store, folder)) is not None:
            yield backlog


def backlog_in(home: Path, store: LogStore, folder: Path) -> Backlog | None:
    """Return what waits in the folder of a process; None if another process has delivered it and removed the folder."""
    backlog = Backlog(store, home, folder.name, unattended=_unattended(store, home))
    try:
        _look(backlog)
    except Exception as error:  # a folder that cannot be read must not hide the others
        if not os.path.lexists(folder):
            return None
        backlog.barred = _unreadable(error)
        backlog.is_readable = False
    return backlog


def processes_in(home: Path) -> list[Path]:
    """Return the folders of a log store's processes; none if the log store's folder cannot be read."""
    try:
        return process_folders(home)
    except OSError:
        return []


def children_in(home: Path) -> set[str]:
    """Return the names of the children that events may wait for in a log store's folder."""
    names = set()
    for folder in processes_in(home):
        with suppress(OSError):
            names.update(Spool.look(folder).children)
    return names


def children_of(spool: Spool, store: LogStore) -> list[str]:
    """Return the names of the children that a process had, or of the enabled children if these names are lost."""
    return spool.children or sorted(child.name for child in store.children.values() if child.enabled)


def purge(found: Iterable[Backlog], children: Sequence[str] = (), *, dry_run: bool = False) -> dict[Path, str]:
    """Delete events without delivering them. Leaves barred folders alone, such as those of running processes.

    Examples:
        >>> purge(backlogs(inventory().folders))
        {}
        >>> backlogs(inventory().folders)
        []

    Args:
        found: The backlogs.
        children: Only the events that wait for these children; all events if empty.
        dry_run: Whether to delete nothing, and only find out whether the folders can be used.

    Returns:
        A folder → why its events could not be deleted.
    """
    errors = {}
    for backlog in found:
        if backlog.barred:
            errors[backlog.folder] = backlog.barred
            continue
        if children and not any(part.child in children for part in backlog.parts):
            continue
        try:
            if dry_run:
                if why := why_unusable(backlog.folder):
                    errors[backlog.folder] = why
            else:
                _purge(backlog, children)
        except Exception as error:  # a folder that cannot be used must not stop the others
            errors[backlog.folder] = f"cannot be purged: {reason_of(error)}"
    return errors


def why_unusable(folder: Path) -> str:
    """Return why this process cannot take over the folder of a dead one now, empty if it can; it stays as it is.

    Raises:
        Exception: The folder cannot be used, for any reason.
    """
    process = Spool.recover(folder)
    if process is None:
        return IN_USE
    process.abandon()
    return ""


def _purge(backlog: Backlog, children: Sequence[str]) -> None:
    process = Spool.recover(backlog.folder)
    if process is None:
        # Another process delivers the events now.
        return
    for name in set(children_of(process, backlog.store)) - set(process.children):
        process.reset(name)
    for _ in process.reader.scan():
        # Scanning finds the end of the spool.
        pass
    process.set_aside()
    for child in process.children:
        if not children or child in children:
            process.acknowledge(child, max(process.segments.last + 1, process.acknowledged(child)))
    process.close()


def _look(backlog: Backlog) -> None:
    is_in_use = is_alive(backlog.folder)
    spool = Spool.look(backlog.folder)
    if is_in_use:
        backlog.barred = IN_USE
    configs = backlog.store.children
    for name in children_of(spool, backlog.store):
        why = obstacle(backlog.store, name) or _NOT_DELIVERED
        backlog.parts.append(ChildBacklog(name, configs.get(name), why, spool.acknowledged(name)))
    for item in spool.reader.scan():
        if isinstance(item, LogEvent):
            for part in backlog.parts:
                part.count(item)
    backlog.bytes = spool.segments.size
    # A line that a running process is writing looks damaged.
    backlog.damaged = 0 if is_in_use else sum(damage.lines for damage in spool.reader.damage)


def _unattended(store: LogStore, folder: Path) -> str:
    if store.config is None:
        return store.why
    if folder != spool_folder(store.id, store.config):
        return "'spool_directory' is another one now"
    if store.config.durability == "memory":
        return "'durability' is 'memory' now"
    return ""


def obstacle(store: LogStore, child: str) -> str:
    """Return why a child's events cannot be delivered with the present settings, empty if they can."""
    config = store.children.get(child)
    if config is None:
        return "the child is no longer configured" if store.config else store.why
    if not config.enabled:
        return "the child is disabled"
    if isinstance(config, UnknownChild):
        return "the child's backend is not installed here"
    return ""


def reason_of(error: Exception) -> str:
    """Return why a folder cannot be used: what the operating system says, or the class of any other error."""
    # Not the messages of other errors: they may contain what was logged.
    return (error.strerror or str(error)) if isinstance(error, OSError) else type(error).__name__


def _unreadable(error: Exception) -> str:
    return f"cannot be read: {reason_of(error)}{fix_of(error)}"
