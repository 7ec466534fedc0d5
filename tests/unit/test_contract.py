"""The conformance kit: a backend without a fault passes it, and each planted defect fails the test meant for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

from composite_logstore import RejectedError, RetryableError, UnavailableError
from composite_logstore.testing import (
    ExporterContract,
    Fault,
    ReaderContract,
    SimulatedBackend,
    SimulatedChildConfig,
)
from composite_logstore.zenml import LogStoreUnavailableError
from composite_logstore_artifact.config import ArtifactChildConfig
from tests.deep import mostly_deep


class TestSimulated(ExporterContract, ReaderContract):
    @pytest.fixture
    def backend(self) -> SimulatedBackend:
        return SimulatedBackend()

    @pytest.fixture
    def child(self, backend: SimulatedBackend) -> SimulatedChildConfig:
        SimulatedChildConfig.backends["simulated"] = backend
        return SimulatedChildConfig(name="simulated", type="simulated")

    @pytest.fixture
    def faults(self, backend: SimulatedBackend) -> Mapping[str, Fault]:
        @contextmanager
        def failing(name: str) -> Iterator[None]:
            backend.fault = name
            yield
            backend.fault = None

        return {
            "refused": Fault(partial(failing, "refused"), RetryableError, LogStoreUnavailableError),
            "throttled": Fault(partial(failing, "throttled"), RetryableError, LogStoreUnavailableError),
            "unavailable": Fault(partial(failing, "unavailable"), UnavailableError, LogStoreUnavailableError),
            "rejects all": Fault(partial(failing, "rejects all"), RejectedError),
            "answer lost": Fault(partial(failing, "answer lost"), RetryableError),
        }


PRELUDE = """
import logging
import threading
import time
from contextlib import contextmanager
from itertools import takewhile
from typing import ClassVar
from uuid import uuid4

import pytest
from pydantic import Field, SecretStr
from composite_logstore.zenml import LogStoreUnavailableError

from composite_logstore import *
from composite_logstore.testing import *
from composite_logstore.testing.backend import SimulatedReader


class Backend(SimulatedBackend):
    scan_format = "simulated"

    def export_scanned(self, stream, scanned):
        self.export([content._replace(stream=stream) for content in scanned.contents])


class Child(SimulatedChildConfig):
    api_key: Secret = SecretStr("top-secret")


class Reader(SimulatedReader):
    scan_format = "simulated"

    def scan(self, logs, token=None):
        events = [event._replace(stream=None) for event in self._backend.received if event.stream.id == logs.id]
        first = int(token or 0)
        while first < len(events):
            run = list(takewhile(lambda event: event.writer == events[first].writer, events[first : first + 4]))
            first += len(run)
            sequences, times = ([event[field] for event in run] for field in (3, 4))
            yield Scanned(run[0].writer, sequences, times, run, None, str(first))

    def event_of(self, content, stream):
        return content._replace(stream=stream)

    def entry_of(self, content):
        return None


class Contract(ExporterContract, ReaderContract):
    margin_seconds = 2.0
    read_seconds = 2.0
    patience_seconds = 0.2

    @pytest.fixture
    def child(self):
        backend, child_class, reader = self.parts

        class OwnChild(child_class):
            if child_class is Child:
                def create_reader(self):
                    return reader(self.backends[self.name])

        OwnChild.backends["simulated"] = backend()
        return OwnChild(name="simulated", type="simulated", export_timeout_millis=500)

    @pytest.fixture
    def faults(self, child):
        @contextmanager
        def refused():
            child.backends["simulated"].fault = "refused"
            yield
            child.backends["simulated"].fault = None

        return {"refused": Fault(refused, RetryableError, LogStoreUnavailableError)}


class TestSound(Contract):
    parts = Backend, Child, Reader
"""

PLANTED = """

class {place}{number}({place}):
    {code}


class Test{number}(Contract):
    parts = {parts}
