"""A run folder on a disk, in S3 and in GCS: checkpoints, retention, the lock, the manifest, metrics, children. No training."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmodels.errors import RunError
from jaxmodels.runs import bucket_store, lock_file
from jaxmodels.runs.checkpoint import Checkpoints, Progress, SaveFailed
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lock import RunLock
from jaxmodels.runs.lock_file import Owner
from jaxmodels.runs.orbax_store import OrbaxStore
from jaxmodels.step.state import TrainState
from jaxmodels.storage import client, paths

ZERO = jnp.zeros((), jnp.int32)


def state(step: int) -> TrainState:
    """A state whose values depend on the step, with the types and shapes that occur."""
    key = jax.random.key(step)
    params = {"a": {"kernel": jax.random.normal(key, (6, 4)), "bias": jnp.full((4,), step, jnp.bfloat16)}}
    momenta = ({"a": jnp.arange(5, dtype=jnp.int8)}, (jnp.asarray(0.5), jnp.asarray([True, False])))
    return TrainState(jnp.int32(step), params, {}, {"mean": jnp.ones((2, 2))}, momenta, {}, {"loss": (jnp.float32(1), jnp.float32(step))}, ZERO)


def shapes(of: TrainState):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), of)


def equal(one, other) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture
def folder(place, request):
    return RunFolder(paths.join(place, request.node.originalname))


def opened(folder, **options):
    return Checkpoints(folder.checkpoints, **({"keep": 2, "every": 10} | options))


def test_a_state_comes_back_exactly(folder):
    checkpoints = opened(folder)
    checkpoints.save(state(10), Progress(evaluated_at=10, callbacks={"mine": [1]}))
    checkpoints.close()
    again, progress, problems = opened(folder).restore_latest(shapes(state(0)))
    assert equal(again, state(10)) and progress == Progress(evaluated_at=10, callbacks={"mine": [1]}) and problems == []


def test_the_latest_and_the_best_are_preserved_and_one_of_a_step_is_replaced(folder):
    checkpoints = opened(folder, parents=lambda: {20})
    for step in range(10, 70, 10):
        checkpoints.save(state(step), Progress(best_step=30))
    checkpoints.save(state(65), Progress(best_step=30))
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30, 60, 65]
    checkpoints.save(state(65).replace(stats={"mean": jnp.zeros((2, 2))}), Progress(best_step=30, finished=True))
    checkpoints.close()
    again = opened(folder, read_only=True)
    restored, progress = again.restore(65, shapes(state(0)))
    assert progress.finished and again.steps() == [20, 30, 60, 65] and not restored.stats["mean"].any()
    assert {key.split("/")[0] for key in paths.keys_below(folder.checkpoints)} == {"20", "30", "60", "65"}


def test_some_arrays_are_read_alone_and_with_other_shardings(folder):
    checkpoints = opened(folder)
    checkpoints.save(state(10), Progress())
    checkpoints.close()
    again = opened(folder, read_only=True)
    assert again.shapes(10, "params")["params"]["a"]["bias"].dtype == jnp.bfloat16
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = again.restore_part(10, {"params": {"a": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=here)}}})
    assert equal(found, {"params": {"a": {"kernel": state(10).params["a"]["kernel"]}}})
    with pytest.raises(RunError, match=r"checkpoints/10 cannot be read"):
        again.restore_part(10, {"params": {"a": {"kernel": jax.ShapeDtypeStruct((7, 4), jnp.float32, sharding=here)}, "none": here}})
    assert [problem for _, _, problem in again.check(10, 1 << 20)] == [None] * 10


def test_a_damaged_checkpoint_is_set_aside(folder):
    checkpoints = opened(folder)
    for step in (10, 20):
        checkpoints.save(state(step), Progress())
    checkpoints.close()
    damage_arrays(folder.checkpoints / "20")
    again = opened(folder)
    restored, _, problems = again.restore_latest(shapes(state(0)))
    assert equal(restored, state(10)) and len(problems) == 1 and "checkpoints/20 cannot be read" in problems[0]
    assert again.steps() == [10]
    again.save(state(20), Progress())
    again.close()
    assert opened(folder, read_only=True).steps() == [10, 20]


def damage_arrays(checkpoint):
    """Overwrite the middle of the largest file of a checkpoint, or of all of a bucket's objects of arrays."""
    files = [checkpoint / key for key in paths.keys_below(checkpoint) if "kernel/c" in key or "ocdbt" in key or "/d/" in key]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        file.write_bytes(bytes(content))


