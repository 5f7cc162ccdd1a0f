"""Files of requests: answers, errors, resuming after a torn line."""

import json

import pytest
import served_runs

from jaxmodels.errors import ConfigError
from jaxmodels.serving import batch_files
from jaxmodels.serving.service import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    runs = served_runs.write_runs(tmp_path_factory.mktemp("runs"), "gpt", "classes")
    service = Service()
    service.use(served_runs.serve_models(runs, make=served_runs.fake_engine(queue=2)))
    return service


def line(number, url="/v1/completions", **body):
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"model": "gpt", "prompt": "abc", "max_tokens": 3} | body}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_request_has_an_answer_and_a_torn_line_is_made_again(service, tmp_path):
    lines = [line(i) for i in range(20)]
    lines[3]["body"]["max_tokens"] = -1
    lines[4]["body"]["stream"] = True
    lines[5] |= {"url": "/v1/predict", "body": {"model": "classes", "inputs": ["a"]}}
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    requests = batch_files.read_requests(source)
    done = []
    assert batch_files.answered(output) == set()
    assert batch_files.answer_file(service, requests, output, together=8, progress=lambda: done.append(1)) == 2
    answers = {answer["custom_id"]: answer for answer in map(json.loads, output.read_text().splitlines())}
    assert len(done) == len(answers) == 20
    assert answers["r0"]["response"]["body"]["choices"][0]["text"] == "bcd" and answers["r0"]["error"] is None
    assert [answers[f"r{i}"]["response"]["status_code"] for i in (3, 4, 5)] == [400, 400, 200]
    whole = output.read_bytes()
    output.write_bytes(whole[:-10])
    there = batch_files.answered(output)
    assert len(there) == 19 and output.read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]
    left = [request for request in requests if request["custom_id"] not in there]
    batch_files.answer_file(service, left, output, together=8)
    assert batch_files.answered(output) == set(answers) and len(output.read_text().splitlines()) == 20


def test_wrong_files_are_named_by_line(tmp_path):
    good = line(1)
    for lines, message in (
        (["{"], "line 1: it is not JSON"),
        ([good, {"custom_id": 1, "body": {}}], "line 2: a request has custom_id"),
        ([good, line(2, url="/v1/none")], "line 2: method and url are 'POST' and '/v1/none'"),
        ([good, good], "line 2: the custom_id 'r1' is there twice"),
        ([], "has no request"),
    ):
        file = tmp_path / "in.jsonl"
        file.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
        with pytest.raises(ConfigError, match=message):
            batch_files.read_requests(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        batch_files.read_requests(tmp_path / "none")
    (tmp_path / "out").write_text("no answer\n")
    with pytest.raises(ConfigError, match="line 1: it is no answer of this command"):
        batch_files.answered(tmp_path / "out")
