"""A stand-in for Elasticsearch and OpenSearch.

It is built from their published requests, answers and limits, and enforces these:

- `_bulk`: `create` answers 409 for an `_id` that is there. Each item has a status of its own, in an answer of 200.
- Dynamic mapping: the first value of a field sets its type, and a value of another type is refused (400), as are names
  that contradict each other, names with empty parts, and more than 1,000 fields. A text gets a subfield `keyword`,
  which leaves out texts of more than 256 characters. Index templates (`_index_template`) map the fields of new indices.
- Documents are found after a refresh only.
- `_search`: at most 10,000 hits a page, `from` included; `search_after` needs a value for each key of `sort`; a sort by
  a text field, or by a field without a mapping and without `unmapped_type`, is refused.
- `match_phrase` on a text finds sequences of whole words, whatever is between them; `term` on a text finds one word.
- 413 above `http.max_content_length`; 401 without credentials; 403 where they permit nothing.

It knows the queries `bool`, `exists`, `match_phrase`, `range`, `term` and `wildcard`, and nothing else (400).

https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk
https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-search
"""

from __future__ import annotations

import base64
import fnmatch
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson

from tests.servers.standin import Asked, RefusalError, Reply, StandIn

API_KEY = "dGVzdC1pZDp0ZXN0LWFwaS1rZXk="
USERNAME, PASSWORD = "zenml", "test-pässword"

MAX_RESULT_WINDOW = 10_000
TOTAL_FIELDS = 1_000
MAX_CONTENT_LENGTH = 100 * 1024 * 1024
MAX_TERM_BYTES = 32_766

_METADATA_FIELDS = {"_id", "_index", "_source", "_routing", "_ignored", "_field_names", "_seq_no", "_version"}
_INT64 = 1 << 63
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T[\d:.]+(Z|[+-]\d\d:\d\d))?")
_HEADERS = {"Content-Type": "application/json", "X-elastic-product": "Elasticsearch"}


class Refusal(RefusalError):
    """An error as Elasticsearch answers it, in an answer or in one of its items."""

    def __init__(self, status: int, type: str, reason: str) -> None:
        super().__init__(status, reason)
        self.type = type

    @property
    def error(self) -> dict[str, str]:
        return {"type": self.type, "reason": str(self)}


