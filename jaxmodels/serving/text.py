"""One request in the engine: its text as it grows, and what its caller is told."""

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmodels.generation import rows as rows_lib
from jaxmodels.generation.generate import Generator
from jaxmodels.generation.stop_strings import GeneratedText
from jaxmodels.serving.requests import Event, Finished, Request, Score, Scored, Token


class Text:
    """A request in the engine, and how far it is; the ticket of `Engine.submit`.

    Attributes:
      request: as it came.
      limit: new tokens at most.
      adapter: number of its adapter, 0 for none.
      scored: whether its prompt is scored.
      read, cached: tokens of the prompt that were read, and those of them that were there before.
      held: tokens in its row.
      started, generated: new tokens whose step has begun, and those that have come from the device.
      cancelled, ended: whether its caller has given up, and whether it was told of the end.
    """

    def __init__(self, request: Request, deliver: Callable[[Event], None], limit: int, adapter: int, generator: Generator, wake: Callable[[], None]):
        """wake: makes the engine look at what has changed."""
        self.request, self.limit, self.adapter, self._deliver, self._wake = request, limit, adapter, deliver, wake
        self.scored = request.echo and request.logprobs is not None
        self._text = GeneratedText(generator.tokenizer, () if generator.reads_sources else request.tokens, generator.ends, request.stop)
        self.read = self.cached = self.held = self.started = self.generated = 0
        self.cancelled = self.ended = False
        self.since = time.monotonic()

    def cancel(self) -> None:
        """As `requests.Ticket`."""
        self.cancelled = True
        self._wake()

    def settings(self, prompt: int) -> dict[str, float]:
        """Return the settings of its row, of `generation.rows.settings`, after a prompt of so many tokens."""
        given = vars(self.request.sampling)
        seed = secrets.randbits(32) if given["seed"] is None else given["seed"] % 2**32
        asked = -1 if self.request.logprobs is None else self.request.logprobs
        return given | {"seed": seed, "prompt": prompt, "alternatives": asked, "adapter": self.adapter}

    def score_prompt(self, parts: Sequence[dict[str, np.ndarray]]) -> None:
        """Deliver the scores of the prompt, of `generation.rows.score` for its parts. The first token has none."""
        tokens = self.request.tokens
        scores = [Score(tokens[0], None)]
        for part in parts:
            scores += [_score(token, part, i, self.request.logprobs) for i, token in zip(range(len(part["chosen"])), tokens[len(scores) :], strict=False)]
        self._tell(Scored(tuple(scores)))

    def add(self, token: int, scores: dict[str, np.ndarray], row: int) -> None:
        """Add a new token, and deliver what it brings; `scores` are those of all rows."""
        self.generated += 1
        if token == rows_lib.NOT_FINITE:
            self.end("error", error="the model's output is not a number: its weights, or the precision, are at fault")
            return
        rest = ""
        try:
            piece = self._text.add(token)
            if self._text.finish is None and self.generated == self.limit:
                rest = self._text.end("length")
        except Exception as error:  # of the tokenizer
            self.end("error", error=f"token {token} cannot be decoded: {error}")
            return
        score = None if self.request.logprobs is None else _score(token, scores, row, self.request.logprobs)
        if self._text.finish == "end":
            if score is not None:  # who asks for scores counts on one for each new token
                self._tell(Token(token, "", score))
            self.end("end", piece)
            return
        self._tell(Token(token, piece, score))
        if self._text.finish is not None:
            self.end(self._text.finish, rest)

    def end(self, reason: str, text: str = "", error: str | None = None) -> None:
        """Deliver the end, once."""
        if not self.ended:
            self.ended = True
            self._tell(Finished(reason, text, len(self.request.tokens), self.generated, self.cached, error))

    def _tell(self, event: Event) -> None:
        """Deliver an event. A callback that raises ends its own request alone."""
        try:
            self._deliver(event)
        except Exception as error:  # the caller's code
            self.cancelled = True
            print(f"jaxmodels: a request is dropped, because its callback failed: {type(error).__name__}: {error}", file=sys.stderr)


def _score(token: int, scores: dict[str, Any], row: int, asked: int) -> Score:
    tops = zip(scores["tokens"][row, :asked].tolist(), scores["tops"][row, :asked].tolist(), strict=True)
    return Score(token, float(scores["chosen"][row]), tuple(tops))
