"""Fine-tuning of encoders after BERT: a masked language model becomes a classifier of pairs of sentences, and the same model in `transformers`."""

import json

import jax
import numpy as np
import pytest
import random_pretrained
import tokenizer_folders
import torch
import transformers

import jaxmodels
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.export.transformers import export_run

_SIZE = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36, "max_position_embeddings": 64}
_DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
MODELS = {
    "deberta": ("DebertaV2", _SIZE | _DISENTANGLED | {"position_biased_input": False}),
    "modernbert": ("ModernBert", _SIZE | {"local_attention": 8, "pad_token_id": 0}),
    "distilbert": ("DistilBert", {"vocab_size": 200, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 36, "max_position_embeddings": 64}),
}
ROWS = [("the cat sat", "on the mat", "no"), ("the dog ran", "after the cat", "yes"), ("it is a city", "the end", "yes"), ("a hat", "a dog", "no")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta", "modernbert", "distilbert"])
def test_a_masked_language_model_becomes_a_classifier_of_pairs(name, tmp_path):
    kind, options = MODELS[name]
    model = getattr(transformers, f"{kind}ForMaskedLM")
    torch.manual_seed(0)
    model(model.config_class(**options)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer_folders.wordpiece().to_str())
    (tmp_path / "pairs.csv").write_text("one,two,label\n" + "".join(f"{','.join(row)}\n" for row in ROWS))
    data = {"text_column": "one", "pair_column": "two", "sequence_length": 24, "tokenizer": f"hf:{tmp_path / 'model'}", "validation": None}
    source = f"csv_rows:{tmp_path / 'pairs.csv'}"
    config = {"init_from": f"hf:{tmp_path / 'model'}", "task": "classify_text", "data": {"source": source, "batch_size": 4} | data}
    config |= {"optimizer": {"name": "adamw", "learning_rate": 1e-3}, "training": {"steps": 2}, "log": {"tensorboard": False}}
    jaxmodels.train(config, str(tmp_path / "run"), quiet=True)
    parent = json.loads((tmp_path / "run" / "manifest.json").read_text())["parents"][0]
    assert {"head/output/kernel", "head/output/bias"} <= set(parent["initialised"]) and all(path.startswith("head/") for path in parent["initialised"])
    assert parent["taken"] and ("head/dense/kernel" in parent["initialised"]) == (name != "modernbert")  # whose heads share their hidden layer

    dataset = open_dataset(source, {key: value for key, value in data.items() if key != "validation"} | {"holdout": 0.0}, None)
    batch = get_batch(dataset.splits["train"], np.arange(4))
    assert batch["types"].max() == 1 and dataset.info["labels"] == ["no", "yes"]
    out = export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    theirs, account = getattr(transformers, f"{kind}ForSequenceClassification").from_pretrained(out, output_loading_info=True)
    assert not any(account[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    here = jaxmodels.load(str(tmp_path / "run"))
    found = here.predict({key: batch[key] for key in ("tokens", "types")})  # none of these models reads the types
    np.testing.assert_allclose(found, jax.nn.softmax(random_pretrained.logits(theirs.eval(), (batch["tokens"],))), atol=1e-5)
