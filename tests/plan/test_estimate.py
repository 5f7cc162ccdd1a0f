"""The time of a compiled TPU step, read from its program: from texts, and from programs that are compiled here for TPUs that are not.

pytest -m tpu_compiler -n 0 -s tests/plan/test_estimate.py
"""

import itertools
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodels.config import load_config
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware.chips import CHIPS, chip_of
from jaxmodels.models import fused, grouped
from jaxmodels.models.attention import attend
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.plan import program as program_lib
from jaxmodels.plan import splash, torus
from jaxmodels.plan import topology as topology_lib
from jaxmodels.plan.estimate import PARTS, estimate
from jaxmodels.plan.report import make_plan

v5p, v5e = CHIPS["v5p"], CHIPS["v5e"]


def mesh_of(grid: tuple[int, ...], slices: int = 1, cores: int = 1, **axes: int):
    """A mesh of devices that are only said to be there: those of a chip side by side, then along the grid, its first dimension fastest."""
    places = [
        types.SimpleNamespace(coords=tuple(reversed(at)), slice_index=s) for s in range(slices) for at in np.ndindex(*reversed(grid)) for _ in range(cores)
    ]
    return types.SimpleNamespace(devices=np.array(places).reshape(tuple(axes.values())), shape=axes)


def read(text: str, chip=v5p, mesh=None):
    """An estimate, by default of eight chips in a cube."""
    return estimate(text, types.SimpleNamespace(chip=chip), mesh or mesh_of((2, 2, 2), data=2, fsdp=4))


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
    read = program_lib.parse(text)
    kernel = read.entry.instructions["k.1"]
    assert list(read.computations) == ["called", "main"] and list(read.entry.instructions) == ["param.0", "k.1", "gte"]
    assert kernel.operands == ("param.0", "param.0") and kernel.opcode == "custom-call" and kernel.config == {"a": {"b": ["}"]}}
    assert kernel.bytes == 4 * 4 + 2 * 4 and [str(array) for array in program_lib.arrays(kernel.shape)] == ["f32[4]", "bf16[2,2]"]
    assert kernel.attribute("custom_call_target") == "tpu_custom_call" and read.entry.root.name == "gte"


@pytest.mark.parametrize(
    "text, message",
    [
        ("HloModule x\n", "no ENTRY"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] add(%c, %d\n}\n", "do not close"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] something\n}\n", "not understood"),
        ("%a () -> f32[] {\n  %b = f32[] parameter(0)\nENTRY %c () -> f32[] {\n}\n", "does not end"),
        ("ENTRY %a () -> f32[] {\n  %b = f32[] add(%c), backend_config={oh}\n}\n", "no JSON, of b"),
    ],
)
def test_a_text_that_is_cut_or_unknown_is_an_error(text, message):
    with pytest.raises(RunError, match=message):
        program_lib.parse(text)


def loop(condition: str, init: str, step: str, config: str = "") -> str:
    """A loop of 1,000 cycles a turn; element 0 of its tuple counts, element 1 stays as it is."""
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
def test_loops_run_as_often_as_their_conditions_say(condition, init, step, config, turns):
    found = read(loop(condition, init, step, config))
    assert found.cycles == 1000 * turns + 7 and found.notes == []
    assert found.seconds == pytest.approx((1000 * turns + 7) / v5p.clock_hz)


@pytest.mark.parametrize(
    "condition, step",
    [("ROOT %c = pred[] is-finite(%i)", "1"), ("ROOT %c = pred[] compare(%i, %limit), direction=LT", "0")],
)
def test_a_loop_whose_turns_are_not_told_is_counted_once_and_said(condition, step):
    found = read(loop(condition, "0", step))
    assert found.cycles == 1007 and found.notes == ["while.1: how often it runs is not in the program's text; it is counted once"]


