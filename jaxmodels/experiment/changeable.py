"""Which keys of a run's config may change when the run goes on: the only list of it.

The check of a run folder, `--allow_change`, `jaxmodels config --explain` and the table in docs/runs.md read it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError

FREE, ON_REQUEST, NEVER = "yes", "with --allow_change", "no"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What may change, when, and what is exact after it.

    Attributes:
      keys: dotted keys or sections; `*` stands for any part.
      may_change: see above.
      after: what holds after the change, for docs/runs.md.
    """

    keys: tuple[str, ...]
    may_change: Literal["yes", "with --allow_change", "no"]
    after: str


_DEVICES = ("mesh", "sharding", "partition", "compiler_options", "model.attention", "model.kernel", "model.remat", "model.offload")
_READING = ("data.threads", "data.workers", "data.buffer", "data.memory_gb", "data.group_cache_mb", "data.eval_batch_size")

# The first rule that matches a key holds.
RULES = (
    Rule(_DEVICES, FREE, "the same result, up to rounding"),
    Rule(_READING, FREE, "the same result; metrics up to rounding with another `data.eval_batch_size`"),
    Rule(("training.steps", "training.epochs"), FREE, "the learning rate follows the schedule of the new length; data and everything else as before"),
    Rule(
        ("data.validation_sets", "data.test_sets"),
        FREE,
        "the same training; a set that is added is evaluated from then on, or tested if the run has finished; one name stands for the same examples",
    ),
    Rule(("evaluation", "checkpoint", "callbacks"), FREE, "the same training; evaluations, checkpoints and the end of patience by the new values"),
    Rule(("log",), FREE, "the same training; with another `log.every`, the first line is the mean since the change"),
    Rule(("optimizer.name",), NEVER, "its state belongs to one optimizer"),
    Rule(("optimizer",), ON_REQUEST, "the state of the optimizer stays; refused if the change adds or removes arrays of it"),
    Rule(("data.batch_size",), ON_REQUEST, "the next batch begins with the next example: none is repeated or left out; `epochs` counts examples"),
    Rule(
        ("data.sources.*.weight", "data.shuffle", "data.shuffle_window", "data.balance"),
        ON_REQUEST,
        "a new epoch begins: examples of the epoch that ends may come again, others of it not at all",
    ),
    Rule(("data.random_resized_crop", "data.rand_augment"), ON_REQUEST, "the order of examples is the same"),
    Rule(("training.accumulate", "training.precision"), ON_REQUEST, "the same batches; other rounding, and other dropout with `accumulate`"),
    Rule(("training.ema",), ON_REQUEST, "the average goes on with the new decay; it cannot be added or removed"),
    Rule(("model.dropout",), ON_REQUEST, "the same parameters"),
    Rule(("*",), NEVER, "parameters, data or loss would be others"),
)


def rule_of(key: str) -> Rule:
    """Return the rule of a dotted key."""
    return next(rule for rule in RULES if covers(rule.keys, key))


def covers(patterns: Collection[str], key: str) -> bool:
    """Return whether a key is one of `patterns`, or below one."""
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def check_allowed(allowed: Sequence[str], keys: Collection[str]) -> None:
    """Check the keys of `--allow_change`.

    Args:
      allowed: dotted keys or sections.
      keys: all keys of the config, as of now and as stored in the run.

    Raises:
      ConfigError: there is no such key, or it cannot change within a run.
    """
    for name in allowed:
        found = [key for key in keys if covers([name], key)]
        if not found:
            raise ConfigError(f"--allow_change={name}: there is no such key in this config.{config_lib.suggest(name, keys)}")
        if all(rule_of(key).may_change == NEVER for key in found):
            raise ConfigError(f"--allow_change={name}: it cannot change within a run. {new_run()}")


def check_changes(run: str, changed: Mapping[str, tuple[Any, Any]], allowed: Sequence[str]) -> None:
    """Check that a run may go on with other values.

    Args:
      run: path of the run folder.
      changed: key -> (value in the run, value now).
      allowed: keys of `--allow_change`.

    Raises:
      ConfigError: a key may not change, or not without `--allow_change`; names each, and what to do.
    """
    refused = {key: pair for key, pair in changed.items() if not _may_change(key, allowed)}
    if not refused:
        return
    lines = "".join(f"\n  {key}: {there!r} in the run, {here!r} now" for key, (there, here) in refused.items())
    ask = [key for key in refused if rule_of(key).may_change == ON_REQUEST]
    never = [key for key in refused if key not in ask]
    advice = [f"To go on with {'another value' if len(ask) == 1 else 'other values'} of {', '.join(ask)}: --allow_change={','.join(ask)}"] if ask else []
    advice += (
        [f"{', '.join(never)} cannot change within a run. {new_run(run)}"] if never else ["Else choose another --workdir, or --overwrite to delete that run."]
    )
    raise ConfigError(f"{run} belongs to a run of another config:{lines}\n" + "\n".join(advice))


def _may_change(key: str, allowed: Sequence[str]) -> bool:
    may_change = rule_of(key).may_change
    return may_change == FREE or (may_change == ON_REQUEST and covers(allowed, key))


def new_run(run: str = "RUN") -> str:
    """Return the advice for a key that cannot change within a run."""
    return f"Start a new run in another --workdir, with these weights by --config.init_from={run}; or --overwrite to delete that run and start a new one."


def table() -> str:
    """Return the rules as a Markdown table."""
    names = ["all others" if rule.keys == ("*",) else ", ".join(f"`{key}`" for key in rule.keys) for rule in RULES]
    rows = (f"| {name} | {rule.may_change.replace('--allow_change', '`--allow_change`')} | {rule.after} |" for name, rule in zip(names, RULES, strict=True))
    return "\n".join(("| key | may change | after the change |", "|---|---|---|", *rows)) + "\n"
