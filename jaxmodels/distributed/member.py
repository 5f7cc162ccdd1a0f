"""The side of every process in the rendezvous: its connection to the hub of process 0, and what the main thread asks of it.

A thread answers for the process, so that nobody waits for a main thread that may be held in compiled code. How all stop at the same
step: every process counts its checks, one for each step and batch, the same in all of them. Once one is signalled, the thread of
each holds back its main thread's next check and tells the hub the number of it; the largest of these is where all stop, and main
threads that are not so far yet run on to it. None waits for another in a collective meanwhile.
"""

import hashlib
import json
import multiprocessing
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.distributed.processes import Processes
from jaxmodels.distributed.rendezvous import AGAIN, Hub, Line, listen, ping_seconds
from jaxmodels.errors import ConfigError, Interrupted, RunError

_HEARD_SECONDS = 5.0
_OTHERS_SECONDS = 10.0
_AGREED_SECONDS = 60.0  # where all end well, one may be slower than another


class Member:
    """This process among the others."""

    def __init__(self, line: Line, processes: Processes, hang_limit: float, hub: Hub | None, leave: Callable[[int, str], None] | None = None):
        """
        Args:
          line: to the hub.
          processes: all of them.
          hang_limit: seconds of the hub's silence after which this process leaves.
          hub: in process 0.
          leave: ends the process with a status and a line, from the thread; for tests.
        """
        self.processes, self.hub, self.hosts = processes, hub, []
        self.agreed = False  # this process stopped where all did
        self._line, self._hang_limit = line, hang_limit
        self._leave = leave or self._leave_process
        self._changed = threading.Condition()
        self._checks, self._frozen, self._stop = 0, False, None
        self._gathers, self._gathered = 0, {}
        self._verdict: Mapping | None = None
        self._heard = self._saying_bye = self._lost = False
        self._signal: str | None = None
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True, name="member")

    # The main thread

    def start(self, hello: Mapping) -> None:
        """Says who this is, and waits until all are there and agree.

        Raises:
          ConfigError: they do not agree.
          RunError: not all came, or one left.
        """
        self._line.send(kind="hello", **hello)
        self._thread.start()
        with self._changed:
            while self._verdict is None:
                self._changed.wait()
        if self._verdict["kind"] == "welcome":
            self.hosts = self._verdict["hosts"]
            return
        self._lost = True
        self._nudge()
        self._thread.join()
        self._line.close()
        self.wait_for_others()  # else the reason might not reach them
        raise (ConfigError if self._verdict["status"] == 2 else _with_status(self._verdict["status"]))(self._verdict["reason"])

    def check(self) -> None:
        """A place where all may stop; the same sequence of calls in every process.

        Raises:
          Interrupted: all stop at this check, and none has passed it.
        """
        with self._changed:
            while self._frozen and self._stop is None:
                self._changed.wait()
            if self._stop is not None and self._checks >= self._stop[0]:
                self.agreed = True
                raise Interrupted(self._stop[1])
            self._checks += 1

    def request_stop(self, name: str) -> None:
        """Asks that all stop, by the name of a signal; takes no lock, as it is called in signal handlers."""
        self._signal = name
        self._nudge()

    def gather(self, name: str, value: Any = None) -> list:
        """The values of all processes, in order, once all have called this with the same name: also a barrier.

        Args:
          name: of the place in the program.
          value: anything that JSON can hold.
        """
        with self._changed:
            key = f"{self._gathers}:{name}"
            self._gathers += 1
        self._line.send(kind="gather", key=key, value=value)
        with self._changed:
            while key not in self._gathered:
                self._changed.wait()
            return self._gathered.pop(key)

    def bye(self, status: int, reason: str = "", *, agreed: bool) -> None:
        """Tells the others that this process ends; waits until that is heard.

        Args:
          status: its exit status.
          reason: a line.
          agreed: they end too, by themselves; otherwise they are made to.
        """
        self._saying_bye = True
        self._line.send(kind="bye", status=status, reason=reason, agreed=agreed, check=self._checks)
        end = time.monotonic() + _HEARD_SECONDS
        with self._changed:
            while not (self._heard or self._lost) and time.monotonic() < end:
                self._changed.wait(0.1)
        if self.hub is not None and agreed:
            self.hub.wait_for_byes(_AGREED_SECONDS)

    def wait_for_others(self) -> None:
        """In process 0, which everyone listens to, waits until the others have ended."""
        if self.hub is not None:
            self.hub.wait_for_others(_AGREED_SECONDS if self.agreed else _OTHERS_SECONDS)

    def wait_for_alarm(self, seconds: float) -> None:
        """Waits so long for the news that another process has died, which then ends this one."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost, seconds)
        if self._lost:
            self._thread.join()

    # The thread

    def _nudge(self) -> None:
        try:
            self._waker.send(b"x")
        except OSError:  # it is full of nudges, or closed
            pass

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            every, pinged = ping_seconds(self._hang_limit), 0.0
            while not self._lost:
                now = time.monotonic()
                if now - pinged >= every:
                    pinged = now
                    self._line.send(kind="ping", check=self._checks)
                for key, _ in selector.select(every / 2):
                    if key.fileobj is self._wake:
                        self._wake.recv(4096)
                        if self._signal is not None:
                            self._line.send(kind="signal", name=self._signal)
                    else:
                        self._read()
                if not (self._lost or self._saying_bye) and now - self._line.last_heard > self._hang_limit:
                    self._lose(1, f"{self._first} has been silent for {self._hang_limit:g} s; leaving. {AGAIN}", tell=True)

    @property
    def _first(self) -> str:
        return f"process 0 ({self.hosts[0] if self.hosts else self.processes.host})"

    def _read(self) -> None:
        messages = self._line.receive()
        if messages is None:
            if self._saying_bye:
                self._lost = True
            else:
                self._lose(1, f"{self._first} died; leaving. {AGAIN}")
            return
        for message in messages:
            self._take(message)

    def _take(self, message: Mapping) -> None:
        kind = message["kind"]
        if kind == "alarm":
            self._lose(message["status"], message["reason"], grace=message["grace"])
            return
        with self._changed:
            if kind in ("welcome", "refused"):
                self._verdict = message
            elif kind == "freeze":
                self._frozen = True
                self._line.send(kind="next", check=self._checks)
            elif kind == "stop":
                where = "" if message["index"] == self.processes.index else f" (at process {message['index']})"
                self._stop = (message["check"], message["name"] + where)
            elif kind == "gathered":
                self._gathered[message["key"]] = message["values"]
            elif kind == "heard":
                self._heard = True
            self._changed.notify_all()

    def _lose(self, status: int, reason: str, *, grace: float = 0.0, tell: bool = False) -> None:
        """The run is over for this process."""
        with self._changed:
            starting = self._verdict is None
            if starting:
                self._verdict = {"kind": "refused", "status": status, "reason": reason}
            self._lost = True
            self._changed.notify_all()
        if starting:
            return
        if tell:  # the hub, should it wake up again
            self._line.send(kind="bye", status=status, reason=reason, agreed=False, check=self._checks)
        end = time.monotonic() + grace
        while time.monotonic() < end and not self._saying_bye:
            time.sleep(0.02)
        if not self._saying_bye:
            self._leave(status, reason)

    def _leave_process(self, status: int, reason: str) -> None:
        say(reason)
        for child in multiprocessing.active_children():
            child.terminate()
        self.wait_for_others()
        os._exit(status)


def say(line: str) -> None:
    """A line on standard error, whatever the main thread is doing."""
    try:
        os.write(2, f"jaxmodels: {line}\n".encode(errors="replace"))
    except (OSError, ValueError):
        pass


def _with_status(status: int) -> Callable[[str], RunError]:
    def make(reason: str) -> RunError:
        error = RunError(reason)
        error.exit_status = status
        return error

    return make


def meet(
    processes: Processes,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    *,
    error: RunError | None = None,
    start_limit: float,
    hang_limit: float,
    stall_limit: float = 1800.0,
    leave: Callable[[int, str], None] | None = None,
) -> Member:
    """Meets the other processes of a run, and stays in touch with them.

    Args:
      processes: all of them.
      config: flat: what must be the same in all of them.
      versions: of packages, which must too.
      error: this process fails: the others are told.
      start_limit: seconds in which all must come.
      hang_limit: seconds of silence after which a process is given up.
      stall_limit: seconds without a step of any process after which all are.
      leave: see Member.

    Raises:
      ConfigError: the processes do not agree.
      RunError: the coordinator cannot be reached, or not all came.
    """
    hub = None
    if processes.index == 0:
        server = listen(processes.host, processes.port)
        hub = Hub(server, processes.count, start_limit=start_limit, hang_limit=hang_limit, stall_limit=stall_limit, hosts=processes.hosts)
        hub.start()
        place = server.getsockname()[:2]
        place = ({"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(place[0], place[0]), place[1])
    else:
        place = (processes.host, processes.port)
    member = Member(Line(_connect(place, processes, start_limit)), processes, hang_limit, hub, leave)
    parts = {"versions": dict(versions), "config": json.loads(json.dumps(dict(config), default=repr))}
    member.start(
        {
            "index": processes.index,
            "count": processes.count,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "digests": {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in parts.items()},
            **parts,
            "error": None if error is None else str(error),
            "status": None if error is None else error.exit_status,
        }
    )
    return member


def _connect(place: tuple[str, int], processes: Processes, limit: float) -> socket.socket:
    """A connection to the hub, which may not be there yet."""
    end, problem = time.monotonic() + limit, None
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection(place, timeout=max(0.1, min(10.0, left)))
        except OSError as error:
            problem = error
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
    raise RunError(
        f"process {processes.index} cannot reach the coordinator {processes.coordinator} (given by {processes.source}) in {limit:g} s: "
        f"{problem.strerror or problem}. Is process 0 running on that host, and do firewalls let ports {processes.port} "
        f"and {processes.port + 1} through?"
    )
