"""A conversation in the terminal, over the same engine as the service."""

import contextlib
import dataclasses
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmodels.errors import ConfigError, Interrupted, RunError
from jaxmodels.serving.engines import make_engine
from jaxmodels.serving.errors import ApiError
from jaxmodels.serving.requests import Event, Finished, Request, RowSampling
from jaxmodels.serving.served import GENERATING, MakeEngine, Running, Served
from jaxmodels.serving.service import open_service
from jaxmodels.tokenizers.chat_template import TemplateProblem
from jaxmodels.training.signals import StopSignals

HELP = "/reset begins anew, /exit ends; Ctrl-C stops an answer."


def talk(
    run: str,
    how: Running,
    *,
    system: str | None = None,
    max_tokens: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    make: MakeEngine = make_engine,
    ask: Callable[[str], str] = input,
) -> None:
    """Read what a user says, line by line, and print the answers as they are generated, until `/exit` or the end of the input.

    Args:
      run: `RUN` or `hf:…`, a language model with a chat template.
      how: it is run; one slot is used.
      system: a system message.
      max_tokens: new tokens of an answer.
      sampling: fields of `RowSampling`.
      make: makes the engine.
      ask: reads a line.

    Raises:
      ConfigError: the run cannot answer conversations.
    """
    settings = RowSampling(**(sampling or {}))
    try:
        with StopSignals() as stop, stop.may_raise():
            service, named = open_service([run])
            service.load(named, dataclasses.replace(how, slots=1), make)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped before the conversation.") from None
    (served,) = service.models.values()
    if served.task not in GENERATING or served.task == "seq2seq":
        raise ConfigError(f"a run of the task {served.task!r} answers no conversations; it needs 'language_model'.")
    assert served.template is not None  # raises ConfigError without one
    print(f"{served.summary()}\n{HELP}", file=sys.stderr)
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    try:
        while (line := _line(ask)) != "/exit":
            if line == "/reset":
                messages = list(begin)
            elif line.startswith("/"):
                print(f"there is no {line.split()[0]}. {HELP}", file=sys.stderr)
            elif line:
                messages.append({"role": "user", "content": line})
                answer = _answer(served, messages, max_tokens, settings)
                messages = messages[:-1] if answer is None else [*messages, {"role": "assistant", "content": answer}]
    finally:
        service.close()


def _line(ask: Callable[[str], str]) -> str:
    """Return the next line; `/exit` at the end of the input. Ctrl-C at the prompt begins a new line."""
    while True:
        try:
            return ask("> ").strip()
        except EOFError:
            print()
            return "/exit"
        except KeyboardInterrupt:
            print("\n(/exit ends)", file=sys.stderr)


def _answer(served: Served, messages: list[dict[str, str]], max_tokens: int | None, sampling: RowSampling) -> str | None:
    """Print an answer as it is generated, and return it; None if there is none, with the reason printed."""
    assert served.engine is not None
    events: queue.Queue[Event] = queue.Queue()
    try:
        tokens = served.conversation(messages)
        served.check_length(tokens, max_tokens, "conversation")
        ticket = served.engine.submit(Request(tokens=tokens, max_tokens=max_tokens, sampling=sampling, adapter=served.adapter), events.put)
    except (ApiError, TemplateProblem, RunError) as error:
        print(f"{error} /reset begins anew.", file=sys.stderr)
        return None
    text = ""
    with _interrupting(ticket.cancel):
        while True:
            event = events.get()
            piece = getattr(event, "text", "")
            text += piece
            print(piece, end="", flush=True)
            if isinstance(event, Finished):
                print(f"\n{event.error}" if event.error else "")
                return text


@contextlib.contextmanager
def _interrupting(call: Callable[[], None]) -> Iterator[None]:
    """Call a function on Ctrl-C within, and nothing else."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
