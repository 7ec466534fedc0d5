"""What ZenML's server does for whoever reads, with settings that somebody else wrote.

ZenML's own functions and database; who is logged in is simulated. `tests/e2e/test_two_users.py` has the real server.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import requests
from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.enums import StackComponentType
from zenml.exceptions import IllegalOperationError
from zenml.models import ComponentRequest, ComponentResponse, ComponentUpdate, SecretRequest, UserResponse
from zenml.stack import StackComponent
from zenml.utils.logging_utils import fetch_logs
from zenml.zen_server import utils

from composite_logstore.reading.nesting import DEEPEST, MOST
from composite_logstore.testing import make_events, make_stream
from composite_logstore.zenml import LogsEntriesResponse, LogStoreError
from composite_logstore_component import components
from composite_logstore_otlp.config import OtlpChildConfig
from tests.servers.loki import Loki
from tests.simulation import make_logs

pytestmark = pytest.mark.integration

LOG_STORE = StackComponentType.LOG_STORE
ARTIFACT_STORE = StackComponentType.ARTIFACT_STORE


class Host:
    """The host of a component's author: it keeps the keys that it is sent, and has no logs."""

    def __init__(self) -> None:
        keys: list[str] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                keys.extend(self.headers[name] for name in ("dd-api-key", "dd-application-key") if name in self.headers)
                body = json.dumps({"data": []}).encode()
                self.send_response(host.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.keys = keys
        self.status = 200
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Host:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def _host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def host(_host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The author's host. ZenML's own Datadog log store asks a host of Datadog's site, which here is the same."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _host.status = 200
    post = requests.post
    monkeypatch.setattr(
        "zenml.log_stores.datadog.datadog_log_store.requests.post",
        lambda url, **settings: post(url.replace("https://api.author.example", _host.url), **settings),
    )
    return _host


class Server:
    """ZenML's server, as far as it matters to a log store."""

    def __init__(self, users: Sequence[UserResponse], monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Client().zen_store
        self.admin, self.author, self.third = users
        self.user = self.admin
        self._components: list[ComponentResponse] = []
        self._secrets: list[tuple[UserResponse, UUID]] = []
        monkeypatch.setenv(ENV_ZENML_SERVER, "true")
        monkeypatch.setattr(utils, "zen_store", lambda: self.store)
        monkeypatch.setattr(utils, "get_auth_context", lambda: SimpleNamespace(user=self.user))
        # `rbac.utils` has its own name for it.
        monkeypatch.setattr("zenml.zen_server.rbac.utils.get_auth_context", lambda: SimpleNamespace(user=self.user))

    @contextmanager
    def acting_for(self, user: UserResponse) -> Iterator[None]:
        before, self.user = self.user, user
        try:
            yield
        finally:
            self.user = before

    def secret(self, user: UserResponse, name: str, value: str, private: bool) -> None:
        with self.acting_for(user):
            request = SecretRequest(name=name, private=private, values={"token": value}, user=user.id)
            self._secrets.append((user, self.store.create_secret(request).id))

    def component(
        self,
        user: UserResponse,
        flavor: str,
        kind: StackComponentType = LOG_STORE,
        name: str | None = None,
        **settings: Any,
    ) -> ComponentResponse:
        with self.acting_for(user):
            request = ComponentRequest(
                name=name or f"{flavor}-{uuid4().hex[:8]}",
                type=kind,
                flavor=flavor,
                configuration=settings,
                user=user.id,
            )
            model = self.store.create_stack_component(request)
        self._components.append(model)
        return model

    def composite(self, user: UserResponse, *children: dict[str, Any], **settings: Any) -> ComponentResponse:
        settings = {"primary": children[0]["name"], **settings}
        return self.component(user, "composite", children=list(children), **settings)

    def read(self, user: UserResponse, model: ComponentResponse, **arguments: Any) -> LogsEntriesResponse:
        """Do what ZenML's server does when the user opens a stream of this log store."""
        logs = make_logs(model)  # type: ignore[arg-type]  # it needs an id alone
        with self.acting_for(user):
            return fetch_logs(logs, self.store, **arguments)

    def clean_up(self) -> None:
        for model in self._components:
            self.store.delete_stack_component(model.id)
        for user, id in self._secrets:
            with self.acting_for(user):
                self.store.delete_secret(id)


@pytest.fixture(scope="module")
def users() -> Iterator[list[UserResponse]]:
    """An administrator, the author of components, and somebody else. The flavor is registered, too."""
    client = Client()
    flavor = client.create_flavor("composite_logstore.CompositeLogStoreFlavor", LOG_STORE)
    made = [client.create_user(f"{name}-{uuid4().hex[:6]}", password="a-password") for name in ("author", "third")]
    yield [client.zen_store.get_user(), *made]
    for user in made:
        client.delete_user(str(user.id))
    client.delete_flavor(str(flavor.id))


@pytest.fixture
def server(users: list[UserResponse], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(users, monkeypatch)
    yield server
    server.clean_up()


# Secrets

PUBLIC, PRIVATE = False, True
# Whose secret it is, whether it is private, who reads → whether the component's author gets it.
SECRETS = [
    ("author", PUBLIC, "author", True),
    ("author", PUBLIC, "admin", True),
    ("author", PRIVATE, "author", True),
    # ZenML shows a private secret to nobody but its user.
    ("author", PRIVATE, "admin", False),
    ("author", PRIVATE, "third", False),
    ("admin", PUBLIC, "author", True),
    ("admin", PUBLIC, "admin", True),
    ("admin", PRIVATE, "admin", False),
    ("admin", PRIVATE, "author", False),
    ("third", PRIVATE, "third", False),
    ("third", PRIVATE, "admin", False),
]
WAYS = ["child", "zenml's own log store"]


def leaking(server: Server, host: Host, way: str, secret: str, user: UserResponse | None = None) -> ComponentResponse:
    """Return a log store of the author's that sends a secret to a host of the author's when it is read."""
    user = user or server.author
    reference = f"{{{{{secret}.token}}}}"
    if way == "child":
        keys = {"api_key": f"k-{reference}", "application_key": "mine"}
        return server.composite(user, {"name": "live", "type": "datadog", "api_endpoint": host.url, **keys})
    theirs = server.component(user, "datadog", site="author.example", api_key=reference, application_key="mine")
    return server.composite(user, {"name": "theirs", "type": "component", "component": str(theirs.id)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("whose", "private", "reader", "expected"), SECRETS)
def test_the_author_of_a_component_gets_no_secret_that_is_not_the_author_s_to_use(
    server: Server, host: Host, way: str, whose: str, private: bool, reader: str, expected: bool
) -> None:
    value, name = uuid4().hex, f"secret-{uuid4().hex[:8]}"
    server.secret(getattr(server, whose), name, value, private)
    model = leaking(server, host, way, name)
    host.keys.clear()
    if expected:
        server.read(getattr(server, reader), model)
        assert any(value in key for key in host.keys)
        return
    with pytest.raises(LogStoreError, match=f"secret '{name}' does not exist, or it is private"):
        server.read(getattr(server, reader), model)
    assert host.keys == []


@pytest.mark.parametrize("way", WAYS)
def test_a_private_secret_does_not_take_the_place_of_another_of_its_name(server: Server, host: Host, way: str) -> None:
    name = f"secret-{uuid4().hex[:8]}"
    server.secret(server.author, name, "the-author-s", PRIVATE)
    server.secret(server.admin, name, "the-admin-s", PRIVATE)
    model = leaking(server, host, way, name)
    host.keys.clear()
    server.read(server.author, model)
    assert any("the-author-s" in key for key in host.keys)
    host.keys.clear()
    with pytest.raises(LogStoreError):
        server.read(server.admin, model)
    assert host.keys == []


@pytest.mark.parametrize("way", ["a reference", "a name", "a reference to a name"])
def test_an_artifact_store_is_not_opened_with_the_reader_s_private_secret(server: Server, way: str) -> None:
    name, own = (f"secret-{uuid4().hex[:8]}" for _ in range(2))
    server.secret(server.admin, name, "a-key", PRIVATE)
    server.secret(server.author, own, name, PUBLIC)
    settings = {
        "a reference": {"key": f"{{{{{name}.token}}}}", "secret": "x"},
        "a name": {"authentication_secret": name},
        "a reference to a name": {"authentication_secret": f"{{{{{own}.token}}}}"},
    }[way]
    bucket = server.component(server.author, "s3", ARTIFACT_STORE, path="s3://bucket", **settings)
    for child in (
        {"name": "a", "type": "artifact", "artifact_store": str(bucket.id)},
        {"name": "a", "type": "component", "component": str(bucket.id)},
    ):
        with pytest.raises(LogStoreError, match=f"secret '{name}' does not exist, or it is private"):
            server.read(server.admin, server.composite(server.author, child))


@pytest.mark.parametrize(("allowed", "expected"), [(True, True), (False, False)])
def test_where_zenml_has_permissions_it_is_the_component_s_owner_who_must_have_them(
    server: Server, host: Host, monkeypatch: pytest.MonkeyPatch, allowed: bool, expected: bool
) -> None:
    name = f"secret-{uuid4().hex[:8]}"
    server.secret(server.admin, name, "the-admin-s", PUBLIC)
    model = leaking(server, host, "child", name)
    asked: list[tuple[UUID, str]] = []

    class Permissions:
        def check_permissions(self, user: UserResponse, resources: Any, action: Any) -> dict[Any, bool]:
            asked.append((user.id, str(action)))
            return dict.fromkeys(resources, allowed)

    monkeypatch.setattr(utils, "server_config", lambda: SimpleNamespace(rbac_enabled=True))
    monkeypatch.setattr(utils, "rbac", Permissions)
    host.keys.clear()
    if expected:
        server.read(server.admin, model)
    else:
        with pytest.raises(LogStoreError):
            server.read(server.admin, model)
    assert any("the-admin-s" in key for key in host.keys) is expected
    assert asked == [(server.author.id, "read_secret_value")]


def test_what_one_may_not_read_keeps_no_other_from_reading(server: Server, host: Host) -> None:
    """That a child could not be read is remembered for a while, and its fallback answers."""
    name = f"secret-{uuid4().hex[:8]}"
    server.secret(server.author, name, "the-author-s", PRIVATE)
    keys = {"api_endpoint": host.url, "api_key": "x", "application_key": "y"}
    model = server.composite(
        server.author,
        {"name": "live", "type": "datadog", **keys, "api_key": f"{{{{{name}.token}}}}"},
        {"name": "spare", "type": "datadog", **keys},
        fetch_fallback=["spare"],
    )
    assert name in server.read(server.admin, model).items[0].message
    host.keys.clear()
    assert server.read(server.author, model).items == []
    assert "the-author-s" in host.keys


def test_whoever_may_not_read_a_component_is_told_so(
    server: Server, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(id: Any, get_method: Any) -> None:
        raise IllegalOperationError("Insufficient permissions")

    model = stacked(server, host, 1)
    logs = make_logs(model)  # type: ignore[arg-type]
    store = StackComponent.from_model(model)
    monkeypatch.setattr("zenml.zen_server.rbac.endpoint_utils.verify_permissions_and_get_entity", refuse)
    with pytest.raises(LogStoreError, match="ZenML does not let you read what it names"):
        store.fetch(logs)  # type: ignore[attr-defined]


# What else settings can name


def test_nothing_is_imported_opened_or_started_because_settings_name_it(
    server: Server, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_by_the_author.py").write_text("class Exporter: pass")
    monkeypatch.syspath_prepend(tmp_path)
    # Whoever opened this for reading would wait for ever.
    key = tmp_path / "key.pem"
    os.mkfifo(key)
    files = {"certificate_file": str(key), "client_certificate_file": str(key), "client_key_file": str(key)}
    model = server.composite(
        server.author,
        {"name": "live", "type": "datadog", "api_endpoint": host.url, "api_key": "a", "application_key": "b"},
        {"name": "code", "type": "otel", "exporter": "named_by_the_author.Exporter"},
        {"name": "files", "type": "otlp", "endpoint": "https://example.com", **files},
        spool_directory=str(tmp_path / "spool"),
        durability="write_ahead",
    )
    threads = set(threading.enumerate())
    assert server.read(server.admin, model).items == []
    assert "named_by_the_author" not in sys.modules
    assert {thread.name for thread in set(threading.enumerate()) - threads if "composite" in thread.name} == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "named_by_the_author.py"]


# Log stores in log stores


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the log stores that were opened for a child, one after the other."""
    names: list[str] = []
    load = components.load

    def noted(model: ComponentResponse) -> Any:
        names.append(model.name)
        return load(model)

    monkeypatch.setattr(components, "load", noted)
    monkeypatch.setattr("composite_logstore_component.reader.load", noted)
    return names


def through(*inner: ComponentResponse | str) -> list[dict[str, Any]]:
    """Return children that are these log stores, given by name or id in turn."""
    names = [model if isinstance(model, str) else model.name for model in inner]
    return [{"name": f"c{n}", "type": "component", "component": name} for n, name in enumerate(names)]


def stacked(server: Server, host: Host, depth: int, width: int = 1) -> ComponentResponse:
    """Return a log store with so many nested in it, each in the one above: as its primary and as each fallback."""
    live = {"name": "live", "type": "datadog", "api_endpoint": host.url, "api_key": "a", "application_key": "b"}
    model = server.composite(server.author, live)
    for _ in range(depth):
        children = through(model, *[str(model.id)] * (width - 1))
        fallbacks = [child["name"] for child in children[1:]]
        model = server.composite(server.author, *children, fetch_fallback=fallbacks)
    return model


def test_nested_log_stores_are_read_through_as_deep_as_is_allowed(
    server: Server, host: Host, opened: list[str]
) -> None:
    host.keys.clear()
    assert server.read(server.author, stacked(server, host, DEEPEST)).items == []
    assert host.keys == ["a", "b"]
    assert len(opened) == DEEPEST


@pytest.mark.parametrize("depth", [DEEPEST + 1, 8])
def test_what_is_nested_more_deeply_is_refused_and_each_log_store_visited_once(
    server: Server, host: Host, opened: list[str], depth: int
) -> None:
    host.keys.clear()
    with pytest.raises(LogStoreError, match=f"nested too deeply; nest log stores at most {DEEPEST} deep"):
        server.read(server.author, stacked(server, host, depth, width=3))
    assert len(opened) == len(set(opened)) <= DEEPEST
    assert host.keys == []


def test_a_log_store_that_fails_is_asked_once_whichever_ways_lead_to_it(
    server: Server, host: Host, opened: list[str]
) -> None:
    host.keys.clear()
    host.status = 503
    with pytest.raises(LogStoreError, match="Datadog is temporarily unavailable") as raised:
        server.read(server.author, stacked(server, host, DEEPEST, width=3))
    assert len(str(raised.value)) < 2_000
    assert host.keys == ["a", "b"]
    assert len(opened) == DEEPEST


@pytest.mark.parametrize("by", ["name", "id"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_circles_end(server: Server, opened: list[str], by: str, length: int) -> None:
    names = [f"ring-{length}-{uuid4().hex[:8]}" for _ in range(length)]
    ring = [
        server.component(server.author, "composite", name=name, primary="c0", children=through(names[(n + 1) % length]))
        for n, name in enumerate(names)
    ]
    if by == "id":
        for n, model in enumerate(ring):
            children = through(str(ring[(n + 1) % length].id))
            update = ComponentUpdate(configuration={"primary": "c0", "children": children})
            server.store.update_stack_component(model.id, update)
        ring = [server.store.get_stack_component(model.id) for model in ring]
    with pytest.raises(LogStoreError, match="contains itself"):
        server.read(server.author, ring[0])
    assert len(opened) == len(set(opened)) == length - 1


def test_as_many_are_read_through_for_a_page_as_is_allowed(server: Server, opened: list[str]) -> None:
    leaf = {"name": "gone", "type": "artifact", "artifact_store": "nowhere"}
    leaves = [server.composite(server.author, leaf) for _ in range(MOST + 3)]
    children = through(*leaves)
    fallbacks = [child["name"] for child in children[1:]]
    with pytest.raises(LogStoreError, match=f"is one too many; nest at most {MOST} log stores in one"):
        server.read(server.author, server.composite(server.author, *children, fetch_fallback=fallbacks))
    assert len(opened) == MOST


# The section `read`


@pytest.mark.parametrize(("private", "expected"), [(PUBLIC, True), (PRIVATE, False)])
def test_a_section_read_gets_the_secrets_that_its_author_may_use(
    server: Server, monkeypatch: pytest.MonkeyPatch, private: bool, expected: bool
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    name, stream = f"secret-{uuid4().hex[:8]}", make_stream()
    server.secret(server.third, name, "a-token", private)
    with Loki() as loki:
        loki.token = "a-token"
        child = {"name": "loki", "type": "otlp", "endpoint": f"{loki.url}/otlp/v1/logs"}
        exporter = OtlpChildConfig(**child, headers={"authorization": "Bearer a-token"}).create_exporter()
        exporter.export(make_events(["hello"], stream))
        exporter.close()
        section = {"type": "loki", "query_url": loki.url, "api_key": f"{{{{{name}.token}}}}"}
        model = server.composite(server.author, {**child, "read": section})
        logs = make_logs(model, id=stream.id)  # type: ignore[arg-type]  # it needs an id alone
        with server.acting_for(server.admin):
            if expected:
                assert [entry.message for entry in fetch_logs(logs, server.store).items] == ["hello"]
                return
            with pytest.raises(LogStoreError, match=f"secret '{name}' does not exist, or it is private"):
                fetch_logs(logs, server.store)
        assert len(loki.asked) == 1
