"""Absent GPUs: the time of a step from its shapes, and from an optimized program, against closed forms."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
import small_configs
from conftest import ROOT

from jaxmodels.cli import plan_files
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.hardware.chips import CHIPS
from jaxmodels.hardware.flops import count_flops
from jaxmodels.models.attention import attend
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan import compiler, cost, counts, hlo, roofline
from jaxmodels.plan import plan as plan_lib
from jaxmodels.plan import trace as trace_lib
from jaxmodels.plan.cost import PARTS
from jaxmodels.plan.estimate import estimate

H100, V5P = CHIPS["h100"], CHIPS["v5p"]
AXES = ("slices", "pipeline", "data", "fsdp", "expert", "context", "tensor")
# Widths that every axis divides, and a vocabulary with negligible work.
WIDTH, LAYERS, TIME, BATCH = 32, 2, 16, 32
GPT = small_configs.config(
    small_configs.GPT, model__width=WIDTH, model__heads=4, model__dropout=0.0, data__batch_size=BATCH, training__precision="bfloat16", optimizer__clip_norm=None
)


def of_function(function, *args, chip=H100, mesh=None):
    """Return the work of a function with replicated arguments."""
    mesh = mesh or dict.fromkeys(AXES, 1)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in args]
    graph = trace_lib.build(jax.make_jaxpr(function)(*args), [((),) * len(x.shape) for x in args], mesh, "tpu")
    return roofline.graph_work(graph, mesh, chip)


def of_step(experiment, devices: int) -> roofline.Work:
    """Return the work of a device in a train step on GPUs."""
    step = roofline.trace(experiment, devices, H100)
    return roofline.graph_work(step.graph, step.mesh, H100)


def sizes(**axes) -> dict:
    return {axis: axes.get(axis, 1) for axis in AXES}


def collectives(**mesh) -> dict[tuple[str, tuple[str, ...]], int]:
    """Return the bytes of collectives by kind and axes, without those of few values (norms, losses, biases)."""
    experiment = build_experiment(small_configs.config(GPT, mesh=sizes(data=1) | mesh))
    work = of_step(experiment, math.prod(mesh.values()))
    found: dict = {}
    for each in work.collectives:
        if each.bytes >= 2 * WIDTH * WIDTH // math.prod(mesh.values()):
            found[each.kind, each.axes] = found.get((each.kind, each.axes), 0) + each.count * each.bytes
    return found


def test_time_of_a_lone_product_is_its_closed_form():
    m, k, n = 4096, 2048, 8192
    flops, moved = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    for chip in (H100, V5P):
        work = of_function(lambda a, b: a @ b, ((m, k), jnp.bfloat16), ((k, n), jnp.bfloat16), chip=chip)
        seconds = work.computing["matrix products"]
        assert work.flops == flops and seconds.low == pytest.approx(flops / chip.flops_per_second)
        assert seconds.high == pytest.approx(flops / chip.flops_per_second + moved / chip.memory_bandwidth)
        assert work.now == pytest.approx(seconds.mean) and not work.collectives
    wide = of_function(lambda a, b: a @ b, ((m, k), jnp.float32), ((k, n), jnp.float32))
    assert wide.computing["matrix products"].low == pytest.approx(2 * flops / H100.flops_per_second)


def test_the_time_of_elementwise_operations_is_that_of_their_bytes():
    x = ((1 << 20, 8), jnp.float32)
    array = 4 * (8 << 20) / H100.memory_bandwidth
    work = of_function(lambda x, y: jnp.tanh(x * 2 + y) - 1, x, x)
    assert work.now == work.computing["other"].high == pytest.approx(3 * array)
    # Two results with the same operand read it once.
    assert of_function(lambda x: (jnp.exp(x), x + 1), x).now == pytest.approx(3 * array)
    assert of_function(lambda x: jax.lax.scan(lambda c, _: (c + 1, None), x, None, length=5)[0], x).now == pytest.approx(5 * 2 * array)


@pytest.mark.parametrize("window, blocks, pairs", [(None, 10, 4096 * 4097 // 2), (1500, 9, 4096 * 1500 - 1500 * 1499 // 2)])
def test_attention_computes_only_unmasked_scores(window, blocks, pairs):
    """On a TPU by blocks of 1,024: 4 × 4 for each of 12 heads in 3 rows. On a GPU by pairs of queries and keys."""

    def loss(q, k, v):
        return attend(q, k, v, causal=True, window=window, implementation="splash").astype(jnp.float32).sum()

    q, kv = ((3, 4096, 12, 128), jnp.bfloat16), ((3, 4096, 4, 128), jnp.bfloat16)
    heads, gradient = 3 * 12, jax.grad(loss, (0, 1, 2))
    for chip, scores, products, kernels in (
        (V5P, heads * blocks * 1024**2, 2 + 3 + 4, 3),
        (H100, heads * pairs, 2 + 5, 2),
    ):  # cuDNN computes all gradients in one kernel
        forward, both = (of_function(function, q, kv, kv, chip=chip).computing["attention kernels"] for function in (loss, gradient))
        matrix, vector = 2 * scores * 128 / chip.flops_per_second, 12 * scores / chip.vector_rate
        assert forward.low == pytest.approx(max(2 * matrix, vector)) and forward.high == pytest.approx(2 * matrix + vector)
        assert both.high == pytest.approx(products * matrix + kernels * vector)


@pytest.mark.parametrize(
    "base",
    [GPT, small_configs.config(GPT, model__scan=True, training__accumulate=2), small_configs.CNN, small_configs.LSTM],
    ids=["gpt", "scan", "cnn", "lstm"],
)
def test_flops_equal_counted_ones(base):
    experiment = build_experiment(base)
    work = of_step(experiment, 1)
    run = roofline.traceable(experiment, "gpu").on("tpu")
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = count_flops(run.step_function(), run.state_shapes(), run.batch_shapes(experiment.loading.batch_size), key)
    assert work.flops == pytest.approx(counted) and counted > 0


def test_shards_of_all_devices_add_up():
    one, many = (build_experiment(small_configs.config(GPT, mesh=sizes(data=n))) for n in (1, 8))
    found, on_tpu = (roofline.estimate_traced(roofline.trace(one, 1, place.chip), place) for place in (topologies.parse("h100x1"), topologies.parse("v5e:1x1")))
    parts = found.parts
    assert tuple(parts) == PARTS and found.low <= found.seconds <= found.high and found.seconds == pytest.approx(sum(parts.values()))
    assert all(parts[name] > 0 for name in PARTS[:3]) and parts["exposed collectives"] == 0
    assert of_step(many, 8).flops == pytest.approx(of_step(one, 1).flops / 8)
    assert on_tpu.seconds > 0 and on_tpu.cycles is None


def weights_of_blocks() -> int:
    return LAYERS * 12 * WIDTH**2


def test_data_parallelism_reduces_gradients():
    found = collectives(data=4)
    assert set(found) == {("all-reduce", ("data",))}
    vocabulary = build_experiment(GPT).dataset.info["vocab_size"]
    # In bfloat16, the type of products: the embedding, which is also the output and small here, in both uses; positions.
    low, high = 2 * weights_of_blocks(), 2 * weights_of_blocks() + 4 * 2 * (2 * vocabulary + TIME) * WIDTH
    assert low < found["all-reduce", ("data",)] <= high


def test_fsdp_gathers_parameters_and_scatters_gradients():
    found = collectives(fsdp=4)
    assert {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))} <= set(found)
    assert found["reduce-scatter", ("fsdp",)] == pytest.approx(2 * weights_of_blocks(), rel=0.35)
    # At least once; twice if the compiler gathers again for the backward pass.
    assert 2 * weights_of_blocks() <= found["all-gather", ("fsdp",)] <= 2 * 2 * weights_of_blocks() * 1.35


def test_tensor_parallelism_reduces_activations_four_times_a_layer():
    found = collectives(tensor=4)
    activations = 2 * BATCH * TIME * WIDTH
    blocks = 4 * LAYERS * activations
    assert blocks <= found["all-reduce", ("tensor",)] <= blocks + 4 * activations  # and the vocabulary's, where it divides


def test_networks_of_nodes_and_slices():
    mesh = sizes(slices=2, data=8)
    nodes, slices = topologies.parse("2xh100x8"), topologies.parse("2xv5p:2x2x2")
    size = 1e9

    def seconds(kind, axes, place):
        return cost.collective_seconds(kind, size, cost.group_along(axes, mesh, place), place)

    assert seconds("all-reduce", ("data",), nodes) == pytest.approx(2 * 7 / 8 * size / H100.link_bandwidth)
    assert seconds("all-reduce", ("slices",), nodes) == pytest.approx(size / H100.network_bandwidth)
    # A ring through both nodes uses all network adapters.
    assert seconds("all-reduce", ("slices", "data"), nodes) == pytest.approx(2 * 15 / 16 * size / (8 * H100.network_bandwidth))
    assert seconds("all-gather", ("slices",), slices) == pytest.approx(size / 2 / V5P.network_bandwidth)
    assert seconds("all-gather", ("data",), slices) == pytest.approx(7 / 8 * size / (3 * V5P.link_bandwidth))  # lines of two
    assert seconds("all-to-all", ("tensor",), nodes) == 0


# An optimized program of the GPU compiler, reduced to one instruction of each kind.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%added (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%picked (stack: f32[10,1024,1024], at: s32[]) -> f32[1024,1024] {
  %stack = f32[10,1024,1024]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,1024,1024]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %row = f32[1024,1024]{1,0} bitcast(%slice)
}

%body (carry: (s32[], f32[10,1024,1024])) -> (s32[], f32[10,1024,1024]) {
  %carry = (s32[], f32[10,1024,1024]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %rows = f32[10,1024,1024]{2,1,0} get-tuple-element(%carry), index=1
  %fusion = f32[1024,1024]{1,0} fusion(%rows, %i), kind=kLoop, calls=%picked
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %tuple = (s32[], f32[10,1024,1024]{2,1,0}) tuple(%next, %rows)
}

%condition (carry.1: (s32[], f32[10,1024,1024])) -> pred[] {
  %carry.1 = (s32[], f32[10,1024,1024]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %ten), direction=LT
}

ENTRY %main (x: bf16[4096,2048], w: bf16[2048,8192], image: bf16[64,28,28,128], kernel: bf16[256,3,3,128], q: bf16[8,1024,16,64], rows.1: f32[10,1024,1024]) -> bf16[4096,8192] {
  %x = bf16[4096,2048]{1,0} parameter(0)
  %w = bf16[2048,8192]{1,0} parameter(1)
  %image = bf16[64,28,28,128]{3,2,1,0} parameter(2)
  %kernel = bf16[256,3,3,128]{3,2,1,0} parameter(3)
  %q = bf16[8,1024,16,64]{3,2,1,0} parameter(4)
  %rows.1 = f32[10,1024,1024]{2,1,0} parameter(5)
  %product = (bf16[4096,8192]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}},"reification_cost":[COST]}
  %y = bf16[4096,8192]{1,0} get-tuple-element(%product), index=0
  %start = bf16[4096,8192]{1,0} all-reduce-start(%y), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true, to_apply=%added
  %conv = (bf16[64,28,28,256]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %attention = (bf16[8,16,1024,64]{3,1,2,0}, f32[8,16,1024]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["8","16","1024","1024"]},"mask_type":"CAUSAL"}}
  %done = bf16[4096,8192]{1,0} all-reduce-done(%start)
  %zero.1 = s32[] constant(0)
  %first = (s32[], f32[10,1024,1024]{2,1,0}) tuple(%zero.1, %rows.1)
  %loop = (s32[], f32[10,1024,1024]{2,1,0}) while(%first), condition=%condition, body=%body
  %gathered = bf16[8192,2048]{1,0} all-gather(%x), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}, use_global_device_ids=true
  ROOT %copy = bf16[4096,8192]{0,1} copy(%done)
}
"""


