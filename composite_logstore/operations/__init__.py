"""Operations on log stores, for programs and notebooks: the commands of `composite-logstore` call the same functions.

They print nothing, and ask questions only through a callback. An operation raises an `OperationError` if it cannot do
its work, and tells its `progress` callback how far it is. See docs/operations.md.

The names are imported when they are first used: the help of a command needs neither ZenML nor an operation.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, OperationError
    from composite_logstore.operations.backfill import backfill
    from composite_logstore.operations.check import StoreCheck, check
    from composite_logstore.operations.child_settings import (
        ChangeRefusedError,
        ChildChange,
        ConfirmChange,
        ListedChild,
        add_child,
        list_children,
        remove_child,
        set_child,
    )
    from composite_logstore.operations.collector_config import CollectorConfig, collector_config
    from composite_logstore.operations.copying import Totals
    from composite_logstore.operations.drain import Drained, drain
    from composite_logstore.operations.explain import Effect, Explanation, explain
    from composite_logstore.operations.inventory import Inventory, backlogs, inventory, purge
    from composite_logstore.operations.migrate import migrate, undo
    from composite_logstore.operations.move import Move, MoveStoppedError, MoveWaitingError, find_move
    from composite_logstore.operations.progress import Progress
    from composite_logstore.operations.promote import Promotion, PromotionRefusedError, promote
    from composite_logstore.operations.rejected import (
        RejectedEvents,
        list_rejected,
        purge_rejected,
        retry_rejected,
        show_rejected,
        why_not_kept,
    )
    from composite_logstore.operations.resending import Retried
    from composite_logstore.operations.schema import schema
    from composite_logstore.operations.selection import Selection
    from composite_logstore.operations.status import ChildStatus, ProcessStatus, StoreStatus, Watch, status
    from composite_logstore.operations.tail import Tail, Whereabouts, tail
    from composite_logstore.operations.validate import Validation, validate
    from composite_logstore.operations.verify import verify
    from composite_logstore.parity.result import BackfillStoppedError
    from composite_logstore.parity.summary import ParitySummary
    from composite_logstore.reading.ranks import rank_of

_HOMES = {
    "ArgumentError": "catalog.errors",
    "BackfillStoppedError": "parity.result",
    "ChangeRefusedError": "operations.child_settings",
    "ChildChange": "operations.child_settings",
    "ChildStatus": "operations.status",
    "CollectorConfig": "operations.collector_config",
    "ConfirmChange": "operations.child_settings",
    "Drained": "operations.drain",
    "Effect": "operations.explain",
    "Explanation": "operations.explain",
    "Inventory": "operations.inventory",
    "ListedChild": "operations.child_settings",
    "Move": "operations.move",
    "MoveStoppedError": "operations.move",
    "MoveWaitingError": "operations.move",
    "NoAnswerError": "catalog.errors",
    "OperationError": "catalog.errors",
    "ParitySummary": "parity.summary",
    "ProcessStatus": "operations.status",
    "Progress": "operations.progress",
    "Promotion": "operations.promote",
    "PromotionRefusedError": "operations.promote",
    "RejectedEvents": "operations.rejected",
    "Retried": "operations.resending",
    "Selection": "operations.selection",
    "StoreCheck": "operations.check",
    "StoreStatus": "operations.status",
    "Tail": "operations.tail",
    "Totals": "operations.copying",
    "Validation": "operations.validate",
    "Watch": "operations.status",
    "Whereabouts": "operations.tail",
    "add_child": "operations.child_settings",
    "backfill": "operations.backfill",
    "backlogs": "operations.inventory",
    "check": "operations.check",
    "collector_config": "operations.collector_config",
    "drain": "operations.drain",
    "explain": "operations.explain",
    "find_move": "operations.move",
    "inventory": "operations.inventory",
    "list_children": "operations.child_settings",
    "list_rejected": "operations.rejected",
    "migrate": "operations.migrate",
    "promote": "operations.promote",
    "purge": "operations.inventory",
    "purge_rejected": "operations.rejected",
    "rank_of": "reading.ranks",
    "remove_child": "operations.child_settings",
    "retry_rejected": "operations.rejected",
    "schema": "operations.schema",
    "set_child": "operations.child_settings",
    "show_rejected": "operations.rejected",
    "status": "operations.status",
    "tail": "operations.tail",
    "undo": "operations.migrate",
    "validate": "operations.validate",
    "verify": "operations.verify",
    "why_not_kept": "operations.rejected",
}

__all__ = [
    "ArgumentError",
    "BackfillStoppedError",
    "ChangeRefusedError",
    "ChildChange",
    "ChildStatus",
    "CollectorConfig",
    "ConfirmChange",
    "Drained",
    "Effect",
    "Explanation",
    "Inventory",
    "ListedChild",
    "Move",
    "MoveStoppedError",
    "MoveWaitingError",
    "NoAnswerError",
    "OperationError",
    "ParitySummary",
    "ProcessStatus",
    "Progress",
    "Promotion",
    "PromotionRefusedError",
    "RejectedEvents",
    "Retried",
    "Selection",
    "StoreCheck",
    "StoreStatus",
    "Tail",
    "Totals",
    "Validation",
    "Watch",
    "Whereabouts",
    "add_child",
    "backfill",
    "backlogs",
    "check",
    "collector_config",
    "drain",
    "explain",
    "find_move",
    "inventory",
    "list_children",
    "list_rejected",
    "migrate",
    "promote",
    "purge",
    "purge_rejected",
    "rank_of",
    "remove_child",
    "retry_rejected",
    "schema",
    "set_child",
    "show_rejected",
    "status",
    "tail",
    "undo",
    "validate",
    "verify",
    "why_not_kept",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"composite_logstore.{_HOMES[name]}"), name)
    return value


class _Operations(ModuleType):
    """Python sets an imported submodule as an attribute of its package. Here its function of the same name wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Operations
