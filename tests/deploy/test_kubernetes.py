"""The Kubernetes objects: valid by Kubernetes' own schemas, and fitting each other."""

from typing import Any

import kubernetes_validate
import pytest
import yaml

from support.shown_commands import ROOT, parsed_by_serve

pytestmark = pytest.mark.timeout(900)  # vLLM's parser takes a while to import on a busy machine

FOLDER = ROOT / "deploy" / "kubernetes"
OBJECTS: dict[str, Any] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))
}
CUSTOM = {"podmonitor"}
"""Objects whose schema does not come with Kubernetes."""
POD = OBJECTS["deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - CUSTOM))
def test_objects_are_valid(name: str) -> None:
    """The strict schema of the newest known version accepts it: no field is unknown, none is missing."""
    kubernetes_validate.validate(OBJECTS[name], kubernetes_validate.latest_version(), strict=True)


def test_what_does_not_fit_is_refused() -> None:
    """The validation sees a misspelt field."""
    wrong = {**OBJECTS["service"], "spec": {**OBJECTS["service"]["spec"], "port": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_server_takes_its_options() -> None:
    """The arguments are those of `serve`, with as many instances as the pod has GPUs."""
    parsed_by_serve(CONTAINER["args"][1:])
    limits = CONTAINER["resources"]["limits"]
    assert f"--instances={limits['nvidia.com/gpu']}" in CONTAINER["args"]
    assert limits["nvidia.com/gpu"] == CONTAINER["resources"]["requests"]["nvidia.com/gpu"]


def test_every_selector_finds_the_pod() -> None:
    """Deployment, service, network policy and pod monitor select by labels that the pod carries."""
    labels = POD["metadata"]["labels"]
    selectors = [
        OBJECTS["deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["service"]["spec"]["selector"],
        OBJECTS["networkpolicy"]["spec"]["podSelector"]["matchLabels"],
        OBJECTS["podmonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_every_port_is_the_servers() -> None:
    """Ports by name lead to the one port of the container, which is that of the options."""
    (port,) = CONTAINER["ports"]
    assert f"--port={port['containerPort']}" in CONTAINER["args"]
    names = [
        OBJECTS["service"]["spec"]["ports"][0]["targetPort"],
        OBJECTS["networkpolicy"]["spec"]["ingress"][0]["ports"][0]["port"],
        OBJECTS["podmonitor"]["spec"]["podMetricsEndpoints"][0]["port"],
        *(CONTAINER[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")),
    ]
    assert set(names) == {port["name"]}


def test_the_pod_may_drain() -> None:
    """Kubernetes waits longer than the pause before SIGTERM and the drain together."""
    (drain_s,) = (int(arg.partition("=")[2]) for arg in CONTAINER["args"] if arg.startswith("--drain-timeout-s"))
    pause_s = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause_s + drain_s


def test_the_image_can_run_without_rights() -> None:
    """The pod's user is the image's, its file system is read-only, and what must be written is mounted."""
    containerfile = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    user = POD["spec"]["securityContext"]["runAsUser"]
    assert f"\nUSER {user}\n" in containerfile
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    mounted = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounted) == {"/home/cascadeinfer", "/tmp", "/dev/shm"}  # noqa: S108 - in the container
    assert set(mounted.values()) == {volume["name"] for volume in POD["spec"]["volumes"]}


def test_the_secret_that_is_read_is_the_one_of_the_page() -> None:
    """docs/deploy.md creates the secret with every key that the pod reads."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for variable in CONTAINER["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert f"secret generic {reference['name']} " in page
        assert f"--from-literal={reference['key']}=" in page
