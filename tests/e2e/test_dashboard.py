"""ZenML's dashboard in a real browser: what people see of a run's logs, and of what became of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.deep import mostly_deep
from tests.e2e.conftest import PATIENT, PATIENT_CHILD
from tests.e2e.demonstrated import LONG, RANKS
from tests.environments import without_this_package
from tests.patience import PATIENCE_SECONDS
from tests.servers.clickhouse import ClickHouse, RotelToClickHouse, is_installed
from tests.servers.datadog import Datadog
from tests.servers.zenml_server import PASSWORD, USER, HostedZenML

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).with_name("demonstrated.py")
ARCHIVE = {"name": "archive", "type": "artifact", **PATIENT_CHILD}
MILLIS = 30_000
IMAGES = Path(__file__).parents[2] / "docs" / "images"
# What has a screen does the drawing; without one, what would stand in for it can take longer than any timeout.
FLAGS = ["--disable-gpu", "--disable-gpu-compositing", "--disable-software-rasterizer"]
# It would look for updates, and ask who is signed in.
FLAGS += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed here")
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("there is no Chromium on this machine; install your system's package, such as Debian's chromium")
    with playwright.sync_playwright() as started:
        # Its sandbox needs rights that a container does not have.
        browser = started.chromium.launch(executable_path=executable, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    # Without Datadog's thorough checks, which take long on a busy machine.
    with Datadog(checked=False) as datadog:
        yield datadog


class Dashboard:
    """The dashboard of a server, with somebody who has logged in, and a run of the demo's pipeline.

    Attributes:
        zenml: The server.
        page: What the browser shows.
    """

    def __init__(self, zenml: HostedZenML, page: Page, settings: dict[str, Any]) -> None:
        """Log in, and run the pipeline with these settings of the log store."""
        self.zenml = zenml
        self.page = page
        self.settings = settings
        output = zenml.directory / "ids.json"
        zenml.python(str(PROGRAM), json.dumps(settings), str(output))
        self._ids = json.loads(output.read_text())
        self._log_in()

    def _log_in(self) -> None:
        # What the dashboard asks people when they come for the first time.
        asked = {"full_name": "Ada", "email_opted_in": False, "user_metadata": {"finished_onboarding_survey": True}}
        assert self.zenml.session.put(f"{self.zenml.url}/api/v1/current-user", json=asked).ok
        self.page.set_default_timeout(MILLIS)
        self.page.goto(self.zenml.url)
        self.page.locator("input[name=username]").fill(USER)
        self.page.locator("input[type=password]").fill(PASSWORD)
        self.page.get_by_role("button", name="Login").click()
        self.page.wait_for_url(lambda url: "login" not in url)

    def update(self, **changes: Any) -> None:
        """Change settings of the log store."""
        url = f"{self.zenml.url}/api/v1/components/{self._ids['log store']}"
        answer = self.zenml.session.put(url, json={"configuration": {**self.settings, **changes}})
        assert answer.ok, answer.text

    def open(self, tab: str) -> None:
        """Open a tab of the run's step, as people do."""
        self.page.goto(f"{self.zenml.url}/projects/default/runs/{self._ids['run']}")
        self.page.get_by_text("train", exact=True).click()
        self.page.get_by_role("dialog").get_by_role("tab", name=tab).click()

    def lines(self, searched: str) -> list[str]:
        """Return what the open logs show when this is searched for. It waits until there is something."""
        self.page.get_by_placeholder("Search logs").fill(searched)
        rows = self._rows.filter(has_text=searched)
        rows.first.wait_for()
        # Where it is cut into pieces, they are rows of their own.
        return [row.locator("> div > div").nth(2).inner_text().removesuffix("\n") for row in rows.all()]

    def picture(self, name: str, searched: str) -> None:
        """Show what is found, and with `PICTURES=write` in the environment take the picture of docs/images."""
        assert self.lines(searched)
        if os.environ.get("PICTURES") == "write":
            # The dashboard marks what it finds a moment later.
            self._rows.locator("span.outline-warning", has_text=searched).wait_for()
            self.page.screenshot(path=IMAGES / name)

    @property
    def _rows(self) -> Locator:
        return self.page.get_by_label("Log entries").locator("[data-index]")

    def summary(self, child: str) -> dict[str, str]:
        """Return what the open metadata say of a child: a name → what is beside it."""
        of_child = self.page.get_by_role("button", name=f"log_store.{child}", exact=True)
        of_child.click()
        shown = self.page.get_by_role("dialog").inner_text().splitlines()
        of_child.click()
        return dict(pairwise(shown[shown.index(f"log_store.{child}") :]))

    def get(self, path: str, **parameters: Any) -> tuple[int, str]:
        """Ask the server's API for the step's logs, as other programs do."""
        logs = self.zenml.streams(self._ids["run"])["step"]["id"]
        answer = self.zenml.session.get(f"{self.zenml.url}/api/v1/logs/{logs}{path}", params=parameters)
        return answer.status_code, answer.text