def test_a_program_is_read_by_kernels():
    mesh, h100 = sizes(data=2, tensor=2), topologies.parse("h100x4")
    found = estimate(PROGRAM.replace("COST", ""), h100, mesh)
    peak, memory = H100.flops_per_second, H100.memory_bandwidth
    product = 2 * 4096 * 2048 * 8192 / peak + 2 * (4096 * 2048 + 2048 * 8192 + 4096 * 8192) / memory / 2
    outputs = 64 * 28 * 28 * 256
    convolution = 2 * outputs * 9 * 128 / peak + 2 * (64 * 28 * 28 * 128 + 256 * 9 * 128 + outputs) / memory / 2
    assert found.parts["matrix products"] == pytest.approx(product + convolution)
    scores = 8 * 16 * 1024 * 1024 / 2
    units = 2 * 2 * scores * 64 / peak, 12 * scores / H100.vector_rate
    attention = (max(units) + sum(units)) / 2
    assert found.parts["attention kernels"] == pytest.approx(attention)
    turn = 2 * 4 * 1024 * 1024 / memory + cost.GPU_LAUNCH  # a row read and written, and the counter
    assert found.parts["other"] == pytest.approx(10 * turn + 2 * 2 * 4096 * 8192 / memory)
    reduced, gathered = found.collectives
    sent = 2 * 4096 * 8192 / H100.link_bandwidth
    assert (reduced.kind, reduced.axes, reduced.count, reduced.bytes, reduced.network) == ("all-reduce", ("data",), 1, 2 * 4096 * 8192, "links")
    assert reduced.seconds == pytest.approx(sent) and reduced.exposed_seconds == pytest.approx(max(0, sent - convolution - attention))
    assert (gathered.kind, gathered.axes, gathered.bytes) == ("all-gather", ("tensor",), 8192 * 2048)
    assert gathered.exposed_seconds == gathered.seconds == pytest.approx(8192 * 2048 / H100.link_bandwidth)
    (kernel,) = found.kernels
    assert (kernel.name, kernel.count, kernel.seconds) == ("cudnn$fmhaSoftmax", 1, pytest.approx(attention))
    assert found.seconds == pytest.approx(sum(found.parts.values())) and found.cycles is None and found.notes == []


