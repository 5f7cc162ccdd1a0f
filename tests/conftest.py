"""Settings of all tests: the CPU, and caches that subprocesses share."""

import faulthandler
import os
import tempfile
import tracemalloc  # noqa: F401  pytest imports it when a finaliser fails, and inside TFDS's lazy imports that would fail too
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 the tests run with XLA's full optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # halves the time again; later versions have no such flag
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the processes of a run of the tests share what they compile
# The process that starts the tests makes the caches; its workers share them.
CACHES = {} if "PYTEST_XDIST_WORKER" in os.environ else {"JAX_COMPILATION_CACHE_DIR": "programs", "JAXMODELS_CACHE_DIR": "tokens"}
for variable, name in CACHES.items():
    os.environ[variable] = tempfile.mkdtemp(prefix=f"jaxmodels-test-{name}-")

import gc  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import warm_python  # noqa: E402  it notes the variables above

ROOT = Path(__file__).parent.parent
HELPERS = ROOT / "tests" / "helpers"
gc.get_freeze_count = lambda: 1  # the trainer asks whether there are any; to count millions takes 0.1 s of every run
gc.set_threshold(20_000, 20, 100)
MOST_MEMORY = 2_500_000_000  # bytes of a process; then JAX forgets what it compiled


@pytest.fixture(params=["pyarrow", "python"])
def csv_reader(request, monkeypatch):
    """Read tables of numbers with PyArrow, or with Python's own reader."""
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return request.param


def pytest_unconfigure(config):
    for variable in CACHES:
        shutil.rmtree(os.environ[variable], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Keep Python's garbage collector off what earlier modules left: JAX's caches hold millions of objects, and passes over them took 40% of the time."""
    yield
    if _memory() > MOST_MEMORY:
        sys.modules["jax"].clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def _memory() -> int:
    """Return the bytes of memory of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


FAULT_LIMIT = 1800  # seconds of one test


@pytest.fixture(autouse=True)
def bounded(request):
    """End a test of faults that hangs: print all stacks, and end the process."""
    if request.node.get_closest_marker("faults") is None:
        yield
        return
    faulthandler.dump_traceback_later(FAULT_LIMIT, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def jaxmodels_command():
    """Runs `python -m jaxmodels ARGS` from the repository; returns the finished process."""

    def run(*args, **options):
        return warm_python.run(["-m", "jaxmodels", *args], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture
def data_dir():
    """The folder of real data sets; the test is skipped without one."""
    folder = os.environ.get("JAXMODELS_DATA_DIR")
    if not folder:
        pytest.skip("JAXMODELS_DATA_DIR is not set: no real data sets here")
    return folder


@pytest.fixture
def index_cache(tmp_path, monkeypatch):
    """The folder of indexes of rows in a cache of this test's own."""
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Name of a config that starts from a pretrained model -> a folder with a small model of that kind, with random weights."""
    import pretrained_folders

    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = pretrained_folders.RECIPES[name](tmp_path_factory.mktemp("published") / name)
        return made[name]

    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 12 kB."""
    folder = tmp_path / "run" / "tensorboard"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def bucket_servers(tmp_path_factory):
    """Emulators of S3 and GCS (`bucket_servers.Servers`), behind proxies; the test is skipped without them."""
    import bucket_servers

    if why := bucket_servers.missing():
        pytest.skip(why)
    servers = bucket_servers.start(tmp_path_factory.mktemp("bucket_servers"))
    yield servers
    servers.stop()


@pytest.fixture
def location(place, tmp_path):
    """Function of a name that returns the address of a folder of this test: on the disk, in S3 and in GCS."""
    return lambda name: str(tmp_path / name) if place.startswith("/") else f"{place}/{tmp_path.name}/{name}"


PLACES = ["folder", pytest.param("s3", marks=pytest.mark.buckets), pytest.param("gs", marks=pytest.mark.buckets)]


@pytest.fixture(scope="module", params=PLACES)
def place(request, tmp_path_factory):
    """The address of a new folder on the disk, in S3 and in GCS; add `/name` to it, and `paths.join` it."""
    if request.param == "folder":
        return str(tmp_path_factory.mktemp("place"))
    import uuid

    request.getfixturevalue("bucket_servers")
    from bucket_servers import BUCKET

    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex[:8]}"
