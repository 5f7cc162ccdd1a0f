"""A service that answers as `jaxmodels serve` does, without models: for tests of the page."""

import asyncio
import base64
import contextlib
import io
import json
import threading
import time

import uvicorn
from conftest import ROOT
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

PAGE = ROOT / "jaxmodels" / "serving" / "page"
STORY = "Once a model was <b>asked</b> for a story.\n\nIt told one with <img src=x onerror=alert(1)> in it, & nothing happened 🙂."
TEXT = {"type": "string"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PAIR = {"type": "object", "properties": {"text": TEXT, "pair": TEXT}, "required": ["text", "pair"]}
FILE = {"type": "string", "contentEncoding": "base64"}
COLUMNS = ["HUFL", "OT"]
ROWS = {"type": "array", "minItems": 96, "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}}
BY_NAME = {"type": "object", "properties": dict.fromkeys(COLUMNS, {"type": "array", "items": {"type": "number"}, "minItems": 96}), "required": COLUMNS}
MODELS = {
    "chat": {"endpoints": ["/v1/completions", "/v1/chat/completions"], "task": "language_model"},
    "gpt_text": {"endpoints": ["/v1/completions"], "task": "language_model"},
    "dates": {"endpoints": ["/v1/completions", "/v1/predict"], "task": "seq2seq"},
    "cifar10": {"endpoints": ["/v1/predict"], "task": "classify", "input": {"anyOf": [FILE, {"type": "array"}]}},
    "tagger": {"endpoints": ["/v1/predict"], "task": "tag", "input": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]}},
    "sst2": {"endpoints": ["/v1/predict"], "task": "classify_text", "input": {"anyOf": [TEXT, IDS]}},
    "similar": {"endpoints": ["/v1/predict"], "task": "regress_text", "input": {"anyOf": [PAIR, IDS]}},
    "ett": {"endpoints": ["/v1/predict"], "task": "forecast", "input": {"anyOf": [ROWS, BY_NAME]}},
    "odd": {"endpoints": ["/v1/predict"], "task": "mine:Odd", "input": {"anyOf": [IDS]}},
    "bert": {"endpoints": ["/v1/embeddings"], "task": "masked_lm"},
}
ENTITIES = {"Ada Lovelace": "PER", "London": "LOC", "Bernoulli": "PER", "Royal Society": "ORG"}


class Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def predicted(name, given):
    """Return the answer of a model to one input."""
    if name == "cifar10":
        red, _, blue = Image.open(io.BytesIO(base64.b64decode(given))).convert("RGB").resize((1, 1)).getpixel((0, 0))
        first, second = ("ship", "truck") if blue > red else ("truck", "ship")
        return {"labels": [{"label": first, "probability": 0.93}, {"label": second, "probability": 0.041}, {"label": "frog", "probability": 0.0004}]}
    if name == "tagger":
        found = [(given.find(words), words, label) for words, label in ENTITIES.items() if words in given]
        return {"spans": [{"start": start, "end": start + len(words), "label": label, "text": words} for start, words, label in sorted(found)]}
    if name == "sst2":
        return {"labels": [{"label": "positive", "probability": 0.75}, {"label": "negative", "probability": 0.25}]}
    if name == "similar":
        return {"value": 4.25 if given["text"] == given["pair"] else 1.5}
    if name == "ett":
        if len(given) < 96:
            raise Refused(400, f"the table has {len(given)} rows, and the model reads the last 96.")
        return {"columns": COLUMNS, "forecast": given[:48]}
    return {"embedding": [2 * token for token in given]}


class FakeService:
    """The fake. `seen` has the bodies of its requests; `left` counts clients that ended a stream early; `key` is the one it asks for."""

    def __init__(self):
        self.seen, self.left, self.key, self.loading = [], 0, None, False
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/v1/chat/completions", self.generate, methods=["POST"]),
            Route("/v1/completions", self.generate, methods=["POST"]),
            Route("/v1/predict", self.predict, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        self.app = Starlette(routes=routes, exception_handlers={Refused: self.refused})

    async def refused(self, request, error):
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}}, error.status)

    async def body(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refused(401, "This service needs an API key.")
        if request.method == "GET":
            return {}
        body = await request.json()
        self.seen.append(body)
        return body

    async def models(self, request):
        await self.body(request)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS if not self.loading]})

    async def model(self, request):
        await self.body(request)
        return JSONResponse({"id": request.path_params["name"], "object": "model", **MODELS[request.path_params["name"]]})

    async def predict(self, request):
        body = await self.body(request)
        return JSONResponse({"object": "list", "model": body["model"], "results": [predicted(body["model"], each) for each in body["inputs"]]})

    async def embed(self, request):
        body = await self.body(request)
        return JSONResponse({"data": [{"index": i, "embedding": [1.0, float(i % 2)]} for i in range(len(body["input"]))]})

    async def generate(self, request):
        body = await self.body(request)
        chat = "messages" in body
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        if "refuse" in asked:
            raise Refused(429, "The queue is full: 64 requests wait. Try again in 2 s.")
        return StreamingResponse(self.events(asked, chat), media_type="text/event-stream")

    async def events(self, asked, chat):
        def event(text, reason=None):
            choice = {"index": 0, "finish_reason": reason} | ({"delta": {"content": text}} if chat else {"text": text})
            return f"data: {json.dumps({'choices': [choice]})}\r\n\r\n"

        if "break" in asked:
            yield event("So far")
            yield f"data: {json.dumps({'error': {'message': 'The engine has ended.', 'type': 'server_error'}})}\n\n"
            return
        words = ["on ", "and "] * 500 if "for ever" in asked else STORY.split(" ")
        try:
            for i, word in enumerate(words):
                yield event(word if "for ever" in asked or i == len(words) - 1 else word + " ")
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise
        yield event("", "length" if "short" in asked else "stop")
        yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 3, 'completion_tokens': len(words), 'total_tokens': 3 + len(words)}})}\n\n"
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def serve(app):
    """Serve an ASGI app on a free port, in a thread; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end and thread.is_alive(), "the service did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
