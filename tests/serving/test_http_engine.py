"""The compiled engine behind HTTP: texts and scores are those of the run itself, alone and among others."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import served_runs
from adapter_runs import LORAS, child_of
from random_models import run_of
from served_runs import GPT, LETTERS

import jaxmodels
from jaxmodels.serving import families
from jaxmodels.serving.engines import make_engine
from jaxmodels.serving.served import Running
from jaxmodels.serving.service import Service
from jaxmodels.tokenizers.simple import CharacterTokenizer

PROMPTS = ["the cat sat", "on", "a mat, and the dog.", "xyzzy", "abc abc", "then ran"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    runs = served_runs.write_runs(tmp_path_factory.mktemp("runs"), "gpt", "translate")
    return served_runs.serve_models(runs, how=Running(slots=4, context=48), make=make_engine)


@pytest.fixture(scope="module")
def client(models):
    with served_runs.live(models) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_greedy_texts_are_those_of_generate_alone_and_among_others(models, client):
    for name, model in models.items():
        wanted = [completion.text for completion in model.run.generate(PROMPTS, max_tokens=12)]

        def text(prompt, stream, name=name):
            made = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0, stream=stream)
            return "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text

        assert [text(prompt, False) for prompt in PROMPTS] == wanted
        with ThreadPoolExecutor(12) as pool:
            drawn = pool.submit(lambda name=name: client.completions.create(model=name, prompt=PROMPTS, max_tokens=20, n=2))
            assert list(pool.map(text, PROMPTS * 3, [True, False] * 9)) == wanted * 3
            assert len(drawn.result().choices) == 12


def test_seeds_repeat(client):
    made = [client.completions.create(model="gpt", prompt="abc", max_tokens=20, seed=seed, n=2) for seed in (1, 1, 2)]
    texts = [[choice.text for choice in each.choices] for each in made]
    assert texts[0] == texts[1] and len({*texts[0], *texts[2]}) == 3  # the second text of seed 1 has seed 2


def test_echoed_scores_are_the_log_probabilities_of_the_model(models, client):
    tokens = [LETTERS.encode(text).tolist() for text in PROMPTS]
    made = client.completions.create(model="gpt", prompt=tokens, max_tokens=1, logprobs=1, echo=True, temperature=0)
    for choice, row in zip(made.choices, tokens, strict=True):
        scores = models["gpt"].run.predict({"tokens": np.array([row], np.int32)})[0]
        wanted = [scores[i, token] for i, token in enumerate(row[1:])]
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1 : len(row)], wanted, atol=1e-4)
        tops = [max(top.values()) for top in choice.logprobs.top_logprobs[1 : len(row)]]
        np.testing.assert_allclose(tops, scores[:-1].max(-1), atol=1e-4)
        assert len(choice.logprobs.tokens) == len(row) + 1


def test_an_end_token_is_listed_too(client):
    """Clients that score a prompt ask for one new token, and leave out the last entry, whatever it is."""
    tokens = LETTERS.encode("abcde").tolist()
    made = client.completions.create(model="gpt", prompt=tokens, max_tokens=1, logprobs=1, echo=True, temperature=100, n=128, seed=0)  # nearly uniform
    assert {choice.finish_reason for choice in made.choices} == {"stop", "length"}
    assert {len(choice.logprobs.tokens) for choice in made.choices} == {6}


def test_children_with_adapters_share_the_engine_of_their_parent(tmp_path):
    parent = run_of(tmp_path / "parent", GPT, {"name": "language_model"}, LETTERS)
    named = {"thin": child_of(parent, tmp_path / "thin", LORAS["thin"]), "base": parent}
    service, lines = Service(), []
    service.load(named, Running(slots=2), say=lines.append)
    assert lines[0] == "thin: language_model, adapters on the weights and the engine of base" and list(service.models) == list(named)
    assert service.models["thin"].engine is service.models["base"].engine
    with served_runs.live(service.models) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        for name in named:
            made = client.completions.create(model=name, prompt="the cat", max_tokens=10, temperature=0)
            assert made.choices[0].text == jaxmodels.load(named[name]).generate("the cat", max_tokens=10)[0].text
        assert client.models.retrieve("thin").parent == "base"
    service.close()


def test_a_child_with_other_tokens_is_a_model_of_its_own(tmp_path):
    parent, lines = run_of(tmp_path / "parent", GPT, {"name": "language_model"}, CharacterTokenizer(LETTERS.alphabet)), []
    named = {"base": parent, "odd": child_of(parent, tmp_path / "odd", LORAS["thin"])}  # its tokenizer has special tokens
    assert families.parents(named) == {"odd": "base"}
    assert families.shared(jaxmodels.load(parent), {"odd": named["odd"]}, lines.append) == {}
    assert lines == ["odd is a model of its own: its tokenizer has other tokens, or other tokens that end a text, than that of its parent."]