@pytest.fixture(scope="module")
def open_dashboard(browser: Browser) -> Iterator[Callable[..., Dashboard]]:
    pages = []

    def start(zenml: HostedZenML, settings: dict[str, Any]) -> Dashboard:
        pages.append(browser.new_page(viewport={"width": 1400, "height": 900}))
        return Dashboard(zenml, pages[-1], settings)

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def dashboard(
    open_dashboard: Callable[..., Dashboard], datadog: Datadog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dashboard]:
    """That of a server that has this package, and three children of which one is never reached."""
    children = [
        ARCHIVE,
        {"name": "live", "type": "datadog", **datadog.settings, **PATIENT_CHILD},
        # With no longer wait than the first one it is unavailable at once, and no flush waits for it.
        {"name": "dead", "type": "otlp", "endpoint": "http://127.0.0.1:9", "retry_max_interval_millis": 500},
    ]
    with HostedZenML(tmp_path_factory.mktemp("zenml") / "zenml") as zenml, zenml.chosen_agent():
        yield open_dashboard(zenml, {"primary": "archive", "children": children, **PATIENT})


@pytest.fixture(scope="module")
def without_package(
    open_dashboard: Callable[..., Dashboard], datadog: Datadog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dashboard]:
    """That of a server that does not have this package."""
    directory = tmp_path_factory.mktemp("unmodified")
    python = without_this_package(directory / "environment")
    children = [ARCHIVE, {"name": "live", "type": "datadog", **datadog.settings, **PATIENT_CHILD}]
    with HostedZenML(directory / "zenml", python) as zenml, zenml.chosen_agent():
        yield open_dashboard(
            zenml, {"primary": "archive", "children": children, "serve_from_artifact_store": True, **PATIENT}
        )


def assert_shows_the_logs(dashboard: Dashboard) -> None:
    """Check that the step's logs have its first and its last lines, what was printed, and the long message."""
    dashboard.open("Logs")
    assert dashboard.lines("Training: 5 epochs of 40 batches") == ["Training: 5 epochs of 40 batches"]
    (first,) = dashboard.lines("epoch 1, batch 1:")
    assert re.fullmatch(r"epoch 1, batch 1: loss 3\.99\d\d", first)
    (error,) = dashboard.lines("no checkpoint of epoch 2")
    assert "OSError: no space left on device" in error
    assert dashboard.lines("weights of epoch 5") == [LONG]
    assert dashboard.lines("Trained: the loss is")


@pytest.mark.parametrize("primary", mostly_deep(["archive", "live"]))
def test_a_steps_logs_are_shown(dashboard: Dashboard, primary: str) -> None:
    dashboard.update(primary=primary)
    assert_shows_the_logs(dashboard)


def test_printed_text_is_shown_as_whole_lines_and_a_traceback_as_one_entry(dashboard: Dashboard) -> None:
    dashboard.open("Logs")
    assert dashboard.lines("evaluation:") == ["evaluation: 3 of 4 batches, accuracy 0.91"]
    assert dashboard.lines("evaluation 100") == ["evaluation 100 %"]
    (error,) = dashboard.lines("could not convert")
    first, *_, last = error.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "ValueError: could not convert string to float: 'n/a'"


