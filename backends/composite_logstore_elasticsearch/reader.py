"""The readers: they read pages through `_search`, of Elasticsearch and of OpenSearch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
from zenml.exceptions import DoesNotExistException

from composite_logstore import Answer, HttpSearches, KeysetReader, Query
from composite_logstore.zenml import LogStoreError, LogStoreUnavailableError
from composite_logstore_elasticsearch.connection import Refusal, path_of
from composite_logstore_elasticsearch.decoding import otel_record_of, record_of

if TYPE_CHECKING:
    from composite_logstore import Allowance, HttpResponse
    from composite_logstore_elasticsearch.config import ElasticsearchChildConfig, ElasticsearchReaderConfig

_NANOS = 1_000_000
"""In a millisecond."""

# What tells how the search went, and the documents: a whole answer names the index and the sort values of each, too.
_ANSWER = "filter_path=error,timed_out,terminated_early,_shards.total,_shards.failed,hits.hits._source"

# https://www.elastic.co/docs/reference/query-languages/query-dsl/query-dsl-wildcard-query
# `case_insensitive` looks at ASCII letters alone. Two of them have another capital: the Kelvin sign, and I with a dot.
_WILD = str.maketrans({"\\": r"\\", "*": r"\*", "?": r"\?"} | dict.fromkeys("kKiI", "?"))

_HIGHEST = (1 << 63) - 1

_A_FEW = 20
"""How many records to look at for why none belongs to a stream."""


class ElasticsearchReader(KeysetReader):
    """Reads what an `elasticsearch` child, or ZenML's own Elasticsearch store, has written.

    The time is a number there, and a text has a subfield `keyword` in each mapping, dynamic or from the template.
    """

    sorts_ties = True
    # The most that `index.max_result_window` allows by default.
    max_records: ClassVar[int] = 10_000

    def __init__(self, config: ElasticsearchChildConfig) -> None:
        """Connect to nothing yet.

        Args:
            config: The child's settings, with secrets resolved.
        """
        self._path = f"/{path_of(config.index)}/_search?{_ANSWER}"
        self._searches = HttpSearches(
            "Elasticsearch",
            config.url,
            {"Content-Type": "application/json", **config.authorization},
            Refusals(""),
            config.certificate_file,
            url_setting="url",
            client_certificate=config.client_certificate,
        )

    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Ask once."""
        order = "asc" if query.direction == "newer" else "desc"
        clauses: list[Any] = [
            _is("zenml.log.id", str(query.logs_id)),
            {"range": {"timestamp_nanos": {"gte": query.first_nanos, "lte": query.last_nanos}}},
            *_narrowed(query, "severity_number", ["message.wildcard"], "exception"),
        ]
        body: dict[str, Any] = {
            "size": query.limit,
            "track_total_hits": False,
            "query": {"bool": {"filter": clauses}},
            # A record of another program has neither a writer nor a sequence.
            "sort": [
                {"timestamp_nanos": {"order": order, "unmapped_type": "long"}},
                {"zenml.log.writer.keyword": {"order": order, "unmapped_type": "keyword", "missing": ""}},
                {"zenml.log.sequence": {"order": order, "unmapped_type": "long", "missing": 0}},
            ],
        }
        if (edge := query.edge) is not None:
            # Just before the edge, since records there are wanted, too.
            step = -1 if query.direction == "newer" else 1
            body["search_after"] = [edge.nanos, edge.writer, min(edge.sequence + step, _HIGHEST)]
        try:
            answer = ask(self._searches, self._path, body, allowance)
        except _NoIndexError:
            # The first event makes the index.
            return Answer([], True)
        hits = hits_of(answer, query.limit)
        return Answer([record for hit in hits if (record := record_of(hit)) is not None], len(hits) < query.limit)

    def close(self) -> None:
        """Close the connections."""
        self._searches.close()


