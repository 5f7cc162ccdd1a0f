"""Whatever is in a published config.json, it gives a model's options or one error of one line that names the file.

JAXMODELS_FUZZ (40) inputs for each architecture: JAXMODELS_FUZZ=5000 pytest tests/pretrained/test_fuzz_configs.py
"""

import json

import hypothesis
import pytest
from data.test_fuzz import fuzzed
from hypothesis import strategies
from pretrained.test_pretrained_errors import OTHER

from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.weights import describe, resolve_options

VALUES = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(-(10**12), 10**12),
    strategies.sampled_from([0, 1, -1, 2**31, 1e400, 0.5, "x", "", "gelu", "silu", [], {}, [1], {"rope_type": "linear"}, {"a": {"b": [1]}}, [[[]]]]),
    strategies.recursive(strategies.integers(0, 3) | strategies.text(max_size=2), lambda inner: strategies.lists(inner, max_size=3), max_leaves=5),
)


@pytest.mark.parametrize("name", architecture_lib.ARCHITECTURES)
def test_a_config_is_a_model_or_an_error(name, tmp_path):
    size, _ = OTHER[name]
    architecture = architecture_lib.load(name)
    good = architecture.config(resolve_options(architecture.model, models.find(size)[1])) | {"model_type": name, "vocab_size": 100}
    safetensors.write(tmp_path / "model.safetensors", {}, {})
    keys = [*good, "rope_parameters", "layer_types", "id2label", "num_labels", "architectures", "tie_word_embeddings", "image_size", "pruned_heads", "unknown"]

    @fuzzed
    @hypothesis.given(strategies.dictionaries(strategies.sampled_from(keys), VALUES, min_size=1, max_size=4), strategies.sampled_from([None, *keys]))
    def check(changes, without):
        values = {key: value for key, value in (good | changes).items() if key != without}
        (tmp_path / "config.json").write_text(json.dumps(values))
        try:
            _, found, options, _ = describe(f"hf:{tmp_path}")
            resolve_options(found.model, options)
        except ConfigError as error:
            assert "\n" not in str(error) and ("config.json" in str(error) or "config.model" in str(error))

    check()
    (tmp_path / "config.json").write_text(json.dumps(good))
    assert describe(f"hf:{tmp_path}")[1].name == name
