"""The sections of a config: what each may hold, checked and filled in. Each class is the keys of its section."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmodels import config as config_lib
from jaxmodels import models, tasks
from jaxmodels.data import registry as data_lib
from jaxmodels.data.loader import Loading
from jaxmodels.errors import ConfigError
from jaxmodels.hardware import compiler_options
from jaxmodels.models.lora import Lora
from jaxmodels.parallel import sharding
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.pretrained import weights as published
from jaxmodels.pretrained.folder import is_published
from jaxmodels.step import optimizer
from jaxmodels.step.parameters import check_pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The `training` section.

    Attributes:
      steps: length of the run; or
      epochs: the same, in passes over the training split.
      accumulate: microbatches that a batch is computed in.
      ema: decay of a moving average of the parameters, which is then what is evaluated.
      precision: of the computation; parameters and optimizer stay float32.
      trainable: patterns; only parameters whose path matches one (anywhere in it) are trained. All unless given; with
        `lora`, its adapters, and these besides.
      freeze: patterns; parameters whose path matches one are not trained.
    """

    steps: int | None = None
    epochs: float | None = None
    accumulate: int = 1
    ema: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    trainable: tuple[str, ...] | None = None
    freeze: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The `evaluation` section.

    Attributes:
      every: steps between evaluations on the validation split; only at the end unless given.
      patience: stop after so many evaluations in a row that did not improve `checkpoint.best`.
    """

    every: int | None = None
    patience: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """The `checkpoint` section.

    Attributes:
      every: steps between checkpoints.
      keep: number of the latest checkpoints to keep, of those at multiples of `every` and the very latest.
      best: a metric of the task; the checkpoint that is best by it on the validation split is kept too, and tested at the end.
    """

    every: int = 1000
    keep: int = 2
    best: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The `init_from` section, or its first key alone: where the first weights come from.

    Attributes:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`; RUN alone is its best checkpoint where it kept one, else its latest. Or
        published weights, `hf:FOLDER` or `hf:OWNER/NAME`, whose config.json makes the model too where `model` has no name.
      skip: patterns; parameters of this model whose path matches one (from its start) are initialised anew.
      rename: pairs (pattern, replacement), applied in order to the paths of the other run's parameters; an empty result
        drops the parameter.
      adapters: a folder, or `hf:OWNER/NAME`, of LoRA adapters in PEFT's format for those published weights: the first values of this
        run's own, whose section `lora` is made of theirs where there is none.
    """

    run: str
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, ...], ...] = ()
    adapters: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """The `log` section.

    Attributes:
      every: steps that a line of training metrics is the mean of.
      trackers: where metrics and media are written: names, or sections with a `name` and the tracker's own keys.
      tensorboard: False leaves `tensorboard` out of the trackers.
    """

    every: int = 100
    trackers: tuple[Any, ...] = ("jsonl", "tensorboard")
    tensorboard: bool = True

    @property
    def tracker_entries(self) -> tuple[Any, ...]:
        """The trackers, without `tensorboard` where it is switched off."""
        return tuple(entry for entry in self.trackers if self.tensorboard or entry != "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallbackOptions:
    """Keys of every entry of the section `callbacks`, beside those of its class.

    Attributes:
      on_error: when a method raises, `stop` the run or `continue` without the callback; the class decides unless given.
      processes: run on the `first` process or on `all`; the class decides unless given.
    """

    on_error: Literal["stop", "continue"] | None = None
    processes: Literal["first", "all"] | None = None


# How a run is computed, not what it computes: a run may be taken up again with other values of these.
MACHINE_KEYS = (
    "mesh",
    "sharding",
    "partition",
    "model.attention",
    "model.kernel",
    "model.remat",
    "model.offload",
    "data.threads",
    "data.workers",
    "data.buffer",
    "data.memory_gb",
    "compiler_options",
    "log.trackers",
)

_PLAIN = {
    "training": Training,
    "evaluation": Evaluation,
    "checkpoint": Checkpointing,
    "mesh": MeshSizes,
    "sharding": sharding.Sharding,
    "log": Logging,
}


def resolve(config: Mapping) -> dict:
    """The whole config: every section, every key with its value, types checked.

    Args:
      config: as a config file gives it (a ConfigDict or nested dictionaries).

    Raises:
      ConfigError: an unknown section or key, a wrong type, an unknown name, a missing required key.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"a config is a dictionary of sections, as jaxmodels.load_config(FILE) gives; got {config!r}.")
    top = ("seed", "model", "task", "data", "optimizer", *_PLAIN, "partition", "compiler_options", "init_from", "lora", "callbacks")
    for key in config:
        if key not in top:
            hint = config_lib.suggest(key, top) or f" There are: {', '.join(top)}."
            raise ConfigError(f"config.{key}: there is no such section.{hint}")
    resolved = {"seed": config_lib.check_value("seed", config.get("seed", 0), int)}
    config = _with_published_model(config)
    named = {"model": _resolve_model, "task": _resolve_task, "data": _resolve_data, "optimizer": optimizer.resolve}
    for name, resolve_section in named.items():
        section = config.get(name)
        if isinstance(section, str):
            section = {"source" if name == "data" else "name": section}
        first = "source" if name == "data" else "name"
        if not isinstance(section, Mapping) or first not in section:
            raise ConfigError(f"config.{name}.{first} is required, e.g. --config.{name}.{first}=VALUE.")
        resolved[name] = resolve_section(dict(section))
    for name, section in _PLAIN.items():
        resolved[name] = config_lib.check_section(name, {} if config.get(name) is None else config[name], config_lib.fields(section), f"the section {name!r}")
    resolved["partition"] = config_lib.check_value("partition", config.get("partition", "jit"), Literal["jit", "pmap"])
    resolved["compiler_options"] = config_lib.check_value("compiler_options", config.get("compiler_options") or {}, dict[str, Any])
    resolved["init_from"] = config_lib.check_value("init_from", config.get("init_from"), InitFrom | None)
    resolved["lora"] = config_lib.check_value("lora", _lora(config.get("lora"), resolved), Lora | None)
    resolved["callbacks"] = tuple(_resolve_callback(number, entry) for number, entry in enumerate(config.get("callbacks") or ()))
    _check_values(resolved)
    return resolved


def _resolve_callback(number: int, entry: Any) -> dict:
    """One entry of the section `callbacks`: its class's keys, and those of every callback."""
    where = f"callbacks.{number}"
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ConfigError(f"config.{where} must be {{'name': 'package.module:Class', ...}}, got {entry!r}.")
    name = config_lib.check_value(f"{where}.name", entry["name"], str)
    keys = config_lib.fields(config_lib.find(f"{where}.name", {}, name), framework=())
    options = {key: value for key, value in entry.items() if key != "name"}
    return {"name": name} | config_lib.check_section(where, options, keys | config_lib.fields(CallbackOptions), f"the callback {name!r}")


def _with_published_model(config: Mapping) -> Mapping:
    """The config with the model of published weights, where it names none."""
    init_from, model = config.get("init_from"), config.get("model")
    run = init_from.get("run") if isinstance(init_from, Mapping) else init_from
    if not is_published(run) or isinstance(model, str) or (model is not None and "name" in model):
        return config
    return dict(config) | {"model": {"name": run, **(model or {})}}


def published_keys(config: Mapping) -> dict[str, str]:
    """Dotted keys of the model that a published model's config.json decides, and which model that is."""
    model = _with_published_model(config).get("model")
    reference = model.get("name") if isinstance(model, Mapping) else model
    if not is_published(reference):
        return {}
    own = config.get("model") if isinstance(config.get("model"), Mapping) else {}
    return {f"model.{key}": reference for key in published.model_section(reference) if key == "name" or key not in own}


def _lora(section: Any, resolved: Mapping) -> Any:
    """The section `lora`, made of that of published adapters where there is none."""
    init_from = resolved["init_from"]
    adapters = init_from and init_from["adapters"]
    if adapters and not is_published(init_from["run"]):
        raise ConfigError(f"config.init_from.adapters={adapters!r} are for published weights, init_from.run=hf:FOLDER, not {init_from['run']!r}.")
    return published.lora_section(init_from["run"], resolved["model"], adapters) if adapters and section is None else section


def _resolve_model(section: dict) -> dict:
    name = config_lib.check_value("model.name", section.pop("name"), str)
    if is_published(name):
        section = published.model_section(name) | section
        name = section.pop("name")
    constructor, size = models.find(name)
    keys, given = config_lib.fields(constructor), f"the model {name!r}"
    config_lib.check_keys("model", section, keys, given)
    return {"name": name} | config_lib.check_section("model", size | section, keys, given)


def _resolve_task(section: dict) -> dict:
    name = config_lib.check_value("task.name", section.pop("name"), str)
    keys, given = config_lib.fields(tasks.find(name)), f"the task {name!r}"
    config_lib.check_keys("task", section, keys, given)
    return {"name": name} | config_lib.check_section("task", section, keys, given)


def _resolve_data(section: dict) -> dict:
    return data_lib.resolve_source(section, config_lib.fields(Loading))


def _check_values(c: dict) -> None:
    """Values that are of the right type and still make no sense."""
    compiler_options.check(c["compiler_options"])
    positive = ["data.batch_size", "data.eval_batch_size", "data.buffer", "training.steps", "training.epochs", "training.accumulate"]
    positive += ["evaluation.every", "evaluation.patience", "checkpoint.every", "checkpoint.keep", "log.every"]
    for key in positive:
        section, name = key.split(".")
        value = c[section][name]
        if value is not None and value <= 0:
            raise ConfigError(f"config.{key} must be above 0, got {value}.")
    for key in ("data.threads", "data.workers", "data.memory_gb"):
        section, name = key.split(".")
        if c[section][name] is not None and c[section][name] < 0:
            raise ConfigError(f"config.{key} must not be negative, got {c[section][name]}.")
    if not 0 <= c["seed"] < 2**32:
        raise ConfigError(f"config.seed must be at least 0 and below 2**32, got {c['seed']}.")
    if not max(c["training"]["steps"] or 0, c["training"]["epochs"] or 0) < 2**31:
        raise ConfigError("config.training: a run has less than 2**31 steps or epochs.")
    if (c["training"]["steps"] is None) == (c["training"]["epochs"] is None):
        raise ConfigError("config.training: give the length of the run as either steps or epochs.")
    ema = c["training"]["ema"]
    if ema is not None and not 0 < ema < 1:
        raise ConfigError(f"config.training.ema must lie between 0 and 1, got {ema}.")
    if c["data"]["batch_size"] % c["training"]["accumulate"]:
        raise ConfigError(f"config.data.batch_size={c['data']['batch_size']} does not divide by training.accumulate={c['training']['accumulate']}.")
    if c["checkpoint"]["best"] is None and c["evaluation"]["patience"] is not None:
        raise ConfigError("config.evaluation.patience needs checkpoint.best: the metric that has to improve.")
    for key in ("trainable", "freeze"):
        for pattern in c["training"][key] or ():
            check_pattern(f"training.{key}", pattern)
    sharding.check(sharding.Sharding(**c["sharding"]))
    if c["sharding"]["microbatches"] is not None and c["sharding"]["microbatches"] < 1:
        raise ConfigError(f"config.sharding.microbatches must be above 0, got {c['sharding']['microbatches']}.")
    if c["lora"] is not None:
        _check_lora(c)
    if c["init_from"] is not None:
        for pair in c["init_from"]["rename"]:
            if len(pair) != 2:
                raise ConfigError(f"config.init_from.rename holds pairs (pattern, replacement), got {pair!r}.")
        for key, patterns in (("skip", c["init_from"]["skip"]), ("rename", [pair[0] for pair in c["init_from"]["rename"]])):
            for pattern in patterns:
                check_pattern(f"init_from.{key}", pattern)


def _check_lora(c: dict) -> None:
    """Adapters stand beside weights that were trained before."""
    if c["lora"]["rank"] < 1 or not c["lora"]["targets"]:
        raise ConfigError(f"config.lora needs a rank of at least 1 and at least one target, got {c['lora']}.")
    for pattern in c["lora"]["targets"]:
        check_pattern("lora.targets", pattern)
    if c["init_from"] is None:
        raise ConfigError("config.lora trains adapters beside weights that another run trained: name it with config.init_from=RUN.")
