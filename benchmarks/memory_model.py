"""Compare the analytic memory model with the compiler's peak memory for the large configs: bytes per device, and their parts.

    JAX_PLATFORMS=cpu python benchmarks/memory_model.py [CONFIG[:VARIANT] [TOPOLOGY]] …

Each step takes one or two minutes on two cores. The default is the large configs of `configs/` with the topologies of their meshes. The last line gives
the number of steps within a tenth.
"""

import resource
import sys
import time

from jaxmodels.config import load_config
from jaxmodels.experiment.build import build_experiment
from jaxmodels.hardware import topologies
from jaxmodels.plan import compiler, memory

STEPS = (
    ("gpt2_xl", "v5p:4x4x4"),
    ("gpt2_xl", "v6e:8x8"),
    ("llama2_7b", "v5p:4x4x4"),
    ("llama2_7b:128k", "v5p-128"),
    ("llama2_7b:slices", "4xv5p-128"),
    ("llama2_70b", "v5p-1024"),
    ("llama3_8b", "v6e-256"),
    ("llama3_8b:64", "v5p:4x4x4"),
    ("llama3_8b:tensor", "v5p:4x4x4"),
    ("llama3_8b:128k", "v5p:4x4x4"),
    ("mixtral_8x7b", "v5p:4x4x4"),
    ("mixtral_8x7b:expert", "v5p:4x4x4"),
    ("gpt3_175b", "v5p-1024"),
    ("llama3_405b", "v5p-2048"),
    ("vit_g14", "v5p-128"),
    ("resnet50", "v5p:4x4x4"),
    ("bert_large", "v5p:4x4x4"),
    ("bert_large", "v6e:8x8"),
)


def main() -> None:
    arguments = sys.argv[1:]
    steps = [tuple(arguments[i : i + 2]) for i in range(0, len(arguments), 2)] or STEPS
    near = 0
    for name, place in steps:
        file, _, variant = name.partition(":")
        experiment = build_experiment(load_config(f"configs/{file}.py" + (f":{variant}" if variant else "")))
        where, started = topologies.parse(place), time.perf_counter()
        model = memory.memory_model(experiment, where)
        modelled = time.perf_counter() - started
        step = compiler.compile_step(experiment, place)
        peak = step.compiled.memory_analysis().peak_memory_in_bytes
        near += abs(model.total / peak - 1) <= 0.1
        parts = ", ".join(f"{part} {getattr(model, part) / 1e9:.2f}" for part in ("state", "gradients", "activations", "logits", "gathered", "temporaries"))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(
            f"{name} | {place} | model {model.total / 1e9:.2f} GB in {modelled:.1f} s ({parts}) | compiler {peak / 1e9:.2f} GB in {step.record.seconds:.0f} s, "
            f"peak host memory {used:.1f} GB | {model.total / peak - 1:+.1%}",
            flush=True,
        )
    print(f"{near} of {len(steps)} within a tenth")


if __name__ == "__main__":
    main()
