"""A run that hangs prints where, and ends with status 1, so that a scheduler starts it again."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

import jaxmodels
from jaxmodels.distributed import session
from jaxmodels.distributed.member import say

_ANSWER_SECONDS = 30.0  # for the main thread, when it is asked to save and end
_PRINT_SECONDS = 5.0  # for the stacks: standard error may be a pipe that nobody reads
_SUSPENDED_SECONDS = 10.0  # a longer gap between two turns of the watchdog's own thread: the process was suspended, and its time does not count

_PACKAGE = f"{os.path.dirname(jaxmodels.__file__)}{os.sep}"

# What the innermost frame of a known file waits for: parts of paths of other packages, beginnings of paths of this one.
_PLACES = (
    ("/jax/_src/compiler.py", "the compiler"),
    ("/jax/experimental/array_serialization/", "the disk"),
    ("/jax/_src/", "the device"),
    ("/grain/", "data"),
    ("/orbax/", "the disk"),
)
_OWN_PLACES = (
    ("data/", "data"),
    ("runs/", "the disk"),
    ("pretrained/", "the disk"),
    ("distributed/", "another process"),
    ("parallel/", "the device"),
    ("step/", "the device"),
    ("training/trackers/", "the disk"),
    ("training/terminal.py", "the terminal"),
    ("training/compile.py", "the compiler"),
    ("training/hooks.py", "a callback"),
    ("training/", "the device"),
)

Phase = Literal["step", "setup", "save"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a run ends.

    Attributes:
      step: without a step, or a batch of an evaluation (`--stall_limit`).
      setup: of restoring, initialising or compiling (`--setup_limit`).
      save: of saving (`--save_limit`).
    """

    step: float = 1800.0
    setup: float = 7200.0
    save: float = 3600.0


_OPTIONS = {"step": "--stall_limit", "setup": "--setup_limit", "save": "--save_limit"}
_DONE = {"step": "has completed a step", "setup": "has finished restoring, initialising or compiling", "save": "has finished saving"}


class Watchdog:
    """Context manager that ends the process when the run makes no progress.

    A run that waits for data has a good state: its main thread is asked to save and to end, before the process is ended by force.

    With one process a thread of its own looks at the time of the last progress. With several, process 0 does that for all (see
    `distributed.member`), and has the limit of the present phase from here. The thread needs the interpreter: code that holds its lock is not seen.

    Attributes:
      interrupt: asks the main thread to save and to end; None if it cannot be asked.
      reason: why it was asked; None before.
    """

    def __init__(self, limits: Limits | None = None, leave: Callable[[str], None] | None = None):
        """
        Args:
          limits: None for no limit, as in a program that must not be ended from here.
          leave: called with the reason, in the thread; ends the process by default.
        """
        self.limits, self._leave = limits, leave or end_process
        self.interrupt: Callable[[], None] | None = None
        self.reason: str | None = None
        self._phase: Phase = "step"
        self._progressed = time.monotonic()
        self._thread: int | None = None  # whose stack says what is waited for
        self._member = None
        self._over = threading.Event()

    def __enter__(self):
        self._thread = threading.get_ident()
        self._member = session.current()
        self.beat()
        if self.limits is not None:
            if self._member is None:
                threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            else:
                self._member.report = lambda: self.report()[1]
                self._tell_member()
        return self

    def __exit__(self, *_):
        self._over.set()

    def beat(self) -> None:
        """Note progress: a step, or a batch of an evaluation."""
        self._progressed = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: Phase, thread: int | None = None):
        """Apply the limit of a phase to the block, from its beginning on.

        Args:
          name: of the phase.
          thread: identifier of the thread that does the work; by default the one that entered the watchdog.
        """
        before = self._phase, self._thread
        self._phase, self._thread = name, thread or self._thread
        self.beat()
        self._tell_member()
        try:
            yield
        finally:
            self._phase, self._thread = before
            self.beat()
            self._tell_member()

    def report(self) -> tuple[str, str]:
        """Print the stacks of all threads on standard error; return what the run waits for, and a sentence about it."""
        what, where = waits_for(self._thread)
        _print(lambda: os.write(2, stacks().encode(errors="replace")))
        return what, f"it waits for {what}{f' in {where}' if where else ''}; the stacks of all threads are above"

    def _tell_member(self) -> None:
        if self._member is not None and self.limits is not None:
            self._member.set_limit(getattr(self.limits, self._phase), _DONE[self._phase], _OPTIONS[self._phase])

    def _watch(self) -> None:
        turn = min(1.0, min(dataclasses.astuple(self.limits)) / 10)
        last = time.monotonic()
        while not self._over.wait(turn):
            now = time.monotonic()
            if now - last > turn + _SUSPENDED_SECONDS:
                self.beat()
            last = now
            phase = self._phase
            limit = getattr(self.limits, phase)
            if now - self._progressed <= (limit if self.reason is None or phase != "step" else _ANSWER_SECONDS):
                continue
            what, waits = self.report()
            reason = f"for {limit:g} s the run {_DONE[phase].replace('has ', 'has not ', 1)} ({_OPTIONS[phase]}): {waits}"
            if what == "data" and self.interrupt is not None and self.reason is None:
                self.reason = reason
                self.beat()
                self.interrupt()
                continue
            self._leave(f"{self.reason or reason}. This process ends; the same command resumes from the last checkpoint.")
            return


def waits_for(thread: int | None) -> tuple[str, str]:
    """Return what a thread waits for, `data`, `the device`, `the disk` or another, and the innermost line of this package that it is in.

    Args:
      thread: its identifier.
    """
    frame, what, where = sys._current_frames().get(thread), None, ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            path = path.removeprefix(_PACKAGE).replace(os.sep, "/")
            what = what or next((kind for start, kind in _OWN_PLACES if path.startswith(start)), None)
            where = where or f"{frame.f_code.co_name} (jaxmodels/{path}, line {frame.f_lineno})"
        else:
            what = what or next((kind for part, kind in _PLACES if part in path.replace(os.sep, "/")), None)
        frame = frame.f_back
    return what or "something else", where


def stacks() -> str:
    """Return the stacks of all threads, without reading files: these may be on the disk that hangs.

    Not `faulthandler`, which holds the interpreter's lock while it writes: a pipe that nobody reads would then block the watchdog too.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)}, most recent call first:")
        while frame is not None:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
            frame = frame.f_back
    return "\n".join(lines) + "\n"


def _print(write: Callable[[], object]) -> None:
    """Run a function that writes to standard error, and wait for it for a while."""

    def attempt():
        with contextlib.suppress(OSError):
            write()

    printing = threading.Thread(target=attempt, daemon=True)
    printing.start()
    printing.join(_PRINT_SECONDS)


def end_process(reason: str) -> None:
    """Print a reason, kill worker processes, and end this process with status 1 without waiting for anything."""
    _print(lambda: say(reason))
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
