"""Checksums of arrays: what they depend on, and that no damaged file of a checkpoint gives a wrong array."""

import collections
import json
import random
import shutil

import checksums_on_mesh
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_configs
import warm_python
from conftest import HELPERS
from run_state import final_state

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.parallel import mesh, sharding
from jaxmodels.runs import checksums
from jaxmodels.runs.checkpoint import Checkpoints
from jaxmodels.runs.folder import RunFolder

pytestmark = pytest.mark.faults

# What they depend on


def expected(x: np.ndarray) -> int:
    """The checksum in Python's integers: MurmurHash3's finaliser of (bits + index * 2^32 / golden ratio), summed modulo 2^32."""
    width = 4 if x.dtype.itemsize == 8 else x.dtype.itemsize
    words = np.frombuffer(x.tobytes(), f"<u{width}")
    if x.dtype.kind == "i" and width < 4:
        words = np.frombuffer(x.tobytes(), f"<i{width}").astype(np.int32)
    total = 0
    for index, word in enumerate(words):
        h = (int(word) + index * 0x9E3779B9) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        total += h ^ h >> 16
    return total % 2**32


TYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint16", "int32", "int64", "complex64", "bool"]


def some(dtype: str, shape=(3, 5, 2)) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype.kind == "b":
        return np.random.default_rng(0).random(shape) < 0.5
    return np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_checksum_is_that_of_the_bits_by_numpy_and_compiled(dtype, monkeypatch):
    x = some(dtype)
    words = {"x": f"{dtype}:{expected(x):08x}"}
    assert checksums.of({"x": x}) == words
    monkeypatch.setattr(checksums, "_BLOCK", 7)
    assert checksums.of({"x": x}) == words
    monkeypatch.setattr(checksums, "_on_host", lambda x: False)
    assert checksums.of({"x": x}) == words
    if x.dtype.itemsize < 8 or dtype == "complex64":
        assert checksums.of({"x": jnp.asarray(x)}) == words
        sharded = jax.device_put(x, jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data")))
        assert int(checksums._compiled(dtype, None)(sharded)) == int(words["x"].rpartition(":")[2], 16)


def test_every_bit_and_every_exchange_changes_it():
    for dtype in TYPES:
        x = some(dtype, (17,))
        whole = checksums.of({"x": x})
        for byte in range(x.nbytes):
            for bit in range(8) if dtype != "bool" else (0,):
                changed = bytearray(x.tobytes())
                changed[byte] ^= 1 << bit
                assert checksums.check({"x": np.frombuffer(bytes(changed), x.dtype)}, whole) == ["x"]
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    whole = checksums.of({"x": x})
    assert checksums.check({"x": x.T.copy()}, whole) == checksums.check({"x": x[::-1].copy()}, whole) == ["x"]
    for signs in ([0, 1], [0, 7], [2, 3, 4, 5]):  # the top bits of several elements, which a plain sum of bits would not notice
        changed = x.copy()
        changed.reshape(-1)[signs] *= -1
        changed.reshape(-1)[0] = -0.0 if 0 in signs else 0.0
        assert checksums.check({"x": changed}, whole) == ["x"]


def test_random_keys_and_other_types():
    keys = jax.random.split(jax.random.key(3), 4)
    whole = checksums.of({"keys": keys})
    assert checksums.check({"keys": keys}, whole) == [] and checksums.check({"keys": keys[::-1]}, whole) == ["keys"]
    # bfloat16 read as float32 loses nothing, so its checksum still holds; what another type loses cannot be told from damage.
    saved = some("bfloat16", (64,))
    saved = np.where(np.isfinite(saved.astype(np.float32)), saved, ml_dtypes.bfloat16(1))
    whole = checksums.of({"x": saved})
    wide = saved.astype(np.float32)
    assert checksums.check({"x": wide}, whole) == checksums.check({"x": jnp.asarray(wide)}, whole) == []
    assert checksums.check({"x": np.where(np.arange(64) == 5, -wide, wide)}, whole) == ["x"]
    assert checksums.check({"x": wide.astype(np.float16)}, whole) == []
    # A part of the arrays; an array that was not there.
    assert checksums.check({}, whole) == [] and checksums.check({"y": wide}, whole) == ["y"]


@pytest.mark.parametrize("size", [100_000, 600_000])  # hashed by NumPy, and by XLA
def test_a_step_still_reuses_the_memory_of_the_state(size):
    x = jax.block_until_ready(jnp.arange(float(size)))
    place = x.unsafe_buffer_pointer()
    checksums.of({"x": x})
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(x).unsafe_buffer_pointer() == place


def test_checksums_do_not_depend_on_the_mesh():
    done = warm_python.run(["checksums_on_mesh.py"], cwd=HELPERS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = checksums.of(checksums_on_mesh.arrays())
    assert found == dict.fromkeys(("one device", "replicated", "rows", "both"), here)


# Damaged files


CONFIG = small_configs.config(
    small_configs.CNN, model={"name": "cnn", "features": (8, 16), "hidden": 64, "dropout": 0.2}, training__steps=20, training__ema=0.9
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "x"
    jaxmodels.train(CONFIG, str(folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def shapes():
    experiment = build_experiment(CONFIG)
    layout = sharding.make_layout(mesh.make_mesh(experiment.mesh), experiment.sharding)
    return sharding.place_state(experiment.state_shapes(), experiment.sharding, layout)


def flip(path, generator: random.Random) -> None:
    """Invert some bits of one to four bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        content[generator.randrange(len(content))] ^= generator.choice((1, 128, 255, generator.randrange(1, 256)))
    path.write_bytes(bytes(content))


def read(folder, shapes, **options):
    """Return the state and the progress of step 20, or None if they are refused, which is printed."""
    checkpoints = Checkpoints(folder, read_only=True, **options)
    try:
        return jax.device_get(checkpoints.restore(20, shapes))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        assert not isinstance(error, (NameError, AttributeError, AssertionError)), error  # faults of the program
        print(type(error).__name__, str(error)[:200])
        return None
    finally:
        checkpoints.close()


def same(one, other) -> bool:
    (state, progress), (state_2, progress_2) = one, other
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), state, state_2)
    return progress == progress_2 and all(jax.tree.leaves(equal))


@pytest.mark.parametrize("flips", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_every_restore_after_a_flip_is_right_or_refused(flips, trained, shapes, tmp_path):
    whole = read(trained / "checkpoints", shapes)
    files = sorted(path for path in (trained / "checkpoints" / "20").rglob("*") if path.is_file() and path.stat().st_size)
    data = [path for path in files if "d" in path.parts[-2:-1]]
    assert len(data) >= 2
    # Most of the flips where most of the bytes are: in the arrays.
    generator, seen, unguarded = random.Random(17), collections.Counter(), 0
    chosen = (files * 3 if flips > 6 else files[::2]) + [max(data, key=lambda path: path.stat().st_size)] * flips
    for number, path in enumerate(chosen):
        folder = tmp_path / str(number)
        shutil.copytree(trained / "checkpoints" / "20", folder / "20")
        flip(folder / path.relative_to(trained / "checkpoints"), generator)
        found = read(folder, shapes)
        assert found is None or same(found, whole), path
        seen["refused" if found is None else "right"] += 1
        if path in data:
            without = read(folder, shapes, checksums=False)
            unguarded += without is not None and not same(without, whole)
        shutil.rmtree(folder)
    assert unguarded > flips // 2, "the flips must be such as nothing but a checksum finds"
    assert seen["refused"] >= unguarded


def test_nesting_without_end_is_refused(trained, shapes, tmp_path):
    whole = read(trained / "checkpoints", shapes)
    files = [path for path in (trained / "checkpoints" / "20").rglob("*") if path.is_file() and path.read_bytes()[:1] == b"{"]
    assert len(files) >= 3
    for number, path in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(trained / "checkpoints" / "20", folder / "20")
        (folder / path.relative_to(trained / "checkpoints")).write_text('{"a":' * 100_000)
        if path.name == "_CHECKPOINT_METADATA":
            with pytest.raises(RunError, match=f"{folder}: the file _CHECKPOINT_METADATA of a step is nested too deeply"):
                read(folder, shapes)
        else:
            found = read(folder, shapes)
            assert found is None or same(found, whole), path


def damage(folder, step=20):
    """Flip a bit in each tenth of the arrays' largest file: some of its bytes belong to no array."""
    path = max((path for path in (folder / "checkpoints" / str(step) / "state").rglob("d/*")), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    for tenth in range(10):
        content[len(content) * (2 * tenth + 1) // 20] ^= 64
    path.write_bytes(bytes(content))


def test_a_run_goes_on_from_before_a_damaged_checkpoint(tmp_path):
    config, folder = small_configs.config(CONFIG, training__steps=40), tmp_path / "x"
    jaxmodels.train(config, str(folder), quiet=True)
    whole, _ = final_state(folder)
    damage(folder, 40)
    jaxmodels.train(config, str(folder), quiet=True)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["30", "40", "unreadable-40"]
    (problem,) = RunFolder(folder).manifest()["fallbacks"]
    assert "checkpoints/40 cannot be read: " in problem
    for path, array in final_state(folder)[0].items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)


def test_weights_are_verified_where_only_they_are_read(trained, tmp_path):
    """Evaluating reads the EMA alone: damage there is found, and damage elsewhere does not matter."""
    outcomes = collections.Counter()
    whole = jaxmodels.evaluate(str(trained), split="test")
    for number in range(60):  # in which file and where an array is changes from run to run; the EMA is about a quarter of all
        folder = tmp_path / str(number)
        shutil.copytree(trained, folder)
        files = sorted((folder / "checkpoints" / "20" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
        file = files[-1 - number % min(3, len(files))]
        content = bytearray(file.read_bytes())
        content[int(len(content) * (0.1 + 0.618 * number) % len(content))] ^= 16
        file.write_bytes(bytes(content))
        try:
            assert jaxmodels.evaluate(str(folder), split="test")["loss"] == whole["loss"]
            outcomes["right"] += 1
        except RunError as error:
            assert "checkpoints/20 cannot be read: " in str(error)
            outcomes["refused"] += 1
        if len(outcomes) == 2:
            break
    assert outcomes["right"] and outcomes["refused"], outcomes


# jaxmodels checkpoint verify


def test_verify(trained, tmp_path, capsys):
    folder = tmp_path / "x"
    shutil.copytree(trained, folder)
    assert cli.run(["checkpoint", "verify", str(folder)]) == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == ["step 10: whole", "step 20: whole"]
    # As an earlier version saved it: progress alone.
    page = folder / "checkpoints" / "10" / "progress" / "metadata"
    page.write_text(json.dumps({key: value for key, value in json.loads(page.read_text()).items() if key not in ("checksums", "crc32")}))
    damage(folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert cli.run(["checkpoint", "verify", str(folder)]) == 1
    first, second, *arrays = capsys.readouterr().out.splitlines()
    assert first.startswith("step 10: can be read, but was saved without checksums (") and second == "step 20: damaged"
    assert arrays and all(line.startswith("  ") for line in arrays)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert cli.run(["checkpoint", "verify", f"{folder}@10"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    page.write_text(page.read_text()[:-4])
    assert cli.run(["checkpoint", "verify", f"{folder}@10"]) == 1
    assert "cannot be read" in capsys.readouterr().out
    assert cli.run(["checkpoint", "verify", str(tmp_path / "none")]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_a_checkpoint_without_checksums_is_read(trained, shapes, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    page = tmp_path / "checkpoints" / "20" / "progress" / "metadata"
    values = json.loads(page.read_text())
    assert values.keys() >= {"checksums", "crc32"}
    page.write_text(json.dumps({key: value for key, value in values.items() if key not in ("checksums", "crc32")}))
    assert same(read(tmp_path / "checkpoints", shapes), read(trained / "checkpoints", shapes))


def test_the_switch(tmp_path):
    config = small_configs.config(CONFIG, training__steps=10, checkpoint__checksums=False)
    jaxmodels.train(config, str(tmp_path / "x"), quiet=True)
    checkpoints = Checkpoints(tmp_path / "x" / "checkpoints", read_only=True)
    assert checkpoints.checksums(10) is None
    checkpoints.close()
    with pytest.raises(ConfigError, match="belongs to a run of another config"):
        jaxmodels.train(small_configs.config(config, seed=1), str(tmp_path / "x"), quiet=True)
    jaxmodels.train(small_configs.config(config, checkpoint__checksums=True), str(tmp_path / "x"), quiet=True)
