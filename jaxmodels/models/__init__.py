"""Flax NNX modules, and the table of their names. Modules know no mesh, data, loss or config.

    from jaxmodels.models import create
    model = create("gpt2", vocab_size=50257, rngs=nnx.Rngs(0))
    logits = model(tokens)

Called with `rngs=`, a model trains (it draws dropout from them); without, it evaluates. A user's module may instead keep its random
streams in its layers, as `nnx.Dropout(0.1, rngs=rngs)` does; see `functional`. Positional arguments of a constructor without a
default come from the data (`vocab_size`, `num_classes`, `image_shape`). All others are the keys of the `model` section of a config.
"""

import inspect
from collections.abc import Callable
from typing import Any

from jaxmodels import config as config_lib

MODELS = {
    "cnn": "jaxmodels.models.cnn:CNN",
    "resnet18": "jaxmodels.models.resnet:ResNet",
    "resnet34": "jaxmodels.models.resnet:ResNet",
    "resnet50": "jaxmodels.models.resnet:ResNet",
    "resnet101": "jaxmodels.models.resnet:ResNet",
    "convnext": "jaxmodels.models.convnext:ConvNeXt",
    "convnext_t": "jaxmodels.models.convnext:ConvNeXt",
    "convnext_s": "jaxmodels.models.convnext:ConvNeXt",
    "convnext_b": "jaxmodels.models.convnext:ConvNeXt",
    "vit": "jaxmodels.models.vit:VisionTransformer",
    "vit_ti16": "jaxmodels.models.vit:VisionTransformer",
    "vit_s16": "jaxmodels.models.vit:VisionTransformer",
    "vit_s32": "jaxmodels.models.vit:VisionTransformer",
    "vit_b16": "jaxmodels.models.vit:VisionTransformer",
    "vit_b32": "jaxmodels.models.vit:VisionTransformer",
    "vit_l16": "jaxmodels.models.vit:VisionTransformer",
    "vit_l32": "jaxmodels.models.vit:VisionTransformer",
    "vit_g14": "jaxmodels.models.vit:VisionTransformer",
    "deit_ti16": "jaxmodels.models.vit:VisionTransformer",
    "deit_s16": "jaxmodels.models.vit:VisionTransformer",
    "deit_b16": "jaxmodels.models.vit:VisionTransformer",
    "swin": "jaxmodels.models.swin:Swin",
    "swin-tiny": "jaxmodels.models.swin:Swin",
    "swin-small": "jaxmodels.models.swin:Swin",
    "swin-base": "jaxmodels.models.swin:Swin",
    "swin-large": "jaxmodels.models.swin:Swin",
    "lstm": "jaxmodels.models.rnn:RecurrentLM",
    "gru": "jaxmodels.models.rnn:RecurrentLM",
    "lstm_encoder": "jaxmodels.models.recurrent:RecurrentEncoder",
    "gru_encoder": "jaxmodels.models.recurrent:RecurrentEncoder",
    "lstm_seq2seq": "jaxmodels.models.recurrent:RecurrentSeq2Seq",
    "gru_seq2seq": "jaxmodels.models.recurrent:RecurrentSeq2Seq",
    "lstm_frames": "jaxmodels.models.frames:RecurrentFrames",
    "gru_frames": "jaxmodels.models.frames:RecurrentFrames",
    "forecast_linear": "jaxmodels.models.forecast:LinearForecast",
    "forecast_lstm": "jaxmodels.models.forecast:RecurrentForecast",
    "forecast_transformer": "jaxmodels.models.forecast:TransformerForecast",
    "gpt": "jaxmodels.models.transformer:Decoder",
    "gpt2": "jaxmodels.models.transformer:Decoder",
    "gpt2-medium": "jaxmodels.models.transformer:Decoder",
    "gpt2-large": "jaxmodels.models.transformer:Decoder",
    "gpt2-xl": "jaxmodels.models.transformer:Decoder",
    "gpt3-175b": "jaxmodels.models.transformer:Decoder",
    "llama2-7b": "jaxmodels.models.transformer:Decoder",
    "llama2-13b": "jaxmodels.models.transformer:Decoder",
    "llama2-70b": "jaxmodels.models.transformer:Decoder",
    "llama3-8b": "jaxmodels.models.transformer:Decoder",
    "llama3-70b": "jaxmodels.models.transformer:Decoder",
    "llama3.1-8b": "jaxmodels.models.transformer:Decoder",
    "llama3.1-70b": "jaxmodels.models.transformer:Decoder",
    "llama3.1-405b": "jaxmodels.models.transformer:Decoder",
    "llama3.2-1b": "jaxmodels.models.transformer:Decoder",
    "llama3.2-3b": "jaxmodels.models.transformer:Decoder",
    "mistral-7b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-0.5b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-1.5b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-3b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-7b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-14b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-32b": "jaxmodels.models.transformer:Decoder",
    "qwen2.5-72b": "jaxmodels.models.transformer:Decoder",
    "qwen3-0.6b": "jaxmodels.models.transformer:Decoder",
    "qwen3-1.7b": "jaxmodels.models.transformer:Decoder",
    "qwen3-4b": "jaxmodels.models.transformer:Decoder",
    "qwen3-8b": "jaxmodels.models.transformer:Decoder",
    "qwen3-14b": "jaxmodels.models.transformer:Decoder",
    "qwen3-32b": "jaxmodels.models.transformer:Decoder",
    "smollm3-3b": "jaxmodels.models.transformer:Decoder",
    "phi3-mini": "jaxmodels.models.transformer:Decoder",
    "gemma-2b": "jaxmodels.models.transformer:Decoder",
    "gemma-7b": "jaxmodels.models.transformer:Decoder",
    "gemma2-2b": "jaxmodels.models.transformer:Decoder",
    "gemma2-9b": "jaxmodels.models.transformer:Decoder",
    "gemma2-27b": "jaxmodels.models.transformer:Decoder",
    "gemma3-270m": "jaxmodels.models.transformer:Decoder",
    "gemma3-1b": "jaxmodels.models.transformer:Decoder",
    "olmo2-1b": "jaxmodels.models.transformer:Decoder",
    "olmo2-7b": "jaxmodels.models.transformer:Decoder",
    "olmo2-13b": "jaxmodels.models.transformer:Decoder",
    "granite-3-2b": "jaxmodels.models.transformer:Decoder",
    "granite-3-8b": "jaxmodels.models.transformer:Decoder",
    "mixtral-8x7b": "jaxmodels.models.transformer:Decoder",
    "qwen3-30b-a3b": "jaxmodels.models.transformer:Decoder",
    "encoder": "jaxmodels.models.encoder:Encoder",
    "bert-tiny": "jaxmodels.models.encoder:Encoder",
    "bert-mini": "jaxmodels.models.encoder:Encoder",
    "bert-small": "jaxmodels.models.encoder:Encoder",
    "bert-medium": "jaxmodels.models.encoder:Encoder",
    "bert-base": "jaxmodels.models.encoder:Encoder",
    "bert-large": "jaxmodels.models.encoder:Encoder",
    "roberta-base": "jaxmodels.models.encoder:Encoder",
    "roberta-large": "jaxmodels.models.encoder:Encoder",
    "distilbert-base": "jaxmodels.models.encoder:Encoder",
    "modernbert-base": "jaxmodels.models.encoder:Encoder",
    "modernbert-large": "jaxmodels.models.encoder:Encoder",
    "deberta-v3-xsmall": "jaxmodels.models.encoder:Encoder",
    "deberta-v3-small": "jaxmodels.models.encoder:Encoder",
    "deberta-v3-base": "jaxmodels.models.encoder:Encoder",
    "deberta-v3-large": "jaxmodels.models.encoder:Encoder",
    "encoder_decoder": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "transformer-base": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "transformer-big": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-small": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-base": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-large": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-v1.1-small": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-v1.1-base": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-v1.1-large": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-v1.1-xl": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "t5-v1.1-xxl": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "mt5-small": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "mt5-base": "jaxmodels.models.encoder_decoder:EncoderDecoder",
    "mt5-large": "jaxmodels.models.encoder_decoder:EncoderDecoder",
}


def find(name: str) -> tuple[Callable, dict[str, Any]]:
    """Return the constructor of a named model, and the keyword arguments of that name (its size).

    A module lists the sizes of its names in `SIZES`.

    Raises:
      ConfigError: there is no such model; the message lists all.
    """
    constructor = config_lib.find("model.name", MODELS, name)
    sizes = getattr(inspect.getmodule(constructor), "SIZES", {})
    return constructor, dict(sizes.get(name, {}))


def create(name: str, *args, rngs, **kwargs):
    """Return a model by name: `create("cnn", image_shape=(28, 28, 1), num_classes=10, rngs=nnx.Rngs(0))`."""
    constructor, size = find(name)
    return constructor(*args, **{**size, **kwargs}, rngs=rngs)
