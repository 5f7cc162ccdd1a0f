"""SentencePiece tokenizers."""

import base64
import json
from collections.abc import Sequence

import numpy as np

from jaxmodels.errors import optional_import
from jaxmodels.tokenizers.base import KNOWN_SPECIAL, check_special, checked_ids


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018). Its JSON contains the model's bytes."""

    def __init__(self, model: bytes):
        """model: the bytes of a `.model` file."""
        self._model = model
        self._processor = optional_import("sentencepiece", "text").SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of pieces]."""
        return np.array(self._processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the pieces of each text, int32, from all cores."""
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def decode(self, tokens) -> str:
        return self._processor.decode(checked_ids(tokens, self.vocab_size))

    def special(self, name: str) -> int | None:
        check_special(name)
        processor = self._processor
        own = {"unknown": processor.unk_id, "start": processor.bos_id, "end": processor.eos_id}
        if name in own:
            return None if own[name]() < 0 else own[name]()
        ids = (processor.piece_to_id(piece) for piece in KNOWN_SPECIAL[name])
        return next((i for i in ids if i != processor.unk_id()), None)

    def model_bytes(self) -> bytes:
        """The bytes of the `.model` file."""
        return self._model

    def to_json(self) -> str:
        return json.dumps({"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()})
