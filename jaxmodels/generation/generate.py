"""Text from a language model or an encoder–decoder: prompts in, texts out, as a whole or in pieces.

    generate(model, tokenizer, ["Once upon", "The"], max_tokens=50, temperature=0.8)

A call compiles two functions: one that reads the prompts, and one that goes on token by token. Prompts and room for new tokens are
filled up to a few sizes (`bucket`), so that later calls use the same two.

Shapes: B rows, P tokens of a prompt, N room for new tokens.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.generation import beam, decoding
from jaxmodels.generation.beam import Beams
from jaxmodels.generation.full_forward import with_cache
from jaxmodels.generation.sampling import Sampling
from jaxmodels.generation.stop_strings import Row
from jaxmodels.models import functional
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.tokenizers.base import Tokenizer, frame

Prompt = str | Sequence[int]

_WITH_STOPS, _WITHOUT = 8, 64  # tokens between two looks of the host
DEFAULT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was made of one prompt.

    Attributes:
      prompt: as it was given.
      text: the new text, without a string or token that ended it; None without a tokenizer.
      tokens: the new tokens, without one that ended the text.
      finish: why it ended: `end` (a token that ends texts), `stop` (one of the strings), or `length`.
      score: of beam search, the sum of log-probabilities over length ** length_penalty; else None.
    """

    prompt: Prompt
    text: str | None
    tokens: list[int]
    finish: str
    score: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `generate` takes beside prompts; of `Sampling` and `Beams` all that these have.

    Attributes:
      max_tokens: new tokens at most; 128, or as many as the model's context leaves, unless given.
      stop: strings that end a text.
      seed: of drawing; the same seed gives the same texts.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Any = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    @property
    def searching(self) -> Beams:
        return Beams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Beams)})

    def check(self, tokenizer: Tokenizer | None) -> None:
        """Raises ConfigError for what means nothing, alone or together."""
        self.sampling.check()
        self.searching.check()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be at least 0 and below 2**32, got {self.seed}.")
        if self.beams > 1 and self.temperature > 0:
            raise ConfigError("beams search for the likeliest text, and temperature draws one: give one of the two.")
        if self.beams > 1 and self.stop:
            raise ConfigError("beams end with the model's own token alone: leave out stop, or beams.")
        for stop in self.stop:
            if not stop:
                raise ConfigError("stop: an empty string would end every text at once.")
            if tokenizer is None:
                raise ConfigError(f"stop={stop!r}: there is no tokenizer, so there are no texts to look for it in.")
            try:
                tokenizer.encode(stop)
            except ValueError as error:
                raise ConfigError(f"stop={stop!r} can never come: {error}.") from error


