"""`composite-logstore collector-config`: the OpenTelemetry Collector does what the children of a log store do.

No Collector of the distribution `contrib` can run here. So its configuration is compared with the settings that the
components publish, by name and type: the Collector refuses a setting that it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import pytest
import yaml
from pydantic import BaseModel

from composite_logstore import ChildConfig, CollectorExporter, CompositeLogStoreConfig, Secret, operations
from composite_logstore.ansi import without_escapes
from composite_logstore.child_types import backends, parse_child
from composite_logstore.operations import ArgumentError, OperationError
from composite_logstore.operations.collector_config import _UNDERSTOOD, CollectorConfig
from composite_logstore.secret_references import is_meant
from tests.events import make_capture
from tests.simulated_zenml import SimulatedZenML

CLEAR = "cl3ar-s3cr3t"

ARCHIVE = {"name": "archive", "type": "artifact"}
BUCKET = {"name": "bucket", "type": "artifact", "artifact_store": "bucket", "min_level": "INFO"}
OTLP = {
    "name": "central",
    "type": "otlp",
    "endpoint": "https://otlp.example",
    "headers": {"authorization": "{{otel.token}}"},
}
OVER_GRPC = {"name": "grpc", "type": "otlp", "endpoint": "otlp.example:4317", "protocol": "grpc"}
READ = {**OTLP, "read": {"type": "loki", "query_url": "https://loki.example", "api_key": "{{loki.key}}"}}
DATADOG = {
    "name": "live",
    "type": "datadog",
    "api_key": "{{datadog.api_key}}",
    "application_key": "{{datadog.app}}",
    "tags": ["env:prod", "team:$ml"],
    "min_level": "WARNING",
}
ELASTIC = {"name": "search", "type": "elasticsearch", "url": "https://elastic.example", "api_key": "{{elastic.key}}"}
CLOUDWATCH = {"name": "watch", "type": "cloudwatch", "region": "eu-central-1", "retention_days": 30}
SCREEN = {"name": "screen", "type": "otel", "exporter": "console"}


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of the artifact store `bucket`."""
    settings: dict[str, Any] = {
        "path": "s3://bucket/zenml/",
        "key": CLEAR,
        "client_kwargs": {"region_name": "eu-west-1"},
    }

    class Model(BaseModel):
        name: str = "bucket"
        id: Any = uuid4()
        configuration: dict[str, Any]

    monkeypatch.setattr(
        "composite_logstore_artifact.artifact_stores.find_model", lambda name: Model(configuration=settings)
    )
    return settings


def configured(zenml: SimulatedZenML, *children: Mapping[str, Any], **settings: Any) -> CollectorConfig:
    settings.setdefault("primary", children[0]["name"])
    name = f"logs-{len(zenml.models)}"
    zenml.register_settings({"children": [dict(child) for child in children], **settings}, name)
    return operations.collector_config(name, "http://collector:4318")


def exporter(found: CollectorConfig, child: str) -> tuple[str, dict[str, Any]]:
    """The exporter of a child: its type and its settings."""
    pipeline = found.settings["service"]["pipelines"][f"logs/{child}"]
    (id,) = pipeline["exporters"]
    return id.partition("/")[0], found.settings["exporters"][id]


# Structure

