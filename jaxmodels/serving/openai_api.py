"""OpenAI's API: completions, chat completions and embeddings, as functions of a body. What is answered in chunks is an iterator of them."""

import asyncio
import base64
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from jaxmodels.data.features.base import Problem
from jaxmodels.inference.embed import POOLS
from jaxmodels.serving import schemas
from jaxmodels.serving.answers import Answers
from jaxmodels.serving.batcher import Batcher
from jaxmodels.serving.errors import ApiError, bad
from jaxmodels.serving.formats import ChatFormat, CompletionFormat, Format, Json, Part, usage
from jaxmodels.serving.requests import Finished, Request, RowSampling, Scored, Token
from jaxmodels.serving.served import Served
from jaxmodels.serving.service import Call, Service
from jaxmodels.serving.timing import Timing
from jaxmodels.tokenizers.base import frame

_DEFAULT_TOKENS = 16  # of completions, as OpenAI's API has it

Reply = Json | AsyncGenerator[Json, None]


@dataclasses.dataclass
class _Job:
    """Requests to an engine, and the form of their answers.

    Attributes:
      prompts: tokens of each prompt; `n` requests in turn belong to each.
      texts: of prompts that are texts; None for lists of tokens.
      echoed: whether answers begin with their prompts.
    """

    served: Served
    form: Format
    prompts: Sequence[tuple[int, ...]]
    texts: Sequence[str | None]
    requests: list[Request]
    n: int
    echoed: bool
    stream: bool
    with_usage: bool

    def echo(self, index: int) -> str:
        """Return the prompt of an answer as a text."""
        text = self.texts[index // self.n]
        return self.served.texts.text(self.prompts[index // self.n]) if text is None else text

    def pieces(self, index: int) -> list[str]:
        """Return what each token of the prompt of an answer adds to its text: nothing, for special tokens that a text was given."""
        number = index // self.n
        first = 0 if self.texts[number] is None else len(frame(self.served.run.tokenizer)[0])
        return [""] * first + self.served.texts.pieces(self.prompts[number][first:])


async def completions(service: Service, call: Call, content: bytes) -> Reply:
    """Answer a body of /v1/completions."""
    body = await service.read(schemas.Completion, content)
    served = _generating(service, call, body.model)
    if body.best_of not in (None, body.n or 1):
        raise bad("best_of is not supported here; leave it out, or set n.", "best_of", "unsupported")
    if body.echo and served.task == "seq2seq":
        raise bad(f"echo: the answer of the model {served.name!r} is no continuation of the prompt.", "echo", "unsupported")
    prompts = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
    default = served.target_length if served.task == "seq2seq" else _DEFAULT_TOKENS
    new = default if body.max_tokens is None else body.max_tokens
    if new == 0 and not body.echo:
        raise bad("max_tokens=0 asks for nothing; with echo the prompt is scored.", "max_tokens")
    _check_count(service, len(prompts) * (body.n or 1), "prompt")
    tokens = await service.apart(lambda: [served.prompt(prompt) for prompt in prompts])
    logprobs = 0 if new == 0 and body.logprobs is None else body.logprobs  # an engine that makes no token scores
    form = CompletionFormat(served.name, served.run.step, served.texts, scored=body.logprobs is not None)
    echo = bool(body.echo)
    job = _job(service, served, form, body, tokens, new, logprobs, explicit=body.max_tokens is not None, echo=echo)
    job.texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    return await _answer(service, call, job)


async def chat_completions(service: Service, call: Call, content: bytes) -> Reply:
    """Answer a body of /v1/chat/completions."""
    body = await service.read(schemas.Chat, content)
    served = _generating(service, call, body.model)
    if served.task == "seq2seq":
        raise bad(f"the model {served.name!r} answers no conversations: use /v1/completions.", "model", "unsupported")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise bad("max_tokens and max_completion_tokens are two names of one limit; give one.", "max_tokens")
    new = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if new == 0:
        raise bad("max_tokens must be at least 1.", "max_tokens")
    _check_count(service, body.n or 1, "n")
    messages = [{"role": "system" if message.role == "developer" else message.role, "content": message.text} for message in body.messages]
    tokens = await service.apart(served.conversation, messages)
    form = ChatFormat(served.name, served.run.step, served.texts, scored=bool(body.logprobs))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await _answer(service, call, _job(service, served, form, body, [tokens], new, logprobs, explicit=new is not None, param="conversation"))


def _generating(service: Service, call: Call, name: str | None) -> Served:
    served = service.find(call, name)
    if served.engine is None:
        ways = ", ".join(served.describe()["endpoints"])
        raise bad(f"the model {served.name!r} ({served.task}) generates no text: use {ways}.", "model", "unsupported")
    return served


def _check_count(service: Service, count: int, param: str) -> None:
    if count > service.limits.inputs:
        raise bad(f"{count} answers or inputs in one call, and the limit is {service.limits.inputs}.", param, "too_many")


def _job(
    service: Service,
    served: Served,
    form: Format,
    body: schemas.Generation,
    prompts: Sequence[tuple[int, ...]],
    new: int | None,
    logprobs: int | None,
    *,
    explicit: bool,
    echo: bool = False,
    param: str = "prompt",
) -> _Job:
    """Return the requests of a body; check their lengths. `explicit`: whether the body names the number of new tokens."""
    limit = service.limits.max_tokens
    if limit is not None and explicit and new > limit:
        raise bad(f"max_tokens={new} is more than the limit of this service, {limit}.", "max_tokens", "too_many")
    new = min((number for number in (limit, new) if number is not None), default=None)
    for tokens in prompts:
        served.check_length(tokens, new if explicit else None, param)
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream: true.", "stream_options")
    n, given = body.n or 1, {}
    for key in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if (value := getattr(body, key)) is not None:
            given[key] = float(value)
    given["top_k"] = max(0, body.top_k or 0)
    requests = []
    for tokens in prompts:
        room = None if served.context is None else served.context - (0 if served.task == "seq2seq" else len(tokens))
        most = new if room is None or new is None else min(new, room)
        for number in range(n):
            seed = None if body.seed is None else (body.seed + number) % (1 << 32)
            sampling = RowSampling(**given, seed=seed)
            scores = {"logprobs": logprobs, "echo": echo and logprobs is not None}
            requests.append(Request(tokens=tokens, max_tokens=most, sampling=sampling, stop=tuple(body.stop), adapter=served.adapter, **scores))
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return _Job(served, form, prompts, [None] * len(prompts), requests, n, echo, bool(body.stream), with_usage)


async def _answer(service: Service, call: Call, job: _Job) -> Reply:
    """Queue the requests of a job, and return the answer, or its chunks."""
    assert job.served.engine is not None
    if service.log_prompts:
        call.log["prompts"] = [job.echo(index) for index in range(0, len(job.requests), job.n)]
    check_room(len(job.requests), job.served.engine.stats().queue_limit)
    answers = Answers(job.served.engine, job.requests, service.limits.seconds)
    call.ends.append(answers.cancel)
    parts = _parts(service, call, job, answers)
    if job.stream:
        return _chunks(job, parts)
    texts = [Part("") for _ in job.requests]
    ends: dict[int, Finished] = {}
    async with contextlib.aclosing(parts):
        async for index, part, finished in parts:
            texts[index].text += part.text
            texts[index].scores += part.scores
            if finished is not None:
                ends[index] = finished
    choices = [job.form.choice(index, text, ends[index]) for index, text in enumerate(texts)]
    return job.form.whole(choices, usage(sum(map(len, job.prompts)), list(ends.values())))


async def _parts(service: Service, call: Call, job: _Job, answers: Answers) -> AsyncGenerator[tuple[int, Part, Finished | None], None]:
    """Yield the index of an answer, the next part of it, and its end once it is there; count and time them."""
    said: list[str] = [""] * len(job.requests)
    timing = Timing(service.metrics, call, job.served.name, sum(map(len, job.prompts)))
    try:
        for index, request in enumerate(job.requests if job.echoed else ()):
            if not request.echo:
                yield index, Part(job.echo(index)), None
        async for index, event in answers:
            scored = job.form.scored
            if isinstance(event, Scored):
                added = await service.apart(job.pieces, index)
                part = Part(job.echo(index), list(zip(event.scores, added, strict=True)) if scored else [])
            elif isinstance(event, Token):
                timing.token(index)
                part = Part(event.text, [(event.score, event.text)] if scored and event.score is not None else [])
            else:
                timing.end(index, event)
                part = Part(event.text)
            if service.log_prompts:
                said[index] += part.text
            yield index, part, event if isinstance(event, Finished) else None
    finally:
        answers.cancel()
        timing.record()
        if service.log_prompts:
            call.log["answers"] = said


async def _chunks(job: _Job, parts: AsyncGenerator[tuple[int, Part, Finished | None], None]) -> AsyncGenerator[Json, None]:
    """Yield the chunks of a streamed answer."""
    form, ends = job.form, []
    async with contextlib.aclosing(parts):
        for index in range(len(job.requests)):
            if (first := form.first(index)) is not None:
                yield form.chunk([first], job.with_usage)
        async for index, part, finished in parts:
            if part.text or part.scores:
                yield form.chunk([form.delta(index, part)], job.with_usage)
            if finished is not None:
                ends.append(finished)
                yield form.chunk([form.last(index, finished)], job.with_usage)
    if job.with_usage:
        yield form.chunk([], True, usage(sum(map(len, job.prompts)), ends))


async def embeddings(service: Service, call: Call, content: bytes) -> Json:
    """Answer a body of /v1/embeddings."""
    body = await service.read(schemas.Embedding, content)
    served = service.find(call, body.model)
    if served.embedder is None or served.embedding is None:
        ways = ", ".join(served.describe()["endpoints"])
        raise bad(f"the model {served.name!r} ({served.task}) gives no embeddings: use {ways}.", "model", "unsupported")
    if body.dimensions not in (None, served.embedder.width):
        raise bad(f"dimensions={body.dimensions}: embeddings of {served.name!r} have {served.embedder.width}.", "dimensions", "unsupported")
    texts = body.input if isinstance(body.input, list) and not isinstance(body.input[0], int) else [body.input]
    _check_count(service, len(texts), "input")
    examples = await service.apart(lambda: encode_all(served.embedder.encode, texts, "input"))
    rows = await computed(served.embedding, examples, service.limits.seconds)
    pool, data = POOLS.index(body.pooling or "mean"), []
    for index, row in enumerate(rows):
        vector = np.asarray(row[pool], "<f4")
        value = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(int((example["tokens"] >= 0).sum()) for example in examples)
    call.log["prompt_tokens"] = tokens
    service.metrics.prompt_tokens.labels(served.name).inc(tokens)
    return {"object": "list", "data": data, "model": served.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def check_room(count: int, limit: int) -> None:
    """Raise ApiError for what would never find a place in the queue."""
    if count > limit:
        raise bad(f"{count} answers or inputs in one call, and {limit} may wait (--queue): ask for fewer at once.", code="too_many")


def encode_all(encode: Any, items: Sequence[Any], param: str) -> list[dict[str, np.ndarray]]:
    """Return the example of each input; ApiError names the first that is wrong."""
    examples = []
    for number, item in enumerate(items):
        try:
            examples.append(encode(item))
        except Problem as problem:
            raise bad(f"{param}.{number}: {problem}" if len(items) > 1 else f"{param}: {problem}", param) from problem
    return examples


async def computed(batcher: Batcher, examples: Sequence[Any], seconds: float) -> list[Any]:
    """Return the outputs of examples; those that wait are given up when the caller is.

    Raises:
      Busy, TimeoutError: there is no room, or the time is over.
    """
    check_room(len(examples), batcher.stats().queue_limit)
    futures = batcher.submit(examples)
    try:
        async with asyncio.timeout(seconds):
            return [await asyncio.wrap_future(future) for future in futures]
    except asyncio.CancelledError:
        if any(future.cancelled() for future in futures) and not asyncio.current_task().cancelling():  # the batcher has given up
            raise ApiError(503, "the service is shutting down, and the answer was not computed in time.", code="unavailable") from None
        raise
    finally:
        for future in futures:
            future.cancel()
