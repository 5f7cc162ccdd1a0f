"""/v1/predict: each task's inputs as people have them, and results that equal those of the run on arrays that are made by hand."""

import base64

import httpx
import numpy as np
import pytest
import served_runs
from PIL import Image
from served_runs import LETTERS, TAGS, png

from jaxmodels.data.features.image import to_array

KINDS = ("digits", "images", "classes", "pairs", "number", "tags", "table", "translate", "words", "gpt")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return served_runs.serve_models(served_runs.write_runs(tmp_path_factory.mktemp("runs"), *KINDS))


@pytest.fixture(scope="module")
def client(models):
    with served_runs.live(models) as live, httpx.Client(base_url=live.url) as client:
        yield client


@pytest.fixture
def predict(client):
    def predict(model, inputs, status=200, **more):
        answer = client.post("/v1/predict", json={"model": model, "inputs": inputs, **more})
        assert answer.status_code == status, answer.text
        return answer.json()["results"] if status == 200 else answer.json()["error"]["message"]

    return predict


def padded(*rows, length=16):
    table = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def named(result):
    return {entry["label"]: entry["probability"] for entry in result["labels"]}


def test_image_files_are_prepared_as_in_training(models, client, predict):
    files = [png((20, 30, 3), 1), png((8, 8, 3), 2)]
    arrays = [to_array(Image.open(__import__("io").BytesIO(file)), (8, 8), 3, "crop") for file in files]
    wanted = models["images"].run.predict({"image": np.stack(arrays)})
    plain = [base64.b64encode(file).decode() for file in files]
    results = [predict("images", plain), predict("images", [f"data:image/png;base64,{text}" for text in plain])]
    form = client.post("/v1/predict", data={"model": "images", "top": "2"}, files=[("file", file) for file in files])
    for result in results:
        for found, row in zip(result, wanted, strict=True):
            assert list(named(found)) == [["cat", "dog", "eel"][i] for i in np.argsort(-row)]
            np.testing.assert_allclose([named(found)[name] for name in ("cat", "dog", "eel")], row, rtol=1e-4)
    assert form.json()["results"] == [{"labels": result["labels"][:2]} for result in results[0]]
    values = arrays[1].tolist()
    np.testing.assert_allclose(named(predict("images", [(arrays[1] / 255).tolist()])[0])["cat"], wanted[1][0], rtol=1e-4)
    assert values and len(predict("images", plain * 3)) == 6  # more than a batch


def test_a_run_without_a_rule_for_other_sizes_says_so(predict, models):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    file = served_runs.png((8, 8, 1), 0)
    found = predict("digits", [base64.b64encode(file).decode()])[0]
    wanted = models["digits"].run.predict({"image": image[None]})[0]
    np.testing.assert_allclose(named(found)["3"], wanted[3], rtol=1e-4)
    other = base64.b64encode(png((9, 8, 1))).decode()
    message = predict("digits", [other], 400)
    assert "8 × 9 pixels, and the model reads 8 × 8: the data of the run (digits) does not say how images of other sizes are resized" in message


def test_texts_and_pairs(predict, models):
    texts = ["good day", "bad"]
    wanted = models["classes"].run.predict({"tokens": padded(*map(LETTERS.encode, texts))})
    for found, row in zip(predict("classes", texts), wanted, strict=True):
        np.testing.assert_allclose([named(found)[name] for name in ("bad", "good")], row, rtol=1e-4)
    assert predict("classes", [LETTERS.encode("bad").tolist()])[0] == predict("classes", ["bad"])[0]
    value = predict("number", ["good day"])[0]["value"]
    np.testing.assert_allclose(value, models["number"].run.predict({"tokens": padded(LETTERS.encode("good day"))})[0], rtol=1e-4)
    end = LETTERS.special("end")
    row = [*LETTERS.encode("day"), end, *LETTERS.encode("night")]
    types = np.array([0] * 4 + [1] * 5 + [0] * 7)[None]
    wanted = models["pairs"].run.predict({"tokens": padded(row), "types": types})[0]
    for item in ({"text": "day", "pair": "night"}, ["day", "night"]):
        np.testing.assert_allclose(named(predict("pairs", [item])[0])["yes"], wanted[1], rtol=1e-4)
    message = predict("classes", ["a long text that is cut"], 400)
    assert "23 tokens, where 16 fit: shorten it, or set 'truncate': true" in message
    cut = models["classes"].run.predict({"tokens": padded(LETTERS.encode("a long text that")[:16])})[0]
    np.testing.assert_allclose(named(predict("classes", ["a long text that is cut"], truncate=True)[0])["good"], cut[1], rtol=1e-4)


