"""GGUF in and out, against `transformers`, which reads it through the same package of blocks."""

import json

import numpy as np
import pretrained_folders
import pytest
import tokenizer_folders

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.errors import ConfigError
from jaxmodels.export.gguf import export_gguf
from jaxmodels.inference.pretrained import import_run
from jaxmodels.pretrained import gguf as gguf_lib
from jaxmodels.pretrained.weights import describe, load_model
from jaxmodels.tokenizers.factory import make_tokenizer

transformers, torch, gguf = pytest.importorskip("transformers"), pytest.importorskip("torch"), pytest.importorskip("gguf")
IDS = np.arange(24).reshape(2, 12) % 40 + 3
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = "Hello there, it's 1234 o'clock.\n\n  Éclair"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXMODELS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def model(folder, kind="llama", **options):
    """Write a model of `transformers` with large weights and a byte-level tokenizer."""
    classes = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM")}
    config, network = (getattr(transformers, name) for name in classes[kind])
    torch.manual_seed(0)
    more = {"head_dim": 128} if kind == "qwen3" else {}  # transformers reads GGUF with the width of its default
    made = network(config(vocab_size=330, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2, **SIZES, **more, **options))
    for name, p in made.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    made.save_pretrained(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": tokenizer_folders.CHATML,
    }
    tokenizer = tokenizer_folders.byte_level(pretrained_folders.CHAT)
    tokenizer_folders.write(folder, {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)})
    return folder


def theirs(folder, file=None):
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    with torch.no_grad():
        return found(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"attention_bias": False, "rope_theta": 5e4}], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in gguf_lib.ARCHITECTURES if kind != "llama")])
def test_a_model_goes_out_and_comes_back(kind, options, tmp_path):
    folder = model(tmp_path / "model", kind, **(options if kind == "llama" or "tie_word_embeddings" in options else {"rope_theta": 5e4}))
    run = import_run(f"hf:{folder}", str(tmp_path / "run"))
    wanted = theirs(folder)
    half = export_gguf(str(run.path), str(tmp_path / "half"))
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(theirs(half, "model.gguf"), wanted, atol=2e-3 * scale)
    np.testing.assert_allclose(np.asarray(load_model(f"hf:{half}/model.gguf")(IDS)), theirs(half, "model.gguf"), atol=1e-4 * scale)
    eight = export_gguf(str(run.path), str(tmp_path / "eight"), dtype="q8_0")
    np.testing.assert_allclose(np.asarray(load_model(f"hf:{eight}/model.gguf")(IDS)), theirs(eight, "model.gguf"), atol=1e-4 * scale)
    assert (eight / "model.gguf").stat().st_size < 0.75 * (half / "model.gguf").stat().st_size


def test_the_tokenizer_and_its_template_come_along(tmp_path):
    run = import_run(f"hf:{model(tmp_path / 'model')}", str(tmp_path / "run"))
    assert cli.run(["export", str(run.path), str(tmp_path / "out"), "--format=gguf"]) == 0
    ours = make_tokenizer(f"hf:{tmp_path}/out/model.gguf", (), None)
    before = make_tokenizer(str(run.path), (), None)
    for text in (TEXT, "<|im_start|>user\nhi<|im_end|>"):
        assert ours.encode(text).tolist() == before.encode(text).tolist()
    assert ours.chat_template == before.chat_template and ours.special("end") == before.special("end")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert reader(TEXT)["input_ids"] == ours.encode(TEXT).tolist()
    again = import_run(f"hf:{tmp_path}/out/model.gguf", str(tmp_path / "again"))
    assert jaxmodels.load(str(again.path)).generate("a", max_tokens=3)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_weights_are_those_of_the_blocks(type_name, tmp_path):
    folder = model(tmp_path / "model", tie_word_embeddings=True)
    run = import_run(f"hf:{folder}", str(tmp_path / "run"))
    exported = export_gguf(str(run.path), str(tmp_path / "out"))
    reader = gguf.GGUFReader(exported / "model.gguf")
    kind = gguf.GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        quantised = plain.ndim == 2
        writer.add_tensor(tensor.name, gguf.quants.quantize(plain, kind) if quantised else plain, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = theirs(tmp_path, "small.gguf")
    np.testing.assert_allclose(np.asarray(load_model(f"hf:{tmp_path}/small.gguf")(IDS)), wanted, atol=1e-4 * np.abs(wanted).max())


def test_blocks_of_four_bits_with_scales_of_six(tmp_path):
    """Q4_K can be read and not written: any bytes are a block."""
    kind = gguf.GGMLQuantizationType.Q4_K
    blocks = np.random.default_rng(0).integers(0, 100, (4, gguf.quant_shape_to_byte_shape((4, 256), kind)[1]), np.uint8)
    plain = gguf.quants.dequantize(blocks, kind)
    tensor = gguf.gguf_reader.ReaderTensor("output.weight", kind, np.array([256, 4], np.uint64), 1024, blocks.nbytes, 0, blocks, None)
    written = gguf_lib._weights({"output.weight": tensor}, {"model_type": "llama"}, tmp_path)["lm_head.weight"]
    np.testing.assert_array_equal(written.values(), plain)


def change(file, **changes):
    """Write a small file with other metadata; None leaves a key out."""
    values = {"llama.context_length": 8, "llama.embedding_length": 8, "llama.block_count": 1, "llama.feed_forward_length": 8}
    values |= {"llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4} | changes
    writer = gguf.GGUFWriter(file, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        if value is not None and key != "tensor":
            add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    if "tensor" in values:
        writer.add_tensor(values["tensor"], np.zeros((8,), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"hf:{file}"


WRONG = {
    "general.architecture='mamba' is not supported in GGUF; there are llama": {"general.architecture": "mamba"},
    "lacks block_count": {"llama.block_count": None},
    "llama.expert_count=8 changes what the model computes": {"llama.expert_count": 8},
    "scaled rotary positions \\(yarn\\)": {"llama.rope.scaling.type": "yarn"},
    "scaled rotary positions \\(rope_freqs.weight\\)": {"tensor": "rope_freqs.weight"},
    "partial rotary positions": {"llama.rope.dimension_count": 2},
    "its tokenizer \\(llama, None\\) is not supported": {"tokenizer.ggml.model": "llama"},
    "has the tensor blk.0.extra.weight": {"tensor": "blk.0.extra.weight"},
    "num_hidden_layers": {"llama.block_count": 4_000_000_000},
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_not_supported_is_one_error(problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        describe(change(tmp_path / "x.gguf", **WRONG[problem]))
    assert not list(tmp_path.parent.glob("*.partial"))


def test_damaged_files(tmp_path):
    change(tmp_path / "good.gguf")
    content = (tmp_path / "good.gguf").read_bytes()
    for name, bad in {"short": content[: len(content) // 2], "empty": b"", "text": b"hello" * 100, "magic": b"GGUX" + content[4:]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(bad)
        with pytest.raises(ConfigError, match=rf"{name}\.gguf cannot be read as GGUF: "):
            describe(f"hf:{tmp_path}/{name}.gguf")


def test_models_and_tokenizers_without_an_equivalent(tmp_path):
    run = import_run(f"hf:{pretrained_folders.gpt2(tmp_path / 'gpt2')}", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="a model of the type 'gpt2' with these options cannot be written as GGUF"):
        export_gguf(str(run.path), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="with --format=gguf it must be one of float16, q8_0"):
        export_gguf(str(run.path), str(tmp_path / "out"), dtype="bfloat16")
    assert not (tmp_path / "out").exists()
