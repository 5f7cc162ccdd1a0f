"""Import and export of pretrained weights, against `transformers` on the same weights."""

import json
import shutil
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_folders
import pytest
import random_pretrained
import tokenizer_folders
import torch
import transformers
import warm_python
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.export.transformers import choose, export_run
from jaxmodels.inference.pretrained import import_run
from jaxmodels.pretrained.weights import describe, load_model, locate, resolve_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> (folder of a pretrained model, the model), created once."""
    made = {}

    def get(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = random_pretrained.make(name)
            model.save_pretrained(path)
            made[name] = (path, model)
        return made[name]

    return get


def run(model, arrays):
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, *arrays: nnx.merge(graph, state)(*arrays))(state, *arrays))


@pytest.mark.parametrize("name", random_pretrained.MODELS)
def test_logits_are_those_of_transformers(folder, name):
    path, model = folder(name)
    arrays = random_pretrained.inputs(name)
    expected = random_pretrained.logits(model, arrays)
    ours = run(load_model(f"hf:{path}"), arrays)
    assert ours.shape == expected.shape
    assert np.abs(random_pretrained.real(ours - expected, arrays)).max() < 1e-4
    assert np.abs(random_pretrained.real(expected, arrays)).std() > 1e-3


OLDER = {  # keys of older files -> those of newer ones that they lack
    "gemma3": (
        {"rope_theta": 5e4, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3},
        ("rope_parameters", "layer_types"),
    ),
    "phi3_longrope_partial": (
        {
            "rope_theta": 2e4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 2.0, 3.5]},
            "partial_rotary_factor": 0.75,
        },
        ("rope_parameters",),
    ),
    "gemma": ({"hidden_act": "gelu", "rope_theta": 3e4}, ("rope_parameters",)),
    "smollm3": ({"rope_theta": 5e4, "no_rope_layers": [0, 1, 1, 1]}, ("rope_parameters", "layer_types")),
}


@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in OLDER if name != "gemma3")])
def test_older_config_files_mean_the_same(folder, tmp_path, name):
    path, model = folder(name)
    older = shutil.copytree(path, tmp_path / "older")
    added, removed = OLDER[name]
    values = json.loads((older / "config.json").read_text()) | added
    (older / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key not in removed}))
    arrays = random_pretrained.inputs(name)
    expected = random_pretrained.logits(type(model).from_pretrained(older).eval(), arrays)
    assert np.abs(random_pretrained.real(expected - random_pretrained.logits(model, arrays), arrays)).max() > 1e-3 or name == "gemma"
    assert np.abs(random_pretrained.real(run(load_model(f"hf:{older}"), arrays) - expected, arrays)).max() < 1e-4


@pytest.mark.parametrize("name", ("bert", "gpt2", "mixtral", "t5_untied", "deit_teacher", "dinov2", "distilbert", "deberta"))
def test_stacked_layers_are_read(folder, name):
    path, model = folder(name)
    arrays = random_pretrained.inputs(name)
    plain, stacked = load_model(f"hf:{path}"), load_model(f"hf:{path}", scan=True)
    assert np.abs(random_pretrained.real(run(plain, arrays) - run(stacked, arrays), arrays)).max() < 1e-5


def test_gradients_are_those_of_transformers(folder):
    for name in ("bert", "llama", "gemma2"):
        path, model = folder(name)
        (tokens,) = random_pretrained.inputs(name)
        shift = 0 if name == "bert" else 1
        targets = np.where(tokens < 0, -100, tokens)
        model.zero_grad()
        model(**random_pretrained.arguments(model, (tokens,)), labels=torch.tensor(targets).long()).loss.backward()
        graph, state = nnx.split(load_model(f"hf:{path}"))

        def loss(state, tokens, graph=graph, shift=shift):
            values = nnx.merge(graph, state)(tokens)[:, : tokens.shape[1] - shift]
            after = tokens[:, shift:]
            taken = jnp.take_along_axis(jax.nn.log_softmax(values), jnp.maximum(after, 0)[..., None], axis=-1)[..., 0]
            return -jnp.sum(taken * (after >= 0)) / jnp.sum(after >= 0)

        gradients = {"/".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(jax.jit(jax.grad(loss))(state, tokens))}
        theirs = dict(model.named_parameters())
        pairs = {
            "bert": {
                "embed/embedding": "bert.embeddings.word_embeddings.weight",
                "blocks/0/attention/query/kernel": "bert.encoder.layer.0.attention.self.query.weight",
                "blocks/1/mlp/down/bias": "bert.encoder.layer.1.output.dense.bias",
                "head/norm/scale": "cls.predictions.transform.LayerNorm.weight",
            },
            "llama": {
                "embed/embedding": "model.embed_tokens.weight",
                "blocks/0/attention/key/kernel": "model.layers.0.self_attn.k_proj.weight",
                "blocks/1/mlp/gate/kernel": "model.layers.1.mlp.gate_proj.weight",
                "output/kernel": "lm_head.weight",
            },
            "gemma2": {
                "embed/embedding": "model.embed_tokens.weight",
                "blocks/0/attention/query/kernel": "model.layers.0.self_attn.q_proj.weight",
                "blocks/1/attention_output_norm/scale": "model.layers.1.post_attention_layernorm.weight",
                "final_norm/scale": "model.norm.weight",
            },
        }[name]
        for ours, other in pairs.items():
            expected = theirs[other].grad.numpy()
            expected = expected.T if ours.endswith("kernel") else expected
            if name != "llama" and ours == "embed/embedding":  # the row of the padding token has no gradient in `transformers`
                expected, gradients[ours] = expected[1:], gradients[ours][1:]
            assert np.abs(expected).max() > 1e-5
            np.testing.assert_allclose(gradients[ours], expected, rtol=1e-3, atol=2e-6, err_msg=f"{name} {ours}")


def test_bfloat16_and_other_types(folder, tmp_path):
    path, model = folder("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model.to(torch.float32)
    arrays = random_pretrained.inputs("llama")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert np.abs(random_pretrained.real(run(load_model(f"hf:{tmp_path / 'half'}"), arrays) - random_pretrained.logits(half, arrays), arrays)).max() < 1e-4


def test_weights_of_the_base_model_alone(folder, tmp_path):
    """As for GPT-2 on the hub: without the prefix of the class with a head."""
    for name in ("gpt2", "bert_classes"):
        path, model = folder(name)
        model.base_model.save_pretrained(tmp_path / name)
        arrays = random_pretrained.inputs(name)
        if name == "gpt2":
            assert (
                np.abs(random_pretrained.real(run(load_model(f"hf:{tmp_path / name}"), arrays) - random_pretrained.logits(model, arrays), arrays)).max() < 1e-4
            )
        else:
            with pytest.raises(ConfigError, match="architectures=.'BertModel'. has no supported head"):
                load_model(f"hf:{tmp_path / name}")


def test_names_of_older_files(folder, tmp_path):
    """gamma and beta of BERT's first conversion, and the copies and constants in older files."""
    path, model = folder("bert")
    old = tmp_path / "old"
    shutil.copytree(path, old)
    tensors = load_file(path / "model.safetensors")
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in tensors.items()}
    tensors["bert.embeddings.position_ids"] = np.arange(random_pretrained.CONTEXT)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    save_file(tensors, old / "model.safetensors")
    arrays = random_pretrained.inputs("bert")
    assert np.abs(random_pretrained.real(run(load_model(f"hf:{old}"), arrays) - random_pretrained.logits(model, arrays), arrays)).max() < 1e-4


