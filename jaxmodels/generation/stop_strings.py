"""New tokens as text, piece by piece; and where that has to stop."""

from collections.abc import Collection, Sequence

from jaxmodels.tokenizers.base import Tokenizer

_UNFINISHED = "\ufffd"  # what bytes that make no character yet are decoded as
_BEFORE = 8  # tokens of what came before, which decide whether a space comes first


class Pieces:
    """The text of tokens that come one by one: each piece as soon as no later token can change it.

    A character of several tokens comes with the last of them. All pieces together are what the tokenizer decodes all tokens as, after
    those before.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """before: tokens that these follow, whose text is known."""
        self.tokenizer = tokenizer
        # Only the last tokens are decoded each time: `known` ones, of which all is said, and others, of which `said` characters are.
        self.tokens = list(before[-_BEFORE:])
        self.known, self.said = len(self.tokens), 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(int(token))
        text = self._rest()
        certain = text.rstrip(_UNFINISHED)
        certain = text[: max(len(certain), len(text) - 3)]  # a character has four bytes at most
        piece, self.said = certain[self.said :], max(self.said, len(certain))
        if certain == text != "":
            self.tokens = self.tokens[self.known :]
            self.known, self.said = len(self.tokens), 0
        return piece

    def finish(self) -> str:
        """The text of bytes that were waiting for more."""
        text = self._rest()
        piece, self.said = text[self.said :], len(text)
        return piece

    def _rest(self) -> str:
        known = self.tokenizer.decode(self.tokens[: self.known]) if self.known else ""
        return self.tokenizer.decode(self.tokens)[len(known) :]


class Row:
    """One text as it is made: what of it can be shown, and whether it has ended.

    Attributes:
      tokens: so far, without one that ended the text.
      text: so far, without a string that ended it; "" where there is no tokenizer.
      finish: why it ended: `end` (a token that ends texts), `stop` (a string), `length`; None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer | None, before: Sequence[int], ends: Collection[int], stops: Sequence[str]):
        self.tokens: list[int] = []
        self.text, self.finish = "", None
        self._pieces = None if tokenizer is None else Pieces(tokenizer, before)
        self._ends, self._stops, self._shown = frozenset(ends), stops, 0

    def add(self, token: int) -> str:
        """The text that can be shown after one token more."""
        if token in self._ends:
            return self.end("end")
        self.tokens.append(int(token))
        return "" if self._pieces is None else self._grow(self._pieces.add(token))

    def end(self, finish: str) -> str:
        """The rest of the text, which ends here."""
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
        return self._show(len(self.text) - self._begun())

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a string that stops."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _show(self, until: int) -> str:
        piece, self._shown = self.text[self._shown : until], max(self._shown, until)
        return piece
