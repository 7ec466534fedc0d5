from __future__ import annotations

import base64
import json
import logging
import os
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr, ValidationError
from zenml.models import SecretResponse, SecretResponseBody, SecretResponseMetadata

from composite_logstore import testing
from composite_logstore.backend import BACKFILLED, RejectedError, RetryableError
from composite_logstore.child_types import parse_child
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.event import ExceptionInfo, LogEvent
from composite_logstore.parity.compare import compare
from composite_logstore.parity.result import BackfillStoppedError
from composite_logstore.parity.scan import open_source
from composite_logstore.plain import text_of
from composite_logstore.processing import known_secrets
from composite_logstore.processing.key_formats import FORMATS
from composite_logstore.processing.known_secrets import MOST, KnownSecrets
from composite_logstore.processing.processor import Processed, Processor
from composite_logstore.processing.redaction import MOST_LINES, REDACTED, Redact, Redactor
from composite_logstore.processing.settings import RedactSettings
from composite_logstore.secret_forms import LONGEST, SHORTEST
from composite_logstore.testing import SimulatedBackend, SimulatedClock, make_event
from tests.events import make_events, make_stream
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.unit.test_backfilling import archive, contents, copy, write


def letters(number: int, alphabet: str = "aB3dE6gH") -> str:
    """Return text that looks like a key and is none: no scanner of this repository should find one."""
    return (alphabet * (number // len(alphabet) + 1))[:number]


HEX = "0a1b2c3d4e5f6789"
PEM = f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{letters(64)}\n{letters(20)}==\n-----END RSA {'PRIVATE'} KEY-----"
AWS = "AKIA" + letters(16, "ABCD2345")
JWT = f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(30)}"

# A format → a text with a key of it, and what of it is the key.
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "aws_key": [(f"using {AWS} now", AWS)],
    "aws_secret_key": [
        (f"aws_secret_access_key = {letters(40)}", letters(40)),
        (f"{{'SecretAccessKey': '{letters(40)}'}}", letters(40)),
        (f"aws_secret_access_key = {letters(20)}\\/{letters(19)}", letters(19)),
    ],
    "aws_session_token": [(f'"SessionToken": "{letters(100)}=="', letters(100))],
    "gcp_api_key": [(f"key={'AI'}za{letters(35)}", f"za{letters(35)}")],
    "gcp_access_token": [(f"token ya29.{letters(60)}", letters(60))],
    "gcp_client_secret": [(f"GOCSPX-{letters(28)}", letters(28))],
    "azure_account_key": [(f"AccountName=x;AccountKey={letters(86)}==;EndpointSuffix=y", letters(86))],
    "azure_client_secret": [(f"abc8Q~{letters(33)}", letters(33))],
    "github_token": [(f"ghp_{letters(36)}", letters(36)), (f"github_pat_{letters(60)}", letters(60))],
    "gitlab_token": [(f"glpat-{letters(20)}", letters(20))],
    "slack_token": [(f"xoxb-{letters(30)}", letters(30)), (f"xapp-1-{letters(30)}", letters(30))],
    "slack_webhook": [
        (f"https://hooks.slack.com/services/T0/B0/{letters(24)}", letters(24)),
        (f"https:\\/\\/hooks.slack.com\\/services\\/T0\\/B0\\/{letters(24)}", letters(24)),
    ],
    "jwt": [(f"got {JWT}", JWT)],
    "private_key": [
        (f"key:\n{PEM}\nend", letters(64)),
        (json.dumps({"key": PEM}), letters(64)),
        (PEM[:60], letters(20)),
        (f"data: {base64.b64encode(PEM.encode()).decode()}", base64.b64encode(PEM.encode()).decode()[40:]),
    ],
    "age_key": [(f"AGE-SECRET-KEY-1{letters(58, 'ABC23')}", letters(58, "ABC23"))],
    "url_password": [
        ("postgresql+psycopg://alice:sw0rdfish@db:5432/x", "sw0rdfish"),
        ("redis://:sw0rdfish@cache", "sw0rdfish"),
        ("mysql:\\/\\/etl:sw0rdfish@db", "sw0rdfish"),
        ("amqp://a:sw0rd@fish@mq/", "sw0rd@fish"),
    ],
    "url_token": [
        (f"GET /x?page=2&access_token={letters(20)}&y=1", letters(20)),
        (f"https://s3/x?X-Amz-Signature={letters(64, HEX)}", letters(64, HEX)),
    ],
    "authorization_header": [
        (f"Authorization: Basic {letters(20)}==", letters(20)),
        (f"{{'authorization': 'Bearer {letters(30)}'}}", letters(30)),
        (f"-H 'Bearer {letters(30)}'", letters(30)),
    ],
    "api_key_header": [(f"{{'DD-API-KEY': '{letters(32, HEX)}'}}", letters(32, HEX))],
    "environment_variable": [
        (f"WANDB_API_KEY={letters(40, HEX)}", letters(40, HEX)),
        (f"environ({{'DB_PASSWORD': '{letters(12)}'}})", letters(12)),
    ],
    "zenml_key": [(f"ZENKEY_{letters(60)}", letters(60)), (f"ZENPROKEY_{letters(60)}", letters(60))],
    "openai_key": [(f"sk-{letters(48)}", letters(48)), (f"sk-proj-{letters(60)}", letters(60))],
    "anthropic_key": [(f"sk-ant-api03-{letters(90)}", letters(90))],
    "huggingface_token": [(f"hf_{letters(34)}", letters(34))],
    "databricks_token": [(f"dapi{letters(32, HEX)}-2", letters(32, HEX))],
    "stripe_key": [(f"sk_live_{letters(24)}", letters(24))],
    "npm_token": [(f"npm_{letters(36)}", letters(36))],
    "pypi_token": [(f"pypi-{letters(80)}", letters(80))],
    "docker_token": [(f"dckr_pat_{letters(27)}", letters(27))],
    "grafana_token": [(f"glsa_{letters(32)}_{letters(8, HEX)}", letters(32))],
    "vault_token": [(f"hvs.{letters(24)}", letters(24))],
    "terraform_token": [(f"{letters(14)}.atlasv1.{letters(67)}", letters(67))],
    "sendgrid_key": [(f"SG.{letters(22)}.{letters(43)}", letters(43))],
    "mailchimp_key": [(f"{letters(32, HEX)}-us12", letters(32, HEX))],
    "telegram_token": [(f"1234567890:{letters(35)}", letters(35))],
    "digitalocean_token": [(f"dop_v1_{letters(64, HEX)}", letters(64, HEX))],
    "atlassian_token": [(f"ATATT3xFfGF0{letters(100)}", letters(100))],
    "linear_key": [(f"lin_api_{letters(40)}", letters(40))],
    "notion_token": [(f"ntn_{letters(46)}", letters(46))],
    "shopify_token": [(f"shpat_{letters(32, HEX)}", letters(32, HEX))],
    "newrelic_key": [(f"NRAK-{letters(27, 'ABC123')}", letters(27, "ABC123"))],
    "sentry_token": [(f"sntrys_{letters(60)}", letters(60))],
    "postman_key": [(f"PMAK-{letters(24, HEX)}-{letters(34, HEX)}", letters(34, HEX))],
    "planetscale_token": [(f"pscale_tkn_{letters(43)}", letters(43))],
}

