"""Small runs of every kind that is served, with random weights, and live services of them."""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import tokenizer_folders
from fake_engine import FakeEngine
from random_models import run_of
from untrained_runs import untrained_run

from jaxmodels.inference import load
from jaxmodels.serving.access import Access
from jaxmodels.serving.application import make_app
from jaxmodels.serving.served import Running, Served
from jaxmodels.serving.server import Server
from jaxmodels.serving.service import Limits, Service
from jaxmodels.tokenizers.pretrained import PretrainedTokenizer
from jaxmodels.tokenizers.simple import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ,.", special=True)
GPT = {"name": "gpt", "layers": 1, "heads": 2, "width": 16, "context": 64}
ENCODER = {"name": "encoder", "layers": 1, "heads": 2, "width": 16, "context": 32}
REST = {"optimizer": {"name": "sgd", "learning_rate": 0.0}, "training": {"steps": 1}}
ROWS = {"batch_size": 4, "sequence_length": 16, "tokenizer": "character+special"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
TEMPLATE = (
    "{% for message in messages %}{% if 'raise' in message['content'] %}{{ raise_exception('no such talk') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HOW = Running(batch_sizes=(2,), max_wait_ms=2.0, queue=64)


def chat_tokenizer() -> PretrainedTokenizer:
    """Return a tokenizer with a chat template."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    files = {"tokenizer.json": tokenizer_folders.byte_level(SPECIAL).to_str(), "tokenizer_config.json": json.dumps(settings)}
    return PretrainedTokenizer({name: text.encode() for name, text in files.items()}, {"model_type": "llama", "vocab_size": 330})


def text_info(**more) -> dict:
    return {"vocab_size": LETTERS.vocab_size, "tokenizer": LETTERS} | more


def write_runs(place, *names: str) -> dict[str, str]:
    """Write the runs of these names below a folder; return name -> folder."""
    rows, encoder = {"data": {"source": "tsv:none.tsv", **ROWS}} | REST, {"model": ENCODER}
    images = {"source": "images:none", "size": 8, "batch_size": 4}
    numbers = {"lookback": 4, "horizon": 3, "variables": 2, "columns": ["load", "heat"], "mean": [10.0, -5.0], "deviation": [2.0, 0.5]}
    bert = PretrainedTokenizer(
        {"tokenizer.json": tokenizer_folders.wordpiece().to_str().encode()},
        {"model_type": "bert", "vocab_size": 210},
    )
    configs = {
        "digits": ({"model": {"name": "cnn", "features": (4,), "hidden": 8}, "task": {"name": "classify"}, "data": {"source": "digits", "batch_size": 4}} | REST, {"image_shape": (8, 8, 1), "num_classes": 10}),
        "images": ({"model": {"name": "cnn", "features": (4,), "hidden": 8}, "task": {"name": "classify"}, "data": images} | REST, {"image_shape": (8, 8, 3), "num_classes": 3, "labels": ["cat", "dog", "eel"]}),
        "classes": (encoder | {"task": {"name": "classify_text"}} | rows, text_info(num_classes=2, labels=["bad", "good"])),
        "pairs": (encoder | {"task": {"name": "classify_text"}} | rows, text_info(num_classes=2, labels=["no", "yes"], pairs=True)),
        "number": (encoder | {"task": {"name": "regress_text"}} | rows, text_info()),
        "tags": (encoder | {"task": {"name": "tag"}, "data": {"source": "conll:none", **ROWS}} | REST, text_info(tags=TAGS, num_tags=5)),
        "words": (encoder | {"task": {"name": "masked_lm"}, "data": {"source": "arrays", "batch_size": 4}} | REST, {"vocab_size": 210, "tokenizer": bert}),
        "table": ({"model": {"name": "forecast_linear", "window": 3}, "task": {"name": "forecast"}, "data": {"source": "csv:none", "lookback": 4, "horizon": 3, "rows": (9, 9, 9), "batch_size": 4}} | REST, numbers),
    }  # fmt: skip
    generating = {
        "gpt": (GPT, {"name": "language_model"}, LETTERS),
        "chat": (GPT | {"context": 128}, {"name": "language_model"}, chat_tokenizer()),
        "translate": ({"name": "gru_seq2seq", "width": 16}, {"name": "seq2seq"}, LETTERS),
    }
    return {name: run_of(place / name, *generating[name]) if name in generating else untrained_run(*configs[name], place / name) for name in names}


def fake_engine(**options):
    """Return what makes a fake engine of a run."""
    return lambda run, how, adapters: FakeEngine(run, **{"slots": how.slots or 4, "context": how.context, "queue": how.queue} | options)


def serve_models(runs: dict[str, str], *, how: Running = HOW, make=None) -> dict[str, Served]:
    """Load and compile runs."""
    models = {name: Served(name, load.load(run), how, make or fake_engine()) for name, run in runs.items()}
    for model in models.values():
        model.warm()
    return models


class Live:
    """A service that listens in a thread.

    Attributes:
      url: of the service.
      service: itself.
      server: Uvicorn.
    """

    def __init__(self, models, *, access=None, limits=None, cors=(), log_prompts=False, drain_seconds=5.0, hosts=("*",)):
        self.service = Service(limits=limits or Limits(), log_prompts=log_prompts)
        if models is not None:
            self.service.use(models)
        self.listening = socket.socket()
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen(2048)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.server = Server(make_app(self.service, access or Access(environment={}), cors=cors, hosts=hosts), self.service, drain_seconds)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def live(models, **options):
    """Serve models while the block runs."""
    with Live(models, **options) as service:
        yield service


def wait_until(condition, seconds=5.0):
    """Wait for a condition; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def png(shape, seed=0) -> bytes:
    """Return a PNG file of random pixels."""
    import io

    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze() if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