def test_the_manifest_metrics_and_children(folder):
    folder.write_config({"model": {"name": "x"}})
    run_id = folder.identify()
    folder.add_to_manifest("fallbacks", "one")
    folder.add_metrics(1, "train", {"loss": 0.5})
    folder.add_lines([(2, "train", {"loss": float("nan")}), (2, "validation", {"loss": 0.1}), (3, "train", {"loss": 0.2})])
    folder.rewind(2, 2, False)
    again = RunFolder(folder.path)
    assert again.config() == {"model": {"name": "x"}} and again.identify() == run_id and again.manifest()["fallbacks"] == ["one"]
    assert [(line["step"], line["split"]) for line in again.metrics()] == [(1, "train"), (2, "train"), (2, "validation")]
    child = RunFolder(folder.path / ".." / f"{folder.path.name}-child")
    child.write_config({})
    relative = paths.relative(child.path, folder.path)
    folder.add_child({"run": "/nowhere/x", "relative": relative, "id": child.identify(), "step": 2, "needed": True})
    assert folder.dependents() == [child.path] or str(folder.dependents()[0]).endswith("-child")
    folder.clear()
    assert not folder.config_file.exists() and child.config_file.exists()


def test_one_start_of_many_gets_the_lock(folder):
    locks, held, refused = [RunLock(folder) for _ in range(4)], [], []

    def attempt(lock):
        try:
            (held if lock.attempt() is None else refused).append(lock)
        except RunError:
            refused.append(lock)

    threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3
    held[0].start(lambda: None)
    held[0].release()
    assert not folder.lock_file.exists()


def test_a_silent_owner_on_another_machine_is_replaced_and_notices(folder):
    folder.path.mkdir(parents=True, exist_ok=True)
    theirs = Owner("theirs", host="elsewhere", pid=1, since="yesterday", path=str(folder.path))
    folder.lock_file.write_bytes(theirs.encode(0))
    lock = RunLock(folder, beat_seconds=0.1, silent_seconds=0.5)
    end = time.monotonic() + 20
    while (waits := lock.attempt()) is not None:
        assert "sign of life" in waits and time.monotonic() < end
        time.sleep(0.1)
    lock.start(lambda: None)
    folder.lock_file.write_bytes(theirs.encode(1))  # taken over, as this process was suspended
    while lock.lost is None and time.monotonic() < end:
        time.sleep(0.1)
    assert "was taken over by process 1 on elsewhere" in lock.lost
    lock.release()
    assert json.loads(folder.lock_file.read_bytes())["token"] == "theirs"
    assert lock_file.own_tokens.isdisjoint({"theirs"})


# Only in buckets

in_buckets = pytest.mark.parametrize("place", ["s3", "gs"], indirect=True)


@pytest.fixture
def proxy(place, bucket_servers):
    proxy = bucket_servers.s3 if place.startswith("s3") else bucket_servers.gcs
    yield proxy
    proxy.fault = lambda method, path: None


def some(what, number):
    """A fault of one of `number` writes."""
    count = [0]

    def fault(method, path):
        count[0] += method in ("PUT", "POST")
        return what if method in ("PUT", "POST") and count[0] % number == 0 else None

    return fault


@pytest.mark.buckets
@in_buckets
@pytest.mark.parametrize("what", ["503", "cut", "lose", 0.2])
def test_a_save_survives_requests_that_fail(folder, proxy, what):
    folder = RunFolder(folder.path / str(what))
    checkpoints = opened(folder)
    proxy.fault = some(what, 3)
    checkpoints.save(state(10), Progress(evaluated_at=10))
    checkpoints.close()
    proxy.fault = lambda method, path: None
    restored, progress, _ = opened(folder).restore_latest(shapes(state(0)))
    assert equal(restored, state(10)) and progress.evaluated_at == 10


