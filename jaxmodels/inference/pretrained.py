"""Present a pretrained model as a run: its config, the description of its data set, and a run folder."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_model
from jaxmodels.experiment.sections import resolve
from jaxmodels.models.functional import flatten, new_rngs, split
from jaxmodels.pretrained import preprocessing
from jaxmodels.pretrained import weights as pretrained_lib
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.merge import new_folder, write_run
from jaxmodels.tokenizers.factory import make_tokenizer

_TASKS = {"tokens": "masked_lm", "class": "classify_text", "tags": "tag"}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")


def pretrained_config(reference: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resolved config and the data set `info` that build a pretrained model with its published head.

    Raises:
      ConfigError: the head is unknown, or the task needs a tokenizer and the folder has none.
    """
    folder, architecture, _, _ = pretrained_lib.describe(reference)
    head = pretrained_lib.pretrained_head(folder, architecture)
    task, info = {"name": _TASKS.get(head, "language_model")}, {}
    names = folder.config.get("id2label") or {}
    labels = [names[key] for key in sorted(names, key=int)] or [str(i) for i in range(pretrained_lib.number_of_labels(folder.config))]
    if architecture.images:
        shape, count = pretrained_lib.pretrained_arguments(folder, architecture)
        info = {"image_shape": shape, "num_classes": count, "labels": labels}
        info |= {"preprocessor": values} if (values := preprocessing.read(folder)) else {}  # an export writes it back
        task = {"name": "classify"} | preprocessing.normalisation(folder)
    else:
        if any((folder.path / name).is_file() for name in _TOKENIZER_FILES):
            info["tokenizer"] = make_tokenizer(reference, (), None)
            if info["tokenizer"].vocab_size > info["tokenizer"].rows:
                raise ConfigError(
                    f"{reference}: its tokenizer has {info['tokenizer'].tokens:,} tokens, its model rows for {info['tokenizer'].rows:,}: tokens were "
                    f"added to it, and no rows to the model. Train it with config.init_from.run={reference}, which gives them rows."
                )
        info["vocab_size"] = folder.config["vocab_size"]
        kind = folder.config.get("problem_type") or ("regression" if len(labels) == 1 else None)
        if head == "class" and kind == "regression":
            task["name"] = "regress_text"
        elif head == "class":
            info |= {"num_classes": len(labels), "labels": labels}
            if kind == "multi_label_classification":
                task["name"], info["several_classes"] = "several_classes_of_text", True
        elif head == "tags":
            info["tags"] = labels
        elif architecture.model == "encoder_decoder":
            task["name"] = "seq2seq"
        if task["name"] in ("masked_lm", "seq2seq") and "tokenizer" not in info:
            raise ConfigError(f"{folder.path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}), which {task['name']} needs. Copy its files into the folder.")
    config = {"model": {"name": reference}, "task": task, "data": {"source": "arrays", "batch_size": 1}, "optimizer": {"name": "sgd"}}
    config["optimizer"]["learning_rate"] = 0.0
    return resolve(config | {"training": {"steps": 1}}), info


def import_run(reference: str, output: str) -> RunFolder:
    """Write a pretrained model as a run folder, which can be evaluated, exported, generated from and used as `init_from`.

    Args:
      reference: `hf:FOLDER` or `hf:OWNER/NAME`.
      output: a folder without a run.

    Raises:
      ConfigError: as in `pretrained_config` and `weights.locate_whole`; or the folder holds a run.
    """
    folder = new_folder(output)
    config, info = pretrained_config(reference)
    _, build = build_model(config, info)
    _, params, stats = split(nnx.eval_shape(lambda: build(new_rngs(params=0))))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes: dict[str, Mapping] = {"params": flatten(params), "stats": flatten(stats)}
    located = weights_lib.locate_whole(reference, config["model"], shapes["params"] | shapes["stats"])
    placed = {part: {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in tree.items()} for part, tree in shapes.items()}
    arrays = {part: weights_lib.read(located.arrays, tree) for part, tree in placed.items()}
    tokenizer = info.get("tokenizer")
    pretrained = located.pretrained
    entry = {"run": reference, "path": located.name, "id": pretrained.fingerprint, "step": 0, "weights": "published"}
    entry["model_type"] = pretrained.architecture.name
    text = None if tokenizer is None else tokenizer.to_json()
    types = {path: stored.dtype.name for path, stored in located.arrays.items()}
    common = max(set(types.values()), key=list(types.values()).count)
    entry["dtypes"] = {"": common} | {path: name for path, name in types.items() if name != common}  # so that an export writes the same bytes
    entry["token_ids"] = {key: value for key, value in pretrained.folder.config.items() if key.endswith("_token_id")}
    write_run(folder, config, arrays["params"], arrays["stats"], 0, info=info, tokenizer=text, parents=[entry])
    return folder
