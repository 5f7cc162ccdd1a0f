"""Weights are taken by what they mean, not by their shapes alone: class names, image normalisation, tied embeddings, keys of a config.json."""

import json
import shutil

import numpy as np
import pretrained_folders
import pytest
import small_configs
import tokenizer_folders
from PIL import Image

import jaxmodels
from jaxmodels.data.features.image import Image as ImageFeature
from jaxmodels.data.features.image import to_array
from jaxmodels.errors import ConfigError
from jaxmodels.export.transformers import export_run
from jaxmodels.inference.pretrained import import_run
from jaxmodels.pretrained import preprocessing, weights
from jaxmodels.pretrained.folder import Folder
from jaxmodels.pretrained.safetensors import ToWrite, read_header, write
from jaxmodels.pretrained.weights import describe, load_model, model_section
from jaxmodels.runs.folder import RunFolder

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
NAMES = ["neutral", "positive", "negative"]
FROZEN_STEP = {"optimizer": {"name": "sgd", "learning_rate": 1e-9}, "training": {"steps": 1}, "log": {"tensorboard": False}}


def labelled(folder, model, inputs, names):
    """Save a classifier whose classes are balanced over some inputs, and return its predictions, by name."""
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(6.0 if p.ndim > 1 else 1.0)
        logits = model(**inputs).logits
        model.classifier.bias.sub_(logits.mean(0))
    model.save_pretrained(folder)
    return [names[i] for i in (logits - logits.mean(0)).argmax(-1).tolist()]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A published classifier of sentences with id2label {0: neutral, 1: positive, 2: negative}, and rows labelled by its own predictions, by name."""
    folder = tmp_path_factory.mktemp("classifier")
    generator, words = np.random.default_rng(0), "the a film was dull bright long short slow quick warm cold and but very not".split()
    texts = [" ".join(generator.choice(words, 8)) for _ in range(300)]
    tokenizer_folders.write(
        folder / "model", {"tokenizer.json": tokenizer_folders.wordpiece().to_str(), "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), pad_token="[PAD]")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.BertConfig(vocab_size=200, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}, **sizes)
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).eval()
    labels = labelled(folder / "model", model, theirs(texts, padding=True, return_tensors="pt", return_token_type_ids=True), NAMES)
    assert set(labels) == set(NAMES)
    return folder, texts, labels


def fine_tune(classifier, workdir, rename=str, **changes):
    folder, texts, labels = classifier
    rows = workdir.parent / f"{workdir.name}.csv"
    rows.write_text("text,label\n" + "".join(f"{text},{rename(label)}\n" for text, label in zip(texts, labels, strict=True)))
    reference = f"hf:{folder / 'model'}"
    data = {"source": f"csv_rows:{rows}", "sequence_length": 32, "tokenizer": reference, "batch_size": 8}
    config = {"init_from": {"run": reference}, "model": {"dropout": 0.0}, "task": {"name": "classify_text"}, "data": data, **FROZEN_STEP}
    jaxmodels.train(small_configs.config(config, **changes), str(workdir), quiet=True)
    return RunFolder(workdir)


@pytest.mark.parametrize("rename", [str, pytest.param(str.upper, marks=pytest.mark.slow)])
def test_an_output_layer_is_reordered_by_the_names_of_classes(rename, classifier, tmp_path):
    """The data sorts its classes by name. The classifier's own predictions are its labels, so that the accuracy is 1 by the right names alone."""
    run = fine_tune(classifier, tmp_path / "run", rename=rename)
    assert run.manifest()["info"]["labels"] == sorted(map(rename, NAMES))
    assert run.metrics("validation")[-1]["accuracy"] == 1.0
    (line,) = run.manifest()["parents"][0]["classes"]
    assert f"is reordered by name, from neutral, positive, negative to {', '.join(sorted(map(rename, NAMES)))}" in line


@pytest.mark.slow
def test_an_output_layer_in_the_same_order_stays(classifier, tmp_path):
    same = fine_tune(classifier, tmp_path / "same", data__labels=tuple(NAMES))
    assert same.metrics("validation")[-1]["accuracy"] == 1.0 and "classes: neutral, positive, negative, as in" in same.manifest()["parents"][0]["classes"][0]


