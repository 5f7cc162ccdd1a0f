"""OLMo 2 in the format of `transformers` (OLMo Team 2025): norms of what attention and feed-forward return, and of all heads of queries or keys together."""

from jaxmodels.pretrained import llama
from jaxmodels.pretrained.architecture import Keys


def _options(keys: Keys, names, name: str) -> dict:
    given = {"query_key_norm": "projection", "input_norm": False, "output_norm": True}
    return llama.options(keys, names, name=name, epsilon=1e-5, given=given)


OLMO2 = llama.architecture("olmo2", "Olmo2", read=_options)
