"""Exceptions of the package, and their exit statuses on the command line."""

import importlib
from types import ModuleType


class RunError(Exception):
    """A run failed. The message states the cause, the place and a remedy.

    Attributes:
      state_is_good: whether it is no fault of the state, which is saved before the run ends.
    """

    exit_status = 1
    state_is_good = False


class ConfigError(RunError):
    """A config, an argument or an input is invalid. Raised before any array is created on a device."""

    exit_status = 2


class Diverged(RunError):
    """The loss, a gradient or an update is not finite.

    Attributes:
      step: number of the first step with a value that is not finite; the first step of a run is 1.
    """

    exit_status = 3

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(RunError):
    """The run stopped on SIGTERM or SIGINT after saving a checkpoint; the same command resumes it."""

    exit_status = 75


class OneFailed(RunError):
    """One of several processes failed, and all have stopped at the same step."""

    def __init__(self, message: str, exit_status: int):
        """
        Args:
          message: names the process.
          exit_status: of its error.
        """
        super().__init__(message)
        self.exit_status, self.state_is_good = exit_status, True


def optional_import(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
      module: name of the module.
      extra: the extra of jaxmodels that installs it.

    Raises:
      ConfigError: the package is not installed; the message states the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise  # the package is installed, but one of its imports is not
        raise ConfigError(f"{module.partition('.')[0]} is required here and not installed: pip install 'jaxmodels[{extra}]'") from error
