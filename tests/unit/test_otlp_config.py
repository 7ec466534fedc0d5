from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import ValidationError

from composite_logstore import UnavailableError
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.connection import Connection
from composite_logstore_otlp.encoding import encode_resource
from composite_logstore_otlp.exporter import resource_attributes

VARIABLES = ["ENDPOINT", "PROTOCOL", "HEADERS", "COMPRESSION", "INSECURE"]
VARIABLES += ["CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{variable}", raising=False)
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_LOGS_{variable}", raising=False)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)


def make_config(**settings: Any) -> OtlpChildConfig:
    return OtlpChildConfig(name="collector", type="otlp", **settings)


def connect(**settings: Any) -> Connection:
    return Connection.of(make_config(**settings))


def mistake(**settings: Any) -> str:
    with pytest.raises(ValidationError) as error:
        make_config(**settings)
    assert "secret-part" not in str(error.value)
    return str(error.value)


class TestDefaults:
    def test_nothing_is_required(self) -> None:
        connection = connect()
        assert connection.protocol == "http/protobuf"
        assert connection.endpoint == "http://localhost:4318/v1/logs"
        assert connection.compression == "none"
        assert connection.headers == {}
        assert not connection.secure

    def test_of_grpc(self) -> None:
        connection = connect(protocol="grpc")
        assert connection.endpoint == "localhost:4317"
        assert not connection.secure

    def test_of_the_resource(self) -> None:
        attributes = resource_attributes(make_config())
        assert attributes["service.name"] == "zenml"
        assert attributes["service.version"]
        assert attributes["telemetry.sdk.language"] == "python"

    def test_requirements_name_the_extra(self) -> None:
        assert make_config().requirements == {"composite-logstore[otlp]"}

    def test_cannot_be_read(self) -> None:
        assert not make_config().readable


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/logs"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/logs"),
        ("https://otlp.example.com", "https://otlp.example.com/v1/logs"),
        ("https://otlp.example.com?tenant=1", "https://otlp.example.com/v1/logs?tenant=1"),
        ("https://otlp.example.com/v1/logs", "https://otlp.example.com/v1/logs"),
        ("https://otlp.example.com/otlp", "https://otlp.example.com/otlp"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/logs"),
    ],
)
def test_an_http_endpoint_without_a_path_gets_one(endpoint: str, url: str) -> None:
    assert connect(endpoint=endpoint).endpoint == url


