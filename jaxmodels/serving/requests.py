"""What an engine and its callers exchange: requests, the events of their answers, and refusals.

An engine is any object with

    submit(request, deliver) -> Ticket    queue a request; `deliver(event)` is called from the engine's thread, and must not block
    stats() -> Stats                      what the engine holds now
    drain(seconds) -> int                 refuse new requests, wait for the others, cancel those left; return their number
    close()                               end the engine's thread

The events of one request are Scored (with `echo` and `logprobs`), then Token for each new token, then one Finished, which is the last.
"""

import dataclasses
from typing import Literal, Protocol

from jaxmodels.errors import RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampling:
    """Settings of one row of a batch. All are numbers of a compiled function, so no value makes it compile again. The defaults change nothing.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding, which the filters do not change.
      top_k: sample from the k most likely tokens; 0 is all.
      top_p, min_p: as in `generation.sampling.Sampling`.
      repetition_penalty: as there.
      frequency_penalty: subtracted from a token's logit for each time that the answer has it.
      presence_penalty: subtracted once if the answer has it.
      seed: equal seeds give equal texts, whatever else is in the batch. None: the engine draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate.

    Attributes:
      tokens: ids of the prompt, at least one; of the source, for an encoder–decoder.
      max_tokens: maximum number of new tokens; None is what the context leaves. 0 only scores the prompt (with `echo`).
      sampling: of its row.
      stop: stop strings.
      logprobs: number of alternatives to score for each token, 0 for the token alone; None for no scores.
      echo: score the tokens of the prompt too.
      adapter: name of the adapter, of those that the engine has; None for the plain model.
    """

    tokens: tuple[int, ...]
    max_tokens: int | None = None
    sampling: RowSampling = RowSampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-probability of a token, and the most likely tokens in its place, from the model's own logits (temperature 1, no penalties)."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of the tokens of the prompt."""

    scores: tuple[Score, ...]


@dataclasses.dataclass(frozen=True)
class Token:
    """A new token. `text` is what is certain since the last one: it may be empty, while a character or a possible stop string is incomplete.

    An end token is delivered only with a score, and has no text.
    """

    token: int
    text: str
    score: Score | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
      reason: `end` (an end token), `stop` (a stop string), `length`, `cancelled`, or `error`.
      text: the rest of the text.
      prompt_tokens, completion_tokens: counts; the end token counts as one.
      cached_tokens: tokens of the prompt whose keys and values were there already.
      error: message, for the reason `error`.
    """

    reason: Literal["end", "stop", "length", "cancelled", "error"]
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    error: str | None = None


Event = Scored | Token | Finished


class Busy(RunError):
    """The queue is full, or the engine takes no more requests.

    Attributes:
      retry_after: seconds after which a place is likely.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Ticket(Protocol):
    """A request in the engine."""

    def cancel(self) -> None:
        """Give up: the row is free after the current step, and Finished("cancelled") is delivered unless the answer has ended."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine holds.

    Attributes:
      slots, running: rows of its batch, and those in use.
      queued, queue_limit: requests that wait, and the most that may.
      cache_tokens, cache_used: tokens that the cache has room for in all rows, and those it holds.
      generated, prompts, prefix_hits: counts since the start: new tokens, tokens of prompts that were read, and those taken from shared prefixes.
      steps: decode steps since the start; `generated / (steps * slots)` is the mean occupancy.
    """

    slots: int
    running: int
    queued: int
    queue_limit: int
    cache_tokens: int
    cache_used: int
    generated: int
    prompts: int
    prefix_hits: int
    steps: int
