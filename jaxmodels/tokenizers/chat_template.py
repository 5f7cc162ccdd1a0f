"""Chat templates: a conversation as the text that a model was trained on, and which parts of it are the assistant's.

A template is a Jinja2 program in the tokenizer's files. It comes with a model from anywhere, so it runs in Jinja's sandbox, sees plain data
only, and is given no clock: the same conversation is the same text on every day.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels.errors import ConfigError, optional_import

Message = Mapping[str, Any]
Span = tuple[int, int]

# Around what a template puts between {% generation %} and {% endgeneration %}; no text has these, which Unicode keeps for such uses.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


class TemplateProblem(ValueError):
    """A conversation that a template cannot write, or of which it does not show what the assistant says."""


class ChatTemplate:
    """A template of conversations, compiled."""

    def __init__(self, template: str, names: Mapping[str, str], special: Sequence[str]):
        """
        Args:
          template: in Jinja2.
          names: what it may call by name besides the messages: `bos_token`, `eos_token`, ….
          special: the tokenizer's special tokens, by which a turn's end is found.

        Raises:
          ConfigError: the template cannot be parsed; Jinja2 is not installed.
        """
        self._template, self.marks_answers = _compiled(template)
        self._names, self._special = dict(names), [token for token in special if token]

    def render(self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Mapping] | None = None) -> str:
        """The conversation as text.

        Args:
          messages: each with `role` and `content`.
          prompt: whether the text goes on to where the assistant's next answer begins.
          tools: descriptions of functions that the assistant may call, for templates that tell of them.

        Raises:
          TemplateProblem: the template refuses the conversation, or prints what there is not.
        """
        return self._render(messages, prompt, tools)[0]

    def answers(self, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None) -> tuple[str, list[Span]]:
        """The conversation as text, and which characters of it the assistant says, each answer with the token that ends its turn.

        A template may mark them itself, with {% generation %} and {% endgeneration %}. In others an answer begins where the prompt made of the
        messages before it ends; it ends with the text of the conversation up to it, without the white space that follows its last special token.

        Raises:
          TemplateProblem: as `render`; or the parts cannot be told.
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
            raise TemplateProblem(f"the chat template does not take it: {error}") from error
        return _without_marks(marked)

    def _span(self, text: str, messages: Sequence[Message], number: int, tools) -> Span:
        """Where the answer `number` stands in the whole text."""
        start = len(before := self.render(messages[:number], prompt=True, tools=tools))
        if not text.startswith(before):
            raise TemplateProblem(
                f"the chat template writes something else before message {number} than it asks for an answer with: what the assistant says cannot be "
                "told. Put {% generation %} … {% endgeneration %} around it, in a copy of the template that data.template names."
            )
        after = self.render(messages[: number + 1], tools=tools)
        if text.startswith(after):
            return start, self._end_of_turn(text, start, len(after))
        # Templates that leave out what was thought before earlier answers write an answer in another way while it is the last.
        content = str(messages[number].get("content") or "").strip()
        place = text.find(content, start) if content else -1
        ends = [text.find(token, place + len(content)) for token in self._special] if place >= 0 else []
        ends = [(end, -len(token)) for end, token in zip(ends, self._special, strict=True) if end >= 0] if ends else []
        if not ends:
            raise TemplateProblem(f"message {number} does not stand in the text that the chat template writes, or has no token at its end.")
        end, size = min(ends)
        return start, end - size

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """`end` without the white space after the last special token."""
        kept = len(text[start:end].rstrip()) + start
        return kept if kept > start and any(text.endswith(token, start, kept) for token in self._special) else end


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """The text, and the spans that were marked in it; of marks inside of marks the outer."""
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
    """Marks, and the text between them."""
    begin = 0
    for place, character in enumerate(marked):
        if character in (OPEN, CLOSE):
            yield marked[begin:place]
            yield character
            begin = place + 1
    yield marked[begin:]


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
    """A template and whether it marks answers; ConfigError where it cannot be parsed."""
    jinja2 = optional_import("jinja2", "huggingface")
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} … {% endgeneration %}: around what the model says."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return f"{OPEN}{caller()}{CLOSE}"

    class Missing(jinja2.Undefined):
        """Templates ask whether something is there; to print what is not is a mistake."""

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
