"""The answers to one HTTP request, whose parts may be several requests to an engine: their events in the event loop, in the order in which they come."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence

from jaxmodels.serving.errors import ApiError, unavailable
from jaxmodels.serving.requests import Event, Finished, Request, Ticket
from jaxmodels.serving.served import Engine


class Answers:
    """Requests in an engine. The engine's thread only puts events into a queue of this object, so that a slow reader holds nobody up."""

    def __init__(self, engine: Engine, requests: Sequence[Request], seconds: float):
        """
        Args:
          engine: that answers.
          requests: all are queued, or none.
          seconds: after which all are given up.

        Raises:
          Busy, ConfigError: as the engine.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._open: dict[int, Ticket] = {}
        self.started = self._loop.time()
        try:
            for index, request in enumerate(requests):
                self._open[index] = engine.submit(request, functools.partial(self._deliver, index))
        except BaseException:
            self.cancel()
            raise
        self._timer = self._loop.call_at(self.started + seconds, self._events.put_nowait, (-1, TimeoutError()))

    def _deliver(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the index of a request and its next event, until all have finished.

        Raises:
          TimeoutError: the time is over.
          ApiError: a request failed, or was cancelled by the engine.
        """
        try:
            while self._open:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Finished):
                    self._open.pop(index, None)
                    if event.reason == "cancelled":
                        raise unavailable("the service is shutting down, and the answer was not finished in time.")
                    if event.reason == "error":
                        raise ApiError(500, f"the model failed: {event.error}.", code="model_error")
                yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give up what has not finished."""
        if hasattr(self, "_timer"):
            self._timer.cancel()
        for ticket in self._open.values():
            ticket.cancel()
        self._open = {}