@pytest.mark.slow
def test_other_names_are_an_error_that_lists_both_and_numbers_are_said(classifier, tmp_path):
    with pytest.raises(ConfigError, match=r"has the classes neutral, positive, negative, the data bad, good, meh.*init_from\.skip=\['head/output/'\]"):
        fine_tune(classifier, tmp_path / "other", rename=dict(zip(NAMES, ("meh", "good", "bad"), strict=True)).get)
    fine_tune(classifier, tmp_path / "new", rename=dict(zip(NAMES, ("meh", "good", "bad"), strict=True)).get, init_from__skip=("head/output/",))
    numbers = fine_tune(classifier, tmp_path / "numbers", rename=lambda name: str(NAMES.index(name)))
    assert numbers.metrics("validation")[-1]["accuracy"] == 1.0
    assert any("classes are taken by number" in fallback for fallback in numbers.manifest()["fallbacks"])


@pytest.mark.slow
def test_runs_hand_on_their_classes_by_name_too(classifier, tmp_path):
    parent = fine_tune(classifier, tmp_path / "parent")
    own = {"model": parent.config()["model"], "data__labels": tuple(NAMES), "init_from": str(parent.path)}
    child = fine_tune(classifier, tmp_path / "child", **own)
    assert child.metrics("validation")[-1]["accuracy"] == 1.0
    with pytest.raises(
        ConfigError, match=r"head/output/.* stays in its checkpoint\. Give the data the same order, data\.labels=\['negative', 'neutral', 'positive'\]"
    ):
        fine_tune(classifier, tmp_path / "frozen", **own, training__freeze=("head/",))
    back = json.loads((export_run(str(child.path), str(tmp_path / "exported")) / "config.json").read_text())
    assert back["id2label"] == {str(i): name for i, name in enumerate(NAMES)}


