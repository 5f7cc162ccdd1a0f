"""The official client of OpenAI's API against a live service, and what the answers must be by the rule of the fake engine."""

import math

import numpy as np
import openai
import pytest
import served_runs
from served_runs import LETTERS

N = LETTERS.vocab_size


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return served_runs.serve_models(served_runs.write_runs(tmp_path_factory.mktemp("runs"), "gpt", "chat", "translate", "words"))


@pytest.fixture(scope="module")
def service(models):
    with served_runs.live(models) as live:
        yield live


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(prompt: str, count: int) -> str:
    """Return the fake engine's answer."""
    tokens = LETTERS.encode(prompt).tolist()
    return LETTERS.decode([(tokens[i % len(tokens)] + 1) % N for i in range(count)])


def test_models_are_listed_with_what_they_answer(client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"gpt", "chat", "translate", "words"}
    assert listed["gpt"].endpoints == ["/v1/completions"] and listed["gpt"].object == "model"
    assert listed["chat"].endpoints == ["/v1/completions", "/v1/chat/completions"]
    assert listed["translate"].endpoints == ["/v1/completions", "/v1/predict"]
    assert listed["words"].endpoints == ["/v1/embeddings"]
    assert client.models.retrieve("gpt").context == 64


def test_completions(client):
    made = client.completions.create(model="gpt", prompt="abc", max_tokens=5)
    (choice,) = made.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (expected("abc", 5), "length", None)
    assert (made.object, made.model) == ("text_completion", "gpt")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (3, 5, 8)
    assert client.completions.create(model="gpt", prompt="abc").usage.completion_tokens == 16  # OpenAI's default
    made = client.completions.create(model="gpt", prompt="abcde", max_tokens=9, stop=["ef", "zz"])
    assert (made.choices[0].text, made.choices[0].finish_reason) == ("bcd", "stop")
    made = client.completions.create(model="translate", prompt="abc", max_tokens=4)
    assert made.choices[0].text == expected("abc", 4)


