"""Added tokens start at the mean, rows without a token are kept and never chosen, and rows of padding change nothing."""

import json

import jax
import numpy as np
import pretrained_folders
import pytest
import tokenizers as library
import torch
import transformers
from tokenizer_folders import LINES

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.export.peft import export_adapters
from jaxmodels.export.transformers import export_run
from jaxmodels.pretrained.safetensors import read_header
from jaxmodels.runs.folder import RunFolder
from jaxmodels.tokenizers.factory import make_tokenizer

ADDED = ("<|user|>", "<|assistant|>")
TEXT = "the quick brown fox<|user|>the dog <|assistant|>"
KINDS = {
    "gpt2": (pretrained_folders.gpt2, "language_model"),
    "llama": (pretrained_folders.llama, "language_model"),
    "bert": (pretrained_folders.bert, "masked_lm"),
}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "bert", "t5")]
OPTIONS = {"bert": {"with_head": True}}


def texts(folder, task: str) -> dict:
    if task == "seq2seq":
        file = folder / "pairs.jsonl"
        file.write_text("".join(json.dumps({"source": "the cat <|user|>", "target": f"<|assistant|> sat {i % 3}"}) + "\n" for i in range(8)))
        return {"source": f"jsonl:{file}", "source_column": "source", "target_column": "target", "sequence_length": 16, "target_length": 16, "holdout": 0.0}
    file = folder / "text.txt"
    file.write_text("\n".join([TEXT, *LINES] * 3))
    return {"source": f"text:{file}", "sequence_length": 16, "holdout": 0.0}


def config(place, reference: str, task: str, add: str = f"?add={','.join(ADDED)}", **model) -> dict:
    return {
        "model": {"name": reference, "dropout": 0.0, **model},
        "task": {"name": task, **({"sample_length": 0} if task == "language_model" else {})},
        "data": {**texts(place, task), "tokenizer": f"{reference}{add}", "batch_size": 2, "shuffle": False},
        "optimizer": {"name": "sgd", "learning_rate": 1e-44},  # updates are zero
        "training": {"steps": 1},
        "evaluation": {"every": None},
        "init_from": {"run": reference},
    }


def train(values: dict, workdir) -> RunFolder:
    jaxmodels.train(values, workdir=str(workdir), quiet=True)
    return RunFolder(str(workdir))


def tensors(folder) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.view()) for name, tensor in read_header(folder / "model.safetensors").items()}


@pytest.mark.parametrize("kind", ["gpt2", *SLOW])
def test_added_tokens_start_at_the_mean(kind, tmp_path):
    """Closed form: with learning rate 0 an export has the published rows, then their mean; ids and logits are those of `transformers`."""
    make, task = KINDS.get(kind, (pretrained_folders.t5, "seq2seq"))
    folder = make(tmp_path / "published", **OPTIONS.get(kind, {}))
    run = train(config(tmp_path, f"hf:{folder}", task), tmp_path / "run")
    out = export_run(str(run.path), str(tmp_path / "out"))
    before, after = tensors(folder), tensors(out)
    known = make_tokenizer(f"hf:{folder}", (), None)
    start, rows = known.tokens, json.loads((out / "config.json").read_text())["vocab_size"]
    assert rows == max(start + 2, known.rows)
    changed = [name for name in after if name in before and after[name].shape != before[name].shape]
    tables = [name for name in after if name in before and after[name].ndim <= 2 and len(after[name]) == rows]
    assert tables and set(changed) <= set(tables)
    for name in after.keys() & before.keys():
        if name not in tables:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        np.testing.assert_array_equal(after[name][:start], before[name][:start])
        np.testing.assert_array_equal(after[name][start + 2 :], before[name][start + 2 :])
        mean = before[name][:start].astype(np.float64).mean(0)
        np.testing.assert_allclose(after[name][start : start + 2], np.broadcast_to(mean, after[name][start : start + 2].shape), atol=1e-6)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), jaxmodels.load(str(run.path)).tokenizer
    assert theirs.convert_tokens_to_ids(list(ADDED)) == [start, start + 1]
    ids = ours.encode(TEXT)
    assert ids.tolist() == theirs(TEXT, add_special_tokens=False)["input_ids"] and {start, start + 1} <= set(ids.tolist())
    assert ours.decode([start]) == ADDED[0] and ours.decode([start + 1]) == ADDED[1]
    assert "resized" in run.manifest()["parents"][0] or rows == known.rows
    if task == "language_model":
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            wanted = torch.log_softmax(model(torch.tensor(ids[None].astype(np.int64))).logits, -1).numpy()
        np.testing.assert_allclose(jaxmodels.load(str(run.path)).predict({"tokens": ids[None]}), wanted, atol=1e-4)


