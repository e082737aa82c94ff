"""The Ray cluster for Kubernetes: valid by KubeRay's own schema and Kubernetes' ones, and fitting each other."""

import copy
import gzip
import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from support.shown_commands import ROOT

FOLDER = ROOT / "deploy" / "kubernetes" / "ray"
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "raycluster.yaml").read_text(encoding="utf-8"))
POLICY: dict[str, Any] = yaml.safe_load((FOLDER / "networkpolicy.yaml").read_text(encoding="utf-8"))
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
    assert all(selected.items() <= group["template"]["metadata"]["labels"].items() for group in GROUPS)


def test_the_token_is_on() -> None:
    """In every pod, from the secret of the page."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for group in GROUPS:
        (container,) = group["template"]["spec"]["containers"]
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
