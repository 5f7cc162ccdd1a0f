"""The program that renders chat templates: `python render_chat.py SECONDS MEMORY CHARACTERS`, with a JSON object a line on its standard streams.

It sets limits for itself: an interval timer, which the kernel ends it by (SIGPROF) after SECONDS of processor time for one request, and the
size of its address space. It imports nothing of this package.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # as in chat_template.py


class Problem(Exception):
    """The conversation cannot be rendered, or the assistant's parts cannot be located."""


class Generation(ext.Extension):
    """{% generation %} … {% endgeneration %}: around the text of the assistant."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return f"{OPEN}{caller()}{CLOSE}"


class Missing(jinja2.Undefined):
    """Undefined variables may be tested, but not printed."""

    def __str__(self):
        return "" if self._undefined_name is None else self._fail_with_undefined_error()


def _refuse(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Template:
    """A compiled template."""

    def __init__(self, template: str, names: Mapping[str, str], special: Sequence[str], most: int):
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=Missing, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            tree = environment.parse(template)
            self._marks_answers = any(isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock))
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise Problem(f"{error} (line {getattr(error, 'lineno', '?')})") from error
        except Exception as error:
            raise Problem(_text(error)) from error
        self._names, self._special, self._most = names, special, most

    def render(self, messages: Sequence[Mapping], prompt: bool, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the marked spans in it."""
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            marked = self._template.render(messages=plain, tools=tools, documents=None, add_generation_prompt=prompt, **self._names)
        except jinja2.TemplateError as error:
            raise Problem(f"the chat template rejects the conversation: {error}") from error
        except Exception as error:
            raise Problem(f"the chat template rejects the conversation: {_text(error)}") from error
        if len(marked) > self._most:
            raise Problem(f"the chat template writes {len(marked):,} characters; at most {self._most:,} are accepted")
        return _without_marks(marked)

    def answers(self, messages: Sequence[Mapping], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans of the assistant's answers; see `ChatTemplate.answers`."""
        text, spans = self.render(messages, False, tools)
        if self._marks_answers:
            return text, spans
        return text, [self._span(text, messages, i, tools) for i, message in enumerate(messages) if message["role"] == "assistant"]

    def _span(self, text: str, messages: Sequence[Mapping], number: int, tools: Any) -> tuple[int, int]:
        """Return the span of message `number`, an answer, in the whole text."""
        start = len(before := self.render(messages[:number], True, tools)[0])
        if not text.startswith(before):
            raise Problem(
                f"the text of the conversation does not begin with the prompt that the chat template renders for the messages before message {number}, so the "
                "assistant's text cannot be located. "
                "Name a copy of the template with data.template, and put {% generation %} … {% endgeneration %} around the assistant's text in it."
            )
        after = self.render(messages[: number + 1], False, tools)[0]
        if text.startswith(after):
            return start, self._end_of_turn(text, start, len(after))
        # Templates that omit the reasoning of earlier answers render an answer differently while it is the last.
        content = str(messages[number].get("content") or "").strip()
        place = text.find(content, start) if content else -1
        ends = [text.find(token, place + len(content)) for token in self._special] if place >= 0 else []
        ends = [(end, -len(token)) for end, token in zip(ends, self._special, strict=True) if end >= 0] if ends else []
        if not ends:
            raise Problem(f"message {number}: the output of the chat template does not contain its text, or no special token ends it.")
        end, size = min(ends)
        return start, end - size

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Return `end` without the white space after the last special token."""
        kept = len(text[start:end].rstrip()) + start
        return kept if kept > start and any(text.endswith(token, start, kept) for token in self._special) else end


def _text(error: Exception) -> str:
    """Return type and message of an error that is not Jinja's."""
    if isinstance(error, MemoryError):
        return "out of memory: it needs more than its limit"
    return f"{type(error).__name__}: {str(error)[:300]}".removesuffix(": ")


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the marked spans in it; of nested marks the outer."""
    parts, spans, size, depth, start = [], [], 0, 0, 0
    for piece in _split(marked):
        if piece == OPEN:
            start, depth = (size, 1) if not depth else (start, depth + 1)
        elif piece == CLOSE:
            depth -= 1
            if not depth and size > start:
                spans.append((start, size))
        else:
            parts.append(piece)
            size += len(piece)
    return "".join(parts), spans


def _split(marked: str) -> Iterator[str]:
    """Yield marks, and the text between them."""
    begin = 0
    for place, character in enumerate(marked):
        if character in (OPEN, CLOSE):
            yield marked[begin:place]
            yield character
            begin = place + 1
    yield marked[begin:]


def main(seconds: float, memory: int, most: int) -> None:
    """Answer requests until the standard input ends.

    Args:
      seconds: of processor time for a request.
      memory: bytes of address space; no limit on other systems than Linux, whose kernels refuse one.
      most: characters of a text.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # terminals and schedulers send them to the process that asks and to this one, which ends with that
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    templates: dict[int, Template] = {}
    while line := sys.stdin.buffer.readline():
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer: dict[str, Any] = {}
        try:
            request = json.loads(line)
            number = request["number"]
            if "template" in request:
                templates[number] = Template(request["template"], request["names"], request["special"], most)
            if request["do"] != "compile":
                template = templates[number]
                arguments = (request["prompt"], request["tools"]) if request["do"] == "render" else (request["tools"],)
                answer["text"], answer["spans"] = getattr(template, request["do"])(request["messages"], *arguments)
        except Problem as problem:
            answer = {"problem": str(problem)}
        except (MemoryError, RecursionError) as error:
            answer = {"problem": _text(error)}
        text = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
