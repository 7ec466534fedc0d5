"""Whether the package and all of its extras fit beside the frameworks that pipelines are made of."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from composite_logstore.zenml import NEWEST_TESTED

pytestmark = pytest.mark.deep

ROOT = Path(__file__).resolve().parents[2]
# Its protobuf 4.25 is older than what OpenTelemetry's own exporter allows. It has wheels up to Python 3.12.
TENSORFLOW = "tensorflow==2.16.*"


def resolve(tmp_path: Path, *beside: str) -> subprocess.CompletedProcess[str]:
    """Find versions of this package's requirements and of others that fit together, and install none of them."""
    wishes = tmp_path / "requirements.in"
    wishes.write_text("\n".join([f"composite-logstore[all] @ {ROOT.as_uri()}", f"zenml=={NEWEST_TESTED}", *beside]))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    # In a folder without settings of this project.
    return subprocess.run(
        [*command, "--python-version", "3.11", str(wishes)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def _index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """There is a package index, and the package fits into an empty environment."""
    done = resolve(tmp_path_factory.mktemp("alone"))
    if re.search(r"dns error|[Cc]onnect|timed out|[Nn]etwork", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("_index")
@pytest.mark.parametrize(
    "framework", [TENSORFLOW, "torch", "mlflow", "wandb", "ray", "ddtrace", "opentelemetry-instrumentation"]
)
def test_all_extras_fit_beside_a_framework(framework: str, tmp_path: Path) -> None:
    done = resolve(tmp_path, framework)
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    assert {"grpcio", "opentelemetry-proto", "datadog-api-client", re.split(r"[=<>]", framework)[0]} <= found.keys()
    assert found["zenml"] == NEWEST_TESTED
    if framework == TENSORFLOW:
        assert found["protobuf"].startswith("4.25.")
