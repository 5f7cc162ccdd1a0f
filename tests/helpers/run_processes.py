"""Start `jaxmodels train` in a process, wait for what it does, and stop it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

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


def children(pid):
    """Return the processes that are below a process, by their number."""
    below = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            below += [int(child), *children(int(child))]
    return below


def is_worker(pid):
    """Return whether a process was made by multiprocessing to do work."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def is_alive(pid):
    """Return whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