@pytest.mark.parametrize(
    ("endpoint", "insecure", "target", "secure"),
    [
        ("127.0.0.1:4317", None, "127.0.0.1:4317", True),
        ("127.0.0.1:4317", False, "127.0.0.1:4317", True),
        ("127.0.0.1:4317", True, "127.0.0.1:4317", False),
        ("[::1]:4317", True, "[::1]:4317", False),
        ("http://collector:4317", None, "collector:4317", False),
        ("https://collector:4317/", None, "collector:4317", True),
        ("https://otlp.example.com", None, "otlp.example.com:443", True),
    ],
)
def test_a_grpc_endpoint(endpoint: str, insecure: bool | None, target: str, secure: bool) -> None:
    connection = connect(protocol="grpc", endpoint=endpoint, insecure=insecure)
    assert (connection.endpoint, connection.secure) == (target, secure)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"endpoint": "secret-part:4318"}, "'endpoint' must be a URL; begin it with http:// or https://"),
            ({"endpoint": "ftp://secret-part"}, "'endpoint' must be a URL"),
            ({"endpoint": "http://:4318"}, "'endpoint' has no host"),
            ({"endpoint": "http://secret-part:port"}, "'endpoint' is not a URL"),
            ({"endpoint": "http://[secret-part"}, "'endpoint' is not a URL"),
            ({"endpoint": "https://me:secret-part@host"}, "'endpoint' holds a user or a password"),
            ({"endpoint": ""}, "endpoint"),
            ({"endpoint": "secret-part", "protocol": "grpc"}, "write it as host:port"),
            ({"endpoint": "http://secret-part", "protocol": "grpc"}, "has no port"),
            ({"endpoint": "http://secret-part:1/v1/logs", "protocol": "grpc"}, "gRPC knows none"),
            ({"endpoint": "https://host", "insecure": True}, "'insecure' contradicts 'endpoint'"),
            ({"endpoint": "http://host", "insecure": False}, "'insecure' contradicts 'endpoint'"),
            ({"endpoint": "http://host", "certificate_file": "secret-part"}, "begin it with https://"),
            ({"protocol": "http/json"}, "protocol"),
            ({"protocol": "grpc", "compression": "deflate"}, "'deflate' exists for 'http/protobuf' alone"),
            ({"compression": "zstd"}, "compression"),
            ({"client_key_file": "secret-part"}, "set 'client_certificate_file' too"),
            ({"headers": {"authorization": "secret-part\nx"}}, "'headers.authorization' has a line break"),
            ({"headers": {"authorization": "secret-part-ü"}}, "beyond ASCII"),
            ({"headers": {"my header": "secret-part"}}, "not a header's name"),
            ({"headers": {"Content-Type": "secret-part"}}, "is set by the exporter"),
            ({"headers": {"grpc-timeout": "secret-part"}, "protocol": "grpc"}, "begins with 'grpc-'"),
            ({"headers": {"key-bin": "secret-part"}, "protocol": "grpc"}, "ends in '-bin'"),
            ({"resource_attributes": {"n": 1 << 64}}, "'n' is beyond 64 bits"),
            ({"endpont": "http://secret-part"}, "endpont"),
        ],
    )
    def test_say_the_field_and_the_fix_and_not_the_value(self, settings: dict[str, Any], words: str) -> None:
        assert words in mistake(**settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"endpoint": "{{otlp.endpoint}}"},
            {"endpoint": "https://{{otlp.host}}:4318"},
            {"headers": {"authorization": "Bearer {{otlp.token}}"}},
            {"certificate_file": "{{otlp.file}}"},
        ],
    )
    def test_a_reference_is_left_alone(self, settings: dict[str, Any]) -> None:
        config = make_config(**settings)
        config.check()

    def test_headers_are_hidden(self) -> None:
        config = make_config(headers={"authorization": "Bearer test-key"})
        assert "test-key" not in repr(config)
        assert "test-key" not in repr(Connection.of(config))

    def test_what_a_secret_turned_out_to_be_is_checked_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=test-key%0Ax")
        with pytest.raises(UnavailableError, match="OTEL_EXPORTER_OTLP_HEADERS: 'authorization' has a line break"):
            connect()


