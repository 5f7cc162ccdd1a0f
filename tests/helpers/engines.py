"""Engines of small models, and their answers."""

import contextlib
import functools
import queue
from unittest import mock

import numpy as np
from random_models import MORE, MORE_TARGETS, TARGETS, TEXTS, drawn

from jaxmodels.generation.generate import Generator
from jaxmodels.serving import batch, programs
from jaxmodels.serving.engine import Engine
from jaxmodels.serving.requests import Finished, Request, RowSampling, Token

V = 29
GREEDY = RowSampling(temperature=0)


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
        return seen

    def tokens(self, ticket):
        """Return the tokens of an answer."""
        events = self.wait(ticket)
        assert events[-1].error is None
        return [event.token for event in events if isinstance(event, Token)]


@contextlib.contextmanager
def small_sizes():
    """Make sizes so small that short texts are read in parts and change the size of the state; change it soon, and count slots anew often."""
    of_programs = mock.patch.multiple(programs, CHUNKS=(4, 16), LENGTH=16)
    with of_programs, mock.patch.multiple(batch, _PATIENCE=3, _LAST_SLOT=80):
        yield


@contextlib.contextmanager
def started(generator, **options):
    """Start an engine of small sizes."""
    with small_sizes():
        engine = Engine(generator, **{"slots": 5, "context": 64} | options).start()
        try:
            yield Answers(engine)
        finally:
            engine.close()


@functools.cache
def generator(name, tokenizer=None):
    """Return one of the small models, prepared for generation."""
    (model, options), targets = (TEXTS | MORE | TARGETS | MORE_TARGETS)[name], name in TARGETS | MORE_TARGETS
    return Generator(drawn(model, V, **options), tokenizer, **({"start": 0} if targets else {}))


def prompts(*lengths):
    """Return prompts of these lengths."""
    rng = np.random.default_rng(3)
    return [tuple(rng.integers(0, V, length).tolist()) for length in lengths]