@pytest.mark.parametrize("name", random_pretrained.MODELS)
def test_import_and_export_give_every_tensor_back(folder, tmp_path, name):
    path, model = folder(name)
    if name == "llama":
        path = tmp_path / "half"
        model.to(torch.bfloat16).save_pretrained(path)
        model.to(torch.float32)
    if not (path / "tokenizer.json").exists():  # masked language models and encoder-decoders need one
        (path / "tokenizer.json").write_text(tokenizer_folders.words(*tokenizer_folders.BERT_SPECIAL).to_str())
        (path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}))
    import_run(f"hf:{path}", str(tmp_path / "run"))
    out = export_run(str(tmp_path / "run"), str(tmp_path / "out"), shard_gb=2e-5 if name == "mixtral" else 5.0)
    before, after = _tensors(path), _tensors(out)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.tobytes() == after[key].tobytes(), key
    if name == "mixtral":
        assert len(list(out.glob("*.safetensors"))) > 3
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]
    again, account = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(account[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name != "llama":
        arrays = random_pretrained.inputs(name)
        np.testing.assert_array_equal(random_pretrained.logits(again.eval(), arrays), random_pretrained.logits(model, arrays))


def test_a_model_is_exported_with_its_tokenizer(tmp_path):
    """T5 and BERT's masked language model: every tensor, and every file of the tokenizer."""
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    models_there = {"t5": pretrained_folders.t5(tmp_path / "t5"), "bert": pretrained_folders.bert(tmp_path / "bert")}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    for name, path in models_there.items():
        import_run(f"hf:{path}", str(tmp_path / name / "run"))
        out = export_run(str(tmp_path / name / "run"), str(tmp_path / name / "out"))
        before, after = _tensors(path), _tensors(out)
        assert before.keys() == after.keys()
        assert all(before[key].tobytes() == after[key].tobytes() for key in before)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (path / file).read_bytes() == (out / file).read_bytes()
        theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (path, out))
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "vocab_size"):
            assert ours.get(key) == theirs.get(key), key


