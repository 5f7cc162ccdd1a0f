"""The rows of an engine: which texts they hold, and the state on the device, whose size follows them."""

from typing import Any

import numpy as np

from jaxmodels.generation import rows as rows_lib
from jaxmodels.models.cache import Packed
from jaxmodels.serving.programs import Programs
from jaxmodels.serving.prompts import padded
from jaxmodels.serving.text import Text

_LAST_SLOT = 2**30  # slots are counted anew before their number grows out of its type
_PATIENCE = 16  # steps that a state may be too large before it is made smaller


class Batch:
    """Rows of texts.

    Attributes:
      rows: the text of each row, None in free ones.
      length: slots of each row.
      steps: number of steps so far.
    """

    def __init__(self, programs: Programs):
        self.programs, self.state = programs, programs.empty()
        self.rows: list[Text | None] = [None] * programs.rows[0]
        self.length, self.steps = programs.lengths[0], 0
        self._slot, self._waited = self.length, 0  # the next slot; steps for which the state was too large
        self._settings, self._placed = rows_lib.settings(len(self.rows)), None

    @property
    def texts(self) -> list[Text]:
        """Those that have a row."""
        return [text for text in list(self.rows) if text is not None]

    def add(self, text: Text, reading: Packed, tokens: tuple[int, ...], count: int) -> None:
        """Give a text a row; there is room for it.

        Args:
          text: the request.
          reading: parts of a cache with what was read; see `state.insert`.
          tokens: the prompt.
          count: how many of them were read. The next step reads the one after.
        """
        while None not in self.rows:
            self._resize(_after(self.programs.rows, len(self.rows)), self.length)
        while count >= self.length:
            self._resize(len(self.rows), _after(self.programs.lengths, self.length))
        row = self.rows.index(None)
        self.state = self.programs.insert(self.state, reading, row, padded(tokens, self.length), count, tokens[count])
        text.held = count
        self._hold(row, text, text.settings(len(tokens)))

    def remove(self, text: Text) -> None:
        """Free the row of a text, if it has one."""
        if text in self.rows:
            self._hold(self.rows.index(text), None, {})

    def step(self) -> tuple[list[tuple[int, Text]], dict]:
        """Start a step of all rows in use. Return these, and the results to come, of `state.step`."""
        self._fit()
        if self._placed is None:
            active = np.array([text is not None for text in self.rows])
            self._placed = self.programs.settings(({name: x.copy() for name, x in self._settings.items()}, active))
        self.state, results = self.programs.step(self.state, *self._placed)
        self.steps, self._slot = self.steps + 1, self._slot + 1
        held = [(row, text) for row, text in enumerate(self.rows) if text is not None]
        for row, text in held:
            text.started, text.held = text.started + 1, text.held + 1
            if text.started == text.limit:  # the row is free, though its last token is still to come
                self._hold(row, None, {})
        return held, results

    def _hold(self, row: int, text: Text | None, settings: dict[str, Any]) -> None:
        """Give a row to a text, or to none; a free row asks for nothing."""
        self.rows[row], self._placed = text, None
        for name, values in (rows_lib.settings(1) | settings).items():
            self._settings[name][row] = values if text is not None and name in settings else values[0]

    def _fit(self) -> None:
        """Give the state the slots that the next step needs, and make it smaller if it has long been too large."""
        texts, size = self.texts, (len(self.rows), self.length)
        rows, length = size
        longest = max(text.held for text in texts) + 1
        if longest > length:
            self._resize(rows, _after(self.programs.lengths, length))
            return
        smaller = [other for other in self.programs.next_to(size) if other < size and other[0] >= len(texts) and other[1] >= longest]
        self._waited = self._waited + 1 if smaller else 0
        if self._waited > _PATIENCE:
            self._resize(*smaller[0])
        elif self._slot >= _LAST_SLOT:
            self._resize(*size)

    def _resize(self, rows: int, length: int) -> None:
        """Give the state another size. Rows that are in use come first."""
        used = [row for row, text in enumerate(self.rows) if text is not None]
        order = used + [0] * (rows - len(used))
        self.state = self.programs.resize(self.state, order, length)
        self._settings = {name: x[order] for name, x in self._settings.items()}
        self.rows = [self.rows[row] for row in used] + [None] * (rows - len(used))
        for row in range(len(used), rows):
            self._hold(row, None, {})
        self.length, self._slot, self._waited, self._placed = length, length, 0, None


def _after(sizes: tuple[int, ...], size: int) -> int:
    return sizes[sizes.index(size) + 1]
