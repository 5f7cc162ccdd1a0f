"""Texts of engines on eight simulated devices, `python serve_on_mesh.py RUN…`; print them, and how the cache is sharded, as JSON."""

import json
import sys

from jaxmodels.parallel.mesh import simulate_devices

simulate_devices(8)

import jax  # noqa: E402
from engines import Answers, small_sizes  # noqa: E402

import jaxmodels  # noqa: E402
from jaxmodels.parallel.layout import axes_in  # noqa: E402
from jaxmodels.serving import engine as engine_lib  # noqa: E402

PROMPTS = ((1, 2, 3), tuple(range(5, 25)), (7,), (3, 9, 4, 1, 12), tuple(range(20, 5, -1)))


def main(*paths):
    results = []
    for path in paths:
        run = jaxmodels.load(path, spread=True)
        with small_sizes():
            engine = engine_lib.for_run(run, slots=8, context=64)
        engine.warm()
        compiled = engine.programs.compiled()
        answers = Answers(engine.start())
        tickets = [answers.ask(tokens, max_tokens=20) for tokens in PROMPTS]
        texts = [answers.tokens(ticket) for ticket in tickets]
        again = answers.tokens(answers.ask(PROMPTS[1], max_tokens=20))
        axes = sorted({axis for x in jax.tree.leaves(engine._batch.state["cache"]) for axis in axes_in(x.sharding.spec)})
        results.append({"texts": texts, "again": again, "axes": axes, "compiled": engine.programs.compiled() - compiled, "slots": engine.slots})
        engine.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