def _tensors(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _train(tmp_path, config, data):
    config = {"optimizer": {"name": "adamw", "learning_rate": 1e-2}, "training": {"steps": 3}, "log": {"tensorboard": False}} | config
    jaxmodels.train(config, str(tmp_path / "run"), data=data, quiet=True)
    return export_run(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.slow
def test_models_trained_here_are_the_same_in_transformers(tmp_path):
    """A decoder like Llama with stacked layers, and a text classifier without token types: trained from random weights, exported."""
    check_trained_here(tmp_path, "llama", "encoder")


@pytest.mark.slow
def test_more_models_trained_here_are_the_same_in_transformers(tmp_path):
    """pytest -m slow tests/pretrained/test_pretrained.py: a decoder like GPT-2, and a ViT."""
    check_trained_here(tmp_path, "gpt", "vit")


def check_trained_here(tmp_path, *names):
    random = np.random.default_rng(1)
    tokens = random.integers(0, 50, (8, 17)).astype(np.int32)
    small = {"layers": 2, "heads": 4, "width": 32}
    llama = {"name": "llama3.2-1b", "context": 64, **small, "kv_heads": 2, "head_width": 8, "mlp_width": 48, "scan": True}
    images = random.normal(size=(8, 16, 16, 3)).astype(np.float32)
    cases = {
        "gpt": ({"name": "gpt", "context": 16, **small}, "language_model", {"tokens": tokens}),
        "llama": (llama, "language_model", {"tokens": tokens}),
        "encoder": ({"name": "encoder", "context": 20, **small}, "classify_text", {"tokens": tokens, "label": np.arange(8, dtype=np.int32) % 3}),
        "vit": ({"name": "vit", **small, "patch": 4}, "classify", {"image": images, "label": np.arange(8, dtype=np.int32) % 3}),
    }  # fmt: skip
    for name in names:
        model, task, train = cases[name]
        task = {"name": task} | ({"sample_length": 0} if task == "language_model" else {})
        out = _train(tmp_path / name, {"model": model, "task": task, "data": {"source": "arrays", "batch_size": 4}}, {"train": train})
        values = json.loads((out / "config.json").read_text())
        there, account = getattr(transformers, values["architectures"][0]).from_pretrained(out, output_loading_info=True)
        assert not any(account[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        here = jaxmodels.load(str(tmp_path / name / "run"))
        arrays = (train["image"],) if name == "vit" else (tokens[:, :16],)
        np.testing.assert_allclose(run(here.model, arrays), random_pretrained.logits(there.eval(), arrays), atol=1e-5)
        card = (out / "README.md").read_text()
        assert "language_model" in card or "classify" in card
        assert here.config["model"]["name"] in card
        assert f"- jax: {jax.__version__}" in card


@pytest.mark.parametrize("name", ["convnext", "swin", "dinov2"])
def test_images_of_another_size(folder, name):
    """Their parameters do not depend on it; the positions of DINOv2 are interpolated, also to another shape."""
    path, model = folder(name)
    image = np.random.default_rng(1).normal(size=(2, 32, 16, 3)).astype(np.float32)
    ours = run(load_model(f"hf:{path}", (32, 16, 3), 5), (image,))
    np.testing.assert_allclose(ours, random_pretrained.logits(model, (image,)), atol=1e-4)


def test_the_mask_token_of_dinov2_is_left_out(tmp_path):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**random_pretrained.MODELS["dinov2"][1] | {"use_mask_token": True}))
    model.save_pretrained(tmp_path / "model")
    section = {"name": "vit"} | resolve_options("vit", describe(f"hf:{tmp_path / 'model'}")[2])
    found = locate(f"hf:{tmp_path / 'model'}", section, ["output/kernel"])
    assert found.dropped == ("dinov2.embeddings.mask_token",) and found.fresh == ("output/kernel",)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("dinov2_swiglu", 24), ("deit_teacher", 16), ("convnext", 20), ("swin", 20)])
