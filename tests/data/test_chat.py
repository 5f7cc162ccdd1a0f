"""Conversations: the text and the mask of answers equal those of `transformers`; rows, losses and errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_folders as folders
from tokenizer_folders import CHATML, write

from jaxmodels.data.inspect import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.sources.chat import in_spans, template_of
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.tasks.language_model import LanguageModel
from jaxmodels.tokenizers.chat_template import ChatTemplate, TemplateProblem
from jaxmodels.tokenizers.factory import make_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
# Kinds of templates: plain turns; answers marked by the template (once within a macro); instructions around the user's text; reasoning that is
# removed from an answer when another follows.
CHATML_MARKED = (
    "{%- macro line(role) -%}<|im_start|>{{ role }}\n{% endmacro -%}\n"
    "{%- for message in messages %}\n    {{- line(message.role) }}\n    {%- if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}\n    {%- else %}{{ message.content }}<|im_end|>{{ '\n' }}"
    "{%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ line('assistant') }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS = (
    "{%- set last = namespace(user=-1) %}{%- for message in messages %}"
    "{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > last.user %}{{- '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{- message.content + '<|im_end|>\n' }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "marked": CHATML_MARKED, "instructions": INSTRUCTIONS, "thoughts": THOUGHTS}
TALK = [
    {"role": "user", "content": "the cat sat?"},
    {"role": "assistant", "content": "on the mat 🙂\n"},
    {"role": "user", "content": " naïve café "},
    {"role": "assistant", "content": "the dog ran\n\nafter the cat"},
]
SYSTEM = [{"role": "system", "content": "the lazy dog"}, *TALK]


@pytest.fixture(scope="module")
def tokenizer_json():
    return folders.byte_level(SPECIAL).to_str()


@pytest.fixture
def model(tmp_path, tokenizer_json):
    """Write the folder of a model with a template, or without one for None; return the folder."""

    def make(template, name="model", rows=330):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
        settings |= {} if template is None else {"chat_template": template}
        files = {"config.json": {"model_type": "llama", "vocab_size": rows}, "tokenizer.json": tokenizer_json, "tokenizer_config.json": settings}
        return write(tmp_path / name, files)

    return make


def dataset(folder, rows, **options):
    """Open the chat source of rows, by default without a validation split."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    write(folder, {"train.jsonl": text + "\n"})
    return open_dataset(f"chat:{folder}/train.jsonl", {"sequence_length": 128, "tokenizer": f"hf:{folder}", "holdout": 0.0, **options}, None)


