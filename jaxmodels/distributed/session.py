"""This process as one of those of a run, from its start to its end. For one process alone, everything here does nothing.

JAX is imported only where it is started.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from jaxmodels.distributed.member import Member, meet, say
from jaxmodels.distributed.processes import Processes
from jaxmodels.distributed.rendezvous import is_loopback
from jaxmodels.errors import Interrupted, RunError

START_LIMIT = 300.0
HANG_LIMIT = 30.0
STALL_LIMIT = 1800.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_BLAME_SECONDS = 5.0

_member: Member | None = None


def join(
    processes: Processes,
    config: Mapping[str, Any],
    *,
    error: RunError | None = None,
    start_limit: float = START_LIMIT,
    hang_limit: float = HANG_LIMIT,
    stall_limit: float = STALL_LIMIT,
) -> None:
    """Meets the other processes of a run and starts JAX among them; before JAX has started any device.

    From here on this process leaves when another one dies, is silent, or fails.

    Args:
      processes: all of them, as `processes.find` gives.
      config: flat, and what else must be the same in all of them.
      error: this process cannot start: the others are told, and it is raised.
      start_limit: seconds in which all must come.
      hang_limit: seconds of silence after which a process is given up.
      stall_limit: seconds without a step of any process, after the first one, after which all are.

    Raises:
      ConfigError: the processes do not agree.
      RunError: the coordinator cannot be reached, or not all came.
    """
    global _member
    try:
        member = meet(processes, config, _versions(), error=error, start_limit=start_limit, hang_limit=hang_limit, stall_limit=stall_limit)
    except RunError as refusal:
        raise error or refusal from None
    _member = member
    _keep_output_clean()
    import jax

    # Where the processes simulate devices, or have only CPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; `training.signals` does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    _leave_proxies_alone(processes.host)
    options = {"coordinator_bind_address": processes.jax_coordinator} if is_loopback(processes.host) else {}
    try:
        jax.distributed.initialize(
            processes.jax_coordinator,
            processes.count,
            processes.index,
            local_device_ids=processes.local_device,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(start_limit)),
            # Only if the hub's own notice fails: its line is the clearer one.
            heartbeat_timeout_seconds=int(2 * hang_limit + 60),
            shutdown_timeout_seconds=60,
            **options,
        )
    except RuntimeError as problem:
        raise RunError(
            f"JAX's processes did not meet at {processes.jax_coordinator}: {str(problem).splitlines()[0]}. "
            f"Is port {processes.port + 1} of that host free, and do firewalls let it through?"
        ) from problem


def _versions() -> dict[str, str]:
    import jaxmodels

    return {"jaxmodels": jaxmodels.__version__} | {name: metadata.version(name) for name in _PACKAGES}


def _keep_output_clean() -> None:
    """What compiled libraries print (Gloo, whom it is connected to) goes to standard error: standard output may be read by a program."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        options = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "buffering": 1}
        ours = os.fdopen(os.dup(1), "w", **options)
        os.dup2(2, 1)
        sys.stdout = ours


def _leave_proxies_alone(host: str) -> None:
    """gRPC would ask an HTTP proxy for the way to the coordinator."""
    if any(name in os.environ for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        others = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = ",".join(filter(None, (others, host)))


def current() -> Member | None:
    """This process's membership; None for one process alone."""
    return _member


def is_first() -> bool:
    """Whether this is the process that writes a run's files and prints: the first, or the only one."""
    return _member is None or _member.processes.index == 0


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def gather(name: str, value: Any = None) -> list:
    """The values of all processes, in their order; all wait here for each other.

    Args:
      name: of the place in the program, the same in all processes.
      value: anything that JSON can hold.
    """
    if _member is not None:
        return _member.gather(name, value)
    if "jax" in sys.modules and _processes_of_jax() > 1:
        raise RunError(
            "JAX runs in several processes that jaxmodels did not start: call jaxmodels.distributed.session.join in place of jax.distributed.initialize."
        )
    return [value]


def _processes_of_jax() -> int:
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def barrier(name: str) -> None:
    """All processes wait here for each other."""
    gather(name)


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
    """What is done inside, the first process does before all others: what it leaves on disk, they find."""
    later = _member is not None and _member.processes.index > 0
    if later:
        barrier(name)
    yield
    if not later:
        barrier(name)


def finish() -> None:
    """The run is over, for all processes alike; waits for the others."""
    if _member is not None:
        barrier("end")
        _member.bye(0, agreed=True)


def leave(error: BaseException) -> None:
    """Ends this process for an error, and tells the others why; returns if there are no others.

    An error that is not ours may be that another process died: then that is what is said.
    """
    if _member is None:
        return
    status = getattr(error, "exit_status", 130 if isinstance(error, KeyboardInterrupt) else 1)
    reason = (str(error).splitlines() or [""])[0]
    if not isinstance(error, RunError):
        _member.wait_for_alarm(_BLAME_SECONDS)
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {reason}"
        say(reason)
    _member.bye(status, reason, agreed=isinstance(error, Interrupted) and _member.agreed)
    for child in multiprocessing.active_children():
        child.terminate()
    _member.wait_for_others()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # a compilation may still run in a thread; and JAX would wait for all processes
