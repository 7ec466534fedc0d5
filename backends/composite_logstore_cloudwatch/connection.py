"""Signed requests to CloudWatch Logs.

boto3 finds the credentials and botocore signs. The requests are sent by `HttpClient`, whose answers are bounded in
bytes and seconds: botocore reads an answer of any size, and repeats requests by itself.

https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/Welcome.html
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import boto3
import orjson
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError
from zenml.constants import ENV_ZENML_SERVER
from zenml.exceptions import IllegalOperationError

from composite_logstore import AnswerTooLargeError, HttpClient, UnavailableError, cause_of, quote, seconds_asked_for

if TYPE_CHECKING:
    from zenml.service_connectors.service_connector import ServiceConnector

    from composite_logstore import HttpResponse
    from composite_logstore_cloudwatch.config import CloudwatchChildConfig

RESOURCE_TYPE = "aws-generic"
"""The resource type of a ZenML service connector that gives a boto3 session."""

_TARGET = "Logs_20140328"
_CODE = re.compile(r"[A-Za-z.]{1,80}")
_UNCONNECTED = (ConnectTimeoutError, NewConnectionError, ProxyError)

THROTTLED = frozenset(
    {
        "LimitExceeded",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequestsException",
    }
)
"""Errors that ask for fewer requests.

https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html
"""

REFUSED = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "IncompleteSignatureException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotAuthorized",
        "OptInRequired",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnauthorizedOperation",
        "UnrecognizedClientException",
    }
)
"""Errors about the credentials, or about what they allow.

https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/CommonErrors.html
"""

_DENIED = ("AccessDenied", "AccessDeniedException", "NotAuthorized", "UnauthorizedOperation")
_SKEWED = ("RequestExpired", "InvalidSignatureException", "SignatureDoesNotMatch")


class ServiceError(Exception):
    """CloudWatch answered with an error.

    Attributes:
        status: The HTTP status.
        code: AWS's name of the error, empty if the answer has none.
        said: CloudWatch's own message as one short line without secrets.
        retry_after_seconds: The pause that the answer asks for, in seconds; None if it asks for none.
        operation: The operation that failed.
    """

    def __init__(self, operation: str, status: int, code: str, said: str, retry_after_seconds: float | None) -> None:
        super().__init__(f"CloudWatch answers {operation} with {status} {code}".rstrip())
        self.operation = operation
        self.status = status
        self.code = code
        self.said = said
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_throttled(self) -> bool:
        """Whether CloudWatch asks for fewer requests."""
        return self.code in THROTTLED or self.status == 429

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed later."""
        later = self.code in ("OperationAbortedException", "ServiceUnavailableException", "InternalFailure")
        return later or self.status >= 500 or self.status == 408

    @property
    def is_refused(self) -> bool:
        """Whether the credentials are wrong, or do not allow the operation."""
        return self.code in REFUSED or (not self.code and self.status in (401, 403))

    @property
    def why_refused(self) -> str:
        """What is wrong with the credentials, and how to fix it."""
        if self.code in _DENIED:
            return f"AWS does not allow logs:{self.operation} ({self.code}); allow it in the policy of the credentials"
        if self.code in _SKEWED:
            return f"AWS refuses the signature ({self.code}); check the credentials, and this machine's clock"
        return f"AWS refuses the credentials ({self.code or self.status}); renew them, and check 'region'"


class UnreachedError(Exception):
    """No usable answer arrived.

    Attributes:
        smaller_may_pass: Whether the size of the request or of the answer may be the cause.
    """

    def __init__(self, message: str, smaller_may_pass: bool) -> None:
        super().__init__(message)
        self.smaller_may_pass = smaller_may_pass


