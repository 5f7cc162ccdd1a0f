"""Which processes a run has, and which of them this is: from arguments, or from what started them.

Looked for in this order, and the first that is there counts:

    arguments   --coordinator=HOST:PORT --processes=N --process=I, or JAXMODELS_COORDINATOR, JAXMODELS_PROCESSES, JAXMODELS_PROCESS
    SLURM       the tasks of the step that srun started
    Open MPI    the ranks that mpirun started
    GKE         a JobSet, on TPUs or with JAXMODELS_PROCESSES
    Cloud TPU   the workers of a TPU VM, asked for with --processes=tpu

Two ports are used on the host of process 0: the coordinator's, where the processes meet (`rendezvous`), and the next, where JAX's do.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

from jaxmodels.errors import ConfigError

TPU_PORT = 8482
GKE_PORT = 8482
# Above the ports that Linux gives to outgoing connections, and in pairs.
_PORTS, _FIRST_PORT = 2200, 61000
_NAMES = {"coordinator": "JAXMODELS_COORDINATOR", "processes": "JAXMODELS_PROCESSES", "process": "JAXMODELS_PROCESS"}


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
      host, port: where process 0 listens; it uses the next port too.
      count: how many there are.
      index: which of them this is, from 0.
      source: how that is known.
      hosts: the host of each, where that is known beforehand.
      local_device: the number of the one GPU on this host that this process takes; None for all that it sees.
    """

    host: str
    port: int
    count: int
    index: int
    source: str
    hosts: tuple[str, ...] = ()
    local_device: int | None = None

    @property
    def coordinator(self) -> str:
        return address(self.host, self.port)

    @property
    def jax_coordinator(self) -> str:
        """Where JAX's own service of process 0 listens."""
        return address(self.host, self.port + 1)


def address(host: str, port: int) -> str:
    """`HOST:PORT`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find(
    coordinator: str | None = None,
    processes: str | None = None,
    process: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    metadata: Callable[[str], str | None] | None = None,
) -> Processes | None:
    """The processes of this run; None for one alone.

    Args:
      coordinator, processes, process: the arguments, as text; None where not given.
      environment: instead of `os.environ`.
      metadata: reads an attribute of a Cloud TPU VM, instead of its metadata server.

    Raises:
      ConfigError: arguments that are given in part, contradict each other, or contradict what started the process.
    """
    environment = os.environ if environment is None else environment
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {key: value or environment.get(_NAMES[key]) or None for key, value in given.items()}
    count = _whole("processes", given["processes"], 1) if given["processes"] != "tpu" else None
    index = _whole("process", given["process"], 0)
    place = parse_address(given["coordinator"]) if given["coordinator"] else None
    if count == 1 and not index:
        return None
    if None not in (place, count, index):
        return _checked(Processes(*place, count, index, "arguments"))
    if given["processes"] == "tpu":
        found = _from_tpu(environment, metadata or _metadata)
    else:
        found = _from_launcher(environment, count)
    if found is None:
        return _none(given, environment)
    for key, here, there in (("processes", count, found.count), ("process", index, found.index)):
        if here is not None and here != there:
            raise ConfigError(f"--{key}={here} contradicts {found.source}, which says {there}. Leave it out, or give --{', --'.join(_NAMES)}.")
    if place is not None:
        found = dataclasses.replace(found, host=place[0], port=place[1])
    if found.count == 1:
        return None
    if not found.host:
        raise ConfigError(f"{found.source} started {found.count} processes but does not say where the first one is: add --coordinator=HOST:PORT.")
    return _checked(found)


def _from_launcher(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """What SLURM, Open MPI or GKE say, the first that says something."""
    for source, look in (("SLURM", _from_slurm), ("OMPI", _from_open_mpi), ("GKE", _from_gke)):
        try:
            found = look(environment, count)
        except (ValueError, IndexError) as error:
            there = ", ".join(f"{key}={environment[key]!r}" for key in sorted(environment) if key.startswith((source, "JOB_", "TPU_WORKER")))
            raise ConfigError(f"{source}'s variables make no sense ({error}): {there}. Give --coordinator, --processes and --process.") from error
        if found is not None:
            return found
    return None


def _none(given: Mapping[str, str | None], environment: Mapping[str, str]) -> None:
    """Nothing started several processes; then nothing may be said of them either."""
    if given["processes"] == "tpu":
        raise ConfigError("--processes=tpu: this machine tells nothing of a TPU's workers. Give --coordinator=HOST:PORT --processes=N --process=I.")
    there = [key for key, value in given.items() if value is not None]
    if there:
        values = {"coordinator": "HOST:PORT", "processes": "N", "process": "I"}
        missing = " and ".join(f"--{key}={values[key]}" for key in given if key not in there)
        said = " and ".join(f"--{key}={given[key]}" + ("" if not environment.get(_NAMES[key]) else f" ({_NAMES[key]})") for key in there)
        raise ConfigError(f"{said} needs {missing}: several processes are started with all three (or with --processes=tpu, or by srun or mpirun).")
    return None


def _checked(found: Processes) -> Processes:
    if not 0 <= found.index < found.count:
        raise ConfigError(f"--process={found.index}: the {found.count} processes are numbered from 0 to {found.count - 1} ({found.source}).")
    if not 0 < found.port < 65535:
        raise ConfigError(f"--coordinator={found.coordinator}: the port must lie between 1 and 65534; the next one is used too.")
    return found


def _whole(key: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(f"--{key} must be a whole number of at least {least}{' (or tpu)' if key == 'processes' else ''}, got {text!r}.")
    return int(text)


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` as (host, port).

    Raises:
      ConfigError: it is neither.
    """
    match = re.fullmatch(r"(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})", text)
    if match is None or not 0 < int(match["port"]) < 65535:
        raise ConfigError(f"--coordinator must be HOST:PORT with a port between 1 and 65534, got {text!r}.")
    return match["six"] or match["host"], int(match["port"])