def test_elements_of_tuples_are_operands_by_number_too():
    """As the programs of jax 0.12 have them: `%p#0` for `get-tuple-element(%p), index=0`."""
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
    body = program_lib.parse(text).computations["body"].instructions
    assert [body[name].shape for name in ("q#0", "q#1", "q#1#0", "q#1#1")] == ["s32[]", "(f32[8,2]{1,0}, bf16[4])", "f32[8,2]{1,0}", "bf16[4]"]


def test_of_branches_the_longest_is_counted_and_said():
    branch = "%{0} (p: s32[]) -> s32[] {{\n  %p = s32[] parameter(0)\n  ROOT %r = s32[] negate(%p), {1}\n}}\n\n"
    found = read(
        program(
            "  %i = s32[] parameter(0)\n  ROOT %c.1 = s32[] conditional(%i, %i, %i), branch_computations={%left, %right}",
            branch.format("left", cycles(100)) + branch.format("right", cycles(300)),
        )
    )
    assert found.cycles == 300 and "which branch runs" in found.notes[0]


def test_a_fusion_counts_once_and_products_apart():
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


def test_what_has_no_estimate_goes_by_the_memory_and_is_said():
    found = read(program("  %p = bf16[1024,2048] parameter(0)\n  ROOT %g = f32[1024,2048] sort(%p), dimensions={0}"))
    assert found.cycles == 0 and found.seconds == pytest.approx(2 * 4 * 1024 * 2048 / 2765e9)
    assert found.notes == ["1 instructions have no estimate of the compiler and take 0.00607 ms at the memory's 2765 GB/s"]


def test_programs_of_gpus_carry_no_estimates():
    with pytest.raises(ConfigError, match="h100"):
        read("", chip=CHIPS["h100"])


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
    found = torus.groups(f", channel_id=1, replica_groups={groups}, use_global_device_ids=true", 8)
    assert sorted(found) == sorted(expected)


def test_groups_in_another_form_are_an_error():
    with pytest.raises(RunError, match="not understood"):
        torus.groups("replica_groups=some", 8)


# A v5p link carries 90 GB/s one way; dimensions of 4 are rings, of 2 lines.
@pytest.mark.parametrize(
    "chip, mesh, members, kind, expected",
    [
        (v5p, mesh_of((4, 4, 4), fsdp=64), range(64), "all-gather", 63 / 64 / (6 * 90)),
        (v5p, mesh_of((4, 4, 4), fsdp=64), range(64), "all-reduce", 2 * 63 / 64 / (6 * 90)),
        (v5p, mesh_of((4, 4, 4), data=16, fsdp=4), range(4), "reduce-scatter", 3 / 4 / (2 * 90)),
        (v5p, mesh_of((4, 4, 4), data=4, fsdp=16), range(0, 64, 16), "reduce-scatter", 3 / 4 / (2 * 90)),
        (v5p, mesh_of((2, 2, 2), data=2, fsdp=4), range(4), "all-gather", 3 / 4 / (2 * 90)),
        (v5e, mesh_of((4, 4), fsdp=16), range(4), "all-gather", 3 / 4 / 45),
        (v5e, mesh_of((4, 4), fsdp=16), range(0, 4, 2), "all-gather", 1 / 2 / (45 / 2)),  # two such groups share the line
        (v5e, mesh_of((4, 4), fsdp=16), range(4), "all-to-all", 4 / 4 / 45),  # 2 of 4 send half of what they have over the middle
        (v5p, mesh_of((4, 4, 4), fsdp=64), range(64), "all-to-all", 4 / 8 / 90),
        (CHIPS["tpu7x"], mesh_of((2, 2, 1), cores=2, fsdp=8), range(8), "all-gather", 3 / 4 / (2 * 90)),
        (CHIPS["tpu7x"], mesh_of((2, 2, 1), cores=2, fsdp=8), range(0, 8, 2), "all-gather", 3 / 4 / 90),  # the other cores want the links too
        (CHIPS["tpu7x"], mesh_of((2, 2, 1), cores=2, fsdp=8), range(2), "all-gather", 1 / 2 / (6 * 90)),
        (v5p, mesh_of((4, 4, 4), slices=2, slices_=2, fsdp=64), (0, 64), "all-reduce", 1 / 6.25),
    ],
)
def test_collectives_take_bytes_over_links(chip, mesh, members, kind, expected):
    assert torus.seconds(torus.make_network(chip, mesh), kind, 1e9, [tuple(members)]) == pytest.approx(expected)


