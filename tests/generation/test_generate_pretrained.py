"""Pretrained models generate the same tokens here as in `transformers`, 200 of them, with a cache and without; beam search too.

`pytest -m slow tests/generation/test_generate_pretrained.py -n 0` runs the other architectures.
"""

import numpy as np
import pytest
import tokenizer_folders as folders
from flax import nnx

import jaxmodels
from jaxmodels.generation.generate import generate
from jaxmodels.pretrained.weights import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # with models this small, several threads wait longer than they compute
V, NEW = 384, 200
_SIZE = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = _SIZE | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA = _LLAMA | {"head_dim": 16}
_T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_LLAMA, sliding_window=24)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_LLAMA, no_rope_layer_interval=2)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_LLAMA, partial_rotary_factor=0.5, sliding_window=24)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_GEMMA)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GEMMA, sliding_window=24, query_pre_attn_scalar=20)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_GEMMA, sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    ),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_LLAMA)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**_LLAMA, residual_multiplier=0.7, attention_multiplier=0.2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**_T5, tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ),
    "t5_first": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**_T5 | {"feed_forward_proj": "relu"}, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ),
}
BY_DEFAULT = ("mistral",)


class Uncached(nnx.Module):
    """A model with only a forward pass."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        return self.model(tokens)


class UncachedPair(nnx.Module):
    def __init__(self, model):
        self.model = model

    def encode(self, source):
        return self.model.encode(source)

    def decode(self, target, memory):
        return self.model.decode(target, memory)


def made(name, folder, scale=0.4):
    """Return a `transformers` model with random matrices that give distinct logits, and the model loaded here from the folder that it saves."""
    torch.manual_seed(0)
    theirs = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.75 * scale if name.startswith("t5") else scale)
    theirs.save_pretrained(folder)
    if name.startswith("t5"):
        (folder / "tokenizer.json").write_text(folders.byte_level(["<pad>", "</s>"]).to_str())
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)
    return theirs, jaxmodels.load(f"hf:{folder}")


def theirs_of(model, prompts, **options):
    """Return the tokens that `transformers` generates for prompts, padded with an attention mask, and its output with the scores."""
    longest = max(map(len, prompts))
    left = not model.config.is_encoder_decoder
    tokens, mask = np.zeros((2, len(prompts), longest), int)
    for i, prompt in enumerate(prompts):
        at = slice(longest - len(prompt), None) if left else slice(0, len(prompt))
        tokens[i, at], mask[i, at] = prompt, 1
    with torch.inference_mode():
        given = {"attention_mask": torch.tensor(mask), "max_new_tokens": NEW, "do_sample": False}
        given |= {"return_dict_in_generate": True, "output_logits": True}
        result = model.generate(torch.tensor(tokens), **(given | options))
    return result.sequences[:, longest if left else 1 :].numpy(), result


@pytest.mark.filterwarnings("ignore:.*has no cache")
@pytest.mark.parametrize("name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    theirs, ours = made(name, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, V, length).tolist() for length in (5, 31)]
    expected, result = theirs_of(theirs, prompts)
    logits = torch.stack(result.logits).topk(2).values
    assert expected.shape == (2, NEW) and (logits[..., 0] - logits[..., 1]).min() > 1e-4 and len(np.unique(expected)) > 20
    options = {"max_tokens": NEW}
    np.testing.assert_array_equal([c.tokens for c in generate(ours.model, None, prompts, start=0, **options)], expected)
    uncached = (UncachedPair if name.startswith("t5") else Uncached)(ours.model)
    np.testing.assert_array_equal([c.tokens for c in generate(uncached, None, prompts, start=0, **options)], expected)


_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 5.0]}
BY_LENGTH = {
    "longrope": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_LLAMA, rope_parameters=_LONG, original_max_position_embeddings=40)),
    "dynamic": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_LLAMA | {"max_position_embeddings": 40}, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    ),
}


@pytest.mark.parametrize("name", ["longrope", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_tokens_are_those_of_transformers_where_positions_depend_on_the_length(name, tmp_path, monkeypatch):
    """From 20 tokens to 80: the original context ends at 40. There `transformers` computes Phi-3's cache anew; for `dynamic` it has to do so every time."""
    monkeypatch.setitem(MODELS, name, BY_LENGTH[name])
    theirs, _ = made(name, tmp_path)
    model = load_model(f"hf:{tmp_path}", context=256)
    prompt = np.random.default_rng(0).integers(2, V, 20).tolist()
    expected, result = theirs_of(theirs, [prompt], max_new_tokens=60, use_cache=name == "longrope")
    logits = torch.stack(result.logits).topk(2).values
    assert (logits[..., 0] - logits[..., 1]).min() > 1e-4
    np.testing.assert_array_equal(generate(model, None, [prompt], max_tokens=60, start=0)[0].tokens, expected[0])


SEARCHES = [(3, 1.0, False, True), (3, 0.0, "never", True), (3, 1.5, "never", False), (2, 0.7, False, True)]
SEARCHES += [(4, 2.0, True, True), (3, -1.0, False, True)]


@pytest.mark.parametrize(
    "name, beams, penalty, early, ending",
    [("gpt2", 3, 2.0, True, True), *(pytest.param(name, *search, marks=pytest.mark.slow) for name in ("gpt2", "t5") for search in SEARCHES)],
)
def test_beams_are_those_of_transformers(name, beams, penalty, early, ending, tmp_path):
    """The best text and its score, with and without an end token, for each value of `early_stopping`."""
    theirs, ours = made(name, tmp_path, scale=0.2)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, V, 7).tolist() for _ in range(3)]
    first = theirs_of(theirs, prompts, max_new_tokens=8)[0]
    ends = first[:, 5].tolist() if ending else []  # some that occur
    options = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early, "max_new_tokens": 16}
    expected, result = theirs_of(theirs, prompts, **options, eos_token_id=ends or None, output_scores=True, pad_token_id=V - 1)
    got = generate(ours.model, None, prompts, max_tokens=16, start=0, ends=ends, beams=beams, length_penalty=penalty, early_stopping=early)
    rows = [row[: row.index(V - 1)] if V - 1 in row else row for row in expected.tolist()]
    assert [c.tokens for c in got] == [row[:-1] if row[-1] in ends else row for row in rows]
    np.testing.assert_allclose([c.score for c in got], result.sequences_scores.numpy(), rtol=1e-4)
    assert not ending or any(len(row) < 16 for row in rows)
