"""Models of `transformers` with random weights in small sizes, their inputs and logits."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY, CONTEXT = 99, 64
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
_BERT = {**_TEXT, "max_position_embeddings": CONTEXT}
_MODERNBERT = {**_BERT, "num_hidden_layers": 4, "local_attention": 10, "pad_token_id": 0}
_DEBERTA = {**_BERT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
_DEBERTA |= {"position_biased_input": False}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 36, "max_position_embeddings": CONTEXT}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_LONGER = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 36, "feed_forward_proj": "gated-gelu"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 0, "eos_token_id": 0}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}

_SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LONGER}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
_ROBERTA = {**_BERT, "max_position_embeddings": CONTEXT + 2}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
_LONG |= {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 2.0, 3.5]}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
_GEMMA = {**_LLAMA, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 4.0}
_BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36, "image_size": 16, "patch_size": 4}
_DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 16, "patch_size": 4, "num_labels": 5}
_SWIN = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 16, "patch_size": 2, "mlp_ratio": 1.5, "num_labels": 5}
_RESNET = {"embedding_size": 8, "num_labels": 5}
_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5, "layer_scale_init_value": 0.3, "image_size": 16}

# name -> (class, arguments of its config). The name says which options differ from the default.
MODELS = {
    "bert": ("BertForMaskedLM", _BERT),
    "bert_classes": ("BertForSequenceClassification", {**_BERT, "num_labels": 3}),
    "bert_tags": ("BertForTokenClassification", {**_BERT, "num_labels": 5, "hidden_act": "relu"}),
    "roberta": ("RobertaForMaskedLM", {**_ROBERTA, "type_vocab_size": 1}),
    "xlm_roberta_classes": ("XLMRobertaForSequenceClassification", {**_ROBERTA, "num_labels": 3}),
    "roberta_classes": ("RobertaForSequenceClassification", {**_ROBERTA, "num_labels": 3}),
    "distilbert": ("DistilBertForMaskedLM", {**_DISTILBERT, "sinusoidal_pos_embds": True}),
    "distilbert_classes": ("DistilBertForSequenceClassification", {**_DISTILBERT, "num_labels": 3, "activation": "relu"}),
    "distilbert_tags": ("DistilBertForTokenClassification", {**_DISTILBERT, "num_labels": 5}),
    "modernbert": ("ModernBertForMaskedLM", _MODERNBERT),
    "modernbert_classes_mean": ("ModernBertForSequenceClassification", {**_MODERNBERT, "num_labels": 3, "classifier_pooling": "mean"}),
    "modernbert_tags": ("ModernBertForTokenClassification", {**_MODERNBERT, "num_labels": 5, "layer_types": ["sliding_attention"] * 4}),
    "deberta": ("DebertaV2ForMaskedLM", _DEBERTA),
    "deberta_classes": ("DebertaV2ForSequenceClassification", {**_DEBERTA, "num_labels": 3, "max_relative_positions": 40, "type_vocab_size": 2}),
    "deberta_tags": ("DebertaV2ForTokenClassification", {**_DEBERTA, "num_labels": 5, "position_buckets": 48}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2_untied_wide": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False, "n_inner": 52, "activation_function": "gelu"}),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama_biases_tied": ("LlamaForCausalLM", {**_LLAMA, **_BIASES}),
    "llama_one_head_linear": ("LlamaForCausalLM", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 12, "rope_parameters": _LINEAR}),
    "llama3_scaling": ("LlamaForCausalLM", {**_LLAMA, "rope_parameters": _SCALED}),
    "llama_yarn": ("LlamaForCausalLM", {**_LLAMA, "rope_parameters": {"rope_type": "yarn", **_LONGER}}),
    "mistral_window": ("MistralForCausalLM", {**_LLAMA, "sliding_window": 8}),
    "llama_attention_bias": ("LlamaForCausalLM", {**_LLAMA, "attention_bias": True}),
    "llama_mlp_bias": ("LlamaForCausalLM", {**_LLAMA, "mlp_bias": True}),
    "ministral_layers": ("MinistralForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen2_max_window_layers": ("Qwen2ForCausalLM", {**_LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3_attention_bias": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16, "attention_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "llama_dynamic": ("LlamaForCausalLM", {**_LLAMA, "rope_parameters": _DYNAMIC}),
    "llama_longrope": ("LlamaForCausalLM", {**_LLAMA, "head_dim": 6, "rope_parameters": _LONG}),
    "smollm3": ("SmolLM3ForCausalLM", {**_LLAMA, "num_hidden_layers": 3, "no_rope_layer_interval": 2, **_IDS, "pad_token_id": 0}),
    "phi3": ("Phi3ForCausalLM", {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 8, **_IDS, "pad_token_id": 0}),
    "phi3_longrope_partial": (
        "Phi3ForCausalLM",
        {**_LLAMA, "rope_parameters": {**_LONG, "partial_rotary_factor": 0.75}, "original_max_position_embeddings": 16, **_IDS, "pad_token_id": 0},
    ),
    "gemma": ("GemmaForCausalLM", {**_LLAMA, "head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", {**_GEMMA, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3ForCausalLM", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True}),
    "olmo2": ("Olmo2ForCausalLM", {**_LLAMA, "pad_token_id": 0, "eos_token_id": 2}),
    "granite": ("GraniteForCausalLM", {**_LLAMA, **_MULTIPLIERS}),
    "t5_first": ("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "relu"}),
    "t5_tied": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False}),
    "t5_untied": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False}),
    "t5_mt5": ("MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-silu"}),
    "vit": ("ViTForImageClassification", {**_VIT, "num_labels": 5}),
    "vit_wide": ("ViTForImageClassification", {**_VIT, "num_labels": 5, "image_size": [8, 12]}),
    "deit": ("DeiTForImageClassification", {**_VIT, "num_labels": 5, "qkv_bias": False}),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", {**_VIT, "num_labels": 5}),
    "dinov2": ("Dinov2ForImageClassification", {**_DINOV2, "use_mask_token": False}),
    "dinov2_swiglu": ("Dinov2ForImageClassification", {**_DINOV2, "use_swiglu_ffn": True, "use_mask_token": False}),
    "swin": ("SwinForImageClassification", _SWIN),
    "swin_padded": ("SwinForImageClassification", {**_SWIN, "image_size": 26, "window_size": 3, "qkv_bias": False, "depths": [2, 2]}),
    "resnet": ("ResNetForImageClassification", {**_RESNET, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck"}),
    "resnet_basic": ("ResNetForImageClassification", {**_RESNET, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}),
    "convnext": ("ConvNextForImageClassification", {**_CONVNEXT, "patch_size": 2}),
}
IMAGES = ("vit", "resnet", "convnext", "deit", "dinov2", "swin")  # models of images


def make(name: str):
    """Return a model in evaluation mode whose parameters and statistics are all random, including biases and norms."""
    class_name, options = MODELS[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    if name in ("t5_untied", "t5_mt5"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def inputs(name: str) -> tuple[np.ndarray, ...]:
    """Return a model's inputs: images, or tokens of the maximum length, with the first row padded with -1."""
    random = np.random.default_rng(0)
    if name.startswith(IMAGES):
        size = 64 if name.startswith("resnet") else MODELS[name][1]["image_size"]
        return (random.normal(size=(2, *(size if isinstance(size, list) else (size, size)), 3)).astype(np.float32),)
    tokens = random.integers(3, VOCABULARY, (2, CONTEXT)).astype(np.int32)
    tokens[0, 40:] = -1
    if name.startswith("t5"):
        return tokens, random.integers(3, VOCABULARY, (2, 20)).astype(np.int32)
    return (tokens,)


def arguments(model, arrays: tuple[np.ndarray, ...]) -> dict[str, torch.Tensor]:
    """Return the inputs as arguments of the `transformers` model."""
    first = arrays[0]
    if first.ndim == 4:
        return {"pixel_values": torch.tensor(first.transpose(0, 3, 1, 2))}
    padding = model.config.pad_token_id or 0
    result = {"input_ids": torch.tensor(np.where(first < 0, padding, first)).long(), "attention_mask": torch.tensor(first >= 0).long()}
    return result | ({"decoder_input_ids": torch.tensor(arrays[1]).long()} if len(arrays) > 1 else {})


def logits(model, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the logits of the `transformers` model."""
    with torch.no_grad():
        return model(**arguments(model, arrays)).logits.numpy()


def real(values: np.ndarray, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the values at positions that are not padding."""
    return values[arrays[0] >= 0] if values.ndim == 3 and len(arrays) == 1 else values
