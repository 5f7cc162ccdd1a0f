"""Several processes: their detection, the roll call, failures of others, and stopping at the same step."""

import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import HELPERS, ROOT
from jax.errors import JaxRuntimeError
from ports import free_port

from jaxmodels.data.loader import DeviceFeed
from jaxmodels.data.reading import ReadError
from jaxmodels.distributed.member import Member
from jaxmodels.distributed.processes import Processes, expand_hosts, find, parse_address
from jaxmodels.distributed.rendezvous import meet
from jaxmodels.errors import ConfigError, Interrupted, OneFailed, RunError
from jaxmodels.training.batches import Feed
from jaxmodels.training.signals import StopSignals

# Finding out


def test_one_process_by_default():
    assert find(environment={}) is None
    assert find(processes="1", environment={}) is None
    # In a batch script before srun, and with a single task, there is one process.
    batch = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert find(environment=batch) is None
    assert find(environment=batch | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find(environment={"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert find(environment={"JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_arguments_and_their_environment():
    found = find("10.0.0.1:1234", "4", "2", environment={})
    assert (found.coordinator, found.count, found.index) == ("10.0.0.1:1234", 4, 2)
    environment = {"JAXMODELS_COORDINATOR": "[::1]:99", "JAXMODELS_PROCESSES": "3", "JAXMODELS_PROCESS": "1"}
    found = find(environment=environment)
    assert (found.host, found.coordinator, found.count, found.index) == ("::1", "[::1]:99", 3, 1)
    assert find(process="2", environment=environment).index == 2  # arguments override the environment
    # All three arguments together override the launcher.
    assert find("h:1", "4", "2", environment=slurm(3)).source == "arguments"


@pytest.mark.parametrize(
    "given, message",
    [
        (("h:1", None, None), "--coordinator=h:1 needs --processes=N and --process=I"),
        ((None, "2", None), "--processes=2 needs --coordinator=HOST:PORT and --process=I"),
        (("h:1", "2", None), "needs --process=I"),
        ((None, None, "1"), "needs --coordinator=HOST:PORT and --processes=N"),
        (("h:1", "2", "2"), "--process=2: the 2 processes are numbered from 0 to 1"),
        (("h", "2", "1"), "--coordinator must be HOST:PORT"),
        (("h:65536", "2", "1"), "between 1 and 65535"),
        (("h:1", "two", "1"), "--processes must be a whole number of at least 1 (or tpu), got 'two'"),
        (("h:1", "0", "0"), "--processes must be a whole number of at least 1"),
        (("h:1", "2", "-1"), "--process must be a whole number of at least 0, got '-1'"),
        (("h:1", "1", "1"), "--process=1: the 1 process"),
    ],
)
def test_inconsistent_arguments(given, message):
    with pytest.raises(ConfigError) as error:
        find(*given, environment={})
    assert message in str(error.value) and "\n" not in str(error.value)


def slurm(task, **changes):
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[09-10],login",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % 2),
        "SLURMD_NODENAME": ["gpu09", "gpu10", "login"][task // 2],
    } | changes


def test_slurm():
    found = [find(environment=slurm(task)) for task in range(5)]
    assert [p.index for p in found] == [0, 1, 2, 3, 4] and {p.count for p in found} == {5}
    assert {p.host for p in found} == {"gpu09"} and len({p.port for p in found}) == 1
    assert found[0].hosts == ("gpu09", "gpu09", "gpu10", "gpu10", "login")
    assert [p.local_device for p in found] == [0, 1, 0, 1, None]  # alone on its host: all its devices
    assert find(environment=slurm(3, CUDA_VISIBLE_DEVICES="1")).local_device is None  # SLURM assigned one device to each
    other = find(environment=slurm(0, SLURM_JOB_ID="4712"))
    assert other.port != found[0].port and 61000 <= other.port < 65536
    assert find("elsewhere:5", environment=slurm(1)).coordinator == "elsewhere:5"
    assert find(environment=slurm(1, SLURM_DISTRIBUTION="cyclic")).hosts == ()
    with pytest.raises(ConfigError, match="--processes=4 contradicts SLURM, which gives 5"):
        find(processes="4", environment=slurm(1))
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        find(environment=slurm(0, SLURM_PROCID="x"))


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node001", ["node001"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11,7],m", ["n08", "n09", "n10", "n11", "n7", "m"]),
        ("r[1-2]c[0-1]-ib", ["r1c0-ib", "r1c1-ib", "r2c0-ib", "r2c1-ib"]),
    ],
)
def test_slurm_node_lists(text, hosts):
    assert expand_hosts(text) == hosts


