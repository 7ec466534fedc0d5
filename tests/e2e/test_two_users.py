"""ZenML's real server, an author of log stores who means ill, and an administrator who opens a run.

Nothing is logged to these log stores, so no agent would have anything to deliver.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.integration.test_on_the_server import Host
from tests.servers.zenml_server import HostedZenML

pytestmark = [pytest.mark.e2e, pytest.mark.deep]

PASSWORD = "the-author-s-password"
SECRET = "the-administrator-s-own"

# What the administrator does: everything that takes a client, in one process.
PREPARE = """
import sys
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

Client().create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
Client().create_secret("adminsecret", {"token": sys.argv[2]}, private=True)
Client().create_user("author", password=sys.argv[3])

@step
def nothing() -> None:
    pass

@pipeline(enable_cache=False)
def one_step():
    nothing()

open(sys.argv[1], "w").write(str(one_step().id))
"""


@dataclass
class Site:
    """A server, the author's session, the author's host, and a run of the administrator's.

    Attributes:
        zenml: The server, with the administrator's session.
        author: The author's session.
        host: Where the author's log stores search.
        run_id: The run.
        project: Its project.
    """

    zenml: HostedZenML
    author: requests.Session
    host: Host
    run_id: str
    project: str

    def post(self, session: requests.Session, path: str, **body: Any) -> requests.Response:
        return session.post(f"{self.zenml.url}/api/v1{path}", json=body, timeout=60)

    def register(self, name: str, *children: dict[str, Any]) -> requests.Response:
        """Have the author register a log store, past this package's own client."""
        configuration = {"primary": children[0]["name"], "children": list(children)}
        user = self.author.get(f"{self.zenml.url}/api/v1/current-user", timeout=60).json()["id"]
        component = {"name": name, "type": "log_store", "flavor": "composite", "configuration": configuration}
        return self.post(self.author, "/components", user=user, **component)

    def open(self, store_id: str) -> requests.Response:
        """Have the administrator open a stream of the run that the log store has."""
        logs = {"source": f"s-{store_id[:8]}", "log_store_id": store_id, "project": self.project}
        created = self.post(self.zenml.session, "/logs", pipeline_run_id=self.run_id, **logs)
        assert created.ok, created.text
        return self.zenml.session.get(f"{self.zenml.url}/api/v1/logs/{created.json()['id']}/entries", timeout=60)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory: Path = tmp_path_factory.mktemp("two-users")
    with HostedZenML(directory / "zenml") as zenml, Host() as host:
        program, run_id = directory / "prepare.py", directory / "run_id"
        program.write_text(PREPARE)
        zenml.python(str(program), str(run_id), SECRET, PASSWORD)
        login = {"username": "author", "password": PASSWORD}
        token = requests.post(f"{zenml.url}/api/v1/login", data=login, timeout=60).json()["access_token"]
        author = requests.Session()
        author.trust_env = False
        author.headers["Authorization"] = f"Bearer {token}"
        with author:
            run = zenml.get(f"/runs/{run_id.read_text()}", hydrate=True)
            yield Site(zenml, author, host, run["id"], run["body"]["project_id"])


def datadog(to: Site, **settings: str) -> dict[str, Any]:
    keys = {"api_key": "k", "application_key": "a"}
    return {"name": "live", "type": "datadog", "api_endpoint": to.host.url, **keys, **settings}


def test_opening_a_run_gives_the_author_of_its_log_store_no_private_secret(site: Site) -> None:
    registered = site.register("ill", datadog(site, api_key="k-{{adminsecret.token}}"))
    assert registered.ok, registered.text
    answer = site.open(registered.json()["id"])
    assert answer.status_code in (502, 503)
    assert "adminsecret" in answer.text
    assert SECRET not in answer.text
    assert site.host.keys == []


def test_the_author_s_own_secret_is_used(site: Site) -> None:
    created = site.post(site.author, "/secrets", name="authors", private=False, values={"token": "the-author-s"})
    assert created.ok, created.text
    registered = site.register("well", datadog(site, api_key="{{authors.token}}"))
    site.host.keys.clear()
    answer = site.open(registered.json()["id"])
    assert answer.status_code == 200, answer.text
    assert site.host.keys == ["the-author-s", "a"]


@pytest.mark.parametrize("field", ["api_endpoint", "site", "service_name"])
def test_the_server_refuses_a_reference_in_what_others_see(site: Site, field: str) -> None:
    refused = site.register(f"ill-{field}".replace("_", "-"), datadog(site, **{field: "{{adminsecret.token}}"}))
    assert refused.status_code in (400, 422), refused.text
    assert f"'{field}'" in refused.text