class Connection:
    """Sends signed requests, each once."""

    def __init__(self, config: CloudwatchChildConfig) -> None:
        """Find region and credentials. CloudWatch itself is not asked yet.

        Args:
            config: The child's settings, with secrets resolved.

        Raises:
            UnavailableError: There are no credentials, no region, or no such connector.
            IllegalOperationError: On ZenML's server, the user may not use the connector.
        """
        self._connector: ServiceConnector | None = None
        try:
            if config.connector is None:
                session = boto3.Session()
            else:
                self._connector = _connector(config.connector)
                session = _session_of(self._connector)
            self.region: str = config.region or session.region_name or ""
            with _silence("botocore.credentials"):
                self._credentials = session.get_credentials()
        except (UnavailableError, IllegalOperationError):
            raise
        except Exception as error:
            # Its text is left out, since it may repeat what a configuration file or a metadata service says.
            how = "check the AWS profile and environment"
            if config.connector is not None:
                how = f"check 'connector' with `zenml service-connector verify {config.connector}`"
            raise UnavailableError(f"there are no credentials for AWS ({type(error).__name__}); {how}") from None
        if not self.region:
            raise UnavailableError("boto3 knows no region; set 'region'")
        if self._credentials is None:
            raise UnavailableError(
                "boto3 finds no credentials for AWS; set 'connector', or AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY where the process runs, or give its machine a role"
            )
        self._url = url_of(config, self.region)
        self._http = HttpClient(certificate_file=os.environ.get("AWS_CA_BUNDLE") or None)

    @property
    def has_expired(self) -> bool:
        """Whether the connector's credentials have expired. Those of boto3's own chain renew themselves."""
        return self._connector is not None and self._connector.has_expired()

    def call(self, operation: str, request: Mapping[str, Any], seconds: float, max_bytes: int) -> dict[str, Any]:
        """Call an operation once, and return its answer.

        Args:
            operation: The operation.
            request: Its arguments.
            seconds: How long it may take, in seconds.
            max_bytes: The most bytes of the answer.

        Raises:
            ServiceError: CloudWatch answers with an error.
            UnreachedError: No usable answer arrived.
            AnswerTooLargeError: The answer has more bytes.
            UnavailableError: The credentials cannot be renewed.
        """
        body = orjson.dumps(request)
        headers, hidden = self._signed(operation, body)
        begin = time.monotonic()
        try:
            response = self._http.request(
                "POST", self._url, headers=headers, body=body, timeout_seconds=seconds, max_bytes=max_bytes
            )
        except (HTTPError, OSError) as error:
            raise self._unreached(error, time.monotonic() - begin >= seconds) from None
        if response.fault == "too large":
            raise AnswerTooLargeError("the answer is too large")
        answer: Any = None
        if response.fault is None:
            with suppress(ValueError):
                answer = orjson.loads(response.body or b"{}")
        if 200 <= response.status < 300:
            if not isinstance(answer, dict):
                how = "in pieces" if response.fault else "with something that is no answer of CloudWatch"
                raise UnreachedError(f"{self._url} answers {how}", smaller_may_pass=response.fault is not None)
            return answer
        raise _service_error(operation, response, answer if isinstance(answer, dict) else {}, hidden)

    def _signed(self, operation: str, body: bytes) -> tuple[dict[str, str], list[str]]:
        """Return the headers of a request with its signature, and the secrets that no error may show."""
        try:
            credentials = self._credentials.get_frozen_credentials()
            headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"{_TARGET}.{operation}"}
            request = AWSRequest("POST", self._url, headers=headers, data=body)
            with _silence("botocore.auth"):
                SigV4Auth(credentials, "logs", self.region).add_auth(request)
        except Exception as error:
            raise UnavailableError(
                f"the credentials for AWS cannot be used ({type(error).__name__}); check where they come from"
            ) from None
        return dict(request.headers.items()), [credentials.access_key, credentials.secret_key, credentials.token or ""]

    def _unreached(self, error: Exception, is_late: bool) -> Exception:
        """Return the error for a request without an answer. The text of `error` may repeat the request's headers."""
        if tls := cause_of(error, ssl.SSLCertVerificationError):
            return UnavailableError(
                f"the certificate of {self._url} cannot be trusted ({tls.verify_message}); check 'endpoint_url', "
                f"or name the authority that signed it in AWS_CA_BUNDLE"
            )
        system = cause_of(error, OSError)
        why = system.strerror if system else type(error).__name__
        how = "did not answer in time" if is_late else f"cannot be reached: {why}"
        # Without a connection, the size of the request is not the cause.
        return UnreachedError(f"{self._url} {how}", not any(cause_of(error, kind) for kind in _UNCONNECTED))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def url_of(config: CloudwatchChildConfig, region: str | None = None) -> str:
    """Return the URL of the API.

    https://docs.aws.amazon.com/general/latest/gr/cwl_region.html

    Args:
        config: The child's settings.
        region: The region, if it is known.

    Raises:
        UnavailableError: Nothing names the region.
    """
    if config.endpoint_url:
        return f"{config.endpoint_url}/"
    region = region or config.region or boto3.Session().region_name
    if not region:
        raise UnavailableError("boto3 knows no region; set 'region'")
    return f"https://logs.{region}.amazonaws.com{'.cn' if str(region).startswith('cn-') else ''}/"


@contextmanager
def _silence(name: str) -> Iterator[None]:
    """Let a logger say nothing in this thread: botocore tells where it has found credentials, and a session's token."""
    thread = threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger = logging.getLogger(name)
    logger.addFilter(is_of_another)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another)


def _connector(name: str) -> ServiceConnector:
    """Return the client side of a ZenML service connector.

    Raises:
        UnavailableError: It does not exist, or cannot be used on this machine.
        IllegalOperationError: On ZenML's server, the user may not use it.
    """
    from zenml.client import Client

    client = Client()
    try:
        if ENV_ZENML_SERVER in os.environ:
            # On the server, a user must not read with credentials that the user may not use.
            from zenml.zen_server.rbac.models import Action
            from zenml.zen_server.rbac.utils import verify_permission_for_model

            model = client.get_service_connector(name, allow_name_prefix_match=False)
            for action in (Action.READ, Action.CLIENT):
                verify_permission_for_model(model, action=action)
        return client.get_service_connector_client(name, resource_type=RESOURCE_TYPE)
    except KeyError:
        raise UnavailableError(
            "'connector': there is no such service connector; name one that `zenml service-connector list` shows"
        ) from None
    except (ImportError, NotImplementedError):
        raise UnavailableError(
            "'connector': ZenML's connector for AWS is not installed here; install 'aws-profile-manager'"
        ) from None


def _session_of(connector: ServiceConnector) -> Any:
    session = connector.connect(verify=False)
    if not callable(getattr(session, "get_credentials", None)):
        raise UnavailableError(f"'connector': it is none for AWS; name one with the resource type '{RESOURCE_TYPE}'")
    return session


def _service_error(
    operation: str, response: HttpResponse, fields: Mapping[str, Any], hidden: Sequence[str]
) -> ServiceError:
    code = response.headers.get("x-amzn-ErrorType") or fields.get("__type") or fields.get("code")
    code = code.rpartition("#")[2].partition(":")[0] if isinstance(code, str) else ""
    said = fields.get("message") or fields.get("Message")
    return ServiceError(
        operation,
        response.status,
        code if _CODE.fullmatch(code) else "",
        quote(said, hidden) if isinstance(said, str) else "",
        seconds_asked_for(response.headers),
    )
