"""The settings of an `otel` child."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, JsonValue
from zenml.utils.secret_utils import SecretField

from composite_logstore import ChildConfig, UnavailableError

if TYPE_CHECKING:
    from composite_logstore import Exporter

Text = Annotated[str, Field(min_length=1)]


class OtelChildConfig(ChildConfig):
    """Sends events through any `LogRecordExporter` of OpenTelemetry's SDK.

    Attributes:
        exporter: The exporter: its name in the entry-point group `opentelemetry_logs_exporter`, such as
            `console`, or the path of its class, such as `package.module.Class`.
        arguments: The keyword arguments of the exporter.
        service_name: The resource's `service.name`. Default: OpenTelemetry's variables, then `zenml`.
        service_version: The resource's `service.version`. Default: OpenTelemetry's variables, then ZenML's
            version.
    """

    # The SDK's own processor exports so many at once, and exporters are made for that.
    default_batch_size: ClassVar[int] = 512

    exporter: Text
    # Any argument may be a key, so each may refer to a secret.
    arguments: dict[str, JsonValue] = SecretField(default_factory=dict, repr=False)
    service_name: Text | None = None
    service_version: Text | None = None

    @property
    def requirements(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the exporter
        """The package that contains the exporter, if it is installed here."""
        from composite_logstore_otel.exporters import distribution_of

        name = distribution_of(self.exporter)
        return frozenset({"composite-logstore", name} if name else {"composite-logstore"})

    def create_exporter(self) -> Exporter:
        """Create the exporter, and the SDK's exporter for it.

        Raises:
            UnavailableError: The exporter is not installed here, or cannot be created with these arguments.
        """
        from composite_logstore_otel.exporters import create

        try:
            return create(self)
        except (LookupError, ValueError) as error:
            raise UnavailableError(error.args[0]) from error.__cause__

    def check_registration(self) -> None:
        """Check that the exporter is installed here and takes these arguments.

        Raises:
            ValueError: One of these is not true.
        """
        from composite_logstore_otel.exporters import check_arguments, find

        try:
            check_arguments(find(self.exporter), self.arguments)
        except LookupError as error:
            raise ValueError(error.args[0]) from error.__cause__

    def check(self) -> None:
        """Check the same, on the machine that starts a run.

        Raises:
            ValueError: The exporter is not installed, or does not take these arguments.
        """
        self.check_registration()
