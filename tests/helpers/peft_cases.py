"""Adapters that PEFT writes for small random models, and runs that train adapters of these."""

import functools
import json

import jax
import numpy as np
import peft
import random_pretrained
import torch
from flax import nnx
from untrained_runs import begun_run

import jaxmodels
from jaxmodels.models.functional import flatten, split, unflatten
from jaxmodels.runs.checkpoint import Checkpoints, Progress, open_run
from jaxmodels.step.state import TrainState

TOKENS = np.random.default_rng(0).integers(3, random_pretrained.VOCABULARY, (4, 13)).astype(np.int32)
TOKENS[0, 0] = random_pretrained.VOCABULARY - 1  # the vocabulary of a source of arrays ends with its largest token
LABELS = np.arange(4, dtype=np.int32) % 3
# Name of a module in PEFT -> the corresponding layers here.
TARGETS = {
    "llama": (["q_proj", "down_proj", "embed_tokens"], [r"^blocks/\d+/attention/query$", r"^blocks/\d+/mlp/down$", "^embed$"]),
    "gpt2": (["c_attn", "c_fc"], [*(rf"^blocks/\d+/attention/{name}$" for name in ("key", "query", "value")), r"^blocks/\d+/mlp/up$"]),
    # One matrix there for queries, keys and values, of which keys and values have fewer heads.
    "phi3": (["qkv_proj", "down_proj"], [*(rf"^blocks/\d+/attention/{name}$" for name in ("key", "query", "value")), r"^blocks/\d+/mlp/down$"]),
    "bert_classes": (["query", "intermediate.dense"], [r"^blocks/\d+/attention/query$", r"^blocks/\d+/mlp/up$"]),
}


def write(name, path, folder, **options):
    """Write random adapters by PEFT for the pretrained model in `path`, and return its logits with them."""
    torch.manual_seed(1)
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name][0]} | options
    adapted = peft.get_peft_model(model_of(name, path), peft.LoraConfig(**config))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        named = dict(adapted.named_parameters())
        for key in named:
            if "lm_head.lora_A" in key and name == "gpt2":  # parts of what is one matrix in PEFT share the adapter
                a, b = (next(x for other, x in named.items() if f"lora_embedding_{side}" in other) for side in "AB")
                named[key].copy_(b.T)
                named[key.replace("lora_A", "lora_B")].copy_(a.T)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    set_keys(folder, base_model_name_or_path=str(path))
    return random_pretrained.logits(adapted.eval(), (TOKENS,))


def model_of(name, path):
    return type(random_pretrained.make(name)).from_pretrained(path).eval()


def set_keys(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def config_of(name, init_from, **changes):
    classes = name == "bert_classes"
    config = {
        "init_from": init_from,
        "task": "classify_text" if classes else {"name": "language_model", "sample_length": 0},
        "data": {"source": "arrays", "batch_size": 4},
        "optimizer": {"name": "sgd", "learning_rate": 1e-30},
        "training": {"steps": 1},
        "log": {"tensorboard": False},
    }
    return config | changes


def begin(config, workdir):
    return begun_run(config, {"train": {"tokens": TOKENS, "label": LABELS} if config["task"] == "classify_text" else {"tokens": TOKENS}}, workdir)


def run(model, tokens=TOKENS):
    graph, state = nnx.split(model)
    return np.asarray(_run(graph, state, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def there(name, path, out):
    """PEFT's logits with adapters."""
    model = peft.PeftModel.from_pretrained(model_of(name, path), out)
    return random_pretrained.logits(model.eval(), (TOKENS,))


def drawn(path, also=("head/",)):
    """Return the run with random adapters and parameters whose paths start with `also`, because zeros would hide differences."""
    opened = jaxmodels.load(path)
    folder, checkpoints, step = open_run(path)
    checkpoints.close()
    flat = {name: x for name, x in flatten(split(opened.model)[1]).items() if "lora_" in name or name.startswith(also)}
    random = np.random.default_rng(2)
    flat = {name: jax.numpy.asarray(0.2 * random.standard_normal(x.shape, np.float32)) for name, x in flat.items()}
    state = TrainState(jax.numpy.int32(step + 1), unflatten(flat), {}, {}, {}, {}, {}, jax.numpy.zeros((), jax.numpy.int32))
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save(state, Progress(finished=True))
    checkpoints.close()
    return path
