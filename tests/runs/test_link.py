"""The link between runs: freezing, adapters, learning rates by path, lineage, and protected parents."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from flax import nnx
from rich.console import Console

import jaxmodels
from jaxmodels.data.loader import TrainingBatches
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models import create
from jaxmodels.models.functional import combine, flatten, split
from jaxmodels.models.functional import merge as merge_model
from jaxmodels.models.lora import add_lora, merge_adapters
from jaxmodels.runs.checkpoint import Checkpoints
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.lineage import lineage
from jaxmodels.runs.merge import merge
from jaxmodels.step.rates import LayerDecay, rate_factors
from jaxmodels.training import trainer as trainer_lib

CNN = small_configs.config(small_configs.CNN, model__dropout=0.0, log__tensorboard=False)


def run(config, workdir, **options):
    return trainer_lib.train(build_experiment(config), str(workdir), console=Console(quiet=True), **options)


def steps(config, count=2):
    """Return the first state and the one after some steps."""
    experiment = build_experiment(config)
    first = jax.jit(experiment.init_function())(jax.random.key(0))
    batches = TrainingBatches(experiment.dataset.splits["train"], experiment.loading.batch_size, count, seed=0, shuffle=True)
    step, state = jax.jit(experiment.step_function()), first
    for s in range(count):
        state, _ = step(state, batches[s], jax.random.key(1))
    return first, state


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run of 20 steps with checkpoints at 10 and 20."""
    folder = tmp_path_factory.mktemp("link") / "parent"
    run(small_configs.config(CNN, training__steps=20, evaluation={}), folder)
    return folder


def lora(parent, **changes):
    base = small_configs.config(CNN, training__steps=20, evaluation={}, lora={"rank": 2, "alpha": 6.0, "targets": ("hidden",)})
    base["training"]["trainable"] = ("output/",)
    return small_configs.config(base, init_from=f"{parent}@20", **changes)


def test_frozen_parameters_stay_and_the_others_train_as_without_freezing():
    sgd = small_configs.config(CNN, optimizer={"name": "sgd", "learning_rate": 0.1})
    _, whole = steps(sgd, 1)
    first, part = steps(small_configs.config(sgd, training__freeze=("convolutions", "output/bias")), 1)
    assert set(flatten(part.frozen)) == {f"convolutions/{i}/{name}" for i in (0, 1) for name in ("kernel", "bias")} | {"output/bias"}
    for path, value in flatten(part.frozen).items():
        np.testing.assert_array_equal(value, flatten(first.frozen)[path])
    for path, value in flatten(part.params).items():
        np.testing.assert_allclose(value, flatten(whole.params)[path], rtol=1e-5, atol=1e-7)
        assert (value != flatten(first.params)[path]).any()
    adam = small_configs.config(CNN, training__trainable=("output/",))
    moments = [x.shape for x in jax.tree.leaves(steps(adam)[1].opt_state) if x.ndim]
    assert sorted(moments) == [(10,), (10,), (16, 10), (16, 10)]  # no optimizer state for frozen parameters


def test_frozen_batch_norms_do_not_update_statistics():
    c = small_configs.config(CNN, model={"name": "resnet18", "stem": "cifar"}, data__batch_size=4)
    c["training"]["trainable"] = ("output/",)
    first, after = steps(c, 1)
    assert len(jax.tree.leaves(first.stats)) > 10
    jax.tree.map(np.testing.assert_array_equal, first.stats, after.stats)


@pytest.mark.parametrize(("scan", "dora"), [(False, False), (True, False), (True, True)])
def test_an_adapter_starts_as_zero_and_merges_into_its_layer(scan, dora):
    def make(rngs):
        return create("gpt", 11, context=4, layers=2, heads=1, width=4, scan=scan, rngs=rngs)

    tokens = jnp.arange(4)[None]
    plain, adapted = make(nnx.Rngs(params=0)), make(nnx.Rngs(params=0))
    add_lora(adapted, rank=2, alpha=6.0, targets=(r"blocks/.*up$", "^embed$"), dora=dora, rngs=nnx.Rngs(params=1))
    np.testing.assert_allclose(adapted(tokens), plain(tokens), rtol=1e-5 if dora else 0, atol=1e-6 if dora else 0)
    graph, params, stats = split(adapted)
    # Initially zero: B of linear layers, A of embeddings.
    flat = {path: 0.1 * jnp.ones_like(x) if path.endswith(("up/lora_b", "embed/lora_a")) else x for path, x in flatten(params).items()}
    assert sum(path.endswith("lora_a") for path in flat) == (2 if scan else 3)
    whole = merge_model(graph, combine({}, flat), stats)
    with_b = whole(tokens)
    np.testing.assert_allclose(whole.head()(whole.features(tokens)[0]), with_b, rtol=1e-5, atol=1e-5)  # as losses in tiles compute them
    assert not np.allclose(with_b, plain(tokens))
    merged = merge_adapters(flat, 3.0)
    assert set(merged) == set(flatten(split(plain)[1]))
    np.testing.assert_allclose(merge_model(split(plain)[0], combine({}, merged), stats)(tokens), with_b, rtol=2e-5, atol=2e-5)