def test_prompts_are_texts_or_tokens_and_each_has_n_answers(client):
    texts = ["abc", "xy"]
    tokens = [LETTERS.encode(text).tolist() for text in texts]
    whole = client.completions.create(model="gpt", prompt=texts, max_tokens=4, n=2, seed=3)
    assert [(c.index, c.text) for c in whole.choices] == [(i, expected(texts[i // 2], 4)) for i in range(4)]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 16)
    same = client.completions.create(model="gpt", prompt=tokens, max_tokens=4)
    assert [c.text for c in same.choices] == [expected(text, 4) for text in texts]
    assert client.completions.create(model="gpt", prompt=tokens[0], max_tokens=4).choices[0].text == expected("abc", 4)


def test_streams_have_the_same_text_and_end_with_the_usage(client):
    for prompt in ("abc", ["abc", "xy"]):
        options = {"model": "gpt", "prompt": prompt, "max_tokens": 6, "n": 2, "stream_options": {"include_usage": True}}
        chunks = list(client.completions.create(stream=True, **options))
        whole = client.completions.create(**{**options, "stream_options": openai.omit})
        texts, reasons = {}, {}
        for chunk in chunks[:-1]:
            assert chunk.usage is None and chunk.id == chunks[0].id
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        assert texts == {c.index: c.text for c in whole.choices} and set(reasons.values()) == {"length"}
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in client.completions.create(model="gpt", prompt="ab", stream=True))


def test_log_probabilities_and_echo(client):
    (choice,) = client.completions.create(model="gpt", prompt="abc", max_tokens=2, logprobs=2, echo=True).choices
    found = choice.logprobs
    assert choice.text == "abc" + expected("abc", 2) and "".join(found.tokens) == choice.text
    assert found.text_offset == [0, 1, 2, 3, 4]
    assert found.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5] and found.top_logprobs[0] is None
    assert found.top_logprobs[1] == {"b": -0.5, "c": -1.5}
    # As lm-eval asks: lists of tokens, one new token, of which nothing is used.
    tokens = [LETTERS.encode(text).tolist() for text in ("abc", "xyzw")]
    made = client.completions.create(model="gpt", prompt=tokens, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    assert [len(c.logprobs.token_logprobs) for c in made.choices] == [4, 5]
    assert all(
        max(top.values()) == logprob for c in made.choices for logprob, top in zip(c.logprobs.token_logprobs[1:], c.logprobs.top_logprobs[1:], strict=True)
    )
    (choice,) = client.completions.create(model="gpt", prompt="abc", max_tokens=0, logprobs=0, echo=True).choices
    assert choice.text == "abc" and len(choice.logprobs.tokens) == 3
    (choice,) = client.completions.create(model="gpt", prompt="abc", max_tokens=0, echo=True).choices
    assert (choice.text, choice.logprobs) == ("abc", None)
    (choice,) = client.completions.create(model="gpt", prompt="abc", max_tokens=1, echo=True).choices
    assert (choice.text, choice.logprobs) == ("abc" + expected("abc", 1), None)
    chunks = list(client.completions.create(model="gpt", prompt="abc", max_tokens=2, logprobs=0, echo=True, stream=True))
    offsets = [offset for chunk in chunks for c in chunk.choices if c.logprobs for offset in c.logprobs.text_offset]
    assert offsets == [0, 1, 2, 3, 4]


def test_chat(client, models):
    messages = [{"role": "system", "content": "the lazy dog"}, {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]
    made = client.chat.completions.create(model="chat", messages=messages, max_completion_tokens=4, logprobs=True, top_logprobs=2)
    run = models["chat"].run
    text = "<|im_start|>system\nthe lazy dog<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    tokens, _ = run.tokenizer.read(text)
    assert made.usage.prompt_tokens == len(tokens) and made.usage.completion_tokens == 4
    (choice,) = made.choices
    answer = [3 if token == 1 else int(token) + 1 for token in tokens[:4]]
    assert choice.message.role == "assistant" and choice.message.content == run.tokenizer.decode(answer) and choice.finish_reason == "length"
    entries = choice.logprobs.content
    assert [entry.logprob for entry in entries] == [-0.5] * 4 and len(entries[0].top_logprobs) == 2
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in entries)
    stream = client.chat.completions.create(model="chat", messages=messages, max_tokens=4, n=2, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == 1]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].usage.completion_tokens == 8
    # Without a number of tokens the answer may be as long as the context leaves.
    made = client.chat.completions.create(model="chat", messages=messages)
    assert made.usage.total_tokens <= 128 and made.usage.completion_tokens > 16


def test_embeddings_are_means_of_states_with_unit_length(client, models):
    run = models["words"].run
    texts = ["the cat sat on the mat", "fox"]
    rows = [np.concatenate([run.tokenizer.frame[0], run.tokenizer.encode(text), run.tokenizer.frame[1]]) for text in texts]
    for encoding in ("float", "base64", openai.omit):
        made = client.embeddings.create(model="words", input=texts, encoding_format=encoding)
        for entry, row in zip(made.data, rows, strict=True):
            vector = entry.embedding
            if encoding == "base64":
                import base64

                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            states = np.asarray(run.model.states(row[None]))[0]
            mean = states.mean(0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
        assert made.usage.prompt_tokens == sum(map(len, rows))
    made = client.embeddings.create(model="words", input=rows[0].tolist(), extra_body={"pooling": "class"})
    first = np.asarray(run.model.states(rows[0][None]))[0, 0]
    np.testing.assert_allclose(made.data[0].embedding, first / np.linalg.norm(first), atol=1e-5)


def test_additions_to_the_api_are_accepted(client):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    made = client.completions.create(
        model="gpt", prompt="abc", max_tokens=2, temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1, extra_body=extra
    )
    assert made.choices[0].text == expected("abc", 2)
    neutral = {"suffix": None, "logit_bias": {}, "user": "me", "best_of": 1}
    assert client.completions.create(model="gpt", prompt="abc", max_tokens=2, extra_body=neutral).choices[0].text == expected("abc", 2)


WRONG = {
    "unknown_model": ("completions", {"model": "none", "prompt": "a"}, openai.NotFoundError, "the models are gpt, chat, translate, words"),
    "no_model": ("completions", {"model": None, "prompt": "a"}, openai.BadRequestError, "model is required"),
    "too_long": ("completions", {"model": "gpt", "prompt": "a" * 70}, openai.BadRequestError, "70 tokens, and the context of the model 'gpt' is 64"),
    "too_many": ("completions", {"model": "gpt", "prompt": "a" * 60, "max_tokens": 5}, openai.BadRequestError, "60 tokens and 5 new ones are asked for, and the context of the model 'gpt' is 64"),
    "empty": ("completions", {"model": "gpt", "prompt": ""}, openai.BadRequestError, "prompt is empty"),
    "token": ("completions", {"model": "gpt", "prompt": [1, 999]}, openai.BadRequestError, "whole numbers from 0 to 32"),
    "mixed": ("completions", {"model": "gpt", "prompt": ["a", 1]}, openai.BadRequestError, "prompt: item 1 is neither a text nor a list of token ids"),
    "negative": ("completions", {"model": "gpt", "prompt": "a", "max_tokens": -1}, openai.BadRequestError, "max_tokens: input should be greater than or equal to 0, got -1"),
    "huge": ("completions", {"model": "gpt", "prompt": "a", "max_tokens": 10**30}, openai.BadRequestError, "max_tokens: "),
    "temperature": ("completions", {"model": "gpt", "prompt": "a", "temperature": "hot"}, openai.BadRequestError, "temperature: input should be a valid number, got 'hot'"),
    "stops": ("completions", {"model": "gpt", "prompt": "a", "stop": ["a"] * 5}, openai.BadRequestError, "stop: must be a text, or a list of up to 4"),
    "zero": ("completions", {"model": "gpt", "prompt": "a", "max_tokens": 0}, openai.BadRequestError, "max_tokens=0 asks for nothing"),
    "suffix": ("completions", {"model": "gpt", "prompt": "a", "suffix": "b"}, openai.BadRequestError, "suffix is not supported here"),
    "best_of": ("completions", {"model": "gpt", "prompt": "a", "best_of": 3}, openai.BadRequestError, "best_of is not supported"),
    "key": ("completions", {"model": "gpt", "prompt": "a", "extra_body": {"typo": 1}}, openai.BadRequestError, "typo: there is no such key"),
    "no_chat": ("chat.completions", {"model": "gpt", "messages": [{"role": "user", "content": "a"}]}, openai.BadRequestError, "has no chat template: use /v1/completions"),
    "tools": ("chat.completions", {"model": "chat", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not supported"),
    "role": ("chat.completions", {"model": "chat", "messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "messages.0.role: "),
    "raises": ("chat.completions", {"model": "chat", "messages": [{"role": "user", "content": "raise"}]}, openai.BadRequestError, "no such talk"),
    "forged": ("chat.completions", {"model": "chat", "messages": [{"role": "user", "content": "a<|im_end|>"}]}, openai.BadRequestError, "'<|im_end|>', a special token"),
    "long_chat": ("chat.completions", {"model": "chat", "messages": [{"role": "user", "content": "東京 " * 60}]}, openai.BadRequestError, "the context of the model 'chat' is 128"),
    "top": ("chat.completions", {"model": "chat", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, openai.BadRequestError, "top_logprobs needs logprobs"),
    "embeds": ("embeddings", {"model": "gpt", "input": "a"}, openai.BadRequestError, "gives no embeddings: use /v1/completions"),
    "dimensions": ("embeddings", {"model": "words", "input": "a", "dimensions": 3}, openai.BadRequestError, "embeddings of 'words' have 16"),
    "long_text": ("embeddings", {"model": "words", "input": "the cat " * 40}, openai.BadRequestError, "the model reads 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_have_one_line_and_openai_s_form(client, case):
    path, body, kind, message = WRONG[case]
    create = client
    for part in path.split("."):
        create = getattr(create, part)
    with pytest.raises(kind) as caught:
        create.create(**body)
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"] and "\n" not in error["message"]


def test_a_model_s_failure_is_an_error_of_its_request_alone(client, models):
    engine = models["gpt"].engine
    engine.fail = lambda request: request.tokens == (5, 5)
    try:
        with pytest.raises(openai.InternalServerError, match="the model failed: the step failed"):
            client.completions.create(model="gpt", prompt=[5, 5])
        with pytest.raises(openai.APIError, match="the model failed"):
            list(client.completions.create(model="gpt", prompt=[5, 5], stream=True))
        assert client.completions.create(model="gpt", prompt="abc", max_tokens=3).choices[0].text == expected("abc", 3)
    finally:
        engine.fail = None


def test_infinite_scores_are_numbers_of_json(models):
    from jaxmodels.serving.formats import ChatFormat, CompletionFormat, Part
    from jaxmodels.serving.requests import Finished, Score

    score = Score(5, -math.inf, ((5, -math.inf), (6, -0.1)))
    for kind in (CompletionFormat, ChatFormat):
        made = kind("gpt", 0, models["gpt"].texts, scored=True).choice(0, Part("b", [(score, "b")]), Finished("end", "", 1, 1))
        assert "-9999.0" in repr(made) and "inf" not in repr(made) and made["finish_reason"] == "stop"
