"""The manifests of deploy/kuberay: built as kustomize builds them, and valid without a cluster."""

import copy
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from bridgework.config import override
from bridgework.serving import proxy
from bridgework.serving.options import parse_options
from bridgework.system import load as load_system
from bridgework.tuning.space import load as load_space
from tests.deploy import kustomize
from tests.house import source
from tests.house.test_docs import parse

Document = dict[str, Any]
KUBERAY = source.ROOT / "deploy/kuberay"
OVERLAYS = ("gke", "eks", "local")
FOLDERS = {
    **{name: KUBERAY / "overlays" / name for name in OVERLAYS},
    "kueue": source.ROOT / "tests/deploy/kueue",
}
SPEC = {  # path to the spec of the Ray cluster
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
RAY = next(
    line.partition("==")[2]
    for line in (source.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("ray==")
)
KUBERNETES = "1.34"


@cache
def _built(name: str) -> list[Document]:
    return kustomize.build(FOLDERS[name])


def built(name: str) -> list[Document]:
    return copy.deepcopy(_built(name))


def every() -> Iterator[tuple[str, Document]]:
    for name in FOLDERS:
        for document in built(name):
            yield f"{name}: {document['kind']} {document['metadata']['name']}", document


def ray_specs(name: str) -> Iterator[tuple[str, Document]]:
    """(kind and name, spec of the Ray cluster) of every object of KubeRay in a build."""
    for document in built(name):
        if document["kind"] in SPEC:
            spec = document
            for key in SPEC[document["kind"]]:
                spec = spec[key]
            yield f"{document['kind']} {document['metadata']['name']}", spec


def groups(spec: Document) -> dict[str, Document]:
    return {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}


def jobs(name: str) -> dict[str, Document]:
    """Name -> spec of every RayJob, the templates of cron jobs included."""
    return {
        document["metadata"]["name"]: document["spec"].get("jobTemplate", document["spec"])
        for document in built(name)
        if document["kind"] in ("RayJob", "RayCronJob")
    }


def pods(document: Any) -> Iterator[Document]:
    """Every pod template in an object."""
    if isinstance(document, dict):
        if (
            "containers" in document.get("spec", {})
            if isinstance(document.get("spec"), dict)
            else False
        ):
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


@pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not on the PATH")
@pytest.mark.parametrize("name", FOLDERS)
def test_the_build_of_the_tests_is_that_of_kustomize(name: str) -> None:
    done = subprocess.run(
        ["kustomize", "build", str(FOLDERS[name])], capture_output=True, text=True, check=True
    )

    def key(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    theirs = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert sorted(theirs, key=key) == sorted(built(name), key=key)


def check_kubernetes(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_kubernetes_accepts_every_object_of_its_own() -> None:
    checked = 0
    for where, document in every():
        if document["kind"] not in SPEC:
            try:
                check_kubernetes(document)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{where}: {error.message} at {list(error.path)}")
            checked += 1
    assert checked > 20


def test_kubernetes_accepts_every_pod_and_knows_every_field_of_it() -> None:
    """A field that the API server does not know would be dropped silently."""
    checked = 0
    for where, document in every():
        for pod in pods(document):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
            try:
                check_kubernetes({**template, "template": pod})
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{where}: {error.message} at {list(error.path)}")
            checked += 1
    assert checked > 80


def closed(schema: Any) -> Any:
    """The schema of a custom resource, with unknown fields refused wherever it names the known ones."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and "type" in schema
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@cache
def validators() -> dict[str, jsonschema.Draft202012Validator]:
    """Kind -> validator, of the schemas of KubeRay's operator in $KUBERAY_SCHEMAS."""
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("KUBERAY_SCHEMAS does not name a folder with the schemas of KubeRay's CRDs")
    found = {}
    for path in sorted(Path(folder).glob("*.json.gz")):
        crd = json.loads(gzip.decompress(path.read_bytes()))
        schema = closed(crd["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # checked by the API server
        found[crd["kind"]] = jsonschema.Draft202012Validator(schema)
    assert found.keys() == SPEC.keys()
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_kuberay_accepts_every_object(name: str) -> None:
    known = validators()
    for document in built(name):
        if document["kind"] in SPEC:
            errors = [
                f"{'.'.join(map(str, error.path))}: {error.message[:300]}"
                for error in known[document["kind"]].iter_errors(document)
            ]
            assert not errors, f"{document['metadata']['name']}: {errors}"


@pytest.mark.parametrize(
    ("kind", "path", "field"),
    [
        ("RayCluster", ("spec",), "idleTimeoutSecond"),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "template", "spec"), "toleration"),
        ("RayJob", ("spec", "deletionStrategy", "deletionRules", 0), "ttlSeconds"),
        ("RayService", ("spec", "rayClusterConfig", "autoscalerOptions"), "versions"),
    ],
)
def test_a_misspelled_field_is_refused(kind: str, path: tuple[str | int, ...], field: str) -> None:
    known = validators()
    document = next(d for d in built("gke") if d["kind"] == kind)
    at: Any = document
    for key in path:
        at = at[key]
    at[field] = 1
    assert [e for e in known[kind].iter_errors(document) if field in e.message]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_operator_accepts_the_combinations_of_fields(name: str) -> None:
    """Rules of the operator's own validation that no schema holds."""
    for document in built(name):
        if document["kind"] in SPEC:
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", document["metadata"]["name"])
    for where, spec in ray_specs(name):
        assert spec["rayVersion"] == RAY, where  # tokens need it, and it must be that of the image
        assert spec["authOptions"] == {"mode": "token"}, where
        for group, one in groups(spec).items():
            at = f"{where}, {group}"
            given = one["rayStartParams"].keys()
            assert not (one.get("resources") and given & {"num-cpus", "num-gpus", "memory"}), at
            assert "labels" not in given, at
            assert one["template"]["spec"].get("restartPolicy", "Never") == "Never", at
    for job, spec in jobs(name).items():
        rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
        assert not (rules and spec.get("shutdownAfterJobFinishes")), job
        assert rules or spec.get("shutdownAfterJobFinishes"), f"{job}: its cluster would stay"
        policies = [rule["policy"] for rule in rules]
        assert not (
            "DeleteWorkers" in policies and spec["rayClusterSpec"]["enableInTreeAutoscaling"]
        )
        for status in ("SUCCEEDED", "FAILED"):
            times = {
                r["policy"]: r["condition"]["ttlSeconds"]
                for r in rules
                if r["condition"].get("jobStatus") == status
            }
            assert times.get("DeleteCluster", 0) <= times.get("DeleteSelf", 10**9), job


def test_every_ray_cluster_but_those_of_kueue_starts_at_zero_and_scales_with_autoscaler_v2() -> (
    None
):
    for name in FOLDERS:
        for where, spec in ray_specs(name):
            queued = name == "kueue" and where in ("RayJob train", "RayJob sweep")
            assert spec["enableInTreeAutoscaling"] is not queued, where
            if queued:
                assert "autoscalerOptions" not in spec
                assert all(g["replicas"] == g["minReplicas"] > 0 for g in spec["workerGroupSpecs"])
            else:
                assert spec["autoscalerOptions"]["version"] == "v2", where
                assert all(g["replicas"] == g["minReplicas"] == 0 for g in spec["workerGroupSpecs"])


def test_kueue_accepts_the_queued_jobs() -> None:
    """Kueue's documented limits: no autoscaling, the cluster is deleted at the end, at most 7 pools."""
    for document in built("kueue"):
        if document["kind"] == "RayJob":
            assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "bridgework"
            assert document["spec"]["shutdownAfterJobFinishes"] is True
            assert "clusterSelector" not in document["spec"]
            assert len(document["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7


def test_a_queued_training_has_the_gpus_that_its_entrypoint_requests() -> None:
    job = jobs("kueue")["train"]
    words = shlex.split(job["entrypoint"])
    train = groups(job["rayClusterSpec"])["train"]
    gpus = int(train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert int(words[words.index("--workers") + 1]) == train["replicas"] * gpus


def test_pools_are_those_of_the_vm_launcher() -> None:
    launcher = yaml.safe_load((source.ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    pools = launcher["available_node_types"]
    (spec,) = [spec for where, spec in ray_specs("eks") if where == "RayCluster bridgework"]
    ours = groups(spec)
    assert ours.keys() == pools.keys()
    assert int(ours["head"]["resources"]["CPU"]) == pools["head"]["resources"]["CPU"] == 0
    for name, pool in pools.items():
        limits = ours[name]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ours[name].get("maxReplicas", 0) == pool.get("max_workers", 0)
        assert ours[name]["labels"] == {"pool": name}
        assert int(limits.get("nvidia.com/gpu", 0)) == pool["resources"].get("GPU", 0)


@pytest.mark.parametrize("name", ["gke", "eks"])
def test_spot_nodes_train_and_prepare_data_only(name: str) -> None:
    for where, spec in ray_specs(name):
        for pool, group in groups(spec).items():
            pod = group["template"]["spec"]
            text = json.dumps([pod.get("nodeSelector"), pod.get("tolerations")])
            assert ("spot" in text) == (pool in ("data", "train")), f"{where}, {pool}"
            assert pool in json.dumps(pod["nodeSelector"]), f"{where}, {pool}"
    service = dict(ray_specs(name))["RayService chat"]
    assert groups(service).keys() == {"head", "serve"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_command_of_a_job_is_one_and_its_fields_exist(name: str) -> None:
    for job, spec in jobs(name).items():
        words = shlex.split(spec["entrypoint"].replace("$(date -u +%F)", "2026-11-30"))
        assert words[0] == "bridgework", job
        parse(words[1:])
        if words[1] == "train":
            changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            system = load_system(words[2])
            override(
                system.tiny() if "--tiny" in words else system,
                dict(change.split("=", 1) for change in changes),
            )
        if words[1] == "sweep":
            load_space(words[2])


@pytest.mark.parametrize("name", OVERLAYS)
def test_serve_and_the_app_accept_the_service(name: str) -> None:
    (service,) = [d for d in built(name) if d["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (app,) = config["applications"]
    options = parse_options(app["args"])
    assert not options.dev
    assert options.timeout_s < service["spec"]["rayClusterDeletionDelaySeconds"]
    if name != "local":
        assert config["controller_options"] == proxy.CONTROLLER
        assert (options.challenger, options.share) == ("llava@challenger", 0.1)  # the canary
        pool = groups(service["spec"]["rayClusterConfig"])["serve"]
        assert (options.max_replicas or 1) + 1 <= pool["maxReplicas"]  # one for the challenger


def test_no_pod_has_a_privilege_and_none_keeps_a_volume() -> None:
    for where, document in every():
        assert document["kind"] not in ("Secret", "PersistentVolumeClaim"), where
        for pod in pods(document):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            for container in spec["containers"]:
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False, where
                assert context["capabilities"] == {"drop": ["ALL"]}, where
                assert "memory" in container["resources"]["limits"], where
            kinds = {
                kind for volume in spec.get("volumes", ()) for kind in volume if kind != "name"
            }
            assert kinds <= (
                {"emptyDir", "hostPath"} if where.startswith("local") else {"emptyDir"}
            )


def test_every_container_has_the_image_of_the_overlay() -> None:
    for where, document in every():
        images = {c["image"] for pod in pods(document) for c in pod["spec"]["containers"]}
        assert all(":" in image for image in images), f"{where}: {images}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_keys_of_the_endpoint_are_known_to_the_service_alone(name: str) -> None:
    holders = {d["metadata"]["name"] for d in built(name) if "api-keys" in json.dumps(d)}
    assert holders == {"chat"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_network_denies_by_default(name: str) -> None:
    policies = {
        d["metadata"]["name"]: d["spec"] for d in built(name) if d["kind"] == "NetworkPolicy"
    }
    assert policies.pop("deny-by-default") == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    for policy, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{policy} lets everybody in"
            assert not [peer for peer in rule["from"] if "ipBlock" in peer], policy
        for rule in spec.get("egress", []):
            assert rule.get("to"), f"{policy} lets pods reach everything"


def test_guide_names_every_secret() -> None:
    guide = (source.ROOT / "docs/cluster-kuberay.md").read_text(encoding="utf-8")
    for where, document in every():
        for name in re.findall(r'"secretKeyRef": {"name": "([^"]+)"', json.dumps(document)):
            assert f"secret generic {name} " in guide, where


def test_nothing_runs_before_its_label_is_applied() -> None:
    guide = (source.ROOT / "docs/cluster-kuberay.md").read_text(encoding="utf-8")
    assert "-l '!bridgework/start'" in guide
    for where, document in every():
        label = document["metadata"].get("labels", {}).get("bridgework/start")
        runs = document["kind"] in ("RayJob", "RayCronJob", "RayService")
        assert (label is not None) == runs, where
        assert label is None or f"-l bridgework/start={label}" in guide, where
