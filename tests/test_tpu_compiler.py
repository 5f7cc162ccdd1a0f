"""The train steps of large models, compiled for 64 TPU chips that are not here: they fit, and send what they should.

    JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 pytest -m tpu_compiler -n 0 -s tests/test_tpu_compiler.py

It needs `pip install 'jaxmodels[plan]'`, and prints a line of figures for each. The variable is JAX's own: the compiler then tries less
for speed and takes a third of the time, which changes the memory a little; without it, the programs are those of a real run.
"""

import dataclasses
import functools
import math
import re

import jax
import pytest
from conftest import ROOT

from jaxmodels.config import load_config
from jaxmodels.experiment import build_experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import topology as topology_lib
from jaxmodels.plan.flops import count_flops
from jaxmodels.training.step import flatten

pytestmark = pytest.mark.tpu_compiler
pytest.importorskip("libtpu")

TOPOLOGIES = ("v5p:4x4x4", "v6e:8x8")
CONFIGS = ("gpt2_xl", "llama3_8b:64", "llama3_8b:tensor", "llama3_8b:128k", "mixtral_8x7b:expert", "resnet50", "bert_large")
FULLY_SHARDED = ("gpt2_xl", "llama3_8b:64", "llama3_8b:tensor", "llama3_8b:128k", "mixtral_8x7b:expert")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`.
      sizes: numbers of values of its results (of an all-reduce that a reduce-scatter is made of: before it is cut).
      loop: whether it is in the body of a loop.
      name: of the operation in the model that it comes from.
    """

    kind: str
    sizes: tuple[int, ...]
    loop: bool
    name: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is said of one compiled step."""

    memory: dict
    state: int
    collectives: list[Collective]
    matrices: dict[str, tuple[int, ...]]
    layers: int
    mesh: dict[str, int]


@functools.cache
def compiled(name: str, topology: str) -> Figures:
    """Compiles the step of `configs/NAME.py[:VARIANT]`, and prints its line."""
    file, _, variant = name.partition(":")
    experiment = build_experiment(load_config(f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else "")))
    step = topology_lib.compile_step(experiment, topology)
    memory, cost = topology_lib.memory(step.compiled), topology_lib.cost(step.compiled)
    batch = experiment.batch_shapes(experiment.loading.batch_size)
    flops = count_flops(step.experiment.step_function(), step.shapes, batch, jax.eval_shape(lambda: jax.random.key(0)))
    rows = " × ".join(str(n) for n in (experiment.loading.batch_size, *next(batch[key] for key in ("tokens", "image") if key in batch).shape[1:]))
    mesh = {axis: size for axis, size in step.mesh.shape.items() if size > 1}
    shown = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    parts = ", ".join(f"{part} {memory[part] / 1e9:.2f}" for part in ("arguments", "temporaries"))
    print(
        f"\n{name} | {topology} | {shown} | batch {rows} | {memory['total'] / 1e9:.2f} GB a device ({parts}) | {flops:.3g} FLOPs a step, "
        f"{flops / step.mesh.size:.3g} a device | compiler's count, loop bodies once: {cost['flops']:.3g} FLOPs, {cost['bytes'] / 1e9:.1f} GB | "
        f"compiled in {step.record.seconds:.0f} s | {step.experiment.kernels.get('attention', {}).get('used', '')} {list(step.layout.left_whole) or ''}",
        flush=True,
    )
    params = flatten(step.shapes.params)
    matrices = {path: x.shape for path, x in params.items() if path.startswith("blocks/") and math.prod(x.shape) >= 2**20}
    layers = experiment.config["model"].get("layers", 0)
    return Figures(memory, mesh_lib.bytes_per_device(step.shapes), collectives(step.text), matrices, layers, dict(step.mesh.shape))


def collectives(program: str) -> list[Collective]:
    """Those of a TPU program as text, between two devices or more."""
    computations, name = {}, None
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    called = {name: set(re.findall(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)", "\n".join(lines))) for name, lines in computations.items()}
    inside, new = set(), set(re.findall(r"body=%?([\w.\-]+)", program))
    while new:
        inside |= new
        new = set().union(*(called.get(name, set()) for name in new)) - inside
    found = []
    pattern = r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
    for name, lines in computations.items():
        for line in lines:
            match = re.match(pattern, line)
            # In a group of one device there is nothing to send.
            if match is None or re.search(r"replica_groups=\{\{\d+\}[,}]", line):
                continue
            # On TPUs a reduce-scatter may be a computation around an all-reduce.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
            shapes = re.findall(r"(?:bf16|f32|s32|u32|pred|s8|u8)\[([\d,]*)\]", match[1])
            sizes = tuple(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
            operation = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(kind, sizes, name in inside, operation[1] if operation else ""))
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_compiles_and_fits(name, topology):
    figures = compiled(name, topology)
    assert figures.memory["total"] < topology_lib.parse(topology).chip.memory_per_device
    # What it is given is the state, in its shares, and a batch.
    assert figures.state <= figures.memory["arguments"] < 1.1 * figures.state + 64e6
    # The new state takes the old one's place.
    assert figures.memory["aliased"] >= 0.99 * figures.state


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", FULLY_SHARDED)
def test_parameters_come_together_layer_by_layer_and_gradients_go_apart_likewise(name, topology):
    """How, is the compiler's choice: it gathers as such, or as a sum of parts in zeros; and it scatters a sum as such, by passing parts
    on beside a matrix product, or, where the sum is over every chip there is, by making it whole and cutting the share out of it."""
    figures = compiled(name, topology)

    def sizes(kind, loop):
        return {size for c in figures.collectives if c.kind == kind and c.loop == loop for size in c.sizes}

    gathered, summed = sizes("all-gather", True) | sizes("all-reduce", True), sizes("all-reduce", True)
    scattered, passed = sizes("reduce-scatter", True), sizes("collective-permute", True)
    for path, shape in figures.matrices.items():
        ways = (figures.mesh["expert"] if "/experts/" in path else 1) * (1 if "router" in path else figures.mesh["tensor"])
        one = math.prod(shape) // figures.layers // ways  # of one layer, what one device multiplies with
        assert one in gathered, f"{path} {shape} is not gathered in the loop over layers"
        assert math.prod(shape) // ways not in sizes("all-gather", False), f"{path} {shape} is gathered for all layers at once"
        share = one / figures.mesh["fsdp"]
        # Shares that do not fill a tile are padded: by a fifth at most here.
        by_scatter = any(size <= found <= 1.25 * size for found in scattered for size in (one, share))
        by_passing = any(share <= found <= 1.25 * share for found in passed)
        by_cutting = one in summed and figures.mesh["fsdp"] * figures.mesh["context"] * figures.mesh["expert"] == math.prod(figures.mesh.values())
        assert by_scatter or by_passing or by_cutting, f"the gradient of {path} {shape} does not become shares in the loop over layers"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_goes_from_all_to_all_but_tokens_to_their_experts(name, topology):
    found = [c for c in compiled(name, topology).collectives if "all-to-all" in c.kind]
    assert not found or name.startswith("mixtral"), found