HARMLESS = [
    "epoch 3: 100%|██████████| 469/469 [00:12<00:00, 38.2it/s, loss=0.123, num_tokens=4096]",
    "see https://docs.zenml.io/how-to?page=2#section or ssh://host:22/path",
    f"run e843ee92-10a0-4a57-a6fd-f7946f68273f of pipeline train, sha256:{letters(64, HEX)}",
    "loading /usr/lib/python3.11/site-packages/torch/nn/modules/module.py:1511",
    "token: 123, password: required, secret: true, EOS_TOKEN='<|endoftext|>'",
    "http://localhost:4873/@scope/package and user@example.com",
    "task-sk-1 eyJ is no token, AKIA neither",
]


def redactor(secrets: KnownSecrets | None = None, **settings: Any) -> Redactor:
    return Redactor(RedactSettings(**settings), secrets or KnownSecrets())


def step(*values: str, **settings: Any) -> Redact:
    secrets = KnownSecrets()
    for value in values:
        secrets.note("a secret", value)
    return Redact(RedactSettings(**settings), secrets)


def process(step: Redact, events: list[LogEvent]) -> tuple[list[LogEvent], Counter[str]]:
    batch = Processed(list(events))
    step.process(batch)
    return batch.events, batch.redacted


def names_of(event: LogEvent) -> object:
    return event.metadata.get(REDACTED)


# Formats


@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_a_key_of_each_format_is_masked_and_named(name: str) -> None:
    for text, key in EXAMPLES[name]:
        masked, names = redactor().redact(text)
        assert key not in masked
        assert name in names or not {"environment_variable", "jwt"}.isdisjoint(names)
        alone, names = redactor(formats=[name]).redact(text)
        assert key not in alone
        assert names == {name}
        assert f"[redacted:{name}]" in alone
        assert redactor(formats=[name]).redact(alone) == (alone, frozenset())


def test_each_format_has_a_source_and_a_name_of_its_own() -> None:
    assert len({one.name for one in FORMATS}) == len(FORMATS)
    assert all(one.source.startswith("https://") for one in FORMATS)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text: str) -> None:
    assert redactor().redact(text) == (text, frozenset())