# The settings of the components, as their sources list them (config.schema.yaml, config.go, or a README): of
# opentelemetry-collector at 934999f, and of single files of opentelemetry-collector-contrib, some of them older. A name
# → the type of its value, or the settings below it.
NUMBER, TEXT, SWITCH, TIME, TEXTS = int, str, bool, re.compile(r"\d+(ms|s)"), [str]
TLS = {
    **dict.fromkeys(("ca_file", "ca_pem", "cert_file", "cert_pem", "key_file", "key_pem", "min_version"), TEXT),
    **dict.fromkeys(("insecure", "insecure_skip_verify", "include_system_ca_certs_pool"), SWITCH),
    **dict.fromkeys(("max_version", "server_name_override"), TEXT),
    "reload_interval": TIME,
}
RETRIES = {
    "enabled": SWITCH,
    **dict.fromkeys(("initial_interval", "max_interval", "max_elapsed_time"), TIME),
    **dict.fromkeys(("multiplier", "randomization_factor"), NUMBER),
}
QUEUE = {
    **dict.fromkeys(("enabled", "block_on_overflow", "wait_for_result"), SWITCH),
    **dict.fromkeys(("num_consumers", "queue_size"), NUMBER),
    "sizer": re.compile("requests|items|bytes"),
    "storage": TEXT,
    "batch": {
        "flush_timeout": TIME,
        **dict.fromkeys(("min_size", "max_size"), NUMBER),
        "sizer": re.compile("items|bytes"),
    },
}
HTTP_CLIENT = {
    **dict.fromkeys(("endpoint", "proxy_url"), TEXT),
    "compression": re.compile("gzip|zstd|zlib|snappy|deflate|lz4|none"),
    "headers": {...: TEXT},
    "timeout": TIME,
    "tls": TLS,
    **dict.fromkeys(("read_buffer_size", "write_buffer_size", "max_idle_conns", "max_conns_per_host"), NUMBER),
}
COMPONENTS: dict[str, dict[Any, Any]] = {
    "otlp": {"protocols": {"grpc": {"endpoint": TEXT}, "http": {"endpoint": TEXT}}},
    "otlp_http": {
        **HTTP_CLIENT,
        **dict.fromkeys(("logs_endpoint", "metrics_endpoint", "traces_endpoint", "profiles_endpoint"), TEXT),
        "encoding": re.compile("proto|json"),
        "retry_on_failure": RETRIES,
        "sending_queue": QUEUE,
    },
    "otlp_grpc": {
        **dict.fromkeys(("endpoint", "balancer_name", "authority"), TEXT),
        "compression": re.compile("gzip|zstd|snappy|none"),
        "headers": {...: TEXT},
        "wait_for_ready": SWITCH,
        "tls": TLS,
        "timeout": TIME,
        "retry_on_failure": RETRIES,
        "sending_queue": QUEUE,
    },
    # Of an HTTP client it refuses endpoint, compression and headers.
    "datadog": {
        "api": {"key": TEXT, "site": TEXT, "fail_on_invalid_key": SWITCH},
        "hostname": TEXT,
        "host_metadata": {"enabled": SWITCH, "tags": TEXTS},
        "logs": {"endpoint": TEXT, "use_compression": SWITCH, "compression_level": NUMBER, "batch_wait": NUMBER},
        "timeout": TIME,
        "tls": TLS,
        "retry_on_failure": RETRIES,
        "sending_queue": QUEUE,
    },
    "elasticsearch": {
        **HTTP_CLIENT,
        **dict.fromkeys(("user", "password", "api_key", "cloudid", "logs_index", "pipeline"), TEXT),
        "endpoints": TEXTS,
        "logs_dynamic_id": {"enabled": SWITCH},
        "retry": {
            "enabled": SWITCH,
            "max_retries": NUMBER,
            **dict.fromkeys(("initial_interval", "max_interval"), TIME),
            "retry_on_status": [int],
        },
        "sending_queue": QUEUE,
    },
    # It has no timeout.
    "awscloudwatchlogs": {
        **dict.fromkeys(("log_group_name", "log_stream_name", "region", "endpoint", "role_arn"), TEXT),
        "log_retention": NUMBER,
        "raw_log": SWITCH,
        "tags": {...: TEXT},
        "retry_on_failure": RETRIES,
        "sending_queue": QUEUE,
    },
    "awss3": {
        "s3uploader": {
            **dict.fromkeys(("region", "s3_bucket", "s3_prefix", "s3_base_prefix", "s3_partition_format"), TEXT),
            **dict.fromkeys(("file_prefix", "endpoint", "role_arn", "acl", "storage_class"), TEXT),
            **dict.fromkeys(("s3_force_path_style", "disable_ssl"), SWITCH),
            "compression": re.compile("gzip|zstd"),
            "retry_mode": re.compile("standard|adaptive|nop"),
            "retry_max_attempts": NUMBER,
            "retry_max_backoff": TIME,
        },
        "marshaler": re.compile("otlp_json|otlp_proto|sumo_ic|body"),
        "timeout": TIME,
        "retry_on_failure": RETRIES,
        "sending_queue": QUEUE,
    },
    "filter": {
        "error_mode": re.compile("ignore|silent|propagate"),
        "logs": {"log_record": TEXTS, "resource": TEXTS},
    },
    "transform": {
        "error_mode": re.compile("ignore|silent|propagate"),
        "log_statements": [{"context": re.compile("resource|scope|log"), "statements": TEXTS, "conditions": TEXTS}],
    },
    "file_storage": {
        "directory": TEXT,
        "timeout": TIME,
        **dict.fromkeys(("fsync", "create_directory"), SWITCH),
        "directory_permissions": TEXT,
    },
}
REQUIRED = {
    "datadog": ["api"],
    "awss3": ["s3uploader"],
    "awscloudwatchlogs": ["log_group_name", "log_stream_name"],
    "otlp_http": ["logs_endpoint"],
    "otlp_grpc": ["endpoint"],
    "elasticsearch": ["endpoint"],
    "file_storage": ["directory"],
}