class TestVariables:
    def test_are_used_for_what_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = make_config()
        # Set only now: what counts is the machine where the exporter is created.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://otlp.example.com/base/")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20test-key, x-tenant = 7 ,")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        connection = Connection.of(config)
        assert connection.endpoint == "https://otlp.example.com/base/v1/logs"
        assert connection.headers == {"authorization": "Bearer test-key", "x-tenant": "7"}
        assert connection.compression == "gzip"

    def test_for_logs_come_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable, general, logs in (
            ("ENDPOINT", "http://general:1", "http://logs:2"),
            ("HEADERS", "a=general", "b=logs"),
            ("COMPRESSION", "gzip", "none"),
            ("PROTOCOL", "grpc", "http/protobuf"),
        ):
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{variable}", general)
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_LOGS_{variable}", logs)
        connection = connect()
        # The variable for logs is used as it is, without /v1/logs.
        assert connection.endpoint == "http://logs:2"
        assert connection.headers == {"b": "logs"}
        assert connection.compression == "none"
        assert connection.protocol == "http/protobuf"

    def test_settings_come_before_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://variable:1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "a=variable")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf")
        connection = connect(protocol="grpc", endpoint="http://setting:2", headers={}, compression="none")
        assert connection.endpoint == "setting:2"
        assert connection.headers == {}
        assert connection.compression == "none"

    def test_an_empty_one_counts_as_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", " ")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:1")
        assert connect().endpoint == "http://general:1/v1/logs"

    @pytest.mark.parametrize(("value", "secure"), [("true", False), ("TRUE", False), ("false", True), ("", True)])
    def test_insecure_is_for_an_endpoint_without_a_scheme(
        self, monkeypatch: pytest.MonkeyPatch, value: str, secure: bool
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", value)
        assert connect(protocol="grpc", endpoint="host:4317").secure is secure
        assert connect(protocol="grpc", endpoint="https://host:4317").secure

    @pytest.mark.parametrize(
        ("variable", "value", "words"),
        [
            ("PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL names a protocol that is not supported"),
            ("COMPRESSION", "secret-part", "OTEL_EXPORTER_OTLP_COMPRESSION names a compression"),
            ("ENDPOINT", "secret-part:1", "OTEL_EXPORTER_OTLP_ENDPOINT must be a URL"),
            ("HEADERS", "a=b,secret-part", "OTEL_EXPORTER_OTLP_HEADERS: header number 2"),
        ],
    )
    def test_a_mistake_in_one_is_told(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
    ) -> None:
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{variable}", value)
        with pytest.raises(UnavailableError) as error:
            make_config().create_exporter()
        assert words in str(error.value)
        assert "secret-part" not in str(error.value)

    def test_of_the_resource(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=b,service.version=2,team=x,zone=1")
        config = make_config(resource_attributes={"zone": 7})
        attributes = resource_attributes(config)
        assert (attributes["service.name"], attributes["service.version"]) == ("b", "2")
        assert (attributes["team"], attributes["zone"]) == ("x", 7)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "a")
        assert resource_attributes(config)["service.name"] == "a"
        named = make_config(service_name="s", service_version="v", resource_attributes={"service.name": "t"})
        assert resource_attributes(named)["service.name"] == "s"
        assert resource_attributes(named)["service.version"] == "v"

    @pytest.mark.parametrize("name", ["OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"])
    def test_that_are_no_unicode_cost_no_event(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "team=\udcff")
        assert encode_resource(resource_attributes(make_config()))


class TestCertificates:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, str]:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        return {
            "certificate_file": str(tmp_path / "ca.pem"),
            "client_key_file": str(tmp_path / "key.pem"),
            "client_certificate_file": str(tmp_path / "cert.pem"),
        }

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_are_read_when_the_exporter_is_created(self, files: dict[str, str], protocol: str) -> None:
        config = make_config(endpoint="https://localhost:1", protocol=protocol, **files)
        config.check()
        config.create_exporter().close()

    @pytest.mark.parametrize("field", ["certificate_file", "client_key_file", "client_certificate_file"])
    def test_a_missing_one_is_named(self, files: dict[str, str], field: str) -> None:
        files[field] += ".missing"
        config = make_config(endpoint="https://localhost:1", **files)
        with pytest.raises(ValueError, match=f"'{field}': the file does not exist"):
            config.check()
        with pytest.raises(UnavailableError, match=f"'{field}': the file cannot be read"):
            config.create_exporter()

    @pytest.mark.parametrize("field", ["certificate_file", "client_key_file", "client_certificate_file"])
    def test_one_that_is_none_is_refused(self, files: dict[str, str], field: str) -> None:
        Path(files[field]).write_text("test-key")
        with pytest.raises(UnavailableError, match=r"PEM") as error:
            make_config(endpoint="https://localhost:1", **files).create_exporter()
        assert "test-key" not in str(error.value)

    def test_an_encrypted_key_is_refused_and_no_password_asked_for(self, files: dict[str, str]) -> None:
        from cryptography.hazmat.primitives import serialization

        path = Path(files["client_key_file"])
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(b"test-password")
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
        with pytest.raises(UnavailableError, match="the key without a password"):
            make_config(endpoint="https://localhost:1", **files).create_exporter()

    def test_are_not_needed_without_tls(self, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", files["certificate_file"] + ".missing")
        make_config(endpoint="http://localhost:1").create_exporter().close()
        with pytest.raises(UnavailableError, match="OTEL_EXPORTER_OTLP_CERTIFICATE: the file cannot be read"):
            make_config(endpoint="https://localhost:1").create_exporter()

    def test_a_key_from_a_variable_is_of_no_use_alone(
        self, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", files["client_key_file"])
        with pytest.raises(UnavailableError, match="OTEL_EXPORTER_OTLP_CLIENT_KEY is of no use alone"):
            make_config(endpoint="https://localhost:1").create_exporter()


class TestExtra:
    @pytest.mark.parametrize("missing", ["opentelemetry.proto", "grpc"])
    def test_check_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
        monkeypatch.setattr(
            "composite_logstore_otlp.config.find_spec", lambda name: None if name == missing else find_spec(name)
        )
        with pytest.raises(ValueError, match=r"install 'composite-logstore\[otlp\]'"):
            make_config().check()

    def test_the_exporter_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("exporter", "encoding"):
            monkeypatch.delitem(sys.modules, f"composite_logstore_otlp.{module}", raising=False)
        monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.logs.v1.logs_service_pb2", None)
        with pytest.raises(UnavailableError, match=r"install 'composite-logstore\[otlp\]'"):
            make_config().create_exporter()
