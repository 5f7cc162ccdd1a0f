"""Published folders behind HTTP, without a run: image labels and embeddings equal those of `transformers` with its own preprocessing."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
import random_pretrained
import served_runs
import tokenizer_folders
import torch
import transformers
from PIL import Image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    vit = random_pretrained.make("vit")
    vit.save_pretrained(place / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]).save_pretrained(place / "vit")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=210, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=36, max_position_embeddings=64
    )
    bert = transformers.BertForMaskedLM(config).eval()
    bert.save_pretrained(place / "bert")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    (place / "bert" / "tokenizer.json").write_text(tokenizer_folders.wordpiece().to_str())
    (place / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    return place, vit, bert


def test_labels_and_embeddings_are_those_of_transformers(folders):
    place, vit, bert = folders
    models = served_runs.serve_models({name: f"hf:{place / name}" for name in ("vit", "bert")})
    texts = ["the cat sat on the mat", "東京 fox"]
    file = served_runs.png((20, 30, 3), 5)
    with served_runs.live(models) as live, httpx.Client(base_url=live.url) as client:
        answer = client.post("/v1/predict", json={"model": "vit", "inputs": [base64.b64encode(file).decode()]})
        embedded = client.post("/v1/embeddings", json={"model": "bert", "input": texts})
    found = {entry["label"]: entry["probability"] for entry in answer.json()["results"][0]["labels"]}
    processor = transformers.ViTImageProcessor.from_pretrained(place / "vit")
    pixels = processor(Image.open(io.BytesIO(file)), return_tensors="pt")
    with torch.no_grad():
        wanted = torch.softmax(vit(**pixels).logits, -1)[0].numpy()
    np.testing.assert_allclose([found[vit.config.id2label[i]] for i in range(5)], wanted, atol=2e-3)  # both round what they resize, each in its way
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    for entry, text in zip(embedded.json()["data"], texts, strict=True):
        with torch.no_grad():
            states = bert.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean = states.mean(0)
        np.testing.assert_allclose(entry["embedding"], mean / np.linalg.norm(mean), atol=1e-4)
