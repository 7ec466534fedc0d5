"""Writes a configuration of the OpenTelemetry Collector that does centrally what a log store's children do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import SecretStr
from zenml.utils.secret_utils import is_secret_reference, parse_secret_reference

from composite_logstore.ansi import ESCAPE_OR_STRAY
from composite_logstore.backend import UnavailableError
from composite_logstore.catalog.differences import masked_child
from composite_logstore.catalog.errors import ArgumentError, OperationError, asking_zenml
from composite_logstore.catalog.stores import RegisteredStore, find_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.collector import CollectorExporter
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.event import severity_number_of
from composite_logstore.inert import inert
from composite_logstore.reader_config import checked_url
from composite_logstore.secret_references import hides_in_a_url

LEAST_VERSION = "0.144.0"
"""The release of the Collector in which its exporters for OTLP got their present names."""

# The settings that all children have and for which the Collector has a word. A child that sets another one, such as
# `budget`, stays with the log store: without it, its backend would get what it must not get.
_UNDERSTOOD = frozenset(
    {
        "name",
        "type",
        "enabled",
        "min_level",
        "progress",
        "ansi",
        "max_queue_size",
        "max_export_batch_size",
        "schedule_delay_millis",
        "export_timeout_millis",
        "retry_initial_interval_millis",
        "retry_max_interval_millis",
    }
)
_STORAGE = "file_storage"
_FOLDER = "/var/lib/otelcol/file_storage"
_UNREADABLE = "it is the primary, and no child can read what the Collector would write for it"
_DEFAULT_SERVICE = "zenml"
# The Collector's expressions are those of RE2, which needs no bound, and knows none above 1,000.
_ESCAPES = ESCAPE_OR_STRAY.pattern.replace("{0,4096}", "*")


@dataclass
class CollectorConfig:
    """A configuration of the Collector, and the log store that sends to it.

    Attributes:
        store: The name of the log store that both replace.
        settings: The configuration. Secrets are references to environment variables.
        variables: The name of an environment variable → what to set it to.
        moved: The name of a child that moves to the Collector → what changes, each as a sentence without a full stop.
        staying: The name of a child that stays with the log store → why.
        log_store: The settings of a composite log store that sends to the Collector. Secrets that are written in clear
            text are masked.
    """

    store: str
    settings: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    moved: dict[str, list[str]] = field(default_factory=dict)
    staying: dict[str, str] = field(default_factory=dict)
    log_store: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Return the configuration as YAML, with comments that say what it cannot do."""
        return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield _comment(f"The children of the log store '{self.store}', for the OpenTelemetry Collector.")
        yield _comment(f"It needs the distribution 'contrib', {LEAST_VERSION} or later.")
        if self.variables:
            yield _comment("Set these environment variables of the Collector:")
            for name, meaning in self.variables.items():
                yield _comment(f"  {name}: {meaning}")
        for name, why in self.staying.items():
            yield _comment(f"Child '{name}' stays with the log store: {why}.")
        for section, components in self.settings.items():
            yield f"\n{section}:\n"
            for name, settings in components.items():
                for loss in self.moved.get(name.partition("/")[2], []) if section == "exporters" else []:
                    yield "  " + _comment(f"{loss}.")
                text = yaml.safe_dump({name: settings}, sort_keys=False, allow_unicode=True, width=1_000_000)
                yield "".join(f"  {line}" for line in text.splitlines(keepends=True))


def collector_config(store: str, endpoint: str = "http://localhost:4318") -> CollectorConfig:
    """Return a configuration of the Collector that does centrally what the children of a log store do.

    A child stays with the log store if the Collector has no exporter like it, or if the log store is read from it and
    nothing reads what the Collector would write.

    Examples:
        >>> found = collector_config("production", "http://collector:4318")
        >>> list(found.moved), list(found.staying)
        (['live'], ['archive'])
        >>> found.settings["exporters"]["otlp_http/live"]["headers"]["authorization"]
        '${env:LIVE_HEADERS_AUTHORIZATION}'

    Args:
        store: The log store's name or id.
        endpoint: The URL at which log stores reach the Collector over HTTP.

    Raises:
        ArgumentError: There is no such log store, or the endpoint is no URL.
        NoAnswerError: ZenML cannot be reached.
        OperationError: Every child stays with the log store.
    """
    try:
        endpoint = checked_url(endpoint, instead="leave it out")
    except ValueError as error:
        raise ArgumentError("endpoint", f"the endpoint {error}") from None
    found = find_store(store)
    result = CollectorConfig(found.name)
    exporters: dict[str, CollectorExporter] = {}
    for child in found.config.enabled_children:
        try:
            exporters[child.name] = _exporter_of(child)
        except UnavailableError as error:
            result.staying[child.name] = str(error)
    primary = found.config.primary
    read = [primary, *found.config.fetch_fallback]
    reader = next((name for name in read if name in exporters and exporters[name].read), None)
    if primary in exporters and reader != primary:
        del exporters[primary]
        result.staying[primary] = _UNREADABLE
    if not exporters:
        reasons = "; ".join(f"child '{name}': {why}" for name, why in result.staying.items())
        raise OperationError(f"no child of log store '{found.name}' can move to the Collector: {reasons}")
    children = {child.name: child for child in found.config.children}
    moved = [children[name] for name in exporters]
    sender = _sender(found.config, moved, exporters, reader, endpoint)
    result.settings = _settings(found.config, result, moved, exporters, sender)
    result.log_store = _log_store(found, exporters, sender, reader)
    return result


