"""Generate text with a language model or an encoder–decoder, as a whole or as a stream.

    generate(model, tokenizer, ["Once upon", "The"], max_tokens=50, temperature=0.8)

A call compiles two functions: one reads the prompts, the other generates token by token. The lengths of prompts and caches are rounded up
to a few sizes (`bucket`), so that later calls reuse both.

Shapes: B rows, P tokens of a prompt, N new tokens at most.
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
from jaxmodels.generation.known import with_known_tokens
from jaxmodels.generation.sampling import Sampling
from jaxmodels.generation.stop_strings import GeneratedText
from jaxmodels.models import functional, int8
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.tokenizers.base import Tokenizer, frame, known_tokens

Prompt = str | Sequence[int]

_WITH_STOPS, _WITHOUT = 8, 64  # tokens generated between transfers to the host
DEFAULT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Completion:
    """The text generated for one prompt.

    Attributes:
      prompt: as given.
      text: the new text, without the stop string or end token; None without a tokenizer.
      tokens: the new tokens, without the end token.
      finish: reason of the end: `end` (an end token), `stop` (a stop string), or `length`.
      score: with beam search, the sum of log-probabilities divided by length ** length_penalty; else None.
    """

    prompt: Prompt
    text: str | None
    tokens: list[int]
    finish: str
    score: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `generate`, including all of `Sampling` and `Beams`.

    Attributes:
      max_tokens: maximum number of new tokens; None means 128, or fewer if the model's context ends before.
      stop: stop strings; a text ends before the first of them.
      seed: random seed of sampling; equal seeds give equal texts.
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
        """The options of sampling."""
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})

    @property
    def searching(self) -> Beams:
        """The options of beam search."""
        return Beams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Beams)})

    def check(self, tokenizer: Tokenizer | None) -> None:
        """Raise ConfigError for an invalid value or combination."""
        self.sampling.check()
        self.searching.check()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be at least 0 and below 2**32, got {self.seed}.")
        if self.beams > 1 and self.temperature > 0:
            raise ConfigError(f"beams={self.beams} and temperature={self.temperature}: beam search does not sample; set beams=1 or temperature=0.")
        if self.beams > 1 and self.stop:
            raise ConfigError(f"beams={self.beams} and stop={self.stop!r}: beam search does not support stop strings; leave one out.")
        for stop in self.stop:
            if not stop:
                raise ConfigError("stop: an empty string would end every text immediately; leave it out.")
            if tokenizer is None:
                raise ConfigError(f"stop={stop!r} needs a tokenizer, and the model has none.")
            try:
                tokenizer.encode(stop)
            except ValueError as error:
                raise ConfigError(f"stop={stop!r} cannot be generated: {error}.") from error


class Generator:
    """A model prepared for generation: its weights, its tokenizer, and its compiled functions."""

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer | None = None,
        *,
        start: int | None = None,
        ends: Sequence[int] | None = None,
        dtype: Any = jnp.float32,
        in_8_bits: bool = False,
        layout: layout_lib.Layout | None = None,
    ):
        """
        Args:
          model: maps tokens to logits, or is an encoder–decoder. Without a cache (`models.cache`) it recomputes all tokens at each step.
          tokenizer: None if prompts are token ids; completions are then token ids too.
          start: id of the first target token of an encoder–decoder; the tokenizer's by default.
          ends: ids of end tokens; the tokenizer's by default.
          dtype: of the computation; parameters are cast once.
          in_8_bits: store matrices in 8 bits (`models.int8`).
          layout: sharding of the model; None for one device.

        Raises:
          ConfigError: an encoder–decoder without a start token.
        """
        special = getattr(tokenizer, "special", lambda name: None)
        graph, params, stats = functional.split(model)
        self.weights = int8.quantized(params, dtype) if in_8_bits else functional.cast(params, dtype), stats
        self.graph, self.tokenizer, self.dtype, self.layout = graph, tokenizer, dtype, layout
        self.reads_sources, self.context = hasattr(model, "encode"), getattr(model, "context", None)
        self.cached = hasattr(model, "extend")
        if not self.cached:
            name = type(model).__name__
            warnings.warn(f"{name} has no cache (jaxmodels.models.cache): it recomputes the whole text for each token", stacklevel=2)
        self.start = special("start") if start is None else start
        self.ends = tuple(own_ends(tokenizer) if ends is None else ends)
        self._eos_ids = np.array(self.ends or (-2,), np.int32)  # never empty, so that the shape, and so the compiled function, is the same
        self.known = known_tokens(tokenizer)
        self._programs = _programs(graph, jnp.dtype(dtype), self.known) if layout is None else Programs(graph, dtype, layout, self.known)
        if self.reads_sources and self.start is None:
            raise ConfigError("the tokenizer has no start token for targets: give its id as start.")

    def generate(self, prompts: Prompt | Sequence[Prompt], check: Callable[[], None] = lambda: None, **options: Any) -> list[Completion]:
        """Generate one completion for each prompt.

        Args:
          prompts: texts, or lists of token ids; the sources of an encoder–decoder.
          check: called every few tokens; an exception of it ends the call.
          options: fields of `Options`.

        Raises:
          ConfigError: an empty or too long prompt, or invalid options.
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
        """Generate for one prompt and yield the text in pieces. A piece never ends within a character or a possible stop string.

        Raises:
          ConfigError: as `generate`, before the first piece; also for beam search, and without a tokenizer.
        """
        options = _options(options)
        options.check(self.tokenizer)
        if self.tokenizer is None:
            raise ConfigError("streaming needs a tokenizer, and the model has none: call generate.")
        if options.beams > 1:
            raise ConfigError(f"beams={options.beams}: beam search cannot stream; set beams=1, or call generate.")
        tokens = [self._tokens(prompt, 1)]
        row = self._row(tokens[0], options)
        pieces = self._run([row], tokens, self._limit(tokens, options), options, 1)
        return (piece for (piece,) in pieces if piece)

    def _run(self, rows: list[GeneratedText], tokens: list[np.ndarray], limit: int, options: Options, every: int, check=lambda: None) -> Iterator[list[str]]:
        """Generate into `rows`; yield each row's new text every `every` tokens."""
        shape, numbers, ends = options.sampling.shape(), options.sampling.numbers(), self._eos_ids
        max_new_tokens, key = self._size(limit), jax.random.key(options.seed)
        inputs = self._inputs(tokens)
        how = {"shape": shape, "numbers": numbers, "eos_ids": ends}
        state = self._programs.start(*self.weights, *inputs, max_new_tokens=max_new_tokens, key=key, **how)
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
        shape, numbers, ends = options.sampling.shape(), options.sampling.numbers(), self._eos_ids
        how = {"limit": np.int32(limit), "beams": options.searching, "shape": shape, "numbers": numbers, "eos_ids": ends}
        carry = self._programs.start_beams(*self.weights, *self._inputs(tokens), max_new_tokens=self._size(limit), **how)
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

    def _row(self, tokens: np.ndarray, options: Options) -> GeneratedText:
        return GeneratedText(self.tokenizer, () if self.reads_sources else tokens.tolist(), self.ends, options.stop)

    def _text(self, text: str) -> str | None:
        return None if self.tokenizer is None else text

    def _tokens(self, prompt: Prompt, number: int) -> np.ndarray:
        """Return a prompt's token ids, int32 [P]."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                way = "give token ids, jaxmodels.load(RUN).generate([[1, 2]])"
                raise ConfigError(f"prompt {number} is a text, and the model has no tokenizer: {way}.")
            try:
                own = self.tokenizer.encode(prompt)
            except ValueError as error:
                raise ConfigError(f"prompt {number}: {error}.") from error
            before, after = frame(self.tokenizer)
            tokens = np.concatenate([before, own, after if self.reads_sources else own[:0]]).astype(np.int32)
        else:
            own = tokens = np.asarray(prompt, np.int32)
            if tokens.ndim != 1 or (tokens < 0).any() or (tokens >= self.vocab_size).any():
                raise ConfigError(f"prompt {number} must be a list of token ids, whole numbers from 0 to {self.vocab_size - 1}.")
        if not len(own):
            raise ConfigError(f"prompt {number} is empty: give at least one token of text.")
        return tokens

    @functools.cached_property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary."""
        return self._programs.vocab_size(*self.weights, self.reads_sources)

    def _limit(self, tokens: list[np.ndarray], options: Options) -> int:
        """Return the number of new tokens that fits the context for all prompts; ConfigError if `max_tokens` is larger."""
        wanted = options.max_tokens or DEFAULT_TOKENS
        if self.context is None:
            return wanted
        number, longest = max(enumerate(map(len, tokens), 1), key=lambda pair: pair[1])
        if self.reads_sources:
            if longest > self.context:
                raise ConfigError(f"prompt {number} has {longest} tokens, more than the model's context of {self.context}: shorten it.")
            left, why = self.context, f"the model's context of {self.context}"
        else:
            left = self.context - longest
            if left < 1:
                raise ConfigError(
                    f"prompt {number} has {longest} tokens, and the model's context is {self.context} including new tokens: "
                    f"shorten it to {self.context - 1} or less."
                )
            why = f"prompt {number} of {longest} tokens leaves of the model's context of {self.context}"
        if options.max_tokens is not None and options.max_tokens > left:
            raise ConfigError(f"max_tokens={options.max_tokens} is more than {why}: max_tokens={left} fits.")
        return min(wanted, left)

    def _size(self, tokens: int) -> int:
        """Return the padded length for so many tokens: a bucket's size, or the exact number for a model without a cache."""
        return min(bucket(tokens), self.context or bucket(tokens)) if self.cached else tokens

    def _inputs(self, tokens: list[np.ndarray]) -> tuple[Any, ...]:
        """Return the arrays to start from: prompts [B, P], or sources [B, S] and the targets' first tokens [B]."""
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
    """Return the ids of end tokens: the tokenizer's, and those of a pretrained model's config.json, which may be several."""
    if tokenizer is None:
        return []
    named = getattr(tokenizer, "config", {}).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    return [token for token in dict.fromkeys([tokenizer.special("end"), *named]) if token is not None]


