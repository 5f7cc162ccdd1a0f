"""What a request may ask of the engine, and what it gets. One engine, which is compiled once, serves all tests that leave it intact."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import GREEDY, V, generator, prompts, started

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.models import functional
from jaxmodels.serving.requests import Busy, Request, RowSampling, Scored
from jaxmodels.tokenizers.simple import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .,")


@pytest.fixture(scope="module")
def own():
    return generator("llama", LETTERS)


@pytest.fixture(scope="module")
def warm(own):
    with started(own) as answers:
        answers.engine.warm()
        yield answers


def test_nothing_compiles_after_warm(warm):
    compiled, (short, longer) = warm.engine.programs.compiled(), prompts(5, 30)
    options = [
        {"sampling": RowSampling(temperature=0.7, top_k=3, seed=1)},
        {"sampling": RowSampling(top_p=0.5, min_p=0.1)},
        {"sampling": RowSampling(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5)},
        {"logprobs": 0},
        {"logprobs": 5, "echo": True},
        {"logprobs": 1, "echo": True, "max_tokens": 0},
    ]
    for some in options:
        tickets = [warm.ask(tokens, **{"max_tokens": 20} | some) for tokens in (short, longer, short)]
        for ticket in tickets:
            assert warm.wait(ticket)[-1].reason == "length"
    assert warm.engine.programs.compiled() == compiled


def test_a_seed_writes_the_same_text_in_any_batch(warm):
    tokens, *others = prompts(7, 3, 20)
    sampling = RowSampling(temperature=1.0, top_p=0.9, seed=11)
    alone = warm.tokens(warm.ask(tokens, max_tokens=25, sampling=sampling))
    for other in others:
        warm.ask(other, max_tokens=10, sampling=RowSampling(temperature=0.5, top_k=4))
    again = warm.ask(tokens, max_tokens=25, sampling=sampling)
    assert warm.tokens(again) == alone
    assert warm.tokens(warm.ask(tokens, max_tokens=25, sampling=RowSampling(temperature=1.0, top_p=0.9, seed=12))) != alone


def test_a_prompt_begins_with_what_was_read_before(warm, own):
    (tokens,) = prompts(41)
    tokens = tuple(reversed(tokens))
    first = warm.wait(warm.ask(tokens, max_tokens=8))
    again = warm.wait(warm.ask(tokens, max_tokens=8))
    branch = (*tokens[:22], 1, *tokens[23:])
    other = warm.wait(warm.ask(branch, max_tokens=8))
    assert [events[-1].cached_tokens for events in (first, again, other)] == [0, 40, 20]
    assert [event.token for event in first[:-1]] == [event.token for event in again[:-1]] == own.generate([list(tokens)], max_tokens=8)[0].tokens
    assert [event.token for event in other[:-1]] == own.generate([list(branch)], max_tokens=8)[0].tokens


def test_scores_are_those_of_the_full_forward_pass(warm, own):
    (tokens,) = prompts(23)
    scored, *new, end = warm.wait(warm.ask(tokens, max_tokens=6, logprobs=3, echo=True))
    assert isinstance(scored, Scored)
    text = [*tokens, *(event.token for event in new)]
    model = functional.evaluation_model(own.graph, *own.weights)
    log_TV = np.asarray(jax.nn.log_softmax(model(jnp.array([text]))[0]))
    scores = [*scored.scores, *(event.score for event in new)]
    assert [score.token for score in scores] == text
    assert scores[0].logprob is None
    for score, log_V in zip(scores[1:], log_TV, strict=False):
        assert score.logprob == pytest.approx(log_V[score.token], abs=1e-4)
        assert [token for token, _ in score.top] == np.argsort(-log_V)[:3].tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(np.sort(log_V)[::-1][:3].tolist(), abs=1e-4)
    assert (end.prompt_tokens, end.completion_tokens) == (23, 6)


def test_a_prompt_alone_is_scored(warm):
    for length in (1, 64):
        (tokens,) = prompts(length)
        scored, end = warm.wait(warm.ask(tokens, max_tokens=0, logprobs=0, echo=True))
        assert len(scored.scores) == length
        assert (end.reason, end.completion_tokens) == ("length", 0)


def test_cancelling_frees_the_row(warm):
    (tokens,) = prompts(3)
    tickets = [warm.ask(tokens) for _ in range(5)]
    while warm.engine.stats().running < 5:
        time.sleep(0.001)
    waiting = warm.ask(tokens, max_tokens=2)
    for ticket in tickets:
        ticket.cancel()
    assert {warm.wait(ticket)[-1].reason for ticket in tickets} == {"cancelled"}
    assert warm.wait(waiting)[-1].reason == "length"


def test_a_full_queue_refuses(warm, monkeypatch):
    (tokens,) = prompts(3)
    monkeypatch.setattr(warm.engine, "queue_limit", 4)
    tickets = []
    with pytest.raises(Busy, match="4 requests are waiting") as refused:
        for _ in range(30):
            tickets.append(warm.ask(tokens))
    assert refused.value.retry_after > 0
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        warm.wait(ticket)


def test_a_callback_that_fails_ends_its_own_request(warm, own, capfd):
    (tokens,) = prompts(6)

    def deliver(event):
        raise OSError("gone")

    warm.engine.submit(Request(tokens=tokens, max_tokens=30, sampling=GREEDY), deliver)
    assert warm.tokens(warm.ask(tokens, max_tokens=9)) == own.generate([list(tokens)], max_tokens=9)[0].tokens
    while warm.engine.stats().running:
        time.sleep(0.001)
    assert "gone" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, "the prompt is empty"),
        ({"tokens": (V,)}, "whole numbers from 0 to 28"),
        ({"tokens": (-1,)}, "whole numbers"),
        ({"tokens": (1,) * 65}, "65 tokens, and the context is 64"),
        ({"tokens": (1,) * 64}, "64 tokens, and the context is 64"),
        ({"tokens": (1,) * 60, "max_tokens": 5}, "leaves 4 of the context"),
        ({"tokens": (1,), "adapter": "x"}, "no adapter 'x'"),
    ],
)
def test_requests_that_cannot_be_served(warm, options, message):
    with pytest.raises(ConfigError, match=message):
        warm.engine.submit(Request(**options), print)


def test_texts_end_at_stop_strings_and_end_tokens(warm, own, monkeypatch):
    (tokens,) = prompts(8)
    whole = own.generate([list(tokens)], max_tokens=30)[0]
    stop = whole.text[11:14]
    before = whole.text.index(stop)
    events = warm.wait(warm.ask(tokens, max_tokens=30, stop=("~", stop)))
    assert events[-1].reason == "stop"
    assert "".join(event.text for event in events) == whole.text[:before]
    assert events[-1].completion_tokens == before + 3

    monkeypatch.setattr(own, "ends", (whole.tokens[9],))
    events = warm.wait(warm.ask(tokens, max_tokens=30))
    count = whole.tokens.index(whole.tokens[9])
    assert (events[-1].reason, events[-1].completion_tokens) == ("end", count + 1)
    assert [event.token for event in events[:-1]] == whole.tokens[:count]
    assert "".join(event.text for event in events) == whole.text[:count]


def test_draining_finishes_what_was_admitted(own):
    (tokens,) = prompts(3)
    with started(own) as answers:
        tickets = [answers.ask(tokens, max_tokens=12) for _ in range(8)]
        assert answers.engine.drain(60) == 0
        assert [answers.wait(ticket)[-1].reason for ticket in tickets] == ["length"] * 8
        with pytest.raises(Busy, match="shutting down"):
            answers.ask(tokens)
    with started(own) as answers:
        ticket = answers.ask(tokens)
        assert answers.engine.drain(0) == 1
        assert answers.wait(ticket)[-1].reason == "cancelled"


def test_an_error_of_the_device_ends_all_and_is_said(own, monkeypatch, capfd):
    (tokens,) = prompts(3)
    with started(own) as answers:
        steps = iter(range(3))
        step = answers.engine.programs.step

        def failing(*arguments):
            if next(steps, None) is None:
                raise ValueError("out of memory")
            return step(*arguments)

        monkeypatch.setattr(answers.engine.programs, "step", failing)
        tickets = [answers.ask(tokens) for _ in range(7)]
        ends = [answers.wait(ticket)[-1] for ticket in tickets]
        assert {end.reason for end in ends} == {"error"}
        assert "out of memory" in ends[0].error
        with pytest.raises(RunError, match="out of memory"):
            answers.ask(tokens)
    assert "the engine has ended: ValueError: out of memory" in capfd.readouterr().err
