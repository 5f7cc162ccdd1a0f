"""Run a tracker in a separate thread, so that a slow or blocked one never delays the training loop."""

import collections
import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

from jaxmodels.runs.folder import RunFolder
from jaxmodels.storage.paths import is_bucket
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib
from jaxmodels.training.trackers.mirror import Mirror

# Limits of the queue. Beyond them new calls are dropped: what a tracker has got then has one gap, where the outage was.
QUEUE_CALLS = 1000
QUEUE_BYTES = 256 * 2**20  # of media
BLOCKED_SECONDS = 60.0  # a call that takes longer is reported while it runs
END_SECONDS = 30.0  # all trackers together, for what is queued when a run finishes: MLflow alone takes 10 s to create its database
STOP_SECONDS = 5.0  # the same when it stops early or fails: a preempted machine has little time


@dataclasses.dataclass(frozen=True)
class TrackerRun:
    """What a tracker in a thread sees of the run: a snapshot from when the call was queued.

    `warn`, `say` and `record` are passed on from the training loop's thread, at the tracker's next call: the manifest has one writer.

    Attributes:
      experiment, folder, step, resumed: as in `RunContext`; of a run in a bucket, `folder` is a local copy, from which files are uploaded.
    """

    experiment: Any
    folder: RunFolder
    step: int
    resumed: bool
    _messages: collections.deque = dataclasses.field(repr=False)

    def warn(self, message: str) -> None:
        """Print a warning, and record it in the manifest."""
        self._messages.append(("warn", message))

    def say(self, message: str) -> None:
        """Print a line."""
        self._messages.append(("say", message))

    def record(self, values: Mapping[str, Any]) -> None:
        """Record values in the manifest, in the entry of this start."""
        self._messages.append(("record", dict(values)))


class Group:
    """The background trackers of a run. They end together, within one time limit."""

    def __init__(self):
        self.members: list[Background] = []
        self._deadline: float | None = None

    def request_end(self, run: Any, result: Any) -> float:
        """Queue `on_end` in every member, at the first call. Returns the seconds that are left for them to finish."""
        if self._deadline is None:
            self._deadline = time.monotonic() + (STOP_SECONDS if result is None else END_SECONDS)
            for member in self.members:
                member.queue_end(run, result)
        return max(0.0, self._deadline - time.monotonic())