def mistakes(value: Any, expected: Any, place: str) -> Iterator[str]:
    """Where settings are other than the component knows them."""
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            yield f"{place} is no mapping"
            return
        for name, item in value.items():
            if name not in expected and ... not in expected:
                yield f"{place}.{name} is unknown"
            else:
                yield from mistakes(item, expected.get(name, expected.get(...)), f"{place}.{name}")
    elif isinstance(expected, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for number, item in enumerate(value):
            yield from mistakes(item, expected[0], f"{place}.{number}")
    elif isinstance(expected, re.Pattern):
        if not (isinstance(value, str) and expected.fullmatch(value)):
            yield f"{place} is {value!r}"
    elif type(value) is not expected:
        yield f"{place} is {value!r}"


def check_structure(settings: dict[str, Any]) -> None:
    assert settings.keys() <= {"receivers", "processors", "exporters", "extensions", "service"}
    found = []
    for section in settings.keys() - {"service"}:
        for id, component in settings[section].items():
            kind = id.partition("/")[0]
            found += list(mistakes(component, COMPONENTS[kind], id))
            found += [f"{id}.{name} is missing" for name in REQUIRED.get(kind, []) if name not in component]
    assert found == []
    used: dict[str, set[str]] = {"extensions": set(settings["service"].get("extensions", []))}
    for name, pipeline in settings["service"]["pipelines"].items():
        assert name.partition("/")[0] == "logs"
        for section in ("receivers", "processors", "exporters"):
            used.setdefault(section, set()).update(pipeline.get(section, []))
    # The Collector refuses what is used and not there, and warns of what is there and not used.
    for section, ids in used.items():
        assert ids == settings.get(section, {}).keys()
    for component in settings["exporters"].values():
        queue = component["sending_queue"]
        assert queue.get("storage", "file_storage") == "file_storage"
        assert ("storage" in queue) is ("extensions" in settings)
        assert 0 < queue["batch"]["min_size"] <= queue["batch"]["max_size"]


STORES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one of each": (
        [ARCHIVE, BUCKET, OTLP, OVER_GRPC, DATADOG, ELASTIC, CLOUDWATCH, SCREEN],
        {"fetch_fallback": ["search"]},
    ),
    "in memory": ([ARCHIVE, DATADOG], {"durability": "memory"}),
    "readable behind the Collector": ([READ, DATADOG], {"fetch_fallback": ["live"]}),
    "elasticsearch is the primary": ([ELASTIC, BUCKET], {}),
    "all settings of delivery": (
        [
            ARCHIVE,
            {
                **OTLP,
                "max_export_batch_size": 7,
                "schedule_delay_millis": 0,
                "export_timeout_millis": 1,
                "retry_initial_interval_millis": 2,
                "retry_max_interval_millis": 3,
            },
        ],
        {"spool_max_bytes": 20 * 1024**2},
    ),
    "all settings of otlp": (
        [
            ARCHIVE,
            {
                **OTLP,
                "compression": "deflate",
                "certificate_file": "ca.pem",
                "client_key_file": "key.pem",
                "client_certificate_file": "cert.pem",
                "service_name": 'a "name"\\ with $ and é\n',
                "service_version": "1",
                "resource_attributes": {"a": True, "b": -1, "c": 0.5, "d": "text", "endpoint": "x"},
            },
            {**OVER_GRPC, "insecure": True, "compression": "gzip", "headers": {"x": "a {{b.c}}"}},
        ],
        {},
    ),
    "all settings of the others": (
        [
            ARCHIVE,
            {**DATADOG, "site": "datadoghq.eu", "endpoint": "https://proxy.example:8443/api/v2/logs"},
            {
                "name": "search",
                "type": "elasticsearch",
                "url": "https://elastic.example",
                "username": "me",
                "password": CLEAR,
                "certificate_file": "ca.pem",
                "client_certificate_file": "cert.pem",
            },
            {
                **CLOUDWATCH,
                "log_stream_prefix": "a/",
                "endpoint_url": "https://logs.example",
                "connector": "aws",
            },
        ],
        {},
    ),
    "some want escape sequences": ([ARCHIVE, {**DATADOG, "ansi": "keep"}, OTLP], {}),
    "progress bars": ([ARCHIVE, {**DATADOG, "progress": "latest"}, {**OTLP, "progress": "latest"}], {}),
    "a disabled child": ([ARCHIVE, OTLP, {**DATADOG, "enabled": False}], {}),
}