def test_the_report_says_it_and_a_frozen_table_is_read_from_the_parent(tmp_path, capsys):
    """With LoRA the table stays in the published folder: its added rows are made again at each start."""
    folder = pretrained_folders.llama(tmp_path / "published")
    values = config(tmp_path, f"hf:{folder}", "language_model") | {"lora": {"rank": 2, "targets": ("attention/query",)}}
    jaxmodels.train(values, workdir=str(tmp_path / "run"))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 added tokens" in said and "start at the mean of the" in said and "embed/embedding is frozen" in said
    run = jaxmodels.load(str(tmp_path / "run"))
    table = np.asarray(run.model.embed.embedding[...])
    start = run.tokenizer.published_tokens
    np.testing.assert_allclose(table[start : start + 2], np.broadcast_to(table[:start].mean(0), (2, table.shape[1])), atol=1e-6)
    jaxmodels.train(values | {"training": {"steps": 2}}, workdir=str(tmp_path / "run"), quiet=True)
    with pytest.raises(ConfigError, match="added tokens"):
        export_adapters(str(tmp_path / "run"), str(tmp_path / "adapters"))


def test_tokens_that_were_published_without_rows(tmp_path):
    """`add_tokens` without `resize_token_embeddings`: training gives the tokens rows, loading the model alone is an error with both numbers."""
    folder = pretrained_folders.gpt2(tmp_path / "published")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra{i}>" for i in range(rows - tokenizer.get_vocab_size())])
    tokenizer.add_tokens(list(ADDED))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(ConfigError, match=rf"{rows + 2:,} tokens, its model rows for {rows:,}.*init_from"):
        jaxmodels.load(f"hf:{folder}")
    run = train(config(tmp_path, f"hf:{folder}", "language_model", add=""), tmp_path / "run")
    table = np.asarray(jaxmodels.load(str(run.path)).model.embed.embedding[...])
    assert len(table) == rows + 2
    np.testing.assert_allclose(table[rows], table[:rows].mean(0), atol=1e-6)


@pytest.mark.slow
def test_a_run_whose_tokenizer_gets_tokens(tmp_path):
    """From a run, also one with padding, and on with further tokens."""
    folder = pretrained_folders.gpt2(tmp_path / "published")
    first = train(config(tmp_path, f"hf:{folder}", "language_model", vocab_multiple=64), tmp_path / "first")
    before = tensors(export_run(str(first.path), str(tmp_path / "one")))["transformer.wte.weight"]
    values = config(tmp_path, str(first.path), "language_model", add="?add=<|third|>")
    values["model"] = {key: value for key, value in first.config()["model"].items() if key != "vocab_multiple"}
    second = train(values, tmp_path / "second")
    after = tensors(export_run(str(second.path), str(tmp_path / "two")))["transformer.wte.weight"]
    third = jaxmodels.load(str(second.path)).tokenizer.tokens - 1
    np.testing.assert_array_equal(after[:third], before[:third])
    np.testing.assert_allclose(after[third], before[:third].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("add", "problem"),
    [
        ("?add=<a>,<a>", "adds '<a>' twice"),
        ("?add=<a>?add_special=<a>", "adds '<a>' twice"),
        ("?add=<a>,", "an added token is empty"),
        ("?add=", "an added token is empty"),
        ("?add=<|endoftext|>", r"'<\|endoftext\|>' is a token already \(id 0\)"),
    ],
)
def test_wrong_added_tokens(add, problem, tmp_path):
    folder = pretrained_folders.gpt2(tmp_path / "published")
    with pytest.raises(ConfigError, match=problem):
        make_tokenizer(f"hf:{folder}{add}", (), None)


def test_tokenizers_without_added_tokens():
    with pytest.raises(ConfigError, match="takes no added tokens"):
        make_tokenizer("byte?add=<a>", (), None)


def test_special_tokens_are_read_in_templates_only(tmp_path):
    folder = pretrained_folders.gpt2(tmp_path / "published")
    tokenizer = make_tokenizer(f"hf:{folder}?add=<p>?add_special=<s>", (), None)
    assert tokenizer.encode("<p>").tolist() == [tokenizer.tokens - 2] and len(tokenizer.encode("<s>")) > 1
    assert tokenizer.read("<s>")[0].tolist() == [tokenizer.tokens - 1] and "<s>" in tokenizer.special_texts


def test_a_list_that_changes_on_resume(tmp_path):
    folder = pretrained_folders.gpt2(tmp_path / "published")
    train(config(tmp_path, f"hf:{folder}", "language_model"), tmp_path / "run")
    values = config(tmp_path, f"hf:{folder}", "language_model", add="?add=<|user|>") | {"training": {"steps": 2}}
    with pytest.raises(ConfigError, match="data.tokenizer"):
        train(values, tmp_path / "run")


