"""The command line. Commands import JAX when they run, so that help is instant."""

import argparse
import contextlib
import os
import sys
import threading
import time

from jaxmodels.cli import chat, checkpoint, config, data, evaluate, generate, plan, runs, serve, train

# The order in which help lists the commands.
_COMMANDS = (train, evaluate, plan, generate, serve, chat, data, config, runs, checkpoint)

_EXIT_SECONDS = 10.0

DESCRIPTION = """\
Train Flax models with Optax from one config file.

  jaxmodels train --config=configs/cnn_digits.py --workdir=runs/cnn_digits
  jaxmodels train --config=FILE[:ARGUMENT] --config.optimizer.learning_rate=3e-4
  jaxmodels evaluate --workdir=runs/cnn_digits
  jaxmodels generate --workdir=runs/gpt_shakespeare --prompt="To be"
  jaxmodels serve --workdir=runs/gpt_shakespeare --port=8000
  jaxmodels chat --workdir=runs/sft
  jaxmodels config --config=configs/cnn_digits.py --diff=runs/cnn_digits
  jaxmodels data --config=configs/cnn_digits.py
  jaxmodels plan --config=configs/gpt2_xl.py --topology=v5p-128
  jaxmodels lineage --workdir=runs/cnn_digits
  jaxmodels merge --workdir=runs/lora --output=runs/merged
  jaxmodels import hf:DIR_OR_ID runs/pretrained
  jaxmodels export runs/cnn_digits DIR
  jaxmodels checkpoint verify runs/cnn_digits

--config.SECTION.KEY=VALUE overrides a value of the config; jaxmodels config --explain KEY explains a key.
Exit status: 0 finished, 1 failed, 2 bad config or usage, 3 diverged, 75 stopped by a signal after saving.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser(prog="jaxmodels", description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add(commands)
    return root


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its status.

    Args:
      argv: arguments; by default those of the process, which then ends in any case.
    """
    status = 1
    try:
        status = run(sys.argv[1:] if argv is None else argv)
    finally:
        if argv is None:  # a program that passes arguments may go on after SystemExit
            threading.Thread(target=_end_hanging_exit, args=(status,), daemon=True).start()
    sys.exit(status)


def _end_hanging_exit(status: int) -> None:
    """End the process if its exit does not: Python waits for the threads of readers, and one may hang in a read for ever."""
    time.sleep(_EXIT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def run(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    arguments, overrides = split_overrides(argv)
    root = parser()
    options = root.parse_args(arguments)
    if overrides and not hasattr(options, "config"):
        root.error(f"{options.command} takes no --config.{next(iter(overrides))}")
    from jaxmodels.distributed import session
    from jaxmodels.errors import Interrupted, RunError
    from jaxmodels.storage.client import StorageError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal's encoding may lack a character
    try:
        _check_encoding(argv)
        _check_addresses(options)
        status = options.function(options, overrides) or 0
        session.finish()
        return status
    except Interrupted as error:
        print(f"jaxmodels: {error}", file=sys.stderr, flush=True)
        session.leave(error)
        # A normal exit would wait for a compilation that still runs in a thread.
        os._exit(error.exit_status)
    except (RunError, StorageError) as error:
        print(f"jaxmodels: {error}", file=sys.stderr, flush=True)
        session.leave(error)
        return getattr(error, "exit_status", 1)
    except BaseException as error:
        session.leave(error)
        raise


def _check_encoding(argv: list[str]) -> None:
    """Raise ConfigError for an argument that is not UTF-8: JSON files and the libraries that write arrays could not hold it."""
    from jaxmodels.errors import ConfigError

    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise ConfigError(f"{shown} is not valid UTF-8. Rename the file or folder, or give it a second name (a symbolic link) in UTF-8.") from None


def _check_addresses(options) -> None:
    """Check the arguments that name files and folders, before anything is loaded; `file://` becomes a path.

    Raises:
      ConfigError: a wrong address, or one in a bucket where only a disk will do.
    """
    from jaxmodels.errors import ConfigError
    from jaxmodels.storage import paths

    for name in ("workdir", "data_dir", "output", "run", "save", "json", "hlo", "write", "plan"):
        if not isinstance(value := getattr(options, name, None), str):
            continue
        shown = f"the {name}" if name == "run" or (name == "output" and options.command in ("import", "export")) else f"--{name}"
        place = paths.parse(value, shown)
        if not paths.is_bucket(place):
            setattr(options, name, str(place) if "://" in value else value)
        elif name in ("save", "json", "hlo", "write", "plan") or options.command == "tokenizer":
            raise ConfigError(f"{shown}={value}: this is written and read on a disk only; give a path there, and copy it.")


def split_overrides(argv: list[str]) -> tuple[list[str], dict]:
    """Split `--config.KEY=VALUE` from the other arguments.

    Returns:
      The other arguments, and the overrides: dotted key -> text.
    """
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--config."):
            key, equals, value = argument.removeprefix("--config.").partition("=")
            overrides[key] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return rest, overrides
