"""jaxmodels serve."""

import argparse

from jaxmodels.cli.arguments import add_command, configure, positive_int, seconds

_RUNNING = ("slots", "context", "queue", "max_wait_ms", "precision", "max_pixels")


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "serve", run_serve, "serve runs and pretrained models over HTTP, or answer a file of requests")
    text = "run to serve; may be repeated. Its name in requests is NAME, or that of its folder. Runs with adapters share the weights of a parent that is served too"
    parser.add_argument("--workdir", required=True, action="append", metavar="[NAME=]RUN", help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen at; 0 takes any that is free (default: 8000)")
    parser.add_argument("--drain_seconds", type=_limit, default=30.0, metavar="S", help="time that running requests have after SIGTERM (default: 30)")
    add_running(parser)
    group = parser.add_argument_group("access")
    group.add_argument("--api_keys", metavar="FILE", help="a key in each line, KEY [NAME [RATE]]; also read from $JAXMODELS_API_KEYS, with commas between")
    group.add_argument("--no_auth", action="store_true", help="let other machines ask without keys")
    group.add_argument("--rate_limit", metavar="RATE", help="requests of each key, or of each address without keys, such as 60/minute")
    group.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="a site whose pages may ask, such as https://example.org")
    group.add_argument("--log_prompts", action="store_true", help="write prompts and answers into the access log")
    group = parser.add_argument_group("limits of a request")
    group.add_argument("--time_limit", type=seconds, default=600.0, metavar="S", help="seconds after which a request is given up (default: 600)")
    group.add_argument("--max_body_mb", type=positive_int, default=32, metavar="N", help="MiB of a body (default: 32)")
    group.add_argument("--max_inputs", type=positive_int, default=256, metavar="N", help="inputs, or answers, in one call (default: 256)")
    group.add_argument("--max_tokens", type=positive_int, metavar="N", help="new tokens of an answer (default: what the context leaves)")
    group = parser.add_argument_group("a file of requests")
    group.add_argument("--batch", metavar="FILE.jsonl", help="answer the requests of a file in OpenAI's batch format, instead of listening")
    group.add_argument("--output", metavar="FILE", help="file of the answers; those that it has already are not made again")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add how models are run; `running` reads it."""
    parser.set_defaults(config=None)  # overrides of its mesh are allowed
    parser.epilog = "--config.mesh.AXIS=N spreads a model over several devices, such as --config.mesh.tensor=4"
    group = parser.add_argument_group("models")
    text = "texts that a model generates at once (default: as many as memory has room for, 16 on CPUs)"
    group.add_argument("--slots", type=positive_int, metavar="N", help=text)
    group.add_argument("--context", type=positive_int, metavar="N", help="tokens of a prompt and its answer (default: the model's context)")
    group.add_argument("--queue", type=positive_int, default=256, metavar="N", help="requests of a model that may wait (default: 256)")
    text = "milliseconds that an input of a model that generates no text waits for others (default: 5)"
    group.add_argument("--max_wait_ms", type=_limit, default=5.0, metavar="MS", help=text)
    text = "of the computation; int8 stores the weights of models that generate in 8 bits (default: float32)"
    group.add_argument("--precision", choices=("float32", "bfloat16", "int8"), default="float32", help=text)
    group.add_argument("--max_pixels", type=positive_int, default=67_108_864, metavar="N", help="pixels of an image file (default: 67,108,864)")


def running(options, overrides):
    """Return how models are run."""
    from jaxmodels.config import fields, parse_override
    from jaxmodels.errors import ConfigError, optional_import
    from jaxmodels.parallel.mesh import MeshSizes

    mesh = {}
    for key, text in overrides.items():
        axis, value = key.removeprefix("mesh."), parse_override(text)
        if axis not in fields(MeshSizes) or key == axis:
            raise ConfigError(f"--config.{key}: a run is served by its own config; only its mesh may be another: {', '.join(fields(MeshSizes))}.")
        if type(value) is not int or value not in (-1, *range(1, 1 << 20)):
            raise ConfigError(f"--config.{key}={text}: must be a whole number above 0, or -1 for the remaining devices.")
        mesh[axis] = value

    for module in ("starlette", "uvicorn", "sse_starlette", "pydantic", "prometheus_client", "limits", "python_multipart"):
        optional_import(module, "serve")
    from jaxmodels.serving.served import Running

    return Running(**{name: getattr(options, name) for name in _RUNNING}, mesh=mesh or None)


def run_serve(options, overrides):
    """Serve until a signal comes, or answer a file."""
    import sys

    from jaxmodels.errors import ConfigError, Interrupted

    if (options.batch is None) != (options.output is None):
        raise ConfigError("--batch and --output go together: a file of requests, and the file of their answers.")
    how = running(options, overrides)
    configure(options)
    from jaxmodels.serving import server
    from jaxmodels.serving.service import Limits
    from jaxmodels.training.compile import use_persistent_cache
    from jaxmodels.training.signals import StopSignals

    if problem := use_persistent_cache():
        print(f"jaxmodels: {problem}", file=sys.stderr)
    limits = Limits(body=options.max_body_mb << 20, inputs=options.max_inputs, max_tokens=options.max_tokens, seconds=options.time_limit)
    if options.batch is not None:
        return _answer_file(options, how, limits)
    names = ("host", "port", "api_keys", "no_auth", "rate_limit", "cors", "drain_seconds", "log_prompts")
    try:
        with StopSignals() as stop, stop.may_raise():  # until the server has handlers of its own
            server.serve(options.workdir, limits=limits, **vars(how), **{name: getattr(options, name) for name in names})
    except Interrupted:
        return 0


def _answer_file(options, how, limits) -> int:
    """Answer a file of requests; return 1 if an answer is an error."""
    from pathlib import Path

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.serving import batch_files
    from jaxmodels.serving.service import open_service
    from jaxmodels.storage import paths
    from jaxmodels.training.signals import StopSignals

    for name in ("batch", "output"):
        if paths.is_bucket(paths.parse(getattr(options, name), f"--{name}")):
            raise ConfigError(f"--{name}={getattr(options, name)}: this is read and written on a disk only; give a path there.")
    source, output = Path(options.batch), Path(options.output)
    if source.resolve() == output.resolve():
        raise ConfigError("--output must be another file than --batch.")
    requests = batch_files.read_requests(source)
    done = batch_files.answered(output)
    left = [request for request in requests if request["custom_id"] not in done]
    if left:
        try:
            with StopSignals() as stop, stop.may_raise():
                service, named = open_service(options.workdir, limits=limits)
                service.load(named, how)
        except Interrupted as error:
            raise Interrupted(f"{error}: stopped before the first answer.") from None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"requests of {source.name}", total=len(requests), completed=len(requests) - len(left))
            wrong = batch_files.answer_file(service, left, output, together=2 * (how.slots or 16), progress=lambda: progress.advance(task))
        service.close()
    else:
        wrong = 0
    skipped = f", {len(requests) - len(left)} were there already" if len(left) < len(requests) else ""
    print(f"{output}: {len(left)} answers{f', {wrong} of them errors' if wrong else ''}{skipped}.")
    return int(wrong > 0)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, got {text!r}")
    return int(text)


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value