"""

EXPORTER_DEFECTS = {
    "loses an event": (
        "test_every_event_arrives_once_and_in_order",
        """
        def export(self, batch):
            self._take(batch[:-1])
            return 0
        """,
    ),
    "takes events twice": (
        "test_every_event_arrives_once_and_in_order",
        """
        def export(self, batch):
            self._take([*batch, *batch[:2]])
            return 0
        """,
    ),
    "sorts by message": (
        "test_every_event_arrives_once_and_in_order",
        """
        def export(self, batch):
            self._take(sorted(batch, key=lambda event: event.message))
            return 0
        """,
    ),
    "sorts by time, and by nothing else": (
        "test_events_of_the_same_moment_stay_in_order",
        """
        def export(self, batch):
            self._take(sorted(batch[::-1], key=lambda event: event.time_unix_nano))
            return 0
        """,
    ),
    "keeps seconds": (
        "test_every_event_arrives_once_and_in_order",
        """
        def export(self, batch):
            self._take([event._replace(time_unix_nano=event.time_unix_nano // 10**9 * 10**9) for event in batch])
            return 0
        """,
    ),
    "returns nothing": (
        "test_every_event_arrives_once_and_in_order",
        """
        def export(self, batch):
            self._take(batch)
        """,
    ),
    "gives an event another identity each time": (
        "test_what_is_exported_again_keeps_its_identity",
        """
        def export(self, batch):
            self._take([event._replace(number=len(self.received) + n, sequence=event.sequence + len(self.batches))
                        for n, event in enumerate(batch)])
            return 0
        """,
    ),
    "takes a stream for another": (
        "test_the_streams_of_a_batch_are_kept_apart",
        """
        def export(self, batch):
            self._take([event._replace(stream=batch[0].stream) for event in batch])
            return 0
        """,
    ),
    "knows a copy by its number alone": (
        "test_the_writers_of_a_stream_do_not_hide_each_other",
        """
        def export(self, batch):
            known = {event.number for event in self.received}
            self._take([event for event in batch if event.number not in known])
            return 0
        """,
    ),
    "cuts at NUL": (
        "test_an_odd_event_arrives_as_it_is",
        """
        def export(self, batch):
            self._take([event._replace(message=event.message.partition(chr(0))[0]) for event in batch])
            return 0
        """,
    ),
    "leaves out blank messages": (
        "test_an_odd_event_arrives_as_it_is",
        """
        def export(self, batch):
            self._take([event for event in batch if event.message])
            return 0
        """,
    ),
    "refuses a huge event": (
        "test_an_event_of_five_megabytes_arrives",
        """
        def export(self, batch):
            if sum(event.size for event in batch) > 1_000_000:
                raise TooLargeError("too large")
            self._take(batch)
            return 0
        """,
    ),
    "shortens in silence": (
        "test_an_event_of_five_megabytes_arrives",
        """
        def export(self, batch):
            self._take([event._replace(message=shorten(event.message, 1000)) for event in batch])
            return 0
        """,
    ),
    "refuses what it calls its best": (
        "test_a_full_batch_is_taken",
        """
        def export(self, batch):
            if len(batch) > 100:
                raise TooLargeError("too many")
            self._take(batch)
            return 0
        """,
    ),
    "loses large batches": (
        "test_a_large_batch_is_taken_or_called_too_large",
        """
        def export(self, batch):
            if sum(event.size for event in batch) < 3_000_000:
                self._take(batch)
            return 0
        """,
    ),
    "works off the batch itself": (
        "test_the_batch_is_left_as_it_is",
        """
        def export(self, batch):
            while batch:
                self._take([batch.pop(0)])
            return 0
        """,
    ),
    "adds to the stream's attributes": (
        "test_the_batch_is_left_as_it_is",
        """
        def export(self, batch):
            batch[0].stream.metadata["service"] = "zenml"
            self._take(batch)
            return 0
        """,
    ),
    "forgets what it had when it starts": (
        "test_another_exporter_goes_on_where_one_ended",
        """
        def close(self):
            self.received.clear()
        """,
    ),
    "wants to know a stream that ends": (
        "test_the_end_of_a_stream_is_harmless",
        """
        def end_stream(self, stream):
            [event for event in self.received if event.stream is stream][0]
        """,
    ),
    "cannot be closed twice": (
        "test_closing_is_harmless",
        """
        def close(self):
            del self.ended
        """,
    ),
    "logs what it does": (
        "test_it_says_nothing",
        """
        def export(self, batch):
            logging.getLogger("backend").warning("sending %s events", len(batch))
            self._take(batch)
            return 0
        """,
    ),
    "keeps the process alive": (
        "test_no_thread_keeps_the_process_from_ending",
        """
        def export(self, batch):
            threading.Thread(target=time.sleep, args=(2,), daemon=False).start()
            self._take(batch)
            return 0
        """,
    ),
    "hangs": (
        "test_a_fault_is_reported_and_outlived",
        """
        def export(self, batch):
            while self.fault:
                time.sleep(0.1)
            self._take(batch)
            return 0
        """,
    ),
    "burns events when its backend is down": (
        "test_a_fault_is_reported_and_outlived",
        """
        def export(self, batch):
            if self.fault:
                raise RejectedError("connection refused")
            self._take(batch)
            return 0
        """,
    ),
    "tells its key": (
        "test_a_fault_is_reported_and_outlived",
        """
        def export(self, batch):
            if self.fault:
                raise RetryableError("POST /?key=top-secret failed")
            self._take(batch)
            return 0
        """,
    ),
    "stays broken": (
        "test_a_fault_is_reported_and_outlived",
        """
        def export(self, batch):
            self.is_broken = getattr(self, "is_broken", False) or bool(self.fault)
            if self.is_broken:
                raise RetryableError("connection refused")
            self._take(batch)
            return 0
        """,
    ),
}

CHILD_DEFECTS = {
    "can be changed": (
        "test_settings_cannot_be_changed",
        """
        model_config = {"frozen": False}
        """,
    ),
    "is stored in part": (
        "test_settings_survive_being_stored",
        """
        name: str = Field(exclude=True)
        """,
    ),
    "takes any setting": (
        "test_settings_refuse_what_they_do_not_know",
        """
        model_config = {"extra": "ignore"}
        """,
    ),
    "has batches beyond its own limit": (
        "test_settings_have_sizes_that_fit",
        """
        max_batch_size: ClassVar[int] = 500
        """,
    ),
    "has no reader although it says so": (
        "test_there_is_a_reader_or_a_reason",
        """
        def create_reader(self):
            raise NotImplementedError
        """,
    ),
}

READER_DEFECTS = {
    "newest first": (
        "test_the_newest_page_comes_first",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries[::-1], page.older, page.newer)
        """,
    ),
    "begins at the wrong end": (
        "test_the_newest_page_comes_first",
        """
        def read(self, request):
            if request.token is None:
                request = PageRequest(request.logs, "newer", None, request.limit, request.filter)
            return super().read(request)
        """,
    ),
    "knows one end alone": (
        "test_the_oldest_page_can_be_asked_for",
        """
        def read(self, request):
            if request.token is None:
                request = PageRequest(request.logs, "older", None, request.limit, request.filter)
            return super().read(request)
        """,
    ),
    "leaves out one between pages": (
        "test_pages_lead_through_the_whole_stream",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries, page.older, page.newer and str(int(page.newer) + 1))
        """,
    ),
    "repeats one between pages": (
        "test_pages_lead_through_the_whole_stream",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries, page.older and str(int(page.older) + (request.limit > 1)), page.newer)
        """,
    ),
    "never ends": (
        "test_pages_lead_through_the_whole_stream",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries, page.older or "2", page.newer)
        """,
    ),
    "knows no limit": (
        "test_pages_lead_through_the_whole_stream",
        """
        def read(self, request):
            return super().read(PageRequest(request.logs, request.direction, request.token, 1000, request.filter))
        """,
    ),
    "overstates its pages": (
        "test_a_page_may_be_as_large_as_the_reader_says",
        """
        max_page_size = 1_100

        def read(self, request):
            page = super().read(request)
            return Page(page.entries[-1000:], page.older, page.newer)
        """,
    ),
    "turns round at the wrong place": (
        "test_one_may_turn_round",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries, page.older and str(int(page.older) - (request.direction == "newer")), page.newer)
        """,
    ),
    "has a token for itself alone": (
        "test_a_token_can_be_used_again",
        """
        def read(self, request):
            tokens = self.__dict__.setdefault("tokens", set())
            if request.token and request.token not in tokens:
                raise ValueError("unknown token")
            page = super().read(request)
            tokens |= {page.older, page.newer}
            return page
        """,
    ),
    "sees what there was at first": (
        "test_a_stream_can_be_followed",
        """
        def read(self, request):
            page = super().read(request)
            return Page(page.entries, page.older, page.newer if len(page.entries) == request.limit else "999")
        """,
    ),
    "counts from the end": (
        "test_what_is_written_meanwhile_does_not_move_older_pages",
        """
        def read(self, request):
            count = len([event for event in self._backend.received if event.stream.id == request.logs.id])
            token = request.token and str(count - int(request.token))
            page = super().read(PageRequest(request.logs, request.direction, token, request.limit, request.filter))
            return Page(page.entries, page.older and str(count - int(page.older)),
                        page.newer and str(count - int(page.newer)))
        """,
    ),
    "sorts by time": (
        "test_order_holds_when_the_clock_goes_back",
        """
        def read(self, request):
            page = super().read(request)
            return Page(sorted(page.entries, key=lambda read: read.entry.timestamp), page.older, page.newer)
        """,
    ),
    "knows no filter": (
        "test_a_filter_is_honoured_or_refused",
        """
        def read(self, request):
            nothing = type(request.filter)()
            return super().read(PageRequest(request.logs, request.direction, request.token, request.limit, nothing))
        """,
    ),
    "filters a page after it has read it": (
        "test_a_filter_is_honoured_or_refused",
        """
        def read(self, request):
            nothing = type(request.filter)()
            page = super().read(
                PageRequest(request.logs, request.direction, request.token, request.limit, nothing)
            )
            level = request.filter.level.value if request.filter.level else 0
            return Page([read for read in page.entries if read.entry.level.value >= level], page.older, page.newer)
        """,
    ),
    "wants a stream to be there": (
        "test_a_stream_that_is_not_there",
        """
        def read(self, request):
            if all(event.stream.id != request.logs.id for event in self._backend.received):
                raise FileNotFoundError("no such stream")
            return super().read(request)
        """,
    ),
    "takes any token": (
        "test_a_token_that_is_none_is_refused",
        """
        def read(self, request):
            token = request.token if (request.token or "").isdigit() else None
            return super().read(PageRequest(request.logs, request.direction, token, request.limit, request.filter))
        """,
    ),
    "does not know its events": (
        "test_what_arrived_twice_is_fetched_once",
        """
        def read(self, request):
            page = super().read(request)
            return Page([ReadEntry(read.entry, Event(str(uuid4()), 0)) for read in page.entries],
                        page.older, page.newer)
        """,
    ),
    "lets an error through": (
        "test_a_fault_is_reported_and_outlived_by_reading",
        """
        def read(self, request):
            if self._backend.fault:
                raise ConnectionRefusedError("connection refused")
            return super().read(request)
        """,
    ),
    "waits for ever": (
        "test_a_fault_is_reported_and_outlived_by_reading",
        """
        def read(self, request):
            while self._backend.fault:
                time.sleep(0.1)
            return super().read(request)
        """,
    ),
    "scans in another order": (
        "test_a_scan_agrees_with_pages",
        """
        def scan(self, logs, token=None):
            yield from sorted(super().scan(logs, token), key=lambda chunk: (chunk.writer, chunk.sequences))
        """,
    ),
    "does not say when what it scans was logged": (
        "test_a_scan_agrees_with_pages",
        """
        def scan(self, logs, token=None):
            for chunk in super().scan(logs, token):
                yield chunk._replace(times=[0] * len(chunk.times))
        """,
    ),
    "scans from the beginning each time": (
        "test_a_scan_goes_on_from_each_token",
        """
        def scan(self, logs, token=None):
            yield from super().scan(logs)
        """,
    ),
    "has no token at the end of a scan": (
        "test_a_scan_goes_on_from_each_token",
        """
        def scan(self, logs, token=None):
            *chunks, last = super().scan(logs, token)
            yield from [*chunks, last._replace(token=None)]
        """,
    ),
    "makes another event of what was scanned": (
        "test_what_was_scanned_is_the_event",
        """
        def event_of(self, content, stream):
            return content._replace(stream=stream, number=content.number + 1)
        """,
    ),
    "scans the same differently": (
        "test_what_was_scanned_is_the_event",
        """
        def scan(self, logs, token=None):
            for chunk in super().scan(logs, token):
                yield chunk._replace(contents=[object() for _ in chunk.contents])
        """,
    ),
    "takes a word for nothing": (
        "test_words_that_backends_write_for_nothing_are_kept",
        """
        def event_of(self, content, stream):
            logger = "" if content.logger_name == "unknown" else content.logger_name
            return content._replace(stream=stream, logger_name=logger)
        """,
    ),
    "scans from where there is nothing": (
        "test_a_scan_of_what_is_not_there",
        """
        def scan(self, logs, token=None):
            return super().scan(logs, token if (token or "").isdigit() else None)
        """,
    ),
    "closes what others use": (
        "test_closing_a_reader_is_harmless",
        """
        def close(self):
            self._backend.received.clear()
        """,
    ),
}

