"""The process of a service: its port, its start, and its end on a signal."""

import asyncio
import errno
import logging
import logging.handlers
import os
import queue
import re
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.serving.access import VARIABLE, Access
from jaxmodels.serving.application import make_app
from jaxmodels.serving.engines import make_engine
from jaxmodels.serving.middleware import LOG
from jaxmodels.serving.served import MakeEngine, Running
from jaxmodels.serving.service import Limits, Service, open_service

_LOCAL = ("127.0.0.1", "localhost", "::1")
# That an idle connection stays open: longer than clients and load balancers (Google's 600 s) use it again, or a request may meet one that is just closed.
_IDLE_SECONDS = 620
_LEFT_SECONDS = 5  # that connections may take to close when all requests have been answered


def serve(
    models: str | Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: str | None = None,
    no_auth: bool = False,
    rate_limit: str | None = None,
    cors: Sequence[str] = (),
    drain_seconds: float = 30.0,
    log_prompts: bool = False,
    limits: Limits | None = None,
    make: MakeEngine = make_engine,
    **options: Any,
) -> None:
    """Serve models over HTTP until SIGTERM or SIGINT. Blocks.

    A signal stops admission: requests that come are answered with 503, and those that are being answered are finished.

    Args:
      models: `RUN`, `NAME=RUN` or `hf:…`, one or several.
      host, port: to listen at; port 0 takes any that is free.
      api_keys: file of keys; see `access.Access`.
      no_auth: serve other machines without keys.
      rate_limit: of each key, such as `60/minute`.
      cors: origins whose pages may ask.
      drain_seconds: time that running requests have after a signal.
      log_prompts: write prompts and answers into the access log.
      limits: of requests.
      make: makes the engine of a model that generates.
      options: fields of `served.Running`: `slots`, `context`, `precision`, ….

    Raises:
      ConfigError: a run cannot be served, the port is taken, or another machine could ask without a key.
    """
    how, access = Running(**options), Access(api_keys, rate_limit)
    if host not in _LOCAL and not access.has_keys and not no_auth:
        raise ConfigError(f"--host={host} lets other machines ask: give --api_keys=FILE or {VARIABLE}, or --no_auth if everybody may ask.")
    hosts = _hosts(host, cors)
    with _listen(host, port) as listening:
        service, named = open_service([models] if isinstance(models, str) else list(models), limits=limits, log_prompts=log_prompts)
        server = Server(make_app(service, access, cors=cors, hosts=hosts), service, drain_seconds)
        log = _start_log()
        try:
            server.load_and_run(listening, lambda say: service.load(named, how, make, say))
        finally:
            log.stop()


def _hosts(host: str, cors: Sequence[str]) -> list[str]:
    """Return the names by which the service may be asked for; ConfigError for an origin that is none.

    A page of another site could otherwise reach a service of this machine alone by a name of its own that leads here. A proxy on this machine asks by the
    name of an origin that is allowed.
    """
    for origin in cors:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise ConfigError(f"--cors={origin}: an origin is a scheme and a host, such as https://example.org; or * for all.")
    return ["*"] if host not in _LOCAL or "*" in cors else [*_LOCAL, "[::1]", *(urlsplit(origin).hostname or "" for origin in cors)]


def _listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, before anything is loaded; ConfigError if the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        hint = "give another --port, or end the process that has it" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        raise ConfigError(f"{host}:{port} cannot be listened at: {error.strerror or error}; {hint}.") from error
    return bound


class Server(uvicorn.Server):
    """Uvicorn, which first lets running requests end when a signal comes.

    Attributes:
      address: of the service.
    """

    def __init__(self, app: Any, service: Service, drain_seconds: float):
        times = {"timeout_keep_alive": _IDLE_SECONDS, "timeout_graceful_shutdown": _LEFT_SECONDS}
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off", **times)
        super().__init__(config)
        self._service, self._drain_seconds, self.address = service, drain_seconds, ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining, self._failure = False, None
        self._loader: threading.Thread | None = None

    def load_and_run(self, listening: socket.socket, load: Any) -> None:
        """Serve at a socket, and load the models meanwhile, so that /health answers and /ready says that they are not there.

        Args:
          listening: bound.
          load: reads the models, calling its argument with lines about them.

        Raises:
          RunError: the models cannot be loaded.
        """
        host, port = listening.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._loader = threading.Thread(target=self._load, args=(load,), name="loader", daemon=True)
        self._loader.start()
        self.run([listening])
        if self._failure is not None:
            raise self._failure
        if self._loader.is_alive():  # it compiles, which cannot be interrupted
            _leave()
        self._service.close()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def _load(self, load: Any) -> None:
        lines: list[str] = []
        try:
            load(lines.append)
        except Exception as error:  # noqa: BLE001  raised in the main thread
            self._failure = error if isinstance(error, RunError) else RunError(f"the models cannot be loaded: {type(error).__name__}: {error}")
            self.should_exit = True
            return
        print("\n".join([*lines, f"ready at {self.address}"]), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop admission at the first signal, and everything at the second."""
        if self._draining or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        """Begin to end, from any thread: take no more requests, finish those that run, and stop."""
        self._draining = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        left = await self._service.drain(self._drain_seconds)
        if left:
            print(f"jaxmodels: {left} requests were not finished in {self._drain_seconds:g} s, and were given up.", file=sys.stderr, flush=True)
        self.should_exit = True


def _start_log() -> logging.handlers.QueueListener:
    """Write the access log to standard error, in a thread, so that a slow terminal holds no request up."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers, LOG.propagate = [logging.handlers.QueueHandler(waiting)], False
    LOG.setLevel(logging.INFO)
    listener = logging.handlers.QueueListener(waiting, handler)
    listener.start()
    return listener


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
