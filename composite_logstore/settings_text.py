"""Parses settings that somebody wrote as JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml


def parse_settings(text: str, is_yaml: bool = False) -> Any:
    """Return the settings that a text has, with plain values alone.

    Raises:
        ValueError: It is not valid JSON or YAML. The message names the place but nothing of the content.
    """
    try:
        if not is_yaml:
            return json.loads(text, object_pairs_hook=_without_twice, parse_constant=_refuse_constant)
        value = yaml.load(text, _Loader)
        # YAML has dates, sets and bytes too.
        return json.loads(json.dumps(value, allow_nan=False))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError:
        raise ValueError("not valid YAML: it has characters that YAML does not allow") from None
    except TypeError:
        raise ValueError("a value is none that JSON has, such as a date; put it into quotes") from None
    except RecursionError:
        raise ValueError("the settings are nested too deeply") from None


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object; leave one out")
    return settings


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON has")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it comes without types
    """Loads plain values. It refuses aliases: a few lines of them stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "an alias (*) is not allowed here; write the value itself", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, "this key occurs twice in one mapping; leave one out", key.start_mark
                )
        return dict(super().construct_mapping(node, deep))
