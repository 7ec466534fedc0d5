"""Finds exporters of OpenTelemetry's SDK, and creates them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Any

from zenml import __version__ as zenml_version

from composite_logstore import OtelExporter, distributions_of, environment_attributes

if TYPE_CHECKING:
    from opentelemetry.sdk._logs.export import LogRecordExporter

    from composite_logstore_otel.config import OtelChildConfig

EXPORTERS = "opentelemetry_logs_exporter"
"""The entry-point group in which OpenTelemetry's packages name their exporters of logs."""


def create(config: OtelChildConfig) -> OtelExporter:
    """Create the exporter that the settings name.

    Raises:
        LookupError: The exporter is not installed here.
        ValueError: The exporter cannot be created with these arguments.
    """
    kind = find(config.exporter)
    check_arguments(kind, config.arguments)
    try:
        exporter = kind(**config.arguments)
    except Exception as error:
        # The error's text is left out, since it may contain a key.
        raise ValueError(
            f"'arguments': {kind.__name__} cannot be created with them ({type(error).__name__}); correct them"
        ) from error
    return OtelExporter(exporter, _resource(config), hidden=config.arguments)


def find(name: str) -> type[LogRecordExporter]:
    """Return the exporter with this entry-point name or class path.

    Raises:
        LookupError: No such exporter is installed here. The message says how to mend it.
    """
    named = _named(name)
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        if named is not None:
            kind = named.load()
        elif module:
            kind = getattr(import_module(module), attribute)
        else:
            known = sorted({entry_point.name for entry_point in entry_points(group=EXPORTERS)})
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
            raise LookupError(
                f"'exporter': there is no exporter '{name}' here{hint}; set one of: {', '.join(known)}, set the "
                f"path of a class, or install the package that has it"
            )
    except ImportError as error:
        raise LookupError(
            f"'exporter': '{name}' cannot be imported, since '{error.name or module}' is missing; install the package "
            f"that has it, or correct the path"
        ) from error
    except AttributeError as error:
        raise LookupError(f"'exporter': '{module}' has no class '{attribute}'; correct the path") from error
    if not isinstance(kind, type) or not issubclass(kind, OtelExporter.exporter_class):
        raise LookupError(
            f"'exporter': '{name}' is no LogRecordExporter of OpenTelemetry's SDK; name a class that extends it"
        )
    if inspect.isabstract(kind):
        missing = ", ".join(f"'{name}'" for name in sorted(kind.__abstractmethods__))
        sdk = version("opentelemetry-sdk")
        raise LookupError(
            f"'exporter': {kind.__name__} lacks {missing}, which OpenTelemetry's SDK {sdk} wants; define it, or update "
            f"the package that has the class"
        )
    return kind


def check_arguments(kind: type[LogRecordExporter], arguments: Mapping[str, Any]) -> None:
    """Check that the exporter takes arguments of these names.

    Raises:
        ValueError: The exporter does not take them.
    """
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        # The error names arguments, and no values.
        raise ValueError(
            f"'arguments': {error}; those of {kind.__name__} are: {', '.join(signature.parameters) or 'none'}"
        ) from None


def distribution_of(name: str) -> str | None:
    """Return the name of the package that contains the exporter; None if no package here does."""
    named = _named(name)
    if named is not None:
        return named.dist.name if named.dist else None
    distributions = distributions_of(name.replace(":", ".").partition(".")[0])
    # Many packages share a namespace such as `opentelemetry`.
    return distributions.pop() if len(distributions) == 1 else None


def _named(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=EXPORTERS, name=name)), None)


def _resource(config: OtelChildConfig) -> dict[str, str]:
    settings = {"service.name": config.service_name, "service.version": config.service_version}
    defaults = {"service.name": "zenml", "service.version": zenml_version}
    variables = environment_attributes()
    return {name: settings[name] or str(variables.get(name, defaults[name])) for name in defaults}
