"""Further sets to validate and to test on, by name. Their splits are called `validation/NAME` and `test/NAME`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmodels.data.keys import Keys
from jaxmodels.errors import ConfigError

SPLITS = ("train", "validation", "test")
KEYS = {"validation": "validation_sets", "test": "test_sets"}


@dataclasses.dataclass(kw_only=True)
class EvaluationSets(Keys):
    """Keys of all sources, and the base class of the keys of those that name what each split reads.

    Attributes:
      validation_sets: further sets to validate on, beside the main one: name -> what `data.validation` takes, such as a path or the name of a split; or
        name -> a section of those keys of `data` that are others for this set, `source` among them, and `split`, the split of that data that is the set
        (`validation`, or `test` for test_sets, by default). Tokenizer, classes and statistics are those of the training data.
      test_sets: further sets to test on, given in the same way.
    """

    validation_sets: dict[str, Any] | None = None
    test_sets: dict[str, Any] | None = None

    def named(self) -> dict[str, Any]:
        """Return the split of each set -> what it is given as."""
        return {f"{split}/{name}": value for split, key in KEYS.items() for name, value in (getattr(self, key) or {}).items()}

    def given(self) -> dict[str, Any]:
        """Return split -> what it is given as, of the splits that the keys name: those of the main sets, `train` and so on, first."""
        main = {split: getattr(self, split) for split in SPLITS if getattr(self, split, None)}
        return main | self.named()


def main_of(split: str) -> str:
    """Return `validation` of `validation` and of `validation/NAME`."""
    return split.partition("/")[0]


def is_named(split: str) -> bool:
    """Whether a split is one of the further sets."""
    return "/" in split


def of(splits: Iterable[str], main: str) -> list[str]:
    """Return those of some splits that validate (or test): the main set first, then the others in their order."""
    return sorted((split for split in splits if main_of(split) == main), key=is_named)


def key_of(split: str) -> str:
    """Return the config key that says what a split reads."""
    main, _, name = split.partition("/")
    return f"config.data.{KEYS[main]}.{name}" if name else f"config.data.{main}"


def check_split(split: str, where: str) -> None:
    """Raise ConfigError unless `train`, `validation`, `test`, or one of the latter two with `/NAME`.

    Args:
      split: name of a split.
      where: the key or source that gives it, for errors.
    """
    main, slash, name = split.partition("/")
    if main not in SPLITS or (slash and main not in KEYS):
        raise ConfigError(f"{where}: a split is one of {', '.join(SPLITS)}, validation/NAME and test/NAME; it has {split!r}.")
    if slash and (name in SPLITS or not re.fullmatch(r"[\w-]+", name)):
        reason = "that is a split's own name" if name in SPLITS else "a name has letters, digits, _ and - only"
        raise ConfigError(f"{where}: {name!r} cannot be the name of a set: {reason}. Give it another one.")


def check_names(section: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless the sets of a section have names that are allowed, and each is a string or a section."""
    for main, key in KEYS.items():
        for name, value in (section.get(key) or {}).items():
            check_split(f"{main}/{name}", f"config.{where}.{key}")
            if not value or not isinstance(value, (str, Mapping)):
                raise ConfigError(f"config.{where}.{key}.{name} must be what config.{where}.{main} takes, or a section of keys; got {value!r}.")
