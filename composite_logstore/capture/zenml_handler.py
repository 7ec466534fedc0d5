"""Watches ZenML's handler on the root logger: without it the records of loggers reach no log store."""

from __future__ import annotations

import logging

from zenml.logger import ZenMLLoggingHandler

from composite_logstore.service import tell

_WARNING = (
    "ZenML's handler is gone from the root logger, so records of loggers do not reach the log store any more; printed "
    "text does. Hydra and `logging.config.dictConfig` remove it. Add it again once they have run: "
    "`logging.getLogger().addHandler(zenml.logger.ZenMLLoggingHandler())`."
)

has_warned = False
"""Whether this process has warned: once is enough."""


def warn_if_gone(logger: logging.Logger) -> logging.LogRecord | None:
    """Warn if ZenML's handler is gone from the root logger, unless this process has warned.

    Args:
        logger: The logger to warn through. It may be disabled, since `dictConfig` does that, too.

    Returns:
        The warning, for a stream that misses records; None if there is no warning.
    """
    global has_warned
    if has_warned or any(isinstance(handler, ZenMLLoggingHandler) for handler in logging.root.handlers):
        return None
    has_warned = True
    tell(logger.warning, _WARNING)
    return logging.LogRecord("composite_logstore", logging.WARNING, "", 0, _WARNING, None, None)