def test_the_compilers_estimates_of_products_are_used():
    own = '{"end_to_end_cycles":0,"exec_time_us":250.5,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}'
    with_own, without = (estimate(PROGRAM.replace("COST", text), topologies.parse("h100x4"), sizes(data=2, tensor=2)) for text in (own, ""))
    product = cost.operation_seconds(H100, flops=2 * 4096 * 2048 * 8192, size=2 * (4096 * 2048 + 2048 * 8192 + 4096 * 8192)).mean
    assert with_own.parts["matrix products"] - without.parts["matrix products"] == pytest.approx(250.5e-6 - product)


def test_gradients_of_convolutions_have_as_many_flops():
    text = '%d = ({}, u8[0]{{0}}) custom-call(%a, %b), window={{size=3x3}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{}"'
    image, kernel, output = (f"bf16[{shape}]{{3,2,1,0}}" for shape in ("8,16,16,32", "64,3,3,32", "8,16,16,64"))
    expected = 2 * 8 * 16 * 16 * 64 * 9 * 32
    for which, result, a, b in (("Forward", output, image, kernel), ("BackwardInput", image, output, kernel), ("BackwardFilter", kernel, image, output)):
        program = hlo.parse(
            f"HloModule m\n\nENTRY %main (a: {a}, b: {b}) -> {result} {{\n  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n  ROOT {text.format(result, which)}\n}}\n"
        )
        call = program.entry.root
        operands = [program.entry.instructions[name] for name in call.operands]
        assert counts.convolution_flops(f"__cudnn$conv{which}", call, operands) == expected


