"""Print the cycles of splash attention's kernels on TPUs, by the compiler's schedule; no TPU is needed.

    python benchmarks/attention_kernels.py                          # every chip
    python benchmarks/attention_kernels.py --chips=v5p --json=FILE  # one chip, and a file with each kernel's figures

Needs `pip install 'jaxmodels[plan]'`; takes 20 to 60 seconds a chip on two cores. A TPU core executes one bundle of instructions a cycle. A schedule contains
the waits for results, except those of the matrix units, which can be issued more products than they can compute: a block takes as many cycles as its bundles
or its products, whichever are more. Waits for memory are not included.

The figures come from the loop over the grid. The branch in it with matrix products is the block, the other branches are the beginning and end of a row of
blocks, and the rest is executed with every block.
"""

import argparse
import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path

TOPOLOGIES = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
SIZES = ((512, 128), (1024, 128), (512, 256))  # (block size, head width)
COMPUTE = 512  # keys that a block multiplies at once, as in `models.fused`


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Instruction bundles of one kernel.

    Attributes:
      chip, kernel: names.
      block: block size in queries and keys.
      head_width: width of a head.
      computed: bundles of a block's products.
      step: other bundles of every block.
      row: bundles at the beginning and end of a row of blocks.
    """

    chip: str
    kernel: str
    block: int
    head_width: int
    computed: int
    step: int
    row: int


def compile_kernels(chip: str, block: int, head_width: int, fused: bool) -> None:
    """Compile the forward and backward pass of causal attention with two rows and two heads, two blocks long."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxmodels.hardware import absent, topologies

    backward = {"use_fused_bwd_kernel": True} if fused else {"block_q_dq": block, "block_kv_dq": block}
    sizes = {f"block_{side}{of}": block for side in ("q", "kv") for of in ("", "_dkv")}
    sizes |= {f"block_kv{of}_compute": min(block, COMPUTE) for of in ("", "_dkv")}
    length = 2 * block

    def forward_and_backward(q, k, v, gradient):
        mask = mask_lib.MultiHeadMask([mask_lib.CausalMask((length, length))])
        kernel = kernel_lib.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=kernel_lib.BlockSizes(**sizes, **backward))
        y, vjp = jax.vjp(jax.vmap(jax.vmap(kernel)), q, k, v)
        return y, vjp(gradient)

    mesh = Mesh(np.array(absent.devices(topologies.parse(TOPOLOGIES[chip]))[:1]), ("x",))
    x = jax.ShapeDtypeStruct((2, 2, 1, length, head_width), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.jit(forward_and_backward).lower(x, x, x, x).compile()


def read_schedule(text: str) -> tuple[int, int, int]:
    """Return `computed`, `step` and `row` of `Bundles` from a kernel's final schedule."""
    found = re.findall(r"(?ms)^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(.*?)(?=^\s*0x[0-9a-f]+\s+(?:[A-Z]{2})?\s*:|\Z)", text)
    bundles = [instructions for _, instructions in found]  # their numbers count from 0
    starts = {}
    for i, instructions in enumerate(bundles):
        for region in re.findall(r"(?:Start|Start/End empty) region (\d+)", instructions):
            starts.setdefault(int(region), i)
    jumps = [
        (i, starts[int(region)])
        for i, instructions in enumerate(bundles)
        for region in re.findall(r"sbr\.rel.*?region(\d+)", instructions)
        if int(region) in starts
    ]
    end, start = max(((at, to) for at, to in jumps if to < at), key=lambda jump: jump[0] - jump[1])
    branches = [(at, to) for at, to in jumps if start <= at < to <= end]
    multiplies = [any("vmatmul." in bundles[i] for i in range(at, to)) for at, to in branches]
    block = min((branch for branch, does in zip(branches, multiplies, strict=True) if does), key=lambda branch: branch[1] - branch[0])
    rows = [(at, to) for (at, to), does in zip(branches, multiplies, strict=True) if not does and not block[0] < at < block[1]]
    row = sum(to - at for at, to in rows)
    return block[1] - block[0], end - start - (block[1] - block[0]) - row, row


def measure(chip: str, folder: Path) -> list[Bundles]:
    """Return the bundles of all kernels of a chip; the compiler writes its schedules to `folder`."""
    found = []
    for block, head_width in SIZES:
        for fused in (False, True):
            compile_kernels(chip, block, head_width, fused)
            for file in folder.glob("*splash*-final_bundles.txt"):
                kernel = re.search(r"splash_mha_(fwd|dkv|dq)", file.name)[1]
                if "schedule-analysis" not in file.name and (kernel != "fwd" or not fused):
                    found.append(Bundles(chip, "fused" if fused else kernel, block, head_width, *read_schedule(file.read_text())))
            for file in folder.iterdir():
                file.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help="comma-separated, of " + ", ".join(TOPOLOGIES))
    parser.add_argument("--json", help="file to write each kernel's figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads this variable once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        found = [each for chip in options.chips.split(",") for each in measure(chip, Path(folder))]
    print("| chip | kernel | block | head width | cycles of a block | other cycles per block | cycles per row of blocks |\n|---|---|---|---|---|---|---|")
    for each in found:
        print(f"| {each.chip} | {each.kernel} | {each.block:,} | {each.head_width} | {each.computed:,} | {each.step:,} | {each.row:,} |")
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(each) for each in found]))


if __name__ == "__main__":
    main()
