"""The terminal: a live line with progress, and plain lines where output is no terminal."""

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxmodels.training.callback import Callback

REFRESH_SECONDS = 0.25
_BAR_WIDTH = 24


class Terminal(Callback):
    """Prints metrics, samples and messages. Output that cannot be written is reported once, and training continues.

    Attributes:
      total: steps of the run.
    """

    def __init__(self, console: Console, total: int, shown: Sequence[str], on_failure: Callable[[str], None], *, active: bool = True):
        """
        Args:
          console: of rich.
          total: steps of the run.
          shown: names of the metrics to print, in order.
          on_failure: called with a message when the terminal cannot be written.
          active: False on all processes but the first: prints nothing.
        """
        self._console, self.total, self._shown, self._active = console, total, shown, active
        self._on_failure = on_failure
        self._live: Live | None = None
        self._last = {}
        self._refreshed = 0.0

    def say(self, message: str, style: str | None = None) -> None:
        """Print one line, above the live one."""
        if self._active:
            self._draw(lambda: self._console.print(Text(message, style=style or ""), soft_wrap=True))

    def on_step(self, run, step, metrics):
        """Redraw the live line if it is time."""
        if self._active and self._console.is_terminal and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            filled = round(_BAR_WIDTH * step / self.total)
            bar = "━" * filled + "╌" * (_BAR_WIDTH - filled)
            self._draw(lambda: self._update_live(f"{bar} {self._position(step)}  {self._format(self._last)}{self._rates(step)}"))

    def on_log(self, run, step, values):
        """Print training metrics; on a terminal, the live line shows them."""
        self._last = dict(values)
        if not self._console.is_terminal:
            self.say(f"{self._position(step)}  {'train':<10}  {self._format(values)}{self._rates(step)}")

    def on_evaluate(self, run, step, split, values):
        """Print the metrics of a split."""
        if values:
            self.say(f"{self._position(step)}  {split:<10}  {self._format(values)}")

    def on_media(self, run, step, name, media, kind, **_):
        """Print a text, indented under its step."""
        if kind == "text":
            indented = "\n".join("    " + line for line in media.splitlines())
            self.say(f"{self._position(step)}  {name}:\n{indented}", style="dim")

    def on_end(self, run, result):
        """Remove the live line."""
        if self._live is not None:
            self._draw(self._live.stop)

    def _update_live(self, line: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)

    def _draw(self, act: Callable[[], None]) -> None:
        """Draw on the terminal. If its pipe is closed, report that once and print nothing more."""
        try:
            act()
        except (Exception, SystemExit) as error:  # noqa: BLE001  reported; rich exits on a broken pipe
            self._console, self._live = Console(quiet=True), None
            self._on_failure(f"the terminal cannot be written ({type(error).__name__}: {error}); training continues without it")

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self.total))}}/{self.total}"

    def _format(self, values: Mapping[str, float]) -> str:
        return "  ".join(f"{name} {_number(values[name])}" for name in self._shown if name in values)

    def _rates(self, step: int) -> str:
        rate = self._last.get("steps_per_second")
        if not rate:
            return ""
        left = format_duration((self.total - step) / rate)
        mfu = f"  MFU {self._last['mfu']:.1%}" if "mfu" in self._last else ""
        return f"  {rate:.3g} steps/s  {self._last['examples_per_second']:.5g} examples/s  ETA {left}  data wait {self._last['data_wait']:.1%}{mfu}"


def format_duration(seconds: float) -> str:
    """Format seconds as `1h02m`, `3m05s` or `12s`."""
    seconds = int(seconds + 0.5)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e4 or (value and abs(value) < 1e-3) else f"{value:.4f}"