def test_tags_are_spans_of_the_text(predict, models):
    text = "paris, in  france."
    words = [("paris", 0), (",", 5), ("in", 7), ("france", 11), (".", 17)]
    tokens, tags = [], []
    for i, (word, _) in enumerate(words):
        pieces = LETTERS.encode(f" {word}" if i else word)
        tokens += pieces.tolist()
        tags += [-1] * bool(i) + [0] + [-1] * (len(pieces) - 1 - bool(i))
    shown = padded(tokens, length=32)[:, :16], padded(tags, length=32)[:, :16]
    predicted = models["tags"].run.predict({"tokens": shown[0], "tags": shown[1]})[0]
    names = [TAGS[i] for i in predicted[shown[1][0] >= 0]]
    message = predict("tags", [text], 400)
    assert f"{len(tokens)} tokens, where 16 fit" in message
    (found,) = predict("tags", [text], truncate=True)
    assert found["tags"] == names and found["truncated"] == len(names) < 5
    for span in found["spans"]:
        assert text[span["start"] : span["end"]] == span["text"] and span["label"] in ("LOC", "PER")
    (listed,) = predict("tags", [["paris", "in"]])
    assert len(listed["tags"]) == 2


def test_spans_join_the_tags_of_an_entity(models):
    form = models["tags"].predictor.form
    places = [(0, 3), (4, 7), (8, 11), (12, 15), (16, 19)]
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC"]
    assert form._spans(tags, places) == [(0, 7, "PER"), (12, 15, "LOC"), (16, 19, "LOC")]


def test_tables_are_in_the_units_of_the_data(predict, models):
    table = np.array([[9.0, -5.0], [10.0, -4.5], [12.0, -5.5], [8.0, -6.0]])
    mean, deviation = np.array([10.0, -5.0]), np.array([2.0, 0.5])
    past = ((table - mean) / deviation).astype(np.float32)[None]
    wanted = models["table"].run.predict({"past": past})[0] * deviation + mean
    for item in (table.tolist(), [[0, 0], *table.tolist()], {"load": table[:, 0].tolist(), "heat": table[:, 1].tolist()}):
        (found,) = predict("table", [item])
        assert found["columns"] == ["load", "heat"]
        np.testing.assert_allclose(found["forecast"], wanted, rtol=1e-4)


def test_sources_become_targets(predict):
    (found,) = predict("translate", ["abc"])
    assert found == {"text": ("bcd" * 7)[:20], "finish_reason": "length"}  # as long as the targets of the data


WRONG = {
    "no_base64": ("images", ["?!"], "inputs: it is neither base64 nor a data: URL of an image."),
    "address": ("images", ["https://example.org/cat.png"], "no address is opened"),
    "no_image": ("images", [base64.b64encode(b"no image at all").decode()], "cannot be decoded as an image"),
    "ps": ("images", [base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n").decode()], "cannot be decoded as an image"),
    "shape": ("images", [[[1.0, 2.0]]], "the image must be 8 × 8 × 3 numbers"),
    "second": ("images", [[[[0.1] * 3] * 8] * 8, "?!"], "inputs.1: "),
    "blank": ("classes", ["  "], "is empty"),
    "number": ("classes", [3], "an input must be a text"),
    "tokens": ("classes", [[1, 10**20]], "token ids must be whole numbers from 0 to 32"),
    "one_text": ("pairs", ["a"], "the model reads two texts"),
    "words": ("tags", ["   "], "the text has no word"),
    "short": ("table", [[[1, 2]] * 3], "the table has 3 rows, and the model reads the last 4"),
    "ragged": ("table", [[[1, 2], [3]]], "rows of equal length"),
    "null": ("table", [[[1, None]] * 4], "the table must be"),
    "far": ("table", [[[1, 1e300]] * 4], "too large for float32"),
    "column": ("table", [{"load": [1, 2, 3, 4]}], "the column 'heat' is missing"),
    "task": ("gpt", ["a"], "has no form of /v1/predict: use /v1/completions"),
    "masked": ("words", ["a"], "use /v1/embeddings"),
    "none": ("images", [], "inputs: "),
    "many": ("classes", ["a"] * 257, "257 inputs in one call, and the limit is 256"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named(predict, case):
    model, inputs, message = WRONG[case]
    found = predict(model, inputs, 400)
    assert message in found and "\n" not in found


def test_an_image_bomb_is_refused_before_it_is_decoded(predict, models, monkeypatch):
    monkeypatch.setattr(models["images"].predictor.form.feature, "max_pixels", 1000)
    message = predict("images", [base64.b64encode(png((100, 100, 3))).decode()], 400)
    assert "100 × 100 pixels, and data.max_pixels=1,000" in message


def test_schemas_accept_what_is_accepted(client, predict):
    jsonschema = pytest.importorskip("jsonschema")
    inputs = {"classes": "good day", "pairs": {"text": "a", "pair": "b"}, "number": "a", "tags": "paris", "table": [[1, 2]] * 4, "translate": "abc"}
    inputs["digits"] = [[[0.5]] * 8] * 8
    for name, item in inputs.items():
        model = client.get(f"/v1/models/{name}").json()
        jsonschema.validate(item, model["input"])
        jsonschema.validate(predict(name, [item])[0], model["output"])
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0" and "Predict-table" in document["components"]["schemas"]
    page = client.get("/docs").text
    assert "/v1/predict" in page and "http://" not in page.replace("http://127.0.0.1", "") and "<script" not in page
