"""Callbacks of a run: made from the config, called at each event, with one policy for errors."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.runs.checkpoint import Progress
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers import media as media_lib

EVENTS = ("on_start", "on_step", "on_log", "on_evaluate", "on_media", "on_save", "on_end")


def make_callbacks(section: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Build the callbacks of a resolved config's section `callbacks`."""
    made = []
    for entry in section:
        options = {key: value for key, value in entry.items() if key not in ("name", "on_error", "processes")}
        callback = config_lib.find("callbacks.name", {}, entry["name"])(**options)
        for key in ("on_error", "processes"):
            if entry[key] is not None:
                setattr(callback, key, entry[key])
        made.append(check_callback(callback))
    return made


def check_callback(callback: Any) -> Any:
    """Return the callback; ConfigError if it has none of the methods of `Callback`."""
    if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
        shown = f"the class {callback.__name__}; pass an instance" if isinstance(callback, type) else type(callback).__name__
        raise ConfigError(f"callbacks: {shown} is not a callback: it needs one or more of the methods {', '.join(EVENTS)}. Subclass jaxmodels.Callback.")
    return callback


class Hooks:
    """Calls the callbacks of a run, and is the `RunContext` that they get.

    A callback that raises ends the run with a RunError that names it, or is dropped with a warning, as its `on_error` states.
    """

    def __init__(
        self, experiment: Any, folder: Any, mesh: Any, callbacks: Sequence[Any], outputs: Sequence[Any], *, say: Callable, warn: Callable, record: Callable
    ):
        """
        Args:
          experiment, folder, mesh: of the run.
          callbacks: called first, in this order.
          outputs: called after them, so that these see what the others add: the terminal, the trackers, the samples.
          say, warn, record: print a line; print and record a warning; record values in the manifest.
        """
        self.experiment, self.folder, self.mesh = experiment, folder, mesh
        self.say, self.warn, self.record = say, warn, record
        first = session.is_first()
        self._names: dict[int, str] = {}
        for callback in (*callbacks, *outputs):
            name = f"{type(callback).__module__}:{type(callback).__qualname__}"
            same = sum(other.partition("#")[0] == name for other in self._names.values())
            self._names[id(callback)] = f"{name}#{same + 1}" if same else name
        self._active = [c for c in (*callbacks, *outputs) if first or getattr(c, "processes", "first") == "all"]
        self._extra: dict[str, float] = {}
        self._wants_save, self.stop_reason, self._started = False, None, False
        self._agreed_needed = session.current() is not None and bool(callbacks)
        self.state, self.step, self.resumed, self.step_started = None, 0, False, 0.0

    # What a callback may ask for: see RunContext

    def log(self, values: Mapping[str, float]) -> None:
        """See RunContext."""
        self._extra |= {name: float(value) for name, value in values.items()}

    def media(self, name: str, media: Any, kind: str, **options: Any) -> None:
        """See RunContext."""
        media_lib.normalize(media, kind, **options)  # an error here, where the callback is known
        for callback in list(self._active):
            self._call(callback, "on_media", self.step, name, media, kind, **options)

    def save(self) -> None:
        """See RunContext."""
        self._wants_save = True

    def stop(self, reason: str) -> None:
        """See RunContext."""
        self.stop_reason = self.stop_reason or reason

    # What the trainer calls

    def dispatch(self, event: str, *args: Any) -> None:
        """Call one event of all callbacks."""
        for callback in list(self._active):
            self._call(callback, event, *args)

    def metrics(self, event: str, *args: Any, values: dict[str, float]) -> dict[str, float]:
        """Call `on_log` or `on_evaluate`; return the values with what callbacks added."""
        values |= self._extra
        self._extra = {}
        for callback in list(self._active):
            self._call(callback, event, *args, values)
            values |= self._extra
            self._extra = {}
        return values

    def begin_step(self) -> None:
        """Note the time before a step is dispatched."""
        self.step_started = time.perf_counter()

    def requests(self, agree: bool) -> tuple[bool, bool]:
        """Return whether callbacks requested a checkpoint, and whether they requested the end. Several processes decide together, when `agree`."""
        save, stop = self._wants_save, self.stop_reason
        if self._agreed_needed:
            if not agree:
                return False, False
            requests = session.gather("requests", [save, stop])
            save, stop = any(each[0] for each in requests), next((each[1] for each in requests if each[1]), None)
        self._wants_save, self.stop_reason = False, stop
        return save, stop is not None

    def states(self) -> dict[str, Any]:
        """Return the state of each callback that has one, by its name, for the checkpoint."""
        found = {}
        for callback in self._active:
            state = self._call(callback, "state")
            if state is None:
                continue
            try:
                found[self._names[id(callback)]] = json.loads(json.dumps(state))
            except (TypeError, ValueError) as error:
                raise RunError(f"callback {self._names[id(callback)]}: state() must return JSON values ({error}).") from error
        return found

    def start(self, progress: Progress) -> None:
        """Restore the state of each callback from the checkpoint that the run resumes from, then call `on_start`."""
        for callback in list(self._active):
            if (state := progress.callbacks.get(self._names[id(callback)])) is not None:
                self._call(callback, "restore", state)
        self._started = True
        self.dispatch("on_start")

    def end(self, result: Any) -> None:
        """Call `on_end` of all callbacks, if the run started. After a failed run, an error of a callback is a warning, so that it does not hide the first one."""
        for callback in list(self._active) if self._started else ():
            try:
                self._call(callback, "on_end", result)
            except RunError as error:
                if result is not None:
                    raise
                self.warn(str(error))

    def _call(self, callback: Any, event: str, *args: Any, **options: Any) -> Any:
        method = getattr(callback, event, None)
        if method is None or getattr(method, "__func__", None) is getattr(Callback, event):
            return None  # those of `Callback` do nothing
        try:
            return method(*args, **options) if event in ("state", "restore") else method(self, *args, **options)
        except RunError:
            raise  # it has its own message and exit status
        except Exception as error:
            where = f"callback {self._names[id(callback)]} failed in {event} at step {self.step}: {type(error).__name__}: {error}"
            if getattr(callback, "on_error", "stop") != "continue":
                raise RunError(f"{where}. Earlier checkpoints are complete; the same command resumes from the latest.") from error
            self._active.remove(callback)
            self.warn(f"{where}; training continues without it")
            return None
