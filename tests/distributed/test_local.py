"""Real processes on this machine, started by launch/local.sh.

Most of it is slow: pytest -m slow -n 0 tests/distributed/test_local.py (20 CPU minutes)
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recording_sources
import small_configs
import warm_python
from conftest import HELPERS, ROOT
from ports import free_port
from processes import is_alive
from run_state import final_state

from jaxmodels.config import load_config
from jaxmodels.runs.folder import RunFolder

LOCAL = ROOT / "launch" / "local.sh"
CONFIG = small_configs.config(
    small_configs.CNN,
    data={"source": "recording_sources:numbers", "batch_size": 24, "eval_batch_size": 32},
    training={"steps": 40},
    evaluation__every=20,
    checkpoint__every=10,
    log__every=5,
)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    """End the processes that a test leaves when it fails."""
    yield
    for folder in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{tmp_path}/" in Path("/proc", folder, "cmdline").read_text():
                os.kill(int(folder), signal.SIGKILL)


class Run:
    """A run in its own folder, which can be started several times with different numbers of processes."""

    def __init__(self, tmp_path, config, name="run"):
        self.folder, self.workdir = tmp_path / name, tmp_path / name / "x"
        self.folder.mkdir()
        self.config = self.folder / "config.json"
        self.config.write_text(json.dumps(config))
        self.starts = 0

    def start(self, processes, devices, *args):
        """Start the run with launch/local.sh; without it if `processes` is 0."""
        self.starts += 1
        self.watch, self.logs = self.folder / f"watch-{self.starts}", self.folder / f"logs-{self.starts}"
        self.watch.mkdir()
        environment = os.environ | {
            "WATCH": str(self.watch),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HELPERS), os.environ.get("PYTHONPATH")))),
            "JAXMODELS": f"{sys.executable} -m jaxmodels",
        }
        command = [LOCAL, "-n", str(processes), f"--cpu_devices={devices}", f"--logs={self.logs}", "--"]
        run = [f"--config={self.config}", f"--workdir={self.workdir}", *args]
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if processes:
            self.process = subprocess.Popen(list(map(str, [*command, *run])), **options)
        else:
            self.process = warm_python.Popen(["-m", "jaxmodels", "train", f"--cpu_devices={devices}", *run], **options)
        return self

    def end(self, status=0, seconds=550):
        output, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == status, (output, self.outputs())
        return output

    def outputs(self):
        """Return the outputs of the processes, by the names of their logs."""
        return {path.name: path.read_text() for path in sorted(self.logs.glob("*.log"))} if self.logs.exists() else {}

    def wait_for_step(self, step, seconds=300):
        """Wait until metrics.jsonl has a line of this step."""
        end = time.monotonic() + seconds
        metrics = self.workdir / "metrics.jsonl"
        while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
            assert self.process.poll() is None, (self.process.communicate(), self.outputs())
            assert time.monotonic() < end, self.outputs()
            time.sleep(0.05)

    def pid(self, index):
        """Return the number of one of the processes, as the system knows it."""
        found = []
        for folder in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                words = open(f"/proc/{folder}/environ", "rb").read().split(b"\0") if folder.isdigit() else []
                line = open(f"/proc/{folder}/cmdline", "rb").read().decode() if words else ""
                if f"JAXMODELS_PROCESS={index}".encode() in words and f"--workdir={self.workdir}\0" in line + "\0":
                    found.append(int(folder))
        (pid,) = found
        return pid

    def global_batches(self, rows):
        """Return the indices of each step's global batch, in the order of its rows."""
        parts = recording_sources.batches(self.watch, rows)
        return [sum(step, []) for step in zip(*parts, strict=False)]


