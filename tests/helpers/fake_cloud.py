"""Fake gcloud, kubectl and SLURM commands (the scripts in tests/launch/fake_tools/) for the tests of launch/."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

LAUNCH = ROOT / "launch"
TRAIN = ["--config=configs/cnn_digits.py", "--config.optimizer.learning_rate=3e-4", '--workdir=runs/it\'s a "$(run)" $HOME']
GKE = ["--name=gpt", "--image=registry/jaxmodels:1", "--poll=0.05"]
GKE_TPU = [*GKE, "--tpu=tpu-v6e-slice", "--topology=4x4", "--hosts=4", "--slices=2", "--bucket=things"]
GKE_GPU = [*GKE, "--gpu=nvidia-h100-80gb", "--hosts=2", "--claim=shared"]


class Fake:
    """A folder of fake tools that are first on PATH, and a record of their calls."""

    def __init__(self, folder: Path):
        self.folder = folder
        tools = folder / "tools"
        shutil.copytree(ROOT / "tests" / "launch" / "fake_tools", tools)
        for name in ("docker", "gcloud", "kubectl", "sudo", "gcsfuse", "mountpoint", "srun", "scontrol"):
            if not (tools / name).exists():
                shutil.copy(tools / "recorded", tools / name)  # all cloud tools are replaced: no test reaches a real one
        for name in ("python3.11", "python3.12", "python3.13"):
            shutil.copy(tools / "python3", tools / name)
        (tools / "sudo").write_text('#!/usr/bin/env bash\nmkdir -p "${@: -1}"\n')  # only used to create the bucket's folder
        self.environment = os.environ | {"FAKE": str(folder), "PATH": f"{tools}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable}
        # The checkout may belong to another user than the one who runs the tests.
        self.environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        self.write(calls="", starts="", outcomes="0", created="READY", jobset="absent", pods="", exit_codes="")

    def write(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(text and text + "\n")

    def read(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def run(self, script, *arguments, **variables):
        command = ["bash", str(LAUNCH / script), *arguments]
        return subprocess.run(command, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=300)

    def git(self, *arguments) -> list[str]:
        done = subprocess.run(["git", *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def calls(self) -> list[list[str]]:
        """Return all calls, without the repeated ones that occur if worker 0 ends just before worker 1."""
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
        """Return the gcloud calls, without queries of states."""
        calls = [call for call in self.calls() if call[0] == "gcloud" and call[4] != "describe"]
        return [" ".join(worker_command(call) or call[4:5]) for call in calls]


def worker_command(call) -> list[str]:
    """Return the command of tpu_worker.sh and the workers that receive it; [] for other calls."""
    if call[4:5] != ["ssh"]:
        return []
    worker, command = (next(word for word in call if word.startswith(key)).split("=", 1)[1] for key in ("--worker=", "--command="))
    return [shlex.split(command)[2], worker]