# Images


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A published ViT trained with mean and deviation 0.5, and images in folders named by its own predictions."""
    folder, names = tmp_path_factory.mktemp("vit"), ["ant", "bee", "cat"]
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, id2label=dict(enumerate(names))
    )
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    images = [(generator.integers(0, 256, 3) * generator.random((16, 16, 1)) ** generator.uniform(0.2, 3)).astype(np.uint8) for _ in range(200)]
    pixels = (torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    labels = labelled(folder / "model", transformers.ViTForImageClassification(config).eval(), {"pixel_values": pixels}, names)
    preprocessor(folder)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / label / f"{i}.png")
    return folder


def preprocessor(folder, **changes):
    values = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(values | {"size": {"height": 16, "width": 16}} | changes))


def see(folder, workdir, **changes):
    data = {"source": f"images:{folder / 'photos'}", "size": 16, "fit": "stretch", "batch_size": 8}
    config = {"init_from": f"hf:{folder / 'model'}", "task": {"name": "classify"}, "data": data, **FROZEN_STEP}
    jaxmodels.train(small_configs.config(config, **changes), str(workdir), quiet=True)
    return RunFolder(workdir)


def test_images_are_normalised_as_the_pretrained_model_saw_them(vit, tmp_path):
    run = see(vit, tmp_path / "run")
    assert run.metrics("validation")[-1]["accuracy"] == 1.0 and run.manifest()["fallbacks"] == []
    assert run.config()["task"]["mean"] == [0.5, 0.5, 0.5] and jaxmodels.evaluate(str(run.path), split="validation")["accuracy"] == 1.0


@pytest.mark.slow
def test_what_a_config_says_otherwise_is_a_warning(vit, tmp_path):
    run = see(vit, tmp_path / "own", task={"name": "classify", "mean": (0.4, 0.4, 0.4), "std": (0.5, 0.5, 0.5)})
    (fallback,) = run.manifest()["fallbacks"]
    assert fallback.startswith("config.task.mean=(0.4, 0.4, 0.4), and hf:") and "was trained with (0.5, 0.5, 0.5)" in fallback


def test_each_difference_of_images_is_told(tmp_path):
    (tmp_path / "model").mkdir()
    preprocessor(tmp_path, resample=2, size={"height": 32, "width": 32}, rescale_factor=1 / 127.5)
    folder = Folder("hf:x", tmp_path / "model", {})
    found = preprocessing.differences(folder, {"mean": [0.5] * 3, "std": None}, (16, 16, 3))
    assert [word in text for word, text in zip(("config.task.std=None", "32 × 32", "bilinear", "0.00784314"), found, strict=True)] == [True] * 4
    preprocessor(tmp_path, do_normalize=False, size={"shortest_edge": 20}, do_center_crop=True, crop_size=16)
    assert preprocessing.differences(folder, {"mean": None, "std": None}, (16, 16, 3)) == []


PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 24}, "resample": 2},
    "swin": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "resample": 3},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 28, "width": 28}, "crop_size": {"height": 24, "width": 24}},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 3},
    "convnext_whole": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 3},
}
PHOTOS = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)) for i, shape in enumerate([(31, 47), (60, 33), (26, 26)])]


def seen_here(image, data, mean, std):
    """Return an image as a model sees it in a run with this data section, [H, W, C]."""
    feature = ImageFeature(image_column="image", size=data["size"], fit=data["fit"], scale_to=data["scale_to"], resample=data["resample"])
    pixels = to_array(image, feature._size, 3, feature.fit, feature._scaled, feature.resample)
    return (pixels / 255 - np.array(mean)) / np.array(std)


def seen_there(folder, image):
    """Return an image as `transformers` prepares it by the file of the folder, [H, W, C]."""
    return transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_cut_and_scaled_as_the_image_processors_do(tmp_path, name):
    """The keys of data that a preprocessor_config.json stands for, against the image processors of `transformers`."""
    values = {"do_resize": True, "image_mean": [0.4] * 3, "image_std": [0.3] * 3, "do_normalize": True, "do_rescale": True} | PROCESSORS[name]
    (tmp_path / preprocessing.FILE).write_text(json.dumps(values))
    keys = preprocessing.geometry(values)
    for image in PHOTOS:
        np.testing.assert_allclose(seen_here(image, keys, [0.4] * 3, [0.3] * 3), seen_there(tmp_path, image), atol=1e-5)
    folder, task = Folder("hf:x", tmp_path, {}), {"mean": (0.4,) * 3, "std": (0.3,) * 3}
    assert preprocessing.differences(folder, task, (*keys["size"], 3), keys) == []
    changed = {"fit": "crop" if keys["fit"] == "stretch" else "stretch", "scale_to": 30, "resample": "box"}
    told = preprocessing.differences(folder, task, (*keys["size"], 3), changed)
    assert [f"config.data.{key}=" in text for key, text in zip(changed, told, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    "data",
    [
        {"size": (20, 24), "fit": "stretch", "scale_to": None, "resample": "bicubic"},
        {"size": (24, 24), "fit": "stretch", "scale_to": (28, 30), "resample": "bilinear"},
        {"size": (20, 24), "fit": "crop", "scale_to": 26, "resample": "bicubic"},
        {"size": (24, 24), "fit": "crop", "scale_to": None, "resample": "bicubic"},
        {"size": (20, 24), "fit": "crop", "scale_to": None, "resample": "bicubic"},
    ],
)
def test_an_exported_image_processor_gives_the_pixels_of_the_run(tmp_path, data):
    task = {"mean": (0.4,) * 3, "std": (0.3,) * 3}
    values, notes = preprocessing.processor(*data["size"], 3, task, data)
    (tmp_path / preprocessing.FILE).write_text(json.dumps(values))
    equal = [np.allclose(seen_here(image, data, *task.values()), seen_there(tmp_path, image), atol=1e-5) for image in PHOTOS]
    assert all(equal) == (not notes)
    assert not notes or data["fit"] == "crop"


def test_an_imported_image_processor_is_exported_as_it_was(vit, tmp_path):
    values = PROCESSORS["dinov2"] | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "own": [1, {"a": None}]}
    shutil.copytree(vit / "model", tmp_path / "model")
    (tmp_path / "model" / preprocessing.FILE).write_text(json.dumps(values))
    out = export_run(str(import_run(f"hf:{tmp_path / 'model'}", str(tmp_path / "run")).path), str(tmp_path / "out"))
    assert json.loads((out / preprocessing.FILE).read_text()) == values


def test_an_unknown_image_processor_is_told(tmp_path):
    (tmp_path / preprocessing.FILE).write_text(json.dumps({"image_processor_type": "OtherImageProcessor", "size": 16}))
    (told,) = preprocessing.differences(Folder("hf:x", tmp_path, {}), {}, (16, 16, 3))
    assert "prepared by OtherImageProcessor, which is not known here" in told
    with pytest.raises(ConfigError, match="crop_pct=0 is not a share"):
        preprocessing.geometry(PROCESSORS["convnext"] | {"crop_pct": 0})


# Tied embeddings


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_output_layer_beside_tied_embeddings_is_read_if_it_differs(kind, tmp_path, monkeypatch):
    """As after adapters with modules_to_save=[embed_tokens, lm_head] were merged. An exact copy is left out."""
    folder = getattr(pretrained_folders, kind)(tmp_path / "model", tie_word_embeddings=True)
    embedding = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[kind]
    tensors = {name: np.array(tensor.view()) for name, tensor in read_header(folder / "model.safetensors").items()}

    def save(output):
        found = tensors | {"lm_head.weight": output}
        write(folder / "model.safetensors", {name: ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in found.items()}, {"format": "pt"})

    ids = np.arange(24).reshape(2, 12) % 40 + 3
    save(tensors[embedding])
    tied = np.asarray(load_model(f"hf:{folder}")(ids))
    assert model_section(f"hf:{folder}")["tie_embeddings"] is True
    save(tensors[embedding] + 0.05 * np.random.default_rng(0).normal(size=tensors[embedding].shape).astype(np.float32))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(ids)).logits.numpy()
    assert np.abs(theirs - tied).max() > 0.1
    np.testing.assert_allclose(np.asarray(load_model(f"hf:{folder}")(ids)), theirs, atol=1e-4)
    _, _, options, notes = describe(f"hf:{folder}")
    assert options["tie_embeddings"] is False and any("its lm_head.weight differs from" in note for note in notes)
    with monkeypatch.context() as patch:  # the weights were not on the disk when the config was read
        patch.setattr(weights, "_untied", lambda *_: None)
        with pytest.raises(ConfigError, match=r"its lm_head\.weight differs from .*config\.model\.tie_embeddings=false"):
            load_model(f"hf:{folder}")
    run = import_run(f"hf:{folder}", str(tmp_path / "run"))
    exported = export_run(str(run.path), str(tmp_path / "exported"))
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_array_equal(again, theirs)


def test_copies_that_differ_in_a_model_that_has_no_two(tmp_path):
    folder = pretrained_folders.bert(tmp_path / "model")
    tensors = {name: np.array(tensor.view()) for name, tensor in read_header(folder / "model.safetensors").items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
    write(folder / "model.safetensors", {name: ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"its cls\.predictions\.decoder\.weight differs from .* not tied is not supported"):
        load_model(f"hf:{folder}", 200, ("tokens", 200))


# Keys of a config.json


def test_keys_of_widespread_files_are_harmless_and_others_are_accepted_by_name(tmp_path):
    folder = pretrained_folders.llama(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    harmless = {"is_llama_config": True, "rope_interleaved": False, "unsloth_version": "2024.9", "pruned_heads": {}, "transformers.js_config": {"dtype": "q4"}}
    (folder / "config.json").write_text(json.dumps(values | harmless))
    assert model_section(f"hf:{folder}")["layers"] == 1
    (folder / "config.json").write_text(json.dumps(values | {"attention_sinks": 4, "mood": "good"}))
    with pytest.raises(ConfigError, match=r"sets attention_sinks=4, mood='good': .*accept it by name: hf:MODEL\?accept=attention_sinks,mood"):
        model_section(f"hf:{folder}")
    reference = f"hf:{folder}?accept=attention_sinks,mood"
    run = import_run(reference, str(tmp_path / "run"))
    assert run.manifest()["parents"][0]["run"] == reference and jaxmodels.load(str(run.path)).step == 0
    assert describe(reference)[3] == ["attention_sinks=4 is not read, as asked", "mood='good' is not read, as asked"]
    with pytest.raises(ConfigError, match=r"\?accept=mod: .* has no such key\. Did you mean 'mood'"):
        describe(f"hf:{folder}?accept=attention_sinks,mod")