KEYS = {"topology", "method", "step_seconds_method", "peak_bytes_per_device", "step_seconds", "cycles", "mfu", "model_flops_per_device", "collectives", "notes"}


def test_without_the_compiler_the_plan_is_analytic_with_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(absent, "has_compiler", lambda platform: False)
    file, where = tmp_path / "plan.json", topologies.parse("2xh100x8")
    experiment = build_experiment(small_configs.config(GPT, mesh=sizes(slices=2, data=2, fsdp=4)))
    plan_files.plan_and_write(experiment, where, {"json": str(file), "hlo": None, "save": None})
    page = json.loads(file.read_text())
    assert KEYS <= set(page) and page["method"] == page["step_seconds_method"] == "analytic" and page["cycles"] is None
    assert page["step_seconds"] == pytest.approx(sum(page["parts"].values())) and 0 < page["mfu"] < 1
    assert page["model_flops_per_device"] * 16 == page["model_flops_per_step"] > 0 and page["peak_bytes_per_device"] > 0
    assert {(each["kind"], *each["axes"]) for each in page["collectives"]} >= {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
    assert {each["network"] for each in page["collectives"] if "slices" in each["axes"]} == {"slices"}
    assert any("CUDA plugin" in note and "pip install" in note and plan_lib.MODELS_ARE_LOW in note for note in page["notes"])


def test_the_error_of_a_step_that_fits_no_gpu_states_what_to_change(monkeypatch):
    monkeypatch.setattr(absent, "has_compiler", lambda platform: False)
    tiny = dataclasses.replace(topologies.parse("h100x1"), chip=dataclasses.replace(H100, memory_bytes=2**16))
    with pytest.raises(compiler.DoesNotFit, match="does not fit h100x1.*Try ") as raised:
        plan_lib.make_plan(build_experiment(GPT), tiny)
    assert raised.value.needed > raised.value.available == 2**16


def test_a_step_that_needs_more_than_jax_allocates_has_a_note():
    available = topologies.parse("h100x8").chip.memory_per_device
    assert not plan_lib.gpu_memory_notes(59 * 10**9, available)
    (note,) = plan_lib.gpu_memory_notes(61 * 10**9, available)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in note


def test_sums_of_replicated_values_need_no_network():
    """As in the gradient of an operand that is replicated along an axis."""
    mesh, where = sizes(data=2, tensor=2), jax.sharding.PartitionSpec
    devices = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(jax.sharding.AxisType.Auto,) * len(mesh))

    def alike(x):
        return jax.shard_map(lambda x: jax.lax.psum(x / 2, "tensor"), mesh=devices, in_specs=where("data"), out_specs=where("data"), check_vma=False)(x)

    def apart(x):
        return jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=devices, in_specs=where("data"), out_specs=where(), check_vma=False)(x)

    assert not of_function(alike, ((8, 4), jnp.float32), mesh=mesh).collectives
    (found,) = of_function(apart, ((8, 4), jnp.float32), mesh=mesh).collectives
    assert (found.kind, found.axes, found.bytes) == ("all-reduce", ("data",), 4 * 4 * 4)


