"""Conversations, for fine-tuning on what the assistant says in them."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.features import hold_out, padded
from jaxmodels.data.files import find_files
from jaxmodels.data.packing import Packed
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.source import Arrays, Dataset, find_file
from jaxmodels.data.sources.rows import lines
from jaxmodels.data.tokens import Tokens
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.chat_template import CLOSE, OPEN, ChatTemplate, TemplateProblem
from jaxmodels.tokenizers.factory import make_tokenizer
from jaxmodels.tokenizers.pretrained import PublishedTokenizer

FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}  # of `conversations`


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row as it is read.

    Attributes:
      where: file and line.
      messages: each with `role` and `content`.
      tools: functions that the assistant may call.
      problem: why the row is malformed, if it is.
    """

    where: str
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    problem: str | None = None


def chat(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    template: str | None = None,
    loss: Literal["answers", "all"] = "answers",
    packing: Literal["examples", "none"] = "examples",
    truncate: bool = True,
    holdout: float = 0.1,
    validation: str | None = None,
    test: str | None = None,
    on_bad_example: Policy = "error",
) -> Dataset:
    """Files of JSON lines with a conversation in each, as the chat template of a published tokenizer writes it.

    A line has `messages`, [{"role": …, "content": …}, …], where roles are `system` (first, if at all), `user` and `assistant` in turn, and
    `tool`, which answers the assistant; or `prompt` and `completion`, both texts or both lists of messages; or `conversations`,
    [{"from": "human", "value": …}, …]. `tools` beside them is handed to the template.

    Examples: `tokens` int32 [T + 1], `counts` bool [T + 1], whether a token is one to learn, and with `packing` `examples` also `segments`
    int32 [T + 1]; padded with -1. A conversation is never cut in two.

    Args:
      path: files, as `files.find_files` reads it; relative to the working directory or else to the data directory.
      data_dir: the data directory.
      sequence_length: tokens that a model reads in one example, T.
      tokenizer: `hf:DIR_OR_ID`, or a run that has a published one.
      template: a file with a chat template, instead of the tokenizer's own.
      loss: `answers`, on what the assistant says with the token that ends its turn, or `all`, on everything.
      packing: `examples`, several conversations in a row, which `segments` tells apart, or `none`, one in each.
      truncate: longer conversations are cut at their end, counted and told of; otherwise they are bad examples.
      holdout: share of the conversations that validates where `validation` names no files, drawn by a fixed draw; 0 for none.
      validation, test: files of that split, given like `path`.
      on_bad_example: `error`, or `skip`: left out, counted, and told of.

    Raises:
      ConfigError: a file is missing; the tokenizer has no template; with `error` also a bad conversation, by file and line.
    """
    if sequence_length < 1 or not 0 <= holdout < 1:
        raise ConfigError(f"config.data: sequence_length must be at least 1 and holdout in [0, 1), got {sequence_length} and {holdout}.")
    files = {"train": find_files(path, data_dir)}
    for split, paths in (("validation", validation), ("test", test)):
        if paths is not None:
            files[split] = find_files(paths, data_dir, f"config.data.{split}")
    coder = _with_template(make_tokenizer(tokenizer, (), data_dir), tokenizer, template, data_dir)
    parts = {split: [row for file in paths for row in _read(file)] for split, paths in files.items()}
    if "validation" not in parts and holdout:
        parts["train"], parts["validation"] = hold_out(parts["train"], holdout)
    skipping, encoder = Skipping(on_bad_example), _Encoder(coder, sequence_length, loss, truncate)
    splits, notes = {}, []
    for split, rows in parts.items():
        examples = []
        for row in rows:
            example = encoder.encode(row)
            if isinstance(example, str):
                skipping.bad(split, row.where, example)
            else:
                examples.append(example)
        skipping.check_rest(split, len(examples))
        splits[split] = _lay_out(examples, sequence_length, packing)
        notes += encoder.notes(split, examples)
        if packing == "examples":
            notes.append(f"{split}: {len(splits[split]):,} rows, {splits[split].fill:.1%} of their places filled")
    return Dataset(splits, {"vocab_size": coder.vocab_size, "tokenizer": coder}, notes=(*skipping.notes(), *notes), skipped=skipping.counts)