def compare(one, other, *, rtol, atol):
    """Check that both runs ended at the same step, with losses equal to 1e-5, and parameters equal except for the order of sums.

    Adam amplifies small differences by dividing by small numbers, most for gradients that are only rounding errors, such as those of keys' biases.
    """
    (arrays, lines), (arrays_2, lines_2) = final_state(one.workdir), final_state(other.workdir)
    assert [(a["step"], a["split"]) for a in lines] == [(b["step"], b["split"]) for b in lines_2]
    for a, b in zip(lines, lines_2, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    for key in arrays:
        np.testing.assert_allclose(arrays[key], arrays_2[key], rtol=rtol, atol=atol, err_msg=key)


def test_two_processes_equal_one(tmp_path):
    """The batches, losses and parameters are the same, and the metrics of each set; only the first process writes files and prints."""
    config = small_configs.config(CONFIG, data__validation_sets={"more": {"size": 90}}, checkpoint__best="more/loss")
    one, two = Run(tmp_path, config, "one"), Run(tmp_path, config, "two")
    one.start(0, 2).end()
    output = two.start(2, 1).end()
    assert two.global_batches(12)[:40] == one.global_batches(24)[:40]
    compare(one, two, rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in RunFolder(two.workdir).metrics("validation/more")] == [20, 40]
    manifest = RunFolder(two.workdir).manifest()
    assert manifest["starts"][0]["processes"] == 2 and len(manifest["starts"]) == 1
    log = two.outputs()
    assert log["process-0.log"] in output and output.count("step 40/40  train") == 1
    assert "step" not in log["process-1.log"] and "initialised" not in log["process-1.log"]


def assert_same_end(one, other):
    """Assert that two runs ended with the same state, bit for bit, and the same metrics."""
    (ours, lines), (theirs, their_lines) = final_state(one.workdir), final_state(other.workdir)
    assert lines == their_lines
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.slow
def test_two_processes_change_a_run_and_go_back_as_one(tmp_path):
    """The first of them moves the checkpoints and writes the record; each reads its rows of the batches of another size."""
    one, two = Run(tmp_path, CONFIG, "one"), Run(tmp_path, CONFIG, "two")
    change = ["--from_step=30", "--allow_change=data.batch_size", "--config.data.batch_size=12", "--config.training.steps=50", "--config.log.every=10"]
    for run, processes, devices in ((one, 0, 2), (two, 2, 1)):
        run.start(processes, devices).end()
        output = run.start(processes, devices, *change).end()
        assert output.count("going back to step 30: the checkpoint of step 40") == 1
        manifest = RunFolder(run.workdir).manifest()
        assert [(entry["step"], entry["key"]) for entry in manifest["changes"]] == [(30, "data.batch_size"), (30, "log.every"), (30, "training.steps")]
        assert (run.workdir / "set_aside" / "1" / "checkpoints" / "40").is_dir() and manifest["steps"] == 50
    assert two.global_batches(6)[:20] == one.global_batches(12)[:20]
    compare(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_pmap_in_two_processes(tmp_path):
    config = small_configs.config(CONFIG, model__dropout=0.0, training__steps=10, evaluation__every=10)
    one, two = Run(tmp_path, config, "one"), Run(tmp_path, config | {"partition": "pmap"}, "two")
    one.start(0, 2).end()
    two.start(2, 1).end()
    assert two.global_batches(12)[:10] == one.global_batches(24)[:10]
    compare(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gpt_shakespeare_in_four_processes_equals_one(tmp_path, data_dir):
    """4 processes × 2 devices against 1 process × 8 devices. The batch is 16 instead of the config's 12, so that it divides over 8 devices."""
    config = load_config(str(ROOT / "configs" / "gpt_shakespeare.py")).to_dict()
    config["data"] |= {"source": "recording_sources:shakespeare", "batch_size": 16}
    config["optimizer"]["schedule"]["warmup"] = 10
    config |= {"training": {"steps": 60}, "evaluation": {"every": 60}, "checkpoint": {"every": 30}, "log": {"every": 5}}
    one, four = Run(tmp_path, config, "one"), Run(tmp_path, config, "four")
    one.start(0, 8).end()
    four.start(4, 2, "--hang_limit=120").end()
    assert four.global_batches(4)[:60] == one.global_batches(16)[:60]
    compare(one, four, rtol=1e-3, atol=5e-4)
    assert RunFolder(four.workdir).manifest()["starts"][0]["devices"].startswith("8 x cpu")


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("victim, number", [(2, signal.SIGKILL), (0, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGSTOP)])
def test_one_of_four_ends_and_two_resume(tmp_path, victim, number):
    """One of four is killed, or stopped: the others end within 60 s. Two processes then resume, and each example is read once."""
    config = CONFIG | {"training": {"steps": 300}, "checkpoint": {"every": 40}}
    config["data"] = {"source": "recording_sources:numbers", "size": 7200, "batch_size": 24, "eval_batch_size": 32}
    run = Run(tmp_path, config).start(4, 2)
    run.wait_for_step(100)
    pid = run.pid(victim)
    others = [run.pid(index) for index in range(4) if index != victim]
    os.kill(pid, number)
    sent = time.monotonic()
    while any(is_alive(other) for other in others):
        assert time.monotonic() - sent < 60, run.outputs()
        time.sleep(0.1)
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)  # it notices that, too
    output, _ = run.process.communicate(timeout=60)
    assert run.process.returncode in (1, 137), output
    word = "died" if number == signal.SIGKILL else "has been silent for 30 s"
    for index, log in enumerate(run.outputs().values()):
        lines = [line for line in log.splitlines() if line.startswith("jaxmodels:")]
        if index != victim:
            assert lines and re.fullmatch(rf"jaxmodels: process {victim} \(\S+\) {word}; this process ends\. The same command resumes .*", lines[-1]), log
    before = run.global_batches(6)
    run.start(2, 4)
    output = run.end()
    assert (resumed := re.search(r"resumed from \S+/checkpoints/(\d+)", output)), output
    step = int(resumed[1])
    assert step >= 80 and step % 40 == 0
    after = run.global_batches(12)
    assert sorted(sum(before[:step] + after[: 300 - step], [])) == list(range(7200))
    assert len(RunFolder(run.workdir).metrics("train")) == 60


@pytest.mark.faults
@pytest.mark.slow
def test_a_signal_at_one_stops_all_at_one_step_and_nothing_is_lost(tmp_path):
    config = CONFIG | {"training": {"steps": 400}, "evaluation": {"every": 7}, "checkpoint": {"every": 10_000}}
    config["data"] = CONFIG["data"] | {"size": 9600}
    whole, run = Run(tmp_path, config, "whole"), Run(tmp_path, config, "stopped")
    whole.start(2, 1).end()
    for index, step in ((1, 25), (0, 100)):
        run.start(2, 1)
        run.wait_for_step(step)
        os.kill(run.pid(index), signal.SIGTERM)
        run.process.wait(120)
        assert run.process.returncode == 75, run.outputs()
        saved = [re.search(r"jaxmodels: SIGTERM.*: saved \S+/checkpoints/(\d+)\. The same command", log) for log in run.outputs().values()]
        assert len({match[1] for match in saved}) == 1 and step <= int(saved[0][1]) < 400, run.outputs()
    run.start(2, 1).end()
    assert_same_end(whole, run)


@pytest.mark.faults
@pytest.mark.slow
def test_a_second_start_of_two_processes_is_refused_in_both(tmp_path):
    """The first process of the run holds the lock for both; it is removed at a stop."""
    config = CONFIG | {"training": {"steps": 100_000}}
    run, other = Run(tmp_path, config), Run(tmp_path, config, "other")
    other.workdir = run.workdir
    run.start(2, 1).wait_for_step(10)
    owner = json.loads((run.workdir / "lock.json").read_text())["pid"]
    assert owner == run.pid(0)
    other.start(2, 1, "--overwrite")
    output = other.end(1)
    assert f"is in use by process {owner} on" in output and "Traceback" not in str(other.outputs()), other.outputs()
    assert all(f"is in use by process {owner} on" in said for said in other.outputs().values())
    os.kill(run.pid(1), signal.SIGTERM)
    run.end(75)
    assert not (run.workdir / "lock.json").exists()
    starts = RunFolder(run.workdir).manifest()["starts"]
    assert len(starts) == 1


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("split, process, example, steps", [("train", 2, 709, (27, 28, 29)), ("validation", 2, 30, (20,))])
def test_a_reader_of_one_of_four_fails_and_nothing_is_lost(tmp_path, split, process, example, steps):
    """All stop at one step before the first that needs what cannot be read, save, and name process, source and example. Batches are read 2 ahead."""
    data = CONFIG["data"] | {"source": "recording_sources:failing", "shuffle": False, "eval_batch_size": 4}
    config = small_configs.config(CONFIG, data=data, checkpoint__every=1000)
    whole, run = Run(tmp_path, config, "whole"), Run(tmp_path, config, "failing")
    whole.start(4, 1).end()
    (run.folder / f"failing-{split}").touch()
    run.start(4, 1).end(1)
    line = rf"jaxmodels: process {process} \(\S+\): config.data.source='recording_sources:failing', split {split}: example {example} cannot be read: ValueError: odd"
    for log in run.outputs().values():
        (said,) = [line for line in log.splitlines() if line.startswith("jaxmodels:")]
        assert re.match(line, said) and "Traceback" not in log, log
    (saved,) = re.findall(r"saved \S+/checkpoints/(\d+)\. The same command resumes", run.outputs()["process-0.log"])
    assert int(saved) in steps
    (run.folder / f"failing-{split}").unlink()
    assert f"checkpoints/{saved}" in run.start(4, 1).end()
    assert_same_end(whole, run)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("split, steps", [("train", (27, 28, 29)), ("validation", (20,))])
def test_a_signal_while_the_reader_of_one_hangs(tmp_path, split, steps):
    """The others wait for it before their steps, not in them. All save at a step that needs nothing of what hangs."""
    data = CONFIG["data"] | {"source": "recording_sources:failing", "shuffle": False, "eval_batch_size": 4}
    run = Run(tmp_path, small_configs.config(CONFIG, data=data, checkpoint__every=1000))
    (run.folder / f"hanging-{split}").touch()
    run.start(4, 1).wait_for_step(steps[0] // 5 * 5)
    time.sleep(1)
    os.kill(run.pid(3), signal.SIGTERM)
    run.end(75, seconds=60)
    saved = [re.search(r"jaxmodels: SIGTERM.*: saved \S+/checkpoints/(\d+)\. The same command", log) for log in run.outputs().values()]
    assert len({match[1] for match in saved}) == 1 and int(saved[0][1]) in steps, run.outputs()


@pytest.mark.faults
@pytest.mark.slow
def test_a_reader_of_one_that_hangs_ends_all_after_the_limit(tmp_path):
    """As with one process: the stacks are printed, and the state is saved."""
    data = CONFIG["data"] | {"source": "recording_sources:failing", "shuffle": False}
    run = Run(tmp_path, small_configs.config(CONFIG, data=data, checkpoint__every=1000))
    (run.folder / "hanging-train").touch()
    run.start(2, 1, "--stall_limit=5").end(1, seconds=90)
    logs = run.outputs()
    assert re.search(r"saved \S+/checkpoints/(27|28|29)\. The same command resumes", logs["process-0.log"]), logs
    for log in logs.values():
        assert "most recent call first" in log and "jaxmodels: no process has completed a step for 5 s (--stall_limit); " in log, log
    assert "it waits for data in" in logs["process-1.log"] and "Traceback" not in str(logs)


@pytest.mark.slow
def test_two_evaluate_as_one(tmp_path, jaxmodels_command):
    run = Run(tmp_path, CONFIG).start(2, 1)
    run.end()
    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HELPERS), str(ROOT))), "WATCH": str(tmp_path)}
    command = ["evaluate", f"--workdir={run.workdir}", "--split=validation", "--json"]
    several = [sys.executable, "-m", "jaxmodels", *command, f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    started = [subprocess.Popen([*several, f"--process={i}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for i in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and outputs[1] == ""
    alone = jaxmodels_command(*command, env=environment)
    one, two = (json.loads(output.splitlines()[-1]) for output in (alone.stdout, outputs[0]))
    assert one["step"] == two["step"] == 40 and one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_of_different_configs(tmp_path):
    """Each process prints the keys that differ before a device starts, and none hangs."""
    run, port = Run(tmp_path, CONFIG), free_port()
    command = [
        sys.executable,
        "-m",
        "jaxmodels",
        "train",
        f"--config={run.config}",
        f"--workdir={run.workdir}",
        f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HELPERS), str(ROOT))), "WATCH": str(tmp_path)}
    started = [
        subprocess.Popen([*command, f"--process={index}", f"--config.seed={index}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        (line,) = [line for line in errors.splitlines() if line.startswith("jaxmodels:")]
        assert process.returncode == 2 and "different configs: config.seed is 0 in process 0, 1 in process 1" in line
    assert not run.workdir.exists()


@pytest.mark.slow
def test_a_coordinator_that_is_not_there(tmp_path, jaxmodels_command):
    run = Run(tmp_path, CONFIG)
    started = time.monotonic()
    done = jaxmodels_command(
        "train",
        f"--config={ROOT}/configs/cnn_digits.py",
        f"--workdir={run.workdir}",
        "--coordinator=127.0.0.1:9",
        "--processes=2",
        "--process=1",
        "--start_limit=3",
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("jaxmodels: process 1 could not connect to the coordinator 127.0.0.1:9")
        and done.stderr.count("\n") == 1
    )
    assert time.monotonic() - started < 60


# The script itself


def local(*args, **environment):
    return subprocess.run([LOCAL, *args], capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_what_local_sh_would_run(tmp_path):
    done = local("-n", "2", "--cpu_devices=4", f"--logs={tmp_path}/logs", "--dry_run", "--", "--config=a b.py", "--config.seed=1")
    assert done.returncode == 0, done.stderr
    made, *commands = done.stdout.splitlines()
    assert made == f"mkdir -p {tmp_path}/logs" and not (tmp_path / "logs").exists()
    for index, line in enumerate(commands):
        assert re.fullmatch(
            rf"env JAXMODELS_COORDINATOR=127\.0\.0\.1:\d+ JAXMODELS_PROCESSES=2 JAXMODELS_PROCESS={index} jaxmodels train --cpu_devices=4 "
            rf"--config=a\\ b\.py --config\.seed=1 > {tmp_path}/logs/process-{index}\.log 2>&1 &",
            line,
        ), line
    gpus = local("-n", "2", "--gpus", "--dry_run", "--", "--config=x.py").stdout.splitlines()
    assert "JAX_LOCAL_DEVICE_IDS=1 " in gpus[2] and "cpu_devices" not in gpus[2]


@pytest.mark.parametrize(
    "args, message",
    [
        (["-n", "two", "--", "--config=x"], "-n must be a number of processes above 0, got 'two'"),
        (["--", "--config=x"], "-n must be a number"),
        (["-n", "2"], "no arguments of jaxmodels train"),
        (["-n", "2", "--gpus", "--cpu_devices=2", "--", "x"], "exclude each other"),
        (["-n", "2", "--config=x"], "unknown argument --config=x"),
    ],
)
def test_local_sh_reports_wrong_arguments(args, message):
    done = local(*args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def fake(tmp_path, text):
    """Write a program that replaces jaxmodels."""
    path = tmp_path / "fake.sh"
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return {"JAXMODELS": str(path)}


@pytest.mark.faults
def test_local_sh_kills_the_rest_when_one_fails(tmp_path):
    program = fake(tmp_path, 'echo "here is $JAXMODELS_PROCESS of $JAXMODELS_PROCESSES: $*"; [ $JAXMODELS_PROCESS = 1 ] && exit 7; sleep 1000')
    started = time.monotonic()
    done = local("-n", "3", f"--logs={tmp_path}/logs", "--", "--config=x", LEAVE_SECONDS="1", **program)
    assert done.returncode == 7 and time.monotonic() - started < 30
    assert done.stdout == "here is 0 of 3: train --config=x\n"
    assert "process 1 ended with status 7" in done.stderr and "process 0 2 did not end by itself: killed" in done.stderr
    assert (tmp_path / "logs" / "process-2.log").read_text() == "here is 2 of 3: train --config=x\n"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_sh_passes_a_signal_on(tmp_path, number):
    name = number.name.removeprefix("SIG")
    program = fake(tmp_path, f"trap 'echo stopped >> {tmp_path}/stopped; exit 75' {name}; echo > {tmp_path}/$JAXMODELS_PROCESS; while true; do sleep 0.1; done")
    # If the process that starts the tests ignores a signal, as a shell's background job ignores SIGINT, a shell script cannot trap it.
    listen = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen([LOCAL, "-n", "2", f"--logs={tmp_path}/logs", "--", "x"], env=os.environ | program, preexec_fn=listen)
    end = time.monotonic() + 30
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert (tmp_path / "stopped").read_text() == "stopped\n" * 2
