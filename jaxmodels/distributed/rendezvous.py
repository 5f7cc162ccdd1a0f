"""Rendezvous of the processes of a run on the coordinator's port, before JAX's coordination service uses that port.

JAX's service cannot do this part. Its client connects only when all processes are present, and no key can be written before. It could not
name missing processes or differing configs, and its time limit aborts a process with a C++ stack trace. Therefore each process first
sends one JSON line to process 0, which compares all lines and answers. The connections then stay open and carry only a final `bye`:
the operating system closes them when a process dies. JAX's service would detect that only by missing heartbeats.
"""

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from jaxmodels.distributed.processes import Processes
from jaxmodels.errors import ConfigError, RunError

# After a problem, wait this many seconds for other processes that are connecting, so that the message includes them.
_LAST_CALL = 3.0
_HELLO_SECONDS, _HELLO_BYTES = 10.0, 64 << 20


def meet(processes: Processes, hello: Mapping, limit: float) -> tuple[dict[int, socket.socket], list[str]]:
    """Wait until all processes are connected, and check that they were started with the same versions and config.

    Args:
      processes: the processes of the run.
      hello: this process's host, pid, versions and config (flat, of JSON values, equal in all processes), error and status (or None).
      limit: seconds within which all must connect.

    Returns:
      An open connection to each other process (in process 0) or to process 0 (in the others), and the host names of all.

    Raises:
      RunError: process 0 cannot listen or cannot be reached; processes are missing or have failed.
      ConfigError: processes have different packages or configs.
    """
    hello = {"index": processes.index, "count": processes.count, **hello}
    if processes.index == 0:
        return _call(processes, hello, limit)
    connection, answer = _connect(processes, limit), None
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(hello).encode() + b"\n")
        connection.settimeout(limit + 10 * _LAST_CALL)
        answer = json.loads(connection.makefile("rb").readline() or "null")
    if answer is None:
        raise RunError(f"process 0 ({processes.host}) died before all processes were connected. See its output.")
    if "reason" in answer:
        raise _refusal(**answer)
    return {0: connection}, answer["hosts"]


def _refusal(status: int, reason: str) -> RunError:
    error = ConfigError(reason) if status == ConfigError.exit_status else RunError(reason)
    error.exit_status = status
    return error


def _connect(processes: Processes, limit: float) -> socket.socket:
    """Connect to process 0, which may not listen yet."""
    end, problem = time.monotonic() + limit, None
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((processes.host, processes.port), timeout=max(0.1, min(10.0, left)))
        except OSError as error:
            problem = error
            time.sleep(0.2)
    raise RunError(
        f"process {processes.index} could not connect to the coordinator {processes.coordinator} (given by {processes.source}) within {limit:g} s: "
        f"{problem.strerror or problem}. Check that process 0 runs on that host and that firewalls allow port {processes.port}."
    )


def _call(processes: Processes, hello: Mapping, limit: float) -> tuple[dict[int, socket.socket], list[str]]:
    """Run the rendezvous in process 0."""
    there: list[tuple[Mapping, socket.socket | None]] = [(hello, None)]  # a thread for each connection appends to it
    end, known, problem = time.monotonic() + limit, 0, None
    missing = set(range(processes.count))
    with _listen(processes) as server:
        server.settimeout(0.1)
        while missing and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=_greet, args=(server.accept()[0], there), daemon=True).start()
            if len(there) > known:
                known = len(there)
                missing -= {one["index"] for one, _ in there[:known]}
                if problem := _problem([one for one, _ in there[:known]]):
                    end = min(end, time.monotonic() + _LAST_CALL)
    if missing and not problem:
        names = f"process{'' if len(missing) == 1 else 'es'} {listed(sorted(missing))} of {processes.count}"
        hosts = f" (on {', '.join(dict.fromkeys(processes.hosts[index] for index in sorted(missing)))})" if processes.hosts else ""
        advice = "See their output. If they only need more time, raise --start_limit and start again."
        problem = 1, f"{names}{hosts} did not connect within {limit:g} s. {advice}"
    hosts = [one["host"] for one, _ in sorted(there[:known], key=lambda each: each[0]["index"])]
    answer = json.dumps({"status": problem[0], "reason": problem[1]} if problem else {"hosts": hosts})
    for _, connection in there[1:]:
        with contextlib.suppress(OSError):
            connection.sendall(answer.encode() + b"\n")
    if problem:
        raise _refusal(*problem)
    return {one["index"]: connection for one, connection in there[1:known]}, hosts


def _listen(processes: Processes) -> socket.socket:
    """Return a listening socket: on the loopback interface if the coordinator's address is one, else on all interfaces."""
    place = (processes.host if is_loopback(processes.host) else "", processes.port)
    dual = not place[0] and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual or ":" in place[0] else socket.AF_INET
        return socket.create_server(place, family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise RunError(
            f"--coordinator: process 0 cannot listen on port {processes.port} of this host ({error.strerror}). Choose a free port, "
            "or end the program that uses it, for example an earlier start of this run."
        ) from error


def is_loopback(host: str) -> bool:
    """Return whether only processes of the same machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _greet(connection: socket.socket, there: list) -> None:
    """Read the first line of a process; close the connection if it is something else, such as a port scanner."""
    with contextlib.suppress(OSError, ValueError):
        connection.settimeout(_HELLO_SECONDS)
        hello = json.loads(connection.makefile("rb").readline(_HELLO_BYTES))
        if isinstance(hello, dict) and isinstance(hello.get("index"), int) and {"count", "host", "pid", "versions", "config", "error"} <= hello.keys():
            there.append((hello, connection))
            return
    connection.close()


def _problem(hellos: Sequence[Mapping]) -> tuple[int, str] | None:
    """Return exit status and reason if a process has failed or the processes were started differently, else None."""
    by_index: dict[int, Mapping] = {}
    for hello in hellos:
        index, other = hello["index"], by_index.setdefault(hello["index"], hello)
        if hello["error"]:
            return hello["status"], f"process {index} ({hello['host']}) failed: {hello['error']}"
        if other is not hello:
            one, two = (f"{each['host']} (pid {each['pid']})" for each in (other, hello))
            return 2, f"two processes were started as process {index}: {one} and {two}. Give each its own --process."
        if hello["count"] != hellos[0]["count"]:
            counts = f"as one of {hello['count']} processes, process 0 as one of {hellos[0]['count']}"
            return 2, f"process {index} ({hello['host']}) was started {counts}."
    for part, what, advice in (
        ("versions", "packages", "Install the same versions on all hosts."),
        ("config", "configs", "Start all processes of a run with the same command."),
    ):
        values = {index: by_index[index][part] for index in sorted(by_index)}
        if any(value != values[0] for value in values.values()):
            return 2, f"the processes were started with different {what}: {_differences(values)}. {advice}"
    return None


def _differences(values: Mapping[int, Mapping]) -> str:
    """Format every key whose values differ, with the processes that have each value."""
    parts = []
    for key in sorted({key for one in values.values() for key in one}):
        by_value: dict[str, list[int]] = {}
        for index, one in values.items():
            by_value.setdefault(repr(one[key]) if key in one else "(absent)", []).append(index)
        if len(by_value) > 1:
            shown = ", ".join(f"{value} in process{'es' if len(who) > 1 else ''} {listed(who)}" for value, who in by_value.items())
            parts.append(f"{key} is {shown}")
    return "; ".join(parts)


def listed(names: Sequence) -> str:
    """Format names as `1`, `1 and 2`, `1, 2 and 3`."""
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last
