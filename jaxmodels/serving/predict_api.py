"""/v1/predict: many inputs in one call; what an input is follows the task of the model."""

import dataclasses
from typing import Any

from jaxmodels.serving import schemas
from jaxmodels.serving.answers import Answers
from jaxmodels.serving.errors import bad
from jaxmodels.serving.formats import Json
from jaxmodels.serving.openai_api import check_room, computed, encode_all
from jaxmodels.serving.requests import Finished, Request, RowSampling
from jaxmodels.serving.served import Served
from jaxmodels.serving.service import Call, Service

_TOP = 10


@dataclasses.dataclass(frozen=True)
class Files:
    """A form with files: the model's name, the contents, and the number of labels as text."""

    model: str | None
    contents: list[bytes]
    top: str | None = None


async def predict(service: Service, call: Call, content: bytes | Files) -> Json:
    """Answer a body of /v1/predict, or a form with files."""
    if isinstance(content, Files):
        if content.top is not None and not (content.top.isdecimal() and 0 < int(content.top) < 1 << 31):
            raise bad(f"top must be a whole number above 0, got {content.top[:60]!r}.", "top", "invalid_value")
        return await results(service, call, content.model, list(content.contents), top=int(content.top or _TOP))
    body = await service.read(schemas.Predict, content)
    return await results(service, call, body.model, body.inputs, truncate=bool(body.truncate), top=body.top or _TOP)


async def results(service: Service, call: Call, model: str | None, inputs: list[Any], *, truncate: bool = False, top: int = _TOP) -> Json:
    """Return the result of each input."""
    served = service.find(call, model)
    if len(inputs) > service.limits.inputs:
        raise bad(f"{len(inputs)} inputs in one call, and the limit is {service.limits.inputs}.", "inputs", "too_many")
    if service.log_prompts:
        call.log["inputs"] = ["a file" if isinstance(item, bytes) else item for item in inputs]
    call.log["count"] = len(inputs)
    if served.task == "seq2seq":
        found = await _translated(service, call, served, inputs)
    elif served.predictor is None or served.predicting is None:
        ways = ", ".join(served.describe()["endpoints"])
        raise bad(f"the model {served.name!r} ({served.task}) has no form of /v1/predict: use {ways}. {served.no_form}".strip(), "model", "unsupported")
    else:
        form = served.predictor.form
        examples = await service.apart(lambda: encode_all(lambda item: form.encode(item, truncate=truncate), inputs, "inputs"))
        rows = await computed(served.predicting, examples, service.limits.seconds)
        found = [form.decode(*each, top=top) for each in zip(inputs, examples, rows, strict=True)]
    return {"object": "list", "model": served.name, "task": served.task, "results": found}


async def _translated(service: Service, call: Call, served: Served, inputs: list[Any]) -> list[Json]:
    """Return the greedily decoded target of each source."""
    assert served.engine is not None
    for number, item in enumerate(inputs):
        if not isinstance(item, str):
            raise bad(f"inputs.{number}: the model {served.name!r} reads texts.", "inputs")
    tokens = await service.apart(lambda: [served.prompt(text, f"inputs.{number}") for number, text in enumerate(inputs)])
    for each in tokens:
        served.check_length(each, None, "inputs")
    most = min((limit for limit in (service.limits.max_tokens, served.target_length, served.context) if limit is not None), default=None)
    requests = [Request(tokens=each, max_tokens=most, sampling=RowSampling(temperature=0.0)) for each in tokens]
    texts, reasons = ["" for _ in inputs], ["" for _ in inputs]
    check_room(len(requests), served.engine.stats().queue_limit)
    answers = Answers(served.engine, requests, service.limits.seconds)
    call.ends.append(answers.cancel)
    async for index, event in answers:
        texts[index] += getattr(event, "text", "")
        if isinstance(event, Finished):
            reasons[index] = event.reason
    return [{"text": text, "finish_reason": "length" if reason == "length" else "stop"} for text, reason in zip(texts, reasons, strict=True)]