def test_image_models_are_fine_tuned_on_fewer_classes_and_exported(folder, tmp_path, name, side):
    """pytest -m slow -k fewer_classes tests/pretrained/test_pretrained.py"""
    path, _ = folder(name)
    random = np.random.default_rng(1)
    train = {"image": random.normal(size=(8, side, side, 3)).astype(np.float32), "label": np.arange(8, dtype=np.int32) % 3}
    config = {"init_from": {"run": f"hf:{path}", "skip": ("output",)}, "task": "classify", "data": {"source": "arrays", "batch_size": 4}}
    config["model"] = {"stochastic_depth": 0.1} | ({} if name == "convnext" else {"remat": "full"})
    out = _train(tmp_path, config, {"train": train})
    values = json.loads((out / "config.json").read_text())
    there, account = getattr(transformers, values["architectures"][0]).from_pretrained(out, output_loading_info=True)
    assert not any(account[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = run(jaxmodels.load(str(tmp_path / "run")).model, (train["image"],))
    assert ours.shape == (8, 3)
    np.testing.assert_allclose(ours, random_pretrained.logits(there.eval(), (train["image"],)), atol=1e-4)


def test_adapters_are_merged(folder, tmp_path):
    path, _ = folder("llama")
    tokens = np.random.default_rng(0).integers(3, 99, (8, 33)).astype(np.int32)
    config = {
        "init_from": f"hf:{path}",
        "task": {"name": "language_model", "sample_length": 0},
        "data": {"source": "arrays", "batch_size": 4},
        "lora": {"rank": 2, "alpha": 8, "targets": ("attention/query", "mlp/up", "^embed$")},
        "optimizer": {"name": "adamw", "learning_rate": 3e-2},
    }
    out = _train(tmp_path, config, {"train": {"tokens": tokens}})
    there = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    here = jaxmodels.load(str(tmp_path / "run"))
    arrays = (tokens[:, :32],)
    ours = run(here.model, arrays)
    np.testing.assert_allclose(ours, random_pretrained.logits(there, arrays), atol=1e-4)
    assert np.abs(ours - run(load_model(f"hf:{path}"), arrays)).max() > 1e-2
    before, after = _tensors(path), _tensors(out)
    same = {key for key in before if before[key].tobytes() == after[key].tobytes()}
    assert set(before) - same == {key for key in before if "q_proj" in key or "up_proj" in key or "embed_tokens" in key}


def test_missing_heads_are_initialised_with_a_message(folder, tmp_path, capsys):
    path, _ = folder("bert")
    data = {"train": {"tokens": np.full((4, 8), 5, np.int32), "label": np.arange(4, dtype=np.int32) % 2}}
    config = {"init_from": f"hf:{path}", "task": "classify_text", "data": {"source": "arrays", "batch_size": 4}, "model": {"dropout": 0.0}}
    config |= {"optimizer": {"name": "sgd", "learning_rate": 1e-9}, "training": {"steps": 1}}
    jaxmodels.train(config, str(tmp_path / "run"), data=data)
    printed = capsys.readouterr().out
    assert "attention_probs_dropout_prob=0.1 is not applied" in printed
    assert "37 taken, 4 initialised, 5 dropped" in printed.replace("\n", " ")
    assert "initialised head/output/kernel" in printed and "dropped     cls.predictions.transform.dense.weight" in printed
    parent = json.loads((tmp_path / "run" / "manifest.json").read_text())["parents"][0]
    assert parent["run"] == f"hf:{path}" and parent["model_type"] == "bert"
    model = jaxmodels.load(str(tmp_path / "run")).model
    np.testing.assert_allclose(model.embed.embedding[...], _tensors(path)["bert.embeddings.word_embeddings.weight"], atol=1e-7)
    assert model.head.output.kernel.shape == (32, 2)


def test_a_run_reads_frozen_weights_from_its_source_and_detects_a_change(folder, tmp_path):
    path = tmp_path / "published"
    shutil.copytree(folder("gpt2")[0], path)
    tokens = np.full((4, 9), 98, np.int32)
    config = {"init_from": f"hf:{path}", "task": {"name": "language_model", "sample_length": 0}, "data": {"source": "arrays", "batch_size": 4}}
    config |= {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "training": {"steps": 1, "trainable": ("final_norm",)}}
    jaxmodels.train(config, str(tmp_path / "run"), data={"train": {"tokens": tokens}}, quiet=True)
    first = jaxmodels.load(str(tmp_path / "run")).predict({"tokens": tokens})
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "run", moved / "run")
    shutil.move(path, moved / "published")  # at the same path relative to the run
    np.testing.assert_array_equal(jaxmodels.load(str(moved / "run")).predict({"tokens": tokens}), first)
    shutil.rmtree(moved / "published")
    shutil.copytree(folder("gpt2_untied_wide")[0], moved / "published")
    with pytest.raises(ConfigError, match="initialised from other weights"):
        jaxmodels.load(str(moved / "run"))


def test_every_device_reads_only_its_shard(folder):
    """Sharded over eight devices: each shard of a parameter equals that part of the file."""
    path, _ = folder("mixtral")
    code = f"""
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from jaxmodels.pretrained import weights as published
        from jaxmodels.pretrained.mapping import LazyParameter
        section = published.model_section("hf:{path}") | {{"scan": True}}
        found = published.locate("hf:{path}", section, [])
        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
        calls = []
        values = LazyParameter.values
        LazyParameter.values = lambda self, ranges, dtype: calls.append(ranges) or values(self, ranges, dtype)
        specs = {{"blocks/mlp/experts/up/kernel": P(None, "b", "a", None), "embed/embedding": P(None, "b")}}
        specs["blocks/attention/query/kernel"] = P("a", None, "b")
        for path, spec in specs.items():
            whole = found.arrays[path].values([(0, n) for n in found.arrays[path].shape], np.float32)
            calls.clear()
            array = found.arrays[path].read(np.float32, NamedSharding(mesh, spec))
            size = array.addressable_shards[0].data.size
            assert len(calls) == whole.size // size, (path, calls)
            assert all(np.prod([b - a for a, b in ranges]) == size for ranges in calls), (path, calls)
            np.testing.assert_array_equal(np.asarray(array), whole)
        print("same")
    """
    code = "from jaxmodels.parallel.mesh import simulate_devices; simulate_devices(8)\n" + textwrap.dedent(code)
    result = warm_python.run(["-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "same", result.stderr


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"name": "gpt", "post_norm": True}, "nearest is gpt2, which does not support post_norm=True"),
        ({"name": "gpt", "norm": "rms", "positions": "rotary", "bias": False, "activation": "geglu"}, "nearest is llama.*activation='geglu'"),
        ({"name": "encoder", "pool": "mean"}, "nearest is bert, which does not support pool='mean'"),
        ({"name": "resnet18", "stem": "cifar"}, "nearest is resnet, which does not support stem='cifar'"),
        (
            {"name": "modernbert-base", "layer_types": ("unrotated",), "window": None, "local_rotary_base": None},
            r"nearest is modernbert, which does not support .*layer_types=\['unrotated'\]",
        ),
        ({"name": "lstm"}, "'lstm' has no equivalent in `transformers`"),
    ],
)
def test_models_without_an_equivalent_in_transformers_are_errors(model, problem):
    model = {"name": model["name"]} | resolve_options(
        model["name"], models.find(model["name"])[1] | {key: value for key, value in model.items() if key != "name"}
    )
    with pytest.raises(ConfigError, match=problem):
        choose(model, {})


