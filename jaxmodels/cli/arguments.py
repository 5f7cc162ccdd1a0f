"""Arguments and start-up that several commands share."""

import argparse


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 1, got {text!r}")
    return value


def load(options, overrides):
    from jaxmodels.config import load_config, parse_override

    return load_config(options.config, {key: parse_override(text) for key, text in overrides.items()})


def configure(options) -> None:
    """Settings that must stand before JAX finds its devices."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and Grain tell of every step they take
    if options.cpu_devices:
        from jaxmodels.parallel.mesh import simulate_devices

        simulate_devices(options.cpu_devices)


def find_processes(options):
    """The processes of this command; None for one alone."""
    from jaxmodels.distributed import processes

    return processes.find(options.coordinator, options.processes, options.process)


def join(options, processes, load):
    """The config that `load` gives, with the devices' settings made, and this process among the others where there are several."""
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
    """A config as processes compare it, with every key's value."""
    from jaxmodels.config import flatten
    from jaxmodels.experiment.sections import resolve

    return {f"config.{key}": value for key, value in flatten(resolve(config)).items()}


def _same_arguments(options) -> dict:
    """The arguments that all processes of a run must have been given alike."""
    names = ("command", "workdir", "overwrite", "plan", "split", "cpu_devices", "hang_limit", "stall_limit")
    return {f"--{name}": getattr(options, name) for name in names if hasattr(options, name)}
