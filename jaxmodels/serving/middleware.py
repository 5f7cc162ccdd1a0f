"""What surrounds every request: its number, the log and the metrics; keys, rates and origins; and the size of its body."""

import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxmodels.serving.access import Access
from jaxmodels.serving.errors import ApiError, as_api_error
from jaxmodels.serving.service import Call, Service

LOG = logging.getLogger("jaxmodels.access")
_PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds; logged only when they fail
GUARDED = "/v1/"  # what needs a key; health, metrics, the page and the documents do not


def refusal(error: ApiError) -> JSONResponse:
    """Return the answer that tells an error."""
    return JSONResponse(error.body(), error.status, dict(error.headers))


class Recorded:
    """Numbers, times and logs requests, and answers errors that nothing else has."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call, number, status, gone, sent, complete = Call(), uuid.uuid4().hex, 0, False, 0, False
        scope.setdefault("state", {})["call"] = call

        async def numbered(message: Message) -> None:
            nonlocal status, sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            elif not message.get("more_body"):
                complete = True  # after which the server says that the client has gone, whether it has or not
            sent += len(message.get("body", b""))
            await send(message)

        async def watched() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        try:
            await self._app(scope, watched, numbered)
        except SendTimeoutError:
            gone = True
        except Exception as error:  # noqa: BLE001  the last place that can tell the client
            if status == 0:
                await refusal(as_api_error(error))(scope, receive, numbered)
            else:
                as_api_error(error)  # prints it
        finally:
            call.end()
            self._record(scope, call, number, status, gone, sent)

    def _record(self, scope: Scope, call: Call, number: str, status: int, gone: bool, sent: int) -> None:
        seconds, metrics = time.monotonic() - call.started, self._service.metrics
        endpoint = call.log.pop("endpoint", None)
        if endpoint is not None:
            metrics.requests.labels(call.model, endpoint, "499" if gone and not call.log.get("finish") else str(status)).inc()
            metrics.seconds.labels(call.model, endpoint).observe(seconds)
            if gone:
                metrics.disconnects.labels(endpoint).inc()
        if (code := call.log.get("error")) is not None:
            metrics.errors.labels(call.model, code).inc()
        if below(scope) in _PROBES and status == 200:
            return
        entry: dict[str, Any] = {"time": round(time.time(), 3), "id": number, "client": (scope.get("client") or ("",))[0]}
        entry |= {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4), "bytes": sent}
        entry |= ({"model": call.model} if call.model else {}) | ({"disconnected": True} if gone else {}) | call.log
        LOG.info("%s", json.dumps(entry, ensure_ascii=False, default=str))


class Guarded:
    """Checks origin, key and rate of what needs a key, and limits the body."""

    def __init__(self, app: ASGIApp, service: Service, access: Access, origins: Sequence[str]):
        self._app, self._service, self._access, self._origins = app, service, access, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not below(scope).startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        headers, call = Headers(scope=scope), scope["state"]["call"]
        try:
            self._check_origin(headers)
            caller = self._access.caller(headers.get("authorization"), (scope.get("client") or ("unknown",))[0])
            call.log["caller"] = caller.name
            if scope["method"] == "POST":
                self._access.count(caller)
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self._service.limits.body:
                raise self._too_large()
        except ApiError as error:
            call.log["error"] = error.code
            await refusal(error)(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._service.limits.body:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse what another site's page sends through a visitor's browser."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins or urlsplit(origin).netloc == headers.get("host"):
            return
        raise ApiError(403, f"pages of {origin[:200]} may not ask this service (--cors names those that may).", code="origin_refused")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the limit of {self._service.limits.body:,} bytes.", code="too_large", headers={"Connection": "close"})


def below(scope: Scope) -> str:
    """Return the path below the place where the app is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))
