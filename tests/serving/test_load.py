"""A service under load: every request is answered or refused by its code, no slot is lost, memory stays flat, and draining loses nothing."""

import asyncio
import collections
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import served_runs
from conftest import ROOT

CLIENTS, REQUESTS = 200, 2000


def resident(process) -> int:
    """Return the bytes of memory of a process."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def process(tmp_path):
    """A service of two models as a process, and its address."""
    models = [f"--workdir={run}" for run in served_runs.write_runs(tmp_path / "runs", "gpt", "chat").values()]
    command = [sys.executable, "-m", "jaxmodels", "serve", *models, "--port=0", "--slots=8", "--queue=100", "--drain_seconds=60"]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            url = next(found[1] for line in process.stdout if (found := re.match(r"ready at (\S+)", line)))
            yield process, url, tmp_path / "log"
        finally:
            process.kill()


async def one(client, number, counts):
    """Send a request: one of two models; a tenth goes away, a tenth is over a limit. Busy ones try again."""
    draw = random.Random(number)
    body = {"max_tokens": draw.randrange(1, 40), "seed": number, "stream": draw.random() < 0.5}
    if number % 2:
        path, body = "/v1/completions", body | {"model": "gpt", "prompt": "abcdefghij"[: draw.randrange(1, 10)]}
    else:
        path, body = "/v1/chat/completions", body | {"model": "chat", "messages": [{"role": "user", "content": "the cat"}]}
    if number % 10 == 3:
        body["max_tokens"] = 1000
    while True:
        try:
            async with asyncio.timeout(0.05 if number % 10 == 7 else 120):
                async with client.stream("POST", path, json=body) as answer:
                    text = (await answer.aread()).decode()
        except TimeoutError:
            counts["gone" if number % 10 == 7 else "late"] += 1
            return
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            counts["again"] += 1
            await asyncio.sleep(draw.uniform(0.1, 0.5))
            continue
        if answer.status_code == 200:
            assert "[DONE]" in text if body["stream"] else '"finish_reason"' in text
        counts[answer.status_code] += 1
        return


async def load(url, numbers, counts):
    """Send requests from all clients at once."""
    waiting = iter(numbers)
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def work():
            for number in waiting:
                await one(client, number, counts)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))


def figures(url) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@pytest.mark.slow
def test_two_thousand_requests_of_two_hundred_clients(process):
    process, url, log = process
    counts, memory = collections.Counter(), []
    for part in range(4):
        asyncio.run(load(url, range(part * REQUESTS // 4, (part + 1) * REQUESTS // 4), counts))
        served_runs.wait_until(
            lambda: not any(v for k, v in figures(url).items() if k.startswith(("jaxmodels_running{", "jaxmodels_queue{", "jaxmodels_cache_used{"))), 30
        )
        memory.append(resident(process) / 2**20)
    print(f"\n{dict(counts)}; MiB after each quarter: {[round(x) for x in memory]}")
    assert counts[400] == REQUESTS // 10 and counts["late"] == 0 and set(counts) <= {200, 400, "gone", "again"}
    assert counts[200] + counts[400] + counts["gone"] == REQUESTS
    assert memory[3] - memory[1] < 40

    # All that is sent before the signal is answered; what comes after it is refused.
    async def drained():
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=CLIENTS)) as client:
            body = {"model": "chat", "prompt": "the cat", "max_tokens": 100}
            sent = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(90)]
            while not any(task.done() for task in sent):
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    statuses = collections.Counter(asyncio.run(drained()))
    assert set(statuses) <= {200, 503} and statuses[200] >= 10, statuses
    assert process.wait(90) == 0
    assert "Traceback" not in log.read_text()
