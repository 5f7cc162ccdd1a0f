"""Texts of the engine are those that `generate` writes for one prompt alone, whatever else is in the batch.

`pytest -m slow tests/serving -n 0` runs more kinds of models.
"""

import pytest
from engines import generator, prompts, started
from random_models import MORE, MORE_TARGETS, TARGETS, TEXTS

SHORT = ("mixtral", "t5")  # a window, experts and stacked layers; sources


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in (TEXTS | TARGETS | MORE | MORE_TARGETS) if name not in SHORT)]
)
def test_rows_that_come_and_go_equal_generate(name):
    own, given, news = generator(name), prompts(3, 1, 40, 9, 33, 5, 17, 2, 50, 12), [20, 30, 12, 25, 6, 40, 10, 3, 9, 28]
    with started(own) as answers:
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "mixtral"))])
def test_nothing_compiles_after_warm(name):
    with started(generator(name)) as answers:
        answers.engine.warm()
        compiled = answers.engine.programs.compiled()
        tickets = [answers.ask(tokens, max_tokens=20) for tokens in prompts(1, 3, 5, 9, 17, 20, 33)]
        for ticket in tickets:
            answers.tokens(ticket)
        assert answers.engine.programs.compiled() == compiled
