"""A model that is served: a run or pretrained weights under a name, with the engine or the batchers that compute its answers."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxmodels.data.sources.chat import template_of
from jaxmodels.errors import ConfigError
from jaxmodels.inference import load
from jaxmodels.inference.embed import POOLS, Embedder, has_embeddings
from jaxmodels.inference.predictor import Predictor
from jaxmodels.inference.run import Run
from jaxmodels.pretrained.folder import is_pretrained, split_accepted
from jaxmodels.runs.checkpoint import parse_run
from jaxmodels.serving.batcher import SIZES, Batcher
from jaxmodels.serving.errors import ApiError, bad
from jaxmodels.serving.requests import Event, Request, Stats, Ticket
from jaxmodels.serving.token_texts import TokenTexts
from jaxmodels.storage import paths as storage
from jaxmodels.tokenizers.base import frame

GENERATING = ("language_model", "seq2seq")


class Engine(Protocol):
    """What generates texts; see `requests`."""

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket: ...

    def stats(self) -> Stats: ...

    def drain(self, seconds: float) -> int: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How models are run.

    Attributes:
      slots: rows that an engine decodes at once; None is as many as memory has room for, 16 on CPUs.
      context: tokens of a row of its cache, prompt and answer; None is the model's own context.
      queue: the most requests of a model that wait.
      max_wait_ms: milliseconds that an input of a task that does not generate waits for others, at most.
      precision: dtype of the computation, `float32` or `bfloat16`; or `int8`, weights of models that generate in 8 bits, with which others have float32.
      max_pixels: of an image file.
      mesh: sizes of the mesh that are others than those of the run, such as `{"tensor": 4}`.
      batch_sizes: rows of the batches of tasks that do not generate, in ascending order; each is compiled.
    """

    slots: int | None = None
    context: int | None = None
    queue: int = 256
    max_wait_ms: float = 5.0
    precision: str = "float32"
    max_pixels: int = 67_108_864
    mesh: Mapping[str, int] | None = None
    batch_sizes: tuple[int, ...] = SIZES


MakeEngine = Callable[[Run, Running, Mapping[str, str]], Engine]


