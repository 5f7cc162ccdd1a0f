"""Train small models on simulated devices and write the results: `python train_on_mesh.py DEVICES CASES.json OUTPUT`.

A case is {"model", "mesh", "partition", "accumulate", "dropout", "sharding", "optimizer", "steps", "lora"}; adapters start from a run of one step. The losses of all steps and the final parameters are
written to OUTPUT/NUMBER.npz. With "compile", the step is only compiled, and its collectives and bytes are written to OUTPUT/NUMBER.json.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jaxmodels.experiment.build import build_experiment
from jaxmodels.models.functional import flatten
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.runs.folder import RunFolder
from jaxmodels.training.signals import StopSignals
from jaxmodels.training.trainer import Trainer

TEXT = {"source": "python_docs", "tokenizer": "byte+special", "sequence_length": 16, "batch_size": 32}
# An epsilon above the rounding errors of gradients, some of which (of rare tokens) are almost zero.
ADAM = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0, "eps": 1e-6}
# Adam divides by the size of gradients. Before batch normalisation some are almost zero, and it would turn rounding errors into updates.
MOMENTUM = {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9}
BLOCKS = {"layers": 2, "heads": 4, "width": 32, "context": 16, "scan": True}
MODELS = {
    "cnn": {
        "model": {"name": "resnet18", "stages": (1, 1), "width": 16, "stem": "cifar"},
        "task": {"name": "classify"},
        "data": {"source": "digits", "batch_size": 32},
        "optimizer": MOMENTUM,
    },
    "lstm": {"model": {"name": "lstm", "width": 32}, "task": {"name": "language_model", "sample_length": 0}, "data": TEXT, "optimizer": ADAM},
    "gpt": {"model": {"name": "gpt", **BLOCKS}, "task": {"name": "language_model", "sample_length": 0}, "data": TEXT, "optimizer": ADAM},
    # A row of text has one token more than inputs that predict the next one.
    "bert": {"model": {"name": "encoder", **BLOCKS}, "task": {"name": "masked_lm"}, "data": TEXT | {"sequence_length": 15}, "optimizer": ADAM},
    "deberta": {
        "model": {"name": "encoder", **BLOCKS, "positions": "disentangled", "relative_buckets": 4, "relative_distance": 16},
        "task": {"name": "masked_lm"},
        "data": TEXT | {"sequence_length": 15},
        "optimizer": ADAM,
    },
    "moe": {
        "model": {"name": "gpt", **BLOCKS, "moe": {"experts": 4, "top_k": 2}, "activation": "swiglu", "bias": False},
        "task": {"name": "language_model", "sample_length": 0},
        "data": TEXT,
        "optimizer": ADAM,
    },
    # User modules whose layers keep their own random streams.
    "own_cnn": {
        "model": {"name": "tutorial_models:TutorialCNN", "dropout": 0.0},
        "task": {"name": "classify"},
        "data": {"source": "digits", "batch_size": 32},
        "optimizer": MOMENTUM,
    },
    "own_lm": {
        "model": {"name": "tutorial_models:TutorialLM", "dropout": 0.0},
        "task": {"name": "language_model", "sample_length": 0},
        "data": TEXT,
        "optimizer": ADAM,
    },
}


def config(case: dict) -> dict:
    """Return the config of a case."""
    config = json.loads(json.dumps(MODELS[case["model"]]))
    if case.get("dropout") and case["model"] != "cnn":
        config["model"]["dropout"] = case["dropout"]
    config["model"] |= case.get("options", {})
    config["data"] |= case.get("data", {})
    config["optimizer"] = case.get("optimizer", config["optimizer"])
    steps = case.get("steps", 20)
    config["training"] = {"steps": steps, "accumulate": case.get("accumulate", 1), "ema": 0.9}
    config |= {key: case[key] for key in ("mesh", "partition", "sharding") if key in case}
    return config | {"log": {"every": 1, "tensorboard": False}, "checkpoint": {"every": steps}}


def train(config: dict, folder: str) -> Trainer:
    """Train a config in a folder."""
    with StopSignals() as stop:
        experiment = build_experiment(config)
        RunFolder(folder).write_config(experiment.config)
        trainer = Trainer(experiment, RunFolder(folder), stop, Console(quiet=True))
        trainer.run()
        trainer.close()
    return trainer


def run(case: dict, output: Path) -> None:
    """Train a case with `Trainer`, as `train` does."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as parent:
        start = {}
        if "lora" in case:
            train(config(case | {"steps": 1}), parent)
            start = {"init_from": parent, "lora": case["lora"]}
        trainer = train(config(case) | start, folder)
        losses = [values["loss"] for _, split, values in trainer.lines if split == "train"]
        rest = [values["loss"] for _, split, values in trainer.lines if split != "train"]
        state = jax.device_get({"params": trainer.state.params, "ema": trainer.state.ema, "stats": trainer.state.stats})
        notes = RunFolder(folder).manifest()["fallbacks"]
    np.savez(output, losses=losses, evaluated=rest, notes=notes, **{path.replace("/", "|"): x for path, x in flatten(state).items()})


def inspect(case: dict, output: Path) -> None:
    """Compile a case's step and write its collectives, as (operation, shapes, in a loop), and its bytes on a device."""
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        trainer = Trainer(build_experiment(config(case)), RunFolder(folder), stop, Console(quiet=True))
        shapes, experiment = trainer.shapes, trainer.experiment
        sharding = mesh_lib.batch_sharding(trainer.mesh)
        batch = experiment.batch_shapes(experiment.loading.batch_size)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for k, s in batch.items()}
        out = (jax.tree.map(lambda x: x.sharding, shapes), mesh_lib.replicated(trainer.mesh))
        function = experiment.step_function(out[0].params)
        compiled = jax.jit(function, donate_argnums=0, out_shardings=out).lower(shapes, batch, jax.random.key(0)).compile()
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    batch_bytes = mesh_lib.bytes_per_device(batch)
    text = compiled.as_text()
    figures = {
        "shapes": sorted(set(re.findall(r"f32\[[\d,]+\]", text))),
        "collectives": collectives(text),
        "state_bytes": state,
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes - batch_bytes,
        "planned_bytes": mesh_lib.bytes_per_device(shapes),
    }
    output.with_suffix(".json").write_text(json.dumps(figures))


def collectives(text: str) -> list[tuple[str, list[str], bool]]:
    """Return (operation, result shapes, whether it runs in a loop) of a compiled program's collectives, in order."""
    found, loops = [], set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        if match := re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line):
            found.append((match[2], re.findall(r"\w+\[[\d,]*\]", match[1]), computation in loops))
    return found


if __name__ == "__main__":
    mesh_lib.simulate_devices(int(sys.argv[1]))
    output = Path(sys.argv[3])
    for number, case in enumerate(json.loads(Path(sys.argv[2]).read_text())):
        (inspect if case.get("compile") else run)(case, output / f"{number}.npz")