def test_published_sizes_survive_a_round_trip():
    """Export and import of the config give every published size of decoders and encoders again."""
    published_as = {
        "gpt2": ("gpt2-xl",),
        "llama": ("llama2-7b", "llama3.1-8b", "llama3.2-1b"),
        "mistral": ("mistral-7b",),
        "qwen2": ("qwen2.5-7b",),
        "qwen3": ("qwen3-8b",),
        "mixtral": ("mixtral-8x7b",),
        "qwen3_moe": ("qwen3-30b-a3b",),
        "smollm3": ("smollm3-3b",),
        "phi3": ("phi3-mini",),
        "gemma": ("gemma-2b", "gemma-7b"),
        "gemma2": ("gemma2-2b", "gemma2-27b"),
        "gemma3_text": ("gemma3-270m",),
        "olmo2": ("olmo2-7b",),
        "granite": ("granite-3-2b", "granite-3-8b"),
        "bert": ("bert-base",),
        "roberta": ("roberta-base",),
        "distilbert": ("distilbert-base",),
        "modernbert": ("modernbert-large",),
        "deberta-v2": ("deberta-v3-base",),
        "t5": ("t5-v1.1-small", "t5-base"),
        "vit": ("vit_b16",),
        "deit": ("deit_b16",),
        "swin": ("swin-tiny", "swin-large"),
        "resnet": ("resnet50", "resnet18"),
        "convnext": ("convnext_t", "convnext_b"),
    }
    for architecture, names in published_as.items():
        for name in names:
            begun = {"parents": [{"model_type": architecture}]}  # Phi-3-mini is also a Mistral
            assert choose({"name": name} | resolve_options(name, models.find(name)[1]), begun)[0].name == architecture


