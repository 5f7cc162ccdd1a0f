"""Explain the keys of a config: type, default and meaning, read from signatures and docstrings.

The keys of the sections `model`, `task`, `data` and `optimizer` depend on a name, so they form several groups; each other section is one group.
"""

import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels import models, tasks
from jaxmodels.data import registry
from jaxmodels.data.evaluation_sets import EvaluationSets
from jaxmodels.data.loader import Loading
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.changeable import rule_of
from jaxmodels.experiment.sections import PLAIN, Root
from jaxmodels.step import optimizer

_ENTRY = re.compile(r"(\w+(?:, \w+)*): ?(.*)")
_SEE = re.compile(r"[Ss]ee `(\w+)`\.?")
_OWN = "or your own as `package.module:object`"

_INTRODUCTION = """\
# Keys of a config

`python -m jaxmodels config --explain all --markdown > docs/reference.md` writes this page from the docstrings of the sections, models, tasks,
data sources and optimizers. `jaxmodels config --explain KEY` prints the entry of one key, and `--explain optimizer.NAME` the arguments of an
Optax optimizer, which belong to the section `optimizer` too. [configs.md](configs.md) explains how to write a config.

A nested section has the keys `SECTION.KEY.NESTED`. `required` in the column of defaults marks keys without a default."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    Attributes:
      name: dotted: `optimizer.schedule.warmup`.
      type: the allowed values.
      default: as text; `required` if the key must be given.
      meaning: the docstring's entry, one paragraph.
    """

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Keys that are allowed together.

    Attributes:
      section: of the config; "" for keys outside sections.
      names: values of `model.name`, `task.name`, `data.source` or `optimizer.name` that allow these keys; empty if all do.
      summary: first line of the docstring.
      keys: sorted as in the signature.
    """

    section: str
    names: tuple[str, ...]
    summary: str
    keys: tuple[Key, ...]


def docstring_entries(text: str | None) -> dict[str, str]:
    """Return the entries of the sections `Args` and `Attributes` of a Google-style docstring: name -> meaning in one line.

    Names that share an entry, `width, heads: D and N`, share the meaning.
    """
    found: dict[str, str] = {}
    section = entry = None  # indentation of the section's title and of its entries
    names: list[str] = []
    for line in inspect.cleandoc(text or "").splitlines():
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if words in ("Args:", "Attributes:"):
            section, entry, names = indent, None, []
        elif section is None or not words:
            continue
        elif indent <= section:
            section = None
        else:
            entry = indent if entry is None else entry
            match = _ENTRY.fullmatch(words) if indent == entry else None
            if match:
                names = match[1].split(", ")
            found |= {name: match[2] if match else f"{found[name]} {words}".strip() for name in names}
    return found


def describe_keys(prefix: str, constructor: Callable) -> tuple[Key, ...]:
    """Return the keys that a constructor's keyword-only parameters stand for, with those of nested sections.

    Args:
      prefix: dotted name of the section with its dot, or "".
      constructor: a class or a function.
    """
    meanings = docstring_entries(constructor.__doc__)
    if inspect.isclass(constructor):
        meanings |= docstring_entries(constructor.__init__.__doc__)
    keys = []
    for name, (annotation, default) in config_lib.fields(constructor).items():
        keys.append(Key(prefix + name, config_lib.describe(annotation), _show(default), meanings.get(name, "")))
        for nested in _dataclasses_in(annotation):
            keys += describe_keys(f"{prefix}{name}.", nested)
    return tuple(keys)


def groups() -> list[Group]:
    """Return all keys of all sections, except the arguments of Optax's optimizers."""
    found = [Group("", (), _summary(Root), describe_keys("", Root))]
    found += [
        Group("model", (), "The model.", (_name_key("model.name", models.MODELS, "Name of the model, or a pretrained one, `hf:FOLDER` or `hf:OWNER/NAME`"),))
    ]
    found += _by_constructor("model", {name: models.find(name)[0] for name in models.MODELS})
    found += [Group("task", (), "The task: losses, metrics and predictions.", (_name_key("task.name", tasks.TASKS, "Name of the task"),))]
    found += _by_constructor("task", {name: tasks.find(name) for name in tasks.TASKS})
    source = _name_key("data.source", registry.SOURCES, "Name of the data source; some take an argument, `NAME:ARGUMENT`")
    shared = (source, *describe_keys("data.", Loading), *describe_keys("data.", EvaluationSets))
    found += [Group("data", (), "The data: keys of all sources.", shared)]
    own = _by_constructor("data", {name: _source(name) for name in registry.SOURCES})
    found += [dataclasses.replace(group, keys=tuple(key for key in group.keys if key not in shared)) for group in own]
    found += [Group("optimizer", (), _summary(optimizer.Optimizer), describe_keys("optimizer.", optimizer.Optimizer))]
    found += [Group(name, (), _summary(section), describe_keys(f"{name}.", section)) for name, section in PLAIN.items()]
    return _with_shared_meanings(found)