def test_only_the_secret_part_of_a_match_is_masked() -> None:
    masked, _ = redactor().redact("connect to mysql://alice:sw0rdfish@db:3306/x?a=1")
    assert masked == "connect to mysql://alice:[redacted:url_password]@db:3306/x?a=1"


@pytest.mark.parametrize("value", ["***", "[redacted:url_password]"])
def test_what_is_masked_already_is_not_masked_again(value: str) -> None:
    text = f"mysql://alice:{value}@db"
    assert redactor().redact(text) == (text, frozenset())


# Secrets

PASSWORD = 'p"ä/ss w\\örd+9&x'


@pytest.mark.parametrize(
    "form",
    [
        PASSWORD,
        json.dumps({"password": PASSWORD}),
        json.dumps({"password": PASSWORD}, ensure_ascii=False),
        repr({"password": PASSWORD}),
        # As pandas writes it.
        json.dumps({"password": PASSWORD}).replace("/", "\\/"),
        str(PASSWORD.encode()),
        quote(PASSWORD, safe=""),
        re.sub("%..", lambda found: found[0].lower(), quote(PASSWORD, safe="")),
        *(base64.b64encode(f"{'u' * length}:{PASSWORD}".encode()).decode() for length in range(4)),
        *(base64.urlsafe_b64encode(f"{PASSWORD}{'u' * length}".encode()).decode() for length in range(4)),
        f"a{PASSWORD}b",
        PASSWORD[:4] + "\x1b[31m" + PASSWORD[4:9] + "\x1b[0m" + PASSWORD[9:],
    ],
)
def test_a_secret_is_masked_in_all_its_forms(form: str) -> None:
    events, redacted = process(step(PASSWORD), [make_event(f"it is {form}.")])
    assert redacted == {"secret": 1}
    assert "[redacted:secret]" in events[0].message
    assert PASSWORD[4:9] not in events[0].message
    assert base64.b64encode(PASSWORD[4:16].encode())[:8].decode() not in events[0].message


def test_the_lines_of_a_secret_are_masked_each() -> None:
    secret = "first line of it\nsecond line of it\nx"
    events, _ = process(step(secret), make_events(["got first line of it", "  second line of it", "x"]))
    assert [event.message for event in events] == ["got [redacted:secret]", "  [redacted:secret]", "x"]


@pytest.mark.parametrize("value", ["", "x", "\n\n", "a" * (SHORTEST - 1), f" {'a' * (SHORTEST - 1)} "])
def test_a_short_secret_is_ignored_and_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr("composite_logstore.processing.redaction.tell", lambda *arguments: said.append(arguments[2:]))
    secrets = KnownSecrets()
    secrets.note("another", "long enough")
    secrets.note("key 'pin' of secret 'door'", value)
    masks = Redact(RedactSettings(), secrets)
    events, redacted = process(masks, make_events(["xxxxxxxxx aaaaa"]))
    process(masks, events)
    assert (events[0].message, redacted) == ("xxxxxxxxx aaaaa", {})
    assert said == ([("key 'pin' of secret 'door'",)] if value.strip() else [])


