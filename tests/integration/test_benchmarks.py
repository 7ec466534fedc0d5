"""The benchmarks run: what they measure here is next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.deep]


def test_everything_is_measured_beside_its_competitors(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In a run so small, the figures say nothing: what counts is that nobody fails, and that all arrives."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Goals" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["contest"]["near"]) == len(figures["contest"]["far"]) == 6
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == ["cpu.svg", "emit.svg", "scale.svg"]
    for name in drawn:
        assert "<svg" in (tmp_path / name).read_text()