class Background(Callback):
    """A callback that queues its calls for a tracker in a thread.

    `on_step`, `state` and `restore` are not passed on: a tracker gets no device values, and stores its state in the run folder.
    """

    on_error = "continue"

    def __init__(self, name: str, tracker: Any, group: Group | None = None):
        """
        Args:
          name: of the tracker, for messages.
          tracker: an object with some methods of `Callback`.
          group: trackers that end within one time limit; a separate one unless given.
        """
        self.name = name
        self._tracker = tracker
        self._group = group or Group()
        self._group.members.append(self)
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards what follows; never held while the tracker runs
        self._calls = collections.deque()  # (method, run, arguments, options, bytes)
        self._bytes = 0
        self._dropped = 0
        self._busy_since: float | None = None
        self._failure: tuple[str, BaseException] | None = None
        self._ending = False
        self._finished = threading.Event()
        self._messages = collections.deque()
        self._failure_reported = self._blocked_reported = False
        self._mirror: Mirror | None = None  # of a run in a bucket

    # The training loop's side: returns at once

    def on_start(self, run: Any) -> None:
        # A daemon: a thread that hangs in a write does not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        self._queue(run, "on_start")

    def on_log(self, run: Any, step: int, values: Mapping[str, float]) -> None:
        self._queue(run, "on_log", step, dict(values))

    def on_evaluate(self, run: Any, step: int, split: str, values: Mapping[str, float]) -> None:
        if values:  # empty where the data has no such split
            self._queue(run, "on_evaluate", step, split, dict(values))

    def on_media(self, run: Any, step: int, name: str, media: Any, kind: str, **options: Any) -> None:
        # A copy on the host: the caller may change an array or close a figure before the thread gets to it.
        media, kind = media_lib.normalize(media, kind, **options)
        self._queue(run, "on_media", step, name, media, kind, size=len(media) if kind == "text" else media.nbytes, **options)

    def on_save(self, run: Any, step: int) -> None:
        self._queue(run, "on_save", step)

    def on_end(self, run: Any, result: Any) -> None:
        """Wait for the thread up to the group's time limit, then leave it behind. Reports what was not written."""
        seconds = self._group.request_end(run, result)
        if self._thread is None:
            return
        finished = self._finished.wait(seconds)
        self._report(run)
        with self._changed:
            left, dropped = len(self._calls) + 1, self._dropped
        if not finished:
            run.warn(f"tracker {self.name!r} did not finish in time; {_plural(left, 'call')} not written")
            self._abandon(run)
        if dropped:
            run.warn(f"tracker {self.name!r}: {_plural(dropped, 'call')} dropped in all")

    def _abandon(self, run: Any) -> None:
        """Let the tracker, if it has a method `abandon`, end what would keep the process from exiting."""
        try:
            if hasattr(self._tracker, "abandon"):
                self._tracker.abandon()
        except Exception as error:  # noqa: BLE001  reported
            run.warn(f"tracker {self.name!r} could not be abandoned ({type(error).__name__}: {error}); the process may exit late")

    def queue_end(self, run: Any, result: Any) -> None:
        """Queue the last call, whatever else is queued."""
        with self._changed:
            self._calls.append(("on_end", self._snapshot(run), (result,), {}, 0))
            self._ending = True
            self._changed.notify()

    def _queue(self, run: Any, method: str, *arguments: Any, size: int = 0, **options: Any) -> None:
        self._report(run)
        if not hasattr(self._tracker, method):
            return
        with self._changed:
            if self._failure is not None or self._ending:
                return
            full = len(self._calls) >= QUEUE_CALLS or (self._bytes + size > QUEUE_BYTES and len(self._calls) > 0)
            self._dropped += full
            first = full and self._dropped == 1
            if not full:
                self._calls.append((method, self._snapshot(run), arguments, options, size))
                self._bytes += size
                self._changed.notify()
        if first:
            run.warn(f"tracker {self.name!r} does not keep up: its queue is full, and calls are dropped from step {run.step} on")

    def _snapshot(self, run: Any) -> TrackerRun:
        return TrackerRun(run.experiment, run.folder, run.step, run.resumed, self._messages)

    def _report(self, run: Any) -> None:
        """Pass on the messages of the thread; report a failure, or a call that blocks, once."""
        while self._messages:
            method, content = self._messages.popleft()
            getattr(run, method)(content)
        if self._failure is not None and not self._failure_reported:
            self._failure_reported = True
            method, error = self._failure
            text = " ".join(str(error).split())[:300]
            run.warn(f"tracker {self.name!r} failed in {method} ({type(error).__name__}: {text}); training continues without it")
        since = self._busy_since
        if since is not None and time.monotonic() - since > BLOCKED_SECONDS and not self._blocked_reported:
            self._blocked_reported = True
            run.warn(f"tracker {self.name!r} has been blocked for {time.monotonic() - since:.0f} s; training continues, and its calls are queued")

    # The thread's side

    def _work(self) -> None:
        try:
            while self._run_next():
                pass
        finally:
            if self._mirror is not None:
                self._mirror.delete()
            self._finished.set()

    def _run_next(self) -> bool:
        """Wait for a call and run it. Returns whether there may be more."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._ending)
            if not self._calls:
                return False
            method, run, arguments, options, size = self._calls.popleft()
            self._bytes -= size
            self._busy_since = time.monotonic()
        try:
            if is_bucket(run.folder.path):
                self._mirror = self._mirror or Mirror(run.folder)
                run = dataclasses.replace(run, folder=self._mirror.folder)
            if hasattr(self._tracker, method):
                getattr(self._tracker, method)(run, *arguments, **options)
            if self._mirror is not None:
                self._mirror.upload(now=method in ("on_save", "on_end"))
        except BaseException as error:  # noqa: BLE001  reported in the training loop's thread; a SystemExit would end this thread only
            with self._changed:
                self._failure = (method, error)
                self._calls.clear()
            return False
        finally:
            self._busy_since = None
        return True


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun} was" if count == 1 else f"{count} {noun}s were"
