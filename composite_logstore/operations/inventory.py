"""What processes of log stores have left on this machine, and why it is still there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from uuid import UUID

from composite_logstore.config import ChildConfig, CompositeLogStoreConfig, UnknownChild
from composite_logstore.event import LogEvent
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.lock import is_alive
from composite_logstore.spool.private_folder import UntrustedError
from composite_logstore.spool.settings import spool_folder, spool_root

_NOT_DELIVERED = "not delivered yet"


@dataclass(frozen=True)
class LogStore:
    """A log store of which there may be something on this machine.

    Attributes:
        id: Its id.
        name: Its name, None if ZenML does not know it.
        config: Its settings, None if they are not known.
        why: Why its settings are not known.
    """

    id: UUID
    name: str | None = None
    config: CompositeLogStoreConfig | None = None
    why: str = ""

    @property
    def label(self) -> str:
        """What to call it."""
        return self.name or str(self.id)

    @property
    def children(self) -> dict[str, ChildConfig]:
        """Its children by their names, none if its settings are not known."""
        return {child.name: child for child in self.config.children} if self.config else {}


def registered() -> list[LogStore]:
    """Ask ZenML for the log stores.

    Raises:
        Exception: ZenML cannot be asked, for whatever reason.
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
        # Another version of this package, or of a backend's, has written them. The error's words are no help here.
        return LogStore(id, name, why="its settings cannot be read by the version that is installed here")


def folders(stores: list[LogStore], why_unknown: str) -> dict[Path, LogStore]:
    """Return the folders of log stores on this machine, whether there is anything in them or not.

    Args:
        stores: The log stores that ZenML knows.
        why_unknown: Why others have no name.
    """
    default = spool_root(None)
    found = {
        spool_folder(store.id, store.config) if store.config else default / str(store.id): store for store in stores
    }
    by_id = {store.id: store for store in stores}
    # What log stores have left that are gone, or were updated since.
    for root in sorted({default, *(folder.parent for folder in found)}):
        try:
            others = sorted(root.iterdir())
        except OSError:
            continue
        for folder in others:
            id = _uuid(folder.name)
            if id and folder not in found:
                found[folder] = by_id.get(id) or LogStore(id, why=why_unknown)
    return found


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


class Part:
    """What waits for one child in the folder of one process.

    Attributes:
        child: The child's name when the process began.
        why: Why it waits.
        events: How many events are meant for it, and not settled.
        streams: The streams that they are of.
        oldest: When the oldest was logged, in nanoseconds since the epoch.
    """

    def __init__(self, child: str, config: ChildConfig | None, why: str, settled_before: int) -> None:
        """Begin to count.

        Args:
            child: The child's name.
            config: Its settings, None if there are none any more: then every event may be meant for it.
            why: Why it waits.
            settled_before: Below which number everything is settled.
        """
        self.child = child
        self.why = why
        self.events = 0
        self.streams: set[UUID] = set()
        self.oldest: float = inf
        self._settled_before = settled_before
        self._config = config
        # A progress bar → the second of its last update: one of each second counts.
        self._seconds: dict[tuple[UUID, str], int] = {}

    def count(self, event: LogEvent) -> None:
        """Count an event, if it is meant for the child and not settled."""
        if event.number < self._settled_before:
            return
        if self._config and not self._config.wants(event.level, event.progress):
            return
        if event.progress and self._config and self._config.is_thinned:
            key, second = (event.stream.id, event.logger_name), event.time_unix_nano // 1_000_000_000
            if self._seconds.get(key) == second:
                return
            self._seconds[key] = second
        self.events += 1
        self.streams.add(event.stream.id)
        self.oldest = min(self.oldest, event.time_unix_nano)


@dataclass
class Left:
    """The folder of one process, dead or alive; or that of a log store, if it cannot even be read.

    Attributes:
        store: The log store.
        home: The log store's folder.
        process: The name of the process's folder in it, empty if that is not known.
        barred: Why nobody else may touch it, empty if one may.
        unattended: Why no process of the log store will deliver it, empty if one will.
        parts: What waits for each child.
        bytes: How many bytes its events take on disk.
        damaged: How many pieces of it cannot be read.
        is_readable: Whether the folder can be read.
    """

    store: LogStore
    home: Path
    process: str = ""
    barred: str = ""
    unattended: str = ""
    parts: list[Part] = field(default_factory=list)
    bytes: int = 0
    damaged: int = 0
    is_readable: bool = True

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.home / self.process

    @property
    def holds_events(self) -> bool:
        """Whether events wait there, or may wait there."""
        return not self.is_readable or any(part.events for part in self.parts)


def left_in(home: Path, store: LogStore) -> Iterator[Left]:
    """Yield what is left in the folder of a log store, those first that were made first."""
    try:
        found = process_folders(home)
    except OSError as error:
        yield Left(store, home, barred=_in_words(error), is_readable=False)
        return
    for folder in found:
        left = Left(store, home, folder.name, unattended=_unattended(store, home))
        try:
            _look(left)
        except Exception as error:  # whatever is in there, the others are not to suffer from it
            if not os.path.lexists(folder):
                # It is settled, and gone since.
                continue
            left.barred = _in_words(error)
            left.is_readable = False
        yield left


def processes_in(home: Path) -> list[Path]:
    """Return the folders of a log store's processes; none if that cannot be known, as `left_in` then says."""
    try:
        return process_folders(home)
    except OSError:
        return []


def children_of(spool: Spool, store: LogStore) -> list[str]:
    """Return the names of the children that a process had, or of those that get its part if that is lost."""
    return spool.children or sorted(child.name for child in store.children.values() if child.enabled)


def _look(left: Left) -> None:
    is_in_use = is_alive(left.folder)
    spool = Spool.look(left.folder)
    if is_in_use:
        left.barred = "in use by a running process"
    configs = left.store.children
    for name in children_of(spool, left.store):
        left.parts.append(Part(name, configs.get(name), _why(left.store, name), spool.acknowledged(name)))
    for item in spool.reader.scan():
        if not isinstance(item, Damage):
            for part in left.parts:
                part.count(item)
    left.bytes = spool.segments.size
    # What a running process is just writing looks damaged.
    left.damaged = 0 if is_in_use else sum(damage.lines for damage in spool.reader.damage)


def _unattended(store: LogStore, folder: Path) -> str:
    if store.config is None:
        return store.why
    if folder != spool_folder(store.id, store.config):
        return "'spool_directory' is another one now"
    if store.config.durability == "memory":
        return "'durability' is 'memory' now"
    return ""


def _why(store: LogStore, child: str) -> str:
    config = store.children.get(child)
    if config is None:
        return "the child is no longer configured" if store.config else store.why
    if not config.enabled:
        return "the child is disabled"
    if isinstance(config, UnknownChild):
        return "the child's backend is not installed here"
    return _NOT_DELIVERED


def _in_words(error: Exception) -> str:
    # Of what is no error of the system's, its words may hold what was logged.
    why = (error.strerror or str(error)) if isinstance(error, OSError) else type(error).__name__
    fix = f"; {error.fix}" if isinstance(error, UntrustedError) and error.fix else ""
    return f"cannot be read: {why}{fix}"
