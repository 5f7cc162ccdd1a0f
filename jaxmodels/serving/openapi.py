"""The OpenAPI document of a service, and a page of it that needs no other host."""

import html
import json
from typing import Any

from jaxmodels.serving import schemas
from jaxmodels.serving.service import Service

_POSTS = {
    "/v1/completions": (schemas.Completion, "Continue a text, or answer a source text; score a prompt with echo and logprobs."),
    "/v1/chat/completions": (schemas.Chat, "Answer a conversation, by the chat template of the model."),
    "/v1/embeddings": (schemas.Embedding, "Embed texts as vectors of unit length."),
    "/v1/predict": (schemas.Predict, "Predict from images, texts, pairs of texts, tables or source texts. An image may also be a file of a form."),
}
_GETS = {
    "/v1/models": "The models.",
    "/v1/models/{name}": "A model, with the schemas of its inputs and outputs.",
    "/health": "Whether the process is alive.",
    "/ready": "Whether requests are answered: 503 while models are loaded, and while the service shuts down.",
    "/metrics": "Figures for Prometheus.",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
summary { cursor: pointer } code { font-weight: 600 } pre { overflow-x: auto; padding: .5rem; border: 1px solid #8886; border-radius: 4px }
"""


def document(service: Service) -> dict[str, Any]:
    """Return the OpenAPI document of the models that are served now."""
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, (body, text) in _POSTS.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        components |= schema.pop("$defs", {})
        content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        if path == "/v1/predict":
            schema = _of_models(service, schema, components)
            form = {"model": {"type": "string"}, "top": {"type": "integer"}, "file": {"type": "string", "format": "binary"}}
            content["multipart/form-data"] = {"schema": {"type": "object", "properties": form, "required": ["file"]}}
        components[body.__name__] = schema
        answers = {"200": {"description": "the answer; server-sent events if stream is true"}} | _errors()
        paths[path] = {"post": {"summary": text, "requestBody": {"required": True, "content": content}, "responses": answers}}
    for path, text in _GETS.items():
        parameters = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}] if "{" in path else []
        paths[path] = {"get": {"summary": text, "parameters": parameters, "responses": {"200": {"description": text}}}}
    error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    components["Error"] = {"type": "object", "properties": {"error": {"type": "object", "properties": error}}}
    schemes = {"key": {"type": "http", "scheme": "bearer", "description": "needed if the service has keys"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxmodels serve", "version": "1", "description": f"Models: {', '.join(service.models) or 'none yet'}"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
        "security": [{}, {"key": []}],
    }


def _of_models(service: Service, body: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body of /v1/predict, one for each model that answers it."""
    found = []
    for name, model in service.models.items():
        described = model.describe(whole=True)
        if "input" not in described:
            continue
        own = f"Predict-{name}"
        inputs = {"type": "array", "items": described["input"], "minItems": 1, "maxItems": service.limits.inputs}
        properties = body["properties"] | {"model": {"const": name}, "inputs": inputs}
        components[own] = body | {"title": own, "properties": properties, "description": f"The task is {model.task}."}
        components[f"{own}-result"] = described["output"] | {"description": f"One of the results of {name}."}
        found.append({"$ref": f"#/components/schemas/{own}"})
    return {"anyOf": found} if found else body


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    texts = {
        "400": "the request is wrong",
        "401": "an API key is needed",
        "404": "there is no such model",
        "413": "the body is too large",
        "429": "too many requests: Retry-After says when to try again",
        "503": "the service starts or shuts down",
    }
    return {status: {"description": text, "content": content} for status, text in texts.items()}


def page(document: dict[str, Any]) -> str:
    """Return the document as a page."""

    def shown(value: Any) -> str:
        return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"

    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            title = f"<code>{method.upper()} {html.escape(path)}</code> {html.escape(operation['summary'])}"
            parts.append(f"<details><summary>{title}</summary>{shown(operation)}</details>")
    schemas = [f"<details><summary>{html.escape(name)}</summary>{shown(schema)}</details>" for name, schema in document["components"]["schemas"].items()]
    title, text = html.escape(document["info"]["title"]), html.escape(document["info"]["description"])
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f'<h1>{title}</h1><p>{text}</p><p><a href="openapi.json">openapi.json</a></p><h2>Paths</h2>{"".join(parts)}<h2>Schemas</h2>{"".join(schemas)}'
    return f"{head}<style>{_STYLE}</style></head><body><main>{body}</main></body></html>"
