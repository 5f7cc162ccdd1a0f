"""Measure serving: tokens a second and the time to the first token, on loopback, against `transformers serve`.

    pip install '.[serve,test]' 'transformers[serving]'
    python benchmarks/serving.py                                     # 1, 4 and 16 clients, three rounds
    python benchmarks/serving.py --clients 16 --sides jaxmodels one_at_a_time

All sides serve the same folder: a GPT-2 of 124M parameters with random weights, float32, and a tokenizer of one token a word, without an end token, so
that every answer has its full length. Each client sends one request after the other, with a prompt of its own, and reads the stream of its greedy
answer. `jaxmodels` has as many slots as the largest number of clients; `one_at_a_time` has one slot, so that the difference is what batching gains;
`transformers` serves each request by `generate`; `transformers_batching` uses its continuous batching. The servers run on the same cores as the
clients, and the sides alternate; those whose turn it is not are stopped. Printed are medians and ranges over rounds; percentiles are over all requests.

A side that cannot start, or whose answers have another length, is said and left out. The machine must be idle.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

VOCAB = 50257
SIDES = ("jaxmodels", "one_at_a_time", "transformers", "transformers_batching")


def write_model(folder: Path, layers: int) -> None:
    """Write the weights and the tokenizer."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_layer=layers, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "pad_token": "w0", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def command(side: str, folder: Path, port: int, options) -> list[str]:
    """Return the command that serves the folder."""
    if side.startswith("transformers"):
        program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
        batching = ["--continuous-batching"] if side == "transformers_batching" else []
        return [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", *batching]
    slots = 1 if side == "one_at_a_time" else max(options.clients)
    length = options.prompt + options.tokens
    serve = [sys.executable, "-m", "jaxmodels", "serve", f"--workdir=model=hf:{folder}", f"--port={port}", f"--slots={slots}", f"--context={length}"]
    return [*serve, f"--queue={4 * max(options.clients)}"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def served(side: str, folder: Path, options):
    """Start a server and yield its address once it answers, and its process group."""
    port = free_port()
    log = folder.parent / f"{side}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(command(side, folder, port, options), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + options.start_limit
        ready = "/health" if side.startswith("transformers") else "/ready"
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(address + ready).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{side} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        yield address, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def answer(client: httpx.AsyncClient, address: str, model: str, prompt: str, tokens: int) -> tuple[float, float]:
    """Request one answer; return the seconds to its first token and to its end.

    Raises:
      RuntimeError: it has another number of tokens.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    begin, first, used = time.perf_counter(), None, 0
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice.get("text") for choice in chunk["choices"]):
                first = time.perf_counter()
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
    if response.status_code != 200 or used != tokens or first is None:
        raise RuntimeError(f"status {response.status_code}, {used} tokens instead of {tokens}")
    return first - begin, time.perf_counter() - begin


async def load(address: str, model: str, clients: int, seconds: float, options, seed: int) -> tuple[float, list[float]]:
    """Return the tokens a second of this number of clients, and the seconds to the first token of each request.

    Each client starts requests until the time is over; the rate is that of all tokens over the time until the last answer ends.
    """
    rng = np.random.default_rng(seed)
    firsts, begin = [], time.perf_counter()
    prompts = [[" ".join(f"w{i}" for i in rng.integers(0, VOCAB, options.prompt)) for _ in range(200)] for _ in range(clients)]

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one(prompts):
            for prompt in prompts:
                firsts.append((await answer(client, address, model, prompt, options.tokens))[0])
                if time.perf_counter() - begin > seconds:
                    return

        await asyncio.gather(*(one(p) for p in prompts))
    return len(firsts) * options.tokens / (time.perf_counter() - begin), firsts


def measure(sides: dict[str, tuple[str, int]], models: dict[str, str], options) -> None:
    """Print a table: a row for each number of clients and side."""
    print("| clients | side | tokens a second | to the first token, p50, s | p99, s |\n|---|---|---|---|---|")
    for clients in options.clients:
        rates, firsts = ({side: [] for side in sides} for _ in range(2))
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                address, group = sides[side]
                os.killpg(group, signal.SIGCONT)
                rate, new = asyncio.run(load(address, models[side], clients, options.seconds, options, seed=number))
                os.killpg(group, signal.SIGSTOP)
                rates[side].append(rate)
                firsts[side] += new
        for side in sides:
            middle = f"{np.median(rates[side]):.1f} ({min(rates[side]):.1f}–{max(rates[side]):.1f})"
            print(f"| {clients} | `{side}` | {middle} | {np.percentile(firsts[side], 50):.3f} | {np.percentile(firsts[side], 99):.3f} |", flush=True)


def main() -> None:
    """Serve, warm up, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="a round starts requests for so long")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--start_limit", type=float, default=180)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "gpt2"
        write_model(folder, options.layers)
        sides, models = {}, {}
        for side in options.sides:
            try:
                address, group = stack.enter_context(served(side, folder, options))
                models[side] = str(folder) if side.startswith("transformers") else "model"
                asyncio.run(load(address, models[side], 1, 0, options, seed=99))  # the first answer warms up
                os.killpg(group, signal.SIGSTOP)  # some servers use processor time while nobody asks
                sides[side] = address, group
            except (RuntimeError, httpx.HTTPError) as error:
                print(f"{side}: left out: {error}", file=sys.stderr)
        measure(sides, models, options)


if __name__ == "__main__":
    main()