def test_a_small_collective_takes_its_hops():
    network = torus.make_network(v5p, mesh_of((4, 4, 4), fsdp=64))
    assert torus.seconds(network, "all-gather", 1024, [tuple(range(64))]) == pytest.approx(6e-6)


@pytest.mark.parametrize(
    "chip, sent, expected",
    [
        (v5p, [(i, (i + 1) % 4) for i in range(4)], 1 / 90),  # round a ring
        (v5p, [(i, (i + 2) % 4) for i in range(4)], 2 / 90),  # each link has two messages
        (v5e, [(i, (i + 1) % 4) for i in range(4)], 1 / 45),  # along a line, the last back on links that are free
        (v5p, [], 0.0),
    ],
)
def test_permutations_take_the_fullest_link(chip, sent, expected):
    grid = (4, 4, 4) if chip is v5p else (4, 4)
    network = torus.make_network(chip, mesh_of(grid, fsdp=int(np.prod(grid))))
    assert torus.permute_seconds(network, 1e9, sent) == pytest.approx(expected)


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


# The compiler's forms of a collective that runs beside others: start and done; on other cores; in parts, fused with what runs beside it.
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
def test_an_asynchronous_collective_is_exposed_by_what_does_not_run_beside_it(form, beside):
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


def test_zeros_with_a_part_written_into_them_are_gathered():
    text = program(
        "  %p = bf16[1024,2048] parameter(0)\n  %z = bf16[] constant(0)\n  %i = s32[] constant(0)\n  %b = bf16[4096,2048] broadcast(%z), dimensions={}, "
        f"{cycles(1)}\n  %u = bf16[4096,2048] dynamic-update-slice(%b, %p, %i, %i), {cycles(1)}\n"
        "  ROOT %r = bf16[4096,2048] all-reduce(%u), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
        REDUCE,
    )
    (only,) = read(text).collectives
    assert (only.kind, only.bytes) == ("all-gather by all-reduce", 2 * 3 / 4 * 4096 * 2048 * 2)


def test_a_group_of_one_sends_nothing():
    text = program("  %p = f32[8] parameter(0)\n  ROOT %r = f32[8] all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add", REDUCE)
    assert read(text).collectives == [] and read(text).seconds == 0


def test_what_goes_to_other_slices_and_to_the_host():
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
    found = read(text, mesh=mesh_of((2, 2, 1), slices=2, slice=2, fsdp=4))
    (only,), (copied,), size = found.collectives, found.host_transfers, 1024 * 2048 * 2
    assert (only.kind, only.axes, only.network, only.bytes) == ("all-reduce", ("slice",), "slices", size)  # 2 × 1/2
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
    "name, operands, notes, chip, cycles",
    [  # blocks computed, of all, and rows of blocks, by the cycles of each
        ("splash_mha_fwd_residuals", MASK + QKV, "", v5p, 36 * 1201 + 64 * 392 + 8 * 701),
        ("splash_mha_dq_no_residuals", MASK + QKV, "", v5p, 36 * 3 * 512 + 64 * 260 + 8 * 172),  # the matrix units take longer than instructions
        ("splash_mha_dkv_no_residuals", MASK + QKV, "", v5p, 36 * 4 * 512 + 64 * 364 + 8 * 334),
        ("splash_mha_dkv_no_residuals", MASK + QKV, '\\"use_fused_bwd_kernel\\": true, ', v5p, 36 * 5 * 512 + 64 * 617 + 8 * 334),
        ("splash_mha_fwd_residuals", ["s8[1,4,4]"] * 2 + QKV, '\\"block_q\\": 1024, \\"block_kv\\": 1024, ', CHIPS["v6e"], 10 * 3159 + 16 * 299 + 4 * 696),
        ("splash_mha_fwd_no_residuals", QKV, '\\"block_q\\": 512, \\"block_kv\\": 512, ', v5e, 64 * 1191 + 64 * 251 + 8 * 698),  # no mask
        # A window: three blocks a row.
        ("splash_mha_fwd_residuals", ["s8[1,8,3]"] * 2 + QKV, '\\"block_q\\": 512, \\"block_kv\\": 512, ', v5p, 24 * 1201 + 64 * 392 + 8 * 701),
    ],
)
def test_splash_attention_is_costed_by_its_blocks(name, operands, notes, chip, cycles):
    sizes = f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{notes}\\"q_layout\\": 1}}"\n}}}}'
    found = read(kernel(name, "bf16[2,8,4096,128]", operands, attributes=f", {sizes}"), chip=chip, mesh=mesh_of((2, 2, 2), fsdp=8))
    cores = {"v5p": 2, "v5e": 1, "v6e": 1}[chip.name]
    assert found.parts["attention kernels"] == found.seconds == pytest.approx(2 * 8 * cycles / (cores * chip.clock_hz), rel=1e-3)
    (only,) = found.kernels
    assert (only.name, only.count, only.shapes, only.seconds) == (name, 1, tuple(operands), found.seconds)
    assert bool(found.notes) == (operands != QKV) and found.cycles == 0