def _exporter_of(child: ChildConfig) -> CollectorExporter:
    for name in ChildConfig.model_fields.keys() - _UNDERSTOOD:
        if getattr(child, name) != ChildConfig.model_fields[name].get_default(call_default_factory=True):
            raise UnavailableError(f"the Collector has nothing like its '{name}'")
    if not child.asks_zenml:
        return child.collector_exporter()
    with asking_zenml():
        try:
            return child.collector_exporter()
        except UnavailableError as error:
            why = str(error)
    raise UnavailableError(why)


def _settings(
    config: CompositeLogStoreConfig,
    result: CollectorConfig,
    moved: list[ChildConfig],
    exporters: Mapping[str, CollectorExporter],
    sender: Mapping[str, Any],
) -> dict[str, Any]:
    variables = _Variables(result.variables)
    processors: dict[str, Any] = {}
    components: dict[str, Any] = {}
    pipelines: dict[str, Any] = {}
    for child in moved:
        exporter = exporters[child.name]
        losses = result.moved[child.name] = list(exporter.losses)
        if child.is_thinned and sender["progress"] != "latest":
            losses.append("It gets every update of a progress bar, at the update's own level")
        own = dict(_processors(child, exporter, sender))
        processors |= own
        id = f"{exporter.type}/{child.name}"
        components[id] = variables.rendered(_with_queue(config, child, exporter), child.name)
        pipelines[f"logs/{child.name}"] = {
            "receivers": ["otlp"],
            **({"processors": list(own)} if own else {}),
            "exporters": [id],
        }
    is_durable = config.durability != "memory"
    return {
        "receivers": {
            "otlp": {"protocols": {"grpc": {"endpoint": "0.0.0.0:4317"}, "http": {"endpoint": "0.0.0.0:4318"}}}
        },
        **({"processors": variables.rendered(processors, "")} if processors else {}),
        "exporters": components,
        **({"extensions": {_STORAGE: {"directory": _FOLDER, "create_directory": True}}} if is_durable else {}),
        "service": {**({"extensions": [_STORAGE]} if is_durable else {}), "pipelines": pipelines},
    }


def _with_queue(config: CompositeLogStoreConfig, child: ChildConfig, exporter: CollectorExporter) -> dict[str, Any]:
    """Return the settings of an exporter with those of the child's delivery."""
    is_durable = config.durability != "memory"
    settings: dict[str, Any] = dict(exporter.settings)
    if exporter.timeout:
        settings[exporter.timeout] = f"{child.export_timeout_millis}ms"
    if exporter.retries:
        settings[exporter.retries] = {
            "enabled": True,
            "initial_interval": f"{child.retry_initial_interval_millis}ms",
            "max_interval": f"{child.retry_max_interval_millis}ms",
            "multiplier": 2,
            # Without an end.
            "max_elapsed_time": "0s",
        }
    own = settings.pop("sending_queue", {})
    batch = {
        "sizer": "items",
        "min_size": child.batch_size,
        "max_size": child.batch_size,
        "flush_timeout": f"{max(1, child.schedule_delay_millis)}ms",
    }
    settings["sending_queue"] = {
        "enabled": True,
        # Several at once would change the order.
        "num_consumers": 1,
        "sizer": "bytes",
        "queue_size": config.spool_max_bytes if is_durable else config.max_queue_bytes,
        **({"storage": _STORAGE} if is_durable else {}),
        **own,
        "batch": {**batch, **own.get("batch", {})},
    }
    return settings