def test_a_lora_run_saves_only_trained_parameters_and_is_loaded_resumed_and_merged(parent, tmp_path):
    whole, cut = run(lora(parent), tmp_path / "whole"), tmp_path / "cut"
    manifest = RunFolder(tmp_path / "whole").manifest()
    assert manifest["parents"][0]["initialised"] == ["hidden/lora_a", "hidden/lora_b"] and len(manifest["parents"][0]["taken"]) == 8
    trained = 2 * (32 + 16) + 16 * 10 + 10
    assert manifest["trained_parameters"] == trained < manifest["parameters"]
    stored = Checkpoints(tmp_path / "whole" / "checkpoints", read_only=True)
    saved = stored.shapes(20, "params", "frozen")
    stored.close()
    assert set(flatten(saved["params"])) == {"hidden/lora_a", "hidden/lora_b", "output/kernel", "output/bias"} and not saved["frozen"]
    # Stopped half-way and resumed: the frozen part is read from the parent.
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "20")
    run(lora(parent), cut)
    one, other = (split(jaxmodels.load(str(folder)).model)[1] for folder in (tmp_path / "whole", cut))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_array_equal(one["convolutions"]["0"]["kernel"], jaxmodels.load(f"{parent}@20").model.convolutions[0].kernel[...])
    merge(str(tmp_path / "whole"), str(tmp_path / "merged"))
    scores = [jaxmodels.evaluate(str(tmp_path / name))["loss"] for name in ("whole", "merged")]
    assert scores[0] == pytest.approx(whole.metrics["test"]["loss"], rel=1e-5) and scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert not any("lora" in path for path in flatten(split(jaxmodels.load(str(tmp_path / "merged")).model)[1]))
    again = small_configs.config(CNN, training__steps=1, evaluation={}, init_from=str(tmp_path / "merged"))
    run(again, tmp_path / "third")
    assert [p["run"] for p in RunFolder(tmp_path / "third").manifest()["parents"]] == [str(tmp_path / "merged"), str(tmp_path / "whole"), str(parent)]
    with pytest.raises(ConfigError, match="merged weights"):
        run(RunFolder(tmp_path / "merged").config(), tmp_path / "merged")
    with pytest.raises(ConfigError, match="jaxmodels merge"):
        run(small_configs.config(again, init_from=str(tmp_path / "whole")), tmp_path / "fourth")
    with pytest.raises(ConfigError, match="trained with the scale alpha / rank = 3, but it is 1 here"):
        run(small_configs.config(lora(parent, lora__alpha=2.0), init_from=str(tmp_path / "whole")), tmp_path / "fourth")
    with pytest.raises(ConfigError, match="Choose another folder"):
        merge(str(tmp_path / "whole"), str(tmp_path / "merged"))


def test_a_parent_is_found_by_absolute_or_relative_path_and_identified_by_its_id(parent, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(parent, there / "parent")
    run(lora(there / "parent", training__steps=1), there / "child")
    with pytest.raises(ConfigError, match="contains frozen weights of .*child"):
        run(small_configs.config(CNN, training__steps=1), there / "parent", overwrite=True)
    there.rename(tmp_path / "moved")  # both together
    assert jaxmodels.evaluate(str(tmp_path / "moved" / "child"))["step"] == 1
    with pytest.raises(ConfigError, match="contains frozen weights of .*moved/child"):
        run(small_configs.config(CNN, training__steps=1), tmp_path / "moved" / "parent", overwrite=True)
    manifest = tmp_path / "moved" / "parent" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"id": "another"}))
    with pytest.raises(ConfigError, match="initialised from another run"):
        jaxmodels.load(str(tmp_path / "moved" / "child"))
    shutil.rmtree(tmp_path / "moved" / "parent")
    with pytest.raises(ConfigError, match="holds only the trained parameters"):
        jaxmodels.load(str(tmp_path / "moved" / "child"))


def test_a_parents_checkpoint_is_never_deleted(tmp_path):
    folder = tmp_path / "parent"
    config = small_configs.config(CNN, training__steps=40, evaluation={}, checkpoint={"every": 10, "keep": 1})
    half = build_experiment(config)
    trainer_lib.train(half, str(folder), console=Console(quiet=True))
    assert sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*")) == ["40"]
    run(small_configs.config(CNN, training__steps=1, evaluation={}, init_from=str(folder)), tmp_path / "child")
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, parents=lambda: {c["step"] for c in RunFolder(folder).children()})
    state, progress = checkpoints.restore(40, half.state_shapes())
    for step in (50, 60):
        checkpoints.save(state.replace(step=jnp.int32(step)), progress)
    checkpoints.close()
    assert sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*")) == ["40", "60"]


