"""The settings of a `datadog` child."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from zenml import __version__

from composite_logstore import UnavailableError
from composite_logstore_datadog.config import DatadogChildConfig
from tests.patience import PATIENCE_SECONDS


def make(**settings: Any) -> DatadogChildConfig:
    return DatadogChildConfig(**{"name": "live", "type": "datadog", "api_key": "test-key", **settings})


def test_only_the_key_is_required() -> None:
    config = make()
    assert config.intake_url == "https://http-intake.logs.datadoghq.com/api/v2/logs"
    assert config.search_url == "https://api.datadoghq.com/api/v2/logs/events/search"
    assert (config.service_name, config.service_version) == ("zenml", __version__)
    assert config.batch_size <= config.max_batch_size == 1000
    assert config.requirements == {"composite-logstore[datadog]"}


def test_urls_follow_the_site_unless_set() -> None:
    config = make(site="us5.datadoghq.com")
    assert config.intake_url == "https://http-intake.logs.us5.datadoghq.com/api/v2/logs"
    assert config.search_url == "https://api.us5.datadoghq.com/api/v2/logs/events/search"
    config = make(endpoint="http://127.0.0.1:8126/in", api_endpoint="http://127.0.0.1:8126/")
    assert config.intake_url == "http://127.0.0.1:8126/in"
    assert config.search_url == "http://127.0.0.1:8126/api/v2/logs/events/search"


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"api_key": " "}, "set it to the key itself"),
        ({"api_key": "not a-key"}, "copy it again"),
        ({"application_key": "two\nlines"}, "copy it again"),
        ({"site": "https://app.datadoghq.eu"}, "without 'https://'"),
        ({"site": "app.datadoghq.eu"}, "without 'app.'"),
        ({"site": "nowhere"}, "such as 'datadoghq.com'"),
        ({"endpoint": "http-intake.logs.datadoghq.eu/api/v2/logs"}, "begin it with 'https://'"),
        ({"endpoint": "https://http-intake.logs.datadoghq.eu:port/"}, "begin it with 'https://'"),
        ({"endpoint": "https://http-intake.logs.datadoghq.eu"}, "add the path"),
        ({"api_endpoint": "ftp://datadoghq.eu"}, "begin it with 'https://'"),
        ({"tags": ["env:prod", "team:a,b"]}, "number 2"),
        ({"tags": ["1:a"]}, "begin it with a letter"),
        ({"tags": ["a" * 201]}, "at most 200"),
        ({"max_export_batch_size": 1001}, "at most 1000"),
    ],
)
def test_mistakes_are_named_with_the_fix_and_without_the_value(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**settings)
    assert fix in str(caught.value)
    for value in settings.values():
        assert repr(value) not in str(caught.value)


def test_references_wait_for_their_values() -> None:
    config = make(
        api_key="{{datadog.api_key}}",
        application_key="{{datadog.application_key}}",
        site="{{datadog.site}}",
        endpoint="{{datadog.endpoint}}",
        api_endpoint="https://{{datadog.host}}",
        tags=["{{datadog.tag}}", "env:{{datadog.environment}}"],
    )
    assert config.api_key.get_secret_value() == "{{datadog.api_key}}"


def test_keys_are_trimmed_and_never_shown() -> None:
    config = make(api_key=" test-key\n", application_key="test-application-key")
    assert config.api_key.get_secret_value() == "test-key"
    assert "test-key" not in repr(config)
    assert "test-application-key" not in str(config)


def test_reading_needs_the_application_key() -> None:
    with pytest.raises(UnavailableError, match="'application_key'"):
        make().create_reader()
    make(application_key="test-application-key").create_reader().close()


def test_sending_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    make().check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("composite_logstore_datadog.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"composite-logstore\[datadog\]"):
        make().check()
    monkeypatch.setitem(sys.modules, "datadog_api_client", None)
    monkeypatch.delitem(sys.modules, "composite_logstore_datadog.exporter", raising=False)
    with pytest.raises(UnavailableError, match=r"composite-logstore\[datadog\]"):
        make().create_exporter()


def test_a_reader_is_created_without_the_extra() -> None:
    program = """
import sys
sys.modules["datadog_api_client"] = None
from composite_logstore_datadog.config import DatadogChildConfig
config = DatadogChildConfig(name="live", type="datadog", api_key="test-key", application_key="test-app-key")
config.create_reader()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_SECONDS)
