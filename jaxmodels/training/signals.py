"""Handling of SIGTERM and SIGINT: stop soon and save; several processes stop at the same step."""

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any

from jaxmodels.distributed import session
from jaxmodels.errors import Interrupted


class StopSignals:
    """Context manager that catches SIGTERM and SIGINT in the main thread; in another thread it does nothing.

    With several processes, a signal to any of them stops all at the same `check`, and nowhere else.

    Attributes:
      received: name of the signal; None before one arrives.
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
            raise KeyboardInterrupt  # a second Ctrl-C: stop without saving
        self.received = signal.Signals(number).name
        if self._member is not None:
            self._member.request_stop(self.received)
        elif self._waiting:
            raise Interrupted(self.received)

    def check(self) -> None:
        """Stop here if a signal was received. Every process calls this after each step and in each batch of an evaluation.

        Raises:
          Interrupted: this process received a signal, or another process did and all stop at this check.
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
        """Raise Interrupted at once on a signal inside the block: for long waits during which no state is half-written.

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

    def run(self, function: Callable, *args) -> Any:
        """Run a function in a thread and return its result; on a signal, raise Interrupted here while the thread continues.

        For calls that block in compiled code: in the main thread no signal handler could run meanwhile.
        """
        result = {}

        def call():
            try:
                result["value"] = function(*args)
            except BaseException as error:  # raised again below
                result["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        with self.may_raise():
            while thread.is_alive() and not (self._waiting and self.received):
                thread.join(0.1)
        if "error" in result:
            raise result["error"]
        return result["value"]
