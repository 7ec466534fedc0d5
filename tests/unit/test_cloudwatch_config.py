"""The settings of a `cloudwatch` child."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from composite_logstore import UnavailableError
from composite_logstore_cloudwatch.config import CloudwatchChildConfig

DAY = 24 * 3600


def make(**settings: Any) -> CloudwatchChildConfig:
    return CloudwatchChildConfig(**{"name": "aws", "type": "cloudwatch", **settings})


def test_nothing_is_required() -> None:
    config = make()
    assert (config.log_group, config.log_stream_prefix, config.region) == ("zenml", "", None)
    assert config.batch_size <= config.max_batch_size == 10_000
    assert config.requirements == {"composite-logstore[cloudwatch]"}
    assert make(connector="aws").requirements == {"composite-logstore[cloudwatch]", "aws-profile-manager"}


@pytest.mark.parametrize(("days", "oldest"), [(None, 14), (1, 1), (7, 7), (14, 14), (30, 14), (3653, 14)])
def test_the_oldest_event_depends_on_the_retention(days: int | None, oldest: int) -> None:
    child = make(retention_days=days)
    assert child.oldest_seconds == oldest * DAY
    assert child.known_losses is None if days is None else f"{days} days" in str(child.known_losses)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"region": "Frankfurt"}, "such as 'eu-central-1'"),
        ({"region": "eu-central-1a"}, "such as 'eu-central-1'"),
        ({"log_group": "arn:aws:logs:eu-central-1:1:log-group:a"}, "not its ARN"),
        ({"log_group": "two words"}, "not its ARN"),
        ({"log_group": ""}, "log_group"),
        ({"log_group": "x" * 513}, "log_group"),
        ({"log_stream_prefix": "a:b"}, "leave out ':'"),
        ({"log_stream_prefix": "a*"}, "leave out ':'"),
        ({"log_stream_prefix": "a\nb"}, "control characters"),
        ({"log_stream_prefix": "x" * 477}, "log_stream_prefix"),
        ({"retention_days": 2}, "set one of 1, 3, 5"),
        ({"retention_days": 0}, "set one of 1, 3, 5"),
        ({"endpoint_url": "logs.eu-central-1.amazonaws.com"}, "begin it with 'https://'"),
        ({"endpoint_url": "https://user:password@127.0.0.1"}, "a user or a password"),
        ({"endpoint_url": "https://127.0.0.1:port"}, "begin it with 'https://'"),
        ({"endpoint_url": "https://127.0.0.1/?a=b"}, "leave out what follows"),
        ({"connector": ""}, "connector"),
        ({"max_export_batch_size": 10_001}, "at most 10000"),
        ({"aws_secret_access_key": "secret"}, "aws_secret_access_key"),
    ],
)
def test_mistakes_are_named_with_the_fix_and_without_the_value(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**settings)
    assert fix in str(caught.value)
    assert "password" not in str(caught.value).replace("a user or a password", "")


@pytest.mark.parametrize(
    "settings",
    [
        {"region": "us-gov-east-1"},
        {"region": "cn-north-1"},
        {"log_group": "/zenml/team-a_1.b#c"},
        {"log_stream_prefix": "zenml/"},
        {"log_stream_prefix": "x" * 476},
        {"endpoint_url": "http://127.0.0.1:4566"},
    ],
)
def test_names_that_aws_allows(settings: dict[str, Any]) -> None:
    assert make(**settings).model_dump(exclude_unset=True).items() >= settings.items()


def test_children_of_one_group_and_prefix_write_to_one_place() -> None:
    assert make().places(None) == make(name="other").places(None)
    assert make().places(None) != make(log_stream_prefix="b/").places(None)
    assert make().places(None) != make(region="eu-west-1").places(None)


@pytest.mark.parametrize("package", ["boto3", "aws_profile_manager"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "composite_logstore_cloudwatch.config.find_spec", lambda name: None if name == package else found("json")
    )
    child = make(connector="aws")
    fix = {"boto3": r"composite-logstore\[cloudwatch\]", "aws_profile_manager": "aws-profile-manager"}[package]
    with pytest.raises(ValueError, match=fix):
        child.check()
    if package == "boto3":
        for create in (child.create_exporter, child.create_reader):
            with pytest.raises(UnavailableError, match=fix):
                create()


@pytest.mark.deep
def test_settings_import_no_boto3() -> None:
    script = (
        "import sys; from composite_logstore_cloudwatch.config import CloudwatchChildConfig as C;"
        "C(name='aws', type='cloudwatch').check(); sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
