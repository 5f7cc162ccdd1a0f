"""launch/serve: manifests of a service, against the schemas of Kubernetes itself, and what must hold between their parts."""

import copy
import json
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from jaxmodels.cli import main as cli

SERVE = ROOT / "launch" / "serve"
NAMES = ("kubernetes.yaml", "kubernetes.yaml+gpu.yaml", "kubernetes.yaml+tpu.yaml")
KEYED = {"containers", "volumes", "volumeMounts", "ports", "env"}  # lists that a patch merges by name


def patched(value, patch, key=""):
    """Return a value with a strategic merge patch, for the lists of KEYED; another list is replaced."""
    if isinstance(patch, dict) and isinstance(value, dict):
        return value | {name: patched(value[name], each, name) if name in value else each for name, each in patch.items()}
    if key in KEYED:
        found = {each["name"]: each for each in value}
        return list((found | {each["name"]: patched(found.get(each["name"], {}), each) for each in patch}).values())
    return patch


def manifests(name):
    """Return the resources of a file by kind, with the patch that follows a plus sign."""
    base, _, patch = name.partition("+")
    resources = {each["kind"]: each for each in yaml.safe_load_all((SERVE / base).read_text())}
    if patch:
        change = yaml.safe_load((SERVE / patch).read_text())
        resources[change["kind"]] = patched(resources[change["kind"]], change)
    return resources


def predictor():
    """Return the predictor of kserve.yaml as a Deployment: all but the keys of KServe is a PodSpec."""
    spec = dict(manifests("kserve.yaml")["InferenceService"]["spec"]["predictor"])
    for key in ("minReplicas", "maxReplicas", "autoScaling"):
        del spec[key]
    labels = {"app": "x"}
    template = {"metadata": {"labels": labels}, "spec": spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {"selector": {"matchLabels": labels}, "template": template}}


def pods():
    """Return the pod specs of all manifests by name."""
    specs = {name: manifests(name)["Deployment"] for name in NAMES} | {"kserve.yaml": predictor()}
    return {name: each["spec"]["template"]["spec"] for name, each in specs.items()}


def check(resource):
    kubernetes_validate.validate(resource, "1.31", strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_manifests_are_of_kubernetes(name):
    resources = manifests(name)
    assert list(resources) == ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    for resource in resources.values():
        check(resource)


def test_kserve_gets_a_pod_and_a_metric():
    check(predictor())
    service = manifests("kserve.yaml")["InferenceService"]
    target = {"type": "object", "properties": {"type": {"const": "Value"}, "value": {"type": "string", "pattern": r"^\d+$"}}, "required": ["type", "value"]}
    metric = {"type": "object", "properties": {"backend": {"const": "prometheus"}}, "required": ["backend", "serverAddress", "query"]}
    scaling = {
        "type": "object",
        "required": ["type", "external"],
        "properties": {"type": {"const": "External"}, "external": {"type": "object", "properties": {"metric": metric, "target": target}}},
    }
    (of_queue,) = service["spec"]["predictor"]["autoScaling"]["metrics"]
    jsonschema.validate(of_queue, scaling)  # KServe reads `value` alone
    assert service["apiVersion"] == "serving.kserve.io/v1beta1" and service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "keda"


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.template.spec.containers.0.readynessProbe", {}),
        ("spec.template.spec.containers.0.readinessProbe.httpGet.port", None),
        ("spec.template.spec.terminationGracePeriodSeconds", "150"),
        ("spec.template.spec.containers.0.args", "--workdir=x"),
        ("spec.strategy.rollingUpdate.maxUnavaliable", 0),
        ("spec.selector", []),
    ],
)
def test_the_schemas_refuse_what_the_cluster_would(path, value):
    resource = copy.deepcopy(manifests("kubernetes.yaml")["Deployment"])
    *parents, last = path.split(".")
    place = resource
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        check(resource)


@pytest.mark.parametrize("name", [*NAMES, "kserve.yaml"])
def test_what_was_admitted_is_answered_before_a_pod_is_killed(name):
    (container,) = pods()[name]["containers"]
    options = dict(re.fullmatch(r"--(\w+)=(.*)", argument).groups() for argument in container["args"])
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pods()[name]["terminationGracePeriodSeconds"] > before + int(options["drain_seconds"])
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert before >= container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["failureThreshold"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volume = {volume["name"]: volume for volume in pods()[name]["volumes"]}[mounts["/keys"]]
    assert volume["secret"]["secretName"] == "jaxmodels-keys" and options["api_keys"].startswith("/keys/")


@pytest.mark.parametrize("name", [*NAMES, "kserve.yaml"])
def test_a_container_has_few_rights(name):
    pod = pods()[name]
    (container,) = pod["containers"]
    assert not container["securityContext"]["allowPrivilegeEscalation"] and container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert pod["securityContext"]["runAsNonRoot"] != ("tpu" in name)
    devices = {key: value for key, value in container["resources"]["limits"].items() if "/" in key}
    assert devices == {"gpu": {"nvidia.com/gpu": "1"}, "tpu": {"google.com/tpu": "1"}}.get(name[-8:-5], {})


def test_all_manifests_scale_by_one_metric():
    scaler = manifests("kubernetes.yaml")["HorizontalPodAutoscaler"]["spec"]
    (of_pods,) = scaler["metrics"]
    name = of_pods["pods"]["metric"]["name"]
    (rule,) = yaml.safe_load((SERVE / "prometheus_adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert f"`{name}`" in (ROOT / "docs" / "serving.md").read_text()  # whose figures are compared with those of the service
    assert name in manifests("kserve.yaml")["InferenceService"]["spec"]["predictor"]["autoScaling"]["metrics"][0]["external"]["metric"]["query"]
    deployment = manifests("kubernetes.yaml")["Deployment"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"], "the number of pods has two owners"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert manifests("kubernetes.yaml")["Service"]["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("patch", ["", "gpu.yaml", "tpu.yaml"])
def test_kustomize_puts_the_parts_together(patch, tmp_path):
    """The real kubectl, where there is one, gives what the tests above check."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    folder = shutil.copytree(SERVE, tmp_path / "serve")
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert settings.pop("patches", None) is None
    if patch:
        text = (folder / "kustomization.yaml").read_text()
        assert f"#   - path: {patch}" in text
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(settings | {"patches": [{"path": patch}]}))
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    expected = manifests(f"kubernetes.yaml+{patch}" if patch else "kubernetes.yaml")
    (image,) = settings["images"]
    expected["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] = f"{image['newName']}:{image['newTag']}"
    assert made == expected


def test_the_image_is_small_and_serves_as_a_user():
    text = (SERVE / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.\d+-slim$", text, re.M) and re.search(r"^USER 1000$", text, re.M)
    assert '"serve"' in re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)[1] and "/health" in text
    allowed = {line[1:] for line in (SERVE / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("name", [*NAMES, "kserve.yaml"])
def test_the_arguments_are_those_of_the_command(name):
    entrypoint = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", (SERVE / "Dockerfile").read_text(), re.M)[1])
    (container,) = pods()[name]["containers"]
    options = cli.parser().parse_args([*entrypoint[1:], *container["args"]])
    assert entrypoint[:2] == ["jaxmodels", "serve"] and options.host == "0.0.0.0"
    assert options.port == container["ports"][0]["containerPort"]