def test_rows_without_a_token_are_never_chosen(tmp_path):
    """Their scores are made the largest; greedy decoding, sampling and beam search choose tokens all the same."""
    folder = pretrained_folders.gpt2(tmp_path / "published", vocab_size=400)
    run = jaxmodels.load(f"hf:{folder}")
    tokens = run.tokenizer.tokens
    assert tokens < 400
    model = run.model
    model.embed.embedding.set_value(model.embed.embedding[...].at[tokens:].multiply(1000.0))
    raw = np.asarray(model(run.tokenizer.encode("the cat")[None]))[0, -1]
    assert raw.argmax() >= tokens
    from jaxmodels.generation.generate import generate

    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 380}, {"beams": 3}):
        done = generate(model, run.tokenizer, ["the cat", "a"], max_tokens=8, **options)
        assert all(token < tokens for completion in done for token in completion.tokens)


@pytest.mark.parametrize("kind", ["gpt2", *SLOW])
def test_padding_changes_nothing(kind, tmp_path):
    """Trained from the same weights: losses and parameters are equal, padding stays zero, the export is bitwise equal, and so is the count."""
    make, task = KINDS.get(kind, (pretrained_folders.t5, "seq2seq"))
    folder = make(tmp_path / "published", **OPTIONS.get(kind, {}))
    exports, losses, counts = [], [], []
    for multiple in (1, 128):
        values = config(tmp_path, f"hf:{folder}", task, vocab_multiple=multiple)
        exports.append(tensors(export_run(str(train(values, tmp_path / f"same{multiple}").path), str(tmp_path / f"out{multiple}"))))
        values["optimizer"] = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0}
        run = train(values | {"training": {"steps": 3}, "log": {"every": 1}}, tmp_path / f"trained{multiple}")
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line] or [line["train/loss"] for line in lines if "train/loss" in line])
        counts.append(run.manifest()["parameters"])
        if multiple > 1:
            table = np.asarray(jaxmodels.load(str(run.path)).model.embed.embedding[...])
            assert len(table) % 128 == 0 and not table[run.manifest()["info"]["vocab_size"] :].any()
    assert exports[0].keys() == exports[1].keys() and all(np.array_equal(x, exports[1][name]) for name, x in exports[0].items())
    files = [(tmp_path / f"out{n}" / "config.json").read_bytes() for n in (1, 128)]
    assert files[0] == files[1] and counts[0] == counts[1]
    assert losses[0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_new_rows_of_zeros_leave_other_values_as_they_are():
    """The initialisation does not depend on the padding, and no gradient reaches it, with smoothed targets too."""
    from flax import nnx

    from jaxmodels import models
    from jaxmodels.models import functional
    from jaxmodels.tasks.language_model import LanguageModel

    batch = {"tokens": np.random.default_rng(0).integers(0, 99, (2, 9)).astype(np.int32), "weight": np.ones(2, np.float32)}
    for tied in (True, False):
        found = []
        for multiple, tiles in ((1, 1), (32, 1), (32, 2)):
            task = LanguageModel({"vocab_size": 99}, label_smoothing=0.1, tiles=tiles)
            model = models.create("gpt", vocab_size=99, layers=1, heads=2, width=8, tie_embeddings=tied, vocab_multiple=multiple, rngs=nnx.Rngs(0))
            graph, params, stats = functional.split(model)

            def loss(params, graph=graph, stats=stats, task=task):
                total, weight, _ = task.loss(functional.evaluation_model(graph, params, stats), batch, None)
                return total / weight

            value, gradients = jax.jit(jax.value_and_grad(loss))(params)
            found.append((float(value), functional.flatten(gradients)))
        for value, gradients in found[1:]:
            np.testing.assert_allclose(value, found[0][0], rtol=1e-6)
            for path, one in found[0][1].items():
                inside = tuple(slice(0, size) for size in one.shape)
                rest = np.array(gradients[path])
                np.testing.assert_allclose(rest[inside], one, atol=1e-6)
                rest[inside] = 0
                assert not rest.any()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_padded_tables_begin_at_what_the_model_computes(tied, dora):
    from flax import nnx

    from jaxmodels import models
    from jaxmodels.models.lora import add_lora

    model = models.create("gpt", vocab_size=99, layers=1, heads=2, width=8, tie_embeddings=tied, vocab_multiple=32, rngs=nnx.Rngs(0))
    tokens = np.arange(8, dtype=np.int32)[None]
    before = model(tokens)
    add_lora(model, rank=2, alpha=2.0, targets=("^embed$",) if tied else ("^output$",), dora=dora, rngs=nnx.Rngs(1))
    after, by_parts = model(tokens), model.head()(model.features(tokens)[0])
    assert before.shape == after.shape == by_parts.shape == (1, 8, 99)
    np.testing.assert_allclose(after, before, atol=1e-6)
    np.testing.assert_allclose(by_parts, before, atol=1e-6)