class Served:
    """A model under a name.

    Attributes:
      name: in requests.
      run: the loaded run.
      engine: None if it does not generate text.
      adapter: the engine's name of its adapter; None for the plain model.
      predictor, predicting: what /v1/predict computes with, and its batcher; None if it has no form.
      no_form: why it has none.
      embedder, embedding: the same of /v1/embeddings.
    """

    def __init__(
        self, name: str, run: Run, how: Running, make_engine: MakeEngine, *, adapters: Mapping[str, str] | None = None, parent: "Served | None" = None
    ):
        """
        Args:
          name: in requests.
          run: loaded; without weights if there is a parent.
          how: it is run.
          make_engine: makes the engine of a model that generates.
          adapters: name -> run, of adapters that the engine holds too.
          parent: the model whose engine holds the adapter of this name.
        """
        self.name, self.run, self.created, self.parent = name, run, int(time.time()), parent
        self.adapter = None if parent is None else name
        self.task = run.config["task"]["name"]
        self.engine: Engine | None = None
        self.predictor: Predictor | None = None
        self.predicting: Batcher | None = None
        self.no_form = ""
        self.embedder: Embedder | None = None
        self.embedding: Batcher | None = None
        waits = {"max_wait": how.max_wait_ms / 1000, "queue": how.queue, "sizes": how.batch_sizes}
        if self.task in GENERATING:
            self.engine = make_engine(run, how, adapters or {}) if parent is None else parent.engine
            own = getattr(run.model, "context", None)
            limits = [limit for limit in (getattr(self.engine, "context", None), how.context, own) if isinstance(limit, int)]
            self.context = min(limits, default=None)
            self.texts = TokenTexts(run.tokenizer)
            return
        if has_embeddings(run):
            self.embedder = Embedder(run)
            self.embedding = Batcher(self.embedder, **waits)
        try:
            self.predictor = Predictor(run, precision="float32" if how.precision == "int8" else how.precision, max_pixels=how.max_pixels)
            self.predicting = Batcher(self.predictor, **waits)
        except ConfigError as error:
            self.no_form = str(error)
            if self.embedder is None:
                raise ConfigError(f"{name} cannot be served: {error}") from error

    def warm(self) -> None:
        """Compile what requests need, the chat template too. An engine has done so when it is made."""
        self.describe(whole=True)
        for batcher, computed in ((self.predicting, self.predictor), (self.embedding, self.embedder)):
            if batcher is not None and computed is not None:
                batcher.warm(computed.blanks())

    @property
    def failure(self) -> str | None:
        """Why its engine has ended; None while it works."""
        return getattr(self.engine, "failure", None)

    @property
    def parts(self) -> list[Engine | Batcher]:
        """What computes, to drain and close; an adapter has no part of its own."""
        return [part for part in (self.engine, self.predicting, self.embedding) if part is not None and self.parent is None]

    @functools.cached_property
    def template(self):
        """The compiled chat template; ConfigError without one."""
        if not hasattr(self.run.tokenizer, "chat_template"):
            raise ConfigError(f"the model {self.name!r} was not trained on conversations and has no chat template: use /v1/completions.")
        try:
            return template_of(self.run.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"the model {self.name!r} has no chat template: use /v1/completions. ({error})") from error

    @functools.cached_property
    def chats(self) -> bool:
        """Whether it answers conversations."""
        try:
            return self.task == "language_model" and self.template is not None
        except ConfigError:
            return False

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of token ids that a prompt may have."""
        return int(self.run.info["vocab_size"])

    @property
    def target_length(self) -> int | None:
        """The longest target of a `seq2seq` run's data, which its evaluation decodes; None if it is not known."""
        return getattr(self.run.task, "max_length", None) or self.run.info.get("target_length")

    def prompt(self, prompt: str | list[int], param: str = "prompt") -> tuple[int, ...]:
        """Return the tokens of a prompt: a text gets the tokenizer's special tokens, token ids stay as they are.

        Raises:
          ApiError: it is empty, cannot be encoded, or has other numbers than token ids.
        """
        if isinstance(prompt, list):
            if not all(0 <= token < self.vocab_size for token in prompt):
                raise bad(f"{param}: token ids must be whole numbers from 0 to {self.vocab_size - 1}.", param)
            return tuple(prompt)
        if self.run.tokenizer is None:
            raise bad(f"{param}: the model {self.name!r} has no tokenizer: send token ids, [1, 2].", param)
        try:
            own = self.run.tokenizer.encode(prompt)
        except ValueError as error:
            raise bad(f"{param}: {error}.", param) from error
        if not len(own):
            raise bad(f"{param} is empty: give at least one token of text.", param)
        before, after = frame(self.run.tokenizer)
        return tuple(np.concatenate([before, own, after if self.task == "seq2seq" else own[:0]]).tolist())

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a conversation, up to the start of the next answer.

        Raises:
          ApiError: a message has a special token of the tokenizer, which only the template may write.
          ConfigError, TemplateProblem: there is no template, or it fails.
        """
        special = [token for token in self.run.tokenizer.special_texts if token] if self.template else []
        for number, message in enumerate(messages):
            if forged := next((token for token in special if token in message["content"]), None):
                raise bad(f"messages.{number} has {forged!r}, a special token of the model, which would be read as the end or beginning of a turn.", "messages")
        text = self.template.render(messages, prompt=True)
        tokens, _ = self.run.tokenizer.read(text)
        if not len(tokens):
            raise bad("the chat template makes an empty text of the conversation.", "messages")
        return tuple(tokens.tolist())

    def check_length(self, tokens: Sequence[int], new: int | None, param: str = "prompt") -> None:
        """Raise ApiError, with both numbers, for a prompt that the context has no room for, alone or with `new` tokens."""
        if self.context is None:
            return
        if self.task == "seq2seq":
            room, what = self.context, f"the model {self.name!r} reads {self.context}"
        else:
            room, what = self.context - (1 if new is None else new), f"the context of the model {self.name!r} is {self.context}"
        if len(tokens) > room:
            asked = f" and {new} new ones are asked for" if new and len(tokens) <= self.context and self.task != "seq2seq" else ""
            raise ApiError(
                400,
                f"the {param} has {len(tokens)} tokens{asked}, and {what}: shorten it{' or max_tokens' if asked else ''}.",
                param,
                "context_length_exceeded",
            )
        if self.task == "seq2seq" and new is not None and new > self.context:
            raise bad(f"max_tokens={new} is more than the model's context of {self.context}.", "max_tokens", "context_length_exceeded")

    def describe(self, *, whole: bool = False) -> dict[str, Any]:
        """Return the model as /v1/models lists it; `whole`: with the schemas of its inputs and outputs."""
        endpoints = []
        if self.engine is not None:
            endpoints = ["/v1/completions", *(["/v1/chat/completions"] if self.chats else []), *(["/v1/predict"] if self.task == "seq2seq" else [])]
        endpoints += ["/v1/predict"] if self.predictor is not None else []
        endpoints += ["/v1/embeddings"] if self.embedder is not None else []
        found = {"id": self.name, "object": "model", "created": self.created, "owned_by": "jaxmodels", "task": self.task, "endpoints": endpoints}
        found |= {} if self.parent is None else {"parent": self.parent.name}
        if not whole:
            return found
        found["step"] = self.run.step
        if self.engine is not None:
            found |= {"context": self.context, "tokenizer": self.run.tokenizer is not None}
            text = {"type": "string"}
            found |= {"input": text, "output": {"type": "object", "properties": {"text": text}}} if self.task == "seq2seq" else {}
        if self.predictor is not None:
            form = self.predictor.form
            found |= {"title": form.title, "input": form.input, "output": form.output}
            found |= {"labels": self.predictor.form.labels.names} if getattr(form, "labels", None) else {}
        if self.embedder is not None:
            found["embedding"] = {"width": self.embedder.width, "tokens": self.embedder.limit, "pooling": list(POOLS)}
        return found

    def summary(self) -> str:
        """Return a line for the start of the service."""
        if self.parent is not None:
            return f"{self.name}: {self.task}, adapters on the weights and the engine of {self.parent.name}"
        if self.engine is not None:
            stats = self.engine.stats()
            held = f"{stats.slots} slots of {stats.cache_tokens // stats.slots:,} tokens, {stats.cache_tokens:,} in all"
            return f"{self.name}: {self.task}, {self.engine.describe() if hasattr(self.engine, 'describe') else held}"
        return f"{self.name}: {self.task}, {', '.join(self.describe()['endpoints'])}"


def named(references: Sequence[str]) -> dict[str, str]:
    """Return name -> run, of `NAME=RUN` or `RUN`, whose name is that of its folder.

    Raises:
      ConfigError: two models have one name.
    """
    found: dict[str, str] = {}
    for reference in references:
        match = re.fullmatch(r"([\w.-]+)=(.+)", reference)
        name, run = (match[1], match[2]) if match else (None, reference)
        if not is_pretrained(run):
            place = storage.parse(run, "--workdir")
            run = run if storage.is_bucket(place) else str(place)
        if name is None:
            plain = split_accepted(run.removeprefix("hf:"))[0] if is_pretrained(run) else parse_run(run)[0]
            name = plain.rstrip("/").rpartition("/")[2] or plain
        if name in found:
            raise ConfigError(f"--workdir: two models have the name {name!r}, {found[name]} and {run}: give another, --workdir=NAME={run}.")
        found[name] = run
    return found


def check(models: Mapping[str, str]) -> None:
    """Raise ConfigError for a run that does not exist, has no checkpoint or cannot be built, before weights are read."""
    for run in models.values():
        load.open_run(run)
