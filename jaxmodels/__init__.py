"""Train Flax models with Optax from one config file, on one CPU or a pod, with exact resume.

    import jaxmodels
    config = jaxmodels.load_config("configs/cnn_digits.py", {"training.epochs": 5})
    result = jaxmodels.train(config, workdir="runs/digits")
    run = jaxmodels.load("runs/digits")
    run.predict({"image": images})
    jaxmodels.serve("runs/digits", port=8000)

Names are imported when first used, so that `import jaxmodels` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; the same names as in _HOME
    from jaxmodels.api import train as train
    from jaxmodels.config import load_config as load_config
    from jaxmodels.errors import ConfigError as ConfigError
    from jaxmodels.errors import Diverged as Diverged
    from jaxmodels.errors import Interrupted as Interrupted
    from jaxmodels.experiment.sections import resolve as resolve
    from jaxmodels.inference.evaluate import evaluate as evaluate
    from jaxmodels.inference.load import load as load
    from jaxmodels.inference.run import Run as Run
    from jaxmodels.serving.server import serve as serve
    from jaxmodels.training.callback import Callback as Callback
    from jaxmodels.training.result import Result as Result

__version__ = "0.1.0"

_HOME = {
    "load_config": "jaxmodels.config",
    "resolve": "jaxmodels.experiment.sections",
    "train": "jaxmodels.api",
    "evaluate": "jaxmodels.inference.evaluate",
    "load": "jaxmodels.inference.load",
    "Run": "jaxmodels.inference.run",
    "serve": "jaxmodels.serving.server",
    "Callback": "jaxmodels.training.callback",
    "Result": "jaxmodels.training.result",
    "ConfigError": "jaxmodels.errors",
    "Diverged": "jaxmodels.errors",
    "Interrupted": "jaxmodels.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