@pytest.mark.parametrize("chip", splash.SCHEDULES)
@pytest.mark.parametrize("kernel", splash.PRODUCTS)
def test_no_attention_kernel_is_faster_than_the_chip(chip, kernel):
    chip = CHIPS[chip]
    for head_width, block in itertools.product((64, 128, 192, 256, 512), ((128, 128), (512, 512), (1024, 1024), (1024, 2048))):
        options = {"shape": (4096, 4096), "block": block, "head_width": head_width, "heads": 4}
        seconds = splash.seconds(chip, kernel, computed=10, **options)
        products = 4 * 10 * 2 * splash.PRODUCTS[kernel] * math.prod(block) * head_width
        assert seconds > products / chip.flops_per_device
        assert seconds < splash.seconds(chip, kernel, computed=11, **options)


def test_scopes_tell_what_shapes_do_not():
    def scoped(name, result, operands, scope):
        metadata = f', metadata={{op_name="jit(train_step)/transpose(jvp(layer))/while/body/{scope}/pallas_call"}}'
        return read(kernel(name, result, operands, attributes=metadata))

    for name in ("splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"):
        full, less, half = (scoped(name, "bf16[2,8,4096,128]", MASK + QKV, f"blocks={computed}of64") for computed in (64, 48, 32))
        assert full.seconds - less.seconds == pytest.approx(less.seconds - half.seconds) and half.seconds < 0.7 * full.seconds and not full.notes
    grouped = ("gmm", "bf16[4096,2048]", ["s32[8]", "bf16[4096,1024]", "bf16[8,1024,2048]"])
    quarter = scoped(*grouped, "rows=1024of4096")
    assert quarter.seconds == pytest.approx(read(kernel(*grouped)).seconds / 4) and "25% of the rows" in quarter.notes[0]


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 300), (False, 200)])
@pytest.mark.parametrize("parts", [1, 2])
def test_visible_blocks_are_those_that_hold_something(causal, window, parts):
    T = np.arange(1024)
    seen = (T[:, None] >= T if causal else np.ones((1024, 1024), bool)) & (True if window is None else abs(T[:, None] - T) < window)
    blocks = seen.reshape(8, 128, 4, 256).any(axis=(1, 3)).reshape(parts, -1).sum(axis=1)
    sides = (None if window is None else window - 1, 0 if causal else window and window - 1)
    assert fused._visible_blocks((1024, 1024), parts, (128, 256), sides) == blocks.max()


