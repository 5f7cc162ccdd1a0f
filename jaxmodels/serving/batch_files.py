"""Files of requests in OpenAI's batch format, answered by the same functions as HTTP: one JSON object a line, in and out."""

import asyncio
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.serving.application import ANSWERS
from jaxmodels.serving.errors import as_api_error, bad
from jaxmodels.serving.requests import Busy
from jaxmodels.serving.service import Call, Service

_AGAIN_SECONDS = 1.0  # after which a request that found the queue full is tried again, at most

Line = dict[str, Any]


def read_requests(file: Path) -> list[Line]:
    """Return the requests of a file.

    Raises:
      ConfigError: the file cannot be read, a line is no request, or two have one custom_id; names the line.
    """
    found: dict[str, Line] = {}
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: it is not JSON: {error}.") from error
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str) or not isinstance(request.get("body"), dict):
            raise ConfigError(f"{where}: a request has custom_id, a text, and body, an object, beside method and url.")
        if request.get("method", "POST") != "POST" or request.get("url") not in ANSWERS:
            raise ConfigError(f"{where}: method and url are {request.get('method')!r} and {request.get('url')!r}; there are POST and {', '.join(ANSWERS)}.")
        if request["custom_id"] in found:
            raise ConfigError(f"{where}: the custom_id {request['custom_id']!r} is there twice.")
        found[request["custom_id"]] = request
    if not found:
        raise ConfigError(f"{file} has no request.")
    return list(found.values())


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not blank."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise ConfigError(f"--batch={file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--batch={file} is not UTF-8: {error.reason} at byte {error.start}.") from error


def answered(file: Path) -> set[str]:
    """Return the custom_id of each answer in a file that an earlier call has written, and cut off a last line that it did not finish."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as opened:
            opened.truncate(whole)
    found = set()
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found.add(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--output={file}, line {number}: it is no answer of this command. Give another file.") from error
    return found


def answer_file(service: Service, requests: list[Line], output: Path, *, together: int, progress: Callable[[], None] = lambda: None) -> int:
    """Append the answer of each request to a file as soon as it is there; return the number of those that are errors.

    Args:
      service: with its models.
      requests: of `read_requests`.
      output: a line is added for each request, in the order in which they end.
      together: requests that are answered at once.
      progress: called after each.

    Raises:
      Interrupted: SIGTERM or SIGINT; the same call with the requests that are left goes on.
    """
    return asyncio.run(_answer_all(service, requests, output, together, progress))


async def _answer_all(service: Service, requests: list[Line], output: Path, together: int, progress: Callable[[], None]) -> int:
    waiting, wrong, received = iter(requests), 0, []
    with output.open("a", encoding="utf-8") as file:

        async def work() -> None:
            nonlocal wrong
            for request in waiting:
                answer = await _answer(service, request)
                wrong += answer["response"]["status_code"] != 200
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                progress()

        workers = asyncio.gather(*(work() for _ in range(min(together, len(requests)))))

        def stop(name: str) -> None:
            received.append(name)
            workers.cancel()

        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT"):
            loop.add_signal_handler(getattr(signal, name), stop, name)
        try:
            await workers
        except asyncio.CancelledError:
            if not received:
                raise
            raise Interrupted(f"{received[0]}: stopped; the same command goes on with the requests that have no answer yet.") from None
    return wrong


async def _answer(service: Service, request: Line) -> Line:
    """Return the line of the answer of a request."""
    number, call = uuid.uuid4().hex, Call()
    while True:
        try:
            if request["body"].get("stream"):
                raise bad("stream: an answer in a file is whole; leave it out.", "stream", "unsupported")
            status, body = 200, await ANSWERS[request["url"]](service, call, json.dumps(request["body"]).encode())
        except Busy as error:
            await asyncio.sleep(min(error.retry_after, _AGAIN_SECONDS))
            continue
        except Exception as error:  # noqa: BLE001  one request's error is not another's
            told = as_api_error(error)
            status, body = told.status, told.body()
        finally:
            call.end()
        return {
            "id": f"batch_req_{number}",
            "custom_id": request["custom_id"],
            "response": {"status_code": status, "request_id": number, "body": body},
            "error": None,
        }
