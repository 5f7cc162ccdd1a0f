"""Chat templates: a conversation as text in a model's format, and the parts of the text that are the assistant's.

A template is a Jinja2 program in the tokenizer's files. It is untrusted, so it runs in Jinja's sandbox on plain data. It has no access to the
clock, so that the same conversation always gives the same text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.errors import ConfigError, optional_import

Message = Mapping[str, Any]
Span = tuple[int, int]

# Mark the text between {% generation %} and {% endgeneration %}: Unicode noncharacters, which occur in no text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class TemplateProblem(ValueError):
    """A template cannot render a conversation, or the assistant's parts cannot be located."""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, template: str, names: Mapping[str, str], special: Sequence[str]):
        """
        Args:
          template: Jinja2 source.
          names: variables other than the messages: `bos_token`, `eos_token`, ….
          special: the tokenizer's special tokens, which mark the end of a turn.

        Raises:
          ConfigError: the template cannot be parsed; Jinja2 is not installed.
        """
        self._template, self.marks_answers = _compiled(template)
        self._names, self._special = dict(names), [token for token in special if token]

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Mapping] | None = None) -> str:
        """Return the conversation as text.

        Args:
          messages: each with `role` and `content`.
          prompt: whether the text continues to the start of the assistant's next answer.
          tools: descriptions of functions that the assistant may call, for templates that use them.

        Raises:
          TemplateProblem: the template rejects the conversation, or prints an undefined variable.
        """
        return self._render(messages, prompt, tools)[0]

    def answers(self, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None) -> tuple[str, list[Span]]:
        """Return the conversation as text, and the spans of characters of the assistant's answers, each with the token that ends its turn.

        A template may mark answers itself, with {% generation %} and {% endgeneration %}. Otherwise an answer begins at the end of the prompt
        rendered from the messages before it, and ends at the end of the text rendered up to it, without white space after the last special token.

        Raises:
          TemplateProblem: as `render`; or the answers cannot be located.
        """
        text, spans = self._render(messages, False, tools)
        if self.marks_answers:
            return text, spans
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._span(text, messages, i, tools) for i in numbers]

    def _render(self, messages: Sequence[Message], prompt: bool, tools) -> tuple[str, list[Span]]:
        jinja2 = optional_import("jinja2", "huggingface")
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            marked = self._template.render(messages=plain, tools=tools, documents=None, add_generation_prompt=prompt, **self._names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateProblem(f"the chat template rejects the conversation: {error}") from error
        return _without_marks(marked)

    def _span(self, text: str, messages: Sequence[Message], number: int, tools) -> Span:
        """Return the span of message `number`, an answer, in the whole text."""
        start = len(before := self.render(messages[:number], prompt=True, tools=tools))
        if not text.startswith(before):
            raise TemplateProblem(
                f"the text of the conversation does not begin with the prompt that the chat template renders for the messages before message {number}, so the "
                "assistant's text cannot be located. "
                "Name a copy of the template with data.template, and put {% generation %} … {% endgeneration %} around the assistant's text in it."
            )
        after = self.render(messages[: number + 1], tools=tools)
        if text.startswith(after):
            return start, self._end_of_turn(text, start, len(after))
        # Templates that omit the reasoning of earlier answers render an answer differently while it is the last.
        content = str(messages[number].get("content") or "").strip()
        place = text.find(content, start) if content else -1
        ends = [text.find(token, place + len(content)) for token in self._special] if place >= 0 else []
        ends = [(end, -len(token)) for end, token in zip(ends, self._special, strict=True) if end >= 0] if ends else []
        if not ends:
            raise TemplateProblem(f"message {number}: the output of the chat template does not contain its text, or no special token ends it.")
        end, size = min(ends)
        return start, end - size

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Return `end` without the white space after the last special token."""
        kept = len(text[start:end].rstrip()) + start
        return kept if kept > start and any(text.endswith(token, start, kept) for token in self._special) else end


def _without_marks(marked: str) -> tuple[str, list[Span]]:
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


def _split(marked: str):
    """Yield marks, and the text between them."""
    begin = 0
    for place, character in enumerate(marked):
        if character in (OPEN, CLOSE):
            yield marked[begin:place]
            yield character
            begin = place + 1
    yield marked[begin:]


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
    """Return a compiled template, and whether it marks answers; ConfigError if it cannot be parsed."""
    jinja2 = optional_import("jinja2", "huggingface")
    from jinja2 import ext, nodes, sandbox

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

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=Missing, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        tree = environment.parse(template)
        marks = any(isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock))
        return environment.from_string(template), marks
    except jinja2.TemplateError as error:
        raise ConfigError(f"config.data.template: the chat template cannot be read: {error} (line {getattr(error, 'lineno', '?')}).") from error