def test_other_kernels():
    gmm = read(kernel("gmm", "bf16[4096,2048]", ["s32[8]", "bf16[4096,1024]", "bf16[8,1024,2048]"]))
    tgmm = read(kernel("tgmm", "bf16[8,1024,2048]", ["s32[8]", "bf16[1024,4096]", "bf16[4096,2048]"]))
    assert gmm.parts["matrix products"] == tgmm.seconds == pytest.approx(2 * 4096 * 1024 * 2048 / (459e12 * 0.8))
    cost = ', backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"459000000000","bytes_accessed":"1000"}}}'
    assert read(kernel("mine", "f32[8]", ["f32[8]"], cost)).parts["other"] == pytest.approx(2e-3)
    assert read(kernel("ragged-dot-none", "f32[8]", ["f32[8]"], cost)).parts["matrix products"] == pytest.approx(1e-3 / 0.8)
    unknown = read(kernel("mine", "f32[8]", ["f32[8]"]))
    assert unknown.seconds == 0 and unknown.kernels[0].seconds is None and "kernel mine" in unknown.notes[0]


def test_chips_by_the_names_of_their_devices():
    assert chip_of("TPU v5") is v5p and chip_of("TPU v5 lite") is v5e and chip_of("TPU v4 lite") is None
    for chip in CHIPS.values():
        assert chip_of(chip.device_kinds[0]) is chip
        if chip.platform == "tpu":  # the peak is what all matrix units do in a cycle
            per_cycle = chip.flops_per_second / chip.clock_hz / (2 * chip.matrix_unit**2)
            assert per_cycle == pytest.approx({"v4": 8, "v5e": 4, "v5p": 8, "v6e": 4, "tpu7x": 8}[chip.name], rel=0.01)


# Programs that are compiled here


def devices(name: str):
    pytest.importorskip("libtpu")
    topology = topology_lib.parse(name)
    return topology, topology_lib.devices(topology)


def compiled(function, mesh, *arrays, options=None, **kwargs) -> str:
    return jax.jit(function, **kwargs).lower(*arrays).compile(compiler_options=options or {}).as_text()


