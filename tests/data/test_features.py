"""Features: boxes, audio and tags from rows of any reader, and keys composed from parts."""

import io
import json
import wave

import numpy as np
import pytest
from PIL import Image

from jaxmodels import config as config_lib
from jaxmodels.data import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.sources import rows as row_sources
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.simple import WordTokenizer


def jsonl(folder, *records):
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{folder}"


def wav(samples, rate=8000):
    """The bytes of a WAV file; samples: integers [S] or [S, channels]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        sound.setsampwidth(samples.dtype.itemsize)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


AUDIO = {"audio_column": "clip", "samples": 6, "sample_rate": 8000, "holdout": 0.0}


def test_audio_is_decoded_padded_and_averaged(tmp_path):
    (tmp_path / "clips").mkdir()
    values = np.array([0, 16384, -32768, 32767], np.int16)
    clips = {
        "mono": values,
        "stereo": np.stack([values, np.zeros_like(values)], 1),
        "bytes": np.array([128, 192, 0], np.uint8),
        "long": np.arange(9, dtype="<i4") << 24,
    }
    for name, samples in clips.items():
        (tmp_path / "clips" / f"{name}.wav").write_bytes(wav(samples))
    source = jsonl(tmp_path, *({"clip": f"clips/{name}.wav", "label": name} for name in clips))
    dataset = open_dataset(source, AUDIO, None)
    got = dict(zip(clips, dataset.splits["train"], strict=True))
    exact = values.astype(np.float32) / 32768
    np.testing.assert_array_equal(got["mono"]["audio"], [*exact, 0, 0])
    np.testing.assert_array_equal(got["stereo"]["audio"], [*(exact / 2), 0, 0])
    np.testing.assert_array_equal(got["bytes"]["audio"], [0, 0.5, -1, 0, 0, 0])
    np.testing.assert_array_equal(got["long"]["audio"], np.arange(6) / 128)
    assert {name: int(row["audio_length"]) for name, row in got.items()} == {"mono": 4, "stereo": 4, "bytes": 3, "long": 6}
    assert all(row["audio"].dtype == np.float32 and dataset.info["labels"][row["label"]] == name for name, row in got.items())
    assert dataset.info["sample_rate"] == 8000 and dataset.info["samples"] == 6
    assert inspect.describe(dataset, "train", 9)["audio"] == {"least": 3 / 8000, "mean": 4.25 / 8000, "most": 6 / 8000}
    assert inspect.readable(dataset, got["mono"])["audio"] == "0.0005 s, peak 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF", "line 2: cannot be decoded as WAV or FLAC audio: the file ends early"),
        (wav(np.zeros(3, np.int16), 44100), r"line 2: the sample rate is 44100 Hz, not data\.sample_rate=8000"),
    ],
)
def test_bad_audio_is_named_or_skipped(tmp_path, content, message):
    (tmp_path / "good.wav").write_bytes(wav(np.full(3, 100, np.int16)))
    (tmp_path / "bad.wav").write_bytes(content)
    source = jsonl(tmp_path, {"clip": "good.wav", "label": 0}, {"clip": "bad.wav", "label": 1}, {"clip": "missing.wav", "label": 1})
    train = open_dataset(source, AUDIO, None).splits["train"]
    assert train[0]["audio_length"] == 3
    with pytest.raises(ConfigError, match=message):
        train[1]
    with pytest.raises(ConfigError, match="line 3: cannot be decoded as WAV or FLAC audio: .*missing.wav"):
        train[2]
    skipping = open_dataset(source, AUDIO | {"on_bad_example": "skip"}, None).splits["train"]
    assert [float(skipping[i]["skipped"]) for i in range(3)] == [0, 1, 1] and not skipping[1]["audio"].any()
    before = train.fingerprint()
    (tmp_path / "good.wav").write_bytes(wav(np.full(4, 100, np.int16)))
    assert train.fingerprint() != before, "another file is another data set"


BOXES = {"boxes_column": "boxes", "box_labels_column": "kinds", "max_boxes": 2, "holdout": 0.0}


def test_boxes_belong_to_their_image(tmp_path):
    for i in range(2):
        Image.new("L", (8, 4), 50 * i).save(tmp_path / f"{i}.png")
    rows = [
        {"image": "0.png", "boxes": [[0, 0.25, 0.5, 1], [0.5, 0.5, 0.75, 0.75]], "kinds": ["dog", "cat"]},
        {"image": "1.png", "boxes": [], "kinds": []},
    ]
    source = jsonl(tmp_path, *rows)
    options = BOXES | {"image_column": "image", "size": 4, "channels": 1, "fit": "stretch"}
    dataset = open_dataset(source, options, None)
    first, second = dataset.splits["train"]
    np.testing.assert_array_equal(first["boxes"], np.array(rows[0]["boxes"], np.float32))
    assert first["box_labels"].tolist() == [1, 0] and dataset.info["box_labels"] == ["cat", "dog"]
    assert (second["boxes"] == -1).all() and second["boxes"].shape == (2, 4) and second["box_labels"].tolist() == [-1, -1]
    assert second["image"].shape == (4, 4, 1) and (second["image"] == 50).all()
    assert inspect.readable(dataset, first)["boxes"] == "dog 0, 0.25, 0.5, 1; cat 0.5, 0.5, 0.75, 0.75"
    assert inspect.describe(dataset, "train", 9)["box_labels"] == {"cat": 1, "dog": 1}
    with pytest.raises(ConfigError, match=r"config\.data\.fit must be 'stretch'"):
        open_dataset(source, options | {"fit": "crop"}, None)
    with pytest.raises(ConfigError, match=r"config\.data\.fit must be 'stretch' with boxes, without scale_to"):
        open_dataset(source, options | {"scale_to": 8}, None)


@pytest.mark.parametrize(
    ("boxes", "kinds", "message"),
    [
        ([[0, 0, 1]], ["a"], "line 2: 'boxes' is not a list of boxes"),
        ([[0, 0, 2, 1]], ["a"], r"line 2: the box \[0.0, 0.0, 2.0, 1.0\] is not"),
        ([[0.5, 0, 0.5, 1]], ["a"], "with left < right"),
        ([[0, 0, 1, 1]], [], "not a list of 1 class names"),
        ([[0, 0, 1, 1]] * 3, ["a"] * 3, "3 boxes, where 2 fit; raise data.max_boxes"),
    ],
)
def test_bad_boxes_are_named_or_left_out(tmp_path, boxes, kinds, message):
    source = jsonl(tmp_path, {"boxes": [[0, 0, 1, 1]], "kinds": ["a"]}, {"boxes": boxes, "kinds": kinds})
    with pytest.raises(ConfigError, match=message):
        open_dataset(source, BOXES, None)
    dataset = open_dataset(source, BOXES | {"on_bad_example": "skip"}, None)
    assert len(dataset.splits["train"]) == 1 and dataset.skipped == {"train": 1}


def test_tags_of_json_lines_equal_those_of_conll(tmp_path):
    sentences = [[("Ann", "B-PER"), ("Lee", "I-PER"), ("sleeps", "O")], [("Paris", "B-LOC")]]
    (tmp_path / "train.conll").write_text("\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in s) for s in sentences))
    source = jsonl(tmp_path, *({"words": [word for word, _ in s], "tags": [tag for _, tag in s]} for s in sentences))
    options = {"sequence_length": 12, "tokenizer": "byte", "holdout": 0.0}
    one = open_dataset(f"conll:{tmp_path}", options, None)
    other = open_dataset(source, options | {"words_column": "words", "tags_column": "tags"}, None)
    assert one.splits["train"].fingerprint() == other.splits["train"].fingerprint() and one.info["tags"] == other.info["tags"]


def test_keys_are_those_of_the_parts_and_documented():
    fields = config_lib.fields(row_sources.tsv)
    assert fields["text_column"] == (int | str, 0) and fields["header"] == (bool | None, None) and fields["sequence_length"] == (int | None, None)
    assert config_lib.fields(row_sources.jsonl)["text_column"] == (str, "text") and "header" not in config_lib.fields(row_sources.jsonl)
    assert config_lib.positional(row_sources.tsv) == ["path", "data_dir"]
    undocumented = [key for key in fields if f"{key}:" not in row_sources.tsv.__doc__ and f"{key}," not in row_sources.tsv.__doc__]
    assert not undocumented
    with pytest.raises(TypeError, match="txet_column"):
        row_sources.tsv("x", None, txet_column=1)


def test_training_texts_are_those_of_the_training_rows(tmp_path):
    from jaxmodels.data.registry import open_source

    (tmp_path / "train.tsv").write_text("a b\t0\nc\t1\n")
    (tmp_path / "test.tsv").write_text("d\t0\n")
    options = {"sequence_length": 2, "tokenizer": "word:9", "holdout": 0.0}
    opened = open_source(f"tsv:{tmp_path}", options, None)
    assert list(opened.training_texts()) == ["a b", "c"]
    dataset = opened.tokenize(WordTokenizer(["c"]))
    assert dataset.info["vocab_size"] == 5 and dataset.splits["train"].arrays["tokens"].tolist() == [[0, 0], [4, -1]]
    alphabet = open_source(f"tsv:{tmp_path}", options | {"tokenizer": "character"}, None)
    assert list(alphabet.training_texts()) == ["a b", "c", "d"], "an alphabet has no token for unknown characters"


def finished(*, tokenizer: str = "byte"):
    """A user's source that tokenizes its texts itself."""
    return open_dataset("dates", {"examples": 5, "held_out": 2, "tokenizer": tokenizer}, None)


def test_a_mixture_names_the_part_that_gives_no_training_texts():
    sources = {"own": f"{__name__}:finished"}
    with pytest.raises(ConfigError, match=r"config\.data\.sources\.own\.source: .*gives no texts to train data\.tokenizer='word:50' on"):
        open_dataset("mixture", {"sources": sources, "tokenizer": "word:50"}, None)
    assert len(open_dataset("mixture", {"sources": sources, "tokenizer": "byte+special"}, None).splits["train"]) == 5
