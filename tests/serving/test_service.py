"""The service under stress and by the wrong: limits, keys, rates, origins, disconnects, deadlines, draining, metrics, logs."""

import asyncio
import json
import logging
import threading
import time

import httpx
import openai
import pytest
import served_runs
from served_runs import live, wait_until
from starlette.applications import Starlette
from starlette.routing import Mount

import jaxmodels.serving
from jaxmodels.errors import ConfigError
from jaxmodels.serving.access import Access
from jaxmodels.serving.middleware import LOG
from jaxmodels.serving.service import Limits

KEY, OTHER = "k" * 32, "o" * 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return served_runs.write_runs(tmp_path_factory.mktemp("runs"), "gpt", "classes")


@pytest.fixture
def models(runs):
    """A model that generates, two rows at a time and three that wait, 20 ms a token; and one that classifies."""
    return served_runs.serve_models(runs, make=served_runs.fake_engine(slots=2, queue=3, step=0.02))


def ask(url, **more):
    return httpx.post(f"{url}/v1/completions", json={"model": "gpt", "prompt": "abc", **more}, timeout=30)


BODIES = {
    "json": (b"{", 400, "invalid_json", "the body is not JSON"),
    "nan": (b'{"temperature": NaN}', 400, "invalid_json", "NaN is no JSON number"),
    "list": (b"[1]", 400, "invalid_json", "must be a JSON object, not list"),
    "utf8": (b'{"prompt": "\xff"}', 400, "invalid_utf8", "byte 12 is 0xff"),
    "half": (b'{"model": "gpt", "prompt": "\\ud800"}', 400, "invalid_utf8", "half of a character"),
    "deep": (b"[" * 100_000, 400, "invalid_json", "the body is not JSON"),
    "digits": (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json", "the body is not JSON"),
    "large": (b'{"prompt": "' + b"a" * 3000 + b'"}', 413, "too_large", "the limit of 2,000 bytes"),
}


def test_malformed_bodies_are_one_error_each(models):
    with live(models, limits=Limits(body=2000)) as service:
        for name, (body, status, code, message) in BODIES.items():
            if name in ("deep", "digits"):
                body = body[:1900]
            answer = httpx.post(f"{service.url}/v1/completions", content=body)
            error = answer.json()["error"]
            if name == "digits":
                assert answer.status_code == 400
                continue
            assert (answer.status_code, error["code"]) == (status, code) and message in error["message"], name
        chunked = httpx.post(f"{service.url}/v1/completions", content=iter([b"a" * 1500] * 3))  # no length is told
        assert chunked.status_code == 413
        assert httpx.get(f"{service.url}/v1/none").json()["error"]["code"] == "not_found"
        assert httpx.get(f"{service.url}/v1/completions").status_code == 405
        assert httpx.get(f"{service.url}/v1/models/none").status_code == 404
        form = httpx.post(f"{service.url}/v1/completions", files={"file": b"a"})
        assert form.status_code == 400 and "for /v1/predict" in form.text
        assert ask(service.url, max_tokens=2).status_code == 200


def test_a_full_queue_is_429_with_a_time_to_try_again(models):
    with live(models) as service:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(service.url, max_tokens=15))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
        # An answer that finds no place for all its parts leaves none behind, and one that never will is told so.
        engine = models["gpt"].engine
        threads = [threading.Thread(target=ask, args=[service.url], kwargs={"max_tokens": 30}) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.stats().queued == 2)
        assert ask(service.url, n=3, max_tokens=30).status_code == 429
        for thread in threads:
            thread.join()
        wait_until(lambda: engine.stats().running == engine.stats().queued == 0)
        refused = ask(service.url, n=4)
        assert refused.status_code == 400 and "4 answers or inputs in one call, and 3 may wait" in refused.text
        for count, status in ((65, 400), (64, 200)):
            assert httpx.post(f"{service.url}/v1/predict", json={"model": "classes", "inputs": ["a"] * count}).status_code == status