class OtelDocumentsReader(KeysetReader):
    """Reads what a collector, or Elasticsearch's own OTLP endpoint, has written in OpenTelemetry's mapping.

    It sorts by milliseconds, since `@timestamp` may have no more in the index. The document has all of the time.
    """

    time_unit_nanos: ClassVar[int] = _NANOS
    max_records: ClassVar[int] = 10_000

    def __init__(self, config: ElasticsearchReaderConfig, service_name: str | None) -> None:
        """Connect to nothing yet.

        Args:
            config: The section's settings, with secrets resolved.
            service_name: The `service.name` of the records; None for the usual one.
        """
        self._index = config.index
        self._service_name = service_name or "zenml"
        self._path = f"/{path_of(config.index)}/_search?{_ANSWER}"
        self._searches = HttpSearches(
            "Elasticsearch",
            config.url,
            {"Content-Type": "application/json", **config.authorization},
            Refusals("read."),
            config.certificate_file,
        )

    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Ask once."""
        clauses = [
            _is("attributes.zenml.log.id", str(query.logs_id)),
            _between(query),
            *_narrowed(query, "severity_number", [], "attributes.exception"),
        ]
        answer = self._ask(query, clauses, query.limit, allowance)
        hits = hits_of(answer, query.limit)
        return Answer([record for hit in hits if (record := otel_record_of(hit)) is not None], len(hits) < query.limit)

    def explain_nothing(self, query: Query, allowance: Allowance) -> None:
        """Raise an error if there is no such index, or if records have lost the attribute that names their stream."""
        clauses = [_is("resource.attributes.service.name", self._service_name), _between(query)]
        answer = self._ask(query, clauses, _A_FEW, allowance)
        shards = answer.get("_shards")
        if isinstance(shards, Mapping) and shards.get("total") == 0:
            raise self._no_index()
        records = [record for hit in hits_of(answer, _A_FEW) if (record := otel_record_of(hit)) is not None]
        if records and not any("zenml.log.id" in record.attributes for record in records):
            raise LogStoreError(
                f"Index '{self._index}' has logs of service '{self._service_name}' without the attribute "
                "'zenml.log.id', which says whose they are. Check that no processor of the collector removes or "
                "renames it, and that the collector's mapping mode is 'otel'."
            )

    def close(self) -> None:
        """Close the connections."""
        self._searches.close()

    def _ask(self, query: Query, clauses: Sequence[Any], limit: int, allowance: Allowance) -> Mapping[str, Any]:
        order = "asc" if query.direction == "newer" else "desc"
        body = {
            "size": limit,
            "track_total_hits": False,
            "query": {"bool": {"filter": clauses}},
            "sort": [{"@timestamp": {"order": order, "unmapped_type": "date"}}],
        }
        try:
            return ask(self._searches, self._path, body, allowance)
        except _NoIndexError:
            raise self._no_index() from None

    def _no_index(self) -> DoesNotExistException:
        return DoesNotExistException(
            f"There is no index '{self._index}'. Check 'read.index', and that the collector has written there."
        )


# Queries


def _is(field: str, text: str) -> Any:
    """Return the query for a field that is a text: also right for a keyword, where a phrase is the whole."""
    return {"match_phrase": {field: text}}


def _between(query: Query) -> Any:
    first, last = query.first_nanos // _NANOS, query.last_nanos // _NANOS + 1
    # Right for an index that keeps nanoseconds, too.
    return {"range": {"@timestamp": {"gte": first, "lt": last, "format": "epoch_millis"}}}


def _narrowed(query: Query, severity: str, texts: Sequence[str], exception: str) -> list[Any]:
    """Return queries that leave out only what cannot be wanted: the rest is checked again.

    Args:
        query: What to search for.
        severity: The field of the severity's number.
        texts: The fields of type `wildcard` that have the body.
        exception: The object with the exception, whose text is searched as well.
    """
    clauses: list[Any] = []
    if query.severity_number:
        below = {"range": {severity: {"gt": 0, "lt": query.severity_number}}}
        clauses.append({"bool": {"must_not": [below]}})
    if query.search is not None and texts:
        is_plain = query.search.isascii() and query.search.isprintable()
        pattern = f"*{query.search.translate(_WILD)}*" if is_plain else "*"
        found = [{"wildcard": {field: {"value": pattern, "case_insensitive": True}}} for field in texts]
        # Where the index has no such field, or the text is too long for it, nothing can be left out.
        unknown = {"bool": {"must_not": [{"exists": {"field": field}} for field in texts]}}
        parts = [{"exists": {"field": f"{exception}.{part}"}} for part in ("type", "message", "stacktrace")]
        clauses.append({"bool": {"should": [*found, unknown, *parts], "minimum_should_match": 1}})
    return clauses


# Answers


class _NoIndexError(LogStoreError):
    """There is no such index."""


class Refusals:
    """Turns the answers that refuse a search into errors."""

    def __init__(self, place: str) -> None:
        """Say where the settings are.

        Args:
            place: What precedes a setting's name, such as `read.`.
        """
        self._place = place

    def __call__(self, response: HttpResponse) -> LogStoreError | None:
        """Return the error that an answer means; None for the general rules."""
        status = response.status
        if status == 200 or status == 429 or status >= 500:
            return None
        try:
            answer = orjson.loads(response.body)
        except ValueError:
            answer = None
        refusal = Refusal.of(status, answer.get("error") if isinstance(answer, dict) else None)
        if refusal.type == "index_not_found_exception":
            return _NoIndexError("Elasticsearch has no such index.")
        said = f" ({refusal.type})" if refusal.type.isascii() and refusal.type.isidentifier() else ""
        message = f"Elasticsearch rejected the search with status {status}{said}."
        place = self._place
        if status == 401:
            message += f" Check '{place}api_key', or '{place}username' and '{place}password'."
        elif status == 403:
            message += f" Check that the credentials permit 'read' on the index '{place}index' names."
        elif status == 400:
            message += f" Check '{place}index', and the types of its fields."
        else:
            message += f" Check '{place}url', and any proxy before it."
        return LogStoreError(message)


def ask(searches: HttpSearches, path: str, body: Any, allowance: Allowance) -> Mapping[str, Any]:
    """Send a search, and return its answer if that is complete."""
    response = searches.ask("POST", path, orjson.dumps(body), allowance)
    try:
        answer = orjson.loads(response.body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise LogStoreError("Elasticsearch returned a response that could not be read as a search result.")
    shards = answer.get("_shards")
    failed = shards.get("failed") if isinstance(shards, dict) else None
    if answer.get("timed_out") is True or answer.get("terminated_early") is True or (failed not in (0, None)):
        raise LogStoreUnavailableError("Elasticsearch searched only a part of the index. Try again later.")
    if answer.get("error"):
        raise LogStoreUnavailableError("Elasticsearch failed in the middle of its answer. Try again later.")
    if answer.get("timed_out") is not False or type(failed) is not int:
        raise LogStoreError(
            "Elasticsearch returned an invalid search result. Check that it answers there itself, and not a proxy."
        )
    return answer


def hits_of(answer: Mapping[str, Any], limit: int) -> list[Mapping[str, Any]]:
    """Return the documents of an answer.

    Raises:
        LogStoreError: It has none, or too many.
    """
    # Without a hit the filter of the answer leaves out the whole object.
    outer = answer.get("hits", {})
    hits = outer.get("hits", []) if isinstance(outer, dict) else None
    if not isinstance(hits, list) or len(hits) > limit:
        raise LogStoreError("Elasticsearch returned an invalid search result.")
    sources = [hit.get("_source") if isinstance(hit, dict) else None for hit in hits]
    if not all(isinstance(source, dict) for source in sources):
        raise LogStoreError("Elasticsearch returned hits without documents. Check that the index keeps '_source'.")
    return [source for source in sources if isinstance(source, dict)]
