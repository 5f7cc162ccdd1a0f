"""Answers in the two forms of OpenAI's API: completions and chat completions, whole and in chunks."""

import dataclasses
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxmodels.serving.requests import Finished, Score
from jaxmodels.serving.token_texts import TokenTexts

_LEAST = -9999.0  # in place of -inf, which JSON lacks
REASONS = {"end": "stop", "stop": "stop", "length": "length"}

Json = dict[str, Any]


@dataclasses.dataclass
class Part:
    """Some of an answer: a new piece of its text, and the scores of its tokens with the text that each added."""

    text: str
    scores: list[tuple[Score, str]] = dataclasses.field(default_factory=list)


class Format:
    """Base class of both forms.

    Attributes:
      whole_object, chunk_object: their names.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, step: int, texts: TokenTexts, *, scored: bool):
        """`scored`: whether the request asks for log-probabilities."""
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model, "system_fingerprint": f"step-{step}"}
        self.texts, self.scored = texts, scored
        self._offsets: dict[int, int] = {}  # characters of each answer so far

    def whole(self, choices: list[Json], usage: Json) -> Json:
        """Return the body of a whole answer."""
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Json], with_usage: bool, usage: Json | None = None) -> Json:
        """Return a chunk. `with_usage`: chunks have a key `usage`, which is null in all but the last."""
        return {**self._head, "object": self.chunk_object, "choices": choices} | ({"usage": usage} if with_usage else {})

    def choice(self, index: int, part: Part, finished: Finished) -> Json:
        """Return an entry of `choices` of a whole answer."""
        raise NotImplementedError

    def first(self, index: int) -> Json | None:
        """Return the entry of `choices` that begins an answer, if there is one."""
        return None

    def delta(self, index: int, part: Part) -> Json:
        """Return an entry with some text."""
        raise NotImplementedError

    def last(self, index: int, finished: Finished) -> Json:
        """Return the entry that ends an answer."""
        raise NotImplementedError


class CompletionFormat(Format):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index, part, finished):
        return self._entry(index, part, REASONS[finished.reason])

    def delta(self, index, part):
        return self._entry(index, part, None)

    def last(self, index, finished):
        return self._entry(index, Part(""), REASONS[finished.reason])

    def _entry(self, index: int, part: Part, reason: str | None) -> Json:
        return {"index": index, "text": part.text, "logprobs": self._logprobs(index, part.scores) if self.scored else None, "finish_reason": reason}

    def _logprobs(self, index: int, scores: Sequence[tuple[Score, str]]) -> Json:
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(index, 0)
        for score, added in scores:
            token = self.texts.of(score.token)
            found["tokens"].append(token)
            found["token_logprobs"].append(_number(score.logprob))
            found["text_offset"].append(offset)
            found["top_logprobs"].append(None if score.logprob is None else self._top(score))
            offset += len(added)
        self._offsets[index] = offset
        return found

    def _top(self, score: Score) -> dict[str, float]:
        """Return text -> log-probability; of tokens with one text, the most likely one counts."""
        top: dict[str, float] = {}
        others = [pair for pair in score.top if pair[0] != score.token]  # its own number is that of `token_logprobs`, to the last bit
        for other, logprob in (*others, (score.token, score.logprob)):
            text = self.texts.of(other)
            top[text] = max(top.get(text, -math.inf), _number(logprob))
        return top


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index, part, finished):
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(part.scores), "finish_reason": REASONS[finished.reason]}

    def first(self, index):
        return {"index": index, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None, "finish_reason": None}

    def delta(self, index, part):
        return {"index": index, "delta": {"content": part.text}, "logprobs": self._logprobs(part.scores), "finish_reason": None}

    def last(self, index, finished):
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": REASONS[finished.reason]}

    def _logprobs(self, scores: Sequence[tuple[Score, str]]) -> Json | None:
        if not self.scored:
            return None
        entries = [self._entry(s.token, s.logprob) | {"top_logprobs": [self._entry(*other) for other in s.top]} for s, _ in scores]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        text = self.texts.of(token)
        return {"token": text, "logprob": _number(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def usage(prompt_tokens: int, finished: Sequence[Finished]) -> Json:
    """Return the counts of tokens of an answer; those of the prompt count once, however many answers it has."""
    new = sum(each.completion_tokens for each in finished)
    cached = {"cached_tokens": sum(each.cached_tokens for each in finished)}
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new, "prompt_tokens_details": cached}


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, float(logprob))
