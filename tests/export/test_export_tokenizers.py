"""Exported tokenizers of runs, loaded by `transformers`: the same ids and the same texts."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxmodels.export import tokenizer_files
from jaxmodels.runs.folder import RunFolder
from jaxmodels.tokenizers.factory import make_tokenizer

TEXTS = ["Hello there, world!\n\tTwo  spaces — and ünïcödé 漢字 🙂.", "the cat sat", "", "  leading"]


@pytest.mark.parametrize("spec", ["character", "character+special", "byte", "byte+special", "word:6", "word-lower:6", "bpe:300"])
def test_an_exported_tokenizer_gives_the_same_ids_in_transformers(tmp_path, spec):
    tokenizer = make_tokenizer(spec, [*TEXTS, "The cat sat on the mat. " * 20], None)
    run, out = RunFolder(tmp_path / "run"), tmp_path / "out"
    run.path.mkdir()
    out.mkdir()
    run.tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")
    notes = tokenizer_files.write(run, out)
    assert len(notes) == spec.startswith("word")
    there = AutoTokenizer.from_pretrained(out)
    texts = TEXTS if spec == "character" else [*TEXTS, "unseen Ж letters"] + ([] if spec.startswith("word") else ["a <end> in text"])
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = np.array(there(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], np.int32)
        np.testing.assert_array_equal(ours, theirs, err_msg=repr(text))
        if not spec.startswith("word"):
            assert there.decode(ours) == tokenizer.decode(ours) or "+special" in spec
    assert there.vocab_size == tokenizer.vocab_size
    for name, role in (("end", "eos_token_id"), ("start", "bos_token_id"), ("mask", "mask_token_id")):
        assert getattr(there, role) == tokenizer.special(name)
