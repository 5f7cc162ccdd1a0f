"""An engine of a model that is sharded over devices writes the texts of one device."""

import json

import pytest
import warm_python
from conftest import HELPERS
from random_models import LLAMA, MOE, T5, run_of

import jaxmodels
from jaxmodels.tokenizers.simple import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ,.", special=True)
PROMPTS = ([1, 2, 3], list(range(5, 25)), [7], [3, 9, 4, 1, 12], list(range(20, 5, -1)))
WIDE = {"width": 32}
RUNS = {
    "mixtral": ({"name": "gpt", **LLAMA, **WIDE, **MOE, "window": 8, "scan": True}, "language_model"),
    "gpt": ({"name": "gpt", "layers": 1, "heads": 2, "width": 16, "context": 64}, "language_model"),
    "lstm": ({"name": "lstm", "width": 16}, "language_model"),
    "t5": ({"name": "encoder_decoder", **T5, **WIDE}, "seq2seq"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_eight_devices_serve_the_same_texts_as_one(name, tmp_path):
    model, task = RUNS[name]
    path = run_of(tmp_path / name, model, {"name": task}, LETTERS, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    done = warm_python.run([HELPERS / "serve_on_mesh.py", path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads(done.stdout)
    expected = [c.tokens for c in jaxmodels.load(path).generate(PROMPTS, max_tokens=20)]
    assert result["texts"] == expected
    assert result["again"] == expected[1]
    assert result["axes"] == (["data", "fsdp"] if name == "lstm" else ["data", "fsdp", "tensor"])
    assert (result["compiled"], result["slots"]) == (0, 8)
