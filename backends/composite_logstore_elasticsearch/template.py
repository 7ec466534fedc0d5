"""The index template: the types of the fields in indices that are made from now on.

Without it the first value of each field sets its type: a record's attribute that is a number here and a text there is
then kept as a part of one text, and an index ends at 1,000 fields.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import orjson
from urllib3.exceptions import HTTPError

from composite_logstore import AnswerTooLargeError, Bounds, UnavailableError
from composite_logstore_elasticsearch.connection import Connection, failure, path_of

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_elasticsearch.config import ElasticsearchChildConfig

_PRIORITY = 300
"""Above that of templates which ship with Elasticsearch."""

# ZenML's own store and our reader ask for the subfield, which the dynamic mapping makes as well.
_KEYWORD: dict[str, Any] = {
    "type": "keyword",
    "ignore_above": 1024,
    "fields": {"keyword": {"type": "keyword", "ignore_above": 1024}},
}
_LONG = {"type": "long"}
_TEXTS_ARE_KEYWORDS = [{"texts": {"match_mapping_type": "string", "mapping": _KEYWORD}}]


def name_of(index: str) -> str:
    """Return the name of an index's template."""
    return f"composite-logstore-{index}"


def template_for(index: str) -> dict[str, Any]:
    """Return the template for an index.

    A record's own attributes are kept, but not indexed: programs would make up more names than an index can have. What
    ZenML says about the run, and OpenTelemetry about the place in the code, can be searched.
    """
    named = {"type": "object", "dynamic": True}
    mappings: dict[str, Any] = {
        "dynamic": False,
        "date_detection": False,
        "dynamic_templates": _TEXTS_ARE_KEYWORDS,
        "properties": {
            "@timestamp": {"type": "date_nanos"},
            "timestamp_nanos": _LONG,
            "event_id": _KEYWORD,
            # Words for people, and any part of a text for `fetch()`.
            "message": {"type": "text", "fields": {"wildcard": {"type": "wildcard", "ignore_above": 8191}}},
            "severity_number": {"type": "integer"},
            "severity_text": _KEYWORD,
            "trace_id": _KEYWORD,
            "span_id": _KEYWORD,
            "logger": {"properties": {"name": _KEYWORD}},
            "log": {"properties": {"record": {"properties": {"uid": _KEYWORD}}}},
            "code": {
                "properties": {
                    "file": {"properties": {"path": _KEYWORD}},
                    "line": {"properties": {"number": {"type": "integer"}}},
                    "function": {"properties": {"name": _KEYWORD}},
                }
            },
            "exception": {
                "properties": {"type": _KEYWORD, "message": {"type": "text"}, "stacktrace": {"type": "text"}}
            },
            "service": {"properties": {"name": _KEYWORD, "version": _KEYWORD}},
            "zenml": {
                **named,
                "properties": {
                    "log": {
                        **named,
                        "properties": {
                            "id": _KEYWORD,
                            "writer": _KEYWORD,
                            "sequence": _LONG,
                            "rank": {"type": "integer"},
                            "extra": {"type": "text", "index": False},
                        },
                    }
                },
            },
        },
    }
    return {"index_patterns": [index], "priority": _PRIORITY, "template": {"mappings": mappings}}


def find_template(config: ElasticsearchChildConfig) -> str | None:
    """Return what is wrong with the template in the cluster; None if nothing is, or if that may not be known.

    Raises:
        UnavailableError: The cluster cannot be reached.
    """
    response = _ask(config, "GET", None)
    name = name_of(config.index)
    if response.status == 404:
        return f"the index template '{name}' is missing, so that the first value of each field sets its type"
    if response.status != 200:
        return None
    try:
        found = orjson.loads(response.body)["index_templates"][0]["index_template"]
        if found["index_patterns"] == [config.index] and "timestamp_nanos" in str(found["template"]["mappings"]):
            return None
    except (ValueError, LookupError, TypeError):
        pass
    return f"the index template '{name}' is not the one for this child"


def put_template(config: ElasticsearchChildConfig) -> str:
    """Make the template, and return what was done.

    Raises:
        UnavailableError: The cluster cannot be reached, or refuses.
    """
    name, template = name_of(config.index), template_for(config.index)
    response = _ask(config, "PUT", template)
    if response.status == 400 and b"wildcard" in response.body:
        # OpenSearch before 2.15 has no such type.
        del template["template"]["mappings"]["properties"]["message"]["fields"]
        response = _ask(config, "PUT", template)
    if response.status not in (200, 201):
        with closing(Connection(config)) as connection:
            said = connection.say(connection.refusal(response))
        raise UnavailableError(
            f"the index template '{name}' cannot be made: {said}; give the credentials 'manage_index_templates', or "
            "let somebody who has it run this"
        )
    return f"made the index template '{name}', which holds for indices that are made from now on"


def _ask(config: ElasticsearchChildConfig, method: str, template: dict[str, Any] | None) -> HttpResponse:
    seconds = config.export_timeout_millis / 1000
    with closing(Connection(config)) as connection:
        try:
            return connection.request(
                method,
                f"_index_template/{path_of(name_of(config.index))}",
                None if template is None else orjson.dumps(template),
                timeout_seconds=seconds,
                max_bytes=Bounds.EXPORT_BYTES,
            )
        except AnswerTooLargeError:
            raise UnavailableError(f"the answer of {config.url} is too large; check 'url'") from None
        except (HTTPError, OSError) as error:
            problem = failure(error, config.url, seconds)
            raise UnavailableError(f"{str(problem).partition('; ')[0]}; check 'url'") from None