def test_a_secret_that_becomes_known_later_is_masked_from_then_on() -> None:
    secrets = KnownSecrets()
    masks = Redact(RedactSettings(), secrets)
    assert process(masks, [make_event("hunter2!")])[1] == {}
    secrets.note("a secret", "hunter2!")
    assert process(masks, [make_event("hunter2!")])[0][0].message == "[redacted:secret]"


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that have been searched each by itself."""
    texts: list[str] = []
    redact = Redactor.redact

    def record(redactor: Redactor, text: str) -> tuple[str, frozenset[str]]:
        texts.append(text)
        return redact(redactor, text)

    monkeypatch.setattr(Redactor, "redact", record)
    return texts


def test_the_attributes_of_a_stream_are_searched_once_until_they_or_the_secrets_change(searched: list[str]) -> None:
    secrets = KnownSecrets()
    masks = Redact(RedactSettings(), secrets)
    stream = make_stream(note="hunter2! sesame!")
    for secret, name in (("", "train"), ("hunter2!", "train"), ("", "hunter2!"), ("sesame!", "hunter2!")):
        secrets.note("a secret", secret)
        stream.metadata["zenml.pipeline.name"] = name
        searched.clear()
        shown = [process(masks, [event])[0][0].stream for event in make_events(["one", "two", "three"], stream)]
        assert searched.count(stream.metadata["note"]) == 1
        expected = {key: redactor(secrets).redact(value)[0] for key, value in stream.attributes.items()}
        assert [one.attributes for one in shown] == [expected] * 3
    assert set(expected.values()) >= {"[redacted:secret]", "[redacted:secret] [redacted:secret]"}


def test_secrets_are_not_masked_if_the_settings_say_so() -> None:
    assert process(step("hunter2!", secrets=False), [make_event("hunter2!")])[1] == {}


def test_the_secrets_are_bounded_and_shown_nowhere() -> None:
    secrets = KnownSecrets()
    for number in range(MOST + 10):
        secrets.note(f"secret {number}", f"value{number:06}")
    assert len(secrets.forms) < 2 * MOST
    assert secrets.ignored
    assert "value" not in repr(secrets)
    secrets.note("not a text", 17)
    masked, names = redactor(secrets).redact("a value000000 b")
    assert (masked, names) == ("a [redacted:secret] b", {"secret"})


def test_a_variable_that_is_no_unicode_is_masked_as_an_event_shows_it(
    fresh: KnownSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = os.fsdecode(b"abc\xffdefgh")
    monkeypatch.setenv("ZENML_DOOR_TOKEN", value)
    known_secrets.watch()
    event = make_event(text_of(f"it is {value}"))
    assert process(Redact(RedactSettings(), fresh), [event])[0][0].message == "it is [redacted:secret]"


@pytest.mark.parametrize(
    "value",
    [
        "begin of file\n" + "a" * 2_000_000,
        "begin of file\n" + "\n".join(f"line {number:06}" for number in range(2 * MOST)),
    ],
    ids=["one long line", "many lines"],
)
def test_the_forms_of_one_secret_are_bounded_and_what_is_not_masked_is_named(value: str) -> None:
    secrets = KnownSecrets()
    secrets.note("key 'file' of secret 'door'", value)
    assert list(secrets.ignored) == ["key 'file' of secret 'door'"]
    assert len(secrets.forms) <= MOST
    assert max(map(len, secrets.forms)) <= LONGEST
    assert redactor(secrets).redact("the begin of file")[0] == "the [redacted:secret]"


def test_a_single_line_that_is_too_long_is_named() -> None:
    secrets = KnownSecrets()
    secrets.note("key 'file' of secret 'door'", "a" * (LONGEST + 1))
    assert list(secrets.ignored) == ["key 'file' of secret 'door'"]


def test_a_coloured_text_takes_little_more_memory_than_the_text() -> None:
    text = "\x1b[1m" + "some words " * 100_000 + f"{AWS[:5]}\x1b[0m{AWS[5:]} and\x1b[2m more"
    tracemalloc.start()
    try:
        masked, _ = redactor().redact(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert masked.endswith("words [redacted:aws_key] and\x1b[2m more")
    assert most < 10 * len(text)


# Own patterns


def own(pattern: str, **more: str) -> dict[str, Any]:
    return {"patterns": [{"name": "own", "pattern": pattern, **more}], "formats": []}


@pytest.mark.parametrize(
    ("pattern", "more", "text", "masked"),
    [
        (r"\d{4}-\d{4}", {}, "card 1234-5678!", "card [redacted:own]!"),
        (r"\d{4}-\d{4}", {"replacement": "#"}, "card 1234-5678!", "card #!"),
        (r"\d{4}-\d{4}", {"replacement": r"\1$1"}, "card 1234-5678!", r"card \1$1!"),
        (r"user=(?P<secret>\w+)", {"replacement": "X"}, "user=anna id", "user=X id"),
        (r"(?i)anna", {"replacement": "_"}, "Anna ANNA b", "_ _ b"),
        (r"^\d+$", {}, "123", "[redacted:own]"),
        (r"^\d+$", {}, "x 123", "x 123"),
        (r"ä+", {}, "x äää y", "x [redacted:own] y"),
    ],
)
def test_an_own_pattern_is_masked(pattern: str, more: dict[str, str], text: str, masked: str) -> None:
    events, _ = process(step(**own(pattern, **more)), make_events(["before", text, "after"]))
    assert [event.message for event in events] == ["before", masked, "after"]


def test_overlapping_matches_are_masked_as_one_and_all_are_named() -> None:
    patterns = [{"name": "left", "pattern": "abcd"}, {"name": "right", "pattern": "cdef", "replacement": "R"}]
    masked, names = redactor(patterns=patterns, formats=[]).redact("xabcdefx cdef")
    assert (masked, names) == ("x[redacted:left]x R", {"left", "right"})


def test_what_remains_beside_a_masked_part_is_no_secret() -> None:
    masks = step("hunter2!", **own("-+", replacement="t"))
    assert "hunter2!" not in process(masks, [make_event("hun--er2!")])[0][0].message


@pytest.mark.parametrize(
    ("section", "field", "said"),
    [
        (own("abc(de"), "redact.patterns.0.pattern", "position 4"),
        (own("a(?<=b)"), "redact.patterns.0.pattern", "position 2"),
        (own("a*"), "redact.patterns.0.pattern", "empty"),
        (own("a", replacement=""), "redact.patterns.0.replacement", "empty"),
        (own("x" * 100_000), "redact.patterns.0.pattern", "characters"),
        ({"patterns": [{"name": "aws_key", "pattern": "x"}]}, "redact.patterns", "aws_key"),
        ({"patterns": [{"name": "a", "pattern": "x"}] * 2}, "redact.patterns", "'a'"),
        ({"patterns": [{"name": "A b", "pattern": "x"}]}, "redact.patterns.0.name", ""),
        ({"patterns": [{"name": "a"}]}, "redact.patterns.0.pattern", "required"),
        ({"formats": ["aws_keys"]}, "redact.formats", "aws_key"),
        ({"formats": "some"}, "redact.formats", "all"),
        ({"secrets": False, "formats": []}, "redact", "leave"),
        ({"secret": True}, "redact.secret", "keys of 'redact' are: secrets,"),
        ({"patterns": [{"nam": "a"}]}, "redact.patterns.0.nam", "keys of 'redact.patterns.0' are: name,"),
    ],
)
def test_a_mistake_names_the_field_and_the_fix(section: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(ValueError, match="child 'a'") as error:
        parse_child(1, {"name": "a", "type": "otlp", "endpoint": "http://localhost:4318", "redact": section})
    assert f"'{field}'" in str(error.value)
    assert said in str(error.value)


def test_an_expression_that_would_backtrack_ends() -> None:
    text = "a" * 5_000
    assert redactor(**own("(a+)+(a+)+b")).redact(text) == (text, frozenset())


@pytest.mark.parametrize("settings", [own("x"), own("x.*y|x"), {}])
def test_very_many_matches_mask_the_rest_of_a_text(settings: dict[str, Any]) -> None:
    secrets = KnownSecrets()
    secrets.note("a secret", "xxxxxx")
    masked, _ = redactor(secrets, **settings).redact("x" * 20_000 + " rest")
    assert len(masked) < 30_000
    assert "x" not in masked
    assert "rest" not in masked


# Events


def everywhere(secret: str) -> LogEvent:
    """Return an event with a secret in each of its texts."""
    stream = make_stream(**{"zenml.pipeline.name": f"train {secret}"})
    event = make_event(f"message {secret}", stream)
    return event._replace(
        exception=ExceptionInfo(f"Error{secret}", f"is {secret}", f"Traceback\n  {secret}"),
        attributes={
            f"name {secret}": 1,
            "nested": {"list": [1, None, {secret: f"x{secret}"}]},
            "log.record.uid": event.uid,
        },
        metadata={"extra": secret},
        logger_name=f"train.{secret}",
        file=f"/{secret}.py",
        function=f"f{secret}",
    )


def test_every_text_of_an_event_is_masked_and_its_identity_stays() -> None:
    event = everywhere("hunter2!")
    (masked,), redacted = process(step("hunter2!"), [event])
    assert redacted == {"secret": 1}
    assert names_of(masked) == ["secret"]
    assert "hunter2!" not in repr((masked, masked.stream.attributes, masked.details))
    assert masked.identity == event.identity
    assert masked.stream.id == event.stream.id
    assert masked.stream.attributes["zenml.log.id"] == str(event.stream.id)
    assert masked.attributes["log.record.uid"] == event.uid
    assert (masked.time_unix_nano, masked.level, masked.line, masked.trace) == (
        event.time_unix_nano,
        event.level,
        event.line,
        event.trace,
    )
    assert "hunter2!" in event.message
    assert "hunter2!" in str(event.stream.attributes)


def test_numbers_and_names_are_masked_without_losing_an_attribute() -> None:
    event = make_event()._replace(attributes={"a12345678": 1, "a87654321": 2, "pin": 12345678, "n": 7})
    (masked,), _ = process(step("12345678", "87654321"), [event])
    assert len(masked.attributes) == 4
    assert masked.attributes["n"] == 7
    assert "12345678" not in repr(masked.attributes)


def test_ids_are_never_masked() -> None:
    pattern = r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{15}"
    stream = make_stream(**{"zenml.pipeline.run.id": str(uuid4()), "some.id": "01234567-not-an-id-0123456789abcdef012"})
    stream.metadata["card.id"] = 4_111_222_233_334_444
    event = make_event(f"run {uuid4()}", stream)._replace(attributes={"zenml.log.writer": "0123456789abcde"})
    (masked,), _ = process(step(**own(pattern), secrets=False), [event])
    assert masked.message == "run [redacted:own]"
    assert masked.identity == event.identity
    assert masked.attributes == event.attributes
    attributes = stream.attributes
    assert masked.stream.attributes == attributes | {
        name: masked.stream.attributes[name] for name in ("some.id", "card.id")
    }
    assert masked.stream.attributes["some.id"] != attributes["some.id"]
    assert masked.stream.attributes["card.id"] != attributes["card.id"]


def test_an_event_without_a_secret_is_the_same_object() -> None:
    events = make_events(["hello", *HARMLESS], attributes={"a": 1})
    processed, redacted = process(step("hunter2!"), events)
    assert all(one is other for one, other in zip(processed, events, strict=True))
    assert not redacted


def test_names_that_an_event_has_already_stay() -> None:
    event = make_event(f"see {AWS}")._replace(metadata={REDACTED: ["slack_token"]})
    assert names_of(process(step(), [event])[0][0]) == ["aws_key", "slack_token"]


def test_an_event_counts_once_for_each_name() -> None:
    _, redacted = process(step("hunter2!"), make_events([f"{AWS} {AWS}", f"hunter2! {AWS}", "nothing"]))
    assert redacted == {"aws_key": 2, "secret": 1}


# Private keys, line by line


def masking(**settings: Any) -> Processor:
    return make_child("a", redact={"secrets": False}, **settings).create_processor()


def test_a_private_key_is_masked_line_by_line_however_it_is_batched() -> None:
    lines = ["begin", *PEM.splitlines(), "finished", letters(40)]
    events = make_events(lines)
    masks = masking()
    whole = masks.process(events).events
    again = [event for size in range(len(events)) for event in masks.process(events[size : size + 1]).events]
    for processed in (whole, again):
        assert [event.message for event in processed] == [
            "begin",
            *["[redacted:private_key]"] * 3,
            lines[4],
            "finished",
            letters(40),
        ]


def test_a_retry_masks_the_rest_of_a_private_key_though_another_one_follows() -> None:
    events = make_events([*PEM.splitlines(), *PEM.splitlines()])
    masks = masking()
    masks.process(events[:2])
    tries = [[event.message for event in masks.process(events[2:]).events] for _ in range(2)]
    assert tries[0] == tries[1]
    assert tries[0][0] == "[redacted:private_key]"


def test_other_loggers_and_streams_may_print_words_beside_a_private_key() -> None:
    begin = PEM.splitlines()[0]
    stream = make_stream()
    masks = masking()
    masks.process(make_events([begin], stream))
    others = make_events(["word"], stream, first=1, logger_name="other") + make_events(["word"], first=1)
    assert [event.message for event in masks.process(others).events] == ["word", "word"]
    assert masks.process(make_events(["not a line", "word"], stream, first=1)).redacted == {"private_key": 1}
    late = make_events(["word"], stream, first=MOST_LINES + 1)
    assert masks.process(late).redacted == {}


def test_after_a_private_key_other_events_are_not_searched_one_by_one(searched: list[str]) -> None:
    masks = masking()
    stream = make_stream()
    masks.process(make_events(PEM.splitlines(), stream))
    searched.clear()
    masks.process(make_events(["a line", "another"], stream, first=100))
    assert not {"a line", "another"} & set(searched)


@pytest.mark.parametrize(
    "settings",
    [{"drop": [{"message": "BEGIN"}]}, {"collapse_repeats": {}}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_lines_of_a_private_key_are_masked_whatever_rules_do_to_its_first_line(settings: dict[str, Any]) -> None:
    stream = make_stream()
    lines = PEM.splitlines()
    other = [line.swapcase() if "-----" not in line else line for line in lines]
    processor = masking(**settings)
    received: list[LogEvent] = []
    for number, message in enumerate([*lines, "between", *other, *other]):
        batch = processor.process(make_events([message], stream, first=number))
        processor.commit(batch)
        received += batch.events
    received += processor.last_of(stream)
    assert len(received) > 3
    for secret in {*lines[1:-1], *other[1:-1]}:
        assert secret not in repr(received)
    assert "between" in [event.message for event in received]
    assert all(set(event.metadata) <= {REDACTED, "zenml.log.repeated", BACKFILLED} for event in received)


def test_settings_survive_being_stored() -> None:
    settings = RedactSettings(formats=["aws_key"], patterns=[{"name": "a", "pattern": "x"}])  # type: ignore[list-item]
    assert RedactSettings(**settings.model_dump(mode="json", exclude_unset=True)) == settings
    with pytest.raises(ValidationError):
        RedactSettings(patterns=[{"name": f"n{n}", "pattern": "x"} for n in range(101)])  # type: ignore[misc]


# Which secrets a process knows


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[KnownSecrets]:
    """Have a process that knows no secret and watches none."""
    secrets = KnownSecrets()
    monkeypatch.setattr(known_secrets, "known_secrets", secrets)
    monkeypatch.delenv(known_secrets.VARIABLE, raising=False)
    values = SecretResponse.secret_values
    known_secrets.watch.cache_clear()
    yield secrets
    monkeypatch.setattr(SecretResponse, "secret_values", values)
    known_secrets.watch.cache_clear()


def secret_of(**values: str) -> SecretResponse:
    hidden = {key: SecretStr(value) for key, value in values.items()}
    body = SecretResponseBody(created=datetime.min, updated=datetime.min, private=False, values=hidden)
    return SecretResponse(id=uuid4(), name="door", body=body, metadata=SecretResponseMetadata())


def test_every_secret_that_is_resolved_is_known_and_named_for_further_processes(
    fresh: KnownSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_secrets.watch()
    known_secrets.watch()
    assert secret_of(API="first value", PIN="1").secret_values == {"API": "first value", "PIN": "1"}
    assert "first value" in fresh.forms
    assert list(fresh.ignored) == ["key 'PIN' of secret 'door'"]
    assert os.environ[known_secrets.VARIABLE] == "API,PIN"
    secret_of(API="second value").secret_values  # noqa: B018
    assert os.environ[known_secrets.VARIABLE] == "API,PIN"
    assert "second value" in fresh.forms
    # A process that the step starts.
    monkeypatch.setenv("API", "inherited value")
    monkeypatch.setenv("ZENML_STORE_API_TOKEN", "token of the store")
    monkeypatch.setenv("ZENML_DEBUG", "no secret at all")
    known_secrets.watch.cache_clear()
    known_secrets.watch()
    assert {"inherited value", "token of the store"} <= set(fresh.forms)
    assert "no secret at all" not in fresh.forms


def test_the_keys_in_settings_are_known_but_no_references(fresh: KnownSecrets) -> None:
    live = {"name": "live", "type": "datadog", "api_key": "k3y-of-datadog", "application_key": "{{secret.key}}"}
    masks = {"name": "a", "type": "artifact", "redact": {}}
    CompositeLogStoreConfig(primary="a", children=[{**masks, "redact": None}, live]).watch_secrets()
    CompositeLogStoreConfig(primary="a", children=[{**masks, "redact": {"secrets": False}}, live]).watch_secrets()
    assert not fresh.forms
    CompositeLogStoreConfig(primary="a", children=[masks, live]).watch_secrets()
    assert "k3y-of-datadog" in fresh.forms
    assert not any("secret.key" in form for form in fresh.forms)


def test_the_page_lists_each_format_with_its_source() -> None:
    page = Path("docs/redaction.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| .*\(\[source\]\((.*)\)\) \|$", page, re.MULTILINE) == [
        (one.name, one.source) for one in FORMATS
    ]


class Zenml:
    """Stands where ZenML's client is: one step with two secrets, of which one was deleted."""

    asked: ClassVar[list[str]] = []

    def get_run_step(self, id: UUID) -> Any:
        self.asked.append(str(id))
        if id.int == 0:
            raise RuntimeError("unreachable")
        return SimpleNamespace(config=SimpleNamespace(secrets=["gone", "door"]))

    def get_secret(self, name: str) -> SecretResponse:
        if name == "gone":
            raise KeyError(name)
        return secret_of(key="value of the door")


