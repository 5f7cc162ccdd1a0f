"""Where the processes of a run meet before any device starts, and stay in touch: the side of process 0.

JSON lines over TCP. Every process, the first included, is a member (`member`) with one connection to the hub, a thread of process 0.

    member -> hub    hello {index, count, host, pid, versions, config, error}, ping {check}, signal {name}, next {check},
                     gather {key, value}, bye {status, reason, agreed}
    hub -> member    welcome {hosts}, refused {status, reason}, ping, freeze, stop {check, name, index},
                     gathered {key, values}, heard, alarm {status, reason, grace}

Nothing here imports JAX.
"""

import contextlib
import dataclasses
import ipaddress
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from jaxmodels.errors import RunError

# Once something is wrong at the start, others that are just coming are waited for so long, to be named too.
_LAST_CALL = 3.0
# After an error of one process, the others have so long to end by themselves, with the same error perhaps.
_GRACE = 5.0
_STRANGER_SECONDS = 10.0
_LONGEST = 64 << 20  # bytes of a line


class Line:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(20)  # of a send: a peer that takes nothing for so long has stopped
        self.socket = connection
        self.last_heard = time.monotonic()
        self._parts = []
        self._size = 0
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message) -> bool:
        """Sends an object; False if the other side is gone, which `receive` will tell too."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict] | None:
        """What has come since, called when there is something; None at the end of the connection, or if it makes no sense."""
        try:
            data = self.socket.recv(1 << 20)
        except OSError:
            return None
        self.last_heard = time.monotonic()
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join(self._parts) + lines[0]
            self._parts, self._size = [], 0
        self._parts.append(rest)
        self._size += len(rest)
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        sound = data and self._size <= _LONGEST and all(isinstance(message, dict) for message in messages)
        return messages if sound else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


@dataclasses.dataclass
class _Peer:
    """A member as the hub sees it.

    Attributes:
      bye: whether it has said that it leaves, and that all know why.
      gone: whether its connection has ended.
      check: checks that its main thread has passed.
    """

    line: Line
    hello: dict
    bye: bool = False
    gone: bool = False
    check: int = 0

    @property
    def name(self) -> str:
        return f"process {self.hello['index']} ({self.hello['host']})"


def listen(host: str, port: int) -> socket.socket:
    """A socket that the others find; on the loopback alone where `host` is that.

    Raises:
      RunError: the port, or the one after it, is taken.
    """
    loopback = is_loopback(host)
    for number in (port + 1, port):  # JAX's is tried and let go
        try:
            if loopback:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                server = socket.create_server((host, number), family=family, backlog=1024)
            elif socket.has_dualstack_ipv6():
                server = socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            else:
                server = socket.create_server(("", number), backlog=1024)
        except OSError as error:
            raise RunError(
                f"--coordinator: process 0 cannot listen on port {number} of this host ({error.strerror}). Choose two free ports in a row, "
                "or end what uses them: an earlier start of this run, perhaps."
            ) from error
        if number != port:
            server.close()
    return server


def ping_seconds(hang_limit: float) -> float:
    """How often each side says that it is there."""
    return min(2.0, hang_limit / 5)


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Hub(threading.Thread):
    """Lets the processes meet, and tells each of the others."""

    def __init__(self, server: socket.socket, count: int, *, start_limit: float, hang_limit: float, stall_limit: float, hosts: Sequence[str] = ()):
        """
        Args:
          server: as `listen` gives.
          count: of the processes.
          start_limit: seconds in which all must come.
          hang_limit: seconds of silence after which a process is given up.
          stall_limit: seconds without a check of any process, once there was one, after which all are.
          hosts: of each process, where that is known beforehand.
        """
        super().__init__(daemon=True, name="hub")
        self._server, self._count, self._hosts = server, count, hosts
        self._start_limit, self._hang_limit, self._stall_limit = start_limit, hang_limit, stall_limit
        self._moved = time.monotonic()  # when a process last passed a check
        self._peers: dict[int, _Peer] = {}
        self._strangers: dict[Line, float] = {}
        self._selector = selectors.DefaultSelector()
        self._gathers: dict[str, dict[int, object]] = {}
        self._signal: tuple[str, int] | None = None
        self._checks: dict[int, int] = {}
        self._problem: tuple[int, str] | None = None  # status and reason of a start that cannot be
        self._stopped = False  # the check at which all stop is known
        self._over = False  # an alarm was given
        self._pinged = 0.0

    def run(self) -> None:
        self._selector.register(self._server, selectors.EVENT_READ)
        try:
            self._meet()
            while not all(peer.gone for peer in self._peers.values()):
                self._turn()
        finally:
            self._server.close()

    def wait_for_others(self, seconds: float) -> None:
        """Waits until the processes other than the first have ended, at most so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.is_alive() and not all(p.gone for i, p in list(self._peers.items()) if i != 0):
            time.sleep(0.02)

    def wait_for_byes(self, seconds: float) -> None:
        """Waits until all processes have said that they end, at most so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.is_alive() and not all(p.gone or p.bye for p in list(self._peers.values())):
            time.sleep(0.02)

    # The start

    def _meet(self) -> None:
        """Until all are there and agree; else they are told why not."""
        end = time.monotonic() + self._start_limit
        while not self._all_there() and time.monotonic() < end:
            self._turn()
            if self._over:
                return
            if self._problem or _disagreement(self._peers):
                end = min(end, time.monotonic() + _LAST_CALL)
        self._selector.unregister(self._server)
        for stranger in list(self._strangers):
            self._drop(stranger)
        refusal = self._problem or _disagreement(self._peers) or self._missing()
        if refusal is None:
            self._broadcast(kind="welcome", hosts=[self._peers[index].hello["host"] for index in range(self._count)])
            return
        status, reason = refusal
        self._over = True
        self._broadcast(kind="refused", status=status, reason=reason)

    def _all_there(self) -> bool:
        return all(index in self._peers for index in range(self._count))

    def _missing(self) -> tuple[int, str] | None:
        missing = [index for index in range(self._count) if index not in self._peers]
        if not missing:
            return None
        hosts = f" (on {', '.join(dict.fromkeys(self._hosts[index] for index in missing))})" if self._hosts else ""
        names = ("process " if len(missing) == 1 else "processes ") + _listed([str(index) for index in missing])
        return 1, (
            f"{names} of {self._count}{hosts} did not come within {self._start_limit:g} s. Look at what they say; if they only need longer, "
            "raise --start_limit. The same command starts again."
        )

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line = Line(self._server.accept()[0])
            self._strangers[line] = time.monotonic()
            self._selector.register(line, selectors.EVENT_READ)

    def _admit(self, line: Line, hello: Mapping) -> None:
        """A process that says who it is."""
        index = hello.get("index")
        if hello.get("kind") != "hello" or not isinstance(index, int):
            self._drop(line)
            return
        del self._strangers[line]
        if index in self._peers:
            one, other = (f"{hello['host']} (pid {hello['pid']})" for hello in (self._peers[index].hello, hello))
            self._problem = 2, f"two processes say that they are process {index}: {one} and {other}. Give each another --process."
            index = -len(self._peers)  # beside the others, so that it is told too
        elif hello["count"] != self._count:
            said = f"as one of {hello['count']} processes, process 0 as one of {self._count}"
            self._problem = 2, f"process {index} ({hello['host']}) was started {said}."
        self._peers[index] = _Peer(line, dict(hello))

    # Every turn

    def _turn(self) -> None:
        """Reads what came, pings, and finds out who is silent."""
        now = time.monotonic()
        # Whoever is judged was asked after `now`: if this process itself was stopped meanwhile, what came has been read.
        for key, _ in self._selector.select(0.2):
            if key.fileobj is self._server:
                self._accept()
                continue
            line = key.fileobj
            messages = line.receive()
            if messages is None:
                self._ended(line)
                continue
            for message in messages:
                if line in self._strangers:
                    self._admit(line, message)
                elif (peer := self._peer(line)) is not None:
                    self._take(peer, message)
        for stranger, since in list(self._strangers.items()):
            if now - since > _STRANGER_SECONDS:
                self._drop(stranger)
        if now - self._pinged >= ping_seconds(self._hang_limit):
            self._pinged = now
            self._broadcast(kind="ping")
        for peer in self._peers.values():
            if not (peer.gone or peer.bye or self._over) and now - peer.line.last_heard > self._hang_limit:
                self._alarm(1, f"{peer.name} has been silent for {self._hang_limit:g} s; leaving. {AGAIN}", grace=0)
                peer.gone = True  # nobody waits for it
        if not self._over and now - self._moved > self._stall_limit and any(peer.check for peer in self._peers.values()):
            self._alarm(1, self._stalled(), grace=0)

    def _stalled(self) -> str:
        """Who keeps the others waiting, as far as it can be told: those that passed the fewest checks."""
        there = [peer for peer in self._peers.values() if not peer.gone]
        least = min(peer.check for peer in there)
        behind = [peer.name for peer in there if peer.check == least]
        who = f"{_listed(behind)} {'is' if len(behind) == 1 else 'are'} behind the others" if len(behind) < len(there) else "all are at the same one"
        return f"no process has passed a step for {self._stall_limit:g} s (--stall_limit); {who}; leaving. {AGAIN}"

    def _take(self, peer: _Peer, message: Mapping) -> None:
        kind, index = message.get("kind"), peer.hello["index"]
        if kind == "signal" and self._signal is None:
            self._signal = (message["name"], index)
            self._broadcast(kind="freeze")
        elif kind == "ping":
            if message["check"] > peer.check:
                peer.check, self._moved = message["check"], time.monotonic()
        elif kind == "next":
            self._checks[index] = message["check"]
        elif kind == "gather":
            number, _, name = message["key"].partition(":")
            other = next((key for key in self._gathers if key != message["key"] and key.partition(":")[0] == number), None)
            if other is not None:  # a mistake in the program, which would else wait for ever
                self._alarm(1, f"{peer.name} is at {name!r}, and others are at {other.partition(':')[2]!r}: they do not do the same.", grace=0)
            values = self._gathers.setdefault(message["key"], {})
            values[index] = message["value"]
            if len(values) == self._count:
                del self._gathers[message["key"]]
                self._broadcast(kind="gathered", key=message["key"], values=[values[i] for i in range(self._count)])
        elif kind == "bye":
            peer.bye = True
            self._checks[index] = message["check"]
            peer.line.send(kind="heard")
            if message["agreed"] is False:
                self._alarm(message["status"], f"{peer.name} left: {message['reason']}", grace=_GRACE)
        if self._signal is not None and not self._stopped and len(self._checks) == self._count:
            self._stopped = True
            name, index = self._signal
            self._broadcast(kind="stop", check=max(self._checks.values()), name=name, index=index)

    def _ended(self, line: Line) -> None:
        """A connection that broke: its process has ended, or its host."""
        peer = self._peer(line)
        self._drop(line)
        if peer is None:
            return
        peer.gone = True
        if not peer.bye and not self._over:
            self._alarm(1, f"{peer.name} died; leaving. {AGAIN}", grace=0)

    def _alarm(self, status: int, reason: str, *, grace: float) -> None:
        """Tells all to leave, the first time."""
        if not self._over:
            self._over = True
            self._broadcast(kind="alarm", status=status, reason=reason, grace=grace)

    def _peer(self, line: Line) -> _Peer | None:
        return next((peer for peer in self._peers.values() if peer.line is line), None)

    def _drop(self, line: Line) -> None:
        self._strangers.pop(line, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(line)
        line.close()

    def _broadcast(self, **message) -> None:
        for peer in list(self._peers.values()):
            if not peer.gone:
                peer.line.send(**message)


AGAIN = "The same command goes on from the last checkpoint."


def _listed(names: Sequence[str]) -> str:
    """`1`, `1 and 2`, `1, 2 and 3`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _disagreement(peers: Mapping[int, _Peer]) -> tuple[int, str] | None:
    """Status and reason, where processes failed already, or were started with different versions, arguments or configs."""
    real = {index: peers[index] for index in sorted(peers) if index >= 0}
    for peer in real.values():
        if peer.hello.get("error"):
            return peer.hello["status"], f"{peer.name} left: {peer.hello['error']}"
    for part, what, advice in (
        ("versions", "packages", "Install the same everywhere."),
        ("config", "configs", "All processes of a run are started with the same command."),
    ):
        if len({hello["digests"][part] for hello in (peer.hello for peer in real.values())}) > 1:
            return 2, f"the processes were started with different {what}: {_differences({i: p.hello[part] for i, p in real.items()})}. {advice}"
    return None


def _differences(values: Mapping[int, Mapping]) -> str:
    """Every key whose values differ, each value with the processes that have it."""
    keys = sorted({key for one in values.values() for key in one})
    parts = []
    for key in keys:
        by_value: dict[str, list[str]] = {}
        for index, one in values.items():
            by_value.setdefault(repr(one[key]) if key in one else "(absent)", []).append(str(index))
        if len(by_value) > 1:
            shown = ", ".join(f"{value} in process{'es' if len(who) > 1 else ''} {_listed(who)}" for value, who in by_value.items())
            parts.append(f"{key} is {shown}")
    return "; ".join(parts)
