"""The texts of single tokens, as log-probabilities are listed by."""

from collections.abc import Iterable
from typing import Any

from jaxmodels.generation.stop_strings import Pieces
from jaxmodels.tokenizers.base import Tokenizer

_REMEMBERED = 1 << 16


class TokenTexts:
    """Texts of tokens within a running text, so that a token that begins with a space shows it."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer, self._known = tokenizer, {}
        self._before: list[int] = []
        if tokenizer is not None:
            try:
                self._before = [int(token) for token in tokenizer.encode("a")][:1]
            except ValueError:
                pass

    def of(self, token: int) -> str:
        """Return the text of a token; parts of a character are U+FFFD. Without a tokenizer, `token_id:NUMBER`."""
        if token not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[token] = self._decode(token)
        return self._known[token]

    def _decode(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        before = self.tokenizer.decode(self._before) if self._before else ""
        both = self.tokenizer.decode([*self._before, token])
        return both[len(before) :] if both.startswith(before) else self.tokenizer.decode([token])

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Return the texts by which each token lengthens a text; together they are the text."""
        if self.tokenizer is None:
            return ["" for _ in tokens]
        pieces = Pieces(self.tokenizer)
        found = [pieces.add(token) for token in tokens]
        if found:
            found[-1] += pieces.finish()
        return found

    def text(self, tokens: Any) -> str:
        """Return the text of tokens, "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens)
