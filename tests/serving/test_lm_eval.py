"""EleutherAI's lm-eval scores a served model as it scores the same folder with `transformers`, pair by pair.

    pip install 'lm-eval[api]'
    JAXMODELS_DATA_DIR=DATA JAXMODELS_WEIGHTS_DIR=DIR pytest -s -n 0 -m slow tests/serving/test_lm_eval.py

DIR is that of tests/pretrained/test_real_weights.py, DATA has `blimp`. 500 pairs, of 50 phenomena in turn.
"""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_port

pytestmark = pytest.mark.slow
PAIRS, EACH = 500, 10
TASK = """
task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
output_type: multiple_choice
validation_split: validation
num_fewshot: 0
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The folder of the task file."""
    files = sorted(Path(os.environ.get("JAXMODELS_DATA_DIR", "nowhere"), "blimp").glob("*.jsonl"))
    if not files:
        pytest.skip("JAXMODELS_DATA_DIR has no blimp")
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for file in files for line in file.read_text().splitlines()[:EACH]][:PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "pairs.yaml").write_text(TASK.format(file=folder / "pairs.jsonl"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """SmolLM2-135M as a folder of `transformers`, float32."""
    place = os.environ.get("JAXMODELS_WEIGHTS_DIR")
    found = sorted(Path(place).rglob("SmolLM2-135M-Instruct.Q4_1.gguf")) if place else []
    if not found:
        pytest.skip("JAXMODELS_WEIGHTS_DIR names no folder with SmolLM2-135M-Instruct.Q4_1.gguf")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("smollm2")
    transformers.AutoTokenizer.from_pretrained(found[0].parent, gguf_file=found[0].name).save_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(found[0].parent, gguf_file=found[0].name, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(found[0].parent, gguf_file=found[0].name)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # one that was read from GGUF cannot be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model):
    port = free_port()
    command = [sys.executable, "-m", "jaxmodels", "serve", f"--workdir=smollm2=hf:{model}", f"--port={port}", "--context=128", "--queue=64"]
    process = subprocess.Popen(command)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server ended"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def score(kind: str, arguments: dict, folder: Path, batch_size: int) -> list[list[float]]:
    """Return the log-likelihoods of both sentences of each pair, by lm-eval."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model=kind, model_args=arguments, tasks=["pairs"], task_manager=tasks, bootstrap_iters=0, batch_size=batch_size)
    print(kind, results["results"]["pairs"]["acc,none"])
    samples = sorted(results["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    return [[float(response[0][0]) for response in sample["resps"]] for sample in samples]


def test_answers_and_log_likelihoods_are_those_of_transformers(pairs, model, address):
    served = {"model": "smollm2", "base_url": f"{address}/v1/completions", "tokenizer": str(model), "tokenized_requests": True, "num_concurrent": 4}
    ours = score("local-completions", served, pairs, batch_size=1)
    theirs = score("hf", {"pretrained": str(model), "dtype": "float32", "device": "cpu"}, pairs, batch_size=16)
    assert len(ours) == len(theirs) == PAIRS
    differences = [abs(a - b) for our, their in zip(ours, theirs, strict=True) for a, b in zip(our, their, strict=True)]
    print(f"largest difference of {len(differences)} log-likelihoods: {max(differences):.2e}")
    assert max(differences) < 1e-3
    assert [a > b for a, b in ours] == [a > b for a, b in theirs]
