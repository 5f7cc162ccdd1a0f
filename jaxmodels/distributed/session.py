"""Start, synchronisation and end of the processes of a run; with a single process every function is a no-op."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from jaxmodels.distributed.member import Member, say
from jaxmodels.distributed.processes import Processes
from jaxmodels.distributed.rendezvous import is_loopback, meet
from jaxmodels.errors import Interrupted, OneFailed, RunError

START_LIMIT, HANG_LIMIT, STALL_LIMIT = 300.0, 30.0, 1800.0
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
    """Wait for the other processes of a run and initialise JAX's distributed system, but no backend.

    Afterwards, a thread ends this process if another one dies, hangs or fails.

    Args:
      processes: the processes, as returned by `processes.find`.
      config: flat mapping; must be equal in all processes.
      error: why this process cannot start; it is sent to the others and raised.
      start_limit: seconds within which all processes must connect.
      hang_limit: seconds without a heartbeat after which a process counts as hung.
      stall_limit: seconds without a step of any process, after the first step, after which the run ends.

    Raises:
      RunError: process 0 cannot be reached, processes are missing, or one has failed.
      ConfigError: processes have different packages or configs.
    """
    global _member
    import jax
    from orbax.checkpoint import utils

    import jaxmodels

    versions = {"jaxmodels": jaxmodels.__version__} | {name: metadata.version(name) for name in _PACKAGES}
    hello = {
        "host": host(),
        "pid": os.getpid(),
        "versions": versions,
        "config": json.loads(json.dumps(dict(config), default=repr)),
        "error": error and str(error),
        "status": error and error.exit_status,
    }
    try:
        connections, hosts = meet(processes, hello, start_limit)
    except RunError as refusal:
        raise error or refusal from None
    _member = Member(processes, connections, hosts, hang_limit=hang_limit, stall_limit=stall_limit)
    _keep_output_clean()
    _bypass_proxies(processes.host)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # on CPUs, simulated devices included
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would conflict with `training.signals`
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=processes.local_device,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(start_limit)),
            heartbeat_timeout_seconds=int(2 * hang_limit + 60),  # longer than the limit of `Member`, which prints a clearer message
            shutdown_timeout_seconds=60,
            coordinator_bind_address=processes.coordinator if is_loopback(processes.host) else None,
        )
    except RuntimeError as problem:
        raise RunError(f"JAX's processes did not connect to {processes.coordinator}: {str(problem).splitlines()[0]}.") from problem
    # `jax.distributed` has no public access to its client; Orbax has.
    _member.start(utils.multihost.get_jax_distributed_client())


def _keep_output_clean() -> None:
    """Redirect output of C++ libraries, such as Gloo's, to standard error: a program may parse standard output."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        options = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "buffering": 1}
        stdout = os.fdopen(os.dup(1), "w", **options)
        os.dup2(2, 1)
        sys.stdout = stdout


def _bypass_proxies(host: str) -> None:
    """Make gRPC connect to the coordinator without an HTTP proxy."""
    if any(name in os.environ for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        others = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = ",".join(filter(None, (others, host)))


def current() -> Member | None:
    """Return this process's membership; None for a single process."""
    return _member


def is_first() -> bool:
    """Return whether this process is the first (or only) one, which writes the run's files and prints."""
    return _member is None or _member.processes.index == 0


def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def gather(name: str, value: Any = None) -> list:
    """Return the values of all processes, in order, when all have called this.

    Args:
      name: name of this point of the program, the same in all processes.
      value: a JSON value.
    """
    if _member is not None:
        return _member.gather(name, value)
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized() and jax.process_count() > 1:
        raise RunError("JAX is initialised for several processes already: call jaxmodels.distributed.session.join, not jax.distributed.initialize.")
    return [value]


def exchange(name: str, value: Any) -> list:
    """Return the values of all processes in order. For threads beside the main one: calls need no common order, and `name` must be new."""
    return [value] if _member is None else _member.exchange(name, value)


def barrier(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    gather(name)


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
    """Run the block in the first process, then in the others, so that they see the files that it wrote."""
    later = _member is not None and _member.processes.index > 0
    if later:
        barrier(name)
    yield
    if not later:
        barrier(name)


def finish() -> None:
    """End the run successfully in all processes; wait for the others."""
    if _member is not None:
        barrier("end")
        _member.bye(0, agreed=True)


def leave(error: BaseException) -> None:
    """End this process because of an error and send the reason to the others; return if there are no others.

    An error of JAX may be caused by the death of another process; that reason is then printed instead.
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
    _member.bye(status, reason, agreed=isinstance(error, (Interrupted, OneFailed)) and _member.agreed)
    for child in multiprocessing.active_children():
        child.kill()  # a signal that it could handle does not reach a process that is stopped
    _member.wait_for_others()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # a normal exit would wait for a compilation in a thread, and JAX's for all processes
