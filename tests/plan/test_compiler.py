"""Meshes that cover a topology, and compilers that are missing."""

import jax
import jax.numpy as jnp
import pytest
import small_configs

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import compiler


@pytest.mark.parametrize(
    "mesh, name, message",
    [
        ({"data": 8}, "v5e:2x2", "v5e:2x2 has 4 devices.* one of these fits: --config.mesh.data=4"),
        ({"data": 1, "fsdp": 3}, "v5e:2x2", "--config.mesh.fsdp=4"),
        ({"slices": 2}, "v5e:2x2", "config.mesh.slices=2, but --topology=v5e:2x2 is 1 slice: --config.mesh.slices=1"),
        ({}, "4xv5e:2x2", "--topology=4xv5e:2x2 is 4 slices: --config.mesh.slices=4"),
    ],
)
def test_a_mesh_that_does_not_cover_the_topology(mesh, name, message):
    sizes = mesh_lib.MeshSizes(**mesh)
    compiler.check_mesh(mesh_lib.MeshSizes(slices=topologies.parse(name).slices), topologies.parse(name))
    with pytest.raises(ConfigError, match=message):
        compiler.check_mesh(sizes, topologies.parse(name))


def test_without_libtpu_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxmodels\[plan\]'"):
        compiler.compile_step(build_experiment(small_configs.config(small_configs.CNN)), "v5e:2x2")


def test_pmap_needs_present_devices():
    with pytest.raises(ConfigError, match="partition=jit"):
        compiler.compile_step(build_experiment(small_configs.config(small_configs.CNN, partition="pmap")), "v5e:2x2")


def test_memory_of_a_compiled_function():
    compiled = jax.jit(lambda x, y: (x @ y, y), donate_argnums=1).lower(*(jax.ShapeDtypeStruct((256, 256), jnp.float32) for _ in range(2))).compile()
    found = compiler.memory(compiled)
    assert (found["arguments"], found["outputs"], found["aliased"]) == (2 * 2**18, pytest.approx(2 * 2**18, abs=64), 2**18)
    assert found["total"] == found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
