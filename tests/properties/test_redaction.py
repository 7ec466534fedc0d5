"""No masked value is in any byte that a child's exporter encodes, whatever the value is and wherever it was logged."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import orjson
from hypothesis import given
from hypothesis import strategies as st

from composite_logstore import LogEvent
from composite_logstore.event import ExceptionInfo
from composite_logstore.processing.known_secrets import KnownSecrets
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.redaction import REDACTED, Redact
from composite_logstore.processing.settings import RedactSettings
from composite_logstore.secret_forms import forms
from composite_logstore.testing import make_event
from composite_logstore_artifact.encoding import encode
from composite_logstore_cloudwatch import encoding as cloudwatch
from composite_logstore_datadog import encoding as datadog
from composite_logstore_elasticsearch import encoding as elasticsearch
from composite_logstore_otlp.encoding import encode_request, encode_resource
from tests.events import make_stream
from tests.servers.otlp_receiver import decode_request

# The ends occur in nothing else that is encoded. Surrogates reach no event.
secrets = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1b\x9b"), max_size=12).map(
    lambda text: f"Kq7{text}Zx9"
)
patterns = st.sampled_from(["Jw4-0001", "Jw4-9999"])
keys = st.text("ABCDEFG234567", min_size=16, max_size=16).map(lambda text: f"AKIA{text}")
around = st.text("ab /\n\"'é", max_size=5)
PLACES = (
    "message",
    "exception.type",
    "exception.message",
    "exception.stacktrace",
    "attribute",
    "name",
    "nested",
    "metadata",
    "logger",
    "file",
    "function",
    "stream",
    "name in the stream",
)


@st.composite
def texts(draw: st.DrawFn, value: str, may_be_encoded: bool) -> str:
    """Draw a text that shows a value in some form."""
    shapes = {
        "as it is": value,
        "coloured": "\x1b[1m".join((value[:3], value[3:])),
        "json": json.dumps({"value": value}),
        "repr": repr(value),
        "repr of bytes": repr(value.encode()),
        "json of pandas": json.dumps({"value": value}).replace("/", "\\/"),
    }
    if may_be_encoded:
        user = draw(st.text("uv", max_size=3))
        shapes |= {
            "url": quote(value, safe=""),
            "base64": base64.b64encode(f"{user}{value}{user}".encode()).decode(),
            "base64 for urls": base64.urlsafe_b64encode(f"{user}{value}".encode()).decode(),
        }
    return f"{draw(around)} {draw(st.sampled_from(sorted(shapes.values())))} {draw(around)}"


def place(event: LogEvent, where: str, text: str) -> LogEvent:
    """Return the event with a text in one of its places."""
    attributes, stream = dict(event.attributes), event.stream
    match where:
        case "message":
            return event._replace(message=f"{event.message}{text}")
        case "exception.type" | "exception.message" | "exception.stacktrace":
            error = event.exception or ExceptionInfo("Error", "bad", "Traceback")
            return event._replace(exception=error._replace(**{where.partition(".")[2]: text}))
        case "attribute":
            return event._replace(attributes={**attributes, "given": text})
        case "name":
            return event._replace(attributes={**attributes, text: 1})
        case "nested":
            return event._replace(attributes={**attributes, "nested": [{"list": [text], text: None}]})
        case "metadata":
            return event._replace(metadata={**event.metadata, "more": text})
        case "logger":
            return event._replace(logger_name=text)
        case "stream":
            stream.metadata["zenml.step.run.name"] = text
        case "name in the stream":
            stream.metadata[text] = "x"
        case _:
            return event._replace(**{where: text})
    return event


def encoded(event: LogEvent) -> Iterator[tuple[bytes, Any]]:
    """Yield what each backend gets of an event, as bytes and decoded."""
    line = encode(event)
    yield line, orjson.loads(line)
    request = encode_request([event], encode_resource({}), 4 << 20).payload
    yield request, [str(record) for record in decode_request(request)]
    for encoder in (
        datadog.StreamEncoder(event.stream, {}),
        elasticsearch.StreamEncoder(event.stream, {}),
        cloudwatch.StreamEncoder(event.stream),
    ):
        payload = encoder.encode(event)
        yield payload, orjson.loads(payload)


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


@given(st.data(), secrets, keys, patterns)
def test_no_masked_value_is_in_any_byte_that_is_sent(data: st.DataObject, secret: str, key: str, own: str) -> None:
    known = KnownSecrets()
    known.note("a secret", secret)
    settings = RedactSettings.model_validate({"patterns": [{"name": "own", "pattern": r"Jw4-\d{4}"}]})
    event = make_event("begin ", make_stream())
    for where in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=5, unique=True)):
        value = data.draw(st.sampled_from([secret, key, own]))
        event = place(event, where, data.draw(texts(value, may_be_encoded=value is secret)))
    batch = Processed([event])
    Redact(settings, known).process(batch)
    (masked,) = batch.events
    assert set(batch.redacted) == set(masked.metadata[REDACTED])  # type: ignore[arg-type]
    assert masked.identity == event.identity
    values = {secret, key, own, *forms(secret)}
    for payload, decoded in encoded(masked):
        shown = [payload.decode("utf-8", "replace"), *texts_in(decoded)]
        assert [value for value in values if any(value in text for text in shown)] == []
    again = Processed([masked])
    Redact(settings, known).process(again)
    assert again.events[0].message == masked.message
    assert again.events[0].attributes == masked.attributes
