"""Measure the host memory and time that importing a pretrained model takes: a folder with layers of Llama 2 7B's sizes, in bfloat16.

    python benchmarks/import_memory.py --layers=13 --folder=/tmp/llama_shaped

The folder is written file by file with random weights, and deleted afterwards. Each way of importing it runs in its own process:

    load_model   `pretrained.weights.load_model`: a plain module with its weights
    import_run   `jaxmodels import`: a run folder with a checkpoint
    init_from    the start of a training run, as in `jaxmodels train`, with SGD, which has no optimizer state

The figure is the process's peak resident memory above that after starting JAX. It should stay below the size of the float32 parameters (the target)
plus 1.3 times the largest file.

Measured on two cores of a shared machine, with 13 layers: the target is 11.57 GB, the largest file 0.99 GB, so the limit is 12.86 GB. `load_model` took
12.33 GB (22 processor seconds), `import_run` 11.66 GB (50 s, mostly for its checkpoint), `init_from` 11.73 GB (21 s). With 6 layers, a target of 5.91 GB,
`init_from` and `import_run` took 21.9 GB and 8.8 GB before a run's start stopped initialising parameters that it reads and an import wrote its checkpoint
in chunks; now 5.97 GB and 6.23 GB.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxmodels.models import functional
from jaxmodels.pretrained import safetensors

WAYS = ("load_model", "import_run", "init_from")
WIDTH, MLP, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def tensors(layers: int, divisor: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Llama's tensors in the format of `transformers`, with widths divided by `divisor`."""
    width, mlp = WIDTH // divisor, MLP // divisor
    shapes = {"model.embed_tokens.weight": (VOCABULARY // divisor, width)}
    for layer in range(layers):
        home = f"model.layers.{layer}"
        shapes |= {f"{home}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{home}.mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes |= {f"{home}.mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{home}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY // divisor, width)}


def write_folder(folder: Path, layers: int, divisor: int, shard_gb: float) -> tuple[int, int]:
    """Write a pretrained model's folder. Return the bytes of its largest file and of its parameters in float32."""
    random = np.random.default_rng(0)

    def values(shape):
        # Random bits of numbers below 2 in magnitude. Their values do not matter, but they must not be zeros.
        bits = random.integers(0, 2**16, shape, dtype=np.uint16)
        return (bits & np.uint16(0xBFFF)).view(ml_dtypes.bfloat16)

    dtype = np.dtype(ml_dtypes.bfloat16)
    whole = {name: safetensors.ToWrite(shape, dtype, lambda shape=shape: values(shape)) for name, shape in tensors(layers, divisor).items()}
    files = list(safetensors.in_files(whole, int(shard_gb * 1e9)))
    weight_map = {}
    for i, group in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        safetensors.write(folder / name, group, {"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH // divisor, "intermediate_size": MLP // divisor}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": layers, "max_position_embeddings": 4096}
    config |= {"vocab_size": VOCABULARY // divisor, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return max(file.stat().st_size for file in folder.glob("*.safetensors")), 2 * sum(tensor.nbytes for tensor in whole.values())


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def import_model(way: str, folder: str, output: str) -> dict[str, float]:
    """Import a folder in this process. Return seconds, processor seconds, and resident bytes before and at the peak."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.experiment.build import build_experiment
    from jaxmodels.hardware.malloc import tune_malloc
    from jaxmodels.inference.pretrained import import_run
    from jaxmodels.parallel import mesh, sharding
    from jaxmodels.pretrained.weights import load_model
    from jaxmodels.runs.checkpoint import Checkpoints
    from jaxmodels.runs.folder import RunFolder
    from jaxmodels.training import initialize as state

    if way == "init_from":
        tune_malloc()  # as `jaxmodels train` does
    jax.block_until_ready(jnp.zeros(8) + 1)
    reference, before, start, processor = f"hf:{folder}", peak(), time.perf_counter(), time.process_time()
    if way == "load_model":
        model = load_model(reference)
        jax.block_until_ready(jax.tree.leaves(functional.split(model)[1]))
    elif way == "import_run":
        import_run(reference, output)
    else:
        config = {"init_from": reference, "task": {"name": "language_model", "sample_length": 0}, "data": {"source": "arrays", "batch_size": 1}}
        config |= {"optimizer": {"name": "sgd", "learning_rate": 1e-3}, "training": {"steps": 1}}
        rows = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]  # a source of arrays takes its vocabulary size from its largest token
        experiment = build_experiment(config, data={"train": {"tokens": np.full((1, 9), rows - 1, np.int32)}})
        layout = sharding.make_layout(mesh.make_mesh(experiment.mesh), experiment.sharding)
        shapes = sharding.place_state(experiment.state_shapes(), experiment.sharding, layout)
        checkpoints = Checkpoints(RunFolder(output).checkpoints)
        train_state, *_ = state.start(experiment.on("cpu", layout), RunFolder(output), checkpoints, shapes, jax.random.key(0))
        jax.block_until_ready(train_state.params)
        checkpoints.close()
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor, "before": before, "peak": peak()}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Run `import_model` in a new process."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        command = [sys.executable, __file__, f"--child={way}", f"--folder={folder}", f"--output={output}/run"]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=13, help="number of layers, of Llama's 32 (default: 13, with 11.6 GB of float32 parameters)")
    parser.add_argument("--divisor", type=int, default=1, help="divisor of the widths, for a quick test")
    parser.add_argument("--shard_gb", type=float, default=1.0, help="maximum size of a file in GB (default: 1)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the model (default: a temporary folder)")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"comma-separated, of {','.join(WAYS)}")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(import_model(options.child, str(options.folder), options.output)))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.perf_counter()
        shard, target = write_folder(folder, options.layers, options.divisor, options.shard_gb)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        seconds = time.perf_counter() - start
        print(f"{options.layers} layers: {size / 1e9:.2f} GB of bfloat16, largest file {shard / 1e9:.2f} GB; written in {seconds:.0f} s")
        limit = target + 1.3 * shard
        print(f"target, float32: {target / 1e9:.2f} GB; limit with 1.3 times the largest file: {limit / 1e9:.2f} GB")
        for way in options.ways.split(","):
            found = measure(way, folder)
            used = found["peak"] - found["before"]
            print(
                f"{way:<11} {used / 1e9:6.2f} GB above the {found['before'] / 1e9:.2f} GB of the process before, "
                f"{'under' if used <= limit else 'OVER'} the limit (target {(used - target) / shard:+.2f} files); "
                f"{found['seconds']:.0f} s, {found['processor']:.0f} processor seconds, {size / 1e9 / found['seconds']:.2f} GB/s of the files"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
