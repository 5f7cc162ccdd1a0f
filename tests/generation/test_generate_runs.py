"""Generation with runs: from Python, on the command line, and sharded over devices."""

import contextlib
import io
import json

import numpy as np
import pytest
import warm_python
from conftest import HELPERS
from random_models import run_of

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.generation.generate import own_ends
from jaxmodels.generation.stop_strings import GeneratedText, Pieces
from jaxmodels.tokenizers.factory import make_tokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ,.", special=True)
GPT = {"name": "gpt", "layers": 1, "heads": 2, "width": 16, "context": 64}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_embeddings": False}
SPREAD = {
    "mixtral": (
        {**GPT, **LLAMA, "heads": 4, "width": 32, "kv_heads": 2, "window": 8, "scan": True, "moe": {"experts": 4, "top_k": 2}},
        "language_model",
    ),
    "gpt": (GPT, "language_model"),
    "lstm": ({"name": "lstm", "width": 16}, "language_model"),
    "transformer": ({"name": "encoder_decoder", "layers": 2, "heads": 4, "width": 32, "context": 64}, "seq2seq"),
}


def command(*arguments):
    """Return the exit status, the output and the error output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "gpt", GPT, {"name": "language_model"}, LETTERS)


def test_the_command_line_prints_the_result_of_the_function(run):
    made = jaxmodels.load(run).generate(["ab", "the end"], max_tokens=12)
    status, out, _ = command("generate", f"--workdir={run}", "--prompt=ab", "--prompt=the end", "--max_tokens=12")
    assert status == 0 and out == f"ab{made[0].text}\nthe end{made[1].text}\n"
    status, out, _ = command("generate", f"--workdir={run}@latest", "--prompt=ab", "--prompt=the end", "--max_tokens=12", "--json")
    result = json.loads(out)
    assert (status, result["step"]) == (0, 7)
    assert [(c["prompt"], c["text"], c["tokens"], c["finish"]) for c in result["completions"]] == [(c.prompt, c.text, c.tokens, c.finish) for c in made]
    stop = made[0].text[3:5]
    status, out, _ = command("generate", f"--workdir={run}", "--prompt=ab", "--max_tokens=12", "--stream", f"--stop={stop}")
    assert status == 0 and out == "ab" + made[0].text[: made[0].text.index(stop)] + "\n"


def test_wrong_arguments_are_one_line_and_status_2(run, tmp_path):
    for arguments, message in (
        (["--prompt="], "prompt 1 is empty"),
        (["--prompt=ab", "--temperature=-1"], "temperature must be 0"),
        (["--prompt=ab", "--prompt=c", "--stream"], "give one --prompt"),
        (["--prompt=ab", "--beams=3", "--stream"], "beam search cannot stream"),
        (["--prompt=" + "a" * 70], "prompt 1 has 70 tokens, and the model's context is 64"),
    ):
        status, out, err = command("generate", f"--workdir={run}", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1 and out == ""
    assert command("generate", f"--workdir={tmp_path}/none", "--prompt=a")[0] == 2
    no_text = jaxmodels.load(run)
    no_text.config["task"]["name"] = "classify"
    with pytest.raises(ConfigError, match="a run of the task 'classify' cannot generate text.*jaxmodels evaluate"):
        no_text.generate("ab")
    with pytest.raises(ConfigError, match="precision must be float32, bfloat16 or int8, got 'float16'"):
        jaxmodels.load(run).generate("ab", precision="float16")


def test_a_seq2seq_run_generates_its_predictions(tmp_path):
    run = jaxmodels.load(run_of(tmp_path / "run", {"name": "gru_seq2seq", "width": 16}, {"name": "seq2seq"}, LETTERS))
    texts = ["abc", "hello there"]
    source = np.full((2, 16), -1, np.int32)
    for i, text in enumerate(texts):
        source[i, : len(text)] = LETTERS.encode(text)
    expected = [run.task.text(row) for row in run.predict({"source": source})]
    made = run.generate(texts, max_tokens=20)
    assert [c.text for c in made] == expected and any(c.finish == "length" for c in made)


@pytest.mark.parametrize("kinds, names", [("few", ("gpt",)), pytest.param("all", tuple(SPREAD), marks=pytest.mark.slow)])
def test_eight_devices_generate_the_same_texts_as_one(kinds, names, tmp_path):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    runs = [run_of(tmp_path / name, SPREAD[name][0], {"name": SPREAD[name][1]}, LETTERS, mesh=mesh) for name in names]
    done = warm_python.run([HELPERS / "generate_on_mesh.py", kinds, *runs], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = ["abc", "the cat sat on the", "x"]
    for name, path, result in zip(names, runs, json.loads(done.stdout), strict=True):
        run = jaxmodels.load(path)
        assert result["texts"] == [c.tokens for c in run.generate(prompts, max_tokens=20)]
        assert result["weights"] > 1
        assert result["cache"] == ([] if name == "lstm" else ["data", "fsdp", "tensor"])
        if kinds == "few":
            continue
        assert result["beams"] == [c.tokens for c in run.generate(prompts[:2], max_tokens=8, beams=2)]
        assert result["drawn"] == [c.tokens for c in run.generate(prompts, max_tokens=20, temperature=1.0, top_k=9)]


TOKENIZERS = {
    "byte": lambda: ByteTokenizer(special=True),
    "bpe": lambda: make_tokenizer("bpe:300", ["Grün ist die Farbe, 漢字 and emoji 😀 of it all. " * 5], None),
    "word": lambda: make_tokenizer("word:50", ["Grün ist die Farbe, of it all ."], None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_together_are_the_whole_text(name):
    tokenizer = TOKENIZERS[name]()
    before, text = tokenizer.encode("Grün ist").tolist(), " die Farbe, 漢字 😀😀 of it all"
    everything = tokenizer.encode("Grün ist" + text).tolist()
    assert everything[: len(before)] == before
    pieces = Pieces(tokenizer, before)
    streamed = [pieces.add(token) for token in everything[len(before) :]]
    assert "".join(streamed) + pieces.finish() == tokenizer.decode(everything)[len(tokenizer.decode(before)) :]
    assert not any("\ufffd" in piece for piece in streamed)


def test_all_end_tokens_of_a_pretrained_model_end_its_texts():
    for named, expected in ((None, [2]), (7, [2, 7]), ([2, 9, 7], [2, 9, 7])):
        tokenizer = CharacterTokenizer("abc", special=True)
        tokenizer.config = {"eos_token_id": named}
        assert own_ends(tokenizer) == expected
    assert own_ends(CharacterTokenizer("abc")) == own_ends(None) == []


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_of_any_bytes_equal_the_decoded_text(seed):
    """Also for bytes that are not UTF-8: the pieces together equal the text decoded at once."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(list("aé漢😀".encode()) + [255, 128, 226], 200).tolist()
    pieces = Pieces(ByteTokenizer())
    assert "".join(map(pieces.add, tokens)) + pieces.finish() == bytes(tokens).decode(errors="replace")


def test_a_stop_string_across_tokens_is_found():
    row = GeneratedText(ByteTokenizer(), (), (), ("</s>", "STOP"))
    shown = [row.add(token) for token in b"a <STO</s> b"[:10]]
    assert "".join(shown) == "a <STO" and row.finish == "stop" and row.text == "a <STO"
    assert shown[:3] == ["a", " ", ""]  # not returned yet, because it may be the beginning of one