@pytest.mark.parametrize("store", STORES)
def test_the_components_know_every_setting(store: str, zenml: SimulatedZenML) -> None:
    children, settings = STORES[store]
    check_structure(configured(zenml, *children, **settings).settings)


@pytest.mark.parametrize("store", STORES)
def test_the_yaml_is_the_configuration(store: str, zenml: SimulatedZenML) -> None:
    children, settings = STORES[store]
    found = configured(zenml, *children, **settings)
    assert yaml.safe_load(found.to_yaml()) == found.settings


@pytest.mark.parametrize("store", STORES)
def test_each_child_moves_or_stays(store: str, zenml: SimulatedZenML) -> None:
    children, settings = STORES[store]
    found = configured(zenml, *children, **settings)
    enabled = [child["name"] for child in children if child.get("enabled", True)]
    assert sorted([*found.moved, *found.staying]) == sorted(enabled)
    text = found.to_yaml()
    for name, why in found.staying.items():
        assert name in text
        assert why in text
    for losses in found.moved.values():
        assert all(loss in text for loss in losses)


@pytest.mark.parametrize("store", STORES)
def test_the_log_store_that_sends_to_it_is_valid_and_loses_no_child(store: str, zenml: SimulatedZenML) -> None:
    children, settings = STORES[store]
    found = configured(zenml, *children, **settings)
    config = CompositeLogStoreConfig(**found.log_store)
    sender, *others = config.children
    assert sender.type == "otlp"
    staying = {child["name"] for child in children} - found.moved.keys()
    assert {child.name for child in others} == staying
    assert sender.name not in {child["name"] for child in children}
    assert config.durability == settings.get("durability", "spill")


# Equivalence


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "NOTSET"])
def test_the_filter_drops_the_events_that_the_child_does_not_want(level: str, zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, {**OTLP, "min_level": level}, ELASTIC)
    conditions = found.settings["processors"].get("filter/central", {}).get("logs", {}).get("log_record", [])
    child = parse_child(1, {**OTLP, "min_level": level})
    for number in range(61):
        event = make_capture(level=number)
        dropped = False
        for condition in conditions:
            least = re.fullmatch(r"severity_number < (\d+)", condition)
            assert least is not None
            dropped |= event.severity_number < int(least[1])
        assert dropped is not child.wants(number)


def test_the_log_store_sends_what_any_of_them_wants(zenml: SimulatedZenML) -> None:
    quiet = {**OTLP, "min_level": "ERROR", "progress": "latest"}
    found = configured(zenml, ARCHIVE, quiet, {**DATADOG, "progress": "latest"})
    sender = found.log_store["children"][0]
    assert (sender["min_level"], sender["progress"], sender["ansi"]) == ("WARN", "latest", "strip")
    assert not any("progress" in loss for losses in found.moved.values() for loss in losses)
    found = configured(zenml, ARCHIVE, quiet, DATADOG, {**ELASTIC, "ansi": "keep"})
    sender = found.log_store["children"][0]
    assert (sender.get("min_level"), sender["progress"], sender["ansi"]) == (None, "all", "keep")
    assert any("progress" in loss for loss in found.moved["central"])
    assert not any("progress" in loss for loss in found.moved["live"])


def statements(found: CollectorConfig, child: str) -> list[str]:
    processor = found.settings["processors"].get(f"transform/{child}", {"log_statements": []})
    return [one.replace("$$", "$") for group in processor["log_statements"] for one in group["statements"]]


