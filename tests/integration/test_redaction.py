"""A real step prints its secrets: one archive gets them, and the other one does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.servers.zenml_server import ZenML

PROGRAM = Path(__file__).with_name("leaking_program.py")


def lines_in(folder: Path) -> list[str]:
    """Return the messages in the archives below a folder."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.log"))]
    return [json.loads(line)["message"] for text in texts for line in text.splitlines()]


@pytest.mark.deep
def test_a_step_s_secrets_reach_one_archive_alone_and_verify_finds_no_difference(tmp_path: Path) -> None:
    zenml = ZenML(tmp_path / "zenml")
    printed = zenml.python(str(PROGRAM), str(tmp_path))
    stats = json.loads(printed.splitlines()[-1])
    whole, masked = "\n".join(lines_in(tmp_path / "whole")), lines_in(tmp_path / "masked")
    assert {"hunter2-given", "hunter2-asked"} <= set(whole.split())
    assert not any("hunter2" in message for message in masked)
    said = [message for message in masked if "[redacted:" in message]
    assert said == [
        "given [redacted:secret]",
        "half of [redacted:secret]",
        "header dXNlcjp[redacted:secret]",
        "asked for [redacted:secret]",
    ]
    assert stats["redacted"] == {"secret": 4}
    assert not any(b"hunter2" in path.read_bytes() for path in (tmp_path / "masked").rglob("*") if path.is_file())
    verified = json.loads(zenml.composite_logstore("verify", "logs", "--all", "--output", "json"))
    assert not verified["differences"]
