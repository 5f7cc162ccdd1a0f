"""The train steps of large models, compiled for 64 absent TPU chips: they fit, and have the expected collectives.

    JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 pytest -m tpu_compiler -n 0 -s tests/plan/test_tpu_compiler.py

It needs `pip install 'jaxmodels[plan]'`, and prints a line of figures for each. JAX defines the variable: with it the compiler optimizes less
for speed and takes a third of the time, which changes the memory a little; without it, the programs are those of a real run.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

import jax
import pytest
from conftest import ROOT

from jaxmodels.config import load_config
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import topologies
from jaxmodels.hardware.flops import count_flops
from jaxmodels.models.functional import flatten
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import compiler

pytestmark = pytest.mark.tpu_compiler
pytest.importorskip("libtpu")

TOPOLOGIES = ("v5p:4x4x4", "v6e:8x8")
CONFIGS = ("gpt2_xl", "llama3_8b:64", "llama3_8b:tensor", "llama3_8b:128k", "mixtral_8x7b:expert", "resnet50", "bert_large")
FULLY_SHARDED = ("gpt2_xl", "llama3_8b:64", "llama3_8b:tensor", "llama3_8b:128k", "mixtral_8x7b:expert")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      sizes: numbers of values of its results (for a reduce-scatter written as an all-reduce: before slicing).
      loop: whether it is in the body of a loop.
    """

    kind: str
    sizes: tuple[int, ...]
    loop: bool


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one compiled step.

    Attributes:
      memory: as `compiler.memory` returns.
      state: its bytes on a device.
      collectives: between two devices or more.
      carried: for each loop, the number of carried arrays by their dimensions in ascending order.
      matrices: of blocks, by path: the shapes that a device stores and those that it multiplies with, for all layers.
    """

    memory: dict
    state: int
    collectives: list[Collective]
    carried: list[collections.Counter]
    matrices: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@functools.cache
def compiled(name: str, topology: str) -> Figures:
    """Compile the step of `configs/NAME.py[:VARIANT]`, and print its figures."""
    file, _, variant = name.partition(":")
    experiment = build_experiment(load_config(f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else "")))
    step = compiler.compile_step(experiment, topology)
    memory = compiler.memory(step.compiled)
    batch = experiment.batch_shapes(experiment.loading.batch_size)
    flops = count_flops(step.experiment.step_function(), step.shapes, batch, jax.eval_shape(lambda: jax.random.key(0)))
    rows = " × ".join(str(n) for n in (experiment.loading.batch_size, *next(batch[key] for key in ("tokens", "image") if key in batch).shape[1:]))
    mesh = {axis: size for axis, size in step.mesh.shape.items() if size > 1}
    shown = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    parts = ", ".join(f"{part} {memory[part] / 1e9:.2f}" for part in ("arguments", "temporaries"))
    print(
        f"\n{name} | {topology} | {shown} | batch {rows} | {memory['total'] / 1e9:.2f} GB a device ({parts}) | {flops:.3g} FLOPs a step, "
        f"{flops / step.mesh.size:.3g} a device | "
        f"compiled in {step.record.seconds:.0f} s | {step.experiment.kernels.get('attention', {}).get('used', '')} {list(step.layout.left_whole) or ''}",
        flush=True,
    )
    params = {path: x for path, x in flatten(step.shapes.params).items() if path.startswith("blocks/") and math.prod(x.shape) >= 2**20}
    matrices = {path: (x.sharding.shard_shape(x.shape), multiplied(path, x)) for path, x in params.items()}
    return Figures(memory, mesh_lib.bytes_per_device(step.shapes), collectives(step.text), carried(step.text), matrices)


def multiplied(path: str, x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Return the shape of a parameter that a device multiplies with: sharded only over `tensor`, and for experts over `expert`."""
    apart = {"tensor"} | ({"expert"} if "/experts/" in path else set())
    spec = [(axes,) if isinstance(axes, str) else axes or () for axes in x.sharding.spec]
    return tuple(n // math.prod(x.sharding.mesh.shape[axis] for axis in apart & set(axes)) for n, axes in itertools.zip_longest(x.shape, spec, fillvalue=()))


def shapes_of(types: str) -> list[tuple[int, ...]]:
    """Return the sizes of the arrays in the text of a type."""
    shapes = re.findall(r"(?:bf16|f32|s32|u32|pred|s8|u8)\[([\d,]*)\]", types)
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def carried(program: str) -> list[collections.Counter]:
    return [
        collections.Counter(tuple(sorted(shape)) for shape in shapes_of(types))
        for types in re.findall(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*\)) while\(", program, re.MULTILINE)
    ]


def collectives(program: str) -> list[Collective]:
    """Return the collectives of a TPU program's text."""
    computations, name = {}, None
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    called = {
        name: set(re.findall(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)", "\n".join(lines)))
        for name, lines in computations.items()
    }
    inside, new = set(), set(re.findall(r"body=%?([\w.\-]+)", program))
    while new:
        inside |= new
        new = set().union(*(called.get(name, set()) for name in new)) - inside
    found = []
    pattern = r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
    for name, lines in computations.items():
        for line in lines:
            match = re.match(pattern, line)
            # A group of one device sends nothing.
            if match is None or re.search(r"replica_groups=\{\{\d+\}[,}]", line):
                continue
            # On TPUs a reduce-scatter may be a computation around an all-reduce.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
            found.append(Collective(kind, tuple(map(math.prod, shapes_of(match[1]))), name in inside))
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_compiles_and_fits(name, topology):
    figures = compiled(name, topology)
    assert figures.memory["total"] < topologies.parse(topology).chip.memory_per_device
    # The arguments are the sharded state and a batch.
    assert figures.state <= figures.memory["arguments"] < 1.1 * figures.state + 64e6
    # The new state replaces the old one in place.
    assert figures.memory["aliased"] >= 0.99 * figures.state


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", FULLY_SHARDED)
def test_parameters_are_gathered_layer_by_layer_and_gradients_scattered_likewise(name, topology):
    """The compiler chooses how. It gathers by an all-gather, or by a sum of zero-padded shards. It scatters by a reduce-scatter, by sending
    shards during a matrix product, or by an all-reduce and a slice. In each case a loop that returns gradients layer by layer carries the
    shards of all parameters and as many shards of gradients, but no stack of unsharded ones."""
    figures = compiled(name, topology)

    def sizes(kind, loop):
        return {size for c in figures.collectives if c.kind == kind and c.loop == loop for size in c.sizes}

    gathered = sizes("all-gather", True) | sizes("all-reduce", True)
    for path, (_, stack) in figures.matrices.items():
        assert math.prod(stack[1:]) in gathered, f"{path} {stack} is not gathered in the loop over layers"
        assert math.prod(stack) not in sizes("all-gather", False), f"{path} {stack} is gathered for all layers at once"
        assert not any(tuple(sorted(stack)) in loop for loop in figures.carried), f"{path} {stack}, or its gradient, is whole in a loop over layers"
    for share, count in collections.Counter(tuple(sorted(share)) for share, _ in figures.matrices.values()).items():
        most = max(loop[share] for loop in figures.carried)
        assert most >= 2 * count, f"a loop has {most} shares {share}, for {count} parameters and as many gradients"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_only_tokens_of_experts_use_all_to_all(name, topology):
    found = [c for c in compiled(name, topology).collectives if "all-to-all" in c.kind]
    assert not found or name.startswith("mixtral"), found