@pytest.mark.buckets
@in_buckets
def test_a_save_that_fails_leaves_the_checkpoint_before_it(folder, proxy, monkeypatch):
    checkpoints = opened(folder)
    checkpoints.save(state(10), Progress())
    checkpoints.wait()
    monkeypatch.setattr(client, "_LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.5)
    proxy.fault = lambda method, path: "503" if "kernel" in path and method in ("PUT", "POST") else None
    with pytest.raises(SaveFailed, match=r"checkpoints/20 could not be saved"):
        checkpoints.save(state(20), Progress())
        checkpoints.wait()
    proxy.fault = lambda method, path: None
    assert checkpoints.steps() == [10]
    checkpoints.save(state(20), Progress())
    checkpoints.close()
    again = opened(folder)
    assert equal(again.restore(20, shapes(state(0)))[0], state(20)) and again.steps() == [10, 20]


@pytest.mark.buckets
@in_buckets
def test_a_process_that_was_replaced_completes_no_checkpoint(folder, proxy):
    """Its lock is taken over while it writes the arrays: no checkpoint.json of it appears, and it deletes nothing of its successor."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    assert lock.attempt() is None
    checkpoints = opened(folder, may_write=lock.check)
    checkpoints.save(state(10), Progress())
    checkpoints.wait()
    theirs = Owner("theirs", host="elsewhere", pid=1, since="yesterday", path=str(folder.path))

    def taken_over(method, path):
        if "kernel" in path and method in ("PUT", "POST"):
            proxy.fault = lambda method, path: None
            folder.lock_file.write_bytes(theirs.encode(0))
            (folder.checkpoints / "20" / "01234567" / "params" / "c" / "0").write_bytes(b"of a save that goes on")

    proxy.fault = taken_over
    with pytest.raises(SaveFailed, match=r"checkpoints/20 could not be saved: .*was taken over by process 1 on elsewhere"):
        checkpoints.save(state(20), Progress())
        checkpoints.wait()
    assert checkpoints.steps() == [10] and lock.lost is not None
    assert [key for key in paths.keys_below(folder.checkpoints / "20") if key.startswith("01234567")] == ["01234567/params/c/0"]
    lock.release()


@pytest.mark.faults
def test_a_process_that_was_replaced_completes_no_checkpoint_on_a_disk(tmp_path):
    """Its lock is taken over while Orbax writes: Orbax does not rename its folder, and it deletes nothing of its successor."""
    folder = RunFolder(tmp_path)
    lock = RunLock(folder)
    assert lock.attempt() is None
    theirs = Owner("theirs", host="elsewhere", pid=1, since="yesterday", path=str(folder.path))
    unfinished = folder.checkpoints / "20.orbax-checkpoint-tmp-theirs"

    def may_write():
        if (folder.checkpoints / "10").is_dir():
            folder.lock_file.write_bytes(theirs.encode(0))
            unfinished.mkdir(exist_ok=True)
        lock.check()

    checkpoints = opened(folder, may_write=may_write)
    checkpoints.save(state(10), Progress())
    checkpoints.wait()
    with pytest.raises(SaveFailed, match=r"checkpoints/20 could not be saved: .*was taken over by process 1 on elsewhere"):
        checkpoints.save(state(20), Progress())
        checkpoints.wait()
    assert opened(folder, read_only=True).steps() == [10] and unfinished.is_dir() and lock.lost is not None
    lock.release()


@pytest.mark.faults
def test_of_two_processes_that_save_one_step_on_a_disk_the_later_fails(tmp_path):
    """It was suspended in its look at the lock, right before Orbax renames."""
    folder = RunFolder(tmp_path)
    saving, waiting, go_on = threading.Event(), threading.Event(), threading.Event()
    first = opened(folder, may_write=lambda: saving.is_set() and (waiting.set(), go_on.wait(30)))
    second = opened(folder)
    saving.set()
    first.save(state(10), Progress(evaluated_at=1))
    assert waiting.wait(30)
    second.save(state(10), Progress(evaluated_at=2))
    second.wait()
    go_on.set()
    with pytest.raises(SaveFailed, match="checkpoints/10 could not be saved: No such file"):  # Orbax's folders for one step have one name
        first.wait()
    restored, progress = second.restore(10, shapes(state(0)))
    assert progress.evaluated_at == 2 and equal(restored, state(10))


@pytest.mark.buckets
@in_buckets
def test_of_two_processes_that_save_one_step_the_later_fails(folder, proxy):
    """It looked at the lock before the other took it over, and was suspended right before its last write."""
    first, second = opened(folder), opened(folder)
    waiting, go_on = threading.Event(), threading.Event()
    first._store._may_write = lambda: (waiting.set(), go_on.wait(30))
    first.save(state(10), Progress(evaluated_at=1))
    assert waiting.wait(30)
    second.save(state(10), Progress(evaluated_at=2))
    second.wait()
    go_on.set()
    with pytest.raises(SaveFailed, match=r"checkpoint.json was written by another process meanwhile"):
        first.wait()
    restored, progress = second.restore(10, shapes(state(0)))
    assert progress.evaluated_at == 2 and equal(restored, state(10))


@pytest.mark.buckets
@in_buckets
def test_what_a_killed_save_left_is_deleted(folder, proxy):
    checkpoints = opened(folder)
    checkpoints.save(state(10), Progress())
    checkpoints.close()
    (folder.checkpoints / "20" / "0123abcd" / "params" / "c" / "0").write_bytes(b"left")
    (folder.checkpoints / "10" / "0123abcd" / "params" / "c" / "0").write_bytes(b"left")
    assert opened(folder).steps() == [10]
    assert not any("0123abcd" in key for key in paths.keys_below(folder.checkpoints))
    assert equal(opened(folder).restore(10, shapes(state(0)))[0], state(10))


def checkpoints_of_a_disk(path):
    """Save checkpoints of steps 10 and 20 as Orbax writes them; step 10 is the best."""
    checkpoints = opened(RunFolder(path))
    for step in (10, 20):
        checkpoints.save(state(step), Progress(best_step=10))
    checkpoints.close()


@pytest.mark.buckets
@in_buckets
def test_checkpoints_of_a_disk_that_were_copied(folder, tmp_path):
    """Read, preserved and replaced as those that are written here; what replaces them is of the bucket's own format."""
    checkpoints_of_a_disk(tmp_path)
    paths.upload(tmp_path, folder.path)
    reader = opened(folder, read_only=True)
    assert reader.steps() == [10, 20] and reader.find("best") == 10
    assert reader.restore_part(20, {"params": shapes(state(0)).params})["params"]["a"]["bias"][0] == 20
    assert len([problem for *_, problem in reader.check(20, 1 << 20)]) > 5 and {problem for *_, problem in reader.check(20, 1 << 20)} == {None}
    reader.close()
    checkpoints = opened(folder)
    restored, _, problems = checkpoints.restore_latest(shapes(state(0)))
    assert equal(restored, state(20)) and problems == []
    checkpoints.save(state(20).replace(stats={"mean": jnp.zeros((2, 2))}), Progress(best_step=10))
    checkpoints.wait()
    assert not checkpoints.restore(20, shapes(state(0)))[0].stats["mean"].any() and equal(checkpoints.restore(10, shapes(state(0)))[0], state(10))
    assert len({key.split("/")[0] for key in paths.keys_below(folder.checkpoints / "20")}) == 2  # the index, and the attempt
    for step in (30, 40):
        checkpoints.save(state(step), Progress(best_step=10 if step == 30 else 40))
    checkpoints.close()
    again = opened(folder)
    assert again.steps() == [30, 40] and paths.keys_below(folder.checkpoints / "10") == []


@pytest.mark.buckets
@in_buckets
def test_a_damaged_copy_of_a_checkpoint_is_set_aside(folder, tmp_path):
    checkpoints_of_a_disk(tmp_path)
    (tmp_path / "checkpoints" / "20" / "state" / "manifest.ocdbt").write_bytes(b"")
    paths.upload(tmp_path, folder.path)
    checkpoints = opened(folder)
    restored, _, (problem,) = checkpoints.restore_latest(shapes(state(0)))
    assert equal(restored, state(10)) and "checkpoints/20 cannot be read" in problem and checkpoints.steps() == [10]
    assert (folder.checkpoints / "20" / "unreadable.json").is_file()


@pytest.mark.buckets
@in_buckets
@pytest.mark.parametrize("of_a_disk", [False, True])
def test_a_checkpoint_that_is_moved_is_whole_at_one_place_at_least(of_a_disk, folder, tmp_path, monkeypatch):
    """At each request of the move, the process dies: the same call then moves the rest."""
    if of_a_disk:
        checkpoints_of_a_disk(tmp_path)
        paths.upload(tmp_path, folder.path / "2")
    else:
        checkpoints = opened(RunFolder(folder.path / "1"))
        checkpoints.save(state(20), Progress())
        checkpoints.close()
    place, to = folder.path / str(1 + of_a_disk) / "checkpoints" / "20", folder.path / f"aside{of_a_disk}" / "checkpoints" / "20"
    for requests in range(1000):
        left = [requests]
        with monkeypatch.context() as patch:
            for name in ("write_bytes", "unlink"):
                patch.setattr(paths.BucketPath, name, _dying(getattr(paths.BucketPath, name), left))
            try:
                bucket_store.move(place, to)
                break
            except KeyboardInterrupt:
                pass
        whole = [at for at in (place, to) if 20 in bucket_store.saved_steps(at.parent)]
        assert whole and (requests % 7 or equal(opened(RunFolder(whole[0].parent.parent), read_only=True).restore(20, shapes(state(0)))[0], state(20)))
    assert requests > 5 and bucket_store.saved_steps(place.parent) == ([10] if of_a_disk else []) and bucket_store.saved_steps(to.parent) == [20]


def _dying(method, left):
    """Return a method that raises once the counter `left` is at 0."""

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    return call


def test_a_run_of_a_disk_in_the_format_of_buckets_and_orbax(tmp_path):
    """A run that moved to a bucket, went on there, and was copied back."""
    checkpoints_of_a_disk(tmp_path)
    folder = RunFolder(tmp_path)
    checkpoints = opened(folder, keep=3)
    checkpoints._store = bucket_store.BucketStore(folder.checkpoints, checkpoints._policy, read_only=False, at_once=1 << 20)
    checkpoints.save(state(30), Progress())
    checkpoints.close()
    again = opened(folder, keep=3)
    assert again.steps() == [10, 20, 30]
    for step in (10, 20, 30):
        assert equal(again.restore(step, shapes(state(0)))[0], state(step))


def test_a_copy_of_a_bucket_on_a_disk_is_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    store = bucket_store.BucketStore(folder.checkpoints, opened(folder)._policy, read_only=False, at_once=1 << 20)
    store.save(10, {"params": state(10).params}, {})
    assert store.steps() == [10]
    again = Checkpoints(folder.checkpoints, read_only=True)
    assert again.steps() == [10] and again.shapes(10, "params")["params"]["a"]["kernel"].shape == (6, 4)


def test_a_compressed_checkpoint_of_every_type_is_read_on_one_device_and_on_several(tmp_path):
    """As Orbax writes it by default, and as this package wrote it before; a type of less than a byte and random keys are not read in place."""
    names = ("bool", "int8", "uint16", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn", "complex64", "int4")
    saved = {name: jnp.arange(12).reshape(4, 3).astype(name) for name in names} | {"keys": jax.random.split(jax.random.key(1), 4)}
    checkpointer = ocp.CheckpointManager(tmp_path, item_names=("state", "progress"))
    checkpointer.save(10, args=ocp.args.Composite(state=ocp.args.PyTreeSave({"params": saved}), progress=ocp.args.JsonSave({})))
    checkpointer.close()
    store = OrbaxStore(tmp_path, None, read_only=True, at_once=None)
    mesh = jax.make_mesh((1,), ("data",))
    for sharding in (jax.sharding.SingleDeviceSharding(jax.devices()[0]), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))):
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in saved.items()}
        found = store.read(10, {"params": wanted})["params"]
        assert jnp.array_equal(jax.random.key_data(found.pop("keys")), jax.random.key_data(saved["keys"]))
        assert all(found[name].sharding == sharding and found[name].dtype == saved[name].dtype for name in names)
        assert all(np.array_equal(found[name], saved[name]) for name in names)
    as_float = store.read(10, {"params": {"bfloat16": jax.ShapeDtypeStruct((4, 3), jnp.float32)}}, partial=True)["params"]["bfloat16"]
    assert as_float.dtype == jnp.float32 and np.array_equal(as_float, saved["float32"])
    with pytest.raises(RunError, match="it has an array params.bfloat16, which this state has not"):
        store.read(10, {"params": {name: wanted[name] for name in wanted if name != "bfloat16"}})
    with pytest.raises(RunError, match="it has no array params/other"):
        store.read(10, {"params": {"other": wanted["int8"]}}, partial=True)
    store.close()


def test_a_step_reuses_the_memory_of_a_restored_state(folder):
    checkpoints = opened(folder)
    big = state(10).replace(params={"a": jnp.arange(100_000.0)})
    checkpoints.save(big, Progress())
    checkpoints.close()
    found = opened(folder, read_only=True).restore(10, shapes(big))[0].params["a"]
    place = found.unsafe_buffer_pointer()
    assert np.array_equal(found, big.params["a"])
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(found).unsafe_buffer_pointer() == place
