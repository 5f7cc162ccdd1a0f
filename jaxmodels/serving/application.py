"""The ASGI application: routes, and the answers of HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from jaxmodels.serving import openai_api, openapi, predict_api
from jaxmodels.serving.access import Access
from jaxmodels.serving.errors import ApiError, as_api_error, bad
from jaxmodels.serving.middleware import GUARDED, Guarded, Recorded, below, refusal
from jaxmodels.serving.served import Running
from jaxmodels.serving.service import Call, Service, open_service

PAGE = Path(__file__).with_name("page")
_READER_SECONDS = 60.0  # that a client may take to read a piece of a stream

Answer = Callable[[Service, Call, Any], Coroutine[Any, Any, Any]]

# What is answered from a body, here and in files of requests.
ANSWERS: dict[str, Answer] = {
    "/v1/completions": openai_api.completions,
    "/v1/chat/completions": openai_api.chat_completions,
    "/v1/embeddings": openai_api.embeddings,
    "/v1/predict": predict_api.predict,
}


def app(models: Sequence[str], *, api_keys: str | None = None, rate_limit: str | None = None, cors: Sequence[str] = (), **options: Any) -> Starlette:
    """Return an ASGI application that serves models, to mount in another. It reads the weights and compiles before it returns.

    Args:
      models: as `--workdir` of `jaxmodels serve`: `RUN`, `NAME=RUN`, `hf:…`.
      api_keys, rate_limit: as in `access.Access`. Without keys everybody may ask who reaches the application.
      cors: origins whose pages may ask, such as `https://example.org`.
      options: fields of `served.Running`.

    Raises:
      ConfigError: a run cannot be served.
    """
    access = Access(api_keys, rate_limit)
    how = Running(**options)
    service, named = open_service(models)
    service.load(named, how)
    return make_app(service, access, cors=cors)


def make_app(service: Service, access: Access, *, cors: Sequence[str] = (), hosts: Sequence[str] = ("*",)) -> Starlette:
    """Return the application of a service.

    Args:
      service: its models may be loaded later.
      access: keys and rate limits.
      cors: origins whose pages may ask.
      hosts: names by which the service may be asked for, so that no name of another site leads to it.
    """
    routes: list[BaseRoute] = [Route(path, _endpoint(service, path, answer), methods=["POST"]) for path, answer in ANSWERS.items()]
    routes += [
        Route("/v1/models", _get(lambda request: {"object": "list", "data": [model.describe() for model in service.models.values()]})),
        Route("/v1/models/{name:path}", _get(lambda request: service.find(Call(), request.path_params["name"]).describe(whole=True))),
        Route("/health", _get(lambda request: _health(service))),
        Route("/ready", _get(lambda request: JSONResponse({"status": service.phase}, 200 if service.phase == "ready" else 503))),
        Route("/metrics", _get(lambda request: Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST))),
        Route("/openapi.json", _get(lambda request: openapi.document(service))),
        Route("/docs", _get(lambda request: HTMLResponse(openapi.page(openapi.document(service))))),
    ]
    for file in sorted(PAGE.iterdir()):  # not a folder of files: its routes would match every other path too
        routes.append(Route("/" if file.name == "index.html" else f"/{file.name}", _get(lambda request, file=file: FileResponse(file))))
    middleware = [Middleware(Recorded, service=service), Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    if cors:
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"]))
    middleware.append(Middleware(Guarded, service=service, access=access, origins=cors))
    made = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})
    made.state.service = service
    return made


def _get(value: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a function of a request, which takes no time."""

    async def endpoint(request: Request) -> Response:
        try:
            found = value(request)
        except ApiError as error:
            return refusal(error)
        return found if isinstance(found, Response) else JSONResponse(found)

    return endpoint


def _health(service: Service) -> Response:
    """Return 200 while the process is alive and its engines are: one that has failed does not come back, and the process should be started again."""
    failed = {name: model.failure for name, model in service.models.items() if model.failure is not None}
    return JSONResponse({"status": "failed", "models": failed} if failed else {"status": "alive"}, 500 if failed else 200)


async def _http_error(request: Request, error: Exception) -> Response:
    """Tell an error of a path or a method as the API tells errors."""
    assert isinstance(error, HTTPException)
    if not below(request.scope).startswith(GUARDED):
        return PlainTextResponse(error.detail, error.status_code, dict(error.headers or {}))
    message = f"there is no {request.method} {request.url.path}." if error.status_code in (404, 405) else error.detail
    return refusal(ApiError(error.status_code, message, code="not_found", headers=error.headers or {}))


def _endpoint(service: Service, path: str, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a function of a body."""

    async def endpoint(request: Request) -> Response:
        call: Call = request.state.call
        call.log["endpoint"] = path
        try:
            service.admit(call)
            async with asyncio.timeout(service.limits.seconds):
                content = await _content(service, request)
            reply = await _unless_gone(request, answer(service, call, content))
        except Exception as error:  # noqa: BLE001  all errors are told in one form
            told = _told(error)
            call.log["error"] = told.code or "invalid_request"
            return refusal(told)
        if isinstance(reply, dict):
            return JSONResponse(reply)
        return EventSourceResponse(_events(call, reply), ping=15, send_timeout=_READER_SECONDS)

    return endpoint


def _told(error: Exception) -> ApiError:
    match error:
        case ClientDisconnect():
            return ApiError(499, "the client went away.", code="disconnected")
        case HTTPException():  # of a form that is malformed
            return ApiError(error.status_code, error.detail, code="invalid_form")
    return as_api_error(error)


async def _content(service: Service, request: Request) -> bytes | predict_api.Files:
    """Return the body, or the files of a form, which /v1/predict takes: `model`, `top`, and a file or more."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    if below(request.scope) != "/v1/predict":
        raise bad("a form with files is for /v1/predict; send JSON.", code="unsupported")
    async with request.form(max_files=service.limits.inputs, max_fields=8, max_part_size=1 << 20) as form:
        values = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if not files or set(values) - {"model", "top"}:
            raise bad("a form has a file or more, named 'file', and may have 'model' and 'top'.", "file")
        return predict_api.Files(values.get("model"), [await file.read() for file in files], values.get("top"))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what some work returns; cancel it when the client goes away. The body has been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task.cancelled():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _events(call: Call, chunks: AsyncGenerator[Mapping[str, Any], None]) -> AsyncIterator[dict[str, str]]:
    """Yield the server-sent events of an answer in chunks. An error is the last but one, as OpenAI's clients expect it."""
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield {"data": json.dumps(chunk, ensure_ascii=False)}
        except Exception as error:  # noqa: BLE001  the status is sent already
            told = as_api_error(error)
            call.log["error"] = told.code or "failed"
            yield {"data": json.dumps(told.body())}
    yield {"data": "[DONE]"}