def generate(model: nnx.Module, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
    """Generate one completion for each prompt.

    Args:
      model: maps tokens to logits, or is an encoder–decoder.
      tokenizer: None if prompts are token ids.
      prompts: texts, or lists of token ids.
      options: fields of `Options`; and `start`, `ends` and `dtype` of `Generator`.

    Raises:
      ConfigError: as `Generator.generate`.
    """
    own = {name: options.pop(name) for name in ("start", "ends", "dtype") if name in options}
    return Generator(model, tokenizer, **own).generate(prompts, **options)


def bucket(size: int) -> int:
    """Round up to one of 16, 32, 48, 64, 96, 128, 192, …: 2**n or 1.5 * 2**n."""
    return next(n for power in range(4, 64) for n in (1 << power, 3 << power >> 1) if n >= size and n % 16 == 0)


def _options(options: Mapping[str, Any]) -> Options:
    names = [field.name for field in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise ConfigError(f"generate has no option {name!r}; it has {', '.join(names)}.")
    stop = options.get("stop") or ()
    return Options(**{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


class Programs:
    """The compiled functions of one model; each is compiled once for a padded length and a `sampling.Shape`."""

    def __init__(self, graph: Any, dtype: Any, layout: layout_lib.Layout | None = None, known: int | None = None):
        """graph: of `models.functional.split`; known: number of tokens that may be chosen, None for all rows of the vocabulary."""
        self.graph, self.dtype, self.layout, self.known = graph, dtype, layout, known
        self.start = jax.jit(self._start, static_argnames=("max_new_tokens", "shape"))
        self.advance = jax.jit(self._advance, static_argnames="shape", donate_argnames="state")
        self.start_beams = jax.jit(self._start_beams, static_argnames=("max_new_tokens", "beams", "shape"))
        self.search = jax.jit(self._search, static_argnames=("beams", "shape"))

    def _run(self, params, stats, function: Callable) -> Any:
        """Call a function with the model."""
        with layout_lib.use(self.layout):
            return function(with_known_tokens(functional.evaluation_model(self.graph, params, stats, self.dtype), self.known))

    def _start(self, params, stats, *inputs, max_new_tokens, key, shape, numbers, eos_ids):
        def start(model):
            if len(inputs) == 2:
                return decoding.begin(model, *inputs, max_new_tokens, key, shape)
            state, logits = decoding.prefill(model, *inputs, max_new_tokens, key, shape, self.dtype)
            return decoding.choose_next(state, logits, shape, numbers, eos_ids)

        return self._run(params, stats, start)

    def _advance(self, params, stats, state, steps, stopped_B, *, shape, numbers, eos_ids):
        return self._run(params, stats, lambda model: decoding.advance(model, state, steps, stopped_B, shape, numbers, eos_ids))

    def _start_beams(self, params, stats, *inputs, max_new_tokens, limit, beams, shape, numbers, eos_ids):
        def start(model):
            key = jax.random.key(0)
            if len(inputs) == 2:
                state, logits = decoding.begin(model, *inputs, max_new_tokens, key, shape), None
            else:
                state, logits = decoding.prefill(model, *inputs, max_new_tokens, key, shape, self.dtype)
            return beam.start(state, logits, limit, beams, shape, numbers, eos_ids)

        return self._run(params, stats, start)

    def _search(self, params, stats, carry, *, limit, beams, shape, numbers, eos_ids):
        return self._run(params, stats, lambda model: beam.search(model, carry, limit, beams, shape, numbers, eos_ids))

    def vocab_size(self, params, stats, reads_sources: bool) -> int:
        """Return the size of the logits' last axis."""

        def logits(model):
            model, token = with_cache(model), jnp.zeros(1, jnp.int32)
            return model.extend(token, model.make_cache(token[:, None], 1) if reads_sources else model.make_cache(1, 1, self.dtype))[0]

        return jax.eval_shape(lambda params, stats: self._run(params, stats, logits), params, stats).shape[-1]


@functools.lru_cache(maxsize=8)
def _programs(graph: Any, dtype: Any, known: int | None) -> Programs:
    """Return the compiled functions of a model on one device, shared by all calls on equal models and as many tokens."""
    return Programs(graph, dtype, known=known)
