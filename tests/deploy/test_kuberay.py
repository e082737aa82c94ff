"""The Ray cluster for Kubernetes: valid by KubeRay's own schema and Kubernetes' ones, and fitting each other."""

import copy
import gzip
import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from support.shown_commands import ROOT, parsed_by_serve

FOLDER = ROOT / "deploy" / "kubernetes" / "ray"
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "raycluster.yaml").read_text(encoding="utf-8"))
POLICY: dict[str, Any] = yaml.safe_load((FOLDER / "networkpolicy.yaml").read_text(encoding="utf-8"))
FRONT_END: dict[str, Any] = yaml.safe_load((FOLDER / "frontend.yaml").read_text(encoding="utf-8"))
POD = FRONT_END["spec"]["template"]
RAY, SERVER = POD["spec"]["containers"]
HEAD = CLUSTER["spec"]["headGroupSpec"]
(WORKERS,) = CLUSTER["spec"]["workerGroupSpecs"]
GROUPS = (HEAD, WORKERS)


def strict(schema: Any) -> None:
    """Refuse unknown fields, as the API server does when it validates strictly; its extensions become JSON Schema."""
    if isinstance(schema, dict):
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        if schema.get("type") == "object" and "properties" in schema and not open_ended:
            schema["additionalProperties"] = False
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for part in list(schema.values()):
            strict(part)
    elif isinstance(schema, list):
        for part in schema:
            strict(part)


@pytest.fixture(scope="module")
def schema() -> Any:
    """Of a RayCluster (tests/data/README.md says which)."""
    packed = (ROOT / "tests" / "data" / "kuberay" / "raycluster_v1.json.gz").read_bytes()
    schema = json.loads(gzip.decompress(packed))
    strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the definition leaves open
    return schema


def test_the_cluster_is_valid(schema: Any) -> None:
    """No field is unknown, none is missing; a misspelt one is seen."""
    jsonschema.validate(CLUSTER, schema)
    wrong = copy.deepcopy(CLUSTER)
    wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_the_policy_is_valid_and_fits() -> None:
    """It selects all pods of the cluster, and lets in only these."""
    kubernetes_validate.validate(POLICY, kubernetes_validate.latest_version(), strict=True)
    selected = POLICY["spec"]["podSelector"]["matchLabels"]
    [source] = POLICY["spec"]["ingress"]
    assert [each["podSelector"]["matchLabels"] for each in source["from"]] == [selected]
    templates = [POD, *(group["template"] for group in GROUPS)]
    assert all(selected.items() <= template["metadata"]["labels"].items() for template in templates)


def test_the_token_is_on() -> None:
    """In every pod, from the secret of the page."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    containers = [RAY, SERVER, *(group["template"]["spec"]["containers"][0] for group in GROUPS)]
    for container in containers:
        environment = {each["name"]: each for each in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert f"secret generic {reference['name']} " in page
        assert f"--from-literal={reference['key']}=" in page


def test_engines_are_on_the_workers() -> None:
    """The head has no places, so that an engine's end does not take the cluster with it."""
    assert (HEAD["rayStartParams"]["num-cpus"], HEAD["rayStartParams"]["num-gpus"]) == ("0", "0")
    (worker,) = WORKERS["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) > 0


def test_the_front_end_is_valid_and_takes_its_options() -> None:
    """Kubernetes' strict schema accepts it, the server its arguments, and both containers share what Ray needs."""
    kubernetes_validate.validate(FRONT_END, kubernetes_validate.latest_version(), strict=True)
    parsed_by_serve(SERVER["args"][1:])
    assert "--cluster=ray" in SERVER["args"]
    assert RAY["volumeMounts"] == SERVER["volumeMounts"]
    assert {mount["mountPath"] for mount in RAY["volumeMounts"]} >= {"/tmp", "/dev/shm"}  # noqa: S108 - in the container
    assert FRONT_END["spec"]["selector"]["matchLabels"].items() <= POD["metadata"]["labels"].items()


def test_the_front_end_joins_this_cluster_without_places() -> None:
    """At KubeRay's name of the head's service, and its engines fit the workers."""
    (port,) = HEAD["template"]["spec"]["containers"][0]["ports"]
    assert f"--address={CLUSTER['metadata']['name']}-head-svc:{port['containerPort']}" in RAY["args"]
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(RAY["args"])
    (worker,) = WORKERS["template"]["spec"]["containers"]
    n_places = WORKERS["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert f"--instances={n_places}" in SERVER["args"]


def test_the_objects_of_the_http_port_find_the_front_end() -> None:
    """Service, policy and pod monitor of the folder above select it, and know its port."""
    (port,) = SERVER["ports"]
    assert f"--port={port['containerPort']}" in SERVER["args"]
    above = {
        name: yaml.safe_load((FOLDER.parent / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("service", "networkpolicy", "podmonitor")
    }
    selectors = [
        above["service"]["spec"]["selector"],
        above["networkpolicy"]["spec"]["podSelector"]["matchLabels"],
        above["podmonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= POD["metadata"]["labels"].items() for selector in selectors)
    assert above["service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    drain_s = next(int(arg.partition("=")[2]) for arg in SERVER["args"] if arg.startswith("--drain-timeout-s"))
    pause_s = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause_s + drain_s
