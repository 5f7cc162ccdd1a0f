"""The bodies of requests, checked. A key that is unknown is refused, not ignored; one that OpenAI's API has and this service does not, unless it asks for
nothing.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxmodels.serving.errors import ApiError, bad

# Keys of OpenAI's API that are not supported -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # they name the caller

Tokens = list[int]
MOST_TOKENS = 1 << 31


def _checked_prompt(value: Any) -> Any:
    """Check a prompt by hand: errors of a union of four types would have as many lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")
    if all(type(item) is int for item in value):
        return value
    for number, item in enumerate(value):
        if not (isinstance(item, str) or (isinstance(item, list) and item and all(type(token) is int for token in item))):
            raise ValueError(f"item {number} is neither a text nor a list of token ids")
    return value


def _checked_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a text, or a list of up to 4 texts")
    if any(not stop for stop in stops):
        raise ValueError("an empty text would end every answer at once; leave it out")
    return stops


Prompt = Annotated[Any, BeforeValidator(_checked_prompt), Field(description="a text, a list of texts, a list of token ids, or a list of such lists")]
Stop = Annotated[Any, BeforeValidator(_checked_stop), Field(description="a text, or up to 4: an answer ends before the first of them")]


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Body):
    """Keys of both forms of generation. `top_k`, `min_p` and `repetition_penalty` are additions to OpenAI's API."""

    model: str | None = Field(None, description="name of a model; may be left out where there is one")
    temperature: float | None = Field(None, ge=0, le=100, description="divides the logits; 0 is greedy decoding, the default is 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=MOST_TOKENS, description="sample from the k most likely tokens; 0 and -1 are all")
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=0, lt=1 << 32, description="equal seeds give equal texts")
    stop: Stop = Field(None, validate_default=True)
    n: int | None = Field(None, ge=1, le=128, description="number of answers")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, lt=MOST_TOKENS)


class Completion(Generation):
    """Body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20, description="number of alternatives to each token")
    best_of: int | None = Field(None, ge=1, le=128)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class Chat(Generation):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Embedding(Body):
    """Body of /v1/embeddings. `pooling` is an addition to OpenAI's API."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=MOST_TOKENS)
    pooling: Literal["mean", "class"] | None = Field(None, description="mean over the tokens, the default, or the state of the first token")


class Predict(Body):
    """Body of /v1/predict."""

    model: str | None = None
    inputs: list[Any] = Field(min_length=1, description="GET /v1/models/NAME has the schema of one of them")
    truncate: bool | None = Field(None, description="cut texts that are too long, instead of refusing them")
    top: int | None = Field(None, ge=1, lt=MOST_TOKENS, description="number of labels to name, 10 by default")


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], content: bytes) -> Kind:
    """Return the checked body of a request.

    Raises:
      ApiError: it is no JSON object, or a key is wrong; the message names the first.
    """
    try:
        values = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}.", code="invalid_utf8") from None
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {str(error).splitlines()[0] or 'it is nested too deeply'}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise bad(f"the body must be a JSON object, not {type(values).__name__}.", code="invalid_json")
    _check_texts(content)
    for key, neutral in NEUTRAL.items():
        if key in values and key not in kind.model_fields:
            if not any(values[key] == value and type(values[key]) is type(value) for value in neutral):
                raise bad(f"{key} is not supported here; leave it out.", key, "unsupported")
            del values[key]
    for key in _IGNORED:
        values.pop(key, None)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        raise _first(error, kind) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check_texts(content: bytes) -> None:
    """Raise ApiError for an escape that is half of a character: such a text has no UTF-8."""
    if b"\\ud" not in content.lower():
        return
    try:
        json.dumps(json.loads(content), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad("the body has an escape \\ud… that is half of a character.", code="invalid_utf8") from None


def _first(error: pydantic.ValidationError, kind: type[Body]) -> ApiError:
    """Return the first error of a body in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A union adds the names of its types to the place.
    place = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        near = ", ".join(kind.model_fields)
        message = f"there is no such key; the keys are {near}" if "." not in place else "there is no such key"
    elif first["type"] != "missing":
        shown = repr(first["input"])
        message = f"{message[0].lower()}{message[1:]}, got {shown if len(shown) <= 60 else shown[:60] + '…'}"
    else:
        message = "is required"
    return bad(f"{place}: {message}.", place.partition(".")[0] or None, "unknown_key" if first["type"] == "extra_forbidden" else "invalid_value")
