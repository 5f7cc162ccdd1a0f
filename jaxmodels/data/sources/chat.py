"""Conversations, for fine-tuning on the assistant's messages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access, copies, fitted
from jaxmodels.data.evaluation_sets import EvaluationSets, key_of
from jaxmodels.data.features.base import Problem, Row, padded
from jaxmodels.data.files import find_file, find_files
from jaxmodels.data.holdout import hold_out
from jaxmodels.data.keys import takes
from jaxmodels.data.packing import Packed
from jaxmodels.data.rows import Holdout, encode_all
from jaxmodels.data.skipping import Skipping
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.data.sources.rows import json_records
from jaxmodels.data.text_lines import is_utf8, not_utf8
from jaxmodels.data.tokens import Tokens
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.chat_template import CLOSE, OPEN, ChatTemplate, TemplateProblem
from jaxmodels.tokenizers.factory import is_trained, make_tokenizer
from jaxmodels.tokenizers.pretrained import PretrainedTokenizer

FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_WEIGHTS = ("weight", "train")  # of a message: whether it is learned
_REFUSED = {  # keys of a row that change what is learned
    "weight": "a weight is one of a message",
    "functions": "write them as 'tools'",
    "chosen": "pairs of a better and a worse answer are no conversations",
    "rejected": "pairs of a better and a worse answer are no conversations",
    "documents": "templates get no documents",
    "chat_template_kwargs": "templates get no arguments of a row",
}
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}  # of `conversations`


@takes(Holdout, EvaluationSets)
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
    validation: str | None = None,
    test: str | None = None,
    **keys: Any,
) -> Dataset:
    """Read JSON lines files with a conversation in each line, rendered by the chat template of a pretrained model's tokenizer.

    A line has `messages`, [{"role": …, "content": …}, …], where roles are `system` or `developer` (first, if present), `user` and `assistant` in
    turn, and `tool`, which answers the assistant; or `prompt` and `completion`, both texts or both lists of messages; or `conversations`,
    [{"from": "human", "value": …}, …]; or `instruction`, `input` (may be empty) and `output`, as Alpaca has them. `content` is a text, or a
    list of parts that are texts. Next to them may be `system`, the text of a first message, and `tools`, which are passed to the template. An
    assistant's message with `weight` 0, or `train` false, is not learned. A file may also hold one array of such objects.

    Examples: `tokens` int32 [T + 1], `counts` bool [T + 1], whether a token counts in the loss, and with `packing='examples'` also
    `segments` int32 [T + 1]; padded with -1. A conversation is never split over two rows.

    Args:
      path: files, as `files.find_files` reads them; relative to the working directory or else to the data directory.
      data_dir: the data directory.
      sequence_length: tokens that a model reads in one example, T.
      tokenizer: `hf:DIR_OR_ID`, or a run with a pretrained model's tokenizer.
      template: file of a chat template, instead of the tokenizer's own.
      loss: `answers`, on the assistant's messages with the token that ends its turn, or `all`, on every token.
      packing: `examples`, several conversations in a row, separated by `segments`, or `none`, one in each.
      truncate: whether longer conversations are cut at their end, which the run reports; otherwise they are bad examples.
      validation, test: files of that split, given like `path`.

    Raises:
      ConfigError: a file is missing; the tokenizer has no template; with `on_bad_example='error'` also a bad conversation, by file and line.
    """
    if sequence_length < 1:
        raise ConfigError(f"config.data.sequence_length must be at least 1, got {sequence_length}.")
    options = Holdout.of(keys)
    files = {"train": find_files(path, data_dir)}
    for split, paths in {"validation": validation, "test": test, **EvaluationSets.of(keys).named()}.items():
        if paths is not None:
            files[split] = find_files(paths, data_dir, key_of(split))
    coder = _with_template(tokenizer, template, data_dir)
    copies.keep([file for paths in files.values() for file in paths])
    parts = {split: [row for file in paths for row in _read(file)] for split, paths in files.items()}
    if "validation" not in parts and options.holdout:
        parts["train"], parts["validation"] = hold_out(parts["train"], options.holdout)
    skipping, encoder = Skipping(options.on_bad_example), _Encoder(coder, sequence_length, loss, truncate)
    splits, notes = {}, []
    for split, rows in parts.items():
        examples = encode_all(split, rows, encoder.encode, skipping)
        splits[split] = _lay_out(examples, sequence_length, packing)
        notes += encoder.notes(split, examples)
        if packing == "examples":
            notes.append(f"{split}: {len(splits[split]):,} rows, {splits[split].fill:.1%} of their positions filled")
    return Dataset(splits, {"vocab_size": coder.vocab_size, "tokenizer": coder}, notes=(*skipping.notes(), *notes), skipped=skipping.counts)


def template_of(tokenizer: PretrainedTokenizer) -> ChatTemplate:
    """Return the compiled chat template of a tokenizer; ConfigError if it has none."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "config.data.tokenizer: it has no chat template: models that were not trained on conversations come without one. Use the tokenizer of a "
            "model that was, or write a template in Jinja2 and name its file with data.template=FILE."
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_names, tokenizer.special_texts)


