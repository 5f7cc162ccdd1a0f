"""Runs that trained adapters of another run, without training."""

import numpy as np

from jaxmodels.experiment.build import build_model
from jaxmodels.experiment.sections import resolve
from jaxmodels.inference.load import trained_info_of
from jaxmodels.models.functional import flatten, new_rngs, split
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.merge import new_folder, write_run
from jaxmodels.tokenizers.simple import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ,.", special=True)
LORAS = {
    "thin": {"rank": 2, "targets": ("attention/(query|value)$",)},
    "dora": {"rank": 3, "targets": ("attention/query$", "mlp/", "output$"), "alpha": 5.0, "dora": True},
}


def child_of(parent: str, folder, lora: dict, trained: tuple[str, ...] = (), seed: int = 0) -> str:
    """Write a run with random adapters of a parent, whose other weights stay there but for those that are `trained`."""
    origin = RunFolder(parent)
    info = trained_info_of(origin)
    config = resolve({key: value for key, value in origin.config().items() if value is not None} | {"lora": lora, "init_from": {"run": parent}})
    flat = flatten(split(build_model(config, info)[1](new_rngs(params=seed)))[1])
    rng = np.random.default_rng(seed)
    own = {path: np.float32(rng.normal(0, 0.5, x.shape)) for path, x in flat.items() if path.endswith(ADAPTERS) or path in trained}
    entry = {"run": parent, "id": origin.manifest()["id"], "step": 7, "taken": [path for path in flat if path not in own]}
    tokenizer = LETTERS.to_json()
    write_run(new_folder(str(folder)), config, own, {}, 3, info=info, tokenizer=tokenizer, parents=[entry])
    return str(folder)
