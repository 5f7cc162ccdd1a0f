"""Take and release the lock of a run folder again and again: `python lock_rounds.py FOLDER SECONDS SEED`.

While the lock is held, the file `inside` is created, which must not exist then, and the number in the file `count` is raised. A process that finds
`inside` of another that is alive prints VIOLATION and ends with status 1. The last line printed is the number of rounds.
"""

import os
import random
import sys
import time
from pathlib import Path

from processes import is_alive

from jaxmodels.errors import RunError
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lock import RunLock


def enter(place: Path) -> None:
    try:
        descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        for _ in range(20):
            if before := place.read_text():
                break
            time.sleep(0.01)  # a process that lives writes its number at once
        if before and is_alive(int(before)):  # else one that was killed inside
            print(f"VIOLATION: {os.getpid()} is inside together with {before}", flush=True)
            sys.exit(1)
        place.unlink()
        descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)


def main(folder: str, seconds: str, seed: str) -> None:
    random.seed(int(seed))
    run, rounds, end = RunFolder(folder), 0, time.monotonic() + float(seconds)
    inside, count = Path(folder).parent / "inside", Path(folder).parent / "count"
    while time.monotonic() < end:
        lock = RunLock(run)
        try:
            while lock.attempt() is not None:
                pass
        except RunError as error:
            assert "is in use by process" in str(error), error
            lock.release()
            continue
        enter(inside)
        time.sleep(random.uniform(0, 0.002))
        with open(count, "a") as file:
            file.write(".")
        inside.unlink()
        lock.release()
        rounds += 1
    print(rounds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