def test_a_client_that_goes_away_frees_its_row(models):
    engine = models["gpt"].engine
    with live(models) as service:
        for stream in (True, False):
            before = engine.served["cancelled"]

            async def leave(stream=stream):
                async with httpx.AsyncClient() as client:
                    body = {"model": "gpt", "prompt": "abc", "max_tokens": 60, "stream": stream}
                    async with asyncio.timeout(0.3):
                        async with client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
                            async for _ in answer.aiter_lines():
                                pass

            with pytest.raises(TimeoutError):
                asyncio.run(leave())
            wait_until(lambda before=before: engine.served["cancelled"] == before + 1)
            wait_until(lambda: service.service.active == 0)
        text = httpx.get(f"{service.url}/metrics").text
        assert 'jaxmodels_disconnects_total{endpoint="/v1/completions"} 2.0' in text


def test_a_slow_reader_holds_nobody_up(models):
    with live(models) as service:
        with (
            httpx.Client() as client,
            client.stream("POST", f"{service.url}/v1/completions", json={"model": "gpt", "prompt": "abc", "max_tokens": 50, "stream": True}),
        ):
            # It reads nothing, and another's answer comes in its own time.
            begun = time.monotonic()
            assert ask(service.url, max_tokens=5).status_code == 200
            assert time.monotonic() - begun < 2


