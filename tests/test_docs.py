"""The commands and Python code of the documentation run."""

import json
import os
import re
import shlex

import numpy as np
import pytest
import small_configs
import warm_python
from conftest import ROOT

import jaxmodels
from jaxmodels.cli import main as cli
from jaxmodels.config import load_config, parse_override, set_at
from jaxmodels.experiment.sections import resolve

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADERS = sorted((ROOT / "configs").glob("*.py"))


def commands(page):
    """Return every line that begins with a command of this project, without comments."""
    lines = re.findall(
        r"(?:^|&& )(jaxmodels (?:train|plan|evaluate|generate|serve|chat|config|data|tokenizer|lineage|merge)\b[^\n]*)",
        page.read_text().replace("    jaxmodels", "jaxmodels"),
        re.M,
    )
    return [line.split("  #")[0] for line in lines]


@pytest.mark.parametrize("page", PAGES + HEADERS, ids=lambda p: p.name)
def test_commands_parse_and_name_what_exists(page, monkeypatch, published):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        arguments, overrides = cli.split_overrides(shlex.split(command)[1:])
        options = cli.parser().parse_args(arguments)  # exits if the command does not parse
        assert callable(options.function)
        if getattr(options, "config", None) and options.config.startswith("configs/"):
            name = options.config.removeprefix("configs/").partition(".py")[0]
            config = load_config(f"configs/{name}.py:{published(name)}" if "_hf_" in name else options.config)
            values = config.to_dict()
            for key, text in overrides.items():
                set_at(values, key, parse_override(text))
            assert resolve(values)


def test_there_are_commands_to_check():
    assert sum(len(commands(page)) for page in PAGES) > 10


def test_the_two_commands_are_at_the_top():
    top = (ROOT / "README.md").read_text().splitlines()[2:4]
    assert top == [
        "    pip install -e . && jaxmodels train --config=configs/cnn_digits.py --workdir=runs/cnn_digits",
        "    pip install -e '.[test]' && pytest",
    ]
    assert "pip install -q -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


def test_links_have_targets():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)
        for target in re.findall(r"`((?:configs|tests|benchmarks|docs)/\w+\.\w+)`", page.read_text()):
            assert (ROOT / target).exists(), (page, target)


def test_named_tests_exist_and_those_of_reliability_are_marked():
    """`pytest -m faults` runs all tests of docs/reliability.md, so each file or function that it names has that mark."""
    named = {page: re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()) for page in PAGES}
    for page, tests in named.items():
        for path, function in tests:
            content = (ROOT / path).read_text()
            decorators = re.search(rf"((?:^@.*\n|^ .*\n|^\]?\)\n)*)^def {function}\(", content, re.M)
            assert not function or decorators, (page, path, function)
            if page.name == "reliability.md":
                whole = re.search(r"^pytestmark = .*pytest\.mark\.faults", content, re.M)
                assert whole or "@pytest.mark.faults" in (decorators[1] if function else content), (path, function)
    assert len(named[ROOT / "docs" / "reliability.md"]) > 20


def test_every_config_has_a_row_of_results():
    results = (ROOT / "docs" / "results.md").read_text()
    for path in HEADERS:
        assert f"`{path.stem}" in results or "no result is claimed" in path.read_text(), path


def test_the_python_of_the_readme_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    os.symlink(ROOT / "configs", tmp_path / "configs")
    done = warm_python.run(["-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.8


def test_the_user_task_trains_and_its_metric_selects_the_best(tmp_path, monkeypatch):
    code = re.search(r"## A task of your own\n.*?```python\n(.*?)```", (ROOT / "docs" / "configs.md").read_text(), re.S)[1]
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = small_configs.config(small_configs.CNN, task={"name": "my_tasks:Ordinal", "tolerance": 1.5}, checkpoint__best="within_one")
    result = jaxmodels.train(config, str(tmp_path / "run"))
    values = [line for line in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if line["split"] == "validation"]
    assert result.evaluated_step == max(values, key=lambda line: (line["within_one"], -line["step"]))["step"]
    assert jaxmodels.load(str(tmp_path / "run")).predict({"image": np.zeros((2, 8, 8, 1), np.float32)}).shape == (2,)


def test_first_model_from_arrays_to_predictions(tmp_path):
    """Write every file of docs/first_model.md, and run every command, in order."""
    page = (ROOT / "docs" / "first_model.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page, re.S)
    assert len(blocks) == len(re.findall(r"^```\w", page, re.M)) >= 10
    outputs = {}
    for language, text in blocks:
        if language == "python":
            (tmp_path / re.match(r"# (\w+\.py)\n", text)[1]).write_text(text)
            continue
        for command in text.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "python"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
            done = warm_python.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (command, done.stderr)
            outputs[command] = done.stdout
    assert "stripes:StripeNet" in outputs["python -m jaxmodels config --config=config.py"]
    accuracy = float(outputs["python predict.py"].split()[-1])
    assert accuracy > 0.9
    evaluated = re.search(r"accuracy ([\d.]+)", outputs["python -m jaxmodels evaluate --workdir=runs/stripes"])
    assert abs(float(evaluated[1]) - accuracy) < 1e-3
    assert all(float(line) > 0.6 for line in outputs["python notebook.py"].splitlines()[-1:])
