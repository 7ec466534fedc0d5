"""Every backend that is read through a section or a child of its own, started together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from tests.servers.clickhouse import ClickHouse, RotelToClickHouse, is_installed
from tests.servers.cloudwatch import CloudWatch
from tests.servers.elasticsearch import Elasticsearch
from tests.servers.loki import Loki
from tests.servers.victorialogs import VictoriaLogs

NAMES = ("cloudwatch", "elasticsearch", "loki", "victorialogs", *(("clickhouse",) if is_installed() else ()))
"""The backends that can run on this machine."""


class Backend(NamedTuple):
    """A backend that runs.

    Attributes:
        child: The settings of a child for it.
        stop: Makes it unreachable.
    """

    child: dict[str, Any]
    stop: Callable[[], object]


@contextmanager
def backends() -> Iterator[dict[str, Backend]]:
    """Run all backends of `NAMES`, and return them by their names."""
    with ExitStack() as servers:
        found: dict[str, Backend] = {}

        def add(name: str, stop: Callable[[], object], **child: Any) -> None:
            # However slow the machine is, no export is overdue.
            found[name] = Backend({"name": name, "export_timeout_millis": 100_000, **child}, stop)

        def add_otlp(name: str, stop: Callable[[], object], endpoint: str, **section: Any) -> None:
            add(name, stop, type="otlp", endpoint=endpoint, read={"type": name, **section})

        loki, victorialogs = servers.enter_context(Loki()), servers.enter_context(VictoriaLogs())
        add_otlp("loki", loki.stop, f"{loki.url}/otlp/v1/logs", query_url=loki.url)
        insert = f"{victorialogs.url}/insert/opentelemetry/v1/logs"
        add_otlp("victorialogs", victorialogs.stop, insert, url=victorialogs.url)
        if is_installed():
            clickhouse = servers.enter_context(ClickHouse())
            collector = servers.enter_context(RotelToClickHouse(clickhouse))
            user = {"username": "reader", "password": "right"}
            endpoint = collector.http_endpoint
            add_otlp("clickhouse", clickhouse.kill, endpoint, url=clickhouse.url, database="otel", **user)
        elasticsearch, cloudwatch = servers.enter_context(Elasticsearch()), servers.enter_context(CloudWatch())
        add("elasticsearch", elasticsearch.stop, type="elasticsearch", **elasticsearch.settings)
        add("cloudwatch", lambda: cloudwatch.fail("", 0), type="cloudwatch", **cloudwatch.settings)
        yield found