class Elasticsearch(StandIn):
    """The stand-in.

    Attributes:
        indices: What it has stored, by the index's name.
        templates: The index templates, by their names.
        items: The statuses of all items of bulk answers.
        refused: The error of documents whose message contains a text: that text, and the error.
        refresh_seconds: How long a document takes to be found.
        max_content_length: How many bytes a request may have.
        auto_create: Whether an index is made by its first document.
        hang_ups: How many bulk requests it takes from now on without answering.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Forget all documents, and behave as at first."""
        with self.lock:
            self.mend()
            self.asked.clear()
            self.indices: dict[str, Index] = {}
            self.templates: dict[str, Any] = {}
            self.items: list[int] = []
            self.refused: tuple[str, Refusal] | None = None
            self.refresh_seconds = 0.0
            self.max_content_length = MAX_CONTENT_LENGTH
            self.auto_create = True
            self.hang_ups = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a child that uses it, but for its name and type."""
        return {"url": self.url, "api_key": API_KEY}

    def documents(self, name: str) -> list[dict[str, Any]]:
        """The documents of an index, as they were sent and taken."""
        return [document.source for document in self.indices[name].documents.values()]

    def reply(self, asked: Asked) -> Reply:
        reply = super().reply(asked)
        if self.hang_ups and asked.path.endswith("/_bulk"):
            self.hang_ups -= 1
            raise ConnectionAbortedError("the answer is lost")
        return reply._replace(headers={**_HEADERS, **reply.headers})

    def refuse(self, asked: Asked, refusal: RefusalError) -> Reply:
        error = refusal.error if isinstance(refusal, Refusal) else {"type": "exception", "reason": str(refusal)}
        body = {"error": {**error, "root_cause": [error]}, "status": refusal.status}
        return Reply(refusal.status, orjson.dumps(body))

    def answer(self, asked: Asked) -> Reply:
        if len(asked.body) > self.max_content_length:
            raise Refusal(413, "", "")
        _authenticate(asked)
        parts = [unquote(part) for part in asked.path.strip("/").split("/")]
        if parts[-1] == "_bulk":
            return Reply(200, self.bulk(parts[0], asked))
        if parts[-1] == "_search":
            return Reply(200, self.search(parts[0], asked.body))
        if parts[0] == "_index_template":
            return Reply(200, self._template(parts[1], asked))
        if parts == [""]:
            return Reply(200, b'{"name":"stand-in","version":{"number":"9.0.0"},"tagline":"You Know, for Search"}')
        raise Refusal(400, "illegal_argument_exception", f"no handler found for uri [{asked.path}]")

    # Writing

    def _template(self, name: str, asked: Asked) -> bytes:
        if asked.method == "PUT":
            self.templates[name] = orjson.loads(asked.body)
            return b'{"acknowledged":true}'
        if name not in self.templates:
            raise Refusal(404, "resource_not_found_exception", f"index template matching [{name}] not found")
        return orjson.dumps({"index_templates": [{"name": name, "index_template": self.templates[name]}]})

    def index(self, name: str) -> Index:
        if name not in self.indices:
            if not self.auto_create:
                raise Refusal(404, "index_not_found_exception", f"no such index [{name}]")
            applying = [
                template
                for template in self.templates.values()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in template["index_patterns"])
            ]
            applying.sort(key=lambda template: template.get("priority", 0))
            self.indices[name] = Index([one["template"].get("mappings", {}) for one in applying[-1:]])
        return self.indices[name]

    def bulk(self, name: str, asked: Asked) -> bytes:
        """Take a bulk request."""
        body = asked.body
        if not body.endswith(b"\n"):
            raise Refusal(400, "illegal_argument_exception", "The bulk request must be terminated by a newline [\\n]")
        lines = body.split(b"\n")[:-1]
        items = []
        errors = False
        for number in range(0, len(lines), 2):
            try:
                ((operation, action),) = orjson.loads(lines[number]).items()
                source = orjson.loads(lines[number + 1])
            except (ValueError, IndexError):
                raise Refusal(400, "x_content_parse_exception", "Malformed action/metadata line") from None
            if operation != "create":
                raise Refusal(400, "illegal_argument_exception", "the stand-in knows no operation but create")
            result: dict[str, Any] = {"_index": name, "_id": action["_id"]}
            try:
                if len(action["_id"].encode()) > 512:
                    raise Refusal(400, "action_request_validation_exception", "id is too long")
                if self.refused and self.refused[0] in str(source.get("message")):
                    raise self.refused[1]
                if len(_keys(lines[number + 1])) != len(source):
                    raise Refusal(400, "document_parsing_exception", "[1:1] Duplicate field")
                self.index(name).add(action["_id"], source, time.time() + self.refresh_seconds)
                result |= {"result": "created", "status": 201}
            except Refusal as refusal:
                errors = True
                result |= {"status": refusal.status, "error": refusal.error}
            self.items.append(result["status"])
            if "filter_path" in asked.parameters:
                result = {key: result[key] for key in ("status", "error") if key in result}
            items.append({operation: result})
        return orjson.dumps({"errors": errors, "items": items})

    # Reading

    def search(self, pattern: str, body: bytes) -> bytes:
        """Answer a search."""
        try:
            request = orjson.loads(body)
        except ValueError:
            raise Refusal(400, "parsing_exception", "not JSON") from None
        unknown = request.keys() - {"query", "size", "from", "sort", "search_after", "track_total_hits", "_source"}
        if unknown:
            raise Refusal(400, "parsing_exception", f"Unknown key for a VALUE in [{min(unknown)}].")
        size = request.get("size", 10)
        if request.get("from", 0) + size > MAX_RESULT_WINDOW:
            raise Refusal(
                400,
                "illegal_argument_exception",
                f"Result window is too large, from + size must be less than or equal to: [{MAX_RESULT_WINDOW}]",
            )
        sort = [next(iter(key.items())) for key in request.get("sort", [])]
        after = request.get("search_after")
        if after is not None and len(after) != len(sort):
            raise Refusal(400, "illegal_argument_exception", f"search_after has {len(after)} value(s) but sort has")
        now = time.time()
        names = self._matching(pattern)
        found: list[tuple[list[Any], str, _Document]] = []
        for name in names:
            index = self.indices[name]
            matches = query(request.get("query", {}), index)
            keys = [_sort_key(index, field, options) for field, options in sort]
            found += [
                ([key(document.fields) for key in keys], name, document)
                for document in index.documents.values()
                if document.found_from <= now and matches(document.fields)
            ]
        orders = [
            (options if isinstance(options, str) else options.get("order", "asc")) == "desc" for _, options in sort
        ]

        def place(values: Sequence[Any]) -> list[Any]:
            return [_Key(value, descending) for value, descending in zip(values, orders, strict=True)]

        # Of equal ones, nothing tells the order: it is that of a replica.
        found.sort(key=lambda hit: (place(hit[0]), hash(hit[2].id)))
        if after is not None:
            found = [hit for hit in found if place(after) < place(hit[0])]
        hits = [
            {"_index": name, "_id": document.id, "_score": None, "_source": document.source, "sort": values}
            for values, name, document in found[:size]
        ]
        return orjson.dumps(
            {
                "took": 1,
                "timed_out": False,
                "_shards": {"total": len(names), "successful": len(names), "skipped": 0, "failed": 0},
                "hits": {"max_score": None, "hits": hits},
            }
        )

    def _matching(self, pattern: str) -> list[str]:
        names: list[str] = []
        for part in pattern.split(","):
            found = [name for name in self.indices if fnmatch.fnmatchcase(name, part)]
            if not found and "*" not in part:
                raise Refusal(404, "index_not_found_exception", f"no such index [{part}]")
            names += [name for name in found if name not in names]
        return names


def _authenticate(asked: Asked) -> None:
    basic = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    given = asked.headers.get("authorization", "")
    if not given:
        raise Refusal(401, "security_exception", "missing authentication credentials for REST request")
    if given not in (f"ApiKey {API_KEY}", f"Basic {basic}"):
        raise Refusal(401, "security_exception", f"unable to authenticate with provided credentials {given}")


class _Document(NamedTuple):
    id: str
    source: dict[str, Any]
    fields: dict[str, Any]
    found_from: float


def flattened(source: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a document under their dotted names."""
    for name, value in source.items():
        if not name or any(not part.strip() for part in name.split(".")):
            raise Refusal(
                400, "document_parsing_exception", f"[1:1] field name cannot contain only whitespace: [{name}]"
            )
        if not prefix and name in _METADATA_FIELDS:
            raise Refusal(
                400,
                "document_parsing_exception",
                f"[1:1] Field [{name}] is a metadata field and cannot be added inside a document",
            )
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            for item in value:
                yield from flattened({name: item}, prefix)
        else:
            yield prefix + name, value


