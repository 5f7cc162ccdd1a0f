"""Conversations in JSON lines, in the forms that data sets of the field have them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import access
from jaxmodels.data.features.base import Problem, Row
from jaxmodels.data.sources.rows import json_records
from jaxmodels.errors import ConfigError

FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_WEIGHTS = ("weight", "train")  # of a message: whether it is learned
_REFUSED = {  # keys of a row that change what is learned
    "weight": "a weight is one of a message",
    "functions": "write them as 'tools'",
    "chosen": "pairs of a better and a worse answer are no conversations",
    "rejected": "pairs of a better and a worse answer are no conversations",
    "documents": "templates get no documents",
    "chat_template_kwargs": "templates get no arguments of a row",
}
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}  # of `conversations`


def read_conversations(path: str) -> Iterator[Row]:
    """Yield rows with the columns `messages` and `tools`."""
    if not access.identify(path).size:
        raise ConfigError(f"{path}: the file is empty.")
    for where, record in json_records(path):
        yield _conversation(where, record)


def _conversation(where: str, record: dict | str) -> Row:
    if isinstance(record, str):
        return Row(where, problem=record)
    try:
        messages = _messages(record)
        _check(messages)
        learned = [_learned(number, message) for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not any(learned):
            raise Problem("every answer of the conversation has the weight 0, so there is none to train on.")
        tools = record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise Problem("'tools' is not a list of descriptions.")
    except Problem as problem:
        return Row(where, problem=str(problem))
    plain = [{key: value for key, value in message.items() if key not in _WEIGHTS} for message in messages]
    return Row(where, {"messages": plain, "tools": tools or None, "learned": learned})


def _learned(number: int, message: Mapping[str, Any]) -> bool:
    """Return whether an answer is learned, by its key `weight` or `train`."""
    for key in _WEIGHTS:
        if message.get(key) is not None and message[key] not in (0, 1):
            raise Problem(f"message {number} has {key}={message[key]!r}; it is 0 or 1.")
    return all(message.get(key) is None or bool(message[key]) for key in _WEIGHTS)


def _messages(row: Mapping[str, Any]) -> list[dict]:
    """Return the messages of a row in any of its forms, with contents as texts; raise Problem with the reason if it has none."""
    for key in _REFUSED:
        if row.get(key) is not None:
            raise Problem(f"the row has {key!r}, which is not supported: {_REFUSED[key]}.")
    messages = [_plain(number, message) for number, message in enumerate(_turns(row))]
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise Problem(f"'system' is {system!r}, not a text.")
    if messages and messages[0].get("role") == "system":
        raise Problem("the row has 'system', and its first message is one of 'system', too.")
    return [{"role": "system", "content": system}, *messages]


def _plain(number: int, message: Mapping[str, Any]) -> dict:
    """Return a message whose content is a text, and whose role is one of `FOLLOWS` if it can be said so."""
    found = dict(message)
    if found.get("role") == "developer":  # the name of newer models for what is a system message
        found["role"] = "system"
    if isinstance(found.get("content"), list):
        texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in found["content"]]
        if not all(isinstance(text, str) for text in texts):
            kinds = sorted({str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in found["content"]})
            raise Problem(f"message {number} has parts of {', '.join(kinds)}; only parts of text are supported.")
        found["content"] = "".join(texts)
    if found.get("role") != "assistant" and any(found.get(key) for key in _WEIGHTS):
        raise Problem(f"message {number} of {found.get('role')!r} has a weight; only the assistant's messages are learned.")
    return found


def _turns(row: Mapping[str, Any]) -> list[dict]:
    if "messages" in row:
        return _list(row, "messages")
    if "conversations" in row:
        found = _list(row, "conversations")
        for number, message in enumerate(found):
            if not {"from", "value"} <= message.keys():
                raise Problem(f"message {number} of 'conversations' has {', '.join(message) or 'nothing'}; it needs 'from' and 'value'.")
        return [{"role": _OTHER_NAMES.get(message["from"], message["from"]), "content": message["value"]} for message in found]
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return _list(row, "prompt") + _list(row, "completion")
    if "instruction" in row and "output" in row:
        parts = [row["instruction"], row.get("input") or ""]
        if all(isinstance(part, str) for part in parts):
            return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}, {"role": "assistant", "content": row["output"]}]
        raise Problem("'instruction' and 'input' are not texts.")
    hint = config_lib.suggest("messages", row)
    raise Problem(
        f"no 'messages', nor 'conversations', nor 'prompt' and 'completion', nor 'instruction' and 'output'.{hint} The row has {', '.join(row) or 'nothing'}."
    )


def _list(row: Mapping[str, Any], key: str) -> list[dict]:
    if not isinstance(row[key], list) or not all(isinstance(message, dict) for message in row[key]):
        raise Problem(f"{key!r} is not a list of messages.")
    return row[key]


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise Problem unless roles are known and in order, and every message has content."""
    if not messages:
        raise Problem("the conversation is empty.")
    before = None
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in FOLLOWS:
            hint = config_lib.suggest(role, FOLLOWS) if isinstance(role, str) else ""
            raise Problem(f"message {number} has the role {role!r}; there are {', '.join(FOLLOWS)}.{hint}")
        if before not in FOLLOWS[role]:
            place = f"follows {before!r}" if before else "comes first"
            raise Problem(f"message {number}: {role!r} {place}; user and assistant take turns, after at most one system message.")
        if not (isinstance(content, str) and content.strip()) and not (role == "assistant" and message.get("tool_calls")):
            raise Problem(f"message {number} of {role!r} has {'no content' if content is None else f'the content {content!r}'}, not a text.")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise Problem("the conversation has no assistant message, so it has no answer to train on.")
