"""One run folder, several processes: the first writes, all others find what it wrote."""

import time
from collections.abc import Mapping

from jaxmodels.distributed import session
from jaxmodels.errors import RunError
from jaxmodels.runs.checkpoint import Progress
from jaxmodels.runs.folder import RunFolder

# A network's file system may go on for a while saying that a new file is not there.
_SEEN_SECONDS = 60.0


def begin(folder: RunFolder, config: Mapping, *, clear: bool = False) -> None:
    """The folder as a run of this config has it from its start on, once every process has looked at what was there before.

    Args:
      folder: of the run.
      config: resolved.
      clear: delete the run that is there.

    Raises:
      RunError: a process sees another folder under this name.
    """
    session.barrier("checked")
    run = None
    if session.is_first():
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
            "Name a folder on a file system that all of them have."
        )


def rewind(folder: RunFolder, step: int, progress: Progress) -> list[dict]:
    """The metrics so far, in every process, without what the run will do again; see `RunFolder.rewind`."""
    with session.first_goes_first("rewind"):
        if session.is_first():
            folder.rewind(step, progress.evaluated_at, progress.finished)
        return folder.metrics()
