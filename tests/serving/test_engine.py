"""Texts of the engine are those that `generate` writes for one prompt alone, whatever else is in the batch.

`pytest -m slow tests/serving -n 0` runs more kinds of models.
"""

import functools
import queue

import numpy as np
import pytest
from random_models import MORE, MORE_TARGETS, TARGETS, TEXTS, drawn

from jaxmodels.generation.generate import Generator
from jaxmodels.serving import programs
from jaxmodels.serving.engine import Engine
from jaxmodels.serving.requests import Finished, Request, RowSampling, Token

V = 29
GREEDY = RowSampling(temperature=0)


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    """Let short texts change the size of the state, and be read in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CHUNKS", (4, 16))
        patch.setattr(programs, "LENGTH", 16)
        yield


class Answers:
    """Submits requests and collects their events."""

    def __init__(self, engine):
        self.engine, self.events = engine, {}

    def ask(self, tokens, **options):
        request = Request(tokens=tuple(tokens), **{"sampling": GREEDY} | options)
        events = queue.Queue()
        ticket = self.engine.submit(request, events.put)
        self.events[ticket] = events
        return ticket

    def wait(self, ticket):
        """Return the events of a request once it has ended."""
        seen = []
        while not (seen and isinstance(seen[-1], Finished)):
            seen.append(self.events[ticket].get(timeout=60))
        assert seen[-1].error is None
        return seen

    def tokens(self, ticket):
        return [event.token for event in self.wait(ticket) if isinstance(event, Token)]


@pytest.fixture
def started():
    """Make engines that are closed at the end."""
    engines = []

    def start(generator, **options):
        engines.append(Engine(generator, **{"slots": 5, "context": 64} | options).start())
        return Answers(engines[-1])

    yield start
    for engine in engines:
        engine.close()


@functools.cache
def generator(name, tokenizer=None):
    (model, options), targets = (TEXTS | MORE | TARGETS | MORE_TARGETS)[name], name in TARGETS | MORE_TARGETS
    return Generator(drawn(model, V, **options), tokenizer, **({"start": 0} if targets else {}))


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [tuple(rng.integers(0, V, length).tolist()) for length in lengths]


@pytest.mark.parametrize("name", [*TEXTS, *TARGETS, *(pytest.param(name, marks=pytest.mark.slow) for name in (MORE | MORE_TARGETS))])
def test_rows_that_come_and_go_equal_generate(started, name):
    own = generator(name)
    answers = started(own)
    given, news = prompts(3, 1, 40, 9, 33, 5, 17, 2, 50, 12), [20, 30, 12, 25, 6, 40, 10, 3, 9, 28]
    tickets = []
    for number, (tokens, new) in enumerate(zip(given, news, strict=True)):
        tickets.append(answers.ask(tokens, max_tokens=new))
        if number % 3 == 2:
            assert answers.tokens(tickets[number - 1]) == own.generate([list(given[number - 1])], max_tokens=news[number - 1])[0].tokens
            tickets[number - 1] = answers.ask(given[number - 1], max_tokens=news[number - 1])
    for ticket, tokens, new in zip(tickets, given, news, strict=True):
        assert answers.tokens(ticket) == own.generate([list(tokens)], max_tokens=new)[0].tokens
    stats = answers.engine.stats()
    assert (stats.running, stats.queued) == (0, 0)