def test_the_error_of_an_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'h100x8'"):
        topologies.parse("h10x8")
    with pytest.raises(ConfigError, match="2xh100x8"):
        topologies.parse("h100x16")


def test_without_the_compiler_its_package_is_named(monkeypatch):
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="jax-cuda13-plugin=="):
        compiler.compile_step(build_experiment(GPT), topologies.parse("h100x1"))


@pytest.mark.skipif(not absent.has_compiler("gpu"), reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize("name", ["h100x8", "a100x8", "2xh200x8"])
def test_a_step_is_compiled_without_a_gpu(name):
    where = topologies.parse(name)
    experiment = build_experiment(small_configs.config(GPT, model__attention="xla", mesh=sizes(slices=where.slices, fsdp=8)))
    plan = plan_lib.make_plan(experiment, where)
    found, page = plan.time, plan.to_json()
    assert KEYS <= set(page) and page["method"] == page["step_seconds_method"] == "compiler" and page["cycles"] is None
    assert "__cublas" in plan.step.text and found.parts["matrix products"] > 0
    assert any((each.kind, each.axes) == ("all-gather", ("fsdp",)) for each in found.collectives)
    assert ('reification_cost":[{' in plan.step.text) == (name != "a100x8")
    state = sum(mesh_lib.bytes_per_device(getattr(plan.step.shapes, part)) for part in ("params", "opt_state", "ema"))
    assert plan.peak > state and page["compiler_options"]["xla_gpu_enable_triton_gemm"] is False
    tiny = dataclasses.replace(where, chip=dataclasses.replace(where.chip, memory_bytes=2**16))
    with pytest.raises(compiler.DoesNotFit, match="according to the compiler"):
        plan_lib.make_plan(experiment, tiny)


@pytest.fixture(scope="module")
def benchmark_script():
    """`benchmarks/plan_gpu.py`, which needs a GPU to run in full."""
    path = ROOT / "benchmarks" / "plan_gpu.py"
    spec = importlib.util.spec_from_file_location("plan_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_runs_a_step_and_its_plan(benchmark_script, capsys):
    config = benchmark_script.CONFIGS["gpt2"] | {"model": {"name": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 16, "attention": "xla"}}
    config["data"] = config["data"] | {"vocab_size": 64, "sequence_length": 16, "batch_size": 4}
    measured = benchmark_script.measure(config, 2)
    assert 0 < measured["step_seconds"] < 60 and set(measured) == set(benchmark_script.TARGETS)
    predicted = benchmark_script.predict(config, "h100x1")
    assert predicted["topology"] == "h100x1" and predicted["step_seconds"] > 0
    near = {figure: predicted[figure] * 1.04 for figure in benchmark_script.TARGETS}
    assert benchmark_script.compare("gpt2", predicted, near)
    assert not benchmark_script.compare("gpt2", predicted, near | {"peak_bytes_per_device": predicted["peak_bytes_per_device"] * 1.06})
    assert "MISSED: 5%" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_the_configs_of_the_benchmark_build(benchmark_script, name):
    experiment = build_experiment(benchmark_script.CONFIGS[name])
    assert experiment.mesh.data == -1 and experiment.training.precision == "bfloat16"