def test_config_shows_the_options_of_config_json(folder, tmp_path, jaxmodels_command):
    path, _ = folder("gpt2")
    config = {"init_from": f"hf:{path}", "model": {"dropout": 0.0}, "task": "language_model", "seed": 0}
    config["data"] = {"source": "python_docs", "sequence_length": 8, "batch_size": 2}
    config |= {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "training": {"steps": 1}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    lines = {line.split()[0]: line for line in jaxmodels_command("config", f"--config={tmp_path / 'c.json'}").stdout.splitlines()}
    assert lines["model.width"].endswith(f"hf:{path}") and " 32 " in lines["model.width"]
    assert lines["model.dropout"].endswith("file") and lines["model.scan"].endswith("default")


def test_a_model_in_the_hubs_cache_is_found_by_its_id(folder, tmp_path, monkeypatch):
    """In the cache, files are links to blobs outside of the snapshot's folder."""
    from huggingface_hub import constants

    path, model = folder("gpt2")
    home = tmp_path / "models--someone--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    for part in (snapshot, home / "refs", home / "blobs"):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for file in path.iterdir():
        shutil.copy(file, home / "blobs" / file.name)
        (snapshot / file.name).symlink_to(home / "blobs" / file.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arrays = random_pretrained.inputs("gpt2")
    ours = run(load_model("hf:someone/tiny"), arrays)
    assert np.abs(random_pretrained.real(ours - random_pretrained.logits(model, arrays), arrays)).max() < 1e-4
    with pytest.raises(ConfigError, match="hf:someone/other: there is no such folder, and the download from the hub failed"):
        load_model("hf:someone/other")
