"""The config.json of published models, as their authors wrote them, gives the named sizes here; files of other forms than `transformers` writes today."""

import json

import numpy as np
import pytest
import random_pretrained
import tokenizer_folders
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxmodels import models
from jaxmodels.export.transformers import export_run
from jaxmodels.inference.pretrained import import_run
from jaxmodels.pretrained.weights import describe, load_model, resolve_options

_T5 = {
    "architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
    "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
    "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 32128,
    "task_specific_params": {"summarization": {"prefix": "summarize: "}},
}  # fmt: skip
_MT5 = {
    "architectures": ["MT5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
    "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "model_type": "mt5", "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "use_cache": True, "vocab_size": 250112,
}  # fmt: skip
_DISTILBERT = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "hidden_dim": 3072,
    "initializer_range": 0.02, "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0,
    "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
}  # fmt: skip
_MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281, "classifier_activation": "gelu",
    "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True,
    "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "gradient_checkpointing": False, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
    "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192,
    "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12,
    "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute", "reference_compile": None, "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100, "sparse_prediction": False, "tie_word_embeddings": True, "vocab_size": 50368,
}  # fmt: skip
_DEBERTA = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
    "position_biased_input": False, "num_attention_heads": 12, "num_hidden_layers": 12, "type_vocab_size": 0, "vocab_size": 128100,
}  # fmt: skip
PUBLISHED = {
    "t5-small": (_T5, {}),
    "mt5-small": (_MT5, {}),
    "distilbert-base": (_DISTILBERT, {}),
    "modernbert-base": (_MODERNBERT, {"pool": "mean"}),
    "deberta-v3-base": (_DEBERTA, {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_named_size(name, tmp_path):
    config, others = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": np.zeros((1, 1), np.float32)} if name == "mt5-small" else {}, tmp_path / "model.safetensors")
    _, architecture, options, _ = describe(f"hf:{tmp_path}")
    ours, size = resolve_options(architecture.model, options), resolve_options(name, models.find(name)[1]) | others
    for key in ours:
        default = {"mlp_width": 4 * size["width"]}.get(key)
        assert ours[key] == (default if size[key] is None else size[key]), key


def test_the_authors_head_for_tokens_of_deberta(tmp_path):
    """Its names are those of `legacy=False`; a file of DeBERTa-v3 also has the discriminator's head. An export has the names of `transformers`' default."""
    _, options = random_pretrained.MODELS["deberta"]
    torch.manual_seed(0)
    model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**options, legacy=False)).eval()
    torch.nn.init.normal_(model.lm_predictions.lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file(tensors | {"mask_predictions.classifier.bias": np.zeros(1, np.float32)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_folders.words(*tokenizer_folders.BERT_SPECIAL).to_str())
    arrays = random_pretrained.inputs("deberta")
    expected = random_pretrained.logits(model, arrays)
    assert np.abs(random_pretrained.real(np.asarray(load_model(f"hf:{tmp_path / 'model'}")(*arrays)) - expected, arrays)).max() < 1e-4
    import_run(f"hf:{tmp_path / 'model'}", str(tmp_path / "run"))
    out = export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    again = transformers.AutoModelForMaskedLM.from_pretrained(out).eval()
    assert again.config.legacy
    np.testing.assert_allclose(random_pretrained.logits(again, arrays), expected, atol=1e-5)
