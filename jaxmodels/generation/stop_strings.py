"""Decode a stream of tokens to text, and stop at stop strings."""

from collections.abc import Collection, Sequence

from jaxmodels.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # decoding of an incomplete character
_BEFORE = 8  # tokens of context: they decide whether the text starts with a space


class Pieces:
    """Decode tokens one by one; a piece of text is returned as soon as no later token can change it.

    A character that spans several tokens is returned with the last of them. The concatenated pieces equal the decoding of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """before: preceding tokens, whose text is not returned."""
        self.tokenizer = tokenizer
        # Each call decodes only the last tokens: `known` ones, whose text was returned, then others, of which `returned` characters were returned.
        self.tokens = list(before[-_BEFORE:])
        self.known, self.returned = len(self.tokens), 0

    def add(self, token: int) -> str:
        """Add a token and return the newly completed text."""
        self.tokens.append(int(token))
        text = self._rest()
        certain = text.rstrip(_UNFINISHED)
        certain = text[: max(len(certain), len(text) - 3)]  # a character has four bytes at most
        piece, self.returned = certain[self.returned :], max(self.returned, len(certain))
        if certain == text != "":
            self.tokens = self.tokens[self.known :]
            self.known, self.returned = len(self.tokens), 0
        return piece

    def finish(self) -> str:
        """Return the remaining text, with incomplete characters."""
        text = self._rest()
        piece, self.returned = text[self.returned :], len(text)
        return piece

    def _rest(self) -> str:
        known = self.tokenizer.decode(self.tokens[: self.known]) if self.known else ""
        return self.tokenizer.decode(self.tokens)[len(known) :]


class GeneratedText:
    """One text during generation.

    Attributes:
      tokens: so far, without the end token.
      text: so far, without the stop string; "" without a tokenizer.
      finish: reason of the end: `end` (an end token), `stop` (a stop string) or `length`; None while it continues.
    """

    def __init__(self, tokenizer: Tokenizer | None, before: Sequence[int], ends: Collection[int], stops: Sequence[str]):
        self.tokens: list[int] = []
        self.text, self.finish = "", None
        self._pieces = None if tokenizer is None else Pieces(tokenizer, before)
        self._ends, self._stops, self._shown = frozenset(ends), stops, 0

    def add(self, token: int) -> str:
        """Add a token and return the text that can be printed now."""
        if token in self._ends:
            return self.end("end")
        self.tokens.append(int(token))
        return "" if self._pieces is None else self._grow(self._pieces.add(token))

    def end(self, finish: str) -> str:
        """End the text and return the rest of it."""
        self.finish = finish
        if self._pieces is not None:
            self._grow(self._pieces.finish())
        return self._show(len(self.text))

    def _grow(self, piece: str) -> str:
        before = len(self.text)
        self.text += piece
        longest = max(map(len, self._stops), default=0)
        found = [i for stop in self._stops if (i := self.text.find(stop, max(0, before - longest))) >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"
            return self._show(len(self.text))
        return self._show(len(self.text) - self._possible_stop())

    def _possible_stop(self) -> int:
        """Return the number of characters at the end that may begin a stop string."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _show(self, until: int) -> str:
        piece, self._shown = self.text[self._shown : until], max(self._shown, until)
        return piece
