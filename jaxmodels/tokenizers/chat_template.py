"""Chat templates: a conversation as text in a model's format, and the parts of the text that are the assistant's.

A template is a Jinja2 program in the tokenizer's files, and untrusted. It runs in Jinja's sandbox on plain data, in a process of its own with
limits on its time and memory (`render_chat.py`): a loop, `10**10**10` or `'a' * 10**10` cannot be stopped within this process. It has no
access to the clock, so that the same conversation always gives the same text.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError, optional_import

Message = Mapping[str, Any]
Span = tuple[int, int]

# Mark the text between {% generation %} and {% endgeneration %}: Unicode noncharacters, which occur in no text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"

SECONDS = 5.0  # of processor time for one conversation; an honest template needs milliseconds
MEMORY = 1 << 30  # bytes of address space of the process; it needs 0.1 GiB
CHARACTERS = 10_000_000  # of the text of a conversation


class TemplateProblem(ValueError):
    """A template cannot render a conversation, or the assistant's parts cannot be located."""


class ChatTemplate:
    """A chat template. All templates of a Python process are rendered by one child process, which starts with the first."""

    def __init__(self, template: str, names: Mapping[str, str], special: Sequence[str]):
        """
        Args:
          template: Jinja2 source.
          names: variables other than the messages: `bos_token`, `eos_token`, ….
          special: the tokenizer's special tokens, which mark the end of a turn.

        Raises:
          ConfigError: the template cannot be parsed; Jinja2 is not installed.
        """
        optional_import("jinja2", "huggingface")
        self._request = {"template": template, "names": dict(names), "special": [token for token in special if token]}
        self._known: tuple[subprocess.Popen, int] | None = None  # the process that knows this template, and by which number
        try:
            self._ask({"do": "compile"})
        except TemplateProblem as error:
            raise ConfigError(f"config.data.template: the chat template cannot be read: {error}.") from error

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Mapping] | None = None) -> str:
        """Return the conversation as text.

        Args:
          messages: each with `role` and `content`.
          prompt: whether the text continues to the start of the assistant's next answer.
          tools: descriptions of functions that the assistant may call, for templates that use them.

        Raises:
          TemplateProblem: the template rejects the conversation, prints an undefined variable, fails, or exceeds a limit.
        """
        return self._ask({"do": "render", "messages": list(messages), "prompt": prompt, "tools": tools})["text"]

    def answers(self, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the spans of characters of the assistant's answers, each with the token that ends its turn.

        A template may mark answers itself, with {% generation %} and {% endgeneration %}. Otherwise an answer begins at the end of the prompt
        rendered from the messages before it, and ends at the end of the text rendered up to it, without white space after the last special token.

        Raises:
          TemplateProblem: as `render`; or the answers cannot be located.
        """
        answer = self._ask({"do": "answers", "messages": list(messages), "tools": tools})
        return answer["text"], [tuple(span) for span in answer["spans"]]

    def _ask(self, request: Mapping[str, Any]) -> dict:
        with _RENDERER.lock:
            process, known = _RENDERER.running(), self._known
            if known is None or known[0] is not process:  # a process that was started again knows no template
                known, request = (process, _RENDERER.next()), self._request | request
            answer = _RENDERER.ask(request | {"number": known[1]})
            self._known = known
        if "problem" in answer:
            raise TemplateProblem(answer["problem"])
        return answer


class _Renderer:
    """The process that renders. It does not import this package, whose libraries reserve more address space than its limit."""

    def __init__(self):
        self.lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner, self._count = 0, 0

    def running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            program = [sys.executable, "-P", str(Path(__file__).with_name("render_chat.py")), str(SECONDS), str(MEMORY), str(CHARACTERS)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # Jinja2 from where this process would import it
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            if not self._owner:
                atexit.register(self.kill)
            self._owner = os.getpid()
        return self._process

    def next(self) -> int:
        self._count += 1
        return self._count

    def ask(self, request: Mapping[str, Any]) -> dict:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            text = json.dumps(request).encode() + b"\n"
        except RecursionError as error:
            raise TemplateProblem("the conversation is nested too deeply") from error
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # a signal between request and answer
            self.stop()
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        status = self.stop()
        if status == -signal.SIGPROF:
            return {"problem": f"the chat template takes more than {SECONDS:g} s of processor time, and was stopped"}
        return {"problem": f"the chat template ended the process that renders it (status {status}), which has {MEMORY >> 20:,} MiB of memory"}

    def kill(self) -> None:
        """End a process that has nothing to do."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self.stop()

    def stop(self) -> int | None:
        """Forget the process, and return its status once it has ended."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        try:
            return process.wait(0.2)  # it ends by itself, by a signal; but not if this process was interrupted
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


_RENDERER = _Renderer()
