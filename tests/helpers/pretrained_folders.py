"""Write pretrained model folders with `transformers`: small sizes, random weights, and a tokenizer of the model's kind."""

import json
from pathlib import Path

import tokenizer_folders as tokenizers

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bert(folder, with_head=False, **options) -> Path:
    """Write BERT with its pretraining heads, or with a head for two classes."""
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "vocab_size": 200,
    }
    _save(
        transformers.BertForSequenceClassification if with_head else transformers.BertForPreTraining,
        transformers.BertConfig(**sizes | options),
        folder,
    )
    return _with_tokenizer(folder, tokenizers.wordpiece(), tokenizer_class="BertTokenizer")


def gpt2(folder, **options) -> Path:
    """Write GPT-2."""
    import transformers

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    _save(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes | options), folder)
    return _with_tokenizer(folder, tokenizers.byte_level(["<|endoftext|>"]), tokenizer_class="GPT2Tokenizer")


def llama(folder, **options) -> Path:
    """Write Llama with a chat template."""
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 330,
    }
    config = transformers.LlamaConfig(**sizes | {"max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0} | options)
    _save(transformers.LlamaForCausalLM, config, folder)
    names = {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizers.CHATML, **names}
    return _with_tokenizer(folder, tokenizers.byte_level(CHAT), **settings)


def t5(folder, **options) -> Path:
    """Write T5."""
    import transformers

    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "vocab_size": 192,
        "decoder_start_token_id": 0,
    }
    config = transformers.T5Config(**sizes | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | options)
    _save(transformers.T5ForConditionalGeneration, config, folder)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _with_tokenizer(folder, tokenizers.unigram(), tokenizer_class="PreTrainedTokenizerFast", **names)


def vit(folder, **options) -> Path:
    """Write ViT for images of 224 × 224."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 224, "patch_size": 32}
    _save(transformers.ViTModel, transformers.ViTConfig(**sizes | options), folder)
    return Path(folder)


RECIPES = {
    "bert_hf_sst2": bert,
    "bert_hf_glue": bert,
    "bert_hf_ner": bert,
    "gpt2_hf_text": gpt2,
    "llama_hf_sft_lora": llama,
    "t5_hf_seq2seq": t5,
    "vit_hf_cifar10": vit,
}


def _save(model, config, folder) -> None:
    import torch

    torch.manual_seed(0)
    model(config).save_pretrained(folder)


def _with_tokenizer(folder, tokenizer, **settings) -> Path:
    return tokenizers.write(folder, {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)})
