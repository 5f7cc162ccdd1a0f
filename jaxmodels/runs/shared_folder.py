"""One run folder shared by several processes: the first writes, the others wait until they see it."""

import time
from collections.abc import Mapping

from jaxmodels.distributed import session
from jaxmodels.errors import RunError
from jaxmodels.runs import disk
from jaxmodels.runs.checkpoint import Progress
from jaxmodels.runs.folder import RunFolder

# A network file system may show a new file to other hosts only after a delay.
_SEEN_SECONDS = 60.0


def begin(folder: RunFolder, config: Mapping, *, clear: bool = False) -> None:
    """Write the config and the id of a run, after every process has checked the folder.

    Args:
      folder: of the run.
      config: resolved.
      clear: delete the run in the folder first.

    Raises:
      RunError: the path is another folder for a process.
    """
    session.barrier("checked")
    run = None
    if session.is_first():
        with disk.must_write(folder.path):
            if clear:
                folder.clear()
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


def rewind(folder: RunFolder, step: int, progress: Progress) -> list[dict]:
    """Remove metrics after the checkpoint (see `RunFolder.rewind`); return the others, in every process."""
    with session.first_goes_first("rewind"):
        if session.is_first():
            with disk.must_write(folder.path):
                folder.rewind(step, progress.evaluated_at, progress.finished)
        return folder.metrics()