def learned(coder, tokens, counts):
    """Return the texts that count in the loss, one for each contiguous run of tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts, [0]]))).reshape(-1, 2)
    return [coder.decode(tokens[start:stop]) for start, stop in edges]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_tokens_are_those_of_transformers(name, model):
    import transformers

    folder = model(TEMPLATES[name])
    ours, theirs = make_tokenizer(f"hf:{folder}", (), None), transformers.AutoTokenizer.from_pretrained(folder)
    template = template_of(ours)
    for messages in (TALK, SYSTEM, TALK[:3]) if name != "instructions" else (TALK, TALK[:2]):
        for prompt in (False, True):
            text = template.render(messages, prompt=prompt)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.read(text)[0].tolist() == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]


def test_the_mask_of_a_template_that_marks_answers_is_that_of_transformers(model):
    import transformers

    folder = model(CHATML_MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [TALK, SYSTEM, TALK[:2], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "🙂"}]]
    data = dataset(folder, [{"messages": messages} for messages in rows], packing="none")
    assert set(data.splits["train"].arrays) == {"tokens", "counts"}
    for i, messages in enumerate(rows):
        wanted = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        row = data.splits["train"][i]
        size = len(wanted["input_ids"])
        assert row["tokens"].tolist() == wanted["input_ids"] + [-1] * (129 - size)
        assert row["counts"].tolist() == [bool(x) for x in wanted["assistant_masks"]] + [False] * (129 - size)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["on the mat 🙂\n<|im_end|>", "the dog ran\n\nafter the cat<|im_end|>"]),
        ("marked", ["on the mat 🙂\n<|im_end|>", "the dog ran\n\nafter the cat<|im_end|>"]),
        ("instructions", [" on the mat 🙂\n</s>", " the dog ran\n\nafter the cat</s>"]),
        ("thoughts", ["on the mat 🙂\n<|im_end|>", "<think>\n\n</think>\n\nthe dog ran\n\nafter the cat<|im_end|>"]),
    ],
)
def test_the_mask_of_a_template_that_does_not_mark_them_is_found_by_prefixes(name, answers, model):
    folder = model(TEMPLATES[name])
    data = dataset(folder, [{"messages": TALK}], packing="none")
    coder, row = data.info["tokenizer"], data.splits["train"][0]
    assert learned(coder, row["tokens"], row["counts"]) == answers
    # The tokens before each answer are those that a model gets as its prompt.
    first = int(np.argmax(row["counts"]))
    prompt = template_of(coder).render(TALK[:1], prompt=True)
    assert row["tokens"][:first].tolist() == coder.read(prompt)[0].tolist()


def test_a_template_whose_prompt_is_not_a_prefix_is_an_error_with_a_solution(model):
    odd = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>")
    with pytest.raises(ConfigError, match=r"train.jsonl, line 1: .*before message 1.*data.template"):
        dataset(model(odd), [{"messages": TALK}])


def test_rows_in_other_forms_give_the_same_examples(model):
    folder = model(CHATML)
    question, answer = TALK[:2]
    rows = [
        {"messages": [question, answer], "id": 7},
        {"prompt": question["content"], "completion": answer["content"]},
        {"prompt": [question], "completion": [answer]},
        {"conversations": [{"from": "human", "value": question["content"]}, {"from": "gpt", "value": answer["content"]}]},
    ]
    arrays = dataset(folder, rows, packing="none").splits["train"].arrays
    for name, values in arrays.items():
        assert (values == values[0]).all(), name
    tool = [question, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "1"}, answer]
    lenient = CHATML.replace("message['content']", "(message['content'] or '')")
    data = dataset(model(lenient, "tools"), [{"messages": tool, "tools": [{"name": "f"}]}], packing="none")
    assert learned(data.info["tokenizer"], *data.splits["train"][0].values())[-1] == answer["content"] + "<|im_end|>"


def test_conversations_are_packed_whole_and_attend_only_to_themselves(model):
    folder = model(CHATML)
    rows = [{"messages": TALK[:2]}, {"messages": TALK}, {"messages": TALK[2:]}]
    single = dataset(folder, rows, packing="none")
    packed = dataset(folder, rows)
    source = packed.splits["train"]
    assert any("tokens count in the loss" in note for note in packed.notes)
    found = []
    for i in range(len(source)):
        row = source[i]
        assert {key: value.dtype for key, value in row.items()} == {"tokens": np.int32, "segments": np.int32, "counts": bool}
        assert not row["counts"][row["tokens"] < 0].any()
        found += [(row["tokens"][row["segments"] == s].tolist(), row["counts"][row["segments"] == s].tolist()) for s in range(row["segments"].max() + 1)]
    arrays = single.splits["train"].arrays
    wanted = [(t[t >= 0].tolist(), c[t >= 0].tolist()) for t, c in zip(arrays["tokens"], arrays["counts"], strict=True)]
    assert sorted(found) == sorted(wanted) and len(source) < len(rows)
    everything = dataset(folder, rows, loss="all").splits["train"]
    assert everything.fingerprint() != source.fingerprint() and (everything[0]["counts"] == (everything[0]["tokens"] >= 0)).all()


def test_only_marked_targets_count_in_loss_and_metrics(model):
    task = LanguageModel({"vocab_size": 5}, sample_length=0)
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    tokens = jnp.array([[0, 1, 2, 3, 4], [1, 1, 2, -1, -1]])
    segments = jnp.array([[0, 0, 0, 1, 1], [0, 0, 0, -1, -1]])
    counts = jnp.array([[True, False, True, True, True], [False, True, False, False, False]])

    class Model:
        def __call__(self, tokens, *, segments=None, rngs=None):
            return logits

    batch = {"tokens": tokens, "segments": segments, "counts": counts, "weight": jnp.array([1.0, 2.0])}
    total, weight, metrics = task.loss(Model(), batch, None)
    log = jax.nn.log_softmax(logits)
    # In the first row, targets 2 and 4 count: 3 begins another segment. In the second row, which has weight 2, the first target counts.
    assert float(total) == pytest.approx(-float(log[0, 1, 2] + log[0, 3, 4] + 2 * log[1, 0, 1]), rel=1e-6) and float(weight) == 4.0
    np.testing.assert_allclose(task.evaluate(Model(), batch, None)["loss"][0], total, rtol=1e-6)


def test_a_chat_trains_evaluates_and_is_shown(model, tmp_path):
    folder = model(CHATML)
    rows = [{"messages": [{"role": "user", "content": f"the cat {i}"}, {"role": "assistant", "content": f"sat on {i} mats"}]} for i in range(30)]
    write(folder, {"train.jsonl": "\n".join(map(json.dumps, rows))})
    config = {
        "model": {"name": "gpt", "layers": 1, "heads": 2, "width": 16, "context": 48},
        "task": {"name": "language_model", "sample_length": 0},
        "data": {"source": f"chat:{folder}/train.jsonl", "sequence_length": 48, "tokenizer": f"hf:{folder}", "batch_size": 4},
        "optimizer": {"name": "adam", "learning_rate": 1e-2},
        "training": {"steps": 3},
    }
    report = inspect(resolve(config))
    assert re.search(r"sat on \d+ mats<\|im_end\|>", report["examples"][0]["counts"]) and "the cat" not in report["examples"][0]["counts"]
    experiment = build_experiment(config)
    shapes = experiment.batch_shapes(4)
    assert shapes["counts"].dtype == bool and shapes["counts"].shape == (4, 49)


LONG = {"messages": [{"role": "user", "content": "the cat sat on the mat " * 9}, TALK[1]]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"mesages": []}, "no 'messages'.*Did you mean 'mesages'"),
        ({"messages": "hi"}, "'messages' is not a list"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 has the role 'bot'; there are system, user, assistant, tool"),
        ({"messages": [{"content": "x"}]}, "message 0 has the role None"),
        ({"messages": TALK[1:]}, "message 0: 'assistant' comes first"),
        ({"messages": [TALK[0], TALK[0]]}, "message 1: 'user' follows 'user'"),
        ({"messages": [TALK[0], SYSTEM[0]]}, "message 1: 'system' follows 'user'"),
        ({"messages": TALK[:1]}, "the conversation has no assistant message"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "message 1 of 'assistant' has the content ' '"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "message 1 of 'assistant' has no content"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}, TALK[1]]}, r"message 0 contains '<\|im_end\|>', a special token"),
        ({"messages": [{"role": "user", "content": "\ud800"}, TALK[1]]}, "message 0 is not UTF-8"),
        ({"messages": TALK, "tools": "f"}, "'tools' is not a list"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "it needs 'from' and 'value'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line_or_left_out(row, message, model):
    folder = model(CHATML)
    good = {"messages": TALK}
    with pytest.raises(ConfigError, match=f"train.jsonl, line 2: .*({message})"):
        dataset(folder, [good, row])
    data = dataset(folder, [good, row], on_bad_example="skip", packing="none")
    assert len(data.splits["train"]) == 1 and data.skipped == {"train": 1}


def test_long_conversations_are_cut_or_named(model):
    folder = model(CHATML)
    with pytest.raises(ConfigError, match=r"line 1: \d+ tokens, where 33 fit; raise data.sequence_length, or cut"):
        dataset(folder, [LONG], sequence_length=32, truncate=False)
    with pytest.raises(ConfigError, match=r"line 1: no answer begins in the first 33 of its \d+ tokens"):
        dataset(folder, [LONG], sequence_length=32)
    data = dataset(folder, [{"messages": TALK}], sequence_length=60, packing="none")
    assert any("1 conversations of train are longer" in note for note in data.notes)
    assert (data.splits["train"][0]["tokens"] >= 0).all() and data.splits["train"][0]["counts"].any()


def test_templates_are_named_where_they_are_missing_or_wrong(model, tmp_path):
    rows = [{"messages": TALK}]
    with pytest.raises(ConfigError, match="no chat template.*data.template=FILE"):
        dataset(model(None), rows)
    own = tmp_path / "own.jinja"
    own.write_text(CHATML)
    with_own = dataset(model(None), rows, template=str(own))
    assert with_own.info["tokenizer"].files()["chat_template.jinja"].decode() == CHATML, "the run keeps the template it was trained with"
    own.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="config.data.template: the chat template cannot be read"):
        dataset(model(None), rows, template=str(own))
    with pytest.raises(ConfigError, match="conversations need the tokenizer of a pretrained model"):
        dataset(model(CHATML), rows, tokenizer="byte+special")
    with pytest.raises(ConfigError, match="line 1: the chat template rejects the conversation: roles must alternate"):
        dataset(model(INSTRUCTIONS), [{"messages": SYSTEM}])
    with pytest.raises(ConfigError, match="line 1: the chat template rejects the conversation: 'nobody' is undefined"):
        dataset(model("{{ nobody }}{{ messages[0].content }}"), rows)


def test_further_sets_and_other_data_have_the_template_of_the_run(model, tmp_path):
    rows = [{"messages": TALK}, {"messages": SYSTEM}]
    write(tmp_path, {"far.jsonl": json.dumps(rows[1]) + "\n", "own.jinja": CHATML})
    keys = {"template": str(tmp_path / "own.jinja"), "packing": "none"}
    training = dataset(model(None), rows, **keys)
    far = dataset(model(None), rows, **keys, validation_sets={"far": str(tmp_path / "far.jsonl")}).splits["validation/far"]
    np.testing.assert_array_equal(far.arrays["tokens"][0], training.splits["train"].arrays["tokens"][1])
    (tmp_path / "own.jinja").unlink()
    options = {"sequence_length": 128, "tokenizer": "hf:gone", "holdout": 0.0, **keys}
    other = open_dataset(f"chat:{tmp_path}/far.jsonl", options, None, trained=training.info).splits["train"]
    np.testing.assert_array_equal(other.arrays["tokens"], far.arrays["tokens"])


def test_templates_run_in_a_sandbox_without_a_clock():
    for text in (
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now('%Y') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ):
        with pytest.raises(TemplateProblem):
            ChatTemplate(text, {}, []).render(TALK)
    assert ChatTemplate("{{ 'x' if add_generation_prompt }}{% if tools %}y{% endif %}", {}, []).render(TALK) == "", "what is asked for may be missing"


def test_spans_take_whole_tokens_from_first_to_last():
    offsets = np.array([[0, 2], [2, 2], [2, 5], [5, 5], [5, 6], [5, 6], [6, 9]])
    np.testing.assert_array_equal(in_spans(offsets, [(3, 6)]), [0, 0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(in_spans(offsets, [(0, 1), (8, 9), (4, 4)]), [1, 0, 0, 0, 0, 0, 1])


def test_chats_can_be_parts_of_a_mixture(model):
    folder = model(CHATML)
    write(folder, {"one.jsonl": json.dumps({"messages": TALK}) + "\n", "two.jsonl": (json.dumps({"messages": TALK[:2]}) + "\n") * 3})
    part = {"sequence_length": 64, "holdout": 0.0}
    sources = {name: {"source": f"chat:{folder}/{name}.jsonl", **part} for name in ("one", "two")}
    config = {"model": "gpt", "task": "language_model", "optimizer": {"name": "adam", "learning_rate": 1e-3}, "training": {"steps": 1}}
    config["data"] = {"source": "mixture", "tokenizer": f"hf:{folder}", "sources": sources, "batch_size": 2}
    data = build_experiment(resolve(config)).dataset
    assert data.splits["train"][0]["counts"].any() and data.info["tokenizer"].chat_template == CHATML


# What rows say beyond their messages


TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "four"},
]


def learned_text(data, index=0):
    row, tokenizer = data.splits["train"][index], data.info["tokenizer"]
    return tokenizer.decode(row["tokens"][row["counts"].astype(bool)])


@pytest.mark.parametrize("name", ["chatml", "marked"])
@pytest.mark.parametrize("key", ["weight", "train"])
def test_an_answer_of_weight_zero_is_read_and_not_learned_text(name, key, model):
    off, on = (0, 1) if key == "weight" else (False, True)
    rows = [{"messages": [TURNS[0], TURNS[1] | {key: off}, TURNS[2], TURNS[3] | {key: on}]}, {"messages": TURNS}]
    data = dataset(model(TEMPLATES[name]), rows, packing="none")
    assert "five" not in learned_text(data) and "four" in learned_text(data) and "five" in learned_text(data, 1)
    np.testing.assert_array_equal(data.splits["train"][0]["tokens"], data.splits["train"][1]["tokens"])
    bad = {
        "message 1 has weight=0.5; it is 0 or 1": [TURNS[0], TURNS[1] | {"weight": 0.5}],
        "every answer of the conversation has the weight 0": [TURNS[0], TURNS[1] | {"weight": 0}],
        "message 0 of 'user' has a weight": [TURNS[0] | {"weight": 1}, TURNS[1]],
    }
    for problem, messages in bad.items():
        with pytest.raises(ConfigError, match=f"line 1: {problem}"):
            dataset(model(TEMPLATES[name]), [{"messages": messages}])


def test_systems_parts_and_instructions_are_messages(model):
    folder = model(CHATML)
    whole = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "hi\n\nthere"}, {"role": "assistant", "content": "salut"}]
    rows = [
        {"messages": whole},
        {"system": "Answer in French.", "conversations": [{"from": "human", "value": "hi\n\nthere"}, {"from": "gpt", "value": "salut"}]},
        {"system": "Answer in French.", "instruction": "hi", "input": "there", "output": "salut"},
        {"messages": [{"role": "developer", "content": "Answer in French."}, *whole[1:]]},
        {"messages": [whole[0], {"role": "user", "content": [{"type": "text", "text": "hi\n\n"}, {"type": "text", "text": "there"}]}, whole[2]]},
    ]
    data = dataset(folder, rows, packing="none")
    for i in range(1, len(rows)):
        np.testing.assert_array_equal(data.splits["train"][i]["tokens"], data.splits["train"][0]["tokens"], err_msg=str(rows[i]))
    bad = {
        "the row has 'system', and its first message is one of 'system', too": {"system": "x", "messages": whole},
        "message 0 has parts of image_url, text; only parts of text": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]
        },
        "the row has 'weight', which is not supported": {"weight": 0.3, "messages": TURNS},
        "the row has 'functions', which is not supported: write them as 'tools'": {"functions": [{}], "messages": TURNS},
        "the row has 'chosen'": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    for problem, row in bad.items():
        with pytest.raises(ConfigError, match=f"line 1: {problem}"):
            dataset(folder, [row])


@pytest.mark.parametrize("mark", [False, True])
def test_a_template_without_an_end_of_turn_is_refused(mark, model):
    begin, end = ("{% generation %}", "{% endgeneration %}") if mark else ("", "")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}" + begin + "{{ m['content'] }}" + end
        + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"config\.data\.template: the text that is learned of an answer ends with its content, 'four', without a token"):
        dataset(model(template), [{"messages": TURNS}])
    assert len(dataset(model(template), [{"messages": TURNS}], loss="all").splits["train"]) == 1
