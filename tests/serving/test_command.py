"""`jaxmodels serve` as a process: its start, its end, and what it refuses before it loads anything."""

import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import served_runs
import small_configs
from conftest import ROOT

from jaxmodels.cli import main as cli
from jaxmodels.experiment.sections import resolve
from jaxmodels.runs.folder import RunFolder
from jaxmodels.serving.served import named


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return served_runs.write_runs(tmp_path_factory.mktemp("runs"), "digits")


def refused(capsys, *arguments):
    status = cli.run(["serve", *arguments])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1, err
    return err


def test_wrong_starts_are_one_line_each(runs, tmp_path, capsys):
    digits = f"--workdir={runs['digits']}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at: Address already in use; give another --port" in refused(capsys, digits, f"--port={port}")
    assert "lets other machines ask: give --api_keys=FILE" in refused(capsys, digits, "--host=0.0.0.0", "--port=0")
    assert "two models have the name 'digits'" in refused(capsys, digits, digits, "--port=0")
    assert str(tmp_path / "none") in refused(capsys, f"--workdir={tmp_path / 'none'}", "--port=0")
    folder = RunFolder(tmp_path / "young")
    folder.path.mkdir()
    folder.write_config(resolve(small_configs.CNN))
    folder.update_manifest(info={"image_shape": (8, 8, 1), "num_classes": 10})
    assert "has no checkpoint yet" in refused(capsys, f"--workdir={folder.path}", "--port=0")
    assert "--batch and --output go together" in refused(capsys, digits, "--batch=in.jsonl")
    assert "--cors=example.org: an origin is a scheme and a host" in refused(capsys, digits, "--cors=example.org", "--port=0")
    assert "--config.model.width: a run is served by its own config; only its mesh" in refused(capsys, digits, "--config.model.width=3")
    assert "'often' is no rate limit" in refused(capsys, digits, "--rate_limit=often", "--port=0")


def test_models_are_named_by_their_folders_or_by_hand(tmp_path):
    found = named([f"{tmp_path}/one", f"b={tmp_path}/two", "hf:OWNER/three", "c=hf:OWNER/four?accept=key", f"{tmp_path}/five@best"])
    assert found == {
        "one": f"{tmp_path}/one",
        "b": f"{tmp_path}/two",
        "three": "hf:OWNER/three",
        "c": "hf:OWNER/four?accept=key",
        "five": f"{tmp_path}/five@best",
    }


def test_a_process_serves_until_it_is_told_to_end(runs, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in RunFolder(runs["digits"]).path.rglob("*"))
    command = [sys.executable, "-m", "jaxmodels", "serve", f"--workdir={runs['digits']}", "--port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        url = re.fullmatch(r"ready at (http://127.0.0.1:\d+)\n", lines[1])[1]
        assert lines[0] == "digits: classify, /v1/predict\n"
        inputs = [[[[0.5]] * 8] * 8]
        assert len(httpx.post(f"{url}/v1/predict", json={"inputs": inputs}).json()["results"]) == 1
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0 and '"path": "/v1/predict", "status": 200' in err and "Traceback" not in err
    assert before == sorted((path, path.stat().st_mtime_ns) for path in RunFolder(runs["digits"]).path.rglob("*"))


def test_a_file_of_requests_on_the_command_line(runs, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"inputs": [[[[0.5]] * 8] * 8]}
    source.write_text("".join(json.dumps({"custom_id": str(i), "url": "/v1/predict", "body": body}) + "\n" for i in range(3)))
    arguments = ["serve", f"--workdir={runs['digits']}", f"--batch={source}", f"--output={output}"]
    assert cli.run(arguments) == 0 and f"{output}: 3 answers." in capsys.readouterr().out
    assert [json.loads(line)["response"]["status_code"] for line in output.read_text().splitlines()] == [200] * 3
    assert cli.run(arguments) == 0 and "0 answers, 3 were there already." in capsys.readouterr().out
