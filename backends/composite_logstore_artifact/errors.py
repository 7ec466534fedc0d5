"""Translates the errors of artifact stores into those of the write port and of the read port."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from composite_logstore import (
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.zenml import LogStoreError, LogStoreUnavailableError
from composite_logstore_artifact.artifact_stores import (
    ArtifactStoreNotFoundError,
    ArtifactStoreNotUsableError,
)

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore


_FULL = {errno.ENOSPC, errno.EDQUOT}
# The artifact store throttles (s3fs raises EBUSY), or there is no connection.
_NOT_FOR_SIZE = {errno.EBUSY, errno.ECONNREFUSED}
# No retry helps. s3fs raises EINVAL for a malformed request, for a bucket in another region, and so on.
_MISTAKES = {
    errno.EINVAL,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSYS,
    errno.ENOTDIR,
    errno.EROFS,
    getattr(errno, "EREMCHG", errno.EINVAL),
}


def export_error(error: Exception, artifact_store: BaseArtifactStore | None) -> Exception | None:
    """Return the error of the write port for an error; None if it has none.

    The message does not repeat the error's own text, which may contain a secret.

    Args:
        error: The error.
        artifact_store: The artifact store; None if it could not be looked up.
    """
    if isinstance(error, RejectedError):
        return None
    if isinstance(error, ArtifactStoreNotFoundError):
        return UnavailableError(f"{error}, or set 'artifact_store' of this child")
    if isinstance(error, ArtifactStoreNotUsableError):
        return UnavailableError(str(error))
    kind = type(error).__name__
    if artifact_store is None:
        # The lookup asks ZenML's server, or its database.
        return RetryableError(f"the artifact store could not be looked up in ZenML: {kind}")
    name = f"artifact store '{artifact_store.name}'"
    if is_refusal(error):
        return UnavailableError(f"{name} refuses access; check its credentials, and that they may write to its path")
    if isinstance(error, FileNotFoundError) or getattr(error, "status_code", None) == 404:
        return UnavailableError(f"the bucket or folder of {name} does not exist; create it, or correct its path")
    if _is_too_large(error):
        return TooLargeError(f"{name} takes no object of that size")
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else kind
        if error.errno in _FULL:
            return RetryableError(f"{name} is full; free some space")
        if error.errno in _MISTAKES:
            return UnavailableError(f"{name} cannot be written to: {reason}; check its path and settings")
        return RetryableError(f"{name} did not take it: {reason}", smaller_may_pass=error.errno not in _NOT_FOR_SIZE)
    if type(error).__module__ == "builtins":
        return None
    # Client libraries raise their own errors when a connection fails, times out or breaks. They mix these up.
    return RetryableError(f"{name} did not take it: {kind}", smaller_may_pass=True)


def _is_too_large(error: Exception) -> bool:
    """Return whether an error says that the object is too large, whichever client library raised it."""
    # s3fs does not know a proxy's status, but the error of botocore that it raises from has it.
    response = getattr(error.__cause__, "response", None)
    metadata = response.get("ResponseMetadata") if isinstance(response, dict) else None
    statuses = [getattr(error, "status_code", None), getattr(error, "code", None)]
    if isinstance(metadata, dict):
        statuses.append(metadata.get("HTTPStatusCode"))
    return 413 in statuses or (isinstance(error, OSError) and error.errno == errno.EMSGSIZE)


def read_error(error: Exception, artifact_store: BaseArtifactStore) -> LogStoreError | None:
    """Return the error of the read port for an error; None if the artifact store did not cause it.

    The message does not repeat the error's own text, which may contain a secret.
    """
    name = f"artifact store '{artifact_store.name}'"
    kind = type(error)
    if is_refusal(error):
        return LogStoreUnavailableError(
            f"The {name} refuses access. Check its credentials, and that they may list and read its path."
        )
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else kind.__name__
    elif kind.__module__ == "builtins" or kind.__module__.startswith("zenml."):
        return None
    else:
        # Client libraries raise their own errors when a connection fails or times out.
        reason = kind.__name__
    return LogStoreUnavailableError(f"The {name} could not be read: {reason}. Try again later.")


def is_refusal(error: Exception) -> bool:
    """Return whether an error says that access was refused, whichever client library raised it."""
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    return isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__
