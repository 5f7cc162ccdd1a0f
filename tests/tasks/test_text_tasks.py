"""Tasks on text: losses and scores against values computed by hand."""

import datetime
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle_model
import pytest
import warm_python
from conftest import HELPERS, ROOT
from flax import nnx

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.sources.dates import FORMATS
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models.functional import split
from jaxmodels.models.recurrent import RecurrentEncoder
from jaxmodels.step.step import make_eval_step
from jaxmodels.tasks.classify_text import ClassifyText
from jaxmodels.tasks.regress_text import RegressText
from jaxmodels.tasks.seq2seq import Seq2Seq
from jaxmodels.tasks.tag import Tag


def logits_of(*probabilities):
    return jnp.log(jnp.array(probabilities))


def model(logits):
    return lambda *_, rngs=None: logits


def test_entities_are_scored_over_all_rows_on_one_device_and_on_two():
    values = oracle_model.evaluate()
    assert values["precision"] == pytest.approx(4 / 5) and values["recall"] == pytest.approx(4 / 6)
    assert values["f1"] == pytest.approx(2 * 4 / (5 + 6))
    assert values["accuracy"] == pytest.approx(18 / 20)
    done = warm_python.run([HELPERS / "oracle_model.py", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert two.pop("devices") == 2
    for name in ("precision", "recall", "f1", "accuracy", "loss"):
        assert two[name] == pytest.approx(values[name], rel=1e-6)


def test_the_best_checkpoint_may_be_chosen_by_a_score():
    with pytest.raises(ConfigError, match="has no metric 'bleu'.*f1"):
        build_experiment(oracle_model.CONFIG | {"checkpoint": {"best": "bleu"}})


def test_tags_of_minus_one_do_not_count():
    task = Tag({"vocab_size": 9, "tags": ["O", "B-X"]})
    logits = logits_of([[0.5, 0.5], [0.1, 0.9]], [[0.8, 0.2], [0.3, 0.7]])
    batch = {"tokens": jnp.zeros((2, 2), int), "tags": jnp.array([[0, -1], [1, 1]]), "weight": jnp.array([1.0, 0.5])}
    total, weight, metrics = task.loss(model(logits), batch, None)
    assert float(weight) == 2.0
    np.testing.assert_allclose(total, -(np.log(0.5) + 0.5 * np.log(0.2) + 0.5 * np.log(0.7)), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"][0], 1 + 0.5)


def test_constrained_tags_are_the_best_of_all_allowed_sequences():
    names = ("B-X", "B-Y", "I-X", "I-Y", "O")
    rng = np.random.default_rng(0)
    scores = np.log(rng.dirichlet(np.ones(5) * 0.5, (6, 5))).astype(np.float32)
    valid = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    task = Tag({"vocab_size": 9, "tags": names})
    got = np.asarray(task.predict(model(jnp.asarray(scores)), {"tokens": jnp.zeros((6, 5), int), "tags": jnp.where(valid, 0, -1)}))
    free = np.asarray(Tag({"vocab_size": 9, "tags": names}, constrained=False).predict(model(jnp.asarray(scores)), {"tokens": None}))
    np.testing.assert_array_equal(free, scores.argmax(-1))

    def allowed(sequence):
        pairs = zip((None, *sequence), sequence, strict=False)
        return all(names[b][0] != "I" or (a is not None and names[a][1:] == names[b][1:]) for a, b in pairs)

    for row in range(6):
        places = np.flatnonzero(valid[row])
        best = max(filter(allowed, itertools.product(range(5), repeat=len(places))), key=lambda s: scores[row, places, s].sum())  # noqa: B023
        assert got[row, places].tolist() == list(best)
    assert (got != free)[valid].any()


def test_text_classes():
    task = ClassifyText({"vocab_size": 9, "num_classes": 2}, label_smoothing=0.2)
    batch = {"tokens": jnp.zeros((2, 3), int), "label": jnp.array([0, 1]), "weight": jnp.ones(2)}
    total, weight, metrics = task.loss(model(logits_of([0.6, 0.4], [0.7, 0.3])), batch, None)
    assert float(weight) == 2 and task.provides["head"] == ("class", 2)
    np.testing.assert_allclose(metrics["loss"][0], -np.log(0.6) - np.log(0.3), rtol=1e-6)
    np.testing.assert_allclose(total, -0.9 * np.log(0.6) - 0.1 * np.log(0.4) - 0.9 * np.log(0.3) - 0.1 * np.log(0.7), rtol=1e-6)
    # Class 0: precision 2/3, recall 2/2; class 2: precision 1, recall 1/2; class 1 does not occur.
    values = task.score({"predicted": np.array([0, 0, 0, 2]), "label": np.array([0, 0, 2, 2])})
    assert values == {"macro_f1": pytest.approx((0.8 + 2 / 3) / 2)}


def test_numbers_of_texts():
    task = RegressText({"vocab_size": 9}, center=3.0, scale=2.0)
    batch = {"tokens": jnp.zeros((3, 2), int), "label": jnp.array([1.0, 2.0, 9.0]), "weight": jnp.array([1.0, 1.0, 0.0])}
    total, weight, metrics = task.loss(model(jnp.array([[0.0], [-1.0], [5.0]])), batch, None)
    assert float(total) == 4 + 1 and float(weight) == 2 and float(metrics["mae"][0]) == 2 + 1
    values = task.score({"predicted": np.array([1.0, 2.0, 3.0, 9.0]), "label": np.array([1.0, 4.0, 2.0, 8.0])})
    x, y = np.array([1.0, 2, 3, 9]), np.array([1.0, 4, 2, 8])
    assert values["pearson"] == pytest.approx(np.cov(x, y)[0, 1] / np.sqrt(np.var(x, ddof=1) * np.var(y, ddof=1)))
    assert values["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))
    assert task.score({"predicted": np.ones(3), "label": np.arange(3.0)}) == {"pearson": 0.0, "spearman": 0.0}


def test_labels_stay_exact_under_bfloat16():
    task = RegressText({"vocab_size": 9})
    batch = {"tokens": jnp.zeros((1, 2), int), "label": jnp.array([1.001]), "weight": jnp.ones(1)}
    model = RecurrentEncoder(9, ("value", 1), width=2, rngs=nnx.Rngs(0))
    graph, params, stats = split(model)
    sums = task.evaluate(model, batch, None)
    _, outputs = make_eval_step(task, graph, "bfloat16")(params, stats, batch | {"index": jnp.arange(1)}, sums, jax.random.key(0))
    assert float(outputs["label"][0]) == np.float32(1.001)


class Words:
    """A tokenizer of four special tokens and these words."""

    words = ("<unknown>", "<start>", "<end>", "<mask>", "the", "cat", "sat", "on", "mat")
    vocab_size = len(words)

    def special(self, name):
        return self.words.index(f"<{name}>")

    def decode(self, tokens):
        return " ".join(self.words[t] for t in tokens)


INFO = {"vocab_size": Words.vocab_size, "tokenizer": Words()}


def test_sequences_are_scored_as_texts():
    task = Seq2Seq(INFO, scores=("exact_match", "bleu", "rougeL"))
    the, cat, sat, on, mat, end = 4, 5, 6, 7, 8, 2
    target = np.array([[the, cat, sat, on, the, mat, end], [the, cat, end, -1, -1, -1, -1], [the, mat, end, -1, -1, -1, -1]])
    predicted = np.array([[the, cat, sat, on, the, mat, end, -1], [the, mat, end, -1, -1, -1, -1, -1], [the, mat, sat, on, the, mat, sat, on]])
    values = task.score({"predicted": predicted, "target": target})
    assert values["exact_match"] == pytest.approx(1 / 3)
    # ROUGE-L: 1; one common word of two in both; both words within eight.
    assert values["rougeL"] == pytest.approx((1 + 1 / 2 + 2 * (2 / 8) * 1 / (2 / 8 + 1)) / 3)
    # BLEU: matches of 1- to 4-grams over predicted ones, without a brevity penalty, because the predictions are longer.
    matches = [(6 + 1 + 2, 6 + 2 + 8), (5 + 0 + 1, 5 + 1 + 7), (4, 4 + 6), (3, 3 + 5)]
    assert values["bleu"] == pytest.approx(100 * np.prod([a / b for a, b in matches]) ** 0.25)
    assert task.text(predicted[1]) == "the mat"
    with pytest.raises(ConfigError, match="no 'meteor'"):
        Seq2Seq(INFO, scores=("meteor",))


def test_the_loss_of_a_target_excludes_its_start_token():
    task = Seq2Seq({"vocab_size": 3, "tokenizer": Words()})
    logits = logits_of([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
    batch = {"source": jnp.zeros((1, 2), int), "target": jnp.array([[1, 0, 2, -1]]), "weight": jnp.ones(1)}
    total, weight, metrics = task.loss(model(logits), batch, None)
    assert float(weight) == 2 and float(metrics["accuracy"][0]) == 1
    np.testing.assert_allclose(total, -np.log(0.2) - np.log(0.8), rtol=1e-6)


def test_dates_are_right_and_held_out():
    data = open_dataset("dates", {"examples": 400, "held_out": 30}, None)
    decode = data.info["tokenizer"].decode
    texts = {
        name: [tuple(decode([t for t in part[i][key] if t >= 0]) for key in ("source", "target")) for i in range(len(part))]
        for name, part in data.splits.items()
    }
    answers = {name: {answer for _, answer in part} for name, part in texts.items()}
    assert [len(texts[name]) for name in ("train", "validation", "test")] == [400, 30, 30]
    assert len(answers["test"]) == 30 and not answers["test"] & (answers["train"] | answers["validation"])
    for source, answer in texts["test"] + texts["train"][:50]:
        day = datetime.date.fromisoformat(answer.removeprefix("<start>").removesuffix("<end>"))
        assert source in [write(day) for write in FORMATS]
    assert {write(datetime.date(1998, 3, 5)) for write in FORMATS} >= {"Thursday, March 5, 1998", "the 5th of March 1998", "3/5/1998", "5.III.1998"}
    again = open_dataset("dates", {"examples": 400, "held_out": 30}, None)
    assert all(again.splits[name].fingerprint() == part.fingerprint() for name, part in data.splits.items())


def test_a_dates_experiment_decodes_what_it_predicts():
    config = {
        "model": {"name": "gru_seq2seq", "width": 8},
        "task": {"name": "seq2seq"},
        "data": {"source": "dates", "examples": 40, "held_out": 4, "batch_size": 4},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "training": {"steps": 1},
        "checkpoint": {"best": "exact_match"},
    }
    experiment = build_experiment(config)
    module = nnx.eval_shape(lambda: experiment.build(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    batch = {"source": jnp.zeros((3, 7), int)}
    predicted = jax.eval_shape(lambda s: experiment.task.predict(nnx.merge(graph, s), batch), state)
    assert predicted.shape == (3, 11)  # an ISO date and its end


@pytest.mark.parametrize(
    ("task", "info", "message"),
    [
        (Tag, {"vocab_size": 3}, "gives no tags"),
        (ClassifyText, {"vocab_size": 3}, "gives no num_classes"),
        (RegressText, {}, "gives no vocab_size"),
        (Seq2Seq, {"vocab_size": 3}, "gives no tokenizer"),
        (Seq2Seq, {"vocab_size": 3, "tokenizer": object()}, "start and end tokens"),
    ],
)
def test_errors_name_what_a_task_lacks(task, info, message):
    with pytest.raises(ConfigError, match=message):
        task(info)
