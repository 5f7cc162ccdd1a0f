"""Generate texts of runs on eight simulated devices, `python generate_on_mesh.py few|all RUN…`; print them and the sharding of weights and caches as JSON."""

import json
import sys

from jaxmodels.parallel.mesh import simulate_devices

simulate_devices(8)

import jax  # noqa: E402
import numpy as np  # noqa: E402

import jaxmodels  # noqa: E402
from jaxmodels.generation import decoding  # noqa: E402
from jaxmodels.parallel.layout import axes_in  # noqa: E402

PROMPTS = ["abc", "the cat sat on the", "x"]


def parts(tree):
    """Return the largest number of shards of any array."""
    return max(x.size // int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree))


def main(kinds, *paths):
    results = []
    for path in paths:
        run = jaxmodels.load(path, spread=True)
        texts = [c.tokens for c in run.generate(PROMPTS, max_tokens=20)]
        generator = run.generator("float32")
        entry = {"texts": texts, "weights": parts(generator.weights[0])}
        if kinds == "all":
            entry["beams"] = [c.tokens for c in run.generate(PROMPTS[:2], max_tokens=8, beams=2)]
            entry["drawn"] = [c.tokens for c in run.generate(PROMPTS, max_tokens=20, temperature=1.0, top_k=9)]
        how = {"shape": decoding.GREEDY, "numbers": {}, "eos_ids": generator._eos_ids}
        tokens = [generator._tokens(prompt, 1) for prompt in PROMPTS]
        state = generator._programs.start(*generator.weights, *generator._inputs(tokens), max_new_tokens=32, key=jax.random.key(0), **how)
        state = generator._programs.advance(*generator.weights, state, np.int32(3), np.zeros(len(state["done"]), bool), **how)
        entry["cache"] = sorted({axis for x in state["cache"].arrays if x.ndim >= 3 for axis in axes_in(x.sharding.spec)})
        results.append(entry)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
