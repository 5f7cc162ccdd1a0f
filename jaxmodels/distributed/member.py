"""Failure detection and agreement on a common stop for the processes of a run, over the key–value store of JAX's coordination service.

JAX's service also has heartbeats, but when they fail, the process aborts with a C++ stack trace. They are only a backup: the heartbeats
here print the reason first, and also detect a hanging interpreter. JAX's preemption sync point is not used: it installs its own handler
for SIGTERM, which Python's `signal` replaces, does not handle SIGINT, and does not report which process received the signal. Instead,
every process counts its checks, which are the same in all. After a signal, or an error that a process can stop for later, a thread of each
process blocks the next check of its main thread and writes the number of that check to the store; all stop at the largest number. No process
waits in a collective meanwhile.
"""

import contextlib
import json
import math
import multiprocessing
import os
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.distributed.rendezvous import listed
from jaxmodels.errors import Interrupted, OneFailed, RunError

_KEY = "jaxmodels"
# In seconds: time for a process to end by itself after another has failed, as both may have the same error; time limit for writing the reason;
# time that process 0 waits for the others to end, after a failure and after a common end.
_GRACE, _WRITE_SECONDS, _OTHERS_SECONDS, _AGREED_SECONDS = 5.0, 5.0, 10.0, 60.0
_ANSWER_SECONDS = 30.0  # for the main threads to stop together, when no process makes progress; at most the limit itself