def array(mesh, shape, spec=P(), dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


# 96 MB of the 128 MB on the chip for tiles, as the published recipes have it; with the compiler's own 16, v6e reads operands more often.
TILES = {"xla_tpu_scoped_vmem_limit_kib": 98304}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("shape", [(8192, 8192, 8192), (16384, 4096, 11008)])
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_a_product_takes_its_flops_over_the_peak(name, shape):
    topology, found = devices(name)
    mesh = Mesh(np.array(found[:1]), ("data",))
    m, k, n = shape
    text = compiled(jnp.matmul, mesh, array(mesh, (m, k)), array(mesh, (k, n)), options=TILES)
    result, best = estimate(text, topology, mesh), 2 * m * k * n / topology.chip.flops_per_device
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
    """A step of gradient descent; rows stay where they are, weights are gathered."""

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
@pytest.mark.parametrize("chip", splash.SCHEDULES)
def test_attention_kernels_are_scheduled_as_the_table_says(chip, tmp_path):
    """In a process of its own, whose compiler is told to write its schedules down; other versions of it differ a little."""
    command = [sys.executable, f"{ROOT}/benchmarks/attention_kernels.py", f"--chips={chip}", f"--json={tmp_path / 'found.json'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 12  # forward, two kernels of the backward pass, or one, in three sizes
    for each in found:
        schedule = splash.SCHEDULES[chip][each["kernel"]]
        expected = schedule.wide if each["head_width"] > 128 else schedule.block if each["block"] == 512 else schedule.large
        assert each["computed"] == pytest.approx(expected, rel=0.1), each
        if each["head_width"] == 128 and each["block"] == 1024:
            assert each["step"] == pytest.approx(schedule.step, rel=0.3) and each["row"] == pytest.approx(2 * schedule.row, rel=0.3), each


@pytest.mark.tpu_compiler
def test_scopes_reach_the_compiled_kernels():
    """Of the gradient too: what JAX's own rules for it are traced in, the estimate hangs on."""
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

    result = estimate(compiled(jax.grad(loss, (0, 1)), mesh, x, w), topology, mesh)
    print([(each.name, each.count, each.seconds) for each in result.kernels])
    seconds = {}
    for each in result.kernels:
        seconds[each.name] = seconds.get(each.name, 0) + each.seconds / each.count
    for which, name in (("fwd", "splash_mha_fwd_residuals"), ("dq", "splash_mha_dq_no_residuals"), ("dkv", "splash_mha_dkv_no_residuals")):
        times = {"computed": 3, "shape": (1024, 1024), "block": (512, 512), "head_width": 128, "heads": 2}
        assert seconds.pop(name) == pytest.approx(splash.seconds(topology.chip, which, **times))
    assert set(seconds) == {"gmm", "tgmm"}
    assert not any("causal" in note for note in result.notes) and any("25% of the rows" in note for note in result.notes)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2"])
def test_scanned_and_unrolled_take_the_same(name):
    topology, found = devices(name)
    mesh = Mesh(np.array(found), ("data",))
    arrays = (array(mesh, (8, 2048, 8192)), array(mesh, (8, 8192, 2048))), array(mesh, (32768 * 4, 2048), P("data"))
    scanned, unrolled = (estimate(compiled(forward(scan, 8), mesh, *arrays), topology, mesh) for scan in (True, False))
    print(f"\n{name}, forward: {scanned.cycles} and {unrolled.cycles} cycles, {scanned.seconds * 1e3:.2f} and {unrolled.seconds * 1e3:.2f} ms")
    assert scanned.cycles == pytest.approx(unrolled.cycles, rel=0.03) and scanned.seconds == pytest.approx(unrolled.seconds, rel=0.03)


@pytest.mark.tpu_compiler
def test_a_scanned_and_an_unrolled_train_step_take_the_same():
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
        totals[scan] = estimate(text, topology, mesh)
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
def test_a_scanned_and_an_unrolled_llama_take_the_same():
    """Four of Llama-2-7B's blocks, as its config trains them: minutes."""
    pytest.importorskip("libtpu")
    changes = {"model.layers": 4, "mesh.data": 1, "mesh.fsdp": 4, "data.batch_size": 16}
    plans = [
        make_plan(build_experiment(load_config(str(ROOT / "configs" / "llama2_7b.py"), changes | {"model.scan": scan})), "v5p:2x2x1") for scan in (True, False)
    ]
    for plan in plans:
        print(f"\n{plan.time.cycles} cycles, {plan.time.seconds * 1e3:.1f} ms, {plan.time.parts}")
    scanned, unrolled = (plan.time for plan in plans)
    assert scanned.cycles == pytest.approx(unrolled.cycles, rel=0.03)
    # What a turn begins with has nothing of the turn before it beside; the programs do differ there.
    computing, other = (time.seconds - time.parts["exposed collectives"] for time in (scanned, unrolled))
    assert computing == pytest.approx(other, rel=0.03) and scanned.seconds == pytest.approx(unrolled.seconds, rel=0.04)
    kinds = [{(c.kind, c.axes): (c.count, c.bytes) for c in time.collectives if c.bytes > 1e7} for time in (scanned, unrolled)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 2
    assert [(k.name, k.count) for k in scanned.kernels] == [(k.name, k.count) for k in unrolled.kernels]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5e:2x4"])
def test_collectives_send_what_closed_forms_say(name):
    topology, found = devices(name)
    mesh = Mesh(np.array(found).reshape(2, 4), ("data", "fsdp"))
    size = 1024 * 2048 * 2  # of one device's part
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
        result = estimate(text, topology, mesh)
        # A reduce-scatter moves edges of its padded parts on beside what it sends.
        only = next(each for each in result.collectives if each.kind == kind)
        print(f"{name} {kind} {axes}: {only.bytes / 1e6:.3f} MB in {only.seconds * 1e6:.1f} µs")
        assert (only.axes, only.count, only.network) == (axes, 1, "links") and only.bytes == pytest.approx(expected)
        others = [each for each in result.collectives if each is not only]
        assert all(kind == "reduce-scatter" and each.kind == "collective-permute" and each.bytes < 0.2 * expected for each in others)
