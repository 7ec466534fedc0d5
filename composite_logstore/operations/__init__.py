"""Operations on log stores, for programs and notebooks: the commands of `composite-logstore` call the same functions.

They print nothing, and ask questions only through a callback. An operation raises an `OperationError` if it cannot do
its work, and tells its `progress` callback how far it is. See docs/operations.md.
"""

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, OperationError
from composite_logstore.operations.backfill import backfill
from composite_logstore.operations.check import StoreCheck, check
from composite_logstore.operations.copying import Totals
from composite_logstore.operations.drain import Drained, drain
from composite_logstore.operations.inventory import Inventory, backlogs, inventory, purge
from composite_logstore.operations.migrate import migrate, undo
from composite_logstore.operations.move import Move, MoveStoppedError, MoveWaitingError, find_move
from composite_logstore.operations.progress import Progress
from composite_logstore.operations.promote import Promotion, PromotionRefusedError, promote
from composite_logstore.operations.selection import Selection
from composite_logstore.operations.tail import Tail, tail
from composite_logstore.operations.verify import verify
from composite_logstore.parity.result import BackfillStoppedError
from composite_logstore.parity.summary import ParitySummary

__all__ = [
    "ArgumentError",
    "BackfillStoppedError",
    "Drained",
    "Inventory",
    "Move",
    "MoveStoppedError",
    "MoveWaitingError",
    "NoAnswerError",
    "OperationError",
    "ParitySummary",
    "Progress",
    "Promotion",
    "PromotionRefusedError",
    "Selection",
    "StoreCheck",
    "Tail",
    "Totals",
    "backfill",
    "backlogs",
    "check",
    "drain",
    "find_move",
    "inventory",
    "migrate",
    "promote",
    "purge",
    "tail",
    "undo",
    "verify",
]
