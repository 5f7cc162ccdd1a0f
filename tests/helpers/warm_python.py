"""Start Python programs in processes that have imported JAX and jaxmodels already: to import them takes two seconds of every start.

A server, one for each process of pytest, imports them once and forks a process for each start; it has touched no device. The processes become
children of pytest: they are waited for, get signals and end as any others. Programs with other settings of JAX, and on other systems than Linux, start
as usual.

    process = warm_python.Popen(["-m", "jaxmodels", "train", ...], stdout=PIPE, text=True)      # python -m jaxmodels train ...
    done = warm_python.run(["-c", program], capture_output=True, text=True)

Use subprocess for a program that must see the imports.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
IMPORTS = ("jaxmodels.cli.train", "jaxmodels.api", "jaxmodels.training.trainer", "jaxmodels.inference.run", "grain", "rich.console")
OPTIONS = {"cwd", "env", "stdin", "stdout", "stderr", "text"}
SET_CHILD_SUBREAPER = 36  # of prctl.h
LOCK = threading.Lock()


def _read_on_import(environment) -> dict[str, str]:
    """Return the variables that JAX reads when it is imported."""
    return {name: value for name, value in environment.items() if name.startswith("JAX_")}


SETTINGS = _read_on_import(os.environ)  # of the server: tests import this module before they change variables


def run(arguments, *, capture_output=False, timeout=None, **options):
    """Run a program to its end; as subprocess.run([sys.executable, *arguments])."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class Popen(subprocess.Popen):
    """As subprocess.Popen([sys.executable, *arguments])."""

    def __init__(self, arguments, **options):
        assert options.keys() <= OPTIONS, options
        super().__init__([sys.executable, *map(str, arguments)], **options)

    if sys.platform == "linux":

        def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others):
            """Start the program, after the pipes were made."""
            pipes = others[:6]  # two ends each for the standard input, output and error; -1 for a stream that is pytest's
            environment = {name: str(value) for name, value in (os.environ if env is None else env).items()}
            if _read_on_import(environment) != SETTINGS:
                super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others)
                return
            start = json.dumps({"arguments": args[1:], "cwd": str(cwd or os.getcwd()), "environment": environment}).encode()
            streams = [number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
            with LOCK:
                server = _server()
                _adopt(True)
                socket.send_fds(server, [len(start).to_bytes(8, "big")], streams)
                server.sendall(start)
                self.pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
                _adopt(False)
            self._child_created = True
            self._close_pipe_fds(*pipes)


def _adopt(active: bool) -> None:
    """Make this process the parent of processes below it whose own parent ends now. Others must stay with init, which collects them when they end."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, int(active), 0, 0, 0)


@functools.cache
def _server() -> socket.socket:
    """Start the server; return the connection to it, with which it ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | SETTINGS,
        )
    atexit.register(ours.close)
    return ours


def _serve(connection: socket.socket) -> dict:
    """Fork a process for each start. Returns in these processes, what to run; never in the server."""
    while True:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not size:
            os._exit(0)
        start = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        reader, writer = os.pipe()
        between = os.fork()  # ends at once, so that pytest becomes the parent of the next
        if not between:
            program = os.fork()
            if program:
                os.write(writer, program.to_bytes(8, "big"))
                os._exit(0)
            connection.close()
            for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
                os.dup2(stream, number)
                setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
                setattr(sys, f"__{name}__", getattr(sys, name))
            for descriptor in (reader, writer, *streams):
                os.close(descriptor)
            return start
        os.waitpid(between, 0)
        connection.sendall(os.read(reader, 8))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)


def _execute(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run `python ARGUMENTS`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.reconfigure(write_through=bool(environment.get("PYTHONUNBUFFERED")))
    sys.stderr.reconfigure(line_buffering=True)
    random.seed()
    importlib.import_module("numpy").random.seed()
    kind, sys.argv = (arguments[0], arguments[1:]) if arguments[0] in ("-m", "-c") else ("", arguments)
    own = [str(Path(arguments[0]).resolve().parent)] if not kind else [""] if kind == "-c" else [cwd]
    paths = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = own + [path for path in paths if path not in sys.path]
    if kind == "-c":
        program, sys.argv = sys.argv[0], ["-c", *sys.argv[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for module in IMPORTS:
        importlib.import_module(module)
    gc.freeze()  # the collector would copy pages that processes share
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _execute(**request)
