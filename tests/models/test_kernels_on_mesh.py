"""Code under `shard_map`, which the compiler cannot shard: ring attention, and kernels on each device's shard."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import warm_python
from conftest import HELPERS
from jax.sharding import AbstractMesh, AxisType

from jaxmodels.models.attention import attend
from jaxmodels.parallel.layout import Layout, use
from jaxmodels.parallel.mesh import MeshSizes, mesh_shape

ROOT = Path(__file__).parent.parent


def on_mesh(*arguments: str) -> dict:
    done = warm_python.run([HELPERS / "kernels_on_mesh.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict:
    return on_mesh()


def assert_as_on_one_device(cases: dict) -> None:
    # Results and gradients, relative to the largest: float32 sums of up to 512 numbers.
    assert cases
    for case, differences in cases.items():
        assert max(differences) < 5e-6, (case, differences)


@pytest.mark.parametrize("how", ["ring", "heads", "splash", "lstm"])
def test_sharded_kernels_equal_one_device(found, how):
    assert_as_on_one_device(found[how])


@pytest.mark.slow
def test_rarer_cases_equal_one_device():
    """pytest -m slow tests/models/test_kernels_on_mesh.py"""
    for cases in on_mesh("more").values():
        assert_as_on_one_device(cases)


def test_a_ring_sends_keys_and_gathers_nothing(found):
    # Forward: keys and values. Backward: these and their gradients; and the gradients once more, in the last turn, back to their device.
    assert found["collectives"]["ring"] == {"collective-permute": 2 + 4 + 2 + 2}


def test_heads_are_exchanged_and_nothing_is_gathered(found):
    # Forward: queries, keys and values to the devices of their heads, and the result back. Backward: the reverse.
    assert found["collectives"]["heads"] == {"all-to-all": 4 + 4}


def test_the_memory_of_a_ring_grows_as_the_sequence_does(found):
    once, twice = found["temporaries"]
    products = 2 * 512 * 512 * 4  # scores of a device's queries with the keys of one turn: two heads, float32
    assert once < products and twice < 2.1 * once


def test_no_mask_of_all_turns_is_made_before_a_loop_over_layers():
    shape = mesh_shape(MeshSizes(data=1, context=8), 8)
    layout = Layout(AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)), context="ring")
    x = jax.ShapeDtypeStruct((1, 8 * 64, 2, 4), jnp.float32)

    def loss(x, scales):
        with use(layout):
            return jax.lax.scan(lambda x, scale: (attend(x * scale, x, x, causal=True, implementation="xla"), None), x, scales)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(x, jnp.ones(3)))
    assert re.search(r"f32\[[\d,]*64,64\]", program), "products of a block are there"
    # Seven turns in a loop, and the last one. None saves an array larger than its queries and keys.
    assert not re.search(r"\[7,[\d,]*64,64\]", program)
