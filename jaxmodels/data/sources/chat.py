"""Conversations, for fine-tuning on the assistant's messages."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels.data import access, copies, encoded, fitted, guesses
from jaxmodels.data.evaluation_sets import EvaluationSets, key_of
from jaxmodels.data.features.base import Problem, Row
from jaxmodels.data.files import find_file, find_files
from jaxmodels.data.holdout import hold_out
from jaxmodels.data.index import Progress, Writer
from jaxmodels.data.keys import takes
from jaxmodels.data.packing import Packed
from jaxmodels.data.rows import Holdout, encode_all
from jaxmodels.data.skipping import Skipping
from jaxmodels.data.source import Arrays, Dataset
from jaxmodels.data.sources.conversations import read_conversations
from jaxmodels.data.text_lines import is_utf8, not_utf8
from jaxmodels.data.tokens import Tokens
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.chat_template import CLOSE, OPEN, ChatTemplate, TemplateProblem
from jaxmodels.tokenizers.factory import is_trained, make_tokenizer
from jaxmodels.tokenizers.pretrained import PretrainedTokenizer

_KEPT = ("tokens", "counts", "ends")  # arrays of a split in the cache
_TOGETHER = 256  # conversations tokenized at once


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
    encoder = _Encoder(coder, sequence_length, loss, truncate)
    found, told, fallbacks = None, [], []
    if encoded.is_worth_it([file for part in files.values() for file in part]):
        key = ["chat", coder.to_json(), sequence_length, loss, truncate, dataclasses.astuple(options), encoded.contents(files)]
        try:
            index, told = encoded.open_entry(key, functools.partial(_store, files, encoder, options), path)
            found = index.header | {"splits": {split: [index[f"{number}.{name}"] for name in _KEPT] for number, split in enumerate(index.header["splits"])}}
        except OSError as error:
            fallbacks = [encoded.no_cache(error, path)]
    found = found or _encode(files, encoder, options)
    for text in found["guesses"]:
        guesses.guess(text)
    splits, notes = {}, list(found["notes"])
    for split, arrays in found["splits"].items():
        splits[split] = _lay_out(*arrays, sequence_length, packing)
        if packing == "examples":
            notes.append(f"{split}: {len(splits[split]):,} rows, {splits[split].fill:.1%} of their positions filled")
    info = {"vocab_size": coder.vocab_size, "tokenizer": coder}
    return Dataset(splits, info, notes=(*notes, *told), fallbacks=tuple(fallbacks), skipped=dict(found["skipped"]))


def _encode(files: Mapping[str, Sequence[str]], encoder: "_Encoder", options: Holdout, progress: Progress | None = None) -> dict[str, Any]:
    """Return the `notes`, `skipped` rows and `guesses` of a data set, and as its `splits` the tokens, counts and ends of the conversations."""
    skipping, notes, splits = Skipping(options.on_bad_example), [], {}
    with guesses.collected() as found:
        parts = {split: [row for file in paths for row in read_conversations(file)] for split, paths in files.items()}
    if "validation" not in parts and options.holdout:
        parts["train"], parts["validation"] = hold_out(parts["train"], options.holdout)
    if progress is not None:
        progress.expect(sum(map(len, parts.values())))
    for split, rows in parts.items():
        examples = []
        for start in range(0, len(rows), _TOGETHER):
            few = rows[start : start + _TOGETHER]
            examples += encode_all(split, few, functools.partial(encoder.encode, prepared=iter(encoder.prepare(few))), skipping)
            if progress is not None:
                progress.add(len(few))
        skipping.check_rest(split, len(examples))
        notes += encoder.notes(split, examples)
        tokens, counts = zip(*examples, strict=True)
        splits[split] = np.concatenate(tokens), np.concatenate(counts), np.cumsum([len(row) for row in tokens], dtype=np.int64)
    return {"splits": splits, "notes": [*skipping.notes(), *notes], "skipped": skipping.counts, "guesses": found}


def _store(files: Mapping[str, Sequence[str]], encoder: "_Encoder", options: Holdout, writer: Writer) -> dict[str, Any]:
    """Write an entry of the cache."""
    found = _encode(files, encoder, options, writer.progress)
    for number, arrays in enumerate(found["splits"].values()):
        for name, array in zip(_KEPT, arrays, strict=True):
            writer.append(f"{number}.{name}", array, array.dtype)
    return found | {"splits": list(found["splits"])}


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


def _lay_out(tokens: np.ndarray, counts: np.ndarray, ends: np.ndarray, length: int, packing: str) -> Packed | Arrays:
    if packing == "examples":
        return Packed(Tokens(tokens), ends, length, counts=counts)
    counts = encoded.Ragged(counts, ends, length + 1)[:] == 1  # padding is -1
    return Arrays({"tokens": encoded.Ragged(tokens, ends, length + 1)[:], "counts": counts})


_Rendered = tuple[str, list[tuple[int, int]], np.ndarray, np.ndarray]  # text, spans that are learned, tokens, characters of each token


class _Encoder:
    """Encodes conversations as (tokens, counts)."""

    def __init__(self, tokenizer: PretrainedTokenizer, length: int, loss: str, truncate: bool):
        self.tokenizer, self.length, self.loss, self.truncate, self.cut = tokenizer, length, loss, truncate, 0
        self.template, self.special = template_of(tokenizer), tokenizer.special_texts

    def prepare(self, rows: Sequence[Row]) -> list["_Rendered | Problem"]:
        """Return the text of each row with its tokens, or why the row cannot be used."""
        found = [self._rendered(row) for row in rows]
        texts = [each[0] for each in found if not isinstance(each, Problem)]
        tokens = iter(self.tokenizer.read_batch(texts))
        return [each if isinstance(each, Problem) else (*each, *next(tokens)) for each in found]

    def _rendered(self, row: Row) -> tuple[str, list[tuple[int, int]]] | Problem:
        """Return a row's text and the spans that are learned."""
        try:
            if row.problem is not None:
                raise Problem(row.problem)
            self._check_contents(row.values["messages"])
            text, spans = self.template.answers(row.values["messages"], tools=row.values["tools"])
            if self.loss == "answers":
                self._check_ends(row, text, spans)
                spans = self._learned(row.values["learned"], spans)
        except TemplateProblem as error:
            return Problem(str(error))
        except Problem as problem:
            return problem
        return text, spans

    def encode(self, row: Row, prepared: Iterator["_Rendered | Problem"]) -> tuple[np.ndarray, np.ndarray]:
        """Return int32 [tokens] and bool [tokens], T + 1 at most, of the next prepared row; raise Problem if it cannot be used."""
        rendered = next(prepared)
        if isinstance(rendered, Problem):
            raise rendered
        _, spans, tokens, offsets = rendered
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
