"""The settings of an `elasticsearch` child, and of the reader of that name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from composite_logstore_elasticsearch.config import ElasticsearchChildConfig
from composite_logstore_elasticsearch.template import template_for

URL = "https://search.example:9200"


def make(**settings: Any) -> ElasticsearchChildConfig:
    return ElasticsearchChildConfig(**{"name": "live", "type": "elasticsearch", "url": URL, **settings})


def test_only_the_url_is_required() -> None:
    config = make()
    assert (config.index, config.authorization) == ("zenml-logs", {})
    assert config.unreadable is None
    assert config.batch_size <= config.max_batch_size


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"url": "search.example:9200"}, "begin it with 'https://'"),
        ({"url": "ftp://search.example"}, "begin it with 'https://'"),
        ({"url": "https://"}, "begin it with 'https://'"),
        ({"url": "https://search.example:port"}, "begin it with 'https://'"),
        ({"url": "https://me:s3cr3t@search.example"}, "'username' and 'password'"),
        ({"url": "https://search.example/?pretty"}, "leave out what follows"),
        ({"url": "https://search.example/a\n"}, "begin it with 'https://'"),
        ({"index": "Logs"}, "small letters"),
        ({"index": "logs-*"}, "one index"),
        ({"index": "a,b"}, "one index"),
        ({"index": "_all"}, "begin it with a letter"),
        ({"index": "-logs"}, "begin it with a letter"),
        ({"index": ".."}, "begin it with a letter"),
        ({"index": "a/b"}, "one index"),
        ({"index": ""}, "one index"),
        ({"index": "ü" * 200}, "one index"),
        ({"api_key": " "}, "set it to the value itself"),
        ({"api_key": "ApiKey abc"}, "'encoded'"),
        ({"api_key": "a\nb"}, "copy it again"),
        ({"api_key": "schlüssel"}, "'encoded'"),
        ({"username": "me"}, "'password'"),
        ({"password": "s3cr3t"}, "'username'"),
        ({"username": "me:you", "password": "s3cr3t"}, "colon"),
        ({"username": "me", "password": "s3\ncr3t"}, "copy it again"),
        ({"username": "me", "password": "s3cr3t", "api_key": "abc"}, "exclude each other"),
        ({"client_key_file": "key.pem"}, "'client_certificate_file'"),
        ({"url": "http://search.example", "certificate_file": "ca.pem"}, "https://"),
        ({"max_export_batch_size": 5_001}, "at most 5000"),
        ({"indx": "logs"}, "indx"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_the_fix_and_without_secrets(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**settings)
    assert fix in str(caught.value)
    for secret in ("s3cr3t", "abc", "schlüssel"):
        assert secret not in str(caught.value)


def test_a_slash_at_the_end_of_the_url_makes_no_difference() -> None:
    assert make(url=URL + "/").url == URL
    assert make(url=URL + "/behind/a/proxy/").url == URL + "/behind/a/proxy"


def test_references_wait_for_their_values() -> None:
    config = make(username="me", password="{{search.password}}")
    assert config.password is not None
    assert config.password.get_secret_value() == "{{search.password}}"
    assert make(api_key="{{search.key}}").api_key is not None


def test_keys_are_trimmed_and_never_shown() -> None:
    config = make(api_key=" test-key\n")
    assert config.authorization == {"Authorization": "ApiKey test-key"}
    assert "test-key" not in repr(config)
    config = make(username="me", password="test-password")
    assert "test-password" not in str(config)


def test_missing_certificate_files_are_named() -> None:
    make().check()
    with pytest.raises(ValueError, match="'certificate_file'"):
        make(certificate_file="/nowhere/ca.pem").check()


def fields(mappings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, mapping in mappings["properties"].items():
        found[prefix + name] = mapping
        if "properties" in mapping:
            found |= fields(mapping, f"{prefix}{name}.")
    return found


def test_the_template_bounds_the_fields_of_an_index() -> None:
    template = template_for("logs")
    assert template["index_patterns"] == ["logs"]
    mappings = template["template"]["mappings"]
    assert mappings["dynamic"] is False
    found = fields(mappings)
    assert len(found) < 100
    assert found["timestamp_nanos"]["type"] == found["zenml.log.sequence"]["type"] == "long"
    # What ZenML's own store asks for, whatever the index is like.
    for name in ("zenml.log.id", "event_id", "zenml.log.writer"):
        assert found[name]["type"] == found[name]["fields"]["keyword"]["type"] == "keyword"
    assert found["message"]["type"] == "text"
    # Only what ZenML says about a run may add fields.
    assert [name for name, mapping in found.items() if mapping.get("dynamic")] == ["zenml", "zenml.log"]