EXPORTER_DEFECTS |= {
    "writes less than was scanned": (
        "test_what_was_scanned_can_be_written",
        """
        def export_scanned(self, stream, scanned):
            self.export([content._replace(stream=stream) for content in scanned.contents[:-1]])
        """,
    ),
    "writes what was scanned as its own": (
        "test_what_was_scanned_can_be_written",
        """
        def export_scanned(self, stream, scanned):
            self.export([content._replace(stream=stream, writer="f" * 15) for content in scanned.contents])
        """,
    ),
}
PLACES = {"Backend": EXPORTER_DEFECTS, "Child": CHILD_DEFECTS, "Reader": READER_DEFECTS}
DEFECTS = [(place, name, *defect) for place, defects in PLACES.items() for name, defect in defects.items()]


class Reports:
    """A plugin of pytest: collects which tests of which classes failed, and which ran at all."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.ran: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            _, name, test = report.nodeid.split("::")
            self.ran.add(name)
            if report.failed:
                self.failed.add(f"{name} {test.partition('[')[0]}")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What pytest says of all defects, each of which is looked for by the test that is meant for it."""
    file = tmp_path_factory.mktemp("planted") / "test_planted.py"
    source, tests = PRELUDE, [f"{file}::TestSound"]
    for number, (place, _, test, code) in enumerate(DEFECTS):
        parts = ", ".join(f"{part}{number}" if part == place else part for part in PLACES)
        source += PLANTED.format(
            place=place, number=number, parts=parts, code=dedent(code).strip().replace("\n", "\n    ")
        )
        tests.append(f"{file}::Test{number}::{test}")
    file.write_text(source)
    reports = Reports()
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", *tests], plugins=[reports])
    return reports


