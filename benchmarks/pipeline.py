"""Compare the predicted and measured bubble of a pipeline: train steps of one batch, split into more and more microbatches.

    python benchmarks/pipeline.py                  # four simulated devices on the CPU
    python benchmarks/pipeline.py --stages=8       # eight devices: real ones if there are as many

A stage computes at every turn; in the bubble it computes rows that are discarded. So the bubble shows as additional work, even on simulated devices
that share a few cores and never wait visibly. The columns:

    predicted    (S - 1) / (M + S - 1)
    operations   1 - (operations without a pipeline / operations with it): matrix products of the traced step, by hardware/flops.py;
                 includes the few products outside the blocks
    work         1 - (processor seconds of a step sharded over `data` / those of a pipelined step), on the same devices: medians of
                 alternating steps. Includes other differences: sizes of products, loops, copies. Simulated devices only.
    time         the same for wall-clock seconds. On real devices, the idle share. On simulated devices, which share cores, their work
                 again, and any other load of the machine.
"""

import argparse
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="number of stages S, and of devices")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    arguments = parser.parse_args()

    import jax

    from jaxmodels.parallel.mesh import simulate_devices

    simulate_devices(arguments.stages)
    S, devices = arguments.stages, jax.devices()[: arguments.stages]
    if len(devices) < S:
        parser.error(f"--stages={S} needs as many devices; there are {len(devices)}")
    plain, plain_operations = _step(arguments, devices, {"data": S}, 1)
    steps = {M: _step(arguments, devices, {"pipeline": S, "data": 1}, M) for M in arguments.microbatches}
    times = {M: [] for M in (None, *steps)}
    for _ in range(arguments.rounds):
        for M, seconds in times.items():
            started = time.process_time(), time.perf_counter()
            jax.block_until_ready(plain() if M is None else steps[M][0]())
            seconds.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    work, clock = ({M: statistics.median(seconds[i] for seconds in times[M]) for M in times} for i in (0, 1))
    from jaxmodels.parallel import pipeline

    print(f"{S} x {devices[0].device_kind}; {arguments.rows} rows of {arguments.length} tokens, width {arguments.width}")
    print(f"data={S}: {clock[None]:.3f} s a step, {work[None]:.3f} processor seconds")
    print(f"{'microbatches':>12} {'turns':>6} {'predicted':>10} {'operations':>11} {'work':>6} {'time':>6} {'s a step':>9}")
    simulated = devices[0].platform == "cpu"
    for M, (_, operations) in steps.items():
        measured = [1 - plain_operations / operations, 1 - work[None] / work[M] if simulated else float("nan"), 1 - clock[None] / clock[M]]
        shares = "{:>11.1%} {:>6.0%} {:>6.0%}".format(*measured)
        print(f"{M:>12} {pipeline.turns(S, M):>6} {pipeline.bubble(S, M):>10.1%} {shares} {clock[M]:>9.3f}")


def _step(arguments, devices, sizes: dict, microbatches: int):
    """Return a function that runs one train step after the other on a mesh, and the operations of one step."""
    import jax

    from jaxmodels.data.loader import TrainingBatches
    from jaxmodels.experiment.build import build_experiment
    from jaxmodels.hardware.flops import count_flops
    from jaxmodels.parallel import mesh as mesh_lib
    from jaxmodels.parallel import sharding

    model = {"name": "gpt", "layers": 2 * arguments.stages, "heads": 4, "width": arguments.width, "context": arguments.length, "scan": True}
    config = {
        "model": model,
        "task": {"name": "language_model", "sample_length": 0},
        "data": {"source": "synthetic", "vocab_size": 64, "sequence_length": arguments.length, "examples": 1000, "batch_size": arguments.rows},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "training": {"steps": 10},
        "mesh": sizes,
        "sharding": {"microbatches": microbatches},
    }
    experiment = build_experiment(config)
    mesh = mesh_lib.make_mesh(experiment.mesh, devices)
    layout = sharding.make_layout(mesh, experiment.sharding)
    mesh_lib.check_batch(arguments.rows, 1, mesh, "data.batch_size", layout.microbatches)
    experiment = experiment.on(devices[0].platform, layout)
    shapes = sharding.place_state(experiment.state_shapes(), experiment.sharding, layout)
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(experiment.init_function(), out_shardings=placed)(jax.random.key(0))
    batch = TrainingBatches(experiment.dataset.splits["train"], arguments.rows, 1, seed=0, shuffle=True)[0]
    batch = mesh_lib.place(batch, mesh_lib.batch_sharding(mesh), arguments.rows)
    function, key = experiment.step_function(placed.params), jax.random.key(1)
    operations = count_flops(function, state, batch, key)
    compiled = jax.jit(function, donate_argnums=0, out_shardings=(placed, mesh_lib.replicated(mesh))).lower(state, batch, key).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch, key)
        return metrics

    jax.block_until_ready(step())
    return step, operations


if __name__ == "__main__":
    main()
