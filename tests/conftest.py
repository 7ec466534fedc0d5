"""What every test shares."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import settings

from tests.programs import Programs

# How long an example takes is the machine's affair. `make test-deep` has the second one.
settings.register_profile("composite-logstore", deadline=None, max_examples=50)
settings.register_profile("deep", deadline=None, max_examples=1_000)
settings.load_profile("composite-logstore")

# Before anything imports ZenML: no test may touch the configuration of whoever runs it, or the network.
_CONFIG = tempfile.TemporaryDirectory(prefix="composite-logstore-tests-")
os.environ["ZENML_CONFIG_PATH"] = _CONFIG.name
os.environ["ZENML_ANALYTICS_OPT_IN"] = "false"
os.environ["AUTO_OPEN_DASHBOARD"] = "false"
# What a shell starts in the background ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# ZenML finds a step's source relative to the main program's, which a process that shares the tests has not.
if not hasattr(sys.modules["__main__"], "__file__"):
    sys.modules["__main__"].__file__ = pytest.__file__


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs more of ZenML than the installed release has."""
    if item.get_closest_marker("needs_paged_fetch") is not None and _returns_lists():
        pytest.skip("the log stores of this ZenML return lists instead of pages")


@cache
def _returns_lists() -> bool:
    import inspect

    from zenml.log_stores.base_log_store import BaseLogStore

    return "start_time" in inspect.signature(BaseLogStore.fetch).parameters


@pytest.fixture(autouse=True)
def _pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let unit tests ask for pages, where ZenML's own server asks for lists: the list is made of them."""
    if request.path.parent.name not in ("unit", "properties") or "composite_logstore.log_store" not in sys.modules:
        return
    from composite_logstore import CompositeLogStore

    if _returns_lists():
        fetch: Any = CompositeLogStore.fetch
        monkeypatch.setattr(CompositeLogStore, "fetch", fetch.pages)


@pytest.fixture(autouse=True)
def _without_last_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests that kill a simulated process are about its own events. Those that are about its end are marked."""
    is_meant = request.node.get_closest_marker("last_words") is not None
    if not is_meant and "composite_logstore.delivery.last_words" in sys.modules:
        for module in ("recovery", "tailing"):
            monkeypatch.setattr(f"composite_logstore.delivery.{module}.add_last_words", lambda spool, time: [])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say what may run side by side: files may, but what shares a server by way of a session's fixture may not."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/e2e" if file.startswith("tests/e2e/") else file

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what tests have to say, in whichever process they ran."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "said at the end":
                terminalreporter.write_line(f"{report.nodeid}: {value}")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """ZenML's programs, and this package's, that start at once."""
    from tests.servers.zenml_server import ZenML

    zenml = ZenML(tmp_path_factory.mktemp("programs") / "zenml")
    with Programs(zenml.env, zenml.directory) as programs:
        yield programs


@pytest.fixture(autouse=True)
def _no_worker_outlives_its_test() -> Iterator[None]:
    """A child that a test left dead would be retried until all tests are done."""
    from composite_logstore.delivery import writers

    before = set(writers._writers)
    yield
    for key in writers._writers.keys() - before:
        writers._writers.pop(key)._handover.stop()