def test_escape_sequences_go_where_a_child_does_not_want_them(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, {**DATADOG, "ansi": "keep"}, OTLP)
    patterns = [re.fullmatch(r"replace_pattern\(\S+, (\".*\"), \"\"\)", one) for one in statements(found, "central")]
    assert len(patterns) == 3
    assert not any("replace_pattern" in one for one in statements(found, "live"))
    for match in patterns:
        assert match is not None
        pattern = json.loads(match[1])
        # RE2 knows no larger bound.
        assert all(int(bound) <= 1000 for bound in re.findall(r",(\d+)\}", pattern))
        for text in ("\x1b[31mred\x1b[0m", "\x1b]0;title\x07x", "a\x1b", "\x9b1mb", "plain"):
            assert re.sub(pattern, "", text) == without_escapes(text)


def test_each_backend_gets_the_resource_of_its_child(zenml: SimulatedZenML) -> None:
    name = 'a "name"\\ with $ and é\n'
    named = {**OTLP, "service_name": name, "resource_attributes": {"a": True, "b": 2, "endpoint": "x"}}
    found = configured(zenml, ARCHIVE, named, ELASTIC)
    assert statements(found, "central") == [
        'set(attributes["a"], true)',
        'set(attributes["b"], 2)',
        'set(attributes["endpoint"], "x")',
        f'set(attributes["service.name"], {json.dumps(name, ensure_ascii=False)})',
    ]
    assert not any("service" in one for one in statements(found, "search"))


def test_others_keep_the_default_where_the_log_store_sends_what_the_primary_is_read_by(zenml: SimulatedZenML) -> None:
    found = configured(zenml, {**READ, "service_name": "train"}, ELASTIC)
    sender = found.log_store["children"][0]
    assert (found.log_store["primary"], sender["service_name"]) == (sender["name"], "train")
    assert sender["read"] == READ["read"]
    assert not any("service.name" in one for one in statements(found, "central"))
    assert 'set(attributes["service.name"], "zenml")' in statements(found, "search")


def test_delivery_is_that_of_the_child(zenml: SimulatedZenML) -> None:
    children, settings = STORES["all settings of delivery"]
    _, component = exporter(configured(zenml, *children, **settings), "central")
    assert component["timeout"] == "1ms"
    retries = component["retry_on_failure"]
    assert (retries["initial_interval"], retries["max_interval"], retries["max_elapsed_time"]) == ("2ms", "3ms", "0s")
    queue = component["sending_queue"]
    assert (queue["sizer"], queue["queue_size"], queue["num_consumers"]) == ("bytes", 20 * 1024**2, 1)
    # The Collector refuses a time of zero.
    assert queue["batch"] == {"sizer": "items", "min_size": 7, "max_size": 7, "flush_timeout": "1ms"}


def test_nothing_is_on_disk_in_memory(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, DATADOG, durability="memory", max_queue_bytes=12345)
    assert "extensions" not in found.settings
    queue = exporter(found, "live")[1]["sending_queue"]
    assert queue["queue_size"] == 12345
    assert "storage" not in queue


@pytest.mark.parametrize(
    ("settings", "type", "expected"),
    [
        ({"endpoint": "http://c:4318"}, "otlp_http", {"logs_endpoint": "http://c:4318/v1/logs"}),
        ({"endpoint": "https://c/otlp/v1/logs"}, "otlp_http", {"logs_endpoint": "https://c/otlp/v1/logs"}),
        ({"endpoint": "https://c/"}, "otlp_http", {"logs_endpoint": "https://c/v1/logs", "compression": "none"}),
        ({"endpoint": "c:4317", "protocol": "grpc"}, "otlp_grpc", {"endpoint": "c:4317"}),
        (
            {"endpoint": "c:4317", "protocol": "grpc", "insecure": True},
            "otlp_grpc",
            {"endpoint": "c:4317", "tls": {"insecure": True}},
        ),
        (
            {"endpoint": "http://c:4317", "protocol": "grpc"},
            "otlp_grpc",
            {"endpoint": "c:4317", "tls": {"insecure": True}},
        ),
        ({"endpoint": "https://c", "protocol": "grpc"}, "otlp_grpc", {"endpoint": "c:443"}),
    ],
)
def test_otlp_goes_to_the_same_place(
    settings: dict[str, Any], type: str, expected: dict[str, Any], zenml: SimulatedZenML
) -> None:
    found = configured(zenml, ARCHIVE, {"name": "central", "type": "otlp", **settings})
    kind, component = exporter(found, "central")
    assert kind == type
    assert {name: component[name] for name in expected} == expected
    assert ("tls" in component) is ("tls" in expected)