def test_lineage_shows_the_whole_family(parent, tmp_path, jaxmodels_command):
    shutil.copytree(parent, tmp_path / "old", ignore=shutil.ignore_patterns("children.jsonl"))
    for name, above in (("a", "old"), ("b", "old"), ("c", "a")):
        run(small_configs.config(CNN, training__steps=1, evaluation={}, init_from=str(tmp_path / above)), tmp_path / name)
    family = lineage(str(tmp_path / "c"))
    assert family["run"] == str(tmp_path / "old") and "taken_from" not in family
    assert {child["run"] for child in family["children"]} == {str(tmp_path / "a"), str(tmp_path / "b")}
    (a,) = (child for child in family["children"] if child["run"].endswith("a"))
    assert a["taken_from"] == {"step": 20, "taken": 8} and a["children"][0]["run"] == str(tmp_path / "c")
    shutil.rmtree(tmp_path / "a")
    done = jaxmodels_command("lineage", f"--workdir={tmp_path / 'c'}")
    lines = done.stdout.splitlines()
    assert str(tmp_path / "old") in lines[0] and "test accuracy" in lines[0]
    assert any("a: missing" in line for line in lines) and "(this run)" in lines[-1] and "from step 1 (8 taken)" in lines[-1]


@pytest.mark.parametrize("scan", [False, True])
def test_layers_have_different_rates(scan):
    model = create("gpt", 11, context=4, layers=3, heads=1, width=4, scan=scan, rngs=nnx.Rngs(0))
    params = split(model)[1]
    factors = flatten(rate_factors(params, ((r"bias$", 2.0), ("up/", 3.0)), LayerDecay(rate=0.5)))
    kernels = factors["blocks/mlp/up/kernel"].reshape(3) if scan else [factors[f"blocks/{i}/mlp/up/kernel"] for i in range(3)]
    np.testing.assert_allclose(kernels, [3 / 8, 3 / 4, 3 / 2])
    biases = factors["blocks/mlp/up/bias"].reshape(3) if scan else [factors[f"blocks/{i}/mlp/up/bias"] for i in range(3)]
    np.testing.assert_allclose(biases, [1 / 4, 1 / 2, 1])  # the first pattern that matches
    assert factors["embed/embedding"] == 1 / 16 and factors["final_norm/scale"] == 1


def test_rates_scale_updates():
    sgd = small_configs.config(CNN, optimizer={"name": "sgd", "learning_rate": 0.1})
    first, plain = steps(sgd, 1)
    _, scaled = steps(small_configs.config(sgd, optimizer__rates=(("hidden", 0.25),)), 1)
    moved = [flatten(jax.tree.map(jnp.subtract, state.params, first.params)) for state in (plain, scaled)]
    np.testing.assert_allclose(moved[1]["hidden/kernel"], 0.25 * moved[0]["hidden/kernel"], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(moved[1]["output/kernel"], moved[0]["output/kernel"], rtol=1e-3, atol=1e-7)


def test_inconsistent_configs_are_errors(parent, tmp_path):
    def error(config):
        with pytest.raises(ConfigError) as caught:
            run(config, tmp_path / "child")
        return str(caught.value)

    assert "'nothing' matches no parameter" in error(small_configs.config(CNN, training__freeze=("nothing",)))
    assert "leave no parameter to train" in error(small_configs.config(CNN, training__freeze=(".*",)))
    assert "is not a regular expression" in error(small_configs.config(CNN, training__trainable=("(",)))
    assert "'attention' matches no linear layer or embedding; there are hidden, output" in error(lora(parent, lora__targets=("attention",)))
    assert "name it with config.init_from" in error(small_configs.config(lora(parent), init_from=None))
    assert "lora.rank is required" in error(small_configs.config(CNN, lora={"targets": ("hidden",)}))
    assert "also frozen" in error(small_configs.config(CNN, init_from={"run": str(parent), "skip": ("hidden",)}, training__freeze=("hidden",)))
    assert "pairs (pattern, factor)" in error(small_configs.config(CNN, optimizer__rates=(("hidden", "x"),)))
    assert "'zzz' matches no trained parameter" in error(small_configs.config(CNN, optimizer__rates=(("zzz", 1.0),)))
    assert "matches no trained parameter" in error(small_configs.config(CNN, optimizer__layer_decay=0.5))
    assert "must lie above 0" in error(small_configs.config(CNN, optimizer__layer_decay={"rate": 2.0, "layers": r"convolutions/(\d)"}))


def test_a_tokenizer_that_does_not_match_the_parent_is_refused(tmp_path):
    base = small_configs.config(small_configs.LSTM, training__steps=1, evaluation={}, model__layers=1)
    run(base, tmp_path / "parent")
    folder = RunFolder(tmp_path / "parent")
    alphabet = json.loads(folder.tokenizer_file.read_text())
    alphabet["alphabet"] = alphabet["alphabet"][:-1] + "\uffff"
    folder.tokenizer_file.write_text(json.dumps(alphabet))
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(small_configs.config(base, init_from=str(tmp_path / "parent")), tmp_path / "child")
