"""Where a run is watched: metrics.jsonl, TensorBoard, and the terminal. What fails here never stops training."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxmodels.runs.folder import RunFolder
from jaxmodels.training.trackers import JsonLines, Samples, TensorBoard

REFRESH_SECONDS = 0.25


class Log:
    """All places at once, and the terminal: a live line there, plain lines where output is no terminal."""

    def __init__(self, console: Console, total: int, on_failure: Callable[[str], None], *, active: bool = True):
        """
        Args:
          console: of rich.
          total: steps of the run.
          on_failure: told once of each writer that failed.
          active: False on all processes but the first: writes and prints nothing.
        """
        self.console, self.total, self.active = console, total, active
        self._on_failure = on_failure
        self._writers = {}
        self._live: Live | None = None
        self._last = {}
        self._refreshed = 0.0

    def open(self, folder: RunFolder, step: int, tensorboard: bool) -> None:
        """Opens the writers of a run that goes on from `step`."""
        if not self.active:
            return
        makers = {"metrics.jsonl": lambda: JsonLines(folder), "samples.txt": lambda: Samples(folder)}
        if tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(folder, step)
        for name, make in makers.items():
            try:
                self._writers[name] = make()
            except Exception as error:  # noqa: BLE001  reported
                self._failed(name, error)

    def say(self, message: str, style: str | None = None) -> None:
        """One line, above the live one."""
        if self.active:
            self._draw(lambda: self.console.print(Text(message, style=style or ""), soft_wrap=True))

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Metrics to every place."""
        self._each(lambda writer: writer.write(step, split, values))
        if split == "train":
            self._last = dict(values)
        if not self.active or (split == "train" and self.console.is_terminal):
            return
        self.say(f"{_position(step, self.total)}  {split:<10}  {_shown(values)}{self._rates(step) if split == 'train' else ''}")

    def text(self, step: int, name: str, content: str) -> None:
        """A text to every place; on the terminal indented under its step."""
        self._each(lambda writer: writer.text(step, name, content))
        indented = "\n".join("    " + line for line in content.splitlines())
        self.say(f"{_position(step, self.total)}  {name}:\n{indented}", style="dim")

    def tick(self, step: int) -> None:
        """Redraws the live line, if there is one and it is time. Waits for no device."""
        if self.active and self.console.is_terminal and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            width = 24
            filled = round(width * step / self.total)
            bar = "━" * filled + "╌" * (width - filled)
            line = f"{bar} {_position(step, self.total)}  {_shown(self._last)}{self._rates(step)}"
            self._draw(lambda: self._update_live(line))

    def close(self) -> None:
        """Closes every place."""
        if self._live is not None:
            self._draw(self._live.stop)
        self._each(lambda writer: writer.close())
        self._writers = {}

    def _update_live(self, line: str) -> None:
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)

    def _draw(self, act: Callable[[], None]) -> None:
        """Something for the terminal, which may be a pipe that nobody reads any more: then it is left alone from here on."""
        try:
            act()
        except (Exception, SystemExit) as error:  # noqa: BLE001  reported; rich exits on a broken pipe
            self.console, self._live = Console(quiet=True), None
            self._on_failure(f"the terminal cannot be written ({type(error).__name__}: {error}); training goes on without it")

    def _rates(self, step: int) -> str:
        rate = self._last.get("steps_per_second")
        if not rate:
            return ""
        left = duration((self.total - step) / rate)
        mfu = f"  MFU {self._last['mfu']:.1%}" if "mfu" in self._last else ""
        return f"  {rate:.3g} steps/s  {self._last['examples_per_second']:.5g} examples/s  ETA {left}  data wait {self._last['data_wait']:.1%}{mfu}"

    def _each(self, act) -> None:
        for name, writer in list(self._writers.items()):
            try:
                act(writer)
            except Exception as error:  # noqa: BLE001  reported
                del self._writers[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        message = f"{name} cannot be written ({type(error).__name__}: {error}); training goes on without it"
        self.say("warning: " + message, style="yellow")
        self._on_failure(message)


# Metrics that are printed, in this order; all are written.
SHOWN = ("loss", "accuracy", "perplexity", "f1", "mse", "mae", "pearson", "label_error_rate", "exact_match", "bleu", "rougeL")


def duration(seconds: float) -> str:
    """`1h02m`, `3m05s`, `12s`."""
    seconds = int(seconds + 0.5)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def _position(step: int, total: int) -> str:
    return f"step {step:>{len(str(total))}}/{total}"


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {_number(values[name])}" for name in SHOWN if name in values)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e4 or (value and abs(value) < 1e-3) else f"{value:.4f}"
