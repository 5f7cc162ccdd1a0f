"""Models and runs with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.experiment.sections import resolve
from jaxmodels.models import create
from jaxmodels.models.functional import flatten, merge, new_rngs, split
from jaxmodels.runs.merge import new_folder, write_run

# Small models that generate: name -> (name of the model, options). Tests of the first ones are short; those of MORE are marked slow.
SIZE = {"layers": 2, "heads": 4, "width": 16, "context": 64}
LLAMA = SIZE | {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_embeddings": False, "kv_heads": 2}
SCALES = {"embedding": "sqrt_width", "attention": 0.3, "attention_cap": 2.0, "residual": 0.7, "logits": 2.0, "logits_cap": 9.0}
MOE = {"moe": {"experts": 4, "top_k": 2}}
SEQ2SEQ = SIZE | {"mlp_width": 24}
T5 = SEQ2SEQ | {"positions": "relative", "norm": "rms", "post_norm": False, "activation": "geglu", "bias": False}
T5 |= {"scale_attention": False, "head_width": 8}
TEXTS = {
    "learned": ("gpt", SIZE),
    "mixtral": ("gpt", LLAMA | MOE | {"window": 5, "scan": True}),
    "lstm": ("lstm", {"layers": 2, "width": 16}),
}
MORE = {
    "llama": ("gpt", LLAMA),
    "llama, stacked": ("gpt", LLAMA | {"scan": True}),
    "mistral": ("gpt", LLAMA | {"window": 5}),
    "qwen": ("gpt", LLAMA | {"query_key_norm": True, "qkv_bias": True, "rotary_scaling": {"kind": "yarn", "factor": 2.0, "original_context": 32}}),
    "local and global": ("gpt", LLAMA | {"window": 5, "layer_types": ["local", "global"], "local_rotary_base": 100.0, "output_norm": True}),
    "gemma2": ("gpt", LLAMA | {"norm": "rms_plus_one", "window": 5, "layer_types": ["local", "global"], "scales": SCALES}),
    "olmo2": ("gpt", LLAMA | {"query_key_norm": "projection", "input_norm": False, "output_norm": True, "rotary_fraction": 0.5, "scan": True}),
    "sinusoidal": ("gpt", SIZE | {"positions": "sinusoidal", "scan": True}),
    "no positions": ("gpt", SIZE | {"positions": "none", "post_norm": True}),
    "experts, unrolled": ("gpt", LLAMA | MOE),
    "gru": ("gru", {"layers": 1, "width": 16, "embedding": 8}),
}
TARGETS = {"t5": ("encoder_decoder", T5 | {"scan": True})}
MORE_TARGETS = {
    "lstm_seq2seq": ("lstm_seq2seq", {"layers": 2, "width": 16}),
    "original": ("encoder_decoder", SEQ2SEQ),
    "learned positions": ("encoder_decoder", SEQ2SEQ | {"positions": "learned", "post_norm": False, "kv_heads": 2}),
    "t5, unrolled": ("encoder_decoder", T5),
    "gru_seq2seq": ("gru_seq2seq", {"layers": 1, "width": 16}),
}


def drawn(name: str, *args, scale: float = 0.5, seed: int = 1, **options) -> nnx.Module:
    """Return a model with all parameters drawn by NumPy, without compilation. A large `scale` avoids near ties of logits."""
    graph, params, stats = split(nnx.eval_shape(lambda: create(name, *args, rngs=new_rngs(0), **options)))
    rng = np.random.default_rng(seed)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), params), stats)


def run_of(folder, model: dict, task: dict, tokenizer, *, mesh: dict | None = None, scale: float = 0.5) -> str:
    """Write the folder of a text run with random weights and this tokenizer; return its path."""
    info = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer, "target_length": 20}
    config = {"model": model, "task": task, "data": {"source": "arrays", "batch_size": 8}, "optimizer": {"name": "sgd", "learning_rate": 0.0}}
    resolved = resolve(config | {"training": {"steps": 1}, "mesh": mesh or {}})
    weights = drawn(model["name"], tokenizer.vocab_size, scale=scale, **{key: value for key, value in model.items() if key != "name"})
    _, params, stats = split(weights)
    write_run(new_folder(str(folder)), resolved, flatten(params), flatten(stats), 7, info=info, tokenizer=tokenizer.to_json(), parents=[])
    return str(folder)
