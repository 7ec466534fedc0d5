"""Signed requests, without a network: what is sent, where credentials come from, and what no error repeats."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import requests
import urllib3
from requests.structures import CaseInsensitiveDict
from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.exceptions import AuthorizationException, IllegalOperationError

from composite_logstore import AnswerTooLargeError, HttpResponse, UnavailableError
from composite_logstore_cloudwatch import connection as connection_module
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.connection import Connection, ServiceError, UnreachedError, url_of

KEY, SECRET, SESSION = "AKIATESTTESTTEST", "test-secret-access-key", "test-session-token"


class Transport:
    """Stands where the HTTP client is."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.response = HttpResponse(200, CaseInsensitiveDict(), b"{}", None)
        self.error: Exception | None = None

    def request(self, method: str, url: str, **arguments: Any) -> HttpResponse:
        self.requests.append({"method": method, "url": url, **arguments})
        if self.error is not None:
            raise self.error
        return self.response

    def close(self) -> None:
        """Close nothing."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Transport:
    transport = Transport()
    monkeypatch.setattr(connection_module, "HttpClient", lambda **settings: transport)
    return transport


def connect(**settings: Any) -> Connection:
    return Connection(make(**settings))


def make(**settings: Any) -> CloudwatchChildConfig:
    return CloudwatchChildConfig(**{"name": "aws", "type": "cloudwatch", "region": "eu-central-1", **settings})


def answer(transport: Transport, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    transport.response = HttpResponse(status, CaseInsensitiveDict(headers or {}), content, None)


def test_a_request_is_signed_and_holds_no_secret(transport: Transport) -> None:
    assert connect().call("PutLogEvents", {"logGroupName": "zenml"}, 5.0, 1_000) == {}

    sent = transport.requests[0]
    headers = sent["headers"]
    assert (sent["method"], sent["url"]) == ("POST", "https://logs.eu-central-1.amazonaws.com/")
    assert (sent["timeout_seconds"], sent["max_bytes"]) == (5.0, 1_000)
    assert orjson.loads(sent["body"]) == {"logGroupName": "zenml"}
    assert headers["X-Amz-Target"] == "Logs_20140328.PutLogEvents"
    assert headers["Content-Type"] == "application/x-amz-json-1.1"
    assert headers["X-Amz-Security-Token"] == SESSION
    assert f"Credential={KEY}/" in headers["Authorization"]
    assert "/eu-central-1/logs/aws4_request" in headers["Authorization"]
    assert SECRET not in repr(sent)


@pytest.mark.parametrize(
    ("settings", "region", "url"),
    [
        ({}, None, "https://logs.eu-central-1.amazonaws.com/"),
        ({"region": "cn-north-1"}, None, "https://logs.cn-north-1.amazonaws.com.cn/"),
        ({"region": None}, "us-gov-east-1", "https://logs.us-gov-east-1.amazonaws.com/"),
        ({"endpoint_url": "http://127.0.0.1:4566"}, None, "http://127.0.0.1:4566/"),
        ({"endpoint_url": "http://127.0.0.1:4566/"}, "eu-west-1", "http://127.0.0.1:4566/"),
    ],
)
def test_where_requests_go(settings: dict[str, Any], region: str | None, url: str) -> None:
    assert url_of(make(**settings), region) == url


def test_without_a_region_no_host_is_asked() -> None:
    with pytest.raises(UnavailableError, match="'region'"):
        url_of(make(region=None))


def test_region_and_credentials_have_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="'region'"):
        connect(region=None)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert connect(region=None).region == "eu-west-1"
    assert connect().region == "eu-central-1"
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(UnavailableError, match="ProfileNotFound"):
        connect()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnavailableError, match="'connector', or AWS_PROFILE"):
        connect()


def test_nothing_is_logged(transport: Transport, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("botocore.credentials")
    connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert caplog.records == []
    # The logger belongs to the pipeline.
    logger.info("said by others")
    assert [record.message for record in caplog.records] == ["said by others"]


def test_not_even_botocore_s_debugging_shows_a_secret(transport: Transport, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert not [secret for secret in (KEY, SECRET, SESSION) if secret in caplog.text]


@pytest.mark.parametrize(
    ("status", "body", "headers", "code", "seconds"),
    [
        (400, {"__type": "ThrottlingException"}, {}, "ThrottlingException", None),
        (400, {"__type": "com.amazonaws.logs#ThrottlingException"}, {"Retry-After": "7"}, "ThrottlingException", 7.0),
        (400, {}, {"x-amzn-ErrorType": "AccessDeniedException:http://internal/"}, "AccessDeniedException", None),
        (503, b"<html>busy</html>", {"Retry-After": "99999"}, "", None),
        (500, b"", {"Retry-After": "soon"}, "", None),
        (400, [1], {}, "", None),
        (400, {"__type": 7, "message": {"a": 1}}, {}, "", None),
        (400, {"__type": "two words\n"}, {}, "", None),
    ],
)
def test_an_error_is_known_by_its_code(
    transport: Transport, status: int, body: Any, headers: dict[str, str], code: str, seconds: float | None
) -> None:
    answer(transport, status, body, headers)
    with pytest.raises(ServiceError) as caught:
        connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.retry_after_seconds == seconds


def test_no_error_repeats_a_secret(transport: Transport) -> None:
    said = f"the canonical string is {KEY} {SECRET} {SESSION}"
    answer(transport, 400, {"__type": "InvalidParameterException", "message": said})
    with pytest.raises(ServiceError) as caught:
        connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert "canonical string" in caught.value.said
    for secret in (KEY, SECRET, SESSION):
        assert secret not in f"{caught.value} {caught.value.said} {caught.value.why_refused}"
    transport.error = requests.ConnectionError(f"while sending {KEY} {SECRET}")
    with pytest.raises(UnreachedError) as unreached:
        connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert KEY not in str(unreached.value)
    assert unreached.value.__cause__ is None


POOL: Any = SimpleNamespace(host="127.0.0.1", port=1)


@pytest.mark.parametrize(
    ("error", "smaller_may_pass"),
    [
        (
            requests.ConnectionError(
                urllib3.exceptions.MaxRetryError(
                    POOL, "/", reason=urllib3.exceptions.NewConnectionError(POOL, "refused")
                )
            ),
            False,
        ),
        (requests.ConnectTimeout(urllib3.exceptions.ConnectTimeoutError("late")), False),
        (requests.ReadTimeout(urllib3.exceptions.ReadTimeoutError(POOL, "/", "late")), True),
        (
            requests.ConnectionError(urllib3.exceptions.ProtocolError("aborted", ConnectionResetError(104, "reset"))),
            True,
        ),
    ],
)
def test_only_a_request_that_was_connected_may_have_been_too_large(
    transport: Transport, error: Exception, smaller_may_pass: bool
) -> None:
    transport.error = error
    with pytest.raises(UnreachedError) as caught:
        connect().call("PutLogEvents", {}, 5.0, 1_000)
    assert caught.value.smaller_may_pass is smaller_may_pass


def test_a_certificate_that_cannot_be_trusted_is_named(transport: Transport) -> None:
    reason = ssl.SSLCertVerificationError(1, "self-signed certificate")
    reason.verify_message = "self-signed certificate"
    transport.error = requests.exceptions.SSLError(
        urllib3.exceptions.MaxRetryError(POOL, "/", reason=urllib3.exceptions.SSLError(reason))
    )
    with pytest.raises(UnavailableError, match="AWS_CA_BUNDLE"):
        connect().call("PutLogEvents", {}, 5.0, 1_000)


def test_an_answer_that_is_none(transport: Transport) -> None:
    for body in (b"<html>", b"[1]", b"null"):
        answer(transport, 200, body)
        with pytest.raises(UnreachedError, match="no answer of CloudWatch"):
            connect().call("GetLogEvents", {}, 5.0, 1_000)
    transport.response = HttpResponse(200, {}, b"{", "cut")
    with pytest.raises(UnreachedError) as caught:
        connect().call("GetLogEvents", {}, 5.0, 1_000)
    assert caught.value.smaller_may_pass
    transport.response = HttpResponse(200, {}, b"{", "too large")
    with pytest.raises(AnswerTooLargeError):
        connect().call("GetLogEvents", {}, 5.0, 1_000)
    answer(transport, 200, b"")
    assert connect().call("PutRetentionPolicy", {}, 5.0, 1_000) == {}


# Service connectors


class Connector:
    """A client side of ZenML's connector for AWS."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.expired = False

    def connect(self, verify: bool = True) -> Any:
        return self.session

    def has_expired(self) -> bool:
        return self.expired