def test_another_process_asks_once_for_the_secrets_of_the_step_whose_events_it_delivers(
    fresh: KnownSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zenml.client.Client", Zenml)
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(known_secrets, "tell", lambda *arguments: said.append(arguments[2:]))
    known_secrets._resolve_secrets.cache_clear()
    Zenml.asked.clear()
    step_id = str(uuid4())
    own, other, silent = (make_stream(**{"zenml.step.run.id": id}) for id in (step_id, step_id, str(UUID(int=0))))
    fresh.own(own.id)
    masks = Redact(RedactSettings(), fresh)
    message = "it is value of the door"
    assert process(Redact(RedactSettings(secrets=False), fresh), make_events([message], other))[1] == {}
    assert process(masks, make_events([message], own))[1] == {}
    assert not Zenml.asked
    for _ in range(2):
        assert process(masks, make_events([message], other))[1] == {"secret": 1}
    assert Zenml.asked == [step_id]
    assert not said
    for _ in range(2):
        assert process(masks, make_events([message, "hello"], silent))[1] == {"secret": 1}
    assert [arguments[:2] for arguments in said] == [("step", str(UUID(int=0)))]


@pytest.mark.parametrize("words", [None, "Cannot connect to the ZenML server"], ids=["as it is", "in words"])
def test_while_zenml_cannot_be_reached_the_events_of_another_process_wait(
    words: str | None, fresh: KnownSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unreachable(*_: object) -> None:
        asked.append(1)
        try:
            raise ConnectionRefusedError("connection refused")
        except OSError as error:
            if words is None:
                raise
            raise RuntimeError(words) from error

    monkeypatch.setattr("zenml.client.Client", Zenml)
    monkeypatch.setattr(known_secrets, "_unreached", None)
    known_secrets._resolve_secrets.cache_clear()
    events = make_events(["it is value of the door"], make_stream(**{"zenml.step.run.id": str(uuid4())}))
    with SimulatedClock() as clock:
        with monkeypatch.context() as patch:
            patch.setattr(Zenml, "get_run_step", unreachable)
            # Whichever child it is, and however often it retries, ZenML is asked now and then.
            for expected in (1, 1, 2):
                masks = Redact(RedactSettings(), fresh)
                with pytest.raises(RetryableError):
                    process(masks, events)
                assert len(asked) == expected
                clock.advance(known_secrets.ASK_AGAIN_SECONDS / 2)
        with pytest.raises(RetryableError):
            process(masks, events)
        clock.advance(known_secrets.ASK_AGAIN_SECONDS)
        assert process(masks, events)[1] == {"secret": 1}


def test_a_stream_that_is_described_late_has_its_secrets_asked_for_then(
    fresh: KnownSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zenml.client.Client", Zenml)
    known_secrets._resolve_secrets.cache_clear()
    stream = make_stream()
    masks = Redact(RedactSettings(), fresh)
    message = "it is value of the door"
    assert process(masks, make_events([message], stream))[1] == {}
    stream.metadata = {"zenml.step.run.id": str(uuid4())}
    assert process(masks, make_events([message], stream))[1] == {"secret": 1}


# Deliveries


class Quoting(SimulatedBackend):
    """Repeats what it gets in its answers: rejects the first event of each stream, and fails with the next."""

    def export(self, batch: Sequence[LogEvent]) -> int:
        if self.exports == 0:
            self.exports += 1
            raise RejectedError(f"bad event: {batch[0].message} {batch[0].stream.attributes}", count=1)
        if self.exports == 1:
            self.exports += 1
            raise RetryableError(f"cannot take {batch}")
        return super().export(batch)


def test_one_child_gets_masked_events_and_another_the_original(caplog: pytest.LogCaptureFixture) -> None:
    with SimulatedClock() as clock:
        archive, live = SimulatedBackend(), Quoting()
        store = make_store(make_child("archive", archive), make_child("live", live, redact={}))
        logs = make_logs(store)
        origin = store.register_origin(str(logs.id), logs, {"zenml.pipeline.name": f"train {AWS}"})
        for number in range(3):
            store.emit(origin, logging.LogRecord("train", 20, "/train.py", 1, f"{number} {AWS}", (), None))
            clock.advance(30)
        store.deregister_origin(origin)
        clock.advance(1)
        stats = store.stats()
        assert_accounts_add_up(stats)
    assert archive.messages == [f"{number} {AWS}" for number in range(3)]
    assert live.messages == [f"{number} [redacted:aws_key]" for number in (1, 2)]
    assert AWS not in repr([(event, event.stream.attributes) for event in live.received])
    assert (stats["live"]["redacted"], stats["archive"]["redacted"]) == ({"aws_key": 3}, {})
    assert AWS not in repr(stats)
    assert AWS not in caplog.text
    assert [stream.id for stream in live.ended] == [logs.id]


def test_a_backfill_stops_while_zenml_cannot_be_asked_for_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream(**{"zenml.step.run.id": str(uuid4())})
    source, target = archive("a", tmp_path), archive("b", tmp_path).model_copy(update={"redact": RedactSettings()})
    write(source, make_events(["one", "two"], stream))
    monkeypatch.setattr(known_secrets, "_unreached", known_secrets._Unreached(inf, "connection refused"))
    with pytest.raises(BackfillStoppedError, match="connection refused"):
        copy(source, target, stream, tmp_path)
    assert compare(testing.make_logs(stream), "", [open_source(source), open_source(target)]).children["b"].events == 0


def test_backfill_masks_what_it_copies(tmp_path: Path) -> None:
    stream = make_stream()
    source, target = archive("a", tmp_path), archive("b", tmp_path).model_copy(update={"redact": RedactSettings()})
    write(source, make_events(["harmless", f"use {AWS}"], stream))
    assert copy(source, target, stream, tmp_path).copied == 2
    assert AWS in contents(source, stream).decode()
    assert AWS not in contents(target, stream).decode()
    assert '"zenml.log.redacted":["aws_key"]' in contents(target, stream).decode()
    result = compare(testing.make_logs(stream), "", [open_source(source), open_source(target)])
    assert [(child.missing, child.different) for child in result.children.values()] == [(0, 0), (0, 0)]
