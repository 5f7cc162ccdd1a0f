"""One run folder shared by several processes: the first writes, the others wait until they see it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmodels.distributed import session
from jaxmodels.errors import Interrupted, RunError
from jaxmodels.runs import disk
from jaxmodels.runs.checkpoint import Progress
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lock import RunLock
from jaxmodels.runs.repair import repair

# A network file system may show a new file to other hosts only after a delay.
_SEEN_SECONDS = 60.0
_ATTEMPT_SECONDS = 0.5


@contextlib.contextmanager
def locked(folder: RunFolder, stop: Any, say: Callable[[str], Any]) -> Iterator[RunLock]:
    """Hold the lock of a run folder, in the first process for all.

    Args:
      folder: of the run; created if need be, and deleted at the end if it is empty.
      stop: the `StopSignals` of this start, which end the wait for a lock, and of which the lock tells others.
      say: function that prints a line.

    Yields:
      The lock, a callback of the run. In processes after the first it holds nothing.

    Raises:
      ConfigError: the folder cannot be written.
      RunError: another start is training in this folder.
      Interrupted: a signal during the wait.
    """
    lock, said = RunLock(folder), None
    try:
        while (waits := session.gather("lock", lock.attempt() if session.is_first() else None)[0]) is not None:
            if waits != said and session.is_first():
                say(waits)
            said = waits
            try:
                stop.check()
            except Interrupted as error:
                raise Interrupted(f"{error}: stopped while {waits}. The same command starts again.") from None
            time.sleep(_ATTEMPT_SECONDS)
        if session.is_first():
            lock.start(lambda: stop.received)
        yield lock
    finally:
        lock.release()


def begin(folder: RunFolder, config: Mapping, *, clear: bool = False) -> list[str]:
    """Write the config of a new run, and its id, after every process has checked the folder; set damaged files aside.

    A run that goes on with another config keeps its `config.json` until something was trained (`training.changes`).

    Args:
      folder: of the run.
      config: resolved.
      clear: delete the run in the folder first.

    Returns:
      One warning for each damaged file, in the first process.

    Raises:
      RunError: the path is another folder for a process.
    """
    session.barrier("checked")
    run, problems = None, []
    if session.is_first():
        with disk.must_write(folder.path):
            if clear:
                folder.clear()
            problems = repair(folder)
            if not folder.config_file.is_file():
                folder.write_config(config)
            run = folder.identify()
    run = session.gather("run", run)[0]
    end = time.monotonic() + _SEEN_SECONDS
    while not (seen := folder.manifest().get("id") == run) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [f"process {index} ({host})" for index, (found, host) in enumerate(session.gather("seen", [seen, session.host()])) if not found]
    if blind:
        raise RunError(
            f"--workdir={folder.path} is not the same folder for {', '.join(blind)} as for process 0: the processes of a run share one. "
            "Choose a folder on a file system that all processes share."
        )
    return problems


def rewind(folder: RunFolder, step: int, progress: Progress) -> list[dict]:
    """Remove metrics after the checkpoint (see `RunFolder.rewind`); return the others, in every process."""
    with session.first_goes_first("rewind"):
        if session.is_first():
            with disk.must_write(folder.path):
                folder.rewind(step, progress.evaluated_at, progress.finished)
        return folder.metrics()