def test_credentials_of_a_service_connector(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    asked: list[tuple[Any, ...]] = []
    connector = Connector(boto3.Session("AKIAFROMCONNECTOR", "secret-of-connector", region_name="eu-west-3"))

    def client(self: Client, name: str, resource_type: str) -> Connector:
        asked.append((name, resource_type))
        return connector

    monkeypatch.setattr(Client, "get_service_connector_client", client)
    connection = connect(connector="team", region=None)
    assert asked == [("team", "aws-generic")]
    assert connection.region == "eu-west-3"
    connection.call("PutLogEvents", {}, 5.0, 1_000)
    assert "Credential=AKIAFROMCONNECTOR/" in transport.requests[0]["headers"]["Authorization"]
    assert not connection.has_expired
    connector.expired = True
    assert connection.has_expired


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("team"), "zenml service-connector list"),
        (NotImplementedError("not installed: secret"), "aws-profile-manager"),
        (ModuleNotFoundError("aws_profile_manager"), "aws-profile-manager"),
        (AuthorizationException("refused: secret"), "zenml service-connector verify team"),
        (ValueError("secret"), "zenml service-connector verify team"),
    ],
)
def test_a_service_connector_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def client(self: Client, name: str, resource_type: str) -> Connector:
        raise error

    monkeypatch.setattr(Client, "get_service_connector_client", client)
    with pytest.raises(UnavailableError, match=words) as caught:
        connect(connector="team")
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(Client, "get_service_connector_client", lambda self, name, resource_type: Connector("docker"))
    with pytest.raises(UnavailableError, match="aws-generic"):
        connect(connector="team")


def test_on_the_server_the_user_has_to_be_allowed_to_use_the_connector(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from zenml.zen_server.rbac import utils
    from zenml.zen_server.rbac.models import Action

    connector = Connector(boto3.Session("AKIAFROMCONNECTOR", "secret-of-connector"))
    monkeypatch.setenv(ENV_ZENML_SERVER, "true")
    monkeypatch.setattr(Client, "get_service_connector", lambda self, name, allow_name_prefix_match: f"model of {name}")
    monkeypatch.setattr(Client, "get_service_connector_client", lambda self, name, resource_type: connector)
    verified: list[tuple[Any, Any]] = []
    monkeypatch.setattr(utils, "verify_permission_for_model", lambda model, action: verified.append((model, action)))
    connect(connector="team")
    assert verified == [("model of team", Action.READ), ("model of team", Action.CLIENT)]

    def refuse(model: Any, action: Any) -> None:
        raise IllegalOperationError("not allowed")

    monkeypatch.setattr(utils, "verify_permission_for_model", refuse)
    with pytest.raises(IllegalOperationError):
        connect(connector="team")
