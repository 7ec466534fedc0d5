"""The `read` section of a child: where the events are read that the child has sent elsewhere.

One collector feeds many backends, so a child that sends OTLP says in a section of its own which of them to read.
A reader is a package with a `ReaderConfig`, registered in the entry-point group `composite_logstore.readers`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from zenml.utils.secret_utils import PlainSerializedSecretStr

from composite_logstore.backend import UnavailableError, revealed
from composite_logstore.mistakes import Section, mistakes_in, unknown_type

if TYPE_CHECKING:
    from composite_logstore.backend import Reader
    from composite_logstore.event import LogEvent

READERS = "composite_logstore.readers"
"""The entry-point group of readers. A name is a section's `type`, its value the reader's `ReaderConfig`."""


class ReaderConfig(Section):
    """The settings of a reader. A reader adds its own in a subclass, which imports nothing heavy.

    Attributes:
        type: The reader's entry-point name.
    """

    delay_seconds: ClassVar[float] = 10.0
    """How long it usually takes until an event that was sent can be read, in seconds."""
    known_losses: ClassVar[str | None] = None
    """Which events the backend refuses or drops although they were sent, as a sentence without a full stop."""

    absence: ClassVar[str] = (
        "check that the collector passes logs on to this backend, and that 'read' names the place that they go to"
    )
    """What people can do if an event that the collector has accepted cannot be read."""

    type: str

    def create_reader(self, service_name: str | None) -> Reader:
        """Create the reader, with secrets resolved. It runs on ZenML's server, where extras are not installed.

        Args:
            service_name: The resource's `service.name` that the child sends; None if it does not set one.

        Raises:
            UnavailableError: Something is missing. The message says how to fix it.
        """
        raise NotImplementedError

    def added_attributes(self, event: LogEvent) -> Mapping[str, str | int]:
        """Return the attributes that the child adds to an event, so that the reader finds what the backend changes.

        A backend may leave out a field, or write a word of its own where a field is empty.
        """
        return {}

    def check_registration(self) -> None:
        """Check what matters only when a log store is registered or updated.

        Raises:
            ValueError: Something is wrong. The message says how to fix it.
        """


class UnknownReader(ReaderConfig):
    """A reader that is not installed here. It keeps its settings; the child cannot be read."""

    model_config = ConfigDict(extra="allow")

    def create_reader(self, service_name: str | None) -> NoReturn:
        """Raise `UnavailableError`."""
        raise UnavailableError(unknown_type("read.type", "reader", self.type, readers()))

    def check_registration(self) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(unknown_type("read.type", "reader", self.type, readers()))


class HttpCredentialsConfig(ReaderConfig):
    """How a reader that asks over HTTP authenticates: as a user, or with an API key.

    Attributes:
        username: The user to read as.
        password: That user's password.
        api_key: A key or token to read with, instead of a user.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: those of the system.
    """

    key_scheme: ClassVar[str] = "Bearer"
    """What precedes the API key in the header `Authorization`."""

    username: str | None = Field(default=None, min_length=1)
    password: PlainSerializedSecretStr | None = None
    api_key: PlainSerializedSecretStr | None = None
    certificate_file: str | None = Field(default=None, min_length=1)

    @property
    def authorization(self) -> dict[str, str]:
        """The header that authenticates a request, with secrets resolved; empty if the backend needs none."""
        if self.api_key is not None:
            return {"Authorization": f"{self.key_scheme} {self.api_key.get_secret_value()}"}
        if self.username is None:
            return {}
        password = self.password.get_secret_value() if self.password is not None else ""
        encoded = base64.b64encode(f"{self.username}:{password}".encode()).decode()
        return {"Authorization": f"Basic {encoded}"}

    @field_validator("api_key", "password")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # HTTP libraries repeat a header that they refuse in their errors, so an invalid key must not reach them.
        if value is not None:
            text = value.get_secret_value()
            if not text.strip():
                raise ValueError("is empty; set it to the value itself, or to a reference '{{secret_name.key}}'")
            if not text.isprintable():
                raise ValueError("has a line break or a control character; copy it again")
        return value

    @field_validator("username")
    @classmethod
    def _username_fits_a_header(cls, value: str | None) -> str | None:
        # https://www.rfc-editor.org/rfc/rfc7617#section-2
        if value is not None and (":" in value or not value.isprintable()):
            raise ValueError("holds a colon or a control character, which no user may have; correct it")
        return value

    @field_validator("api_key")
    @classmethod
    def _is_ascii(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not revealed(value).isascii():
            raise ValueError("has a character that no key has; copy it again")
        return value

    @model_validator(mode="after")
    def _authenticates_once(self) -> HttpCredentialsConfig:
        if self.api_key is not None and (self.username is not None or self.password is not None):
            raise ValueError("'api_key' and 'username' exclude each other; leave one of them out")
        if self.password is not None and self.username is None:
            raise ValueError("'password' is of no use alone; set 'username' too")
        return self


class HttpReaderConfig(HttpCredentialsConfig):
    """The settings of a reader that asks a backend over HTTP. Requests have basic authentication, or an API key.

    Attributes:
        url: The backend's URL.
    """

    url: str

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        return checked_url(value)


def checked_url(value: str, instead: str = "set 'username' and 'password' instead") -> str:
    """Return a base URL without a slash at its end.

    Args:
        value: The URL.
        instead: What to do if it holds a user or a password.

    Raises:
        ValueError: It is none, or holds a user, a password, a query or a fragment.
    """
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and value.isprintable()
    except ValueError:
        usable = False
    if not usable or " " in value:
        raise ValueError("must be a URL; begin it with 'https://' and the host")
    if url.username is not None or url.password is not None:
        raise ValueError(f"holds a user or a password; {instead}")
    if url.query or url.fragment:
        raise ValueError("has a '?' or a '#'; leave out what follows")
    return value.rstrip("/")


@lru_cache(maxsize=1)
def readers() -> dict[str, EntryPoint]:
    """Return the installed readers: a section's `type` → the entry point of its `ReaderConfig`."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=READERS)}


def reader_class(settings: Mapping[str, Any]) -> type[ReaderConfig]:
    """Return the class of the settings of a `read` section."""
    entry_point = readers().get(str(settings.get("type")))
    try:
        found: type[ReaderConfig] = entry_point.load() if entry_point else UnknownReader
    except ImportError:
        return UnknownReader
    return found


def _parse(raw: Any) -> Any:
    if isinstance(raw, ReaderConfig):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError('must be an object with a \'type\', such as {"type": "clickhouse", "url": "https://…"}')
    if not isinstance(raw.get("type"), str):
        raise ValueError(f"'read.type' is required; set it to one of: {', '.join(sorted(readers()))}")
    found = reader_class(raw)
    try:
        return found(**raw)
    except ValidationError as error:
        mistakes = (mistake.replace("'", "'read.", 1) for mistake in mistakes_in(found, error))
        raise ValueError("; ".join(mistakes)) from None
    except TypeError:
        raise ValueError("must be an object whose keys are texts") from None


ReadSection: TypeAlias = Annotated[SerializeAsAny[ReaderConfig], BeforeValidator(_parse)]
"""The type of a child's setting `read`: the settings of any installed reader."""