class Index:
    """Documents, and the mapping of their fields."""

    def __init__(self, templates: Sequence[Mapping[str, Any]]) -> None:
        """Make an index.

        Args:
            templates: The mappings of the templates that apply, the most important last.
        """
        self.documents: dict[str, _Document] = {}
        self.types: dict[str, str] = {}
        self.ignore_above: dict[str, int] = {}
        self.dynamic: Any = True
        self._dynamic_of: dict[str, Any] = {}
        self.objects: set[str] = set()
        self._dynamic_templates: list[Mapping[str, Any]] = []
        self.date_detection = True
        for mappings in templates:
            self.dynamic = mappings.get("dynamic", self.dynamic)
            self.date_detection = mappings.get("date_detection", self.date_detection)
            self._dynamic_templates = mappings.get("dynamic_templates", self._dynamic_templates)
            self._map_properties(mappings.get("properties", {}), "")

    def _map_properties(self, properties: Mapping[str, Any], prefix: str) -> None:
        for name, mapping in properties.items():
            full = prefix + name
            parts = full.split(".")
            self.objects.update(".".join(parts[:end]) for end in range(1, len(parts)))
            if "properties" in mapping or mapping.get("type") == "object" or "dynamic" in mapping:
                self.objects.add(full)
                self._dynamic_of[full] = mapping.get("dynamic", self._inherited(full))
                self._map_properties(mapping.get("properties", {}), full + ".")
            else:
                self._map(full, mapping)

    def _map(self, name: str, mapping: Mapping[str, Any]) -> None:
        self.types[name] = mapping["type"]
        if "ignore_above" in mapping:
            self.ignore_above[name] = mapping["ignore_above"]
        for sub, inner in mapping.get("fields", {}).items():
            self._map(f"{name}.{sub}", inner)

    def _inherited(self, name: str) -> Any:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (place := ".".join(parts[:end])) in self._dynamic_of:
                return self._dynamic_of[place]
        return self.dynamic

    def add(self, id: str, source: dict[str, Any], found_from: float) -> None:
        """Take a document.

        Raises:
            Refusal: It cannot be taken.
        """
        if id in self.documents:
            raise Refusal(
                409, "version_conflict_engine_exception", f"[{id}]: version conflict, document already exists (...)"
            )
        types, objects = dict(self.types), set(self.objects)
        before = self.types, self.objects, dict(self.ignore_above)
        self.types, self.objects = types, objects
        fields: dict[str, Any] = {}
        try:
            for name, value in flattened(source):
                self._index(name, value, id, fields)
                if len(self.types) + len(self.objects) > TOTAL_FIELDS and len(self.types) > len(before[0]):
                    raise Refusal(
                        400,
                        "illegal_argument_exception",
                        f"Limit of total fields [{TOTAL_FIELDS}] has been exceeded while adding new fields [1]",
                    )
        except Refusal:
            self.types, self.objects, self.ignore_above = before
            raise
        self.documents[id] = _Document(id, source, fields, found_from)

    def _index(self, name: str, value: Any, id: str, fields: dict[str, Any]) -> None:
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts))]
        for parent in parents:
            if parent in self.types:
                raise Refusal(
                    400,
                    "document_parsing_exception",
                    f"[1:1] object mapping for [{parent}] tried to parse field [{parent}] as object, but found a "
                    "concrete value",
                )
        if name in self.objects and value is not None:
            raise Refusal(
                400,
                "document_parsing_exception",
                f"[1:1] object mapping for [{name}] tried to parse field [{name}] as object, but found a concrete "
                "value",
            )
        values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
        if not values:
            return
        if name not in self.types:
            dynamic = self._inherited(name)
            if dynamic == "strict":
                raise Refusal(
                    400,
                    "strict_dynamic_mapping_exception",
                    f"[1:1] mapping set to strict, dynamic introduction of [{name}] within [_doc] is not allowed",
                )
            if dynamic in (False, "false"):
                return
            self.objects.update(parents)
            self._map(name, self._guess(name, values[0]))
        kind = self.types[name]
        taken = [_converted(name, kind, item, id) for item in values]
        fields[name] = taken[0] if len(taken) == 1 else taken
        self._check_terms(name, kind, taken)
        for sub in (f"{name}.keyword", f"{name}.wildcard"):
            if sub in self.types:
                limit = self.ignore_above.get(sub)
                kept = [item for item in taken if limit is None or len(str(item)) <= limit]
                self._check_terms(sub, self.types[sub], kept)
                if kept:
                    fields[sub] = kept[0] if len(kept) == 1 else kept

    def _check_terms(self, name: str, kind: str, values: Sequence[Any]) -> None:
        limit = self.ignore_above.get(name)
        for value in values:
            is_kept = limit is None or len(str(value)) <= limit
            if kind == "keyword" and is_kept and len(str(value).encode()) > MAX_TERM_BYTES:
                raise Refusal(
                    400,
                    "illegal_argument_exception",
                    f'Document contains at least one immense term in field="{name}" (whose UTF8 encoding is longer '
                    f"than the max length {MAX_TERM_BYTES})",
                )

    def _guess(self, name: str, value: Any) -> Mapping[str, Any]:
        kinds: list[tuple[type, str]] = [(bool, "boolean"), (int, "long"), (float, "double"), (str, "string")]
        kind = next(word for python, word in kinds if isinstance(value, python))
        for template in self._dynamic_templates:
            (rule,) = template.values()
            if rule.get("match_mapping_type", "*") in ("*", kind) and fnmatch.fnmatchcase(
                name, rule.get("path_match", "*")
            ):
                mapping: Mapping[str, Any] = rule["mapping"]
                return mapping
        if kind == "string" and self.date_detection and _DATE.fullmatch(value):
            return {"type": "date"}
        if kind == "string":
            return {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}
        return {"type": "float" if kind == "double" else kind}


