"""A local copy of a run folder in a bucket, for trackers that write files: they write to the copy, and what changed is uploaded."""

import shutil
import tempfile
import time
from pathlib import Path

from jaxmodels.runs.folder import RunFolder
from jaxmodels.storage import paths

UPLOAD_SECONDS = 30.0  # between two uploads, except at a checkpoint and at the end
_READ = ("config.json", "manifest.json", "metrics.jsonl", "metrics.csv", "mlruns")  # what trackers read or continue
_WRITTEN = ("tensorboard", "metrics.csv", "wandb", "mlruns")


class Mirror:
    """A temporary folder with the files of a run that its trackers read and write.

    Attributes:
      folder: the temporary run folder, of the same name.
    """

    def __init__(self, folder: RunFolder):
        self._bucket, self._temporary = folder.path, tempfile.mkdtemp(prefix="jaxmodels-tracker-")
        self.folder = RunFolder(Path(self._temporary) / (folder.path.name or folder.path.bucket))
        self.folder.path.mkdir()
        for name in _READ:
            if (folder.path / name).exists():
                paths.download(folder.path / name, self.folder.path / name)
        self._uploaded, self._next = self._files(), 0.0

    def _files(self) -> dict[Path, tuple[int, int]]:
        """Return what tells whether a file of a tracker has changed."""
        files = [file for name in _WRITTEN for file in ([self.folder.path / name], (self.folder.path / name).rglob("*"))[(self.folder.path / name).is_dir()]]
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()}

    def upload(self, *, now: bool) -> None:
        """Upload the files that have changed, if it is time to or `now`."""
        if not now and time.monotonic() < self._next:
            return
        files = self._files()
        for file in (file for file, state in files.items() if self._uploaded.get(file) != state):
            (self._bucket / file.relative_to(self.folder.path).as_posix()).write_bytes(file.read_bytes())
        self._uploaded, self._next = files, time.monotonic() + UPLOAD_SECONDS

    def delete(self) -> None:
        """Delete the temporary folder."""
        shutil.rmtree(self._temporary, ignore_errors=True)
