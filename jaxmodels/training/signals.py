"""Handling of signals: stop soon and save; several processes stop at the same step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxmodels.distributed import session
from jaxmodels.errors import Interrupted, RunError
from jaxmodels.training.watchdog import Watchdog

STOP = ("SIGTERM", "SIGINT")
# Signals that can be treated as SIGTERM. Schedulers send some of them as a warning; SIGHUP comes when a terminal closes.
OTHERS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT")
_AGAIN_SECONDS = 0.1  # after which a signal that arrived in an import is handled again


class StopSignals:
    """Context manager that catches signals in the main thread; in another thread it catches none.

    With several processes, a signal to any of them, or an error of one, stops all at the same `check`, and nowhere else.

    Attributes:
      received: name of the first signal; None before one arrives.
      watchdog: of the run; entered and left with this.
    """

    def __init__(self, others: Sequence[str] = (), watchdog: Watchdog | None = None):
        """
        Args:
          others: names of signals that are treated as SIGTERM, unless this process ignores them (as under nohup) or has a handler for them.
          watchdog: one without limits by default.
        """
        self.received: str | None = None
        self.watchdog = watchdog or Watchdog()
        self._others = [getattr(signal, name) for name in others if hasattr(signal, name)]
        self._waiting = False
        self._previous = {}
        self._member = None
        self._outer_imports = 0
        self._resending, self._resend_lock, self._over = False, threading.Lock(), False

    def __enter__(self):
        self._member = session.current()
        self.watchdog.__enter__()
        if threading.current_thread() is threading.main_thread():
            self._outer_imports = _imports(sys._getframe())
            numbers = [getattr(signal, name) for name in STOP] + [number for number in self._others if signal.getsignal(number) is signal.SIG_DFL]
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
            if self._member is None:
                self.watchdog.interrupt = self._resend
            else:
                self._member.on_stop = self._resend
        return self

    def __exit__(self, *_):
        with self._resend_lock:
            self._over = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.watchdog.__exit__()

    def _handle(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: stop without saving
        agreed = self._member is not None and self._member.stopping  # then `_resend` has sent it
        if not agreed:
            self.received = self.received or signal.Signals(number).name
        if self._member is not None and not agreed:
            self._member.request_stop(self.received)
        elif self._waiting:
            if _imports(frame) > self._outer_imports:
                # An exception inside the import of a C extension becomes an ImportError, or leaves it half imported.
                self._handle_again()
            else:
                raise Interrupted(self.received)

    def _handle_again(self) -> None:
        """Send SIGTERM to the main thread a little later, unless that is planned."""
        if not self._resending:
            self._resending = True
            timer = threading.Timer(_AGAIN_SECONDS, self._resend)
            timer.daemon = True
            timer.start()

    def _resend(self) -> None:
        self._resending = False
        with self._resend_lock:
            if not self._over:  # afterwards it would end the process
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def check(self, error: RunError | None = None) -> None:
        """Stop here if a signal was received. Every process calls this before each step and each batch of an evaluation.

        Args:
          error: that several processes have to stop for, see `Member.check`; of no effect with one.

        Raises:
          Interrupted: this process received a signal, or another process did and all stop at this check.
          OneFailed: one of several processes had an error, and all stop at this check.
        """
        self.watchdog.beat()
        if self._member is not None:
            try:
                self._member.check(error)
            except Interrupted as stopped:
                self.received = str(stopped)
                raise
        elif self.received:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def may_raise(self):
        """Raise Interrupted at once on a signal inside the block, but after an import: for long waits during which no state is half-written.

        No-op with several processes: each would stop at a different step.
        """
        if self._member is not None:
            yield
            return
        self._waiting = True  # set before the check below, so that no signal is missed between the check and the wait
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
            if self.received:  # the handler raised where Python ignores exceptions, as in a callback of the garbage collector
                raise Interrupted(self.received)
        finally:
            self._waiting = False

    def read_ahead(self, read: Callable[[], object]) -> None:
        """Call a function that reads ahead, and may hang. A signal raises Interrupted, as in `may_raise`.

        With several processes the call is left without an error when all have agreed where to stop: no step before that needs what it still waits for.
        """
        if self._member is None:
            with self.may_raise():
                read()
            return
        try:
            self._waiting = True  # set before the next line, as in `may_raise`
            if not self._member.stopping:
                read()
        except Interrupted:
            pass
        finally:
            self._waiting = False

    def run(self, function: Callable, *args) -> Any:
        """Run a function in a thread and return its result; on a signal, raise Interrupted here while the thread continues.

        For restoring, initialising and compiling, which block in compiled code: in the main thread no signal handler could run meanwhile.
        The watchdog's limit is that of these.
        """
        result = {}

        def call():
            try:
                result["value"] = function(*args)
            except BaseException as error:  # raised again below
                result["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        with self.watchdog.phase("setup", thread.ident), self.may_raise():
            while thread.is_alive() and not (self._waiting and self.received):
                thread.join(0.1)
        if "error" in result:
            raise result["error"]
        return result["value"]


def _imports(frame) -> int:
    """Return the number of frames of Python's import system from `frame` outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib.")
        frame = frame.f_back
    return count