def test_an_archive_on_s3_gets_the_exporter_for_s3(zenml: SimulatedZenML, bucket: dict[str, Any]) -> None:
    kind, component = exporter(configured(zenml, ARCHIVE, BUCKET), "bucket")
    uploader = component["s3uploader"]
    assert kind == "awss3"
    assert (uploader["s3_bucket"], uploader["region"]) == ("bucket", "eu-west-1")
    assert uploader["s3_prefix"].startswith("zenml/")
    # As rarely as the archive writes an object.
    assert component["sending_queue"]["batch"]["flush_timeout"] == "10000ms"
    bucket["client_kwargs"] = json.dumps({"endpoint_url": "http://minio:9000"})
    uploader = exporter(configured(zenml, ARCHIVE, BUCKET), "bucket")[1]["s3uploader"]
    assert (uploader["endpoint"], uploader["s3_force_path_style"]) == ("http://minio:9000", True)
    bucket["path"] = "gs://bucket"
    assert "S3" in configured(zenml, ARCHIVE, BUCKET, OTLP).staying["bucket"]


def test_elasticsearch_is_read_through_the_child_that_sends(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ELASTIC, ARCHIVE)
    sender = found.log_store["children"][0]
    assert found.log_store["primary"] == sender["name"]
    assert sender["read"] == {"type": "elasticsearch", "url": ELASTIC["url"], "api_key": ELASTIC["api_key"]}


def test_a_fallback_that_moves_is_read_through_the_child_that_sends(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, READ, DATADOG, fetch_fallback=["live", "central"])
    assert found.log_store["primary"] == "archive"
    assert found.log_store["fetch_fallback"] == [found.log_store["children"][0]["name"]]


@pytest.mark.parametrize("primary", [BUCKET, DATADOG, CLOUDWATCH])
def test_a_primary_stays_if_nothing_reads_what_the_collector_would_write(
    primary: dict[str, Any], zenml: SimulatedZenML
) -> None:
    found = configured(zenml, primary, OTLP)
    assert list(found.moved) == ["central"]
    assert "primary" in found.staying[primary["name"]]
    assert found.log_store["primary"] == primary["name"]


# What may leave the house must not change, as it would without them.
@pytest.mark.parametrize(
    "settings",
    [
        {"budget": {"events": 10, "per": "day"}},
        {"redact": {"formats": "all"}},
        {"drop": [{"logger": "urllib3.*"}]},
        {"keep": [{"message": "^loss"}]},
        {"sample": {"ratio": 0.5}},
        {"collapse_repeats": {"window_millis": 1000}},
    ],
)
def test_a_child_with_a_setting_that_the_collector_does_not_have_stays(
    settings: dict[str, Any], zenml: SimulatedZenML
) -> None:
    found = configured(zenml, ARCHIVE, {**OTLP, **settings}, DATADOG)
    assert next(iter(settings)) in found.staying["central"]
    assert found.log_store["children"][2] == {**OTLP, **settings}


def test_each_common_setting_is_understood_or_keeps_the_child_with_the_log_store() -> None:
    keeping = {"drop", "keep", "sample", "collapse_repeats", "redact", "budget"}
    assert _UNDERSTOOD | keeping == ChildConfig.model_fields.keys()


class ThirdPartyConfig(ChildConfig):
    token: Secret

    def collector_exporter(self) -> CollectorExporter:
        return CollectorExporter("theirs", {"token": self.token, "cost": "5 $"}, timeout=None, retries=None)


def test_a_third_partys_child_names_its_exporter(zenml: SimulatedZenML) -> None:
    theirs = ThirdPartyConfig(name="theirs", type="theirs", token="{{theirs.token}}")
    zenml.register(parse_child(1, ARCHIVE), theirs, primary="archive")
    found = operations.collector_config("logs")
    component = dict(found.settings["exporters"]["theirs/theirs"])
    assert component.pop("sending_queue")["num_consumers"] == 1
    assert component == {"token": "${env:THEIRS_TOKEN}", "cost": "5 $$"}


def test_a_child_of_an_unknown_type_stays(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, OTLP, {"name": "other", "type": "not_installed", "key": CLEAR})
    assert "not_installed" in found.staying["other"]
    assert CLEAR not in json.dumps(found.log_store)


# Secrets


