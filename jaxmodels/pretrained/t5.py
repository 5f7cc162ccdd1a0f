"""T5 (Raffel et al. 2020), T5 v1.1 (Shazeer 2020), mT5 (Xue et al. 2021) and models of the same form, such as Flan-T5, in the format of `transformers`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.models.layers import GATED
from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry

# feed_forward_proj -> our name of the activation, and what `transformers` derives from it: dense_act_fn and is_gated_act.
_ACTIVATIONS = {"relu": ("relu", "relu", False), "gated-gelu": ("geglu", "gelu_new", True), "gated-silu": ("swiglu", "silu", True)}


def _scaled(keys: Keys) -> bool:
    """Return whether the input of the output layer is scaled. Without the key, tied embeddings imply it, as in the first T5."""
    tied = keys.must("tie_word_embeddings", True, True, False)
    return keys.must("scale_decoder_outputs", tied, True, False)


def _unscaled(keys: Keys) -> bool:
    """mT5 never scales, whatever its embeddings."""
    keys.ignore("tie_word_embeddings")
    return keys.must("scale_decoder_outputs", False, False)


def _options(keys: Keys, names: Callable[[], Sequence[str]], feed_forward: str, scaled: Callable[[Keys], bool]) -> dict:
    """`feed_forward` is the default of feed_forward_proj."""
    activation, function, gated = _ACTIVATIONS[keys.must("feed_forward_proj", feed_forward, *_ACTIVATIONS)]
    keys.must("dense_act_fn", function, function)
    keys.must("is_gated_act", gated, gated)
    keys.must("relative_attention_num_buckets", 32, 32)
    keys.must("relative_attention_max_distance", 128, 128)
    keys.must("is_decoder", False, False)
    layers = keys.get("num_layers")
    keys.must("num_decoder_layers", layers, layers, None)
    return {
        "context": keys.get("n_positions", 512),
        "layers": layers,
        "heads": keys.get("num_heads"),
        "width": keys.get("d_model"),
        "head_width": keys.get("d_kv"),
        "mlp_width": keys.get("d_ff"),
        "positions": "relative",
        "norm": "rms",
        "epsilon": keys.get("layer_norm_epsilon", 1e-6),
        "post_norm": False,
        "activation": activation,
        "bias": False,
        "scale_attention": False,
        "scale_embeddings": False,
        "scale_outputs": bool(scaled(keys)),
        "tie_embeddings": "lm_head.weight" not in names(),
        "dropout": keys.get("dropout_rate", 0.1),
    }


def _config(options: Mapping) -> dict:
    return {
        "n_positions": options["context"],
        "num_layers": options["layers"],
        "num_decoder_layers": options["layers"],
        "num_heads": options["heads"],
        "d_model": options["width"],
        "d_kv": options["head_width"] or options["width"] // options["heads"],
        "d_ff": options["mlp_width"] or 4 * options["width"],
        "layer_norm_epsilon": options["epsilon"],
        "feed_forward_proj": next((name for name, (ours, *_) in _ACTIVATIONS.items() if ours == options["activation"]), "relu"),
        "dropout_rate": options["dropout"],
        "is_encoder_decoder": True,
        # Read as whether outputs are scaled: the embeddings of the files decide whether they are tied.
        "tie_word_embeddings": options["scale_outputs"],
        "scale_decoder_outputs": options["scale_outputs"],
    }


def _side(path: str, tensor: str, memory: bool, gated: bool) -> list[Entry]:
    block, layers = f"{path}/blocks/{{layer}}", f"{tensor}.block.{{layer}}.layer"
    parts = [("attention", "attention_norm", f"{layers}.0", "SelfAttention")]
    if memory:
        parts.append(("memory_attention", "memory_norm", f"{layers}.1", "EncDecAttention"))
    entries = [Entry(f"{path}/relative/embedding", f"{tensor}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")]
    for part, its_norm, home, name in parts:
        for side, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            entries += linear(f"{block}/{part}/{side}", f"{home}.{name}.{letter}", bias=False)
        entries += norm(f"{block}/{its_norm}", f"{home}.layer_norm", bias=False)
    home = f"{layers}.{len(parts)}"
    for side, name in (*((("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),)), ("down", "wo")):
        entries += linear(f"{block}/mlp/{side}", f"{home}.DenseReluDense.{name}", bias=False)
    entries += norm(f"{block}/mlp_norm", f"{home}.layer_norm", bias=False)
    return entries + norm(f"{path}/final_norm", f"{tensor}.final_layer_norm", bias=False)


def _table(options: Mapping) -> list[Entry]:
    gated = options["activation"] in GATED
    entries = [Entry("embed/embedding", "shared.weight"), *_side("encoder", "encoder", False, gated), *_side("decoder", "decoder", True, gated)]
    return entries + ([] if options["tie_embeddings"] else [Entry("output/kernel", "lm_head.weight", "transposed")])


T5 = Architecture(
    name="t5",
    model="encoder_decoder",
    options=functools.partial(_options, feed_forward="relu", scaled=_scaled),
    config=_config,
    table=_table,
    heads={"": []},
    classes={"T5ForConditionalGeneration": "", "T5WithLMHeadModel": ""},  # the second is its name in old files
    sizes=lambda options: {"layer": options["layers"]},
    # The second is unused in files of the first T5.
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$", r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"),
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    head_paths=("output/",),
)

MT5 = dataclasses.replace(
    T5, name="mt5", options=functools.partial(_options, feed_forward="gated-gelu", scaled=_unscaled), classes={"MT5ForConditionalGeneration": ""}
)
