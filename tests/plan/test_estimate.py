"""The predicted time of a compiled TPU step: from texts of programs, and from programs compiled here for absent TPUs.

pytest -m tpu_compiler -n 0 -s tests/plan/test_estimate.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodels.config import load_config
from jaxmodels.errors import RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.hardware.chips import CHIPS, chip_of
from jaxmodels.models import fused, grouped
from jaxmodels.models.attention import attend
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.plan import cost, hlo
from jaxmodels.plan.cost import PARTS, Group
from jaxmodels.plan.estimate import estimate
from jaxmodels.plan.plan import make_plan

v5p, v5e = CHIPS["v5p"], CHIPS["v5e"]


def read(text: str, name: str = "v5p:2x2x2", **axes: int):
    """Return an estimate, by default for eight chips in a cube."""
    return estimate(text, topologies.parse(name), axes or {"data": 2, "fsdp": 4})


def cycles(number: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


def program(body: str, others: str = "") -> str:
    return f"HloModule jit_step, is_scheduled=true\n\n{others}\nENTRY %main (param.0: bf16[1024,2048]) -> f32[] {{\n{body}\n}}\n"


# Programs


def test_instructions_are_all_read():
    text = program(
        "  %param.0 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)\n"
        '  %k.1 = (f32[4]{0}, /*index=1*/bf16[2,2]{1,0:T(8,128)S(1)}) custom-call(%param.0, /*index=1*/%param.0), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="a=(b[{"}, backend_config={"a":{"b":["}"]}}\n'
        "  ROOT %gte = f32[4]{0} get-tuple-element(%k.1), index=0",
        '%called (p: f32[]) -> f32[] {\n  ROOT %p = f32[]{:T(128)} parameter(0)\n}, execution_thread="sparsecore"\n',
    )
    read = hlo.parse(text)
    kernel = read.entry.instructions["k.1"]
    assert list(read.computations) == ["called", "main"] and list(read.entry.instructions) == ["param.0", "k.1", "gte"]
    assert kernel.operands == ("param.0", "param.0") and kernel.opcode == "custom-call" and kernel.config == {"a": {"b": ["}"]}}
    assert kernel.bytes == 4 * 4 + 2 * 4 and [str(array) for array in hlo.arrays(kernel.shape)] == ["f32[4]", "bf16[2,2]"]
    assert kernel.attribute("custom_call_target") == "tpu_custom_call" and read.entry.root.name == "gte"


@pytest.mark.parametrize(
    "text, message",
    [
        ("HloModule x\n", "no ENTRY"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] add(%c, %d\n}\n", "unbalanced brackets"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] something\n}\n", "unknown form"),
        ("%a () -> f32[] {\n  %b = f32[] parameter(0)\nENTRY %c () -> f32[] {\n}\n", "without an end"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] add(%c), backend_config={oh}\n}\n", "invalid backend_config of b"),
    ],
)
def test_a_truncated_or_unknown_text_is_an_error(text, message):
    with pytest.raises(RunError, match=message):
        hlo.parse(text)


def loop(condition: str, init: str, step: str, config: str = "") -> str:
    """A loop of 1,000 cycles per iteration; element 0 of its tuple is the counter, element 1 is constant."""
    return program(
        f"  %init = s32[] constant({init})\n  %bound = s32[] constant(40)\n  %cycled = s32[] copy(%init), {cycles(7)}\n"
        "  %start = (s32[], s32[]) tuple(%init, %bound)\n"
        f"  ROOT %while.1 = (s32[], s32[]) while(%start), condition=%cond, body=%body{config}",
        f"%inside (a: s32[], b: s32[]) -> s32[] {{\n  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n  ROOT %sum = s32[] add(%b, %a)\n}}\n\n"
        f"%body (p: (s32[], s32[])) -> (s32[], s32[]) {{\n  %p = (s32[], s32[]) parameter(0)\n  %i = s32[] get-tuple-element(%p), index=0\n"
        f"  %n = s32[] get-tuple-element(%p), index=1\n  %one = s32[] constant({step})\n"
        f"  %next = s32[] fusion(%one, %i), kind=kLoop, calls=%inside, {cycles(1000)}\n  ROOT %out = (s32[], s32[]) tuple(%next, %n)\n}}\n\n"
        f"%cond (p: (s32[], s32[])) -> pred[] {{\n  %p = (s32[], s32[]) parameter(0)\n  %i = s32[] get-tuple-element(%p), index=0\n"
        f"  %n = s32[] get-tuple-element(%p), index=1\n  %limit = s32[] constant(32)\n  {condition}\n}}\n",
    )


@pytest.mark.parametrize(
    "condition, init, step, config, turns",
    [
        ("ROOT %c = pred[] compare(%i, %limit), direction=LT", "0", "1", "", 32),
        ("ROOT %c = pred[] compare(%limit, %i), direction=GT", "2", "1", "", 30),
        ("ROOT %c = pred[] compare(%i, %limit), direction=LE", "0", "5", "", 7),
        ("ROOT %c = pred[] compare(%i, %limit), direction=NE", "0", "4", "", 8),
        ("ROOT %c = pred[] compare(%i, %n), direction=LT", "0", "1", "", 40),
        ("ROOT %c = pred[] compare(%i, %limit), direction=GE", "40", "-1", "", 9),
        ("ROOT %c = pred[] compare(%i, %limit), direction=LT", "50", "1", "", 0),
        ("ROOT %c = pred[] is-finite(%i)", "0", "1", ', backend_config={"known_trip_count":{"n":"12"}}', 12),
    ],
)
def test_trip_counts_follow_from_the_conditions(condition, init, step, config, turns):
    found = read(loop(condition, init, step, config))
    assert found.cycles == 1000 * turns + 7 and found.notes == []
    assert found.seconds == pytest.approx((1000 * turns + 7) / v5p.clock_hz)


@pytest.mark.parametrize(
    "condition, step",
    [("ROOT %c = pred[] is-finite(%i)", "1"), ("ROOT %c = pred[] compare(%i, %limit), direction=LT", "0")],
)
def test_a_loop_with_an_unknown_trip_count_is_counted_once_with_a_note(condition, step):
    found = read(loop(condition, "0", step))
    assert found.cycles == 1007 and found.notes == ["while.1: its trip count is unknown; it is counted once"]


def test_elements_of_tuples_are_operands_by_number_too():
    """In programs of jax 0.12: `%p#0` for `get-tuple-element(%p), index=0`."""
    text = (
        "HloModule m, is_scheduled=true\n\n"
        "%cond (p: (s32[], (f32[8,2]{1,0}, bf16[4]))) -> pred[] {\n  %p = (s32[], (f32[8,2]{1,0}, bf16[4])) parameter(0)\n"
        "  %n = s32[] constant(5)\n  ROOT %c = pred[] compare(%p#0, %n), direction=LT\n}\n\n"
        "%body (q: (s32[], (f32[8,2]{1,0}, bf16[4]))) -> (s32[], (f32[8,2]{1,0}, bf16[4])) {\n  %q = (s32[], (f32[8,2]{1,0}, bf16[4])) parameter(0)\n"
        f"  %one = s32[] constant(1)\n  %i = s32[] add(%q#0, %one), {cycles(10)}\n  %t = (f32[8,2]{{1,0}}, bf16[4]) tuple(%q#1#0, %q#1#1)\n"
        "  ROOT %r = (s32[], (f32[8,2]{1,0}, bf16[4])) tuple(%i, %t)\n}\n\n"
        "ENTRY %main (s: (s32[], (f32[8,2]{1,0}, bf16[4]))) -> (s32[], (f32[8,2]{1,0}, bf16[4])) {\n  %s = (s32[], (f32[8,2]{1,0}, bf16[4])) parameter(0)\n"
        "  %zero = s32[] constant(0)\n  %start = (s32[], (f32[8,2]{1,0}, bf16[4])) tuple(%zero, %s#1)\n"
        "  ROOT %w = (s32[], (f32[8,2]{1,0}, bf16[4])) while(%start), condition=%cond, body=%body\n}\n"
    )
    found = read(text)
    assert found.cycles == 50 and found.notes == []
    body = hlo.parse(text).computations["body"].instructions
    assert [body[name].shape for name in ("q#0", "q#1", "q#1#0", "q#1#1")] == ["s32[]", "(f32[8,2]{1,0}, bf16[4])", "f32[8,2]{1,0}", "bf16[4]"]


def test_the_longest_branch_is_counted_with_a_note():
    branch = "%{0} (p: s32[]) -> s32[] {{\n  %p = s32[] parameter(0)\n  ROOT %r = s32[] negate(%p), {1}\n}}\n\n"
    found = read(
        program(
            "  %i = s32[] parameter(0)\n  ROOT %c.1 = s32[] conditional(%i, %i, %i), branch_computations={%left, %right}",
            branch.format("left", cycles(100)) + branch.format("right", cycles(300)),
        )
    )
    assert found.cycles == 300 and "the branch depends on values" in found.notes[0]


def test_a_fusion_counts_once_and_products_are_a_separate_part():
    inner = f"%f (p: f32[]) -> f32[] {{\n  %p = bf16[8,8] parameter(0)\n  ROOT %d = bf16[8,8] convolution(%p, %p), {cycles(900)}\n}}\n"
    found = read(
        program(
            f"  %p = bf16[8,8] parameter(0)\n  %m = bf16[8,8] fusion(%p), kind=kOutput, calls=%f, {cycles(175_000)}\n"
            f"  ROOT %o = bf16[8,8] negate(%m), {cycles(17_500)}",
            inner,
        )
    )
    assert found.cycles == 192_500
    assert found.parts == pytest.approx(dict.fromkeys(PARTS, 0.0) | {"matrix products": 1e-4, "other": 1e-5})
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_without_an_estimate_bytes_are_counted_with_a_note():
    found = read(program("  %p = bf16[1024,2048] parameter(0)\n  ROOT %g = f32[1024,2048] sort(%p), dimensions={0}"))
    assert found.cycles == 0 and found.seconds == found.low == found.high == pytest.approx((2 + 4) * 1024 * 2048 / 2765e9)
    assert found.notes == ["instructions without an estimate of the compiler are counted by their bytes"]


# Rates


def test_the_bounds_of_a_product_are_the_longer_of_flops_and_bytes_and_their_sum():
    m, k, n = 4096, 2048, 8192
    flops, size = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    for chip in CHIPS.values():
        seconds = cost.operation_seconds(chip, flops=flops, size=size)
        computing, moving = (x * chip.devices_per_chip / rate for x, rate in ((flops, chip.flops_per_second), (size, chip.memory_bandwidth)))
        assert seconds.low == pytest.approx(max(computing, moving)) and seconds.high == pytest.approx(computing + moving)
        assert seconds.mean == pytest.approx((seconds.low + seconds.high) / 2)
    # A GPU multiplies float32 as TF32, at half the rate.
    half = cost.operation_seconds(CHIPS["h100"], flops=flops, itemsize=4)
    assert half.low == pytest.approx(2 * flops / 989e12)


def test_elementwise_operations_are_bound_by_memory():
    seconds = cost.operation_seconds(v5p, vectors=10**9, size=12 * 10**9)
    assert seconds.low == pytest.approx(12e9 / 2765e9) and seconds.high == pytest.approx(12e9 / 2765e9 + 1e9 / (1.75e9 * 2 * 4096))


@pytest.mark.parametrize(
    "name, kind, devices, expected",
    [  # seconds for 1 GB, over links of 90 (v5p), 45 (v5e) and 450 GB/s (h100)
        ("v5p:4x4x4", "all-gather", 64, 63 / 64 / (6 * 90)),
        ("v5p:4x4x4", "all-reduce", 64, 2 * 63 / 64 / (6 * 90)),
        ("v5p:4x4x4", "reduce-scatter", 4, 3 / 4 / (2 * 90)),
        ("v5p:2x2x2", "all-gather", 4, 3 / 4 / (2 * 90)),  # lines of two, in two dimensions
        ("v5e:4x4", "all-gather", 4, 3 / 4 / 45),  # a line
        ("v5e:4x4", "all-to-all", 4, 4 / 4 / 45),  # two of four devices send half of their bytes over the middle
        ("v5e:16x16", "all-reduce", 16, 2 * 15 / 16 / (2 * 45)),  # a ring
        ("v5p:4x4x4", "all-to-all", 64, 4 / 8 / 90),
        ("v5p:4x4x4", "collective-permute", 2, 1 / 90),
        ("h100x8", "all-reduce", 8, 2 * 7 / 8 / 450),
        ("v5p:4x4x4", "all-gather", 1, 0.0),
    ],
)
def test_collectives_take_the_bytes_of_a_ring_over_links(name, kind, devices, expected):
    assert cost.collective_seconds(kind, 1e9, Group(devices, devices), topologies.parse(name)) == pytest.approx(expected)


def test_collectives_between_slices_go_over_their_network():
    topology = topologies.parse("2xv5p:4x4x4")
    assert cost.collective_seconds("all-reduce", 1e9, Group(2, 1), topology) == pytest.approx(1 / 6.25)
    assert cost.collective_seconds("all-reduce", 1e9, Group(8, 4), topology) == pytest.approx(2 * 7 / 8 / (4 * 6.25))
    assert Group(8, 4).network == "slices" and Group(8, 8).network == "links"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", cost.ATTENTION_PRODUCTS)
def test_no_attention_kernel_is_faster_than_the_chip(chip, kernel):
    chip, scores = CHIPS[chip], 4 * 4096**2
    for width in (64, 128, 192, 256, 512):
        seconds = cost.attention_seconds(chip, kernel, scores=scores, width=width)
        assert seconds.low >= 2 * cost.ATTENTION_PRODUCTS[kernel] * scores * width / chip.flops_per_device
        assert seconds.high > seconds.low and cost.attention_seconds(chip, kernel, scores=2 * scores, width=width).mean == pytest.approx(2 * seconds.mean)


# Cycles of a core in libtpu 0.0.52's schedule of a block of 1,024 × 1,024, heads of 128: computing, around it, and its part of a row of 4.
SCHEDULED = {
    "v5e": {"fwd": 4593 + 251 + 349, "dq": 6144 + 139 + 86, "dkv": 8192 + 180 + 167},
    "v5p": {"fwd": 4776 + 392 + 351, "dq": 6144 + 260 + 86, "dkv": 8192 + 364 + 167},
    "v6e": {"fwd": 3159 + 299 + 174, "dq": 3624 + 149 + 46, "dkv": 4572 + 206 + 86},
}


@pytest.mark.parametrize("chip", SCHEDULED)
@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkv"])
def test_the_compilers_schedule_of_attention_is_within_the_range(chip, kernel):
    chip = CHIPS[chip]
    seconds = cost.attention_seconds(chip, kernel, scores=1024**2, width=128)
    scheduled = SCHEDULED[chip.name][kernel] / (chip.clock_hz * chip.cores_per_chip)
    assert seconds.low <= scheduled <= seconds.high and scheduled == pytest.approx(seconds.mean, rel=0.2)


# Collectives


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_0','axis_1'}", (tuple(range(8)),)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_groups_of_devices_in_every_form(groups, expected):
    found = hlo.groups(f", channel_id=1, replica_groups={groups}, use_global_device_ids=true", 8)
    assert sorted(found) == sorted(expected)


def test_groups_in_another_form_are_an_error():
    with pytest.raises(RunError, match="unknown form"):
        hlo.groups("replica_groups=some", 8)


REDUCE = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n  ROOT %s = f32[] add(%x, %y)\n}\n\n"
GATHER = "channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, use_global_device_ids=true"
# 4 chips of a 2 × 2 plane gather 4 × 4 MB over two links each.
GATHER_SECONDS = 3 * 1024 * 2048 * 2 / (2 * 90e9)


def gathered(found):
    (only,) = found.collectives
    assert (only.kind, only.axes, only.network) == ("all-gather", ("fsdp",), "links")
    assert only.bytes == 3 * 1024 * 2048 * 2 * only.count and only.seconds == pytest.approx(GATHER_SECONDS * only.count)
    assert found.parts["exposed collectives"] == pytest.approx(only.exposed_seconds)
    return only


def test_a_synchronous_collective_is_wholly_exposed():
    text = program(f"  %p = bf16[1024,2048]{{1,0}} parameter(0)\n  ROOT %g = bf16[4096,2048]{{1,0}} all-gather(%p), {GATHER}")
    only = gathered(read(text))
    assert only.count == 1 and only.exposed_seconds == pytest.approx(GATHER_SECONDS)


# The compiler's forms of an overlapped collective: start and done; on other cores; in steps, fused with the computation that overlaps it.
CALLED = f"%called (q: bf16[1024,2048]) -> bf16[4096,2048] {{\n  %q = bf16[1024,2048] parameter(0)\n  ROOT %g = bf16[4096,2048] all-gather(%q), {GATHER}\n}}"
FUSED = (
    "%fused{0} (q: bf16[1024,2048]) -> bf16[4096,2048] {{\n  %q = bf16[1024,2048] parameter(0)\n  %g{0} = bf16[4096,2048] all-gather(%q), "
    + GATHER.replace("{", "{{").replace("}", "}}")
    + "\n"
    '  ROOT %c = bf16[4096,2048] custom-call(%q, %g{0}), custom_call_target="{1}"\n}}\n\n'
)
ASYNC = {
    "pair": (
        f"  %s = (bf16[1024,2048], bf16[4096,2048]) all-gather-start(%p), {GATHER}\n",
        "  ROOT %d = bf16[4096,2048] all-gather-done(%s)",
        "",
    ),
    "sparse cores": (
        "  %s = ((bf16[1024,2048]), bf16[4096,2048]) call-start(%p), to_apply=%called\n",
        "  ROOT %d = bf16[4096,2048] call-done(%s)",
        CALLED + ', execution_thread="sparsecore"\n',
    ),
    "wrapped": (
        "  %s = ((bf16[1024,2048]), bf16[4096,2048], u32[]) async-start(%p), calls=%called\n",
        "  ROOT %d = bf16[4096,2048] async-done(%s)",
        CALLED + "\n",
    ),
    "operands later": (
        '  %s = ((), (), ()) async-start(), async_execution_thread="sparsecore", calls=%outer\n'
        f"  %w = bf16[1024,2048] negate(%p), {cycles(70_000)}\n  %u = ((bf16[1024,2048]), bf16[4096,2048], ()) async-update(%s, %p)\n",
        "  ROOT %d = bf16[4096,2048] async-done(%u)",
        CALLED + ', execution_thread="sparsecore"\n\n%outer (o: bf16[1024,2048]) -> bf16[4096,2048] {\n  %o = bf16[1024,2048] parameter(0)\n'
        '  ROOT %k = bf16[4096,2048] custom-call(%o), custom_call_target="TODO(b/1)", called_computations={%called}\n}, execution_thread="sparsecore"\n',
    ),
    "fused": (
        "  %s = bf16[4096,2048] fusion(%p), kind=kCustom, calls=%fused1\n",
        "  ROOT %d = bf16[4096,2048] fusion(%p), kind=kCustom, calls=%fused2",
        FUSED.format(1, "AsyncCollectiveStart") + FUSED.format(2, "AsyncCollectiveDone"),
    ),
}


@pytest.mark.parametrize("form", ASYNC)
@pytest.mark.parametrize("beside", [35_000, 1_750_000])
def test_the_exposed_time_of_an_asynchronous_collective_is_what_does_not_overlap(form, beside):
    start, done, others = ASYNC[form]
    text = program(
        f"  %p = bf16[1024,2048] parameter(0)\n{start}  %x = bf16[1024,2048] negate(%p), {cycles(beside)}\n{done}",
        others,
    )
    found = read(text)
    only = gathered(found)
    assert only.count == 1 and only.exposed_seconds == pytest.approx(max(0.0, GATHER_SECONDS - beside / 1.75e9))
    before = 70_000 if form == "operands later" else 0  # it cannot begin in these
    assert found.cycles == before + beside and found.notes == [] and found.seconds == pytest.approx(before / 1.75e9 + max(GATHER_SECONDS, beside / 1.75e9))


def test_collectives_on_the_same_links_wait_for_each_other():
    text = program(
        f"  %p = bf16[1024,2048] parameter(0)\n  %s = (bf16[1024,2048], bf16[4096,2048]) all-gather-start(%p), {GATHER}\n"
        f"  %t = (bf16[1024,2048], bf16[4096,2048]) all-gather-start(%p), {GATHER}\n  %x = bf16[1024,2048] negate(%p), {cycles(35_000)}\n"
        "  %d = bf16[4096,2048] all-gather-done(%s)\n  ROOT %e = bf16[4096,2048] all-gather-done(%t)"
    )
    only = gathered(read(text))
    assert only.count == 2 and only.exposed_seconds == pytest.approx(2 * GATHER_SECONDS - 2e-5)


def test_a_reduce_scatter_that_is_a_fusion():
    fused = (
        "%all-reduce-scatter (i: bf16[4096,2048]) -> bf16[1040,2048] {\n  %i = bf16[4096,2048] parameter(0)\n  %z = bf16[] constant(0)\n"
        "  %pad = bf16[4160,2048] pad(%i, %z), padding=0_64x0_0\n  %r = bf16[4160,2048] all-reduce(%pad), channel_id=2, "
        "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add\n  %c = u32[] constant(0)\n"
        "  ROOT %d = bf16[1040,2048] dynamic-slice(%r, %c, %c), dynamic_slice_sizes={1040,2048}\n}\n"
    )
    found = read(
        program("  %p = bf16[4096,2048] parameter(0)\n  ROOT %f = bf16[1040,2048] fusion(%p), kind=kCustom, calls=%all-reduce-scatter", REDUCE + fused)
    )
    (only,) = found.collectives
    assert (only.kind, only.axes, only.bytes) == ("reduce-scatter", ("fsdp",), 3 / 4 * 4096 * 2048 * 2)
    assert found.seconds == only.exposed_seconds == pytest.approx(only.bytes / 180e9)


def test_a_group_of_one_sends_nothing():
    text = program("  %p = f32[8] parameter(0)\n  ROOT %r = f32[8] all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add", REDUCE)
    assert read(text).collectives == [] and read(text).seconds == 0


def test_transfers_between_slices_and_to_the_host():
    attributes = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="a_0",'
    attributes += '_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = program(
        "  %p = bf16[1024,2048] parameter(0)\n  %h = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)S(5)} parameter(1)\n  %i = s32[] constant(0)\n  %t = token[] after-all()\n"
        f"  %s = (bf16[1024,2048], u32[], token[]) send(%p, %t), channel_id=1, {attributes}\n"
        f"  %r = (bf16[1024,2048], u32[], token[]) recv(%t), channel_id=2, {attributes}\n"
        "  %u = ((bf16[8,1024,2048]{2,1,0:S(5)}, bf16[1024,2048], s32[]), bf16[8,1024,2048]{2,1,0:S(5)}, u32[]) dynamic-update-slice-start(%h, %p, %i)\n"
        f"  %x = bf16[1024,2048] negate(%p), {cycles(175_000)}\n  %ud = bf16[8,1024,2048]{{2,1,0:S(5)}} dynamic-update-slice-done(%u)\n"
        "  %sd = token[] send-done(%s), channel_id=1\n"
        '  ROOT %rd = (bf16[1024,2048], token[]) recv-done(%r), channel_id=2, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    )
    found = read(text, "2xv5p:2x2x1", slices=2, fsdp=4)
    (only,), (copied,), size = found.collectives, found.host_transfers, 1024 * 2048 * 2
    assert (only.kind, only.axes, only.network, only.bytes) == ("all-reduce", ("slices",), "slices", size)  # 2 × 1/2
    assert (copied.direction, copied.bytes) == ("to", size) and copied.exposed_seconds == pytest.approx(size / 16e9 - 1e-4)
    assert only.exposed_seconds == pytest.approx(size / 6.25e9 - 1e-4 - copied.exposed_seconds)
    assert found.seconds == pytest.approx(size / 6.25e9)


# Kernels


def kernel(name: str, result: str, operands: list[str], config: str = "", attributes: str = "") -> str:
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    lines.append(f'  ROOT %{name}.3 = {result} custom-call({names}), custom_call_target="tpu_custom_call"{attributes}{config}')
    return program("\n".join(lines))


QKV = ["bf16[2,8,4096,128]"] * 3
MASK = ["s8[1,8,8]"] * 2


@pytest.mark.parametrize(
    "name, operands, notes, chip, products",
    [
        ("splash_mha_fwd_residuals", MASK + QKV, "", v5p, 2),
        ("splash_mha_dq_no_residuals", MASK + QKV, "", v5p, 3),
        ("splash_mha_dkv_no_residuals", MASK + QKV, "", v5p, 4),
        ("splash_mha_dkv_no_residuals", MASK + QKV, '\\"use_fused_bwd_kernel\\": true, ', v5p, 5),
        ("splash_mha_fwd_no_residuals", QKV, "", CHIPS["v6e"], 2),  # no mask
    ],
)
def test_splash_attention_is_costed_by_its_scores(name, operands, notes, chip, products):
    sizes = f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{notes}\\"q_layout\\": 1}}"\n}}}}'
    found = read(kernel(name, "bf16[2,8,4096,128]", operands, attributes=f", {sizes}"), f"{chip.name}:{'2x2x2' if chip is v5p else '2x4'}", fsdp=8)
    scores = 2 * 8 * 4096**2
    matrix, vector = 2 * products * scores * 128 / chip.flops_per_second, 12 * scores / chip.vector_rate
    assert found.low == pytest.approx(max(matrix, vector)) and found.high == pytest.approx(matrix + vector)
    assert found.parts["attention kernels"] == found.seconds == pytest.approx((found.low + found.high) / 2)
    (only,) = found.kernels
    assert (only.name, only.count, only.shapes, only.seconds) == (name, 1, tuple(operands), found.seconds)
    assert bool(found.notes) == (operands != QKV) and found.cycles == 0


def test_scopes_state_shares_of_blocks_and_rows():
    def scoped(name, result, operands, scope):
        metadata = f', metadata={{op_name="jit(train_step)/transpose(jvp(layer))/while/body/{scope}/pallas_call"}}'
        return read(kernel(name, result, operands, attributes=metadata))

    for name in ("splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"):
        full, less, half = (scoped(name, "bf16[2,8,4096,128]", MASK + QKV, f"blocks={computed}of64") for computed in (64, 48, 32))
        assert full.seconds == pytest.approx(4 / 3 * less.seconds) == pytest.approx(2 * half.seconds) and not full.notes
    grouped = ("gmm", "bf16[4096,2048]", ["s32[8]", "bf16[4096,1024]", "bf16[8,1024,2048]"])
    quarter = scoped(*grouped, "rows=1024of4096")
    assert quarter.seconds == pytest.approx(read(kernel(*grouped)).seconds / 4) and "25% of the allocated rows" in quarter.notes[0]


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 300), (False, 200)])
@pytest.mark.parametrize("parts", [1, 2])
def test_visible_blocks_are_those_with_unmasked_scores(causal, window, parts):
    T = np.arange(1024)
    seen = (T[:, None] >= T if causal else np.ones((1024, 1024), bool)) & (True if window is None else abs(T[:, None] - T) < window)
    blocks = seen.reshape(8, 128, 4, 256).any(axis=(1, 3)).reshape(parts, -1).sum(axis=1)
    sides = (None if window is None else window - 1, 0 if causal else window and window - 1)
    assert fused._visible_blocks((1024, 1024), parts, (128, 256), sides) == blocks.max()


def test_other_kernels():
    gmm = read(kernel("gmm", "bf16[4096,2048]", ["s32[8]", "bf16[4096,1024]", "bf16[8,1024,2048]"]))
    tgmm = read(kernel("tgmm", "bf16[8,1024,2048]", ["s32[8]", "bf16[1024,4096]", "bf16[4096,2048]"]))
    assert gmm.parts["matrix products"] == gmm.seconds and gmm.low == tgmm.low == pytest.approx(2 * 4096 * 1024 * 2048 / 459e12)
    assert gmm.high - gmm.low == pytest.approx(2 * (4096 * 1024 + 8 * 1024 * 2048 + 4096 * 2048) / 2765e9)
    cost = ', backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"459000000000","bytes_accessed":"2765000"}}}'
    assert read(kernel("mine", "f32[8]", ["f32[8]"], cost)).parts["other"] == pytest.approx(1e-3 + 0.5e-6)
    assert read(kernel("ragged-dot-none", "f32[8]", ["f32[8]"], cost)).parts["matrix products"] == pytest.approx(1e-3 + 0.5e-6)
    unknown = read(kernel("mine", "f32[8]", ["f32[8]"]))
    assert unknown.seconds == 0 and unknown.kernels[0].seconds is None and "kernel mine" in unknown.notes[0]


def test_the_range_is_from_all_overlapped_to_nothing_overlapped():
    text = program(
        f"  %p = bf16[1024,2048]{{1,0}} parameter(0)\n  %x = bf16[1024,2048] negate(%p), {cycles(17_500)}\n  ROOT %g = bf16[4096,2048]{{1,0}} all-gather(%p), {GATHER}"
    )
    found = read(text)
    assert found.low == pytest.approx(GATHER_SECONDS) and found.high == found.seconds == pytest.approx(GATHER_SECONDS + 1e-5)
    _, start, done = None, *ASYNC["pair"][:2]
    hidden = read(program(f"  %p = bf16[1024,2048] parameter(0)\n{start}  %x = bf16[1024,2048] negate(%p), {cycles(1_750_000)}\n{done}"))
    assert hidden.low == hidden.seconds == pytest.approx(1e-3) and hidden.high == pytest.approx(1e-3 + GATHER_SECONDS)


def test_chips_by_the_names_of_their_devices():
    assert chip_of("TPU v5") is v5p and chip_of("TPU v5 lite") is v5e and chip_of("TPU v4 lite") is None
    for chip in CHIPS.values():
        assert chip_of(chip.device_kinds[0]) is chip
        if chip.platform == "tpu":  # the peak: FLOPs of all matrix units per cycle
            unit = 256 if chip.name in ("v6e", "tpu7x") else 128
            assert chip.flops_per_second / chip.clock_hz / (2 * unit**2) == pytest.approx(4 * chip.cores_per_chip, rel=0.01)
            assert chip.vector_rate == chip.clock_hz * chip.cores_per_chip * 8 * 128 * 4


# Programs that are compiled here


def devices(name: str):
    pytest.importorskip("libtpu")
    topology = topologies.parse(name)
    return topology, absent.devices(topology)


def compiled(function, mesh, *arrays, options=None, **kwargs) -> str:
    return jax.jit(function, **kwargs).lower(*arrays).compile(compiler_options=options or {}).as_text()


def array(mesh, shape, spec=None, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P() if spec is None else spec))


# 96 MB of the chip's 128 MB for tiles, as in the published recipes; with the default of 16 MB, v6e reads operands more often.
TILES = {"xla_tpu_scoped_vmem_limit_kib": 98304}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("shape", [(8192, 8192, 8192), (16384, 4096, 11008)])
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_a_product_takes_its_flops_over_the_peak(name, shape):
    topology, found = devices(name)
    mesh = Mesh(np.array(found[:1]), ("data",))
    m, k, n = shape
    text = compiled(jnp.matmul, mesh, array(mesh, (m, k)), array(mesh, (k, n)), options=TILES)
    result, best = estimate(text, topology, mesh.shape), 2 * m * k * n / topology.chip.flops_per_device
    print(f"\n{name} {shape}: {result.cycles} cycles, {result.seconds * 1e3:.3f} ms, {result.seconds / best:.3f} of FLOPs over the peak")
    assert best <= result.seconds <= 1.15 * best
    assert result.parts["matrix products"] == pytest.approx(result.seconds)


def forward(scan: bool, layers: int):
    def block(h, weights):
        up, down = weights
        return h + jax.nn.gelu(h @ up) @ down

    def function(weights, h):
        if scan:
            return lax.scan(lambda h, each: (block(h, each), None), h, weights)[0]
        for each in range(layers):
            h = block(h, jax.tree.map(lambda w: w[each], weights))  # noqa: B023
        return h

    return function


def train(scan: bool, layers: int):
    """A step of gradient descent; rows stay on their devices, weights are gathered."""

    @jax.checkpoint
    def block(h, weights):
        up, down = (w.astype(jnp.bfloat16) for w in weights)
        return lax.with_sharding_constraint(h + jax.nn.gelu(h @ up) @ down, P("fsdp"))

    def loss(weights, h):
        if scan:
            h = lax.scan(lambda h, each: (block(h, each), None), h, weights)[0]
        else:
            for each in weights:
                h = block(h, each)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    def step(weights, h):
        (gradients, g_h) = jax.grad(loss, argnums=(0, 1))(weights, h)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), g_h

    return step


@pytest.mark.tpu_compiler
def test_scopes_reach_the_compiled_kernels():
    """Also in the gradient: the estimate depends on the scopes in which JAX traces its gradient rules."""
    topology, found = devices("v5p:2x2x1")
    mesh = Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))
    x = array(mesh, (4, 1024, 2, 128), P("data"))
    w = array(mesh, (1, 1024, 1024))
    layout = layout_lib.Layout(mesh, rules=dict.fromkeys(layout_lib.RULES, ()) | {"batch": ("data",)})

    def loss(x, w):
        with layout_lib.use(layout):
            y = attend(x, x, x, implementation="splash", causal=True)
            multiply = layout_lib.on_each_device(grouped.product, [("batch", None), (None,) * 3, (None,)], ("batch", None))
            with jax.named_scope("rows=256of1024"):
                return multiply(y.reshape(4096, 256).repeat(4, axis=1), w, jnp.array([256], jnp.int32)).astype(jnp.float32).sum()

    result = estimate(compiled(jax.grad(loss, (0, 1)), mesh, x, w), topology, mesh.shape)
    print([(each.name, each.count, each.seconds) for each in result.kernels])
    names = {"splash_mha_fwd_residuals": "fwd", "splash_mha_dq_no_residuals": "dq", "splash_mha_dkv_no_residuals": "dkv"}
    for each in result.kernels:
        if each.name in names:  # three of four blocks of 512 × 512 are below the diagonal
            expected = cost.attention_seconds(topology.chip, names.pop(each.name), scores=2 * 0.75 * 1024**2, width=128)
            assert each.seconds / each.count == pytest.approx(expected.mean)
    assert not names and {each.name for each in result.kernels} >= {"gmm", "tgmm"}
    assert not any("masks" in note for note in result.notes) and any("25% of the allocated rows" in note for note in result.notes)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2"])
def test_scanned_and_unrolled_layers_have_the_same_estimate(name):
    topology, found = devices(name)
    mesh = Mesh(np.array(found), ("data",))
    arrays = (array(mesh, (8, 2048, 8192)), array(mesh, (8, 8192, 2048))), array(mesh, (32768 * 4, 2048), P("data"))
    scanned, unrolled = (estimate(compiled(forward(scan, 8), mesh, *arrays), topology, mesh.shape) for scan in (True, False))
    print(f"\n{name}, forward: {scanned.cycles} and {unrolled.cycles} cycles, {scanned.seconds * 1e3:.2f} and {unrolled.seconds * 1e3:.2f} ms")
    assert scanned.cycles == pytest.approx(unrolled.cycles, rel=0.03) and scanned.seconds == pytest.approx(unrolled.seconds, rel=0.03)


@pytest.mark.tpu_compiler
def test_a_scanned_and_an_unrolled_train_step_have_the_same_estimate():
    topology, found = devices("v5e:2x2")
    mesh = Mesh(np.array(found), ("fsdp",), axis_types=(AxisType.Auto,))
    layers, spread = 8, P(None, "fsdp")
    up, down = (2048, 8192), (8192, 2048)
    stacked = tuple(array(mesh, (layers, *shape), spread, jnp.float32) for shape in (up, down))
    apart = [tuple(array(mesh, shape, P("fsdp"), jnp.float32) for shape in (up, down)) for _ in range(layers)]
    rows = array(mesh, (32768 * 4, 2048), P("fsdp"))
    totals = {}
    for scan, weights in ((True, stacked), (False, apart)):
        shardings = jax.tree.map(lambda x: x.sharding, (weights, rows))
        with jax.set_mesh(mesh):
            text = compiled(train(scan, layers), mesh, weights, rows, donate_argnums=0, out_shardings=shardings)
        totals[scan] = estimate(text, topology, mesh.shape)
        print(f"\n{'scanned' if scan else 'unrolled'}: {totals[scan].cycles} cycles, {totals[scan].seconds * 1e3:.1f} ms, {totals[scan].parts}")
    assert totals[True].cycles == pytest.approx(totals[False].cycles, rel=0.03)
    assert totals[True].seconds == pytest.approx(totals[False].seconds, rel=0.03)
    # Both gather every layer's weights twice, and scatter their gradients.
    expected = {"all-gather": (4 * layers, 2 * layers), "reduce-scatter": (2 * layers, layers)}
    for total in totals.values():
        sent = {c.kind: (c.count, c.bytes) for c in total.collectives if c.axes == ("fsdp",)}
        for kind, (count, whole) in expected.items():
            assert sent[kind] == (count, pytest.approx(3 / 4 * whole * 2 * 2048 * 8192 * 2))


@pytest.mark.tpu_compiler
def test_a_scanned_and_an_unrolled_llama_have_the_same_estimate():
    """Four blocks of Llama-2-7B, trained as in its config; takes minutes."""
    pytest.importorskip("libtpu")
    changes = {"model.layers": 4, "mesh.data": 1, "mesh.fsdp": 4, "data.batch_size": 16}
    plans = [
        make_plan(build_experiment(load_config(str(ROOT / "configs" / "llama2_7b.py"), changes | {"model.scan": scan})), "v5p:2x2x1") for scan in (True, False)
    ]
    for plan in plans:
        print(f"\n{plan.time.cycles} cycles, {plan.time.seconds * 1e3:.1f} ms, {plan.time.parts}")
    scanned, unrolled = (plan.time for plan in plans)
    assert scanned.cycles == pytest.approx(unrolled.cycles, rel=0.03)
    # The programs differ at the boundary of an iteration: its first operations do not overlap with the previous iteration.
    computing, other = (time.seconds - time.parts["exposed collectives"] for time in (scanned, unrolled))
    assert computing == pytest.approx(other, rel=0.03) and scanned.seconds == pytest.approx(unrolled.seconds, rel=0.04)
    kinds = [{(c.kind, c.axes): (c.count, c.bytes) for c in time.collectives if c.bytes > 1e7} for time in (scanned, unrolled)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 2
    assert [(k.name, k.count) for k in scanned.kernels] == [(k.name, k.count) for k in unrolled.kernels]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5e:2x4"])
def test_bytes_of_collectives_equal_closed_forms(name):
    topology, found = devices(name)
    mesh = Mesh(np.array(found).reshape(2, 4), ("data", "fsdp"))
    size = 1024 * 2048 * 2  # of one device's shard
    ring = [(i, (i + 1) % 4) for i in range(4)]
    rows, both = P("fsdp"), ("data", "fsdp")
    cases = [
        ("all-gather", ("fsdp",), 3 * size, lambda x: lax.all_gather(x, "fsdp", tiled=True), rows, P()),
        ("all-gather", ("data",), size, lambda x: lax.all_gather(x, "data", tiled=True), P(both), P("fsdp")),
        ("all-reduce", ("fsdp",), 2 * 3 / 4 * size, lambda x: lax.psum(x, "fsdp"), rows, P()),
        ("all-reduce", ("data",), 2 * 1 / 2 * size, lambda x: lax.psum(x, "data"), rows, rows),
        ("all-reduce", both, 2 * 7 / 8 * size, lambda x: lax.psum(x, both), rows, P()),
        ("reduce-scatter", ("fsdp",), 3 / 4 * size, lambda x: lax.psum_scatter(x, "fsdp", tiled=True), P(), rows),
        ("all-to-all", ("fsdp",), 3 / 4 * size, lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True), rows, P(None, "fsdp")),
        ("collective-permute", ("fsdp",), size, lambda x: lax.ppermute(x, "fsdp", ring), rows, rows),
    ]
    for kind, axes, expected, function, spec, out in cases:
        parts = np.prod([mesh.shape[axis] for axis in (spec[0] if isinstance(spec[0], tuple) else (spec[0],))]) if len(spec) else 1
        x = array(mesh, (1024 * parts, 2048), spec)
        text = compiled(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False), mesh, x)
        result = estimate(text, topology, mesh.shape)
        # A reduce-scatter also moves the edges of its padded shards.
        only = next(each for each in result.collectives if each.kind == kind)
        print(f"{name} {kind} {axes}: {only.bytes / 1e6:.3f} MB in {only.seconds * 1e6:.1f} µs")
        assert (only.axes, only.count, only.network) == (axes, 1, "links") and only.bytes == pytest.approx(expected)
        others = [each for each in result.collectives if each is not only]
        assert all(kind == "reduce-scatter" and each.kind == "collective-permute" and each.bytes < 0.2 * expected for each in others)
