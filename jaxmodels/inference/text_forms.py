"""Texts to classes, numbers and tagged spans; see `forms`.

Shapes: T tokens.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.data.features.base import Problem, Row
from jaxmodels.data.features.text import Tags, Text, Tokenized
from jaxmodels.errors import ConfigError
from jaxmodels.inference.form import NUMBER, TEXT, Example, Form, Labels
from jaxmodels.inference.run import Run
from jaxmodels.tokenizers.base import Tokenizer

_LONGEST = 4096  # tokens, of models and data without a limit
_STEPS = (16, 4, 1)  # the compiled lengths are the longest divided by these
_SHORTEST = 16
_WORD = re.compile(r"\w+(?:[.'’-]\w+)*|[^\w\s]")  # a word or a punctuation mark, as corpora with tags separate them
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": "token ids, special tokens included"}


class Lengths:
    """The few lengths that texts are padded to: each is compiled once."""

    def __init__(self, run: Run):
        context, length = getattr(run.model, "context", None), run.config["data"].get("sequence_length")
        self.longest = min((limit for limit in (context, length) if isinstance(limit, int)), default=_LONGEST)
        # A model of one's own may not know padding: its rows keep the length of training.
        own = not type(run.model).__module__.startswith("jaxmodels.models")
        self.all = (self.longest,) if own else tuple(sorted({max(min(_SHORTEST, self.longest), -(-self.longest // step)) for step in _STEPS}))

    def cut(self, example: Example) -> Example:
        """Return arrays [T, …] at the shortest of the lengths that has all tokens."""
        used = int(np.flatnonzero(example["tokens"] >= 0)[-1]) + 1
        length = next(length for length in self.all if length >= used)
        return {name: array[:length] for name, array in example.items()}


class TokenIds:
    """Checks and pads inputs that are token ids already."""

    def __init__(self, run: Run, lengths: Lengths):
        self.count, self.lengths = run.info["vocab_size"], lengths

    def encode(self, ids: list, truncate: bool) -> Example:
        if not ids or not all(type(token) is int and 0 <= token < self.count for token in ids):
            raise Problem(f"token ids must be whole numbers from 0 to {self.count - 1}, at least one.")
        if len(ids) > self.lengths.longest and not truncate:
            raise Problem(f"{len(ids)} tokens, where {self.lengths.longest} fit: shorten it, or set 'truncate': true.")
        tokens = np.full(self.lengths.longest, -1, np.int32)
        tokens[: len(ids)] = ids[: self.lengths.longest]
        return {"tokens": tokens}


class Cutting:
    """A tokenized feature of training that refuses what is too long, or cuts it."""

    def __init__(self, feature: Tokenized, tokenizer: Tokenizer):
        self.features = [dataclasses.replace(feature, truncate=truncate) for truncate in (False, True)]
        for each in self.features:
            each.use(tokenizer)

    def encode(self, values: Mapping[str, Any], truncate: bool) -> Example:
        feature, row = self.features[truncate], Row("", values)
        feature.check(row)
        try:
            return feature.encode(row)
        except Problem as problem:
            message = str(problem)
            if "data.truncate" in message:  # say it in the words of a request
                message = f"{message.partition(';')[0]}: shorten it, or set 'truncate': true."
            raise Problem(message) from None


class TextForm(Form):
    """A text, or two, to classes with probabilities, or to a number."""

    def __init__(self, run: Run):
        self.lengths, self.pairs = Lengths(run), bool(run.info.get("pairs"))
        self.ids = TokenIds(run, self.lengths)
        self.labels = Labels(run) if "num_classes" in run.info and run.config["task"]["name"] != "regress_text" else None
        self.title = "classify texts" if self.labels else "score texts"
        self.text = None
        if run.tokenizer is not None:
            pair = {"pair_column": "pair"} if self.pairs else {}
            self.text = Cutting(Text(text_column="text", sequence_length=self.lengths.longest, tokenizer="the run's", **pair), run.tokenizer)
        both = {"type": "object", "properties": {"text": TEXT, "pair": TEXT}, "required": ["text", "pair"], "additionalProperties": False}
        words = [both] if self.pairs else [TEXT]
        self.input = {"anyOf": [*(words if self.text else []), _IDS]}
        self.output = self.labels.schema if self.labels else {"type": "object", "properties": {"value": NUMBER}, "required": ["value"]}

    def encode(self, item, *, truncate=False):
        if isinstance(item, list) and not (item and isinstance(item[0], str)):
            example = self.ids.encode(item, truncate)
            example |= {"types": np.zeros(len(example["tokens"]), np.int32)} if self.pairs else {}
            return self.lengths.cut(example)
        if self.text is None:
            raise Problem("the model has no tokenizer: send token ids, [1, 2].")
        if isinstance(item, list) and self.pairs and len(item) == 2:
            item = {"text": item[0], "pair": item[1]}
        if not isinstance(item, Mapping if self.pairs else str) or (self.pairs and set(item) != {"text", "pair"}):
            raise Problem("the model reads two texts: {'text': …, 'pair': …}." if self.pairs else "an input must be a text, or a list of token ids.")
        return self.lengths.cut(self.text.encode(item if self.pairs else {"text": item}, truncate))

    def decode(self, item, example, output, *, top):
        return self.labels.decode(output, top) if self.labels else {"value": float(output)}

    def blanks(self):
        for length in self.lengths.all:
            yield {"tokens": np.zeros(length, np.int32)} | ({"types": np.zeros(length, np.int32)} if self.pairs else {})


class TagForm(Form):
    """A text to spans with labels."""

    title = "tag texts"

    def __init__(self, run: Run):
        if run.tokenizer is None:
            raise ConfigError("the run has no tokenizer, so its tags have no words: jaxmodels.load(RUN).predict(batch) takes arrays.")
        self.lengths, self.names = Lengths(run), [str(name) for name in run.info["tags"]]
        self.bio = all(re.fullmatch(r"O|[BI]-.+", name) for name in self.names)
        feature = Tags(words_column="words", tags_column="tags", scheme="none", sequence_length=self.lengths.longest, tokenizer="the run's")
        self.feature = Cutting(feature, run.tokenizer)
        for each in self.feature.features:
            each.restore(self.names)
        self.input = {
            "anyOf": [
                TEXT | {"description": "split into words at white space and punctuation"},
                {"type": "array", "items": TEXT, "description": "words; spans count in them joined by spaces"},
            ]
        }
        place = {"type": "integer", "description": "character of the text, counted in Unicode code points"}
        span = {"type": "object", "properties": {"start": place, "end": place, "label": TEXT, "text": TEXT}}
        self.output = {"type": "object", "properties": {"spans": {"type": "array", "items": span}, "tags": {"type": "array", "items": TEXT}}}

    def encode(self, item, *, truncate=False):
        words, _, _ = self._words(item)
        # Only whether a token has a tag is read, and the tag of all is the first one.
        example = self.feature.encode({"words": words, "tags": [self.names[0]] * len(words)}, truncate)
        return self.lengths.cut(example)

    @staticmethod
    def _words(item: Any) -> tuple[list[str], list[tuple[int, int]], str]:
        """Return the words of an input, their places, and the text."""
        if isinstance(item, str):
            found = list(_WORD.finditer(item))
            if not found:
                raise Problem("the text has no word.")
            return [match[0] for match in found], [match.span() for match in found], item
        if not isinstance(item, list) or not item or not all(isinstance(word, str) and word.strip() for word in item):
            raise Problem("an input must be a text, or a list of words.")
        ends = np.cumsum([len(word) + 1 for word in item]).tolist()
        return item, [(end - 1 - len(word), end - 1) for word, end in zip(item, ends, strict=True)], " ".join(item)

    def decode(self, item, example, output, *, top):
        _, places, text = self._words(item)
        tags = [self.names[number] for number in output[example["tags"] >= 0].tolist()]
        spans = [{"start": start, "end": end, "label": label, "text": text[start:end]} for start, end, label in self._spans(tags, places)]
        cut = {"truncated": len(tags)} if len(tags) < len(places) else {}
        return {"spans": spans, "tags": tags} | cut

    def _spans(self, tags: list[str], places: list[tuple[int, int]]) -> list[tuple[int, int, str]]:
        """Return (start, end, label) of the entities; without BIO tags, of each word whose tag is not O."""
        spans: list[tuple[int, int, str]] = []
        before = "O"
        for tag, (start, end) in zip(tags, places, strict=False):
            label = tag[2:] if self.bio else tag
            if tag != "O" and self.bio and tag[0] == "I" and before[2:] == label and spans:
                spans[-1] = (spans[-1][0], end, label)
            elif tag != "O":
                spans.append((start, end, label))
            before = tag
        return spans

    def blanks(self):
        for length in self.lengths.all:
            yield {"tokens": np.zeros(length, np.int32), "tags": np.zeros(length, np.int32)}
