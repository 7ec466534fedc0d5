"""Rules on ZenML's server, where one user reads a page through settings that another user has written.

Only this module imports ZenML's server, which need not be installed in a pipeline.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import UUID

from zenml.constants import ENV_ZENML_SERVER

if TYPE_CHECKING:
    from zenml.models import SecretResponse


def is_server() -> bool:
    """Return whether this process is ZenML's server."""
    return ENV_ZENML_SERVER in os.environ


def reader() -> UUID | None:
    """Return the id of the user who sent the current request; None outside of a request, or of a server."""
    if not is_server():
        return None
    # Not from ZenML's client, which remembers one user for the whole process.
    from zenml.zen_server.utils import get_auth_context

    try:
        context = get_auth_context()
    except RuntimeError:
        # Outside of a request no user is logged in.
        return None
    return context.user.id if context else None


def find_secret(name: str, owner: UUID | None) -> SecretResponse:
    """Return a secret that settings refer to, if their owner may use it: the owner decides where its values go.

    Args:
        name: The secret's name.
        owner: The user who owns the settings; None if they have no owner.

    Raises:
        KeyError: There is no such secret; it is private and not the owner's; ZenML does not show it to the reader; or
            the owner is not allowed to read its values.
    """
    from zenml.client import Client

    client = Client()
    try:
        secret = client.get_secret_by_name_and_private_status(name=name, private=False)
    except KeyError:
        # ZenML shows a private secret only to its user, so the reader has to be the owner.
        if owner is None or reader() != owner:
            raise
        secret = client.get_secret_by_name_and_private_status(name=name, private=True)
    if not _may_read_values(owner, secret):
        raise KeyError(name)
    return secret


def _may_read_values(user_id: UUID | None, secret: SecretResponse) -> bool:
    """Return whether ZenML lets a user read the values of a secret, by its own rules."""
    from zenml.zen_server.rbac.models import Action
    from zenml.zen_server.rbac.utils import get_resource_for_model
    from zenml.zen_server.utils import rbac, server_config, zen_store

    if not server_config().rbac_enabled or secret.user_id in (None, user_id):
        return True
    resource = get_resource_for_model(secret)
    if user_id is None or resource is None:
        return False
    user = zen_store().get_user(user_id)
    return (
        rbac().check_permissions(user=user, resources={resource}, action=Action.READ_SECRET_VALUE).get(resource, False)
    )