def test_the_entries_of_a_distributed_training_begin_with_their_rank(dashboard: Dashboard) -> None:
    dashboard.update(primary="archive")
    dashboard.open("Logs")
    lines = [f"[rank {rank}] shard {rank} of {RANKS}: 512 rows" for rank in range(RANKS)]
    assert sorted(dashboard.lines("512 rows")) == lines
    (error,) = dashboard.lines("has no labels")
    first, *_, last = error.splitlines()
    assert first == "[rank 1] Traceback (most recent call last):"
    assert last == "OSError: shard 1 has no labels"
    assert set(dashboard.lines("[rank 1]")) == {lines[1], error}
    dashboard.picture("dashboard-ranks.png", "shard")


@pytest.mark.deep
def test_the_fallbacks_logs_are_shown_while_the_primary_is_down(dashboard: Dashboard, datadog: Datadog) -> None:
    dashboard.update(primary="live", fetch_fallback=["archive"])
    datadog.kill()
    try:
        assert_shows_the_logs(dashboard)
        (notice,) = dashboard.lines("could not be read")
        assert notice.startswith("Child 'live' could not be read")
        assert notice.endswith("The entries below come from child 'archive'.")
    finally:
        datadog.start()


def test_the_final_summary_of_each_child_is_on_the_steps_page(dashboard: Dashboard) -> None:
    dashboard.open("Metadata")
    archive, live, dead = map(dashboard.summary, ("archive", "live", "dead"))
    for summary in (archive, live, dead):
        assert (summary["as_of"], summary["dropped"], summary["rejected"]) == ("the last flush", "0", "0")
    for summary in (archive, live):
        assert (summary["state"], summary["pending"]) == ("healthy", "0")
        assert int(summary["delivered"]) > 200
    assert (dead["state"], dead["delivered"], dead["pending"]) == ("unavailable", "0", archive["delivered"])


@pytest.mark.deep
@pytest.mark.skipif(not is_installed(), reason="there is no engine of ClickHouse for this machine")
def test_what_a_collector_wrote_into_clickhouse_is_shown(
    open_dashboard: Callable[..., Dashboard], tmp_path: Path
) -> None:
    with (
        ClickHouse() as clickhouse,
        RotelToClickHouse(clickhouse) as collector,
        HostedZenML(tmp_path / "zenml") as zenml,
        zenml.chosen_agent(),
    ):
        section = {"type": "clickhouse", "url": clickhouse.url, "database": "otel"}
        section |= {"username": "reader", "password": "right"}
        child: dict[str, Any] = {"name": "sent", "type": "otlp", "endpoint": collector.http_endpoint, "read": section}
        dashboard = open_dashboard(zenml, {"primary": "sent", "children": [child | PATIENT_CHILD], **PATIENT})
        deadline = time.monotonic() + PATIENCE_SECONDS
        # The collector passes on what it has accepted a little later.
        while "Trained: the loss is" not in dashboard.get("/entries", limit=1, start="newest", search="Trained")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert_shows_the_logs(dashboard)
        dashboard.picture("dashboard-clickhouse.png", "epoch 4")


@pytest.mark.deep
def test_a_server_without_this_package_shows_them_too(without_package: Dashboard) -> None:
    assert_shows_the_logs(without_package)
    without_package.open("Metadata")
    summary = without_package.summary("live")
    assert (summary["as_of"], summary["state"], summary["pending"]) == ("the last flush", "healthy", "0")


@pytest.mark.deep
def test_a_server_without_this_package_reads_as_zenml_itself_does(without_package: Dashboard) -> None:
    status, text = without_package.get("/entries", limit=3)
    assert status == 200
    page = json.loads(text)
    assert page["items"][0]["message"] == "Training: 5 epochs of 40 batches"
    assert (len(page["items"]), page["before"], page["after"]) == (3, None, None)
    for parameters in ({"search": "loss"}, {"level": "ERROR"}, {"start": "newest"}):
        status, text = without_package.get("/entries", **parameters)
        assert status == 400
        assert "only reads a log file from its start" in text
