"""Detection of the processes of a run and the index of this one, from arguments or the launcher. The first source with values is used:

    arguments   --coordinator=HOST:PORT --processes=N --process=I, or JAXMODELS_COORDINATOR, JAXMODELS_PROCESSES, JAXMODELS_PROCESS
    SLURM       the tasks of the step that srun started
    Open MPI    the ranks that mpirun started
    GKE         a JobSet, on TPUs or with JAXMODELS_PROCESSES
    Cloud TPU   the workers of a TPU VM, requested by --processes=tpu

JAX detects some of these inside `jax.distributed.initialize`. That is too late for `rendezvous`, and less complete: it does not support
Open MPI 5, uses the tasks of a job instead of those of the step, gives no host names, and gives a process one GPU even if it has more.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping

from jaxmodels.errors import ConfigError

TPU_PORT = GKE_PORT = 8482
# Above the default range of ports for outgoing connections in Linux.
_PORTS, _FIRST_PORT = 4400, 61000
_NAMES = {"coordinator": "JAXMODELS_COORDINATOR", "processes": "JAXMODELS_PROCESSES", "process": "JAXMODELS_PROCESS"}
_ALL = f"--{', --'.join(_NAMES)}"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
      host, port: address where process 0 listens.
      count: number of processes.
      index: index of this process, from 0.
      source: source of these values, for messages.
      hosts: host of each process; empty if unknown.
      local_device: index of the only GPU that this process uses; None for all visible ones.
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
        """`HOST:PORT`, with an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find(
    coordinator: str | None = None,
    processes: str | None = None,
    process: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    metadata: Callable[[str], str | None] | None = None,
) -> Processes | None:
    """Return the processes of this run; None for a single process.

    Args:
      coordinator, processes, process: the arguments, as text; None if not given.
      environment: used instead of `os.environ`.
      metadata: function that returns an attribute of a Cloud TPU VM, used instead of its metadata server.

    Raises:
      ConfigError: arguments that are incomplete, contradict each other, or contradict the launcher.
    """
    environment = os.environ if environment is None else environment
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {key: value or environment.get(_NAMES[key]) or None for key, value in given.items()}
    tpu = given["processes"] == "tpu"
    count = None if tpu else _whole("processes", given["processes"], 1)
    index = _whole("process", given["process"], 0)
    place = parse_address(given["coordinator"]) if given["coordinator"] else None
    if count == 1 and not index:
        return None
    if None not in (place, count, index):
        found = Processes(*place, count, index, "arguments")
    else:
        found = _from_tpu(environment, metadata or _metadata) if tpu else _from_launcher(environment, count)
        if found is None:
            return _none(given, environment)
    for key, here, there in (("processes", count, found.count), ("process", index, found.index)):
        if here is not None and here != there:
            raise ConfigError(f"--{key}={here} contradicts {found.source}, which gives {there}. Omit it, or give {_ALL}.")
    if place is not None:
        found = dataclasses.replace(found, host=place[0], port=place[1])
    if found.count == 1 and found.source != "arguments":
        return None
    if not found.host:
        raise ConfigError(f"{found.source} started {found.count} processes but does not give the host of the first one: add --coordinator=HOST:PORT.")
    if not 0 <= found.index < found.count:
        raise ConfigError(f"--process={found.index}: the {found.count} processes are numbered from 0 to {found.count - 1} ({found.source}).")
    return found


