"""Tasks as a user writes them, and faulty ones, named in configs as `own_tasks:NAME`."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.tasks import Sample, Task
from jaxmodels.tasks.classify import Classify


class ClassifyNoisy(Classify):
    """Classification with two more metrics: `draws`, from the rows' keys, and `within_two`, whether the true label is among the two most probable."""

    higher_is_better = {"within_two": True}
    shown = ("loss", "within_two")
    scores = ("key_sum",)

    def evaluate(self, model, batch, key):
        logits = model(batch["image"]).astype(jnp.float32)
        _, best = jax.lax.top_k(logits, 2)
        right = jnp.any(best == batch["label"][:, None], axis=1)
        drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, 1000))(key)
        total = jnp.sum(batch["weight"])
        own = {"within_two": (jnp.sum(right * batch["weight"]), total), "draws": (jnp.sum(drawn * batch["weight"]), total)}
        return super().evaluate(model, batch, key) | own

    def outputs(self, model, batch, key):
        return {"drawn": jax.vmap(lambda k: jax.random.randint(k, (), 0, 1000))(key)}

    def score(self, outputs):
        position = np.arange(1, len(outputs["drawn"]) + 1)
        return {"key_sum": float(np.sum(outputs["drawn"] * position))}

    def predict(self, model, batch, key=None):
        return jax.vmap(jax.random.bits)(key)

    def samples(self, model, key):
        return {"noise": jax.random.uniform(key, (2, 4, 4, 1)), "label": jnp.arange(3)}

    def show(self, outputs):
        return [Sample("noise", "images", outputs["noise"]), Sample("labels", "text", " ".join(map(str, outputs["label"])))]


class OldProtocol:
    """A task without the base class."""

    def __init__(self, info):
        self.provides, self.batch = {"image_shape": info["image_shape"], "num_classes": 2}, {"image": None}

    def metrics(self, model, batch):
        return {}


class OldMethods(Task):
    """A task with `metrics` in place of `evaluate`."""

    def __init__(self, info):
        pass

    def loss(self, model, batch, rngs):
        raise NotImplementedError

    def metrics(self, model, batch):
        return {}


class SamplesUnshown(Classify):
    def samples(self, model, key):
        return {"x": jnp.zeros(3)}


class ScoresUnscored(Classify):
    scores = ("f1",)


CONFIG = {
    "model": {"name": "cnn", "features": (2,), "hidden": 4},
    "task": {"name": "own_tasks:ClassifyNoisy"},
    "data": {"source": "digits", "batch_size": 32},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "training": {"steps": 1},
    "seed": 5,
}


def evaluate(batch_size: int) -> dict:
    """Return the metrics of initial weights on the validation split, over all devices."""
    from jaxmodels.experiment.build import build_experiment
    from jaxmodels.parallel.mesh import MeshSizes, make_mesh
    from jaxmodels.training.evaluation import Evaluator
    from jaxmodels.training.signals import StopSignals

    experiment = build_experiment(CONFIG | {"data": CONFIG["data"] | {"eval_batch_size": batch_size}})
    state = experiment.init_function()(jax.random.key(0))
    with StopSignals() as stop:
        return Evaluator(experiment, make_mesh(MeshSizes()), stop).run(state.params, state.stats, experiment.dataset.splits["validation"])


if __name__ == "__main__":
    from jaxmodels.parallel.mesh import simulate_devices

    simulate_devices(int(sys.argv[1]))
    print(json.dumps(evaluate(int(sys.argv[2])) | {"devices": jax.device_count()}))
