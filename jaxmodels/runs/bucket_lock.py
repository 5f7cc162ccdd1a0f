"""The lock of a run in a bucket: one object, written only on the condition that nobody else has written it since.

There are no claims: a bucket compares the generation of the object and writes it in one step, so of several writers one wins.
"""

from jaxmodels.errors import ConfigError
from jaxmodels.runs.lock_file import Owner
from jaxmodels.storage.paths import ABSENT, BucketPath


class BucketLock:
    """The object of a lock; the operations are those of `lock_file.LockFile`."""

    def __init__(self, path: BucketPath, token: str):
        """
        Args:
          path: of the object.
          token: of the owner that this process writes.
        """
        self.path, self._token = path, token
        self._generation = ABSENT  # of the object that this process has written

    def read(self) -> list[bytes]:
        """Return the contents of the lock; empty if there is none."""
        content, _ = self.path.read_with_generation()
        return [] if content is None else [content]

    def create(self, content: bytes) -> bool:
        """Create the lock; return False if there is one.

        Raises:
          ConfigError: the bucket writes although the condition does not hold, so that it can hold no lock.
        """
        if not self._write(content, ABSENT):
            return False
        if self.path.write_if(content, ABSENT) is not None:
            self.path.unlink(missing_ok=True)
            raise ConfigError(f"{self.path}: this store ignores conditions on writes (If-None-Match), so two starts could train there. Use another one.")
        return True

    def replace(self, content: bytes, seen: list[bytes]) -> bool:
        """Replace another's lock; return False if it is not any more as it was `seen`."""
        found, generation = self.path.read_with_generation()
        return found is not None and [found] == seen and self._write(content, generation)

    def beat(self, content: bytes) -> bool:
        """Overwrite the lock of this process; return False if it is not this process's any more."""
        if self._write(content, self._generation):
            return True
        found, generation = self.path.read_with_generation()
        if found is None:  # deleted by hand
            return self.create(content)
        if Owner.decode(found).token != self._token:
            return False
        return self._write(content, generation)

    def remove(self, content: bytes) -> None:
        """Remove the lock of this process, unless another has taken it over."""
        found, generation = self.path.read_with_generation()
        if found is not None and Owner.decode(found).token == self._token:
            self.path.write_if(None, generation)

    def owner(self) -> Owner | None:
        """Return the owner that the object names; None without one."""
        content = self.read()
        return Owner.decode(content[0]) if content else None

    def _write(self, content: bytes, condition: bytes) -> bool:
        generation = self.path.write_if(content, condition)
        if generation is None:
            # The write may have been done and its answer lost, so that its repetition found what it had written itself.
            found, generation = self.path.read_with_generation()
            if found != content:
                return False
        self._generation = generation
        return True
