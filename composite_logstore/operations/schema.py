"""The JSON Schema of the settings, for editors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import backends
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.mistakes import sections_in
from composite_logstore.reader_config import ReaderConfig, readers
from composite_logstore.secret_references import is_meant

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a log store's settings, and of a list of children, with all backends installed here.

    Editors complete settings with it. It expects values of the exact types, and has no rules across settings:
    `validate` checks the rest. Fields for secrets are `writeOnly`.

    Examples:
        >>> sorted(schema()["$defs"]["child"]["properties"]["type"]["enum"])
        ['artifact', 'cloudwatch', 'component', 'datadog', 'elasticsearch', 'otel', 'otlp']
    """
    classes = dict(_classes(backends()))
    sections = dict(_classes(readers()))
    known = [one for one in (*classes.values(), *sections.values()) if one is not None]
    models: list[type[BaseModel]] = [CompositeLogStoreConfig, *known]
    references, definitions = models_json_schema(
        [(one, "validation") for one in models], ref_template="#/$defs/{model}"
    )
    shared: dict[str, Any] = definitions["$defs"]
    for model in models:
        _describe(model, shared[_name(references[model, "validation"])])
    for section in dict.fromkeys(section for model in known for section in _sections_of(model)):
        if "properties" in shared.get(section.__name__, {}):
            _describe(section, shared[section.__name__])
    store = shared[_name(references[CompositeLogStoreConfig, "validation"])]
    store["properties"]["children"] = {**store["properties"]["children"], "$ref": "#/$defs/children"}
    for key in ("type", "items"):
        del store["properties"]["children"][key]
    store["properties"]["$schema"] = {"type": "string"}
    store["additionalProperties"] = False
    # The children's common settings are part of each type's own.
    shared.pop(ChildConfig.__name__, None)
    shared["child"] = _one_of(classes, "The backend.", ["name", "type"], references, shared)
    shared[ReaderConfig.__name__] = _one_of(sections, "The reader.", ["type"], references, shared)
    shared["children"] = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/child"}}
    return {
        "$schema": _DIALECT,
        "title": "Settings of a log store of the flavor composite, or its children alone",
        "if": {"type": "array"},
        "then": {"$ref": "#/$defs/children"},
        "else": references[CompositeLogStoreConfig, "validation"],
        "$defs": shared,
    }


def _one_of(
    classes: Mapping[str, type[BaseModel] | None],
    description: str,
    required: list[str],
    references: Mapping[Any, dict[str, Any]],
    shared: dict[str, Any],
) -> dict[str, Any]:
    """Return the schema of settings whose `type` tells which of these classes they are of."""
    rules = []
    for type_name, one in classes.items():
        if one is not None:
            reference = references[one, "validation"]
            shared[_name(reference)]["properties"]["type"] = {"const": type_name}
            rules.append({"if": {"properties": {"type": {"const": type_name}}}, "then": reference})
    return {
        "type": "object",
        "required": required,
        "properties": {"type": {"enum": list(classes), "description": description}},
        **({"allOf": rules} if rules else {}),
    }


def _classes(entry_points: Mapping[str, EntryPoint]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    """Yield each type, with its settings; None if it cannot be imported or has settings beyond JSON."""
    for type_name, entry_point in sorted(entry_points.items()):
        try:
            found = entry_point.load()
            found.model_json_schema()
        except Exception:
            found = None
        yield type_name, found


def _sections_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield the classes of the sections of settings, and of sections within them."""
    for field in model.model_fields.values():
        for section in sections_in(field.annotation):
            yield section
            yield from _sections_of(section)


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"].rpartition("/")[2])


def _describe(model: type[BaseModel], found: dict[str, Any]) -> None:
    """Give each setting its description, and mark those that are meant for secrets."""
    described: dict[str, str] = {}
    for base in reversed(model.__mro__):
        described |= _attributes(inspect.cleandoc(base.__doc__ or ""))
    found["description"] = " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())
    found.pop("title", None)
    for name, setting in found["properties"].items():
        setting.pop("title", None)
        setting.pop("sensitive", None)
        if name in described:
            setting["description"] = described[name]
        if is_meant(model.model_fields[name]):
            setting["writeOnly"] = True


def _attributes(text: str) -> dict[str, str]:
    """Return the attributes that a docstring describes."""
    _, _, section = text.partition("Attributes:\n")
    # A description continues in lines that are indented more.
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.split("\n\n")[0], re.MULTILINE)
    return {name: " ".join(description.split()) for name, description in found}
