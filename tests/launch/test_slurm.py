"""launch/slurm.sbatch on a real SLURM of one node.

tests/slurm/setup.sh && pytest -m slow tests/launch/test_slurm.py -n 0; tests/slurm/setup.sh stop
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
STEPS = 600


def ask(*command, **variables) -> str:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Job:
    """A run on the digits, submitted as documented, with two tasks of one simulated device each."""

    def __init__(self, folder: Path, *options: str):
        programs = folder / "programs"
        programs.mkdir()
        program = programs / "jaxmodels"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxmodels "$@"\n')
        program.chmod(0o755)
        self.workdir, self.output = folder / "run", folder / "output"
        path = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        size = [f"--config.training.steps={STEPS}", "--config.training.epochs=None", "--config.evaluation.every=100", "--config.checkpoint.every=100"]
        train = ["--config=configs/cnn_digits.py", *size, "--config.log.every=20", f"--workdir={self.workdir}", "--cpu_devices=1"]
        sbatch = ["sbatch", "--parsable", f"--output={self.output}", "--ntasks-per-node=2", *options]
        self.number = ask(*sbatch, "launch/slurm.sbatch", *train, **path)

    def field(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", ask("scontrol", "show", "job", self.number))[1]

    def lines(self) -> list[dict]:
        file = self.workdir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            printed = self.output.read_text() if self.output.exists() else "nothing"
            assert time.monotonic() < end, f"{what} did not happen in {seconds} s; the job printed:\n{printed}"
            assert self.field("JobState") != "FAILED", printed
            time.sleep(0.5)

    def wait_for_steps(self, steps: int) -> None:
        self.wait(lambda: any(line["step"] >= steps for line in self.lines()), 240, f"step {steps}")

    def wait_for_end(self) -> None:
        self.wait(lambda: self.field("JobState") == "COMPLETED", 400, "the end")

    def starts(self) -> list[dict]:
        return json.loads((self.workdir / "manifest.json").read_text())["starts"]


@pytest.fixture
def job(tmp_path):
    """Submit a job; it is cancelled at the end of the test if it is still queued."""
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM here: tests/slurm/setup.sh makes one of Debian's packages")
    jobs = []

    def submit(*options):
        jobs.append(Job(tmp_path, *options))
        return jobs[-1]

    yield submit
    for each in jobs:
        subprocess.run(["scancel", each.number], capture_output=True)


def check_went_on(job: Job) -> None:
    """Check that the run was stopped once, saved, was requeued, and did each step once."""
    assert job.field("Restarts") == "1"
    first, second = job.starts()
    assert first["from_step"] == 0 and first["processes"] == second["processes"] == 2
    assert 0 < second["from_step"] < STEPS
    text = job.output.read_text()
    assert "requeued (1 of 100)" in text and str(job.workdir / "checkpoints" / str(second["from_step"])) in text
    trained = [line["step"] for line in job.lines() if line["split"] == "train"]
    assert trained == sorted(set(trained)) and trained[-1] == STEPS
    (test,) = (line for line in job.lines() if line["split"] == "test")
    assert test["accuracy"] > 0.95


def test_a_job_finishes(job):
    one = job()
    one.wait_for_end()
    assert one.field("Restarts") == "0" and len(one.starts()) == 1 and one.starts()[0]["processes"] == 2
    assert [line["step"] for line in one.lines() if line["split"] == "train"][-1] == STEPS


def test_a_signalled_job_saves_and_resumes(job):
    one = job()
    one.wait_for_steps(100)
    ask("scancel", "--signal=TERM", one.number)
    one.wait(lambda: one.field("Restarts") == "1", 120, "the requeue")
    one.wait_for_end()
    check_went_on(one)


def test_a_preempted_job_saves_and_resumes(job):
    """A job of a partition with higher priority takes the processors: SLURM signals the run, and requeues it."""
    one = job("--partition=spot", "--cpus-per-task=2")
    one.wait_for_steps(100)
    other = ask("sbatch", "--parsable", "--partition=main", "--ntasks=4", "--output=/dev/null", "--wrap=sleep 5")
    one.wait(lambda: one.field("Restarts") == "1", 120, "the requeue")
    one.wait_for_end()
    assert "JobState=COMPLETED" in ask("scontrol", "show", "job", other)
    check_went_on(one)


def test_a_wrong_config_is_not_requeued(job):
    one = job("--export=ALL,JAXMODELS_PROCESSES=3")
    end = time.monotonic() + 120
    while one.field("JobState") != "FAILED":
        assert time.monotonic() < end, one.output.read_text()
        time.sleep(0.5)
    assert one.field("Restarts") == "0" and one.field("ExitCode") == "2:0"
    assert "the run ended with status 2" in one.output.read_text()
