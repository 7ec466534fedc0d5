"""The manifests of examples/kubernetes: what they say of the agent is what the agent has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from composite_logstore.cli.agent import agent

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "kubernetes"


def pods() -> dict[str, dict[str, Any]]:
    sidecar = yaml.safe_load((FOLDER / "sidecar.yaml").read_text())
    daemon = yaml.safe_load((FOLDER / "daemonset.yaml").read_text())
    assert daemon["spec"]["selector"]["matchLabels"] == daemon["spec"]["template"]["metadata"]["labels"]
    return {"sidecar": sidecar["spec"], "daemonset": daemon["spec"]["template"]["spec"]}


PODS = pods()


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def agent_of(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = [one for one in containers(pod) if one["name"] == "agent"]
    return dict(found)


@pytest.mark.parametrize("name", PODS)
def test_the_command_is_one_that_the_agent_takes(name: str) -> None:
    found = agent_of(PODS[name])
    assert found["command"] == ["composite-logstore", "agent"]
    parameters = agent.make_context("agent", list(found["args"])).params
    directory = Path(str(parameters["spool_directory"]))
    assert any(directory.is_relative_to(one["mountPath"]) for one in found["volumeMounts"])
    # The loopback interface alone would answer no probe.
    host, _, port = str(parameters["health_address"]).rpartition(":")
    assert host == "0.0.0.0"
    (opened,) = found["ports"]
    assert opened["containerPort"] == int(port)
    probes = {kind: probe["httpGet"] for kind, probe in found.items() if kind.endswith("Probe")}
    assert {probe["port"] for probe in probes.values()} == {opened["name"]}
    assert probes["livenessProbe"]["path"] == "/healthz"
    assert probes["readinessProbe"]["path"] == "/readyz"


@pytest.mark.parametrize("name", PODS)
def test_each_container_has_requests_bounds_and_few_rights(name: str) -> None:
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    for one in containers(pod):
        assert one["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in one["resources"]["limits"]
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"]["drop"] == ["ALL"]
    security = {**pod.get("securityContext", {}), **agent_of(pod)["securityContext"]}
    assert (security["runAsUser"], security["runAsNonRoot"], security["readOnlyRootFilesystem"]) == (1000, True, True)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("name", PODS)
def test_each_mount_has_a_volume_and_each_volume_a_mount(name: str) -> None:
    pod = PODS[name]
    mounted = {mount["name"] for one in containers(pod) for mount in one["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_sidecar_ends_after_the_step_and_has_time_to_deliver() -> None:
    pod = PODS["sidecar"]
    found = agent_of(pod)
    assert found in pod["initContainers"]
    assert found["restartPolicy"] == "Always"
    command, seconds = found["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    # The agent itself takes at most 5 s to end.
    assert int(seconds) + 5 < pod["terminationGracePeriodSeconds"]


def test_the_guide_names_the_manifests_and_their_places() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(f"examples/kubernetes/{file.name}" in page for file in FOLDER.glob("*.yaml"))
    (volume,) = [one for one in PODS["daemonset"]["volumes"] if one["name"] == "spool"]
    assert volume["hostPath"]["path"] in page
