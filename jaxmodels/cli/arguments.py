"""Arguments and start-up shared by several commands."""

import argparse
from collections.abc import Callable


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def keys(text: str) -> tuple[str, ...]:
    """Parse dotted keys of a config, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def seconds(text: str) -> float:
    """Parse a duration of at least one second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 1, got {text!r}")
    return value


def signals(text: str) -> tuple[str, ...]:
    """Parse names of signals, with or without `SIG`."""
    from jaxmodels.training.signals import OTHERS

    names = tuple(f"SIG{name.strip().upper().removeprefix('SIG')}" for name in text.split(",") if name.strip())
    for name in names:
        if name not in OTHERS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(OTHERS)}")
    return names


def add_command(commands, name: str, function: Callable, summary: str) -> argparse.ArgumentParser:
    """Add a command.

    Args:
      commands: the subparsers of the root parser.
      name: name of the command.
      function: called with the parsed options and the config overrides; returns the exit status, None for 0.
      summary: one line of help.

    Returns:
      The command's parser.
    """
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(function=function)
    parser.add_argument("--cpu_devices", type=positive_int, metavar="N", help="simulate N devices on the CPU, in each process")
    return parser


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--config`; `--config.SECTION.KEY` is parsed in `cli.main`."""
    text = "a Python file with get_config(), a config.json, or a run folder; --config.SECTION.KEY=VALUE overrides a value"
    parser.add_argument("--config", required=required, metavar="FILE[:ARG]", help=text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add `--workdir`, which names a run and one of its checkpoints."""
    text = "run folder and checkpoint (default: the best checkpoint if the run tracks one, else the latest)"
    parser.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help=text)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--data_dir`."""
    parser.add_argument("--data_dir", metavar="DIR", help="root of relative data paths (default: $JAXMODELS_DATA_DIR)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add `--data_dir` and the arguments of a command that may run in several processes."""
    add_data_dir(parser)
    about = "detected under srun, mpirun and in a Kubernetes JobSet; launch/local.sh starts several on one machine"
    group = parser.add_argument_group("several processes", about)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address on which process 0 listens; it also uses the next port")
    group.add_argument("--processes", metavar="N|tpu", help="number of processes; tpu asks the Cloud TPU VM; 1 ignores the launcher's environment")
    group.add_argument("--process", metavar="I", help="index of this process, from 0")
    group.add_argument("--start_limit", type=seconds, default=300.0, metavar="SECONDS", help="time in which all processes must start (default: 300)")
    group.add_argument("--hang_limit", type=seconds, default=30.0, metavar="SECONDS", help="silence of a process that ends the run (default: 30)")
    group.add_argument(
        "--stall_limit",
        type=seconds,
        default=1800.0,
        metavar="SECONDS",
        help="time without a training step that ends the run, also of one process (default: 1800)",
    )


def add_guards(parser: argparse.ArgumentParser) -> None:
    """Add what ends a run that hangs, and the signals that stop it; `guards` reads them."""
    group = parser.add_argument_group("hangs and signals", "beside --stall_limit")
    text = "time in which restoring, initialising and compiling must each end (default: 7200)"
    group.add_argument("--setup_limit", type=seconds, default=7200.0, metavar="SECONDS", help=text)
    group.add_argument("--save_limit", type=seconds, default=3600.0, metavar="SECONDS", help="time in which saving must end (default: 3600)")
    text = "signals treated as SIGTERM unless ignored, as under nohup (default: SIGHUP,SIGUSR1; empty for none)"
    group.add_argument("--stop_signals", type=signals, default=("SIGHUP", "SIGUSR1"), metavar="NAME,…", help=text)


def guards(options):
    """Return the StopSignals of a run, with its watchdog."""
    from jaxmodels.training.signals import StopSignals
    from jaxmodels.training.watchdog import Limits, Watchdog

    return StopSignals(options.stop_signals, Watchdog(Limits(options.stall_limit, options.setup_limit, options.save_limit)))


def load(options, overrides):
    """Load the config of `--config` with the overrides of the command line."""
    from jaxmodels.config import load_config, parse_override

    return load_config(options.config, {key: parse_override(text) for key, text in overrides.items()})


def configure(options) -> None:
    """Apply settings that must precede large allocations and the initialisation of the JAX backend."""
    import logging

    from jaxmodels.hardware.malloc import tune_malloc

    tune_malloc()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and Grain log every save and read
    if options.cpu_devices:
        from jaxmodels.parallel.mesh import simulate_devices

        simulate_devices(options.cpu_devices)


def find_processes(options):
    """Return the processes of this command; None for a single process."""
    from jaxmodels.distributed import processes

    return processes.find(options.coordinator, options.processes, options.process)


def join(options, processes, load):
    """Load the config, configure JAX, and connect to the other processes.

    A ConfigError of one process is passed to the others, so that all processes end with it.

    Args:
      options: parsed arguments.
      processes: of `find_processes`.
      load: returns the config.

    Returns:
      The config.
    """
    from jaxmodels.errors import RunError

    try:
        config, error = load(), None
        resolved = _resolved(config) if processes is not None else {}
    except RunError as problem:
        if processes is None:
            raise
        config, resolved, error = None, {}, problem
    configure(options)
    if processes is not None:
        from jaxmodels.distributed import session

        limits = {name: getattr(options, name) for name in ("start_limit", "hang_limit", "stall_limit")}
        session.join(processes, resolved | _same_arguments(options), error=error, **limits)
    return config


def _resolved(config) -> dict:
    """Return every key of a resolved config and its value, for the comparison between processes."""
    from jaxmodels.config import flatten
    from jaxmodels.experiment.sections import resolve

    return {f"config.{key}": value for key, value in flatten(resolve(config)).items()}


def _same_arguments(options) -> dict:
    """Return the arguments that must be equal in all processes of a run."""
    names = (
        "command",
        "workdir",
        "overwrite",
        "allow_change",
        "from_step",
        "plan",
        "split",
        "cpu_devices",
        "hang_limit",
        "stall_limit",
        "setup_limit",
        "save_limit",
    )
    return {f"--{name}": getattr(options, name) for name in names if hasattr(options, name)}
