"""Every config in configs/ is complete: it resolves, opens its data, and builds the shapes of its model and state."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from jaxmodels.config import load_config
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
NEEDS_RUN = ("bert_classify", "bert_sst2", "lora_sst2")  # their tokenizer is that of another run, which is not trained here: it is replaced
NEEDS_DATA = (
    "bert_hf_ner",
    "bert_hf_sst2",
    "bert_mlm_sst2",
    "bert_sst2",
    "cnn_mnist",
    "forecast_linear",
    "forecast_lstm",
    "forecast_transformer",
    "gpt2_hf_text",
    "gpt_shakespeare",
    "lora_sst2",
    "lstm_shakespeare",
    "lstm_sst2",
    "resnet_cifar10",
    "tagger_wikiann",
    "vit_cifar10",
    "vit_hf_cifar10",
)
NEEDS_OWN_DATA = ("llama_hf_sft_lora", "bert_hf_glue")  # the user's data: tests/pretrained/test_pretrained_recipes.py trains them


def load(path, published):
    """Load a config. If it starts from a pretrained model, replace that by one with random weights."""
    argument = f":{published(path.stem)}" if "_hf_" in path.stem else ""
    return load_config(f"{path}{argument}", {"data.tokenizer": "byte+special"} if path.stem in NEEDS_RUN else None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_resolves_and_states_its_results(path, published):
    resolve(load(path, published))
    header = path.read_text().split('"""')[1]
    assert f"jaxmodels train --config=configs/{path.name}" in header, "the header gives the command"
    assert "Reached" in header and "Time" in header, "the header gives the result and the time"


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in NEEDS_DATA + NEEDS_OWN_DATA], ids=lambda p: p.stem)
def test_config_builds(path, published):
    assert jax.tree.leaves(build_experiment(load(path, published)).state_shapes().params)


ON_DATA = [
    pytest.param(p, id=p.stem, marks=[] if p.stem in ("cnn_mnist", "forecast_linear", "gpt_shakespeare") else pytest.mark.slow)
    for p in CONFIGS
    if p.stem in NEEDS_DATA
]


@pytest.mark.parametrize("path", ON_DATA)
def test_config_builds_on_real_data(path, data_dir, published):
    assert jax.tree.leaves(build_experiment(load(path, published), data_dir=data_dir).state_shapes().params)


def test_no_device_is_started_by_building():
    """The devices of several processes wait for each other when they start, so only `train` starts them."""
    names = ("lstm_text", "seq2seq_transformer", "mixtral_8x7b", "vit_g14")
    program = f"""
from jaxmodels.config import load_config
from jaxmodels.experiment.build import build_experiment
for name in {names}:
    assert build_experiment(load_config(f"configs/{{name}}.py")).state_shapes().params
import jax
try:
    jax.devices()
except RuntimeError:
    print("none could have been")
"""
    env = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "none could have been\n"), done.stderr