def _with_template(spec: Any, template: str | None, data_dir: str | None) -> PretrainedTokenizer:
    """Return a pretrained model's tokenizer, with the template of a file if one is named."""
    coder = None if is_trained(spec) else make_tokenizer(spec, (), data_dir)
    if not isinstance(coder, PretrainedTokenizer):
        raise ConfigError(f"config.data.tokenizer={spec!r}: conversations need the tokenizer of a pretrained model, hf:DIR_OR_ID, which has a chat template.")
    if template is None or fitted.is_given():  # the tokenizer of a run has its template
        return coder
    path = find_file(template, data_dir, "config.data.template")
    try:
        with access.open_whole(path) as file:
            return coder.with_chat_template(file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config.data.template: {path} is not UTF-8 text.") from error


def _lay_out(examples: Sequence[tuple[np.ndarray, np.ndarray]], length: int, packing: str) -> Packed | Arrays:
    tokens, counts = zip(*examples, strict=True)
    if packing == "examples":
        ends = np.cumsum([len(row) for row in tokens], dtype=np.int64)
        return Packed(Tokens(np.concatenate(tokens)), ends, length, counts=np.concatenate(counts))
    rows = np.stack([padded(row, length + 1) for row in counts]) == 1  # padding is -1
    return Arrays({"tokens": np.stack([padded(row, length + 1) for row in tokens]), "counts": rows})


# Reading


def _read(path: str) -> Iterator[Row]:
    """Yield rows with the columns `messages` and `tools`."""
    if not access.identify(path).size:
        raise ConfigError(f"{path}: the file is empty.")
    for where, record in json_records(path):
        yield _conversation(where, record)


def _conversation(where: str, record: dict | str) -> Row:
    if isinstance(record, str):
        return Row(where, problem=record)
    try:
        messages = _messages(record)
        _check(messages)
        learned = [_learned(number, message) for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(learned):
            raise Problem("every answer of the conversation has the weight 0, so there is none to train on.")
        tools = record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise Problem("'tools' is not a list of descriptions.")
    except Problem as problem:
        return Row(where, problem=str(problem))
    plain = [{key: value for key, value in message.items() if key not in _WEIGHTS} for message in messages]
    return Row(where, {"messages": plain, "tools": tools or None, "learned": learned})


def _learned(number: int, message: Mapping[str, Any]) -> bool:
    """Return whether an answer is learned, by its key `weight` or `train`."""
    for key in _WEIGHTS:
        if message.get(key) is not None and message[key] not in (0, 1):
            raise Problem(f"message {number} has {key}={message[key]!r}; it is 0 or 1.")
    return all(message.get(key) is None or bool(message[key]) for key in _WEIGHTS)


def _messages(row: Mapping[str, Any]) -> list[dict]:
    """Return the messages of a row in any of its forms, with contents as texts; raise Problem with the reason if it has none."""
    for key in _REFUSED:
        if row.get(key) is not None:
            raise Problem(f"the row has {key!r}, which is not supported: {_REFUSED[key]}.")
    messages = [_plain(number, message) for number, message in enumerate(_turns(row))]
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise Problem(f"'system' is {system!r}, not a text.")
    if messages and messages[0].get("role") == "system":
        raise Problem("the row has 'system', and its first message is one of 'system', too.")
    return [{"role": "system", "content": system}, *messages]


def _plain(number: int, message: Mapping[str, Any]) -> dict:
    """Return a message whose content is a text, and whose role is one of `FOLLOWS` if it can be said so."""
    found = dict(message)
    if found.get("role") == "developer":  # the name of newer models for what is a system message
        found["role"] = "system"
    if isinstance(found.get("content"), list):
        texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in found["content"]]
        if not all(isinstance(text, str) for text in texts):
            kinds = sorted({str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in found["content"]})
            raise Problem(f"message {number} has parts of {', '.join(kinds)}; only parts of text are supported.")
        found["content"] = "".join(texts)
    if found.get("role") != "assistant" and any(found.get(key) for key in _WEIGHTS):
        raise Problem(f"message {number} of {found.get('role')!r} has a weight; only the assistant's messages are learned.")
    return found


def _turns(row: Mapping[str, Any]) -> list[dict]:
    if "messages" in row:
        return _list(row, "messages")
    if "conversations" in row:
        found = _list(row, "conversations")
        for number, message in enumerate(found):
            if not {"from", "value"} <= message.keys():
                raise Problem(f"message {number} of 'conversations' has {', '.join(message) or 'nothing'}; it needs 'from' and 'value'.")
        return [{"role": _OTHER_NAMES.get(message["from"], message["from"]), "content": message["value"]} for message in found]
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return _list(row, "prompt") + _list(row, "completion")
    if "instruction" in row and "output" in row:
        parts = [row["instruction"], row.get("input") or ""]
        if all(isinstance(part, str) for part in parts):
            return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}, {"role": "assistant", "content": row["output"]}]
        raise Problem("'instruction' and 'input' are not texts.")
    hint = config_lib.suggest("messages", row)
    raise Problem(
        f"no 'messages', nor 'conversations', nor 'prompt' and 'completion', nor 'instruction' and 'output'.{hint} The row has {', '.join(row) or 'nothing'}."
    )


