"""The exporter: writes each batch as one bulk request.

The event's uid is the document's `_id`, and the operation is `create`. So the cluster refuses a document that it has
already (409): a batch whose answer was lost can be sent again as often as needed.
"""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson
from urllib3.exceptions import HTTPError

from composite_logstore import (
    UNENCODABLE,
    AnswerTooLargeError,
    Bounds,
    LogEvent,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
    environment_attributes,
    retry_after,
)
from composite_logstore_elasticsearch.connection import Connection, Refusal, failure, path_of
from composite_logstore_elasticsearch.encoding import (
    MAX_DOCUMENT_BYTES,
    StreamEncoder,
    operation_of,
    packed,
    shorten_document,
)

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_elasticsearch.config import ElasticsearchChildConfig

MAX_REQUEST_BYTES = 10 * 1024 * 1024
"""The most bytes of one request, before compression. Elasticsearch takes 100 MiB, but some hosted ones only 10."""

# Only what tells how each event fared: a whole answer has hundreds of bytes for each.
# https://www.elastic.co/docs/reference/elasticsearch/rest-apis/common-options#common-options-response-filtering
_ANSWER = "filter_path=errors,items.*.status,items.*.error.type,items.*.error.reason"

# Here the index or the permissions are at fault, and not the event.
# https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk
_OF_THE_INDEX = {
    "cluster_block_exception": "the index is read-only, mostly because the disk is full; make room, and lift the block",
    "index_closed_exception": "the index is closed; open it, or set another 'index'",
    "index_not_found_exception": "the index does not exist and may not be made; create it, or allow 'auto_configure'",
    "invalid_index_name_exception": "the index cannot have this name; set another 'index'",
    "security_exception": "check what the credentials permit: 'create_doc' and 'auto_configure' on the index",
}
# Words after these repeat parts of the event, or its id. Words before a place are the place in the document.
_REPEATED = re.compile(r" in document with id|\. Preview of|; |\n")
_MOST_REASONS = 3
_PLACE = re.compile(r"^\[\d+:\d+\] ")


