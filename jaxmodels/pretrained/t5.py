"""T5 v1.1 (Raffel et al. 2020; Shazeer 2020) and models of the same form, such as Flan-T5 and mT5, in the format of `transformers`."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.pretrained.architecture import Architecture, Keys, linear, norm
from jaxmodels.pretrained.mapping import Entry


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("feed_forward_proj", "relu", "gated-gelu")
    keys.must("dense_act_fn", "gelu_new", "gelu_new")
    keys.must("is_gated_act", True, True)
    # Without the key, tied embeddings imply scaled decoder outputs, as in the first T5.
    keys.must("scale_decoder_outputs", keys.get("tie_word_embeddings", True), False)
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
        "activation": "geglu",
        "bias": False,
        "scale_attention": False,
        "scale_embeddings": False,
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
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": options["dropout"],
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def _side(path: str, tensor: str, memory: bool) -> list[Entry]:
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
    for side, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        entries += linear(f"{block}/mlp/{side}", f"{home}.DenseReluDense.{name}", bias=False)
    entries += norm(f"{block}/mlp_norm", f"{home}.layer_norm", bias=False)
    return entries + norm(f"{path}/final_norm", f"{tensor}.final_layer_norm", bias=False)


def _table(options: Mapping) -> list[Entry]:
    entries = [Entry("embed/embedding", "shared.weight"), *_side("encoder", "encoder", False), *_side("decoder", "decoder", True)]
    return entries + ([] if options["tie_embeddings"] else [Entry("output/kernel", "lm_head.weight", "transposed")])


T5 = Architecture(
    name="t5",
    model="encoder_decoder",
    options=_options,
    config=_config,
    table=_table,
    heads={"": []},
    classes={"T5ForConditionalGeneration": ""},
    sizes=lambda options: {"layer": options["layers"]},
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$",),
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    head_paths=("output/",),
)