def _converted(name: str, kind: str, value: Any, id: str) -> Any:
    """Return a value as its field indexes it."""
    failed = Refusal(
        400,
        "document_parsing_exception",
        f"[1:1] failed to parse field [{name}] of type [{kind}] in document with id '{id}'. Preview of field's value: "
        f"'{str(value)[:60]}'",
    )
    try:
        if kind in ("long", "integer"):
            number = int(float(value)) if isinstance(value, float | str) else int(value)
            if isinstance(value, bool) or not -_INT64 <= number < _INT64:
                raise failed
            return number
        if kind in ("float", "double"):
            if isinstance(value, bool):
                raise failed
            return float(value)
        if kind == "boolean":
            if value not in (True, False, "true", "false", ""):
                raise failed
            return value in (True, "true")
        if kind in ("date", "date_nanos"):
            if not isinstance(value, int):
                nanos_of(str(value))
            return value
    except (ValueError, OverflowError):
        raise failed from None
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _keys(line: bytes) -> list[str]:
    """Return the keys of a JSON object, twice if one is there twice."""
    pairs: list[Any] = []

    def take(items: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = [key for key, _ in items]
        return dict(items)

    json.loads(line, object_pairs_hook=take)
    return pairs


class _Key:
    """A sort value. None comes last in either order."""

    def __init__(self, value: Any, descending: bool) -> None:
        self.value = value
        self.descending = descending

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.value == other.value

    def __lt__(self, other: _Key) -> bool:
        if self.value is None or other.value is None:
            return other.value is None and self.value is not None
        less = self.value < other.value
        return bool(self.value != other.value and (not less if self.descending else less))


def _sort_key(index: Index, field: str, options: Any) -> Callable[[Mapping[str, Any]], Any]:
    options = _options(options)
    unknown = options.keys() - {"order", "missing", "unmapped_type"}
    if unknown:
        raise Refusal(400, "x_content_parse_exception", f"[field_sort] unknown field [{min(unknown)}]")
    kind = index.types.get(field, options.get("unmapped_type"))
    if kind is None:
        raise Refusal(400, "query_shard_exception", f"No mapping found for [{field}] in order to sort on")
    if kind == "text":
        raise Refusal(
            400,
            "illegal_argument_exception",
            f"Fielddata is disabled on [{field}] in [index]. Text fields are not optimised for operations that require "
            "per-document field data like aggregations and sorting",
        )
    missing = options.get("missing", "_last")
    if missing in ("_first", "_last"):
        is_high = (missing == "_last") != (options.get("order") == "desc")
        missing = None if kind == "keyword" else (_INT64 - 1 if is_high else -_INT64)

    def key(fields: Mapping[str, Any]) -> Any:
        value = fields.get(field)
        if isinstance(value, list):
            value = (max if options.get("order") == "desc" else min)(value)
        # A date is sorted by milliseconds, a number by itself.
        return missing if value is None else _sortable(value, kind)

    return key


def _options(options: Any) -> Mapping[str, Any]:
    return {"order": options} if isinstance(options, str) else options


def _sortable(value: Any, kind: str) -> Any:
    if kind not in ("date", "date_nanos") or isinstance(value, int):
        return value
    nanos = nanos_of(value)
    return nanos if kind == "date_nanos" else nanos // 1_000_000


def nanos_of(text: str) -> int:
    """Return a date as nanoseconds: in ISO's form, or as "<milliseconds>.<nanoseconds>" not padded with zeros."""
    if match := re.fullmatch(r"(\d+)(?:\.(\d+))?", text):
        return int(match[1]) * 1_000_000 + int(match[2] or 0)
    match = re.fullmatch(r"(.*?)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", text)
    if match is None:
        raise ValueError(f"{text!r} is no date")
    seconds = int(datetime.fromisoformat(match[1] + match[3].replace("Z", "+00:00")).timestamp())
    return seconds * 1_000_000_000 + int((match[2] or "0").ljust(9, "0")[:9])


def query(body: Mapping[str, Any], index: Index) -> Callable[[Mapping[str, Any]], bool]:
    """Return whether a document's fields match a query."""
    if not body:
        return lambda fields: True
    ((kind, argument),) = body.items()
    if kind == "bool":
        return _bool(argument, index)
    if kind == "exists":
        return lambda fields: argument["field"] in fields
    if kind not in ("match_phrase", "range", "term", "wildcard"):
        raise Refusal(400, "parsing_exception", f"unknown query [{kind}]")
    ((field, options),) = argument.items()
    type_ = index.types.get(field)

    def of(test: Callable[[Any], bool]) -> Callable[[Mapping[str, Any]], bool]:
        def matches(fields: Mapping[str, Any]) -> bool:
            value = fields.get(field)
            return any(map(test, value if isinstance(value, list) else [] if value is None else [value]))

        return matches

    if kind == "range":
        if options.get("format", "epoch_millis") != "epoch_millis":
            raise Refusal(400, "parsing_exception", "the stand-in knows no format but epoch_millis")
        bounds = {name: _bound(value, type_) for name, value in options.items() if name != "format"}
        if bounds.keys() - {"gt", "gte", "lt", "lte"}:
            raise Refusal(400, "parsing_exception", "[range] query does not support")
        tests: dict[str, Callable[[Any, Any], bool]] = {
            "gt": lambda value, bound: value > bound,
            "gte": lambda value, bound: value >= bound,
            "lt": lambda value, bound: value < bound,
            "lte": lambda value, bound: value <= bound,
        }
        return of(lambda value: all(tests[name](_sortable(value, type_ or ""), to) for name, to in bounds.items()))
    wanted = options if not isinstance(options, dict) else options.get("value", options.get("query"))
    if kind == "wildcard":
        pattern = _wildcard(str(wanted), bool(options.get("case_insensitive")))
        return of(lambda value: pattern.fullmatch(str(value)) is not None)
    if type_ != "text":
        return of(lambda value: bool(value == wanted or str(value) == str(wanted)))
    if kind == "term":
        return of(lambda value: wanted in _words(value))
    phrase = f" {' '.join(_words(str(wanted)))} "
    return of(lambda value: phrase in f" {' '.join(_words(value))} ")


def _bool(argument: Mapping[str, Any], index: Index) -> Callable[[Mapping[str, Any]], bool]:
    unknown = argument.keys() - {"filter", "must", "must_not", "should", "minimum_should_match"}
    if unknown:
        raise Refusal(400, "parsing_exception", f"[bool] query does not support [{min(unknown)}]")

    def all_of(name: str) -> list[Callable[[Mapping[str, Any]], bool]]:
        clauses = argument.get(name, [])
        return [query(clause, index) for clause in (clauses if isinstance(clauses, list) else [clauses])]

    needed, banned, offered = all_of("filter") + all_of("must"), all_of("must_not"), all_of("should")
    least = argument.get("minimum_should_match", 0 if needed else 1)
    return lambda fields: (
        all(test(fields) for test in needed)
        and not any(test(fields) for test in banned)
        and (not offered or sum(test(fields) for test in offered) >= least)
    )


def _bound(value: Any, type_: str | None) -> Any:
    if isinstance(value, str):
        return _sortable(value, type_ or "")
    # A number is one of milliseconds, whatever the field keeps.
    return value * 1_000_000 if type_ == "date_nanos" else value


def _wildcard(pattern: str, is_case_blind: bool) -> re.Pattern[str]:
    parts = re.findall(r"\\(.)|([*?])|([^\\*?])", pattern, re.DOTALL)
    text = "".join(
        {"*": ".*", "?": "."}[wild] if wild else re.escape(escaped or plain) for escaped, wild, plain in parts
    )
    return re.compile(text, re.DOTALL | (re.IGNORECASE if is_case_blind else 0))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", str(text).lower())
