"""What a source concludes from names and contents where no key says it: printed at the start, and recorded in the run's manifest."""

import contextlib
import contextvars
from collections.abc import Iterator

_found: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("guesses", default=None)


def guess(text: str) -> None:
    """Record a guess: what was concluded from what, and the key that says it outright."""
    found = _found.get()
    if found is not None and text not in found:
        found.append(text)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Collect the guesses that are recorded within."""
    found: list[str] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)
