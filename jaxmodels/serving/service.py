"""The service: its models, its limits, and whether it takes requests. It knows nothing of HTTP, so that files of requests are answered by the same functions."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import anyio.to_thread

from jaxmodels.inference import load
from jaxmodels.inference.run import Run
from jaxmodels.serving import families, schemas
from jaxmodels.serving import served as served_lib
from jaxmodels.serving.engines import make_engine
from jaxmodels.serving.errors import ApiError, bad, unavailable
from jaxmodels.serving.metrics import Metrics
from jaxmodels.serving.served import MakeEngine, Running, Served

Result = TypeVar("Result")

_SMALL = 1 << 16  # bytes of a body that is read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
      body: bytes.
      inputs: texts, images or tables in one call, and answers: prompts times `n`.
      max_tokens: new tokens of an answer; None is what the context leaves.
      seconds: time until a request is given up.
    """

    body: int = 32 << 20
    inputs: int = 256
    max_tokens: int | None = None
    seconds: float = 600.0


@dataclasses.dataclass
class Call:
    """One request while it is answered: what the log and the metrics say of it.

    Attributes:
      model: name, once it is known.
      log: further entries of the access log.
      ends: called once when the request has ended, in whatever way.
    """

    model: str = ""
    log: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.monotonic)
    ends: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def end(self) -> None:
        """Call `ends`, the last first."""
        while self.ends:
            self.ends.pop()()


class Service:
    """Models that answer requests.

    Attributes:
      models: by name; empty while they are loaded.
      phase: `loading`, `ready` or `draining`.
      active: requests that are being answered.
      limits, metrics: of requests.
      log_prompts: whether the access log has prompts and answers.
    """

    def __init__(self, *, limits: Limits | None = None, log_prompts: bool = False):
        self.models: dict[str, Served] = {}
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.active, self.limits, self.log_prompts = 0, limits or Limits(), log_prompts
        self.metrics = Metrics(lambda: self.models)
        self._lock = threading.Lock()

    def load(self, models: Mapping[str, str], how: Running, make: MakeEngine = make_engine, say: Callable[[str], None] = lambda line: None) -> None:
        """Read the weights of models, and compile what requests need. Then the service is ready.

        Args:
          models: name -> run, as `served.named` returns them.
          how: they are run.
          make: makes the engine of a model that generates.
          say: called with a line for each model.
        """
        family, found = families.parents(models), {}
        for name, reference in models.items():
            if name not in family and name not in found:
                run = _read(reference, how)
                children = {child: models[child] for child, parent in family.items() if parent == name}
                adapters = families.shared(run, children, say) if run.config["task"]["name"] in served_lib.GENERATING else {}
                found[name] = Served(name, run, how, make, adapters=adapters)
                for child, its in adapters.items():
                    found[child] = Served(child, _without_weights(its), how, make, parent=found[name])
        for name in family:
            if name not in found:
                found[name] = Served(name, _read(models[name], how), how, make)
        for name in models:
            found[name].warm()
            say(found[name].summary())
        self.use({name: found[name] for name in models})

    def use(self, models: Mapping[str, Served]) -> None:
        """Serve models that are ready."""
        with self._lock:
            self.models = dict(models)
            if self.phase == "loading":
                self.phase = "ready"

    def admit(self, call: Call) -> None:
        """Count a request among the active ones until it ends; raise ApiError unless requests are answered now."""
        if self.phase != "ready":
            why = "the models are being loaded" if self.phase == "loading" else "the service is shutting down"
            raise unavailable(f"{why}: try again later.", 5.0)
        self.active += 1
        call.ends.append(self._leave)

    def _leave(self) -> None:
        self.active -= 1

    def find(self, call: Call, name: str | None) -> Served:
        """Return a model by the name in a request, and note it in the call; 404 with the list of models if there is none."""
        if name is None and len(self.models) == 1:
            (name,) = self.models
        if name is None:
            raise bad(f"model is required; the models are {', '.join(self.models)}.", "model", "model_required")
        if name not in self.models:
            raise ApiError(404, f"there is no model {name[:200]!r}; the models are {', '.join(self.models)}.", "model", "model_not_found")
        call.model = name
        return self.models[name]

    async def apart(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what a function returns that takes processor time, called in a thread, so that the event loop goes on."""
        return await anyio.to_thread.run_sync(function, *arguments)

    async def read(self, kind: type[schemas.Kind], content: bytes) -> schemas.Kind:
        """Return the checked body of a request; a large one is read in a thread."""
        return schemas.parse(kind, content) if len(content) < _SMALL else await self.apart(schemas.parse, kind, content)

    async def drain(self, seconds: float) -> int:
        """Take no more requests, and wait for those that are being answered; return the number that was given up after `seconds`."""
        self.phase = "draining"
        end = time.monotonic() + seconds
        while self.active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = self.active
        for model in self.models.values():
            for part in model.parts:
                await anyio.to_thread.run_sync(part.drain, max(0.0, end - time.monotonic()))
        for _ in range(100):  # what was given up answers its client
            if not self.active:
                break
            await asyncio.sleep(0.02)
        return left

    def close(self) -> None:
        """End the threads of the models."""
        for model in self.models.values():
            for part in model.parts:
                part.close()


def _read(run: str, how: Running) -> Run:
    """Load a run. One that is being trained may remove the checkpoint that is being read; then its new one is."""
    import jax

    spread = jax.device_count() > 1
    try:
        return load.load(run, spread=spread, mesh=how.mesh)
    except (OSError, ValueError):
        return load.load(run, spread=spread, mesh=how.mesh)


def _without_weights(reference: str) -> Run:
    """Return what is known of a run but for its weights, which an engine holds as an adapter."""
    opened = load.open_run(reference)
    return Run(opened.model, opened.task, opened.config, opened.located.step, opened.info.get("tokenizer"), None, opened.located, opened.info)


def open_service(references: Sequence[str], **options: Any) -> tuple[Service, dict[str, str]]:
    """Return a service without models, and the names and runs of those it will have; ConfigError for a run that cannot be served."""
    models = served_lib.named(references)
    served_lib.check(models)
    return Service(**options), models
