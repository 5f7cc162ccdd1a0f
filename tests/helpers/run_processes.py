"""Start `jaxmodels train` in a process, wait for what it does, and stop it."""

import json
import os
import signal
import subprocess
import time

import warm_python
from conftest import HELPERS, ROOT


def start(config, workdir, tmp_path, prelude="", *arguments):
    """Start training; Python code in `prelude` runs first. HANG_FILE is `hang` in `tmp_path`."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    command = ["train", f"--config={path}", f"--workdir={workdir}", *arguments]
    program = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup\n{prelude}\nimport sys\nfrom jaxmodels.cli import main as cli\nif __name__ == '__main__':\n    sys.argv[1:] = {command}\n    cli.main()"
    environment = os.environ | {"HANG_FILE": str(tmp_path / "hang"), "PYTHONPATH": str(HELPERS), "PYTHONUNBUFFERED": "1"}
    return warm_python.Popen(["-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    """Wait until a condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def stop(process, number=signal.SIGTERM, within=30):
    """Send a signal; check that the process ends with status 75 in time; return its standard error."""
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - sent < within, "a stop must not wait for what it interrupts"
    return errors