def secret_children() -> Iterator[dict[str, Any]]:
    """A child of each type with secrets in clear text, wherever it may have one."""
    yield ARCHIVE
    yield {**DATADOG, "api_key": CLEAR, "application_key": f"{CLEAR}-2", "endpoint": f"https://u:{CLEAR}@c/api/v2/logs"}
    yield {**OTLP, "endpoint": f"https://c/v1/logs?key={CLEAR}", "headers": {"authorization": f"Bearer {CLEAR}"}}
    yield {**OVER_GRPC, "headers": {"x-key": f"{CLEAR} {{{{otel.token}}}}"}}
    yield {**ELASTIC, "api_key": CLEAR}
    yield {"name": "user", "type": "elasticsearch", "url": "https://e", "username": "me", "password": CLEAR}


def test_no_secret_is_printed(zenml: SimulatedZenML) -> None:
    children = list(secret_children())
    meant = {
        (child["type"], name)
        for child in children
        for name, field in backends()[child["type"]].load().model_fields.items()
        if is_meant(field)
    }
    given = {(child["type"], name) for child in children for name in child}
    assert {one for one in meant if one[0] in ("datadog", "otlp", "elasticsearch")} <= given
    found = configured(zenml, *children)
    assert len(found.moved) >= 4
    printed = zenml.run_command("collector-config", "logs-0")
    store = zenml.run_command("collector-config", "logs-0", "--log-store")
    for text in (found.to_yaml(), repr(found), printed.output, store.output):
        assert CLEAR not in text
    check_structure(found.settings)


def test_each_variable_is_explained_and_stands_for_one_secret(zenml: SimulatedZenML) -> None:
    children = [
        ARCHIVE,
        {**DATADOG, "api_key": "{{keys.a-b}}"},
        {**OTLP, "headers": {"a": "{{keys.a_b}}", "b": "{{keys.a-b}}", "c": "Basic {{keys.c}}", "1": "{{1.x}}"}},
    ]
    found = configured(zenml, *children)
    used = re.findall(r"\$\{env:([^}]*)\}", found.to_yaml())
    assert len(used) == 5
    assert set(used) == found.variables.keys()
    # One secret in two places is one variable; two secrets are two.
    assert len(found.variables) == 4
    assert len(set(found.variables.values())) == 4
    assert all(re.fullmatch("[A-Z_][A-Z0-9_]*", name) for name in used)
    for name, meaning in found.variables.items():
        assert f"# {name}: {meaning}" in re.sub("#  +", "# ", found.to_yaml())


# The command


def test_the_command_prints_yaml_and_the_log_store(zenml: SimulatedZenML) -> None:
    found = configured(zenml, ARCHIVE, OTLP)
    result = zenml.run_command("collector-config", "logs-0", "--endpoint", "http://collector:4318")
    assert (result.exit_code, yaml.safe_load(result.stdout)) == (0, found.settings)
    assert "archive" in result.stderr
    result = zenml.run_command("collector-config", "logs-0", "--endpoint", "http://collector:4318", "--log-store", "-q")
    assert (json.loads(result.stdout), result.stderr) == (found.log_store, "")


def test_a_log_store_without_a_child_that_can_move(zenml: SimulatedZenML) -> None:
    with pytest.raises(OperationError, match="archive"):
        configured(zenml, ARCHIVE, {"name": "central", "type": "otlp"})
    result = zenml.run_command("collector-config", "logs-0")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [("nothing",), ("logs-0", "--endpoint", "collector:4318"), ("logs-0", "--endpoint", "http://a:b@c")],
)
def test_wrong_usage(arguments: tuple[str, ...], zenml: SimulatedZenML) -> None:
    configured(zenml, ARCHIVE, OTLP)
    assert zenml.run_command("collector-config", *arguments).exit_code == 2


def test_an_unknown_log_store_is_an_argument_at_fault(zenml: SimulatedZenML) -> None:
    with pytest.raises(ArgumentError) as caught:
        operations.collector_config("nothing")
    assert caught.value.argument == "store"


def test_names_in_comments_stay_on_their_line(zenml: SimulatedZenML) -> None:
    zenml.register_settings({"primary": "archive", "children": [ARCHIVE, OTLP]}, "evil\nexporters: {}")
    found = operations.collector_config("evil\nexporters: {}")
    assert yaml.safe_load(found.to_yaml()) == found.settings
