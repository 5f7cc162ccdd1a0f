"""A lock on a run folder: one start at a time writes to it. Readers do not take it.

`lock.json` names its owner, and has a counter that a thread of the owner raises every few seconds: the heartbeat. Another start

- is refused while the owner lives;
- waits while the owner saves after a signal: a job that its scheduler starts again may meet its former self;
- takes the lock over if the owner is dead (same machine: the process is gone, or its number belongs to another process) or silent for a minute.
  Silence is measured by this process's clock, from unchanged file contents, so that the clocks of two machines need not agree.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxmodels.errors import RunError
from jaxmodels.runs import lock_file
from jaxmodels.runs.bucket_lock import BucketLock
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lock_file import LockFile, Owner, is_alive, this_process
from jaxmodels.storage.paths import is_bucket

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # twelve heartbeats: longer than a network file system usually hangs
_POLL_SECONDS = 1.0  # longest time between a signal and the note of it in the lock, and between two looks at another's lock


class RunLock:
    """This process's lock on a run folder: `attempt` until it is held, `start`, and `release`.

    It is also a callback of the run (`training.callback`), which ends the run if the lock is lost.

    Attributes:
      lost: why the lock is not held any more; None while it is held.
    """

    def __init__(self, folder: RunFolder, *, beat_seconds: float = BEAT_SECONDS, silent_seconds: float = SILENT_SECONDS):
        """
        Args:
          folder: the run folder; created if need be.
          beat_seconds: time between two heartbeats.
          silent_seconds: time without a heartbeat of an owner on another machine after which its lock is taken over.
        """
        self.lost: str | None = None
        self._folder, self._beat_seconds, self._silent_seconds = folder, beat_seconds, silent_seconds
        self._take_token()
        self._seen: list[bytes] = []
        self._unchanged, self._looked = 0.0, 0.0
        self._beats, self._end = 0, threading.Event()
        self._thread: threading.Thread | None = None
        self._held, self._made = False, []

    def attempt(self) -> str | None:
        """Try once to take the lock. Returns None if it is held now, else a line that says for what this process waits.

        Raises:
          ConfigError: the folder cannot be written.
          RunError: the lock belongs to a start that is running.
        """
        self._make_folder()
        lock_file.own_tokens.discard(self._me.token)
        self._take_token()  # one that no claim of an earlier attempt has
        lock_file.own_tokens.add(self._me.token)
        again = f"waiting for {self._folder.lock_file}"
        try:
            if self._file.create(self._me.encode(0)):
                self._held = True
                return None
            if seen := self._file.read():
                return self._judge(seen)
            return again  # released since the line before
        except FileNotFoundError:  # another start that was refused has deleted the empty folder
            return again
        except OSError as error:
            raise RunError(f"{self._folder.lock_file} cannot be read or written: {error.strerror}. Check the file system and the file's owner.") from error

    def _take_token(self) -> None:
        self._me = this_process(self._folder.path)
        self._file = (BucketLock if is_bucket(self._folder.path) else LockFile)(self._folder.lock_file, self._me.token)

    def _judge(self, seen: list[bytes]) -> str | None:
        """Refuse, wait for, or take over a lock that is there."""
        beaten = self._watch(seen)
        owner, claimed = Owner.decode(seen[-1]), len(seen) > 1
        alive = is_alive(owner, self._folder.path)
        if alive is False or (alive is None and self._unchanged >= self._silent_seconds):
            if self._file.replace(self._me.encode(0), seen):
                self._held = True
                return None
            return f"waiting for another start, which takes {self._folder.lock_file} over from {owner}"
        if owner.stopping:
            return f"waiting for {owner}, which saves in {self._folder.path} after {owner.stopping}"
        if (alive or beaten) and not claimed:
            stop = f"stop it (kill {owner.pid}{'' if alive else f' on {owner.host}'}: it saves first)"
            raise RunError(
                f"{self._folder.path} is in use by {owner}, which has trained there since {owner.since}. "
                f"Wait until it ends, {stop}, or choose another --workdir. Nothing was changed."
            )
        return f"waiting for a sign of life of {owner}, which holds {self._folder.lock_file}, for at most {self._silent_seconds:g} s"

    def _watch(self, seen: list[bytes]) -> bool:
        """Note how long the lock is unchanged; return whether its owner has given a heartbeat since the last look."""
        now = time.monotonic()
        same_owner = bool(self._seen) and Owner.decode(self._seen[-1]).token == Owner.decode(seen[-1]).token
        beaten = same_owner and self._seen != seen and bool(Owner.decode(seen[-1]).pid)
        # A look that took long says nothing about the time before it: the file system may have hung for the owner too.
        self._unchanged = self._unchanged + min(now - self._looked, 2 * _POLL_SECONDS) if self._seen == seen else 0.0
        self._seen, self._looked = seen, now
        return beaten

    def _make_folder(self) -> None:
        """Create the run folder, and note what was created, to delete it if it stays empty."""
        self._folder.check_writable()
        path = self._folder.path
        if is_bucket(path):
            return
        self._made = self._made or [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)

    def start(self, stopping: Callable[[], str | None]) -> None:
        """Start the heartbeat; `stopping` returns the name of a received signal, which is then noted in the lock."""
        self._thread = threading.Thread(target=self._beat, args=(stopping,), daemon=True, name="run lock")
        self._thread.start()

    def _beat(self, stopping: Callable[[], str | None]) -> None:
        last = time.monotonic()
        while not self._end.wait(min(_POLL_SECONDS, self._beat_seconds)):
            signal = stopping()
            if signal == self._me.stopping and time.monotonic() - last < self._beat_seconds:
                continue
            last = time.monotonic()
            self._me = dataclasses.replace(self._me, stopping=signal)
            self._beats += 1
            try:
                if not self._file.beat(self._me.encode(self._beats)):
                    self._lose()
                    return
            except OSError:
                pass  # a full disk, or a server that is away: the next heartbeat may succeed, and `on_save` looks before each save

    def _lose(self) -> None:
        try:
            owner = self._file.owner()
        except OSError:
            owner = None
        self.lost = (
            f"{self._folder.path} was taken over by {owner or 'another start'}, because this process gave no sign of life for "
            f"{self._silent_seconds:g} s: it was suspended, or the file system hung. This process ends without writing to it."
        )

    def release(self) -> None:
        """Stop the heartbeat, and remove the lock if it is held. The folder is deleted if it was created here and is empty."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(2 * _POLL_SECONDS)
        if self._held and not (self._thread is not None and self._thread.is_alive()):  # else its file system hangs
            self._held = False
            try:
                self._file.remove(self._me.encode(self._beats))
            except OSError:
                pass  # the next start finds that this process is gone
        lock_file.own_tokens.discard(self._me.token)
        for place in self._made:
            try:
                place.rmdir()
            except OSError:
                break

    # As a callback of the run, in the first process

    def on_step(self, run: Any, step: int, metrics: Any) -> None:
        """Raise RunError if the lock was lost."""
        if self.lost is not None:
            raise RunError(self.lost)

    def on_evaluate(self, run: Any, step: int, split: str, values: Any) -> None:
        """Raise RunError if the lock was lost."""
        self.on_step(run, step, values)

    def on_save(self, run: Any, step: int) -> None:
        """Raise RunError if the lock was lost."""
        self.check()

    def check(self) -> None:
        """Raise RunError if the lock was lost, as its file says now: a process that was suspended may save before its next heartbeat."""
        if self._held and self.lost is None:
            try:
                owner = self._file.owner()
            except OSError:
                return  # the save will tell
            if owner is not None and owner.pid and owner.token != self._me.token:
                self._lose()
        if self.lost is not None:
            raise RunError(self.lost)


@contextlib.contextmanager
def held(folder: RunFolder) -> Iterator[RunLock]:
    """Hold the lock of a run folder in the block, for a single process; wait for an owner that saves or is silent.

    Raises:
      ConfigError: the folder cannot be written.
      RunError: a start is training in this folder.
    """
    lock = RunLock(folder)
    try:
        while lock.attempt() is not None:
            time.sleep(_POLL_SECONDS)
        lock.start(lambda: None)
        yield lock
    finally:
        lock.release()
