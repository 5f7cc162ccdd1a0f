"""Four processes that share a run folder in a bucket: the result is that of the same run on a disk, also after a stop and with other numbers of processes.

pytest -m buckets -n 0 tests/distributed/test_buckets_of_processes.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_configs
from conftest import ROOT
from run_state import final_state

from jaxmodels.runs.folder import RunFolder

pytestmark = pytest.mark.slow
CONFIG = small_configs.config(small_configs.CNN, data__batch_size=32, training__steps=30, evaluation__every=15, checkpoint__every=5, log__every=1)


def start(tmp_path, workdir, processes, devices):
    """Start a run on this machine, with some processes."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_configs.config(CONFIG, mesh={"fsdp": 2}) if processes * devices > 1 else CONFIG))
    command = [ROOT / "launch" / "local.sh", "-n", str(processes), f"--cpu_devices={devices}", "--", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"JAXMODELS": f"{sys.executable} -m jaxmodels"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process, status=0):
    output, _ = process.communicate(timeout=550)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The state and metrics of the run of four devices in one process, on a disk."""
    folder = tmp_path_factory.mktemp("reference")
    end(start(folder, folder / "run", 1, 4))
    return final_state(folder / "run")


def test_four_processes_stop_and_resume_as_one(reference, location, tmp_path):
    workdir = location("run")
    process = start(tmp_path, workdir, 4, 1)
    until = time.monotonic() + 300
    while not any(line["step"] >= 7 for line in RunFolder(workdir).metrics()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    end(process, 75)
    assert "resumed from" in end(start(tmp_path, workdir, 4, 1))
    (arrays, lines), (wanted, expected) = final_state(workdir), reference
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in expected]
    for name, array in wanted.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    assert RunFolder(workdir).manifest()["starts"][-1]["processes"] == 4
