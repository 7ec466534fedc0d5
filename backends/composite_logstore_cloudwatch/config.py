"""The settings of a `cloudwatch` child."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from composite_logstore import ChildConfig, UnavailableError, checked_url, has_reference

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore import CollectorExporter, Exporter, Reader

EXTRA = "composite-logstore[cloudwatch]"

DAY_SECONDS = 24 * 3600
# https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html
OLDEST_SECONDS = 14 * DAY_SECONDS
NEWEST_SECONDS = 2 * 3600

_REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-[0-9]+")
# https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_CreateLogGroup.html
_GROUP = re.compile(r"[.\-_/#A-Za-z0-9]+")
# https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_CreateLogStream.html
_PREFIX = re.compile(r"[^:*]*")
_LONGEST_NAME = 512
_ID_CHARACTERS = 36

# https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutRetentionPolicy.html
_RETENTIONS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096)
_RETENTIONS_OF_YEARS = (1827, 2192, 2557, 2922, 3288, 3653)


class CloudwatchChildConfig(ChildConfig):
    """Sends events to Amazon CloudWatch Logs, one log stream for each ZenML log, and reads them back.

    Attributes:
        log_group: The log group. It is created with the first event, unless it exists.
        log_stream_prefix: What the name of each log stream begins with; the id of the ZenML log follows.
        region: The AWS region; the one that boto3 or the service connector finds if not set.
        connector: The name or ID of a ZenML service connector with the resource type `aws-generic`. If not set, boto3
            looks for credentials in the environment, the profile and the machine's role.
        retention_days: For how many days a log group that is created here keeps events; for ever if not set.
        endpoint_url: The base URL of the API; the one of the region if not set.
    """

    max_batch_size: ClassVar[int] = 10_000
    default_batch_size: ClassVar[int] = 1_000
    # Mostly one request, which may have 1 MiB.
    max_batch_bytes: ClassVar[int] = 1_000_000
    readable: ClassVar[bool] = True

    ansi: Literal["keep", "strip"] = "strip"
    log_group: str = Field(default="zenml", min_length=1, max_length=_LONGEST_NAME)
    log_stream_prefix: str = Field(default="", max_length=_LONGEST_NAME - _ID_CHARACTERS)
    region: str | None = None
    connector: str | None = Field(default=None, min_length=1)
    retention_days: int | None = None
    endpoint_url: str | None = None

    @property
    def oldest_seconds(self) -> float:  # type: ignore[override]  # it depends on the retention
        """How old an event may be: 14 days, or less if the log group keeps events for less."""
        return min(OLDEST_SECONDS, (self.retention_days or OLDEST_SECONDS) * DAY_SECONDS)

    @property
    def delay_seconds(self) -> float:
        """How long it usually takes until an event is found, in seconds."""
        return 10.0

    @property
    def known_losses(self) -> str | None:
        """What CloudWatch deletes without a word: events beyond the retention."""
        if self.retention_days is None:
            return None
        return f"CloudWatch deletes events that are older than {self.retention_days} days, as 'retention_days' says"

    @property
    def requirements(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the connector
        """The packages that a remote step needs. ZenML's connector for AWS imports one that boto3 does not bring."""
        return frozenset({EXTRA, "aws-profile-manager"} if self.connector else {EXTRA})

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        """Return the log streams that the child writes to."""
        place = f"cloudwatch {self.endpoint_url or self.region or ''} {self.log_group} {self.log_stream_prefix}"
        return {place: f"log group '{self.log_group}' with the same log streams"}

    @field_validator("region")
    @classmethod
    def _region_is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not has_reference(value) and not _REGION.fullmatch(value):
            raise ValueError("must be the region's name; set it to one such as 'eu-central-1'")
        return value

    @field_validator("log_group")
    @classmethod
    def _group_is_a_name(cls, value: str) -> str:
        if not has_reference(value) and not _GROUP.fullmatch(value):
            raise ValueError(
                "must be the name of a log group, not its ARN; use the characters a-z A-Z 0-9 . - _ / # alone"
            )
        return value

    @field_validator("log_stream_prefix")
    @classmethod
    def _prefix_is_part_of_a_name(cls, value: str) -> str:
        if not has_reference(value) and not (_PREFIX.fullmatch(value) and value.isprintable()):
            raise ValueError("must be the beginning of a log stream's name; leave out ':', '*' and control characters")
        return value

    @field_validator("retention_days")
    @classmethod
    def _retention_is_offered(cls, value: int | None) -> int | None:
        offered = (*_RETENTIONS, *_RETENTIONS_OF_YEARS)
        if value is not None and value not in offered:
            raise ValueError(
                f"must be a number of days that CloudWatch offers; set one of {', '.join(map(str, offered))}"
            )
        return value

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_url(cls, value: str | None) -> str | None:
        return value if value is None or has_reference(value) else checked_url(value, instead="leave it out")

    def create_exporter(self) -> Exporter:
        """Create the exporter.

        Raises:
            UnavailableError: boto3 is not installed.
        """
        self._require_boto3()
        from composite_logstore_cloudwatch.exporter import CloudwatchExporter

        return CloudwatchExporter(self)

    def create_reader(self) -> Reader:
        """Create the reader. It needs boto3, on ZenML's server, too.

        Raises:
            UnavailableError: boto3 is not installed.
        """
        self._require_boto3()
        from composite_logstore_cloudwatch.reader import CloudwatchReader

        return CloudwatchReader(self)

    def collector_exporter(self) -> CollectorExporter:
        """Return the Collector's exporter for CloudWatch Logs."""
        from composite_logstore import CollectorExporter

        settings: dict[str, Any] = {
            "log_group_name": self.log_group,
            "log_stream_name": f"{self.log_stream_prefix}collector",
        }
        others = {"region": self.region, "endpoint": self.endpoint_url, "log_retention": self.retention_days}
        losses = ["It writes all events to one log stream, in a shape that no child reads"]
        if self.connector:
            losses.append("It takes AWS's usual credentials on the Collector's machine, not those of 'connector'")
        return CollectorExporter(
            "awscloudwatchlogs",
            {**settings, **{name: value for name, value in others.items() if value is not None}},
            losses=losses,
            timeout=None,
        )

    def backend_time(self) -> datetime | None:
        """Ask CloudWatch for its time. Any answer contains it, and no credentials are needed."""
        from composite_logstore import HttpClient
        from composite_logstore_cloudwatch.connection import url_of

        with closing(HttpClient()) as client:
            return client.time_at(url_of(self), self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that boto3 is installed, and what ZenML's connector for AWS needs if there is one.

        Raises:
            ValueError: A package is not installed.
        """
        if find_spec("boto3") is None:
            raise ValueError(f"'type': 'cloudwatch' needs boto3; install '{EXTRA}'")
        if self.connector is not None and find_spec("aws_profile_manager") is None:
            raise ValueError("'connector': ZenML's connector for AWS needs a package; install 'aws-profile-manager'")

    def _require_boto3(self) -> None:
        if find_spec("boto3") is None:
            raise UnavailableError(f"'type': 'cloudwatch' needs boto3, which is not installed here; install '{EXTRA}'")