def template_of(tokenizer: PublishedTokenizer) -> ChatTemplate:
    """The chat template of a tokenizer, compiled; ConfigError where it has none."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "config.data.tokenizer: it has no chat template: models that were not trained on conversations come without one. Take the tokenizer of a "
            "model that was, or write a template in Jinja2 and name its file with data.template=FILE."
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_names, tokenizer.special_texts)


def _with_template(coder, name: Any, template: str | None, data_dir: str | None) -> PublishedTokenizer:
    if not isinstance(coder, PublishedTokenizer):
        raise ConfigError(f"config.data.tokenizer={name!r}: conversations need the tokenizer of a published model, hf:DIR_OR_ID, which has a chat template.")
    if template is None:
        return coder
    path = find_file(template, data_dir)
    try:
        with open(path, encoding="utf-8") as file:
            return coder.with_chat_template(file.read())
    except UnicodeDecodeError as error:
        raise ConfigError(f"config.data.template: {path} is not UTF-8 text.") from error


def _lay_out(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int, packing: str) -> Packed | Arrays:
    tokens, counts = zip(*examples, strict=True)
    if packing == "examples":
        ends = np.cumsum([len(row) for row in tokens], dtype=np.int64)
        return Packed(Tokens(np.concatenate(tokens)), ends, length, counts=np.concatenate(counts))
    # What is padded with -1 as whole numbers is True as a bool.
    rows = np.stack([padded(row, length + 1) for row in counts]) == 1
    return Arrays({"tokens": np.stack([padded(row, length + 1) for row in tokens]), "counts": rows})


# Reading


def _read(path: str) -> Iterator[Conversation]:
    if not os.path.getsize(path):
        raise ConfigError(f"{path}: the file is empty.")
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            yield _conversation(f"{path}, line {number}", line)


def _conversation(where: str, line: str) -> Conversation:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Conversation(where, problem=f"not JSON: {error}.")
    if not isinstance(row, dict):
        return Conversation(where, problem="not a JSON object.")
    try:
        messages = _messages(row)
        _check(messages)
        tools = row.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError("'tools' is not a list of descriptions.")
    except ValueError as error:
        return Conversation(where, problem=str(error))
    return Conversation(where, messages, tools or None)


def _messages(row: Mapping[str, Any]) -> list[dict]:
    """The messages of a row in any of its forms; ValueError says what is wrong."""
    if "messages" in row:
        return _list(row, "messages")
    if "conversations" in row:
        found = _list(row, "conversations")
        for number, message in enumerate(found):
            if not {"from", "value"} <= message.keys():
                raise ValueError(f"message {number} of 'conversations' has {', '.join(message) or 'nothing'}; it needs 'from' and 'value'.")
        return [{"role": _OTHER_NAMES.get(message["from"], message["from"]), "content": message["value"]} for message in found]
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return _list(row, "prompt") + _list(row, "completion")
    hint = config_lib.suggest("messages", row)
    raise ValueError(f"no 'messages', nor 'conversations', nor 'prompt' and 'completion'.{hint} The row has {', '.join(row) or 'nothing'}.")


def _list(row: Mapping[str, Any], key: str) -> list[dict]:
    if not isinstance(row[key], list) or not all(isinstance(message, dict) for message in row[key]):
        raise ValueError(f"{key!r} is not a list of messages.")
    return row[key]


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless roles are known and in order, and every message says something."""
    if not messages:
        raise ValueError("the conversation is empty.")
    before = None
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in FOLLOWS:
            hint = config_lib.suggest(role, FOLLOWS) if isinstance(role, str) else ""
            raise ValueError(f"message {number} has the role {role!r}; there are {', '.join(FOLLOWS)}.{hint}")
        if before not in FOLLOWS[role]:
            place = f"follows {before!r}" if before else "comes first"
            raise ValueError(f"message {number}: {role!r} {place}; user and assistant take turns, after at most one system message.")
        if not (isinstance(content, str) and content.strip()) and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"message {number} of {role!r} has {'no content' if content is None else f'the content {content!r}'}, not a text.")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the assistant says nothing: there is no answer to learn.")


class _Encoder:
    """Conversations to (tokens, counts)."""

    def __init__(self, tokenizer: PublishedTokenizer, length: int, loss: str, truncate: bool):
        self.tokenizer, self.length, self.loss, self.truncate, self.cut = tokenizer, length, loss, truncate, 0
        self.template, self.special = template_of(tokenizer), tokenizer.special_texts

    def encode(self, row: Conversation) -> tuple[np.ndarray, np.ndarray] | str:
        """int32 [tokens] and bool [tokens], T + 1 at most; or what is wrong with the row."""
        problem = row.problem or self._forged(row)
        if problem is not None:
            return problem
        try:
            text, spans = self.template.answers(row.messages, tools=row.tools)
        except TemplateProblem as error:
            return str(error)
        tokens, offsets = self.tokenizer.read(text)
        counts = np.ones(len(tokens), bool) if self.loss == "all" else in_spans(offsets, spans)
        if not counts[1:].any():
            return "the chat template marks nothing as the assistant's."
        if len(tokens) > self.length + 1:
            if not self.truncate:
                return f"{len(tokens)} tokens, where {self.length + 1} fit; raise data.sequence_length, or cut with data.truncate=true."
            if not counts[1 : self.length + 1].any():
                return f"no answer begins in the first {self.length + 1} of its {len(tokens)} tokens: nothing is left to learn; raise data.sequence_length."
            self.cut += 1
        return tokens[: self.length + 1], counts[: self.length + 1]

    def _forged(self, row: Conversation) -> str | None:
        """Whether a message holds what only a template may write, or what is no text."""
        for number, message in enumerate(row.messages):
            content = message.get("content") or ""
            forged = next((token for token in (*self.special, OPEN, CLOSE) if token and token in content), None)
            if forged is not None:
                return f"message {number} holds {forged!r}, a special token of the tokenizer, which would be read as the end or beginning of a turn."
            try:
                content.encode()
            except UnicodeEncodeError:
                return f"message {number} is not UTF-8."
        return None

    def notes(self, split: str, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[str]:
        """What to tell of a split; the count of what was cut begins anew."""
        learned, total = sum(int(counts.sum()) for _, counts in examples), sum(len(tokens) for tokens, _ in examples)
        cut, self.cut = self.cut, 0
        found = [f"{split}: {len(examples):,} conversations; {learned / total:.1%} of {total:,} tokens are to be learned"]
        return found + ([f"{cut:,} conversations of {split} are longer than data.sequence_length={self.length} and are cut"] if cut else [])


def in_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens stand for characters in any of some spans, from the first of a span to its last: bool [tokens].

    Args:
      offsets: int [tokens, 2], the characters of each token: from, to.
      spans: from, to.
    """
    result = np.zeros(len(offsets), bool)
    for start, end in spans:
        inside = np.flatnonzero(np.maximum(offsets[:, 0], start) < np.minimum(offsets[:, 1], end))
        if len(inside):
            result[inside[0] : inside[-1] + 1] = True
    return result