def test_a_request_is_given_up_after_its_time(models):
    with live(models, limits=Limits(seconds=0.3)) as service:
        answer = ask(service.url, max_tokens=60)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        with httpx.stream("POST", f"{service.url}/v1/completions", json={"model": "gpt", "prompt": "abc", "max_tokens": 60, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data")]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]"
        wait_until(lambda: models["gpt"].engine.stats().running == 0)


def test_keys_are_needed_where_there_are_some(models, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{KEY} alice\n{OTHER} bob 2/minute\n")
    with live(models, access=Access(str(file), environment={})) as service:
        assert ask(service.url).status_code == 401 and ask(service.url).headers["www-authenticate"] == "Bearer"
        for path in ("health", "ready", "metrics", "docs", "openapi.json"):
            assert httpx.get(f"{service.url}/{path}").status_code == 200
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
            for _ in range(4):
                client.completions.create(model="gpt", prompt="abc", max_tokens=1)
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key=OTHER, max_retries=0) as client:
            for _ in range(2):
                client.completions.create(model="gpt", prompt="abc", max_tokens=1)
            with pytest.raises(openai.RateLimitError, match="bob may ask 2 per 1 minute") as caught:
                client.completions.create(model="gpt", prompt="abc", max_tokens=1)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 61


def test_files_of_keys_are_checked(tmp_path):
    file = tmp_path / "keys"
    for text, message in (
        ("", "has no key"),
        ("short", "5 characters, where 16 are the least"),
        (f"{KEY}\n{KEY}", "line 2: .* there twice"),
        (f"{KEY} a often", "line 1: 'often' is no rate limit"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Access(str(file), environment={})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Access(str(tmp_path / "none"), environment={})
    access = Access(environment={"JAXMODELS_API_KEYS": f"{KEY}, {OTHER}"})
    assert access.caller(f"Bearer {OTHER}", "").name == "JAXMODELS_API_KEYS-2"


def test_pages_of_other_sites_may_not_ask_unless_they_are_named(models):
    body = {"model": "gpt", "prompt": "abc", "max_tokens": 1}
    with live(models, cors=("https://good.example",), hosts=("127.0.0.1",)) as service:

        def post(origin, **headers):
            return httpx.post(f"{service.url}/v1/completions", json=body, headers={"origin": origin, **headers})

        assert post(service.url).status_code == 200  # its own page
        good = post("https://good.example")
        assert good.status_code == 200 and good.headers["access-control-allow-origin"] == "https://good.example"
        bad = post("https://bad.example")
        assert bad.status_code == 403 and "access-control-allow-origin" not in bad.headers
        assert httpx.get(f"{service.url}/health", headers={"host": "bad.example"}).status_code == 400


def test_metrics_count_what_happened(models):
    with live(models) as service:
        ask(service.url, max_tokens=4)
        ask(service.url, prompt="")
        httpx.post(f"{service.url}/v1/predict", json={"model": "classes", "inputs": ["a", "b"]})
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{service.url}/metrics").text.splitlines() if not line.startswith("#"))
    assert lines['jaxmodels_requests_total{endpoint="/v1/completions",model="gpt",status="200"}'] == "1.0"
    assert lines['jaxmodels_requests_total{endpoint="/v1/completions",model="gpt",status="400"}'] == "1.0"
    assert lines['jaxmodels_completion_tokens_total{model="gpt"}'] == "4.0"
    assert lines['jaxmodels_prompt_tokens_total{model="gpt"}'] == "3.0"
    assert lines['jaxmodels_time_to_first_token_seconds_count{model="gpt"}'] == "1.0"
    assert lines['jaxmodels_time_per_token_seconds_count{model="gpt"}'] == "1.0"
    assert lines['jaxmodels_queue{model="gpt",part="engine"}'] == "0.0" and lines['jaxmodels_slots{model="gpt",part="engine"}'] == "2.0"
    assert lines['jaxmodels_rows_total{model="classes",part="predict"}'] == "2.0"


def test_the_access_log_has_no_prompts_unless_asked(models, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    LOG.propagate = True
    for shown in (False, True):
        caplog.clear()
        with live(models, log_prompts=shown) as service:
            ask(service.url, prompt="xyz", max_tokens=2)
            ask(service.url, prompt="xyz", max_tokens=-2)
            wait_until(lambda: len(caplog.records) == 2)
        good, bad = (json.loads(record.getMessage()) for record in caplog.records)
        assert (good["status"], good["model"], good["prompt_tokens"], good["completion_tokens"], good["finish"]) == (200, "gpt", 3, 2, "length")
        assert good["seconds"] > 0 and good["path"] == "/v1/completions" and (bad["status"], bad["error"]) == (400, "invalid_value")
        assert ("xyz" in caplog.text) == shown and (good.get("prompts") == ["xyz"]) == shown


def test_nothing_is_answered_while_models_are_loaded(models):
    with live(None) as service:
        assert httpx.get(f"{service.url}/health").status_code == 200
        assert httpx.get(f"{service.url}/ready").status_code == 503
        answer = ask(service.url)
        assert answer.status_code == 503 and "being loaded" in answer.text and "retry-after" in answer.headers
        service.service.use(models)
        assert httpx.get(f"{service.url}/ready").status_code == 200 and ask(service.url).status_code == 200


def test_draining_finishes_what_runs_and_refuses_what_comes(models):
    service = served_runs.Live(models)
    with service:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(service.url, max_tokens=40))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: service.service.active == 4)
        service.server.drain()
        wait_until(lambda: service.service.phase == "draining")
        late = ask(service.url)
        assert late.status_code == 503 and "shutting down" in late.text
        assert httpx.get(f"{service.url}/ready").status_code == 503 and httpx.get(f"{service.url}/health").status_code == 200
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 4
        service.thread.join(10)
        assert not service.thread.is_alive()


def test_draining_gives_up_what_takes_too_long(models):
    with served_runs.Live(models, drain_seconds=0.2) as service:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(service.url, max_tokens=60)))
        thread.start()
        wait_until(lambda: service.service.active == 1)
        service.server.drain()
        thread.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "unavailable"


def test_an_application_is_mounted_in_another(runs):
    app = Starlette(routes=[Mount("/models", jaxmodels.serving.app([f"texts={runs['classes']}"], batch_sizes=(1,)))])

    async def post():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/models/v1/predict", json={"model": "texts", "inputs": ["a"]}), await client.get("/models/v1/none")

    good, none = asyncio.run(post())
    assert good.status_code == 200 and none.status_code == 404 and none.json()["error"]["code"] == "not_found"
