"""The public API as a type checker sees it. `mypy` checks this file (see pyproject.toml); it is not run."""

from typing import Any, assert_type

import numpy as np
from ml_collections import ConfigDict

import jaxmodels


class CountSteps(jaxmodels.Callback):
    """A user's callback."""

    def __init__(self) -> None:
        self.count = 0

    def on_log(self, run: Any, step: int, values: dict[str, float]) -> None:
        values["count"] = float(self.count)

    def state(self) -> dict[str, int]:
        return {"count": self.count}


def use(images: np.ndarray) -> None:
    config = jaxmodels.load_config("configs/cnn_digits.py", {"training.epochs": 5})
    assert_type(config, ConfigDict)
    result = jaxmodels.train(config, workdir="runs/python", callbacks=[CountSteps()], quiet=True)
    assert_type(result, jaxmodels.Result)
    assert_type(result.metrics["test"]["accuracy"], float)
    assert_type(result.step, int)
    run = jaxmodels.load("runs/python")
    assert_type(run, jaxmodels.Run)
    run.predict({"image": images})
    assert_type(run.generate("To be", max_tokens=20)[0].text, str | None)
    assert_type(jaxmodels.evaluate("runs/python", split="test"), dict[str, Any])
    jaxmodels.serve(["runs/python", "chat=runs/sft"], port=8000)
