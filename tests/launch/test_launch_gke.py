"""launch/gke: the manifest, and following a run on a cluster."""

import json
import re
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml
from conftest import ROOT
from fake_cloud import GKE_GPU, GKE_TPU, LAUNCH, TRAIN, Fake


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


@pytest.fixture(scope="module")
def schema():
    text = json.loads((ROOT / "tests" / "launch" / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


def submit(fake, *arguments):
    """Return the manifest that was applied."""
    fake.write(jobset="absent\nCompleted/0", pods="gpt-workers-0-0-abcde Succeeded")
    done = fake.run("gke/run.sh", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((fake.folder / "applied.yaml").read_text())


MANIFESTS = {
    "tpu": [*GKE_TPU, "--queue=research", "--spot", "--max_restarts=7", "--grace=60"],
    "gpu": [*GKE_GPU, "--service_account=trainer", "--namespace=research"],
    "gpu_alone": GKE_GPU[:-1],
    "gpu_bucket": [*GKE_GPU[:-1], "--bucket=gs://things", "--spot", "--chips=2"],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifest_is_a_jobset(fake, schema, name):
    train = [TRAIN[0], "--workdir=gs://things/runs/x"] if name == "gpu_alone" else TRAIN
    manifest = submit(fake, *MANIFESTS[name], "--", *train)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert (pod["volumes"][0] == {"name": "shared", "emptyDir": {}}) == (name == "gpu_alone")
    assert [f"{error.json_path}: {error.message}" for error in schema.iter_errors(manifest)] == []


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.replicatedJobs.0.template.spec.backofLimit", 0),
        ("spec.replicatedJobs.0.template.spec.completions", "4"),
        ("spec.replicatedJobs.0.template.spec.podReplacementPolicy", "TerminatingOrFailed"),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", [0, 2]),
        ("spec.replicatedJobs.0.template.spec.template.spec.restartPolicy", "OnFailure"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.args", "--config=x"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.resources.limits", {"google.com/tpu": "four"}),
        ("spec.replicatedJobs.0.template.spec.template.spec.tolerations.0.value", "x"),
        ("spec.failurePolicy.rules.0.name", "not to be repeated"),
        ("spec.failurePolicy.rules.0.action", "Fail"),
        ("metadata.name", "GPT"),
        ("apiVersion", "jobset.x-k8s.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(fake, schema, path, value):
    manifest = submit(fake, *MANIFESTS["tpu"], "--", *TRAIN)
    *parents, last = path.split(".")
    place = manifest
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    assert not schema.is_valid(manifest)


def test_the_manifest_has_a_job_for_each_slice_and_a_pod_for_each_host(fake):
    manifest = submit(fake, *MANIFESTS["tpu"], "--", *TRAIN)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert jobs["replicas"] == 2 and job["completions"] == job["parallelism"] == 4 and job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert pod["terminationGracePeriodSeconds"] == 60 and manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "shared")
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "things"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["JAXMODELS_COORDINATOR"] == "gpt-workers-0-0.gpt:8482" and environment["JAXMODELS_PROCESSES"] == "8"


def test_a_manifest_for_gpus_runs_without_root_on_a_claim(fake):
    manifest = submit(fake, *MANIFESTS["gpu"], "--", *TRAIN)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert manifest["metadata"]["namespace"] == "research" and pod["serviceAccountName"] == "trainer"
    assert container["securityContext"]["runAsNonRoot"] and container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert all("--namespace=research" in call for call in fake.calls() if call[0] == "kubectl")


def outcome_of(manifest, status=None, disrupted=False):
    """Return what Kubernetes and JobSet do when a container ends with a status, by their documented rules in order."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {}).get("values", ())
        if status in codes or (disrupted and any(c["type"] == "DisruptionTarget" for c in rule.get("onPodConditions", ()))):
            reason = "PodFailurePolicy"
            message = f"Container train for pod default/x failed with exit code {status} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_the_exit_status_decides_whether_a_jobset_starts_again(fake):
    manifest = submit(fake, *MANIFESTS["tpu"], "--", *TRAIN)
    assert {outcome_of(manifest, status) for status in (2, 3)} == {"FailJobSet"}
    assert {outcome_of(manifest, status) for status in (75, 143)} == {"RestartJobSetAndIgnoreMaxRestarts"}
    assert outcome_of(manifest, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {outcome_of(manifest, status) for status in (1, 137)} == {"RestartJobSet"}  # counted
    assert outcome_of(manifest, 2, disrupted=True) == "FailJobSet"


@pytest.mark.parametrize("job, host, process", [(0, 0, "0"), (0, 3, "3"), (1, 2, "6")])
def test_the_container_starts_its_process_with_what_was_typed(fake, job, host, process):
    arguments = [*TRAIN, "--config.data.path=$(JOB_INDEX) $$ \\ ü\n@NAME@: - x"]
    manifest = submit(fake, *MANIFESTS["tpu"], "--env=FLAGS=a $(b) 'c'", "--", *arguments)
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]} | {"JOB_INDEX": str(job), "HOST_INDEX": str(host)}

    def expand(text):
        """Expand variables as Kubernetes does: $(NAME) if the variable exists, and $$ to $."""
        return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else environment.get(m[2], m[0]), text)

    tool = fake.folder / "tools" / "jaxmodels"
    tool.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$JAXMODELS_PROCESS" "$JAXMODELS_PROCESSES" "$FLAGS" "$@" >"$FAKE/seen"\n')
    command = [expand(word).replace("/shared", f"{fake.folder}/shared") for word in container["command"]]
    command += [expand(word) for word in container["args"]]
    done = subprocess.run(command, env=fake.environment | environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert (fake.folder / "seen").read_text().split("\0")[:-1] == [process, "8", "a $(b) 'c'", "train", *arguments]
    assert (fake.folder / "shared" / "runs").is_dir()


def gke_verbs(fake):
    return [" ".join([call[0], *(word for word in call[1:4] if not word.startswith("--"))]) for call in fake.calls()]


def test_the_image_is_built_pushed_and_the_jobset_followed_through_a_restart(fake):
    fake.write(jobset="absent\n/\n/0\n/1\n/1\nCompleted/1", pods="first Pending\nfirst Running\nsecond Running\nsecond Succeeded")
    done = fake.run("gke/run.sh", *GKE_TPU, "--build", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    docker = [call for call in fake.calls() if call[0] == "docker"]
    build = ["docker", "build", f"--file={LAUNCH}/gke/Dockerfile", "--build-arg=EXTRA=tpu", "--tag=registry/jaxmodels:1", str(ROOT)]
    assert docker == [build, ["docker", "push", "registry/jaxmodels:1"]]
    assert gke_verbs(fake)[:4] == ["docker build", "docker push registry/jaxmodels:1", "kubectl get jobset", "kubectl apply"]
    assert [call[-1] for call in fake.calls() if "logs" in call and "--tail=0" not in call] == ["first", "second"]
    assert done.stdout.splitlines()[:2] == ["log of first", "log of second"]
    assert "restarts: 1" in done.stderr


@pytest.mark.parametrize("codes, status", [("143 2 ", 2), ("3 1 ", 3), ("1 137 ", 1)])
def test_a_failed_jobset_ends_with_the_status_of_the_run(fake, codes, status):
    fake.write(jobset="absent\n/0\nFailed/3", pods="first Running\nfirst Failed", exit_codes=codes)
    done = fake.run("gke/run.sh", *GKE_TPU, "--", *TRAIN)
    assert done.returncode == status and "log of first" in done.stdout


def test_a_running_jobset_is_not_changed_and_one_that_ended_is_replaced(fake):
    fake.write(jobset="/0", pods="first Running")
    done = fake.run("gke/run.sh", *GKE_TPU, "--", *TRAIN)
    assert done.returncode == 2 and "--follow" in done.stderr and gke_verbs(fake) == ["kubectl get jobset"]
    fake.write(calls="", jobset="/0\nCompleted/0", pods="first Running\nfirst Succeeded")
    assert fake.run("gke/run.sh", "--name=gpt", "--poll=0.05", "--follow").returncode == 0
    assert not {"kubectl apply", "kubectl delete"} & set(gke_verbs(fake))
    fake.write(calls="", jobset="Failed/3\n/0\nCompleted/0", pods="first Succeeded")
    assert fake.run("gke/run.sh", *GKE_TPU, "--", *TRAIN).returncode == 0
    assert gke_verbs(fake)[:3] == ["kubectl get jobset", "kubectl delete jobset", "kubectl apply"]


def test_a_dry_run_prints_the_manifest_and_calls_nothing(fake, schema):
    done = fake.run("gke/run.sh", *GKE_TPU, "--build", "--dry_run", "--", *TRAIN)
    assert done.returncode == 0 and fake.read("calls") == []
    lines = done.stdout.splitlines()
    assert [shlex.split(line)[:2] for line in lines if line.startswith("docker")] == [["docker", "build"], ["docker", "push"]]
    manifest = yaml.safe_load("\n".join(line[4:] for line in lines if line.startswith("    ")))
    assert schema.is_valid(manifest) and manifest == submit(fake, *GKE_TPU, "--", *TRAIN)


@pytest.mark.parametrize("values, problem", [(["NAME=x"], "needs a value for KIND"), (["NAME=x", "KIND=y", "OTHER=z"], "does not use OTHER")])
def test_the_template_uses_exactly_its_values(tmp_path, values, problem):
    template = tmp_path / "template.yaml"
    template.write_text("# @COMMENT@\nname: @NAME@\nkind: @KIND@\nargs: @ARGS@\n")
    done = subprocess.run([sys.executable, LAUNCH / "gke" / "render.py", template, *values, "--"], capture_output=True, text=True)
    assert done.returncode == 2 and problem in done.stderr and done.stdout == ""


def test_the_image_contains_what_a_run_needs():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    sent = {line[1:] for line in (LAUNCH / "gke" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    assert {"jaxmodels", "configs", "pyproject.toml"} <= copied
    assert lines.index("USER jaxmodels") > max(i for i, line in enumerate(lines) if line.startswith("RUN"))