def _from_launcher(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """Return the processes from the variables of SLURM, Open MPI or GKE; None if none of them started this process."""
    for source, look in (("SLURM", _from_slurm), ("OMPI", _from_open_mpi), ("GKE", _from_gke)):
        try:
            if (found := look(environment, count)) is not None:
                return found
        except (ValueError, IndexError) as error:
            there = ", ".join(f"{key}={environment[key]!r}" for key in sorted(environment) if key.startswith((source, "JOB_", "TPU_WORKER")))
            raise ConfigError(f"invalid variables of {source} ({error}): {there}. Give {_ALL}.") from error
    return None


def _none(given: Mapping[str, str | None], environment: Mapping[str, str]) -> None:
    """Return None for a single process. Raise ConfigError if the arguments are incomplete and no launcher was found."""
    if given["processes"] == "tpu":
        raise ConfigError("--processes=tpu: this machine has no metadata of TPU workers. Give --coordinator=HOST:PORT --processes=N --process=I.")
    if any(given.values()):
        missing = " and ".join(f"--{key}={value}" for key, value in zip(_NAMES, ("HOST:PORT", "N", "I"), strict=True) if given[key] is None)
        given_text = [f"--{key}={value}" + (f" ({_NAMES[key]})" if environment.get(_NAMES[key]) else "") for key, value in given.items() if value is not None]
        raise ConfigError(
            f"{' and '.join(given_text)} needs {missing}: several processes need all three, or --processes=tpu, or a launcher such as srun or mpirun."
        )


def _whole(key: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ConfigError(f"--{key} must be a whole number of at least {least}{' (or tpu)' if key == 'processes' else ''}, got {text!r}.")
    return int(text)


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT` or `[IPV6]:PORT` into (host, port).

    Raises:
      ConfigError: the text has neither form.
    """
    match = re.fullmatch(r"(?:\[(?P<six>[0-9a-fA-F:.%]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})", text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(f"--coordinator must be HOST:PORT with a port between 1 and 65535, got {text!r}.")
    return match["six"] or match["host"], int(match["port"])


def _from_slurm(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """Return the tasks of a job step; None outside of a step, as in a batch script before srun."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)
    if not nodes or "SLURM_PROCID" not in environment or tasks == 1:
        return None
    hosts = expand_hosts(nodes)
    # `2(x3),1`: 2, 2, 2, 1 tasks per host.
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    per_host = [int(number) for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    by_task = tuple(host for host, number in zip(hosts, per_host, strict=False) for _ in range(number))
    blocks = environment.get("SLURM_DISTRIBUTION", "block").startswith("block") or len(hosts) == tasks
    here = environment.get("SLURMD_NODENAME")
    beside = per_host[hosts.index(here)] if here in hosts and len(per_host) == len(hosts) else -(-tasks // len(hosts))
    job, step = (int(environment.get(f"SLURM_{key}_ID") or environment.get(f"SLURM_{key}ID") or 0) for key in ("JOB", "STEP"))
    return Processes(
        host=hosts[0],
        port=_port(job * 7 + step),  # steps of a job may run concurrently
        count=tasks,
        index=int(environment["SLURM_PROCID"]),
        source="SLURM",
        hosts=by_task if blocks and len(by_task) == tasks else (),
        local_device=_local_device(environment, "SLURM_LOCALID", beside),
    )


def expand_hosts(text: str) -> list[str]:
    """Expand a SLURM node list into host names: `a[01-03,7],b` -> a01, a02, a03, a7, b."""
    hosts = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for piece, ranges in re.findall(r"([^\[\]]*)(?:\[([^\]]*)\])?", part):
            spans = [span.partition("-") for span in ranges.split(",")]
            numbers = [str(n).zfill(len(first)) for first, _, last in spans for n in range(int(first), int(last or first) + 1)] if ranges else [""]
            names = [name + piece + number for name in names for number in numbers]
        hosts += names
    return hosts


def _port(number: int) -> int:
    return _FIRST_PORT + number % _PORTS


def _local_device(environment: Mapping[str, str], key: str, beside: int) -> int | None:
    """Return the GPU index of a process that shares its host with others; None if it has the host alone or sees a single GPU."""
    if beside == 1 or key not in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or environment.get("HIP_VISIBLE_DEVICES")
    return None if visible and "," not in visible else int(environment[key])


def _from_open_mpi(environment: Mapping[str, str], count: int | None) -> Processes | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    host, job = "", 0  # of mpirun; its host is assumed to be that of rank 0
    # Up to version 4: `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, where the job number is a multiple of 4096.
    if match := re.match(r"(\d+)\..*?tcp6?://(?:\[([^,\]]+)|([^,:;]+))", environment.get("OMPI_MCA_orte_hnp_uri", "")):
        host, job = match[2] or match[3], int(match[1]) // 4096
    # Since version 5: `prterun-HOST-PID@1`; the addresses in these variables are those of the local daemon of each host.
    for key in ("PMIX_NAMESPACE", *(key for key in environment if key.startswith("PMIX_SERVER_URI"))):
        if not host and (match := re.match(r"(?:prterun|prte)-(.+)-(\d+)@", environment.get(key, ""))):
            host, job = match[1], int(match[2])
    beside = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    size, rank = int(environment["OMPI_COMM_WORLD_SIZE"]), int(environment["OMPI_COMM_WORLD_RANK"])
    return Processes(host, _port(job), size, rank, "Open MPI", local_device=_local_device(environment, "OMPI_COMM_WORLD_LOCAL_RANK", beside))


def _from_gke(environment: Mapping[str, str], count: int | None) -> Processes | None:
    """Return the pods of a JobSet: on TPUs from GKE's variables, elsewhere with names derived from the JobSet's name."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if hosts and "TPU_WORKER_ID" in environment:
        return _from_workers(hosts, environment["TPU_WORKER_ID"], environment.get, "GKE")
    if count is None or "JOBSET_NAME" not in environment:
        return None
    name, job = environment["JOBSET_NAME"], environment.get("REPLICATED_JOB_NAME", "workers")
    # Pods of each Job are numbered from 0; JOB_INDEX is the index of the Job. All Jobs have the same size.
    size = count // int(environment.get("JOBSET_JOBS", 1))
    index = int(environment.get("JOB_INDEX", 0)) * size + int(environment["JOB_COMPLETION_INDEX"])
    hosts = tuple(f"{name}-{job}-{i // size}-{i % size}.{name}" for i in range(count))
    return Processes(hosts[0], GKE_PORT, count, index, "GKE", hosts)


def _from_tpu(environment: Mapping[str, str], metadata: Callable[[str], str | None]) -> Processes | None:
    """Return the workers of a Cloud TPU VM, from the environment or its metadata server."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or metadata("worker-network-endpoints")
    worker = environment.get("TPU_WORKER_ID") or metadata("agent-worker-number")
    if not names or worker is None:
        return None
    table = "" if environment.get("MEGASCALE_NUM_SLICES") else metadata("tpu-env") or ""
    values = dict(re.findall(r"(?m)^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", table)) | {key: value for key, value in environment.items() if value}
    return _from_workers(names, worker, values.get, "the TPU's metadata")


def _from_workers(names: str, worker: str, value: Callable[[str], str | None], source: str) -> Processes:
    """Return the workers of a TPU slice, or of several slices as given by the `MEGASCALE_*` values."""
    hosts = tuple(_host(part) for part in names.strip().split(","))
    slices, number = int(value("MEGASCALE_NUM_SLICES") or 1), int(value("MEGASCALE_SLICE_ID") or 0)
    first = hosts[0] if slices == 1 else _host(value("MEGASCALE_COORDINATOR_ADDRESS") or "")
    return Processes(first, TPU_PORT, slices * len(hosts), number * len(hosts) + int(worker), source, hosts if slices == 1 else ())


def _host(text: str) -> str:
    """Return the host of `HOST`, `HOST:PORT`, an IPv6 address, or `NAME:NUMBER:HOST` (an older form of TPU workers)."""
    parts = text.strip().split(":")
    return parts[2] if len(parts) == 3 else text.strip() if len(parts) > 3 else parts[0]


def _metadata(key: str) -> str | None:
    """Return an attribute of this Cloud VM; None if it does not exist."""
    import urllib.error
    import urllib.request

    server = os.environ.get("GCE_METADATA_IP") or os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is local to this machine, so a proxy cannot reach it
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise ConfigError(f"--processes=tpu: the metadata server {server} returned status {error.code} for {key}.") from error
    except OSError as error:
        raise ConfigError(f"--processes=tpu: cannot connect to the metadata server {server} ({error}). If this is not a Cloud TPU VM, give {_ALL}.") from error
