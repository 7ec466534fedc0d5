"""The settings of a `read` section of type `clickhouse`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from composite_logstore import HttpReaderConfig

if TYPE_CHECKING:
    from composite_logstore import Reader


class ClickHouseReaderConfig(HttpReaderConfig):
    """Reads a table of ClickHouse over HTTP.

    Attributes:
        database: The database.
        table: The table, as the collector's exporter or SigNoz has created it. Its columns tell which.
    """

    absence: ClassVar[str] = (
        "check that the collector has an exporter for ClickHouse in its logs pipeline, that 'read.database' and "
        "'read.table' are where it writes, and the collector's own log"
    )

    database: str = Field(default="default", min_length=1, max_length=200)
    table: str = Field(default="otel_logs", min_length=1, max_length=200)

    def create_reader(self, service_name: str | None) -> Reader:
        """Create the reader. It needs no packages besides ZenML's."""
        from composite_logstore_clickhouse.reader import ClickHouseReader

        return ClickHouseReader(self)