# SLURM


def _from_slurm(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """The tasks of a job step. Outside of one (in a batch script, before srun) there is a single process."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if not nodes or not tasks or "SLURM_PROCID" not in environment or int(tasks) == 1:
        return None
    tasks = int(tasks)
    hosts = expand_hosts(nodes)
    per_host = _tasks_per_host(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "")
    by_task = [host for host, number in zip(hosts, per_host, strict=False) for _ in range(number)]
    blocks = environment.get("SLURM_DISTRIBUTION", "block").startswith("block") or len(hosts) == tasks
    here = environment.get("SLURMD_NODENAME")
    beside = per_host[hosts.index(here)] if here in hosts and len(per_host) == len(hosts) else -(-tasks // len(hosts))
    job = int(environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID") or 0)
    step = int(environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID") or 0)
    return Processes(
        host=hosts[0],
        port=_port(job * 7 + step),  # steps of a job may run beside each other
        count=tasks,
        index=int(environment["SLURM_PROCID"]),
        source="SLURM",
        hosts=tuple(by_task) if blocks and len(by_task) == tasks else (),
        local_device=_local_device(environment, "SLURM_LOCALID", beside),
    )


def expand_hosts(text: str) -> list[str]:
    """The hosts of a SLURM node list: `a[01-03,7],b` -> a01, a02, a03, a7, b."""
    hosts = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for piece, ranges in re.findall(r"([^\[\]]*)(?:\[([^\]]*)\])?", part):
            numbers = [number for span in ranges.split(",") for number in _span(span)] if ranges else [""]
            names = [name + piece + number for name in names for number in numbers]
        hosts += names
    return hosts


def _span(text: str) -> list[str]:
    """`08-10` -> 08, 09, 10."""
    first, dash, last = text.partition("-")
    if not dash:
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _tasks_per_host(text: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    return [int(number) for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _port(number: int) -> int:
    return _FIRST_PORT + 2 * (number % _PORTS)


def _local_device(environment: Mapping[str, str], key: str, beside: int) -> int | None:
    """The GPU of a process that shares its host with others; None where it is alone there, or sees a single one anyway."""
    if beside == 1 or key not in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or environment.get("HIP_VISIBLE_DEVICES")
    return None if visible and "," not in visible else int(environment[key])


# Open MPI


def _from_open_mpi(environment: Mapping[str, str], count: int | None) -> Processes | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    host, job = _open_mpi_launcher(environment)
    return Processes(
        host=host,
        port=_port(job),
        count=int(environment["OMPI_COMM_WORLD_SIZE"]),
        index=int(environment["OMPI_COMM_WORLD_RANK"]),
        source="Open MPI",
        local_device=_local_device(environment, "OMPI_COMM_WORLD_LOCAL_RANK", int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))),
    )


def _open_mpi_launcher(environment: Mapping[str, str]) -> tuple[str, int]:
    """The host that mpirun runs on, which is taken for that of rank 0, and a number of the job; the host is empty if nothing tells."""
    # Up to version 4: `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, the job's number a multiple of 4096.
    match = re.match(r"(\d+)\..*?tcp6?://(?:\[([^,\]]+)|([^,:;]+))", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if match:
        return match[2] or match[3], int(match[1]) // 4096
    # Since version 5: `prterun-HOST-PID@1`; the addresses beside it are those of each host's own daemon.
    uris = [value for key, value in environment.items() if key.startswith("PMIX_SERVER_URI")]
    for text in (environment.get("PMIX_NAMESPACE", ""), *uris):
        if match := re.match(r"(?:prterun|prte)-(.+)-(\d+)@", text):
            return match[1], int(match[2])
    return "", 0


# GKE


def _from_gke(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """A JobSet's pods: on TPUs GKE says who they are; elsewhere the names follow from the JobSet's."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if hosts and "TPU_WORKER_ID" in environment:
        return _from_workers([_host(part) for part in hosts.split(",")], int(environment["TPU_WORKER_ID"]), environment.get, "GKE")
    if count is None or "JOBSET_NAME" not in environment:
        return None
    name, job = environment["JOBSET_NAME"], environment.get("REPLICATED_JOB_NAME", "workers")
    # Pods of each Job are counted from 0 on; JOB_INDEX says which of the Jobs, all as large, this is.
    jobs = int(environment.get("JOBSET_JOBS", 1))
    index = int(environment.get("JOB_INDEX", 0)) * (count // jobs) + int(environment["JOB_COMPLETION_INDEX"])
    hosts = tuple(f"{name}-{job}-{i // (count // jobs)}-{i % (count // jobs)}.{name}" for i in range(count))
    return Processes(hosts[0], GKE_PORT, count, index, "GKE", hosts)


def _host(text: str) -> str:
    """Without the port that may follow."""
    return text.strip() if text.count(":") > 1 else text.strip().partition(":")[0]


def _from_workers(hosts: list[str], worker: int, value: Callable[[str], str | None], source: str) -> Processes:
    """The workers of a TPU, or of several slices, as `MEGASCALE_*` tell."""
    slices, number = int(value("MEGASCALE_NUM_SLICES") or 1), int(value("MEGASCALE_SLICE_ID") or 0)
    first = hosts[0] if slices == 1 else _host(value("MEGASCALE_COORDINATOR_ADDRESS") or "")
    return Processes(
        host=first,
        port=TPU_PORT,
        count=slices * len(hosts),
        index=number * len(hosts) + worker,
        source=source,
        hosts=tuple(hosts) if slices == 1 else (),
    )


# Cloud TPU


def _from_tpu(environment: Mapping[str, str], metadata: Callable[[str], str | None]) -> Processes | None:
    """The workers of a Cloud TPU VM, from the environment or its metadata server."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or metadata("worker-network-endpoints")
    worker = environment.get("TPU_WORKER_ID") or metadata("agent-worker-number")
    if not names or worker is None:
        return None
    # Each is a host, or in an older form a name, a number and an address.
    hosts = [part.split(":")[2] if part.count(":") == 2 else _host(part) for part in names.strip().split(",")]
    table = None

    def value(key: str) -> str | None:
        nonlocal table
        if environment.get(key):
            return environment[key]
        if table is None:
            lines = re.findall(r"(?m)^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", metadata("tpu-env") or "")
            table = dict(lines)
        return table.get(key) or None

    return _from_workers(hosts, int(worker), value, "the TPU's metadata")


def _metadata(key: str) -> str | None:
    """An attribute of this Cloud VM; None where there is no such thing."""
    import urllib.error
    import urllib.request

    server = os.environ.get("GCE_METADATA_IP") or os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine's own: no proxy knows it
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise ConfigError(f"--processes=tpu: the metadata server {server} says {error.code} to {key}.") from error
    except OSError as error:
        raise ConfigError(f"--processes=tpu: there is no metadata server at {server} ({error}): not a Cloud TPU VM? Give --{', --'.join(_NAMES)}.") from error