def _list(row: Mapping[str, Any], key: str) -> list[dict]:
    if not isinstance(row[key], list) or not all(isinstance(message, dict) for message in row[key]):
        raise Problem(f"{key!r} is not a list of messages.")
    return row[key]


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise Problem unless roles are known and in order, and every message has content."""
    if not messages:
        raise Problem("the conversation is empty.")
    before = None
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in FOLLOWS:
            hint = config_lib.suggest(role, FOLLOWS) if isinstance(role, str) else ""
            raise Problem(f"message {number} has the role {role!r}; there are {', '.join(FOLLOWS)}.{hint}")
        if before not in FOLLOWS[role]:
            place = f"follows {before!r}" if before else "comes first"
            raise Problem(f"message {number}: {role!r} {place}; user and assistant take turns, after at most one system message.")
        if not (isinstance(content, str) and content.strip()) and not (role == "assistant" and message.get("tool_calls")):
            raise Problem(f"message {number} of {role!r} has {'no content' if content is None else f'the content {content!r}'}, not a text.")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise Problem("the conversation has no assistant message, so it has no answer to train on.")


class _Encoder:
    """Encodes conversations as (tokens, counts)."""

    def __init__(self, tokenizer: PretrainedTokenizer, length: int, loss: str, truncate: bool):
        self.tokenizer, self.length, self.loss, self.truncate, self.cut = tokenizer, length, loss, truncate, 0
        self.template, self.special = template_of(tokenizer), tokenizer.special_texts

    def encode(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Return int32 [tokens] and bool [tokens], T + 1 at most; raise Problem if the row cannot be used."""
        if row.problem is not None:
            raise Problem(row.problem)
        self._check_contents(row.values["messages"])
        try:
            text, spans = self.template.answers(row.values["messages"], tools=row.values["tools"])
        except TemplateProblem as error:
            raise Problem(str(error)) from error
        if self.loss == "answers":
            self._check_ends(row, text, spans)
            spans = self._learned(row.values["learned"], spans)
        tokens, offsets = self.tokenizer.read(text)
        counts = np.ones(len(tokens), bool) if self.loss == "all" else in_spans(offsets, spans)
        if not counts[1:].any():
            raise Problem("the chat template marks no text as the assistant's.")
        if len(tokens) > self.length + 1:
            if not self.truncate:
                raise Problem(f"{len(tokens)} tokens, where {self.length + 1} fit; raise data.sequence_length, or cut with data.truncate=true.")
            if not counts[1 : self.length + 1].any():
                raise Problem(
                    f"no answer begins in the first {self.length + 1} of its {len(tokens)} tokens, so none of them would count in the loss; raise data.sequence_length."
                )
            self.cut += 1
        return tokens[: self.length + 1], counts[: self.length + 1]

    @staticmethod
    def _learned(learned: Sequence[bool], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the spans of the answers that are learned."""
        if all(learned):
            return list(spans)
        if len(learned) != len(spans):
            raise Problem(f"answers have weights, but the chat template marks {len(spans)} parts of the text for {len(learned)} answers.")
        return [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]

    @staticmethod
    def _check_ends(row: Row, text: str, spans: Sequence[tuple[int, int]]) -> None:
        """Raise ConfigError if the last answer is learned without anything after it: the model would never learn to stop."""
        answer = next(message for message in reversed(row.values["messages"]) if message["role"] == "assistant")
        content = (answer.get("content") or "").strip()
        if spans and content and not answer.get("tool_calls") and text[slice(*spans[-1])].rstrip().endswith(content):
            raise ConfigError(
                f"config.data.template: the text that is learned of an answer ends with its content, {content[-40:]!r}, without a token that ends the "
                "assistant's turn; a model trained on it would never stop. Name a copy of the template with data.template that writes the end-of-turn "
                "token after the content, within {% generation %} … {% endgeneration %} if it has them."
            )

    def _check_contents(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise Problem if a message contains a special token, which only a template may write, or is not UTF-8."""
        for number, message in enumerate(messages):
            content = message.get("content") or ""
            forged = next((token for token in (*self.special, OPEN, CLOSE) if token and token in content), None)
            if forged is not None:
                raise Problem(f"message {number} contains {forged!r}, a special token of the tokenizer, which would be read as the end or beginning of a turn.")
            if not is_utf8(content):
                raise Problem(f"message {number} is not UTF-8: {not_utf8(content)}")

    def notes(self, split: str, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[str]:
        """Return messages about a split, and reset the count of cut conversations."""
        learned, total = sum(int(counts.sum()) for _, counts in examples), sum(len(tokens) for tokens, _ in examples)
        cut, self.cut = self.cut, 0
        found = [f"{split}: {len(examples):,} conversations; {learned / total:.1%} of {total:,} tokens count in the loss"]
        return found + ([f"{cut:,} conversations of {split} are longer than data.sequence_length={self.length} and are cut"] if cut else [])


def in_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens are in any span, from the first token of a span to its last: bool [tokens].

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