def explain(key: str) -> list[Group]:
    """Return the groups, reduced to the keys asked for.

    Args:
      key: `all`; a section, `model`; a key, `model.hidden`; or a section and a name, `model.cnn` or `optimizer.adamw`.

    Raises:
      ConfigError: there is no such key; suggests the nearest.
    """
    everything = groups()
    section, _, rest = key.partition(".")
    if key == "all":
        return everything
    if key in {group.section for group in everything} - {""}:
        return [group for group in everything if group.section == key]
    found = [_of_name(group, rest) for group in everything if group.section == section and rest in group.names]
    if section == "optimizer":
        found += _optax_groups(rest)
    for group in everything:
        keys = tuple(k for k in group.keys if k.name == key or k.name.startswith(f"{key}."))
        found += [dataclasses.replace(group, keys=keys)] if keys else []
    if found:
        return found
    allowed = [k.name for group in everything for k in group.keys] + [f"{g.section}.{name}" for g in everything for name in g.names]
    allowed += [group.section for group in everything]
    hint = config_lib.suggest(key, allowed) or f" Sections: {', '.join(dict.fromkeys(g.section for g in everything if g.section))}."
    raise ConfigError(f"--explain: there is no key {key!r}.{hint}")


def to_text(found: list[Group], *, brief: bool = False, width: int = 100) -> str:
    """Return groups as text for a terminal.

    Args:
      found: of `explain`.
      brief: list only the keys' names for the groups that belong to a name.
      width: of a line.
    """
    lines = []
    for group in found:
        if group.names:
            lines += textwrap.wrap(f"{group.section} {', '.join(group.names)}: {group.summary}", width, subsequent_indent="  ")
            if brief:
                names = ", ".join(key.name.removeprefix(f"{group.section}.") for key in group.keys) or "no keys"
                lines += [*textwrap.wrap(names, width, initial_indent="  ", subsequent_indent="  "), ""]
                continue
        for key in group.keys:
            may_change = f"may change in a run: {rule_of(key.name).may_change}"
            lines += textwrap.wrap(f"{key.name}: {key.type}; {_default_text(key)}; {may_change}", width, subsequent_indent="    ")
            lines += textwrap.wrap(key.meaning, width, initial_indent="  ", subsequent_indent="  ")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def to_markdown(found: list[Group]) -> str:
    """Return groups as tables in Markdown."""
    lines = []
    if {group.section for group in found} >= {"model", "training"}:
        lines += [_INTRODUCTION, ""]
    for group in found:
        title = "### " + ", ".join(f"`{name}`" for name in group.names) if group.names else f"## {group.section or 'Keys outside sections'}"
        lines += [title, "", group.summary, ""]
        if group.keys:
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            rows = ((f"`{key.name}`", key.type, key.default, key.meaning) for key in group.keys)
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            lines.append("")
        else:
            lines += ["No keys.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _default_text(key: Key) -> str:
    return key.default if key.default in ("required", "a section") else f"default {key.default}"


def _show(value: Any) -> str:
    if value is config_lib.REQUIRED:
        return "required"
    if dataclasses.is_dataclass(value):
        return "a section"
    if isinstance(value, bool | type(None)):
        return str(value).lower()
    return f"`{value!r}`"


def _dataclasses_in(annotation: Any) -> list[type]:
    """Return the dataclasses that an annotation allows: the nested sections."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for option in typing.get_args(annotation) for inner in _dataclasses_in(option)]
    return [annotation] if dataclasses.is_dataclass(annotation) else []


def _summary(constructor: Callable) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join(inspect.cleandoc(constructor.__doc__ or "").partition("\n\n")[0].split())


def _name_key(key: str, table: Mapping[str, str], meaning: str) -> Key:
    return Key(key, "a string", "required", f"{meaning}. One of {', '.join(f'`{name}`' for name in table)}; {_OWN}.")


def _source(name: str) -> Callable:
    return config_lib.find("data.source", registry.SOURCES, name)


def _by_constructor(section: str, constructors: Mapping[str, Callable]) -> list[Group]:
    """Return one group for each constructor, with all names that stand for it."""
    names: dict[Callable, list[str]] = {}
    for name, constructor in constructors.items():
        names.setdefault(constructor, []).append(name)
    return [Group(section, tuple(some), _summary(constructor), describe_keys(f"{section}.", constructor)) for constructor, some in names.items()]


def _with_shared_meanings(found: list[Group]) -> list[Group]:
    """Fill in empty meanings: keys of one section with the same name mean the same.

    The meaning comes from a group that the docstring's first paragraph or the key's entry names in backticks, else from the first with that key.
    """
    known: dict[tuple[str | None, str], str] = {}
    for group in found:
        for key in group.keys:
            if key.meaning and not _SEE.fullmatch(key.meaning):
                for name in (None, *group.names):
                    known.setdefault((name, key.name), key.meaning)

    def with_meaning(group: Group, key: Key) -> Key:
        if key.meaning and not _SEE.fullmatch(key.meaning):
            return key
        places = (*re.findall(r"`(\w+)`", key.meaning + group.summary), None)
        return dataclasses.replace(key, meaning=next((known[place, key.name] for place in places if (place, key.name) in known), ""))

    return [dataclasses.replace(group, keys=tuple(with_meaning(group, key) for key in group.keys)) for group in found]


def _of_name(group: Group, name: str) -> Group:
    """Return the group of one name; for a model, with the defaults of that size."""
    if group.section != "model":
        return dataclasses.replace(group, names=(name,))
    _, size = models.find(name)
    sized = {f"model.{key}": _show(value) for key, value in size.items()}
    return dataclasses.replace(group, names=(name,), keys=tuple(dataclasses.replace(key, default=sized.get(key.name, key.default)) for key in group.keys))


def _optax_groups(word: str) -> list[Group]:
    """Return the arguments of the optimizer of this name; or of the optimizers that have an argument of this name, that argument."""
    summary = "Arguments of the Optax optimizer."
    if word in optimizer.names():
        return [Group("optimizer", (word,), summary, _optax_keys(word))]
    names: dict[Key, list[str]] = {}
    for name in optimizer.names():
        for key in _optax_keys(name):
            if key.name == f"optimizer.{word}":
                names.setdefault(key, []).append(name)
    return [Group("optimizer", tuple(some), summary, (key,)) for key, some in names.items()]


@functools.cache
def _optax_keys(name: str) -> tuple[Key, ...]:
    meanings = docstring_entries(optimizer.find(name).__doc__)
    arguments = optimizer.own_arguments(name).items()
    return tuple(Key(f"optimizer.{key}", config_lib.describe(kind), _show(default), meanings.get(key, "")) for key, (kind, default) in arguments)