class ElasticsearchExporter:
    """Writes batches."""

    def __init__(self, config: ElasticsearchChildConfig) -> None:
        """Prepare the connection. Nothing is sent yet.

        Args:
            config: The child's settings, with secrets resolved.
        """
        self._connection = Connection(config)
        self._path = f"{path_of(config.index)}/_bulk?{_ANSWER}"
        # Leave time for encoding, so that the export ends before it counts as overdue.
        self._timeout_seconds = 0.9 * config.export_timeout_millis / 1000
        # Like ZenML's own store, add the attributes of OTEL_RESOURCE_ATTRIBUTES.
        self._common = environment_attributes()

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Write the batch.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The cluster could not be reached, is busy, or took only a part.
            RejectedError: The cluster refuses some events, or all.
            TooLargeError: The batch is too large for one request.
            UnavailableError: The cluster takes nothing until something is mended.
        """
        deadline = time.monotonic() + self._timeout_seconds
        operations: list[bytes] = []
        sent: list[LogEvent] = []
        unencodable: list[LogEvent] = []
        size = shortened = 0
        for event, operation, is_short in self._encoded(batch):
            if operation is None:
                # An event of another program, from an archive, may not be encodable. A retry would fail too.
                unencodable.append(event)
                continue
            operations.append(operation)
            sent.append(event)
            size += len(operation)
            shortened += is_short
            if size > MAX_REQUEST_BYTES and len(operations) > 1:
                raise TooLargeError(f"a request to Elasticsearch has at most {MAX_REQUEST_BYTES} bytes")
        refused = self._send(operations, deadline) if operations else {}
        refused = self._send_packed(refused, operations, sent, deadline)
        if not refused and not unencodable:
            return shortened
        reasons = sorted({self._reason(refusal) for refusal in refused.values()})[:_MOST_REASONS]
        if unencodable:
            reasons.append("of something that JSON cannot say")
        if refused and len(refused) == len(operations):
            # Perhaps the index takes nothing at all. The batch is split until that is known.
            raise RejectedError(" or ".join(reasons))
        rejected = [*(sent[place] for place in refused), *unencodable]
        raise RejectedError(" or ".join(reasons), shortened=shortened, events=rejected)

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: an index has no streams."""

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def _encoded(self, batch: Sequence[LogEvent]) -> Iterator[tuple[LogEvent, bytes | None, bool]]:
        """Yield each event, its operation, None if it cannot be encoded, and whether it had to be shortened."""
        encoders: dict[Stream, StreamEncoder] = {}
        for event in batch:
            try:
                encoder = encoders.get(event.stream)
                if encoder is None:
                    encoder = encoders[event.stream] = StreamEncoder(event.stream, self._common)
                operation = encoder.operation(event)
                is_short = len(operation) > MAX_DOCUMENT_BYTES
                if is_short:
                    operation = operation_of(event.uid, shorten_document(encoder.document(event)))
            except UNENCODABLE:
                yield event, None, False
                continue
            yield event, operation, is_short

    def _send_packed(
        self, refused: dict[int, Refusal], operations: Sequence[bytes], sent: Sequence[LogEvent], deadline: float
    ) -> dict[int, Refusal]:
        """Send events again that the index refused for one of their attributes, with the attributes as one text.

        An event is worth more than its attributes' places in the index. Returns the refusals that remain.
        """
        again: dict[int, bytes] = {}
        for place, refusal in refused.items():
            if _is_about_fields(refusal):
                document = orjson.loads(operations[place].split(b"\n", 2)[1])
                if (kept := packed(document)) is not None:
                    again[place] = operation_of(sent[place].uid, orjson.dumps(kept))
        if not again:
            return refused
        places = list(again)
        still = self._send(list(again.values()), deadline)
        remaining = {place: refusal for place, refusal in refused.items() if place not in again}
        return {**remaining, **{places[number]: refusal for number, refusal in still.items()}}

    def _send(self, operations: Sequence[bytes], deadline: float) -> dict[int, Refusal]:
        """Write documents, and return which ones the cluster refuses for good: their places → why.

        Raises:
            Exception: As `export` does.
        """
        # A second request of an export gets what the first one has left, but enough to be worth trying.
        seconds = max(deadline - time.monotonic(), self._timeout_seconds / 4)
        try:
            response = self._connection.request(
                "POST",
                self._path,
                gzip.compress(b"".join(operations), compresslevel=1, mtime=0),
                timeout_seconds=seconds,
                max_bytes=Bounds.PAGE_BYTES,
                headers={"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"},
            )
        except AnswerTooLargeError:
            raise UnavailableError(
                f"the answer of {self._connection.url} is too large to be Elasticsearch's; check 'url'"
            ) from None
        except (HTTPError, OSError) as error:
            raise failure(error, self._connection.url, seconds) from None
        if response.status not in (200, 201):
            raise self._error(response)
        return self._judge(response, len(operations))

    def _judge(self, response: HttpResponse, count: int) -> dict[int, Refusal]:
        """Return which documents a bulk answer refuses for good."""
        url = self._connection.url
        if response.fault is None and response.body == _all_created(count):
            return {}
        if response.fault is not None:
            # What was taken is refused as known when it is sent again.
            raise RetryableError(f"the answer of {url} is incomplete ({response.fault})", smaller_may_pass=True)
        try:
            answer = orjson.loads(response.body)
        except ValueError:
            answer = None
        items = answer.get("items") if isinstance(answer, dict) else None
        if isinstance(answer, dict) and items is None and answer.get("error"):
            # An error in the middle of a success.
            raise RetryableError(self._connection.say(Refusal.of(response.status, answer["error"])), None, True)
        results = [_result(item) for item in items] if isinstance(items, list) else []
        if len(results) != count or None in results:
            raise UnavailableError(
                f"{url} answers a bulk request as no Elasticsearch does; check 'url', and any proxy before it"
            )
        refused: dict[int, Refusal] = {}
        for place, refusal in enumerate(results):
            # A document that is there already (409) was delivered before.
            if refusal is None or 200 <= refusal.status < 300 or refusal.status == 409:
                continue
            if refusal.type in _OF_THE_INDEX:
                raise UnavailableError(f"{self._reason(refusal)}; {_OF_THE_INDEX[refusal.type]}")
            if refusal.status in (401, 403, 404):
                raise UnavailableError(f"{self._reason(refusal)}; check 'index' and what the credentials permit")
            if refusal.status == 429 or refusal.status >= 500:
                # Delivered ones are refused as known when the batch is sent again.
                raise RetryableError(
                    f"Elasticsearch cannot take all events now: {self._reason(refusal)}",
                    retry_after(response.headers),
                    smaller_may_pass=True,
                )
            refused[place] = refusal
        return refused

    def _error(self, response: HttpResponse) -> Exception:
        """Return the error for an answer to a whole request."""
        refusal = self._connection.refusal(response)
        said, status = self._connection.say(refusal), response.status
        if refusal.type in _OF_THE_INDEX:
            return UnavailableError(f"{said}; {_OF_THE_INDEX[refusal.type]}")
        if status == 413:
            return TooLargeError(said)
        if status in (408, 425, 429) or status >= 500:
            # A proxy also answers like this if the request, or the answer, took too long.
            return RetryableError(said, retry_after(response.headers), smaller_may_pass=True)
        if status == 400:
            return RejectedError(said)
        if status == 401:
            return UnavailableError(f"{said}; check 'api_key', or 'username' and 'password'")
        if status == 403:
            return UnavailableError(f"{said}; check what the credentials permit: 'create_doc' on the index")
        if 300 <= status < 400:
            return UnavailableError(f"{said}, a redirect; set 'url' to where it leads")
        return UnavailableError(f"{said}, as Elasticsearch does not; check 'url' and any proxy before it")

    def _reason(self, refusal: Refusal) -> str:
        """Return why an item was refused, without parts of the event: `stats()` counts rejections by reason."""
        reason = _PLACE.sub("", _REPEATED.split(refusal.reason, maxsplit=1)[0])
        words = ": ".join(filter(None, (refusal.type, reason))) or "no reason given"
        return f"{self._connection.quote(words)} ({refusal.status})"


@lru_cache(maxsize=16)
def _all_created(count: int) -> bytes:
    """Return what the answer mostly is, which then need not be parsed: an answer without blanks to `_ANSWER`."""
    return b'{"errors":false,"items":[' + b",".join([b'{"create":{"status":201}}'] * count) + b"]}"


def _result(item: Any) -> Refusal | None:
    """Return how an item of a bulk answer fared; None if it is no such item."""
    result = item.get("create") if isinstance(item, dict) else None
    status = result.get("status") if isinstance(result, dict) else None
    if not isinstance(result, dict) or type(status) is not int:
        return None
    return Refusal.of(status, result.get("error"))


# Elasticsearch's and OpenSearch's names of what is wrong with a document's fields, and not with the index.
_ABOUT_FIELDS = ("document_parsing_exception", "mapper_parsing_exception", "strict_dynamic_mapping_exception")


def _is_about_fields(refusal: Refusal) -> bool:
    return refusal.type in _ABOUT_FIELDS or "fields" in refusal.reason or "field name" in refusal.reason