class Member:
    """The membership of this process in a run.

    It has two threads. One watches the connections and time limits, and never blocks on process 0. The other uses the key–value store.

    Attributes:
      hosts: host names of all processes.
      agreed: whether this process has stopped at the common check.
      on_stop: called by a thread when all processes have agreed where to stop.
      report: called before this process ends because no process makes progress; prints the stacks and returns what this one waits for.
    """

    def __init__(self, processes, connections, hosts, *, hang_limit, stall_limit, leave: Callable[[int, str], None] | None = None):
        """
        Args:
          processes, connections, hosts: argument and results of `rendezvous.meet`.
          hang_limit, stall_limit: seconds, see `session.join`.
          leave: function that ends this process, called by a thread with an exit status and a message; for tests.
        """
        self.processes, self.hosts, self.agreed = processes, hosts, False
        self._index, self._connections, self._leave = processes.index, connections, leave or self._leave_process
        self.report, self.on_stop = lambda: "", lambda: None
        self._hang_limit = hang_limit
        self._moved = (0, time.monotonic())  # sum of the checks of all processes, and the time of its last change
        self.set_limit(stall_limit)
        self._turn = max(min(0.2, hang_limit / 10), processes.count / 1000)  # seconds; process 0 then receives at most 1000 requests per second
        self._changed = threading.Condition()
        self._store: Any = None
        self._checks = self._gathers = 0
        # Why this process asks for a stop, its exit status (None for a signal), and whether no process makes progress; whether checks block;
        # number of the common check, and the same three of the process that asked first, and its index.
        self._wish, self._frozen, self._stop = None, False, None
        self._asked = self._reported = False  # whether process 0 has asked for a stop because no process makes progress; whether `report` was called
        self._alarmed = self._ending = self._over = False
        self._said_bye, self._gone = set(), set()
        self._beats: dict[int, tuple[list, float]] = {}  # watched process -> its latest [heartbeat, checks], and the time of the last change
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, store: Any) -> None:
        """Start using the key–value store, a client of JAX's coordination service."""
        self._store = store
        self._beats = dict.fromkeys(range(self.processes.count) if self._index == 0 else [0], ([0, 0], time.monotonic()))
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def check(self, error: RunError | None = None) -> None:
        """Stop here if all processes have agreed to; every process must make the same sequence of checks.

        Args:
          error: why all have to stop. This process then waits here until they have agreed, and can go on to the largest check that any has reached.

        Raises:
          Interrupted: all processes stop at this check because of a signal.
          OneFailed: all processes stop at this check because of the error of one.
        """
        if error is not None:
            self.request_stop(str(error), error.exit_status)
        with self._changed:
            self._changed.wait_for(lambda: self._stop or not (self._frozen or error))
            if not (self._stop and self._checks >= self._stop[0]):
                self._checks += 1
                return
        _, reason, status, stalled, index = self._stop
        if error is not None and (status is None or index != self._index):
            say(f"{self._name(self._index)}: {error}")  # another reason came first
        self.agreed = True
        if status is not None:
            raise OneFailed(reason if stalled else f"{self._name(index)}: {reason}", status)
        raise Interrupted(reason + ("" if index == self._index else f" (at process {index})"))

    @property
    def stopping(self) -> bool:
        """Whether all processes have agreed where to stop."""
        return self._stop is not None

    def request_stop(self, reason: str, status: int | None = None, stalled: bool = False) -> None:
        """Request a common stop because of a signal of this name, or of an error with this exit status; safe in a signal handler."""
        self._wish = self._wish or [reason, status, stalled]

    def exchange_errors(self, error: RunError | None) -> None:
        """Raise OneFailed in all processes if one has an error, once all have called this."""
        found = self.gather("errors", None if error is None else [str(error), error.exit_status])
        for index, each in enumerate(found):
            if each is not None:
                self.agreed = True
                raise OneFailed(f"{self._name(index)}: {each[0]}", each[1])

    def set_limit(self, seconds: float, done: str = "has completed a step", option: str = "--stall_limit") -> None:
        """Set the seconds without a check of any process after which the run ends, counted from now; process 0 applies its own.

        Args:
          seconds: the limit.
          done: what no process has done when they are over, for the message.
          option: the command line option that sets the limit; that of steps does not apply before the first check.
        """
        self._limit = seconds, done, option
        self._moved = (self._moved[0], time.monotonic())

    def gather(self, name: str, value: Any = None) -> list:
        """Return the values of all processes in order, once all have called this with the same name; `value` is a JSON value."""
        number, self._gathers = self._gathers, self._gathers + 1
        self._store.key_value_set(f"{_KEY}/gather/{number}/{self._index}", json.dumps([name, value]))
        if self._index == 0:
            pairs = [self._get(f"gather/{number}/{index}") for index in range(self.processes.count)]
            for index, (other, _) in enumerate(pairs):
                if other != name:  # a programming error, which would otherwise hang
                    raise RunError(f"{self._name(index)} is at {other!r} but {self._name(0)} is at {name!r}: the processes do not run the same program.")
            self._store.key_value_set(f"{_KEY}/gathered/{number}", json.dumps([value for _, value in pairs]))
        return self._get(f"gathered/{number}")

    def exchange(self, name: str, value: Any) -> list:
        """As `gather`, but of a thread: `name` is used once in a run, and the order of calls does not matter."""
        self._store.key_value_set(f"{_KEY}/exchange/{name}/{self._index}", json.dumps(value))
        return [self._get(f"exchange/{name}/{index}") for index in range(self.processes.count)]

    def bye(self, status: int, reason: str = "", *, agreed: bool) -> None:
        """Announce the end of this process; process 0 also waits until the others have announced their ends.

        Args:
          status: exit status.
          reason: one line.
          agreed: whether the others end by themselves; if not, they are ended with this status and reason.
        """
        self._ending = True
        if self._store is None:  # the closed connections announce the end
            return
        end = (f"next/{self._index}", self._checks) if agreed else ("news/alarm", [status, f"{self._name(self._index)} ended: {reason}", _GRACE])
        thread = threading.Thread(target=self._set, args=end, daemon=True)
        thread.start()
        thread.join(_WRITE_SECONDS)  # process 0 may hang
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"bye")
        if self._index == 0 and agreed:
            with self._changed:
                self._changed.wait_for(lambda: self._connections.keys() <= self._said_bye | self._gone, _AGREED_SECONDS)
        self._over = True
        self._follower.join(_WRITE_SECONDS)  # JAX aborts a process that uses the store once its service is being shut down

    def wait_for_others(self) -> None:
        """In process 0, wait until the others have ended: it hosts JAX's service, and the end of the service aborts them."""
        if self._index == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._connections.keys() <= self._gone, _AGREED_SECONDS if self.agreed else _OTHERS_SECONDS)

    def wait_for_alarm(self, seconds: float) -> None:
        """Wait at most `seconds` for an alarm, such as the death of another process; a thread then ends this process."""
        with self._changed:
            if self._changed.wait_for(lambda: self._alarmed, seconds):
                self._changed.wait_for(lambda: False, _GRACE + _OTHERS_SECONDS)

    def _name(self, index: int) -> str:
        return f"process {index} ({self.hosts[index]})"

    # Thread 1: connections and time limits

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            last = time.monotonic()
            while True:
                for key, _ in selector.select(self._turn):
                    data = b""
                    with contextlib.suppress(OSError):
                        data = key.fileobj.recv(64)
                    if data:
                        self._said_bye.add(key.data)
                    else:  # the process, or its host, has ended
                        selector.unregister(key.fileobj)
                        self._lose(key.data, "died")
                now = time.monotonic()
                if now - last > self._hang_limit / 2:  # this process was suspended and could not read heartbeats
                    self._beats = {index: (beat, now) for index, (beat, _) in self._beats.items()}
                last = now
                for index, (_, changed) in list(self._beats.items()):
                    if now - changed > self._hang_limit:
                        self._lose(index, f"has been silent for {self._hang_limit:g} s")
                if self._index == 0 and not self._over:
                    self._check_progress(now)
                with self._changed:
                    self._changed.notify_all()

    def _lose(self, index: int, what: str) -> None:
        if index not in self._gone | {self._index}:
            self._gone.add(index)
            if not (self._over or index in self._said_bye):
                self._alarm(f"{self._name(index)} {what}")

    def _alarm(self, problem: str, stalled: bool = False) -> None:
        """In process 0, which watches all others, end all processes; in others, which watch only process 0, end this process."""
        alarm = [1, f"{problem}; this process ends. The same command resumes from the last checkpoint.", 0.0, stalled]
        if self._index == 0 and self._store:
            self._set("news/alarm", alarm)
        else:
            self._end(*alarm)

    def _check_progress(self, now: float) -> None:
        """End all processes if none has passed a check within the limit; name those with the fewest checks."""
        limit, done, option = self._limit
        checks = {index: beat[1] for index, (beat, _) in list(self._beats.items()) if index not in self._gone | self._said_bye}
        if sum(checks.values()) != self._moved[0]:
            self._moved = (sum(checks.values()), now)
        elif (any(checks.values()) or option != "--stall_limit") and now - self._moved[1] > limit:
            behind = [self._name(index) for index in checks if checks[index] == min(checks.values())]
            who = f"{listed(behind)} {'is' if len(behind) == 1 else 'are'} behind the others" if len(behind) < len(checks) else "all are at the same step"
            problem = f"no process {done} for {limit:g} s ({option}); {who}"
            if option == "--stall_limit" and not self._asked:  # if they wait for data, they can stop together and save
                self._asked, self._moved = True, (self._moved[0], now - limit + min(limit, _ANSWER_SECONDS))
                self.request_stop(problem, 1, stalled=True)
            else:
                self._moved = (self._moved[0], math.inf)
                self._alarm(problem, stalled=True)

    # Thread 2: key–value store

    def _follow(self) -> None:
        while not (self._alarmed or self._over):
            time.sleep(self._turn)
            with contextlib.suppress(RuntimeError):  # process 0 has died; the other thread detects it
                self._store.key_value_set(f"{_KEY}/beat/{self._index}", json.dumps([time.monotonic(), self._checks]), allow_overwrite=True)
                self._handle_news(self._entries("news"))
                beats = self._entries("beat") if self._index == 0 else {"0": json.loads(self._store.key_value_try_get(f"{_KEY}/beat/0"))}
                for index, (beat, _) in self._beats.items():
                    if beats.get(str(index), beat) != beat:
                        self._beats[index] = (beats[str(index)], time.monotonic())

    def _handle_news(self, news: Mapping[str, Any]) -> None:
        if "alarm" in news:
            self._end(*news["alarm"])
            return
        if self._wish and "wish" not in news:
            self._set("news/wish", [*self._wish, self._index])
        if "wish" in news and not self._frozen:
            with self._changed:
                self._frozen = True
            self._set(f"next/{self._index}", self._checks)
            if news["wish"][2]:
                self._report()
        if "wish" in news and "stop" not in news and self._index == 0:
            checks = self._entries("next").values()
            if len(checks) == self.processes.count:
                self._set("news/stop", [max(checks), *news["wish"]])
        if "stop" in news and self._stop is None:
            with self._changed:
                self._stop = news["stop"]
                self._changed.notify_all()
            self.on_stop()

    def _entries(self, folder: str) -> dict[str, Any]:
        return {key.rpartition("/")[2]: json.loads(text) for key, text in self._store.key_value_dir_get(f"{_KEY}/{folder}/")}

    def _get(self, key: str) -> Any:
        """Wait until a key has a value, and return it."""
        while True:
            try:
                return json.loads(self._store.blocking_key_value_get(f"{_KEY}/{key}", 1000))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(1)  # process 0 has died, and a thread will end this process

    def _set(self, key: str, value: Any) -> None:
        """Set a key unless it already has a value."""
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set(f"{_KEY}/{key}", json.dumps(value))

    # Ending this process

    def _end(self, status: int, reason: str, grace: float = 0.0, stalled: bool = False) -> None:
        """End this process from a thread, unless it ends by itself within `grace` seconds; if `stalled`, say where it is first."""
        with self._changed:
            again, self._alarmed = self._alarmed, True
            self._changed.notify_all()
            if again or self._changed.wait_for(lambda: self._ending, grace):
                return
        if stalled:
            self._report()
        self._leave(status, reason)

    def _report(self) -> None:
        """Say where this process is, once."""
        if not self._reported:
            self._reported = True
            if waits := self.report():
                say(f"{self._name(self._index)}: {waits}")

    def _leave_process(self, status: int, reason: str) -> None:
        say(reason)
        for child in multiprocessing.active_children():
            child.kill()  # a signal that it could handle does not reach a process that is stopped
        self.wait_for_others()
        os._exit(status)


def say(line: str) -> None:
    """Print a line on standard error from any thread, without Python's stream locks."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"jaxmodels: {line}\n".encode(errors="replace"))
