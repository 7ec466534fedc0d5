"""The values of secrets that this process has resolved or was given, in the forms in which a log may show them.

No server is asked for a secret. All code that resolves one in this process, of ZenML, of a child or of a step, reads it
through one property of ZenML's, and that is watched.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import clock, zenml
from composite_logstore.backend import RetryableError
from composite_logstore.event import Stream
from composite_logstore.inert import described
from composite_logstore.plain import text_of
from composite_logstore.secret_forms import LONGEST, SHORTEST, forms
from composite_logstore.service import tell

logger = get_logger(__name__)

VARIABLE = "COMPOSITE_LOGSTORE_SECRET_VARIABLES"
"""The environment variable that names those which may hold a secret: the processes that a step starts inherit both."""

MOST = 5_000
"""The most forms of all secrets together."""

ASK_AGAIN_SECONDS = 30.0
"""How long ZenML is not asked again after it could not be reached: each question may keep a worker for a minute."""

_MOST_CHARACTERS = 2 * 1024 * 1024
_MOST_STREAMS = 10_000
_MOST_NAMES_CHARACTERS = 8_000
_ENDINGS = ("_KEY", "_PASSWORD", "_SECRET", "_TOKEN")


class KnownSecrets:
    """The secrets of a process. They are kept in memory alone, and appear in no `repr`.

    Attributes:
        ignored: The names of the secrets that are too short, too long, or too many, to be looked for as a whole.
    """

    def __init__(self) -> None:
        self.ignored: dict[str, None] = {}
        # In the order in which they became known. One C call adds to it or copies it, so it needs no lock.
        self._forms: dict[str, None] = {}
        self._values: set[str] = set()
        self._characters = 0
        self._own_streams: set[UUID] = set()

    def own(self, stream: UUID) -> None:
        """Remember that this process writes a stream, and so resolves the secrets of its run itself."""
        if len(self._own_streams) >= _MOST_STREAMS:
            self._own_streams.clear()
        self._own_streams.add(stream)

    def learn(self, stream: Stream) -> None:
        """Ask ZenML for the secrets of the run that wrote a stream, unless this process writes it.

        Others deliver the events of a dead process, and copy those of any: they may not know its secrets.

        Raises:
            RetryableError: ZenML cannot be reached. The message says of which run the secrets are.
        """
        if stream.id in self._own_streams:
            return
        attributes = stream.attributes
        for kind in ("step", "pipeline"):
            id = attributes.get(f"zenml.{kind}.run.id", attributes.get(f"{kind}.run.id"))
            if isinstance(id, str):
                _resolve_secrets(kind, id)
                # ZenML may describe a stream only after its first records.
                self.own(stream.id)
                break

    def note(self, name: str, value: object) -> None:
        """Remember a secret. Never raises, and costs little for a secret that is known.

        Args:
            name: What the secret is called in a warning.
            value: Its value.
        """
        if not isinstance(value, str) or value in self._values:
            return
        # As an event shows it: what is no Unicode, such as other bytes in a variable, is replaced there.
        text = text_of(value).strip()
        if len(text) < SHORTEST or self._is_full():
            if text:
                self._ignore(name)
            return
        self._values.add(value)
        if len(text) > LONGEST and max(map(len, text.splitlines())) > LONGEST:
            self._ignore(name)
        for form in forms(text):
            # One value may have any number of lines.
            if self._is_full():
                self._ignore(name)
                break
            self._forms.setdefault(form)
            self._characters += len(form)

    def _ignore(self, name: str) -> None:
        if len(self.ignored) < MOST:
            self.ignored.setdefault(name)

    def _is_full(self) -> bool:
        return len(self._forms) >= MOST or self._characters > _MOST_CHARACTERS

    @property
    def version(self) -> int:
        """The number of forms: it grows whenever a new one becomes known."""
        return len(self._forms)

    @property
    def forms(self) -> list[str]:
        """All forms of all secrets."""
        return list(self._forms)


known_secrets = KnownSecrets()
"""The secrets of this process."""


class _Unreached(NamedTuple):
    """ZenML could not be reached.

    Attributes:
        until: When to ask it again, in seconds of the clock that never goes back.
        why: Why it could not be reached, in words.
    """

    until: float
    why: str


# All children, and all runs whose events wait, ask the same server.
_unreached: _Unreached | None = None


@lru_cache(maxsize=1_000)
def _resolve_secrets(kind: str, id: str) -> None:
    """Have ZenML resolve the secrets that the configuration of a step or a run gives to its code.

    Raises:
        RetryableError: ZenML cannot be reached. The events can wait; a secret that is out cannot be called back.
    """
    global _unreached
    from zenml.client import Client

    text = f"ZenML cannot be asked which secrets the {kind} run {id} had: "
    if _unreached is not None and clock.current.now() < _unreached.until:
        raise RetryableError(f"{text}{_unreached.why}")
    watch()
    try:
        client = Client()
        run = client.get_run_step(UUID(id)) if kind == "step" else client.get_pipeline_run(UUID(id))
        for name in getattr(run.config, "secrets", ()):
            # One that was deleted, or may not be read, hides no other.
            with suppress(KeyError):
                client.get_secret(name).secret_values  # noqa: B018
    except Exception as error:
        if _is_unreached(error):
            _unreached = _Unreached(clock.current.now() + ASK_AGAIN_SECONDS, described(error))
            raise RetryableError(f"{text}{_unreached.why}") from error
        # The log store delivers all the same: a run that was deleted must not block the events behind it.
        warning = "events of another process are redacted without the secrets of its %s run %s: %s"
        tell(logger.warning, warning, kind, id, described(error))


def _is_unreached(error: BaseException | None) -> bool:
    """Return whether an error of ZenML's client comes from the network: the client may have put it into words."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


@cache
def watch() -> None:
    """Note the secrets in the environment, and from now on each one that is resolved in this process."""
    names = [name for name in os.environ if name.startswith("ZENML_") and name.endswith(_ENDINGS)]
    for name in (*names, *os.environ.get(VARIABLE, "").split(",")):
        known_secrets.note(f"the environment variable {name}", os.environ.get(name))
    zenml.wrap_secret_values(_noted)


def _noted(secret_values: zenml.SecretValues) -> zenml.SecretValues:
    @wraps(secret_values)
    def noting(secret: Any) -> dict[str, str]:
        values = secret_values(secret)
        # ZenML and steps read their secrets here: nothing may disturb them.
        with suppress(Exception):
            for key, value in values.items():
                known_secrets.note(f"key '{key}' of secret '{secret.name}'", value)
            _name_variables(values)
        return values

    return noting


def _name_variables(keys: dict[str, str]) -> None:
    """Name, for processes that a step starts, the variables in which ZenML gives the values of secrets to the step."""
    names = os.environ.get(VARIABLE, "").split(",")
    new = [key for key in keys if key.isidentifier() and key not in names]
    text = ",".join(filter(None, (*names, *new)))
    if new and len(text) <= _MOST_NAMES_CHARACTERS:
        os.environ[VARIABLE] = text