def _processors(
    child: ChildConfig, exporter: CollectorExporter, sender: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the processors of a child's pipeline, in their order."""
    if child.min_level is not None and (least := severity_number_of(child.min_level.value)):
        yield (
            f"filter/{child.name}",
            {"error_mode": "ignore", "logs": {"log_record": [f"severity_number < {least}"]}},
        )
    resource = {**exporter.resource_attributes}
    sent = sender.get("service_name", _DEFAULT_SERVICE)
    if resource.setdefault("service.name", _DEFAULT_SERVICE) == sent:
        del resource["service.name"]
    records = [f"set(attributes[{_literal(name)}], {_literal(value)})" for name, value in exporter.attributes.items()]
    records += exporter.statements
    if child.ansi == "strip" and sender["ansi"] == "keep":
        texts = ["body", 'attributes["exception.message"]', 'attributes["exception.stacktrace"]']
        records += [f"replace_pattern({text}, {_literal(_ESCAPES)}, {_literal('')})" for text in texts]
    contexts = {
        "resource": [f"set(attributes[{_literal(name)}], {_literal(value)})" for name, value in resource.items()],
        "log": records,
    }
    statements = [{"context": context, "statements": found} for context, found in contexts.items() if found]
    if statements:
        yield f"transform/{child.name}", {"error_mode": "ignore", "log_statements": statements}


def _literal(value: str | bool | int | float) -> str:
    """Return a value as OTTL writes it: a text as in Go, whose escapes are those of JSON."""
    return json.dumps(value, ensure_ascii=False)


class _Variables:
    """Replaces secrets by references to environment variables."""

    def __init__(self, meanings: dict[str, str]) -> None:
        self._meanings = meanings

    def rendered(self, value: Any, child: str, place: str = "") -> Any:
        """Return settings as the Collector expects them: without secrets, and with each `$` of a text escaped."""
        if isinstance(value, Mapping):
            return {
                str(name): self.rendered(item, child, f"{place}.{name}" if place else str(name))
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.rendered(item, child, f"{place}.{number}") for number, item in enumerate(value)]
        if isinstance(value, SecretStr):
            return self._reference(value.get_secret_value(), child, place)
        if not isinstance(value, str):
            return value
        if hides_in_a_url(value):
            return self._reference(value, child, place)
        return value.replace("$", "$$")

    def _reference(self, secret: str, child: str, place: str) -> str:
        if is_secret_reference(secret):
            found = parse_secret_reference(secret)
            name, meaning = f"{found.name}_{found.key}", f"'{found.key}' of ZenML's secret '{found.name}'"
        else:
            name, meaning = f"{child}_{place}", f"the whole '{place}' of child '{child}'"
        name = re.sub("[^A-Z0-9]+", "_", name.upper())
        name = f"_{name}" if name[:1].isdigit() else name
        while self._meanings.setdefault(name, meaning) != meaning:
            name += "_2"
        return f"${{env:{name}}}"


def _sender(
    config: CompositeLogStoreConfig,
    moved: list[ChildConfig],
    exporters: Mapping[str, CollectorExporter],
    reader: str | None,
    endpoint: str,
) -> dict[str, Any]:
    """Return the child that sends to the Collector: it gets what one of the moved children wants."""
    # Not the name of a child that moves either: the spool may have events for it.
    taken = {child.name for child in config.children}
    name = "collector"
    while name in taken:
        name += "-2"
    sender: dict[str, Any] = {"name": name, "type": "otlp", "endpoint": endpoint}
    levels = [child.min_level for child in moved if child.min_level is not None]
    if len(levels) == len(moved):
        sender["min_level"] = min(levels, key=lambda level: level.value).name
    sender["ansi"] = "keep" if any(child.ansi == "keep" for child in moved) else "strip"
    sender["progress"] = "latest" if all(child.is_thinned for child in moved) else "all"
    if reader is not None:
        sender["read"] = dict(exporters[reader].read or {})
        # It looks for events of this service.
        if service := exporters[reader].resource_attributes.get("service.name"):
            sender["service_name"] = service
    return sender


def _log_store(
    found: RegisteredStore,
    exporters: Mapping[str, CollectorExporter],
    sender: Mapping[str, Any],
    reader: str | None,
) -> dict[str, Any]:
    def renamed(name: str) -> str | None:
        if name not in exporters:
            return name
        return str(sender["name"]) if name == reader else None

    others = {
        name: value
        for name, value in found.model.configuration.items()
        if name not in ("primary", "children", "fetch_fallback")
    }
    fallback = list(filter(None, map(renamed, found.config.fetch_fallback)))
    kept = [child for child in found.raw_children if child["name"] not in exporters]
    return {
        **others,
        "primary": renamed(found.config.primary),
        **({"fetch_fallback": fallback} if fallback else {}),
        "children": [masked_child(child) for child in (sender, *kept)],
    }


def _comment(text: str) -> str:
    return f"# {inert(text, '')}\n"
