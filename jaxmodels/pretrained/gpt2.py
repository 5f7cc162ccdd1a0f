"""GPT-2 (Radford et al. 2019) in the format of `transformers`: matrices are [in, out] as here, with one for queries, keys and values."""

from collections.abc import Callable, Mapping, Sequence

from jaxmodels.pretrained.architecture import Architecture, Keys, activation, linear, norm, their_activation
from jaxmodels.pretrained.mapping import Entry


def _options(keys: Keys, names: Callable[[], Sequence[str]]) -> dict:
    keys.must("scale_attn_weights", True, True)
    keys.must("scale_attn_by_inverse_layer_idx", False, False)
    keys.must("add_cross_attention", False, False)
    keys.not_applied("attn_pdrop", "attention weights have no dropout")
    keys.ignore("reorder_and_upcast_attn", "n_ctx", "embd_pdrop", *(key for key in keys.values if key.startswith("summary_")))
    width = keys.get("n_embd")
    return {
        "context": keys.get("n_positions"),
        "layers": keys.get("n_layer"),
        "heads": keys.get("n_head"),
        "width": width,
        "mlp_width": keys.get("n_inner", None) or 4 * width,
        "positions": "learned",
        "norm": "layer",
        "epsilon": keys.get("layer_norm_epsilon", 1e-5),
        "activation": activation(keys, "activation_function", "gelu_new"),
        "bias": True,
        "dropout": keys.get("resid_pdrop", 0.1),
        "tie_embeddings": keys.get("tie_word_embeddings", True),
    }


def _config(options: Mapping) -> dict:
    return {
        "n_positions": options["context"],
        "n_layer": options["layers"],
        "n_head": options["heads"],
        "n_embd": options["width"],
        "n_inner": options["mlp_width"] or 4 * options["width"],
        "layer_norm_epsilon": options["epsilon"],
        "activation_function": their_activation(options["activation"]),
        "resid_pdrop": options["dropout"],
        "embd_pdrop": options["dropout"],
        "attn_pdrop": 0.0,
        "tie_word_embeddings": options["tie_embeddings"],
    }


def _table(options: Mapping) -> list[Entry]:
    block, layer = "blocks/{layer}", "transformer.h.{layer}"
    entries = [
        Entry("embed/embedding", "transformer.wte.weight"),
        Entry("positions/embedding", "transformer.wpe.weight"),
        *norm(f"{block}/attention_norm", f"{layer}.ln_1"),
        *norm(f"{block}/mlp_norm", f"{layer}.ln_2"),
        *linear(f"{block}/attention/out", f"{layer}.attn.c_proj", form="same"),
        *linear(f"{block}/mlp/up", f"{layer}.mlp.c_fc", form="same"),
        *linear(f"{block}/mlp/down", f"{layer}.mlp.c_proj", form="same"),
        *norm("final_norm", "transformer.ln_f"),
    ]
    for i, name in enumerate(("query", "key", "value")):
        entries.append(Entry(f"{block}/attention/{name}/kernel", f"{layer}.attn.c_attn.weight", part=(i, i + 1, 3)))
        entries.append(Entry(f"{block}/attention/{name}/bias", f"{layer}.attn.c_attn.bias", part=(i, i + 1, 3)))
    return entries + ([] if options["tie_embeddings"] else [Entry("output/kernel", "lm_head.weight", "transposed")])


GPT2 = Architecture(
    name="gpt2",
    model="gpt",
    options=_options,
    config=_config,
    table=_table,
    heads={"": []},
    classes={"GPT2LMHeadModel": "", "GPT2Model": ""},
    sizes=lambda options: {"layer": options["layers"]},
    prefix="transformer.",
    ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$", r"^lm_head\.weight$"),
    copies={"lm_head.weight": "transformer.wte.weight"},
    others=r"^(lm_head|score)\.",
    head_paths=("output/",),
)
