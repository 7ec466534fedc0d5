"""The contract of a backend, for the one that writes JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from composite_logstore_lines import LinesChildConfig

from composite_logstore import UnavailableError
from composite_logstore.testing import ExporterContract, Fault, ReaderContract


class TestLines(ExporterContract, ReaderContract):
    @pytest.fixture
    def child(self, tmp_path: Path) -> LinesChildConfig:
        return LinesChildConfig(name="lines", type="lines", directory=str(tmp_path / "lines"))

    @pytest.fixture
    def faults(self, tmp_path: Path) -> Mapping[str, Fault]:
        @contextmanager
        def file_in_its_place() -> Iterator[None]:
            directory = tmp_path / "lines"
            directory.rename(tmp_path / "moved")
            directory.touch()
            yield
            directory.unlink()
            (tmp_path / "moved").rename(directory)

        return {"a file in the directory's place": Fault(file_in_its_place, export=UnavailableError)}