def test_open_mpi():
    rank = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    four = find(environment=rank | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"})
    assert (four.host, four.count, four.index, four.local_device) == ("10.96.0.1", 4, 3, 1)
    six = find(environment=rank | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370"})
    assert six.host == "fe80::b9b:ac5d:9cf0:b858" and six.coordinator.startswith("[fe80::")
    five = find(environment=rank | {"PMIX_NAMESPACE": "prterun-node-07-5123@1", "PMIX_SERVER_URI41": "prterun-node-07-5123@0.1;tcp4://10.0.0.2:40001"})
    assert five.host == "node-07"
    with pytest.raises(ConfigError, match="Open MPI started 4 processes but does not give the host .* add --coordinator"):
        find(environment=rank)
    assert find("h:7", environment=rank).coordinator == "h:7"


def test_gke():
    tpu = {"JOB_COMPLETION_INDEX": "1", "TPU_WORKER_HOSTNAMES": "run-w-0-0.run,run-w-0-1.run", "TPU_WORKER_ID": "1"}
    found = find(environment=tpu)
    assert (found.coordinator, found.count, found.index) == ("run-w-0-0.run:8482", 2, 1) and found.hosts[1] == "run-w-0-1.run"
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "run-w-0-0.run:8080"}
    found = find(environment=tpu | slices)
    assert (found.host, found.count, found.index) == ("run-w-0-0.run", 6, 5)
    gpu = {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "w", "JOB_COMPLETION_INDEX": "1", "JOB_INDEX": "1", "JOBSET_JOBS": "2", "JAXMODELS_PROCESSES": "4"}
    found = find(environment=gpu)
    assert (found.coordinator, found.count, found.index) == ("run-w-0-0.run:8482", 4, 3) and found.hosts[3] == "run-w-1-1.run"


class Metadata(BaseHTTPRequestHandler):
    """The metadata server of a Cloud VM."""

    attributes = {}

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        value = self.attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or "none").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Metadata, "attributes", {})
    yield Metadata.attributes
    server.shutdown()
    server.server_close()