@pytest.mark.parametrize(
    ("number", "test"), [pytest.param(number, defect[2], id=defect[1]) for number, defect in enumerate(DEFECTS)]
)
def test_a_planted_defect_is_found(reports: Reports, number: int, test: str) -> None:
    assert f"Test{number} {test}" in reports.failed


def test_without_a_defect_nothing_is_found(reports: Reports) -> None:
    assert "TestSound" in reports.ran
    assert not [test for test in reports.failed if test.startswith("TestSound ")]


def test_every_test_of_the_kit_has_found_something() -> None:
    tests = {name for name in dir(TestSimulated) if name.startswith("test_")}
    elsewhere = {"test_settings_name_their_backend", "test_settings_are_light"}

    assert {test for _, _, test, _ in DEFECTS} == tests - elsewhere


def test_the_name_of_another_backend_is_found() -> None:
    contract = ExporterContract()
    contract.test_settings_name_their_backend(ArtifactChildConfig(name="archive", type="artifact"))

    with pytest.raises(AssertionError):
        contract.test_settings_name_their_backend(ArtifactChildConfig(name="archive", type="archive"))


@pytest.mark.parametrize("is_light", mostly_deep([False, True]))
def test_settings_that_load_the_exporter_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_light: bool
) -> None:
    package = f"backend_{is_light}".lower()
    load = f"from {package}.exporter import Exporter"
    settings = f"""
from composite_logstore.testing import SimulatedChildConfig
{"" if is_light else load}

class Config(SimulatedChildConfig):
    def create_exporter(self):
        {load}
        return Exporter()
"""
    exporter = "from composite_logstore.testing import SimulatedBackend\nclass Exporter(SimulatedBackend): ..."
    (tmp_path / package).mkdir()
    (tmp_path / package / "config.py").write_text(settings)
    (tmp_path / package / "exporter.py").write_text(exporter)
    monkeypatch.syspath_prepend(tmp_path)
    child = import_module(f"{package}.config").Config(name="simulated", type="simulated")

    if is_light:
        ExporterContract().test_settings_are_light(child)
    else:
        with pytest.raises(AssertionError, match=r"importing backend_false\.config imports backend_false\.exporter"):
            ExporterContract().test_settings_are_light(child)


def test_the_kit_but_for_the_contracts_needs_no_pytest() -> None:
    script = (
        "import sys; sys.modules['pytest'] = None\n"
        "from composite_logstore.testing import SimulatedClock, SimulatedBackend, make_events\n"
        "from composite_logstore import testing\n"
        "try: testing.ExporterContract\n"
        "except ImportError as error: print(error.name)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert process.stdout == "pytest\n"


def test_the_documented_example_is_the_one_that_is_run() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/testing-a-backend.md").read_text()

    assert (root / "examples/backend/test_lines.py").read_text() in page
