"""SIGTERM and SIGINT: stop soon, with everything saved; several processes all at the same step."""

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

from jaxmodels.distributed import session
from jaxmodels.errors import Interrupted


class StopSignals:
    """Catches SIGTERM and SIGINT while it is entered, in the main thread; elsewhere it changes nothing.

    Among several processes, a signal at any of them stops all, at the same `check` and nowhere else.

    Attributes:
      received: name of the signal, or None.
    """

    def __init__(self):
        self.received: str | None = None
        self._waiting = False
        self._previous = {}
        self._member = None

    def __enter__(self):
        self._member = session.current()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice, by hand: now
        self.received = signal.Signals(number).name
        if self._member is not None:
            self._member.request_stop(self.received)
        elif self._waiting:
            raise Interrupted(self.received)

    def check(self) -> None:
        """A place to stop: once after each step and in each batch of an evaluation, the same in every process.

        Raises:
          Interrupted: a signal came, here or, by agreement, at another process.
        """
        if self._member is not None:
            try:
                self._member.check()
            except Interrupted as error:
                self.received = str(error)
                raise
        elif self.received:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def may_raise(self):
        """Inside, a signal raises Interrupted at once: for waits that may last, with nothing half-done.

        Not where there are several processes: one that left from here would be at another step than the others.
        """
        if self._member is not None:
            yield
            return
        self._waiting = True  # first, so that no signal falls between the question and the wait
        try:
            if self.received:
                raise Interrupted(self.received)
            yield
            if self.received:  # raised where Python drops it: in a callback of its garbage collector
                raise Interrupted(self.received)
        finally:
            self._waiting = False

    def run(self, function: Callable, *args) -> Any:
        """The function's result, from a thread: a signal raises Interrupted here while it runs on.

        For calls that hold the interpreter's main thread in compiled code, where no signal handler can run.
        """
        result = {}

        def call():
            try:
                result["value"] = function(*args)
            except BaseException as error:  # noqa: BLE001  raised again below
                result["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        with self.may_raise():
            while thread.is_alive() and not (self._waiting and self.received):
                thread.join(0.1)
        if "error" in result:
            raise result["error"]
        return result["value"]
