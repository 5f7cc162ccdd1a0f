"""A run that is killed, stopped and suspended at random moments ends as an uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import small_configs
from conftest import ROOT
from training.test_resume import assert_same, best_in_the_middle, finish, summary, write_config

from jaxmodels.runs.folder import RunFolder
from jaxmodels.storage.paths import is_bucket

pytestmark = [pytest.mark.faults, pytest.mark.slow]
EXPECTED = (0, 75, -signal.SIGKILL, -signal.SIGTERM)  # the last before Python has reached our handlers


def train(path, workdir):
    """Start a run in an interpreter of its own, so that faults meet its imports too."""
    command = [sys.executable, "-m", "jaxmodels", "train", f"--config={path}", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fault(process, kind, seconds, generator):
    """Wait a random time of up to `seconds`, then kill, stop or suspend a process; return whether it was still running."""
    moment, pauses = generator.uniform(0, seconds), [generator.uniform(0.05, 1.0) for _ in range(2)]
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
    if kind == signal.SIGSTOP:
        time.sleep(pauses[0])
        process.send_signal(signal.SIGCONT)
        time.sleep(pauses[1])
        process.kill()
    return True


def test_faults_at_random_moments_change_nothing(tmp_path, location):
    """JAXMODELS_FAULTS faults (20; in buckets a quarter of them), whose moments and kinds JAXMODELS_SEED (0) decides; a run that has finished is
    followed by another.

    The moments are uniform over the time of a whole run: some are during an import, a compilation, a save or an evaluation.
    """
    faults, generator = int(os.environ.get("JAXMODELS_FAULTS", "20")), random.Random(int(os.environ.get("JAXMODELS_SEED", "0")))
    faults = -(-faults // 4) if is_bucket(location("")) else faults
    path = write_config(tmp_path, small_configs.config(best_in_the_middle("cnn"), checkpoint__every=3, log__tensorboard=True))
    finish(train(path, tmp_path / "compiles"))
    begin = time.monotonic()
    whole = finish(train(path, tmp_path / "whole"))
    seconds, done, runs = time.monotonic() - begin, [], 0
    while len(done) < faults:
        runs += 1
        workdir, finished = location(f"run{runs}"), False
        while len(done) < faults and not finished:
            process, kind = train(path, workdir), generator.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP))
            if fault(process, kind, seconds, generator):
                done.append(kind.name)
            output, _ = process.communicate(timeout=300)
            assert process.returncode in EXPECTED and "Traceback" not in output, (done, output)
            finished = process.returncode == 0
        output = finish(train(path, workdir))
        assert summary(output, workdir) == summary(whole, tmp_path / "whole"), done
        assert_same(tmp_path / "whole", workdir)
        assert not any(path.name in ("damaged", "lock.json") for path in RunFolder(workdir).path.iterdir())
    print(f"{len(done)} faults in {runs} runs:", *done)
