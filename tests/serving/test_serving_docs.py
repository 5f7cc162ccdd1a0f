"""The requests in docs/serving.md are answered."""

import json
import re
import shutil
import string
import subprocess

import httpx
import pytest
import served_runs
from conftest import ROOT
from untrained_runs import untrained_run

from jaxmodels.serving import schemas
from jaxmodels.tokenizers.simple import CharacterTokenizer

TEXT = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
NAMES = {"gpt_text": "chat", "chat": "chat", "tags": "tags", "cifar": "images"}  # of the document -> run
LETTERS = CharacterTokenizer(string.printable, special=True)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    runs = served_runs.write_runs(tmp_path_factory.mktemp("runs"), "chat", "images")
    encoder, rows = served_runs.ENCODER | {"context": 64}, served_runs.ROWS | {"sequence_length": 64}
    tagger = {"model": encoder, "task": {"name": "tag"}, "data": {"source": "conll:none", **rows}} | served_runs.REST
    info = {"vocab_size": LETTERS.vocab_size, "tokenizer": LETTERS, "tags": served_runs.TAGS, "num_tags": 5}
    runs["tags"] = untrained_run(tagger, info, tmp_path_factory.mktemp("tagger") / "tags")
    with served_runs.live(served_runs.serve_models({name: runs[run] for name, run in NAMES.items()})) as live:
        yield live


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_the_requests_of_curl_are_answered(live, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    for seed, name in enumerate(("frog.png", "ship.png")):
        (tmp_path / name).write_bytes(served_runs.png((20, 30, 3), seed))
    commands = [command for block in blocks("bash") for command in re.findall(r"^curl (?:.*\\\n)*.*", block, re.M)]
    commands += re.findall(r"`(curl [^`]*)`", TEXT)
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(["bash", "-c", command.replace(ADDRESS, live.url)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)
        assert answer.get("results") or answer.get("choices"), (command, answer)
    assert len(answer["results"]) == 2


def test_the_python_gets_its_answer(live):
    (code,) = blocks("python")
    names = {}
    exec(compile(code.replace(ADDRESS, live.url), "docs/serving.md", "exec"), names)
    assert names["chunk"].choices[0].finish_reason in ("stop", "length")


def test_the_line_of_a_batch_is_a_request():
    (line,) = blocks("json")
    body = json.loads(line)["body"]
    assert schemas.parse(schemas.Chat, json.dumps(body).encode()).messages[0].text == body["messages"][0]["content"]


def test_the_keys_and_figures_that_are_named_exist(live):
    keys = re.search(r"Keys of a request: (.*?)\. As in", TEXT, re.S)[1]
    assert set(re.findall(r"`(\w+)`", keys)) <= set(schemas.Completion.model_fields) | set(schemas.Chat.model_fields)
    figures = httpx.get(f"{live.url}/metrics").text
    named = set(re.findall(r"`(jaxmodels_\w+)`", TEXT))
    assert {name for name in named if f"# TYPE {name} " not in figures} == set() and "jaxmodels_queue" in named
