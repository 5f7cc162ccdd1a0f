"""Children that trained adapters of one parent, mixed in one batch on one copy of its weights, write what each of them writes alone."""

import pytest
from adapter_runs import LETTERS, LORAS, child_of
from engines import Answers, prompts, small_sizes
from random_models import LLAMA, T5, run_of

import jaxmodels
from jaxmodels.errors import ConfigError
from jaxmodels.serving import engine as engine_lib


@pytest.mark.parametrize(
    ("model", "task"),
    [
        pytest.param({"name": "gpt", **LLAMA, "window": 9, "scan": True}, "language_model", marks=pytest.mark.slow),
        pytest.param({"name": "gpt", **LLAMA}, "language_model", marks=pytest.mark.slow),
        pytest.param({"name": "encoder_decoder", **T5, "tie_embeddings": False}, "seq2seq", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_mixed_in_one_batch(model, task, tmp_path):
    parent = run_of(tmp_path / "parent", model, {"name": task}, LETTERS)
    children = {name: child_of(parent, tmp_path / name, lora, seed=i) for i, (name, lora) in enumerate(LORAS.items())}
    alone = {None: jaxmodels.load(parent)} | {name: jaxmodels.load(path) for name, path in children.items()}
    given = prompts(3, 20, 9)
    expected = {name: [c.tokens for c in run.generate([list(tokens) for tokens in given], max_tokens=12)] for name, run in alone.items()}
    assert expected[None] != expected["thin"] != expected["dora"]
    with small_sizes():
        engine = engine_lib.for_run(alone[None], slots=6, context=64, adapters=children)
    answers = Answers(engine.start())
    try:
        for _ in range(2):  # the second time, prompts begin with what was read, each with its own adapter
            tickets = {name: [answers.ask(tokens, max_tokens=12, adapter=name) for tokens in given] for name in expected}
            assert {name: [answers.tokens(ticket) for ticket in own] for name, own in tickets.items()} == expected
        with pytest.raises(ConfigError, match="no adapter 'x'; there are thin, dora"):
            answers.ask((1,), adapter="x")
    finally:
        engine.close()


def test_runs_that_are_no_adapters_of_it_are_refused(tmp_path):
    model = {"name": "gpt", "layers": 1, "heads": 2, "width": 16, "context": 64}
    parent = run_of(tmp_path / "parent", model, {"name": "language_model"}, LETTERS)
    other = run_of(tmp_path / "other", model, {"name": "language_model"}, LETTERS)
    run, lora = jaxmodels.load(parent), {"rank": 2, "targets": ("query$",)}
    for child, message in (
        (other, "has trained no adapters"),
        (child_of(other, tmp_path / "a", lora), "is not that of .*parent at step 7"),
        (child_of(parent, tmp_path / "b", lora, trained=("final_norm/scale",)), "final_norm/scale .* is not that of"),
        (child_of(parent, tmp_path / "c", {"rank": 2, "targets": ("embed$",)}), "embed is an embedding"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_lib.for_run(run, adapters={"it": child})
    child = child_of(parent, tmp_path / "d", lora)
    with pytest.raises(ConfigError, match="has adapters itself"):
        engine_lib.for_run(jaxmodels.load(child), adapters={"it": child})
    lstm = run_of(tmp_path / "lstm", {"name": "lstm", "width": 16}, {"name": "language_model"}, LETTERS)
    with pytest.raises(ConfigError, match="on Transformers only, not on RecurrentLM"):
        engine_lib.for_run(jaxmodels.load(lstm), adapters={"it": child})