class Generator:
    """A model that texts are made with: its weights, its tokenizer, and the functions compiled for it."""

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer | None = None,
        *,
        start: int | None = None,
        ends: Sequence[int] | None = None,
        dtype: Any = jnp.float32,
        layout: layout_lib.Layout | None = None,
    ):
        """
        Args:
          model: maps tokens to logits, or is an encoder–decoder; with a cache (`models.cache`) each token is read once.
          tokenizer: without one, prompts are token numbers, and so is what comes.
          start: the token that an encoder–decoder's targets begin with; the tokenizer's own unless given.
          ends: tokens that end a text; the tokenizer's own unless given.
          dtype: of the computation; parameters are cast once.
          layout: how the model is spread over devices; None for one.
        """
        special = getattr(tokenizer, "special", lambda name: None)
        graph, params, stats = functional.split(model)
        self.weights = functional.cast(params, dtype), stats
        self.tokenizer, self.dtype, self.layout = tokenizer, dtype, layout
        self.reads_sources, self.context = hasattr(model, "encode"), getattr(model, "context", None)
        self.cached = hasattr(model, "extend")
        if not self.cached:
            name = type(model).__name__
            warnings.warn(f"{name} keeps no cache (jaxmodels.models.cache), so it reads the whole text anew for each token", stacklevel=2)
        self.start = special("start") if start is None else start
        self.ends = tuple(own_ends(tokenizer) if ends is None else ends)
        self._ends_E = np.array(self.ends or (-2,), np.int32)  # never without one: as with one, nothing is compiled anew
        self._programs = _programs(graph, jnp.dtype(dtype)) if layout is None else Programs(graph, dtype, layout)
        if self.reads_sources and self.start is None:
            raise ConfigError("the tokenizer has no token that a target begins with: give the number of one, as start.")

    def generate(self, prompts: Prompt | Sequence[Prompt], check: Callable[[], None] = lambda: None, **options: Any) -> list[Completion]:
        """A text for each prompt.

        Args:
          prompts: texts, or lists of token numbers; for an encoder–decoder its sources.
          check: called every few tokens; what it raises ends the call.
          options: of `Options`.

        Raises:
          ConfigError: an empty prompt, one that does not fit the model, or options that mean nothing.
        """
        options = _options(options)
        options.check(self.tokenizer)
        prompts = [prompts] if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)) else list(prompts)
        tokens = [self._tokens(prompt, number) for number, prompt in enumerate(prompts, 1)]
        if not tokens:
            raise ConfigError("there is no prompt: give at least one.")
        limit = self._limit(tokens, options)
        if options.beams > 1:
            return self._search(prompts, tokens, limit, options)
        rows = [self._row(t, options) for t in tokens]
        for _ in self._run(rows, tokens, limit, options, _WITH_STOPS if options.stop else _WITHOUT, check):
            pass
        return [Completion(prompt, self._text(row.text), row.tokens, row.finish) for prompt, row in zip(prompts, rows, strict=True)]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The text for one prompt, in pieces as they come: never a part of a character, or of a string that ends the text.

        Raises:
          ConfigError: as `generate`, before the first piece; also for beams, and without a tokenizer.
        """
        options = _options(options)
        options.check(self.tokenizer)
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer, so there is no text to stream.")
        if options.beams > 1:
            raise ConfigError("beams are known when they are complete: leave out streaming, or beams.")
        tokens = [self._tokens(prompt, 1)]
        row = self._row(tokens[0], options)
        pieces = self._run([row], tokens, self._limit(tokens, options), options, 1)
        return (piece for (piece,) in pieces if piece)

    def _run(self, rows: list[Row], tokens: list[np.ndarray], limit: int, options: Options, every: int, check=lambda: None) -> Iterator[list[str]]:
        """Fills rows; gives what each can show, every so many tokens."""
        shape, numbers, ends = options.sampling.shape(), options.sampling.numbers(), self._ends_E
        room, key = self._size(limit), jax.random.key(options.seed)
        inputs = self._inputs(tokens)
        how = {"shape": shape, "numbers": numbers, "ends_E": ends}
        state = self._programs.start(*self.weights, *inputs, room=room, key=key, **how)
        seen = 0
        while True:
            chosen = np.asarray(state["chosen"])
            count = min(int(state["count"]), limit)
            pieces = ["" for _ in rows]
            for i, row in enumerate(rows):
                for token in chosen[i, seen:count].tolist():
                    if row.finish is None:
                        pieces[i] += row.add(token)
                if row.finish is None and count == limit:
                    pieces[i] += row.end("length")
            seen = count
            yield pieces
            if all(row.finish is not None for row in rows):
                return
            check()
            stopped = np.ones(len(chosen), bool)
            stopped[: len(rows)] = [row.finish is not None for row in rows]
            state = self._programs.advance(*self.weights, state, np.int32(min(every, limit - count)), stopped, **how)

    def _search(self, prompts, tokens, limit, options) -> list[Completion]:
        shape, numbers, ends = options.sampling.shape(), options.sampling.numbers(), self._ends_E
        how = {"limit": np.int32(limit), "beams": options.searching, "shape": shape, "numbers": numbers, "ends_E": ends}
        carry = self._programs.start_beams(*self.weights, *self._inputs(tokens), room=self._size(limit), **how)
        texts, scores = jax.device_get(self._programs.search(*self.weights, carry, **how))
        done = []
        for prompt, given, text, score in zip(prompts, tokens, texts, scores, strict=False):
            row = self._row(given, options)
            for token in text[text >= 0].tolist():
                row.add(token)
            if row.finish is None:
                row.end("length")
            done.append(Completion(prompt, self._text(row.text), row.tokens, row.finish, float(score)))
        return done

    def _row(self, tokens: np.ndarray, options: Options) -> Row:
        return Row(self.tokenizer, () if self.reads_sources else tokens.tolist(), self.ends, options.stop)

    def _text(self, text: str) -> str | None:
        return None if self.tokenizer is None else text

    def _tokens(self, prompt: Prompt, number: int) -> np.ndarray:
        """A prompt's tokens, int32 [P]."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                way = "give token numbers, as jaxmodels.load(RUN).generate([[1, 2]]) takes them"
                raise ConfigError(f"prompt {number} is a text, and there is no tokenizer: {way}.")
            try:
                own = self.tokenizer.encode(prompt)
            except ValueError as error:
                raise ConfigError(f"prompt {number}: {error}.") from error
            before, after = frame(self.tokenizer)
            tokens = np.concatenate([before, own, after if self.reads_sources else own[:0]]).astype(np.int32)
        else:
            own = tokens = np.asarray(prompt, np.int32)
            if tokens.ndim != 1 or (tokens < 0).any() or (tokens >= self.vocab_size).any():
                raise ConfigError(f"prompt {number} is no list of tokens, which are whole numbers from 0 to {self.vocab_size - 1}.")
        if not len(own):
            raise ConfigError(f"prompt {number} is empty: give at least one token of text.")
        return tokens

    @functools.cached_property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._programs.vocab_size(*self.weights, self.reads_sources)

    def _limit(self, tokens: list[np.ndarray], options: Options) -> int:
        """New tokens at most, which all prompts leave room for."""
        wanted = options.max_tokens or DEFAULT_TOKENS
        if self.context is None:
            return wanted
        number, longest = max(enumerate(map(len, tokens), 1), key=lambda pair: pair[1])
        if self.reads_sources:
            if longest > self.context:
                raise ConfigError(f"prompt {number} has {longest} tokens, and the model reads {self.context} at most: shorten it.")
            left, why = self.context, f"the model's context of {self.context}"
        else:
            left = self.context - longest
            if left < 1:
                raise ConfigError(
                    f"prompt {number} has {longest} tokens, and the model's context holds {self.context} with what follows: "
                    f"shorten it to {self.context - 1} or less."
                )
            why = f"prompt {number} of {longest} tokens leaves of the model's context of {self.context}"
        if options.max_tokens is not None and options.max_tokens > left:
            raise ConfigError(f"max_tokens={options.max_tokens} is more than {why}: max_tokens={left} fits.")
        return min(wanted, left)

    def _size(self, tokens: int) -> int:
        """Room for so many tokens: of a size that few are of; but exact for a model that is to read all of it anew each time."""
        return min(bucket(tokens), self.context or bucket(tokens)) if self.cached else tokens

    def _inputs(self, tokens: list[np.ndarray]) -> tuple[Any, ...]:
        """What the programs begin with: prompts [B, P]; or sources [B, S], and the targets' first tokens [B]."""
        ways = 1 if self.layout is None else mesh_lib.batch_ways(self.layout.mesh)
        rows = -(-len(tokens) // ways) * ways
        longest = max(map(len, tokens))
        array = np.full((rows, self._size(longest)), -1, np.int32)
        for i, row in enumerate(tokens):
            array[i, slice(0, len(row)) if self.reads_sources else slice(array.shape[1] - len(row), None)] = row
        if not self.reads_sources:
            return (array,)
        return array, np.where(np.arange(rows) < len(tokens), self.start, -1).astype(np.int32)


def own_ends(tokenizer: Tokenizer | None) -> list[int]:
    """The tokens that end a text: that of the tokenizer, and those that a published model's config.json names, which may be several."""
    if tokenizer is None:
        return []
    named = getattr(tokenizer, "config", {}).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    return [token for token in dict.fromkeys([tokenizer.special("end"), *named]) if token is not None]


def generate(model: nnx.Module, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
    """Texts that a model makes of prompts.

    Args:
      model: maps tokens to logits, or is an encoder–decoder.
      tokenizer: None where prompts are token numbers.
      prompts: texts, or lists of token numbers.
      options: of `Options`; `start`, `ends` and `dtype` of `Generator`.

    Raises:
      ConfigError: as `Generator.generate`.
    """
    own = {name: options.pop(name) for name in ("start", "ends", "dtype") if name in options}
    return Generator(model, tokenizer, **own).generate(prompts, **options)


def bucket(size: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, …: a power of two or one and a half."""
    return next(n for power in range(4, 64) for n in (1 << power, 3 << power >> 1) if n >= size and n % 16 == 0)


def _options(options: Mapping[str, Any]) -> Options:
    names = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise ConfigError(f"generate takes no {name!r}; it takes {', '.join(names)}.")
    stop = options.get("stop") or ()
    return Options(**{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


class Programs:
    """The compiled functions of one model: each is compiled once for sizes and a kind of sampling."""

    def __init__(self, graph: Any, dtype: Any, layout: layout_lib.Layout | None = None):
        """graph: as `training.step.split` gives."""
        self.graph, self.dtype, self.layout = graph, dtype, layout
        self.start = jax.jit(self._start, static_argnames=("room", "shape"))
        self.advance = jax.jit(self._advance, static_argnames="shape", donate_argnames="state")
        self.start_beams = jax.jit(self._start_beams, static_argnames=("room", "beams", "shape"))
        self.search = jax.jit(self._search, static_argnames=("beams", "shape"))

    def _run(self, params, stats, function: Callable) -> Any:
        """The function's result, given the model."""
        with layout_lib.use(self.layout):
            return function(functional.evaluation_model(self.graph, params, stats, self.dtype))

    def _start(self, params, stats, *inputs, room, key, shape, numbers, ends_E):
        def start(model):
            if len(inputs) == 2:
                return decoding.begin(model, *inputs, room, key, shape)
            state, logits = decoding.prefill(model, *inputs, room, key, shape, self.dtype)
            return decoding.take(state, logits, shape, numbers, ends_E)

        return self._run(params, stats, start)

    def _advance(self, params, stats, state, steps, stopped_B, *, shape, numbers, ends_E):
        return self._run(params, stats, lambda model: decoding.advance(model, state, steps, stopped_B, shape, numbers, ends_E))

    def _start_beams(self, params, stats, *inputs, room, limit, beams, shape, numbers, ends_E):
        def start(model):
            key = jax.random.key(0)
            if len(inputs) == 2:
                state, logits = decoding.begin(model, *inputs, room, key, shape), None
            else:
                state, logits = decoding.prefill(model, *inputs, room, key, shape, self.dtype)
            return beam.start(state, logits, limit, beams, shape, numbers, ends_E)

        return self._run(params, stats, start)

    def _search(self, params, stats, carry, *, limit, beams, shape, numbers, ends_E):
        return self._run(params, stats, lambda model: beam.search(model, carry, limit, beams, shape, numbers, ends_E))

    def vocab_size(self, params, stats, reads_sources: bool) -> int:
        """V, of the model's logits."""

        def logits(model):
            model, token = with_cache(model), jnp.zeros(1, jnp.int32)
            return model.extend(token, model.make_cache(token[:, None], 1) if reads_sources else model.make_cache(1, 1, self.dtype))[0]

        return jax.eval_shape(lambda params, stats: self._run(params, stats, logits), params, stats).shape[-1]


@functools.lru_cache(maxsize=8)
def _programs(graph: Any, dtype: Any) -> Programs:
    """The programs of a model on one device, which calls on the same model share."""
    return Programs(graph, dtype)