def test_cloud_tpu(metadata):
    with pytest.raises(ConfigError, match="--processes=tpu: this machine has no metadata of TPU workers"):
        find(processes="tpu", environment={})
    metadata |= {"worker-network-endpoints": "a:1:10.0.0.4,b:2:10.0.0.5", "agent-worker-number": "1", "tpu-env": "ZONE: 'x'\n"}
    found = find(processes="tpu", environment={})
    assert (found.coordinator, found.count, found.index, found.hosts) == ("10.0.0.4:8482", 2, 1, ("10.0.0.4", "10.0.0.5"))
    metadata["worker-network-endpoints"] = "host-a,host-b"
    metadata["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n"
    found = find(processes="tpu", environment={})
    assert (found.host, found.count, found.index) == ("10.9.9.9", 4, 3)
    with pytest.raises(ConfigError, match="--process=0 contradicts the TPU's metadata, which gives 3"):
        find(processes="tpu", process="0", environment={})


def test_no_metadata_server(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="--processes=tpu: cannot connect to the metadata server"):
        find(processes="tpu", environment={})


# Meeting


class Store:
    """A replacement, in this process, for the key–value store of JAX's coordination service; test_local.py uses the real one."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self.values:
            raise JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.values[key]

    def key_value_dir_get(self, key):
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key}.")
            return self.values[key]


def use(store) -> list:
    """Return the results of a store for each of the calls that `Member` makes."""
    answers = []

    def call(function, *args, **options):
        try:
            answers.append(function(*args, **options))
        except RuntimeError as error:
            answers.append(str(error).partition(":")[0])

    call(store.key_value_set, "a/x/0", "1")
    call(store.key_value_set, "a/x/0", "2")
    call(store.key_value_set, "a/x/1", "3")
    call(store.key_value_set, "a/x/1", "4", allow_overwrite=True)
    call(lambda: sorted(map(list, store.key_value_dir_get("a/x/"))))
    call(store.key_value_dir_get, "a/y/")
    call(store.key_value_try_get, "a/x/1")
    call(store.key_value_try_get, "a/x/2")
    call(store.blocking_key_value_get, "a/x/0", 100)
    call(store.blocking_key_value_get, "a/x/2", 100)
    return answers


def test_the_store_of_these_tests_behaves_as_that_of_jax():
    program = f"""
import json, os, jax
from orbax.checkpoint import utils
from test_processes import use
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize("127.0.0.1:{free_port()}", 1, 0, cluster_detection_method="deactivate")
print(json.dumps(use(utils.multihost.get_jax_distributed_client())), flush=True)
os._exit(0)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(ROOT / "tests"), str(HELPERS), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answers = use(Store())
    assert json.loads(done.stdout.splitlines()[-1]) == answers
    assert answers[1] == "ALREADY_EXISTS" and answers[-1] == "DEADLINE_EXCEEDED"


HELLO = {"host": socket.gethostname(), "pid": 7, "versions": {}, "config": {}, "error": None, "status": None}


class Crowd:
    """Members in threads of this process, and the outcome of each."""

    def __init__(self, count, hosts=(), start_limit=5.0, hang_limit=1.5, stall_limit=60.0):
        self.count, self.port, self.hosts, self.start_limit = count, free_port(), hosts, start_limit
        self.limits = {"hang_limit": hang_limit, "stall_limit": stall_limit}
        self.store = Store()
        self.members: dict[int, Member] = {}
        self.connections: dict[int, dict[int, socket.socket]] = {}
        self.errors: dict[int, Exception] = {}
        self.left: dict[int, tuple[int, str]] = {}
        self.threads = []

    def join(self, index, *, key=None, config=None, versions=None, error=None, count=None):
        """Start the process `index`."""
        key = index if key is None else key
        hello = HELLO | {"config": config or {"config.seed": 0}, "versions": versions or {"jax": "1"}}
        hello |= {"error": error and str(error), "status": error and error.exit_status}

        def meet_others():
            processes = Processes("127.0.0.1", self.port, count or self.count, index, "arguments", self.hosts)
            leave = lambda status, reason: self.left.__setitem__(key, (status, reason))  # noqa: E731
            try:
                self.connections[key], hosts = meet(processes, hello, self.start_limit)
            except RunError as error_:
                self.errors[key] = error_
            else:
                self.members[key] = Member(processes, self.connections[key], hosts, leave=leave, **self.limits)

        thread = threading.Thread(target=meet_others, daemon=True)
        thread.start()
        self.threads.append(thread)
        return self

    def met(self):
        """Wait for all processes."""
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "hangs"
        for member in self.members.values():
            member.start(self.store)
        return self

    def wait_for_left(self, *keys, seconds=10):
        end = time.monotonic() + seconds
        while not all(key in self.left for key in keys):
            assert time.monotonic() < end, self.left
            time.sleep(0.01)

    def end(self):
        """Finish all processes."""
        everyone = [threading.Thread(target=member.bye, args=(0,), kwargs={"agreed": True}) for member in self.members.values()]
        for thread in everyone:
            thread.start()
        for thread in everyone:
            thread.join(20)
            assert not thread.is_alive(), "hangs"
        for index in self.connections:
            self.kill(index)

    def kill(self, index):
        """Close the connections of a process, as the operating system does when it dies."""
        for connection in self.connections[index].values():
            connection.shutdown(socket.SHUT_RDWR)


def everybody(count, **options):
    crowd = Crowd(count, **options)
    for index in reversed(range(count)):  # in any order
        crowd.join(index)
    return crowd.met()


def test_all_connect_exchange_values_and_end_without_errors():
    crowd = everybody(4)
    assert not crowd.errors and sorted(crowd.members) == [0, 1, 2, 3]
    assert crowd.members[2].hosts == [socket.gethostname()] * 4
    results = {}

    def exchange(index):
        results[index] = [crowd.members[index].gather("a", {"from": index}), crowd.members[index].gather("b")]

    threads = [threading.Thread(target=exchange, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {index: [[{"from": i} for i in range(4)], [None] * 4] for index in range(4)}
    time.sleep(2)  # longer than the hang limit: heartbeats continue
    crowd.end()
    # JAX aborts a process that uses the store while its service shuts down, which happens next.
    before = dict(crowd.store.values)
    time.sleep(0.5)
    assert crowd.store.values == before and not crowd.left


def test_processes_that_do_not_connect_are_named():
    crowd = Crowd(4, hosts=("a", "b", "c", "d"), start_limit=1.0).join(0).join(2).met()
    assert not crowd.members
    for error in crowd.errors.values():
        assert error.exit_status == 1 and "\n" not in str(error)
        assert "processes 1 and 3 of 4 (on b, d) did not connect within 1 s" in str(error)


def test_a_coordinator_that_cannot_be_reached():
    started = time.monotonic()
    crowd = Crowd(2, start_limit=0.7).join(1).met()
    assert time.monotonic() - started < 5
    assert crowd.errors[1].exit_status == 1
    assert f"process 1 could not connect to the coordinator 127.0.0.1:{crowd.port}" in str(crowd.errors[1]) and "Connection refused" in str(crowd.errors[1])
    crowd = Crowd(2, start_limit=0.5)
    processes = Processes("no-such-host.invalid", crowd.port, 2, 1, "arguments")
    with pytest.raises(RunError, match="could not connect to the coordinator no-such-host.invalid"):
        meet(processes, HELLO, 0.5)


def test_a_port_that_is_taken():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RunError, match=f"cannot listen on port {port}"):
        meet(Processes("127.0.0.1", port, 2, 0, "arguments"), HELLO, 1)


def test_different_configs_and_versions():
    same = {"config.seed": 1, "config.model.width": 8, "--workdir": "runs/x"}
    crowd = Crowd(3).join(0, config=same).join(1, config=same | {"config.seed": 2}).join(2, config={**same, "config.data.buffer": [3]}).met()
    for error in crowd.errors.values():
        assert isinstance(error, ConfigError) and error.exit_status == 2
        assert "config.seed is 1 in processes 0 and 2, 2 in process 1" in str(error)
        assert "config.data.buffer is (absent) in processes 0 and 1, [3] in process 2" in str(error)
        assert "width" not in str(error) and "\n" not in str(error)
    assert len(crowd.errors) == 3
    crowd = Crowd(2).join(0, versions={"jax": "0.10.2", "jaxmodels": "1"}).join(1, versions={"jax": "0.12.0", "jaxmodels": "1"}).met()
    assert {e.exit_status for e in crowd.errors.values()} == {2}
    assert "different packages: jax is '0.10.2' in process 0, '0.12.0' in process 1" in str(crowd.errors[0])


def test_a_difference_is_reported_before_the_last_process_connects():
    started = time.monotonic()
    crowd = Crowd(3, start_limit=60.0).join(0).join(1, config={"config.seed": 5}).met()
    assert time.monotonic() - started < 20 and "config.seed is 0 in process 0, 5 in process 1" in str(crowd.errors[1])


@pytest.mark.slow
def test_two_processes_with_one_number_and_another_count():
    crowd = Crowd(3).join(0).join(1).join(1, key="other").met()
    assert len(crowd.errors) == 3 and {e.exit_status for e in crowd.errors.values()} == {2}
    assert "two processes were started as process 1" in str(crowd.errors[0]) and "pid" in str(crowd.errors["other"])
    crowd = Crowd(3).join(0).join(1, count=4).met()
    assert "process 1" in str(crowd.errors[0]) and "as one of 4 processes, process 0 as one of 3" in str(crowd.errors[1])


def test_an_error_before_the_start_reaches_all():
    crowd = Crowd(2, start_limit=60.0).join(0).join(1, error=ConfigError("there is no file x.py.")).met()
    assert crowd.errors[0].exit_status == 2 and str(crowd.errors[0]).endswith("failed: there is no file x.py.")


def test_connections_of_other_programs_are_ignored():
    crowd = Crowd(2).join(0)
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", crowd.port)) as one, socket.create_connection(("127.0.0.1", crowd.port)) as two:
        one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        two.sendall(b'{"kind": "hello", "index": "0"}\n[1]\n')
        crowd.join(1).met()
    assert not crowd.errors
    crowd.end()


# Leaving


@pytest.mark.faults
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_dies_is_noticed_by_all_others(victim):
    crowd = everybody(3)
    crowd.kill(victim)
    others = [index for index in range(3) if index != victim]
    crowd.wait_for_left(*others)
    for index in others:
        status, reason = crowd.left[index]
        assert (
            status == 1 and f"process {victim} ({socket.gethostname()}) died; this process ends. The same command resumes from the last checkpoint." == reason
        )


class Silent:
    """A store without communication in either direction, as for a stopped process."""

    def __getattr__(self, _):
        raise JaxRuntimeError("UNAVAILABLE")


@pytest.mark.faults
@pytest.mark.parametrize("victim", [2, 0])
def test_a_silent_process_is_treated_as_failed(victim):
    crowd = everybody(3)
    started = time.monotonic()
    crowd.members[victim]._store = Silent()
    others = [index for index in range(3) if index != victim]
    crowd.wait_for_left(*others)
    assert 1 < time.monotonic() - started < 8
    for index in others:
        assert crowd.left[index][0] == 1 and f"process {victim} ({socket.gethostname()}) has been silent for 1.5 s" in crowd.left[index][1]
    crowd.members[victim]._store = crowd.store  # it learns of the end when it continues
    if victim:
        crowd.wait_for_left(victim)


@pytest.mark.faults
def test_a_hanging_main_thread_ends_the_run_after_the_limit(capfd):
    crowd = everybody(3, stall_limit=3.0)
    reported = []
    for index, member in crowd.members.items():
        member.report = lambda index=index: reported.append(index) or "it waits for data"
    time.sleep(4)
    assert not crowd.left, "before the first step there is no limit, because compiling may take long"
    for member in crowd.members.values():
        member.check()
    for index in (0, 2):  # process 1 hangs, and the others wait for it in the next collective
        crowd.members[index].check()
    crowd.wait_for_left(0, 1, 2)
    for status, reason in crowd.left.values():
        assert status == 1
        assert reason.startswith(
            f"no process has completed a step for 3 s (--stall_limit); process 1 ({socket.gethostname()}) is behind the others; this process ends."
        )
    assert sorted(reported) == [0, 1, 2]  # each prints where it is
    said = capfd.readouterr().err
    assert f"jaxmodels: process 1 ({socket.gethostname()}): it waits for data\n" in said


@pytest.mark.faults
def test_processes_that_wait_for_data_can_save_before_they_end():
    crowd = everybody(3, stall_limit=1.5)
    stops, reported = {index: threading.Event() for index in range(3)}, []
    for index, member in crowd.members.items():
        member.on_stop, member.report = stops[index].set, lambda index=index: reported.append(index) or ""
        member.check()
    assert all(stop.wait(10) for stop in stops.values())
    for member in crowd.members.values():
        with pytest.raises(OneFailed, match=r"^no process has completed a step for 1.5 s \(--stall_limit\); all are at the same step$"):
            member.check()
    assert sorted(reported) == [0, 1, 2] and not crowd.left
    crowd.end()


@pytest.mark.faults
def test_a_phase_has_a_limit_of_its_own():
    crowd = everybody(2, stall_limit=60.0)
    first = crowd.members[0]
    first.set_limit(2.0, "has saved", "--save_limit")  # process 0 is at the same place as the others
    time.sleep(1)
    first.set_limit(60.0)
    time.sleep(2)
    assert not crowd.left
    first.set_limit(1.0, "has restored", "--setup_limit")  # also before the first step
    crowd.wait_for_left(0, 1)
    assert all(reason.startswith("no process has restored for 1 s (--setup_limit); all are at the same step") for _, reason in crowd.left.values())


@pytest.mark.slow
@pytest.mark.faults
def test_an_error_of_one_makes_all_leave_with_its_status_and_reason():
    crowd = everybody(3)
    crowd.members[1].bye(3, "diverged at step 7", agreed=False)
    crowd.wait_for_left(0, 2)
    assert set(crowd.left.values()) == {(3, f"process 1 ({socket.gethostname()}) ended: diverged at step 7")}
    assert 1 not in crowd.left


@pytest.mark.faults
def test_others_may_end_by_themselves_after_an_error():
    crowd = everybody(2)
    crowd.members[1].bye(3, "diverged", agreed=False)
    crowd.members[0].bye(3, "diverged", agreed=False)
    time.sleep(1)
    assert not crowd.left  # neither was forced to end


# Stopping together


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(12))
def test_all_stop_at_the_same_check_from_any_state(seed):
    """Every process waits in 'collectives' for the others, as real ones do: agreeing on a stop must not need a main thread that waits there."""
    draw = random.Random(seed)
    count, steps = draw.choice([1, 2, 3, 5]), 2000
    crowd = everybody(count)
    for member in crowd.members.values():
        member._turn = 0.01
    collectives = [threading.Barrier(count) for _ in range(steps)]
    every = draw.choice([1, 1, 2, 7, 1000])  # steps between reads from the device; between them a process runs ahead
    stopped, passed = {}, dict.fromkeys(range(count), 0)
    pauses = {index: draw.choice([0.0005, 0.001, 0.004]) for index in range(count)}

    def main(index):
        try:
            for step in range(steps):
                time.sleep(pauses[index] * draw.random())
                if step % every == every - 1:
                    collectives[step].wait(20)
                crowd.members[index].check()
                passed[index] += 1
            stopped[index] = "finished"
        except Interrupted as error:
            stopped[index] = str(error)
        except threading.BrokenBarrierError:
            stopped[index] = "dead-lock"

    threads = [threading.Thread(target=main, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(draw.random() * 0.1)
    signalled = draw.sample(range(count), draw.randint(1, count))
    for index in signalled:
        crowd.members[index].request_stop("SIGTERM")
    for thread in threads:
        thread.join(30)
    assert len(set(passed.values())) == 1, passed
    assert set(stopped) == set(range(count)) and "dead-lock" not in stopped.values()
    assert all(text.startswith("SIGTERM") for text in stopped.values()) and sum("(at process" not in text for text in stopped.values()) == 1
    crowd.end()
    assert not crowd.left


class Steps:
    """What the devices of some processes compute in one pass over data: the result of a step is there when all processes have started it."""

    def __init__(self, count):
        self.count, self.started, self.changed = count, {}, threading.Condition()

    def start(self, step):
        with self.changed:
            self.started[step] = self.started.get(step, 0) + 1
            self.changed.notify_all()
        return Result(self, step)


class Result:
    def __init__(self, steps, step):
        self.steps, self.step = steps, step

    def block_until_ready(self):
        with self.steps.changed:
            if not self.steps.changed.wait_for(lambda: self.steps.started[self.step] == self.steps.count, 20):
                raise threading.BrokenBarrierError
        return self


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(12))
def test_all_stop_before_a_batch_that_one_cannot_read(seed):
    """Readers of some processes fail, in training or in an evaluation: all stop at one step, which needs no batch that is missing."""
    draw = random.Random(seed)
    count, steps, every, evaluated = draw.choice([2, 3, 5]), 400, draw.choice([7, 50, 1000]), 5
    crowd = everybody(count)
    for member in crowd.members.values():
        member._turn = 0.01
    passes = {}  # training, and the evaluation after a step -> what is computed
    fails = {}  # process -> pass and batch
    for index in draw.sample(range(count), draw.randint(1, count)):
        fails[index] = draw.choice([("train", draw.randrange(300)), (draw.choice([every, 2 * every]), draw.randrange(evaluated))])
    run_ahead = draw.choice([1, 2, 7, 1000])  # steps between reads from the device
    pauses = {index: draw.choice([0, 0.0005, 0.002]) for index in range(count)}
    stopped, started = {}, {index: [] for index in range(count)}

    def read(index, name, length):
        for number in range(length):
            time.sleep(pauses[index] * draw.random())
            if (name, number) == fails.get(index):
                raise ReadError(f"{name} {number}")
            yield number

    def run(index, name, length):
        stop = StopSignals()
        stop._member = crowd.members[index]
        feed = Feed(DeviceFeed(read(index, name, length), lambda batch: batch), length, stop)
        feed._member = crowd.members[index]
        pace, result = passes.setdefault(name, Steps(count)), None
        while (batch := feed.next(result)) is not None:
            result = pace.start(batch)
            started[index].append((name, batch))
            if batch % run_ahead == run_ahead - 1:
                result.block_until_ready()
            if name == "train" and batch % every == every - 1:
                run(index, batch + 1, evaluated)

    def main(index):
        try:
            run(index, "train", steps)
            stopped[index] = "finished"
        except (OneFailed, threading.BrokenBarrierError) as error:
            stopped[index] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=main, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(stopped.values())) == 1 and set(stopped) == set(range(count)), (stopped, fails)
    assert all(each == started[0] for each in started.values())
    trained = sum(name == "train" for name, _ in started[0])
    assert trained <= min(number if name == "train" else name for name, number in fails.values())
    if stopped[0] == "finished":
        assert all(name != "train" and name > steps for name, _ in fails.values())  # an evaluation that there never was
    else:
        assert re.fullmatch(rf"OneFailed: process ({'|'.join(map(str, fails))}) \(\S+\): (train|\d+) \d+", stopped[0]), (stopped, fails)
        assert trained >= min(number - 2 if name == "train" else name for name, number in fails.values())
        assert all(member.agreed for member in crowd.members.values())
    crowd.end()
    assert not crowd.left


@pytest.mark.faults
def test_a_signal_and_an_error_at_once_have_one_outcome(capfd):
    crowd = everybody(2)
    crowd.members[0].request_stop("SIGTERM")
    time.sleep(0.5)
    with pytest.raises(Interrupted, match=r"SIGTERM \(at process 0\)"):
        crowd.members[1].check(ReadError("example 7 cannot be read"))
    with pytest.raises(Interrupted, match="SIGTERM"):
        crowd.members[0].check()
    assert f"process 1 ({socket.gethostname()}): example 7 cannot be read" in capfd.readouterr().err  # not lost
    crowd.end()


def test_a_stop_before_the_first_check_waits_for_it():
    crowd = everybody(2)
    crowd.members[1].request_stop("SIGINT")
    time.sleep(1.0)
    for index in range(2):
        with pytest.raises(Interrupted):
            crowd.members[index].check()
    assert crowd.members[0].agreed and not crowd.left
    crowd.end()


def test_a_stop_after_the_last_check_changes_nothing():
    crowd = everybody(2)
    for member, _ in itertools.product(crowd.members.values(), range(3)):
        member.check()
    crowd.members[0].request_stop("SIGTERM")
    time.sleep(1.0)
    crowd.end()
    assert not crowd.left and not any(member.agreed for member in crowd.members.values())


def test_addresses():
    assert Processes("::1", 5, 2, 0, "x").coordinator == "[::1]:5" and parse_address("h:5") == ("h", 5)
