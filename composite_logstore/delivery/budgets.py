"""The budgets of a log store's children, as the workers of this process apply them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore.child_config import ChildConfig
from composite_logstore.clock import Clock
from composite_logstore.processing.budget import Account, Budget, OwnAccount, Told
from composite_logstore.service import tell
from composite_logstore.spool.charges import SharedAccount

logger = get_logger(__name__)

# The id of a log store and the name of a child → what this process has charged. A writer that follows another one, such
# as after an update of the settings, continues with its numbers.
_accounts: dict[tuple[UUID, str], OwnAccount] = {}


class Budgets:
    """Makes the last step of the processors of those children that have a budget."""

    def __init__(
        self, log_store_id: UUID, children: Sequence[ChildConfig], component: Path | None, clock: Clock
    ) -> None:
        """Charge nothing yet.

        Args:
            log_store_id: The log store's id.
            children: The enabled children.
            component: The folder of the log store, in which processes share what they charge; None if they cannot.
            clock: The source of time.
        """
        self._log_store_id = log_store_id
        self._component = component
        self._clock = clock
        self._told = {child.name: Told() for child in children}
        self._complete = [child.name for child in children if child.wants_all]

    def of(self, child: ChildConfig) -> Budget | None:
        """Return the budget of a child for one of its workers, None if it has none."""
        if child.budget is None:
            return None
        warn = partial(_warn, child.name)
        account: Account = (own := _accounts.setdefault((self._log_store_id, child.name), OwnAccount()))
        if self._component is not None:
            account = SharedAccount(self._component, child.name, own, warn)
        elsewhere = [name for name in self._complete if name != child.name]
        told = self._told.setdefault(child.name, Told())
        return Budget(child.budget, account, told, self._clock, warn, elsewhere)


def _warn(child: str, text: str) -> None:
    tell(logger.warning, f"child '{child}': {text}")


def _after_fork_in_child() -> None:
    """Continue with copies: another thread of the parent may hold a lock."""
    with suppress(Exception):
        _accounts.update({key: account.copy() for key, account in _accounts.items()})


# Before `delivery.writers` registers its own, so it runs before that one.
os.register_at_fork(after_in_child=_after_fork_in_child)
