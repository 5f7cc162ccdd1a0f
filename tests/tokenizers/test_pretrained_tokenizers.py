"""Tokenizers of pretrained models: the same ids as `transformers`, exact copies of their files, and their use in data sources."""

import json

import numpy as np
import pytest
import tokenizer_folders as folders
from tokenizer_folders import TRICKY, write

from jaxmodels.data.inspect import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.sources import text as text_lib
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.sections import resolve
from jaxmodels.tokenizers.factory import from_json, make_tokenizer
from jaxmodels.tokenizers.pretrained import PretrainedTokenizer

BERT = {"model_type": "bert", "vocab_size": 300}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"model_type": "t5", "vocab_size": 400, "decoder_start_token_id": 0, "is_encoder_decoder": True}
ROBERTA = {"model_type": "roberta", "vocab_size": 320}
LLAMA = {"model_type": "llama", "vocab_size": 512}
NAMES = {"bert": dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), folders.BERT_SPECIAL, strict=True))}
NAMES["roberta"] = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), folders.ROBERTA_SPECIAL, strict=True))
NAMES["roberta"] |= {"cls_token": "<s>", "sep_token": "</s>"}
NAMES["t5"] = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
NAMES["llama"] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
NAMES["gpt2"] = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def vocabulary(tokenizer) -> dict:
    """Return the files of a byte-level vocabulary without special tokens."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    return {"vocab.json": model["vocab"], "merges.txt": f"#version: 0.2\n{merges}\n"}


def lines(tokenizer) -> str:
    """Return the text of a `vocab.txt`."""
    return "\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)) + "\n"


def saved(tokenizer, kind) -> dict:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES[kind]}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": settings}


def byte_level():
    return folders.byte_level(["<|endoftext|>"])


CASES = {
    # Files of the folder, and the ids of unknown, start, end, mask, pad.
    "bert": (lambda: {"config.json": BERT, **saved(folders.wordpiece(), "bert")}, (1, 2, 3, 4, 0)),
    "bert-cased-settings": (
        lambda: {
            "config.json": BERT, "tokenizer.json": folders.wordpiece().to_str(),
            "tokenizer_config.json": {"do_lower_case": False, "tokenizer_class": "BertTokenizer"},
        },
        (1, 2, 3, 4, 0),
    ),
    "bert-vocab.txt": (lambda: {"config.json": BERT, "vocab.txt": lines(folders.wordpiece())}, (1, 2, 3, 4, 0)),
    "bert-vocab.txt-cased": (
        lambda: {"config.json": BERT, "vocab.txt": lines(folders.wordpiece(False)), "tokenizer_config.json": {"do_lower_case": False}},
        (1, 2, 3, 4, 0),
    ),
    "roberta": (lambda: {"config.json": ROBERTA, **saved(folders.byte_level(folders.ROBERTA_SPECIAL, True), "roberta")}, (3, 0, 2, 4, 1)),
    "roberta-vocab.json": (lambda: {"config.json": ROBERTA, **vocabulary(folders.byte_level(folders.ROBERTA_SPECIAL))}, (3, 0, 2, 4, 1)),
    "gpt2": (lambda: {"config.json": GPT2, **saved(byte_level(), "gpt2")}, (0, 0, 0, None, None)),
    "gpt2-vocab.json": (lambda: {"config.json": GPT2, **vocabulary(byte_level())}, (0, 0, 0, None, None)),
    "gpt2-start-and-end": (
        lambda: {"config.json": GPT2, "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True}, **vocabulary(byte_level())},
        (0, 0, 0, None, None),
    ),
    "qwen2-vocab.json": (lambda: {"config.json": {"model_type": "qwen2", "vocab_size": 330}, **vocabulary(byte_level())}, (0, None, 0, None, 0)),
    "t5": (lambda: {"config.json": T5, **saved(folders.unigram(), "t5")}, (2, 0, 1, None, 0)),
    "llama": (lambda: {"config.json": LLAMA, **saved(folders.metaspace_bpe(), "llama")}, (0, 1, 2, None, None)),
    "t5-spiece.model": (lambda: {"config.json": T5, "spiece.model": folders.sentencepiece_model("unigram")}, (2, 0, 1, None, 0)),
    "llama-tokenizer.model": (
        lambda: {
            "config.json": LLAMA, "tokenizer.model": folders.sentencepiece_model("bpe"),
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        },
        (0, 1, 2, None, None),
    ),
}  # fmt: skip


def same_as_sentencepiece(case: str, text: str) -> bool:
    """Return whether `transformers`, which converts SentencePiece models, agrees with SentencePiece on a text."""
    if case == "t5-spiece.model":
        return "</s>" not in text  # SentencePiece treats it as text
    return case != "llama-tokenizer.model" or not text.startswith(" ")  # it drops the first


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case, tmp_path):
    import transformers

    make, special = CASES[case]
    folder = write(tmp_path / "model", make())
    ours, theirs = make_tokenizer(f"hf:{folder}", (), None), transformers.AutoTokenizer.from_pretrained(folder)
    assert tuple(ours.special(name) for name in ("unknown", "start", "end", "mask", "pad")) == special
    assert ours.tokens == len(theirs) and ours.vocab_size == json.loads((folder / "config.json").read_text())["vocab_size"]
    again = from_json(ours.to_json())
    for text in TRICKY:
        if not same_as_sentencepiece(case, text):
            continue
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text).tolist() == again.encode(text).tolist() == plain, text
        assert ours.wrap(text)[0].tolist() == theirs(text, split_special_tokens=True)["input_ids"], text
        for length in (None, 7):
            options = {"truncation": True, "max_length": length} if length else {}
            pair = theirs(text, "the cat sat", split_special_tokens=True, return_token_type_ids=True, **options)
            tokens, types = ours.wrap(text, "the cat sat", length=length)
            if "model" in case and length:
                assert len(tokens) <= length
            elif case != "llama-tokenizer.model":  # its type ids differ at the start of the second text; the model has no types
                assert (tokens.tolist(), types.tolist()) == (pair["input_ids"], pair["token_type_ids"]), text
    if not case.endswith(".model"):
        marked = "The cat" + "".join(ours.special_names.values()) + " sat"
        assert ours.read(marked)[0].tolist() == theirs(marked, add_special_tokens=False)["input_ids"]


def test_files_are_restored_byte_for_byte_from_a_runs_json(tmp_path):
    files = {
        "tokenizer.model": folders.sentencepiece_model("bpe"),
        "tokenizer_config.json": '{ "add_bos_token":\r\n true }',
        "chat_template.jinja": "x\r\ny",
    }
    folder = write(tmp_path, {"config.json": LLAMA, **files, "model.safetensors": b"no tokenizer"})
    again = from_json(make_tokenizer(f"hf:{folder}", (), None).to_json())
    assert again.files() == {name: content if isinstance(content, bytes) else content.encode() for name, content in files.items()}
    run = write(tmp_path / "run", {"tokenizer.json": again.to_json()})
    assert make_tokenizer(str(run), (), None).files() == again.files()


def test_decoding_shows_special_tokens_and_nothing_for_rows_without_a_token(tmp_path):
    coder = make_tokenizer(f"hf:{write(tmp_path / 'a', CASES['llama'][0]())}", (), None)
    tokens = np.concatenate([[1], coder.encode("the cat"), [2, 500, -1]])
    assert coder.tokens <= 500 < coder.vocab_size and coder.decode(tokens).replace(" ", "") == "<s>thecat</s>"
    with pytest.raises(ValueError, match="512 is not a token"):
        coder.decode([512])
    coder = make_tokenizer(f"hf:{write(tmp_path / 'b', CASES['t5-spiece.model'][0]())}", (), None)
    sentinel = coder._coder.token_to_id("<extra_id_0>")
    assert sentinel == coder.tokens - 1
    assert coder.decode([*coder.encode("the cat"), sentinel, 1]) == "the cat<extra_id_0></s>"


def test_tokens_that_the_settings_add_to_the_vocabulary(tmp_path):
    """A padding token that was added after training, in files next to tokenizer.json."""
    import transformers

    number = byte_level().get_vocab_size()
    added = {str(number): {"content": "<pad>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "added_tokens_decoder": added,
    }
    parts = {"config.json": GPT2 | {"vocab_size": 330}, "tokenizer.json": byte_level().to_str()}
    folder = write(tmp_path / "one", parts | {"tokenizer_config.json": settings})
    coder = make_tokenizer(f"hf:{folder}", (), None)
    assert coder.special("pad") == number == transformers.AutoTokenizer.from_pretrained(folder).pad_token_id
    assert coder.special("end") == 0
    folder = write(tmp_path / "two", parts | {"added_tokens.json": {"<pad>": number}, "special_tokens_map.json": {"pad_token": "<pad>", "bos_token": None}})
    coder = make_tokenizer(f"hf:{folder}", (), None)
    assert coder.special("pad") == number and coder.special("start") is None, "a null means that there is none"
    write(folder, {"added_tokens.json": {"<pad>": number + 5}})
    with pytest.raises(ConfigError, match=f"'<pad>' is {number} in the vocabulary and {number + 5}"):
        make_tokenizer(f"hf:{folder}", (), None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": BERT | {"vocab_size": 100}, "vocab.txt": lines(folders.wordpiece())}, r"has 1\d\d tokens, its model rows for 100"),
        ({"config.json": BERT}, "has none of its files.*Add its tokenizer.json"),
        ({"config.json": {"model_type": "deberta-v2"}, "spm.model": ""}, "An spm.model is not read: .*save_pretrained.FOLDER. writes its tokenizer.json"),
        ({"config.json": BERT, "merges.txt": ""}, "it has merges.txt, and its model_type is 'bert'"),
        ({"config.json": BERT, "tokenizer.json": "{}"}, "cannot be read"),
        ({"config.json": BERT, "vocab.txt": "[UNK]\n", "tokenizer_config.json": "["}, "tokenizer_config.json is not JSON"),
    ],
)
def test_errors_name_the_cause(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(f"hf:{write(tmp_path, files)}", (), None)


def test_data_sources_put_the_tokenizers_own_special_tokens_around_a_text(tmp_path):
    folder = write(tmp_path / "bert", CASES["bert"][0]())
    write(tmp_path, {"train.tsv": "The cat\t1\nthe cat sat on the mat with a hat\t0\n", "words.conll": "the\tO\nlazzy\tB-X\ncat\tI-X\n\nThe\tO\n"})
    options = {"sequence_length": 8, "tokenizer": "hf:bert", "holdout": 0.0}
    rows = open_dataset(f"tsv:{tmp_path}/train.tsv", options, str(tmp_path))  # a relative folder in the data directory
    coder = rows.info["tokenizer"]
    assert isinstance(coder, PretrainedTokenizer) and rows.info["vocab_size"] == 300 and "1 of 2 examples" in rows.notes[0]
    for row, text in zip(rows.splits["train"].arrays["tokens"], ("The cat", "the cat sat on the mat with a hat"), strict=True):
        assert row[row >= 0].tolist() == coder.wrap(text, length=8)[0].tolist()
    assert row[-1] == coder.special("end"), "a text that is cut keeps its last special token"
    tagged = open_dataset(f"conll:{tmp_path}/words.conll", options | {"tokenizer": f"hf:{folder}", "sequence_length": 10}, None).splits["train"].arrays
    first = [coder.encode(word).tolist() for word in ("the", "lazzy", "cat")]
    assert len(first[1]) > 1
    assert tagged["tokens"][0].tolist() == ([2] + sum(first, []) + [3] + [-1] * 10)[:10]
    wanted = [-1] + [tag for word, tag in zip(first, (2, 0, 1), strict=True) for tag in [tag] + [-1] * (len(word) - 1)]
    assert tagged["tags"][0].tolist() == (wanted + [-1] * 10)[:10] and tagged["tags"][1].tolist() == [-1, 2] + [-1] * 8
    with pytest.raises(ConfigError, match="sequence_length=2 leaves no space"):
        open_dataset(f"tsv:{tmp_path}/train.tsv", options | {"sequence_length": 2}, str(tmp_path))


def test_pairs_of_t5_end_in_its_end_and_start_as_its_decoder(tmp_path):
    folder = write(tmp_path, CASES["t5"][0]() | {"train.tsv": "the cat\tthe dog\nthe quick brown fox jumps over\tthe cat sat on the mat\n"})
    options = {"sequence_length": 6, "target_length": 5, "tokenizer": f"hf:{folder}", "holdout": 0.0, "source_column": 0, "target_column": 1}
    arrays = open_dataset(f"tsv:{folder}/train.tsv", options, None).splits["train"].arrays
    coder = make_tokenizer(f"hf:{folder}", (), None)
    for row, text in zip(arrays["source"], ("the cat", "the quick brown fox jumps over"), strict=True):
        assert row[row >= 0].tolist() == coder.wrap(text, length=6)[0].tolist() and row[row >= 0][-1] == 1
    assert arrays["target"][0].tolist() == ([0, *coder.encode("the dog"), 1] + [-1] * 6)[:6]
    assert arrays["target"][1][0] == 0 and arrays["target"][1][-1] == 1


def test_cache_report_and_errors_work_as_for_other_tokenizers(tmp_path, monkeypatch):
    folder = write(tmp_path / "gpt2", CASES["gpt2"][0]() | {"corpus.txt": "\n".join(folders.LINES)})
    monkeypatch.setattr(text_lib, "CACHE_FROM", 10)
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path / "cache"))
    options = {"sequence_length": 8, "tokenizer": f"hf:{folder}"}
    first, second = (open_dataset(f"text:{folder}/corpus.txt", options, None) for _ in range(2))
    assert any("read from" in note for note in second.notes) and first.splits["train"].fingerprint() == second.splits["train"].fingerprint()
    assert second.info["tokenizer"].files() == first.info["tokenizer"].files()
    config = {"data": {"source": f"text:{folder}/corpus.txt", "batch_size": 2, **options}}
    config |= {"model": "gpt", "task": "language_model", "optimizer": {"name": "adam", "learning_rate": 1e-3}, "training": {"steps": 1}}
    report = inspect(resolve(config))
    assert report["info"]["vocab_size"] == 320 and "brown" in report["examples"][0]["tokens"]
    with pytest.raises(ConfigError, match="there is no folder"):
        open_dataset(f"text:{folder}/corpus.txt", options | {"tokenizer": f"hf:{folder}/nowhere"}, None)
