"""The sections of a config: their keys, types and defaults. Each dataclass defines the keys of one section."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxmodels import config as config_lib
from jaxmodels import models, tasks
from jaxmodels.data import registry as data_lib
from jaxmodels.data.evaluation_sets import EvaluationSets
from jaxmodels.data.loader import Loading
from jaxmodels.errors import ConfigError
from jaxmodels.hardware import compiler_options
from jaxmodels.models.lora import Lora
from jaxmodels.parallel import sharding
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.pretrained import preprocessing
from jaxmodels.pretrained import weights as pretrained
from jaxmodels.pretrained.folder import find, is_pretrained
from jaxmodels.step import optimizer
from jaxmodels.step.parameters import check_pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Length and precision of training, and which parameters are trained.

    Attributes:
      steps: length of the run in training steps. Give either `steps` or `epochs`.
      epochs: length of the run in passes over the training split; may be a fraction.
      accumulate: number of microbatches for gradient accumulation; must divide `data.batch_size`.
      ema: decay of an exponential moving average (EMA) of the parameters, between 0 and 1; evaluation uses the average. None keeps no average.
      precision: floating-point type of the computation. Parameters and optimizer state are float32 in either case.
      trainable: regular expressions, searched in parameter paths; only matching parameters are trained. None trains all parameters, or with
        `lora` the adapters only; with `lora`, matching parameters are trained in addition to the adapters.
      freeze: regular expressions, searched in parameter paths; matching parameters are not trained.
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
    """Evaluation during training.

    Attributes:
      every: steps between evaluations on the validation split and the further `data.validation_sets`. None evaluates only at the end.
      patience: stop training after this many consecutive evaluations without an improvement of `checkpoint.best`. None never stops early.
    """

    every: int | None = None
    patience: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Saving of checkpoints.

    Attributes:
      every: steps between checkpoints.
      keep: number of latest checkpoints to keep, of those at multiples of `every` and the very latest.
      best: name of a metric of the task on the validation split, such as `accuracy`, or on one of `data.validation_sets`, `NAME/accuracy`; the
        checkpoint with its best value is kept too, and is evaluated on the test split at the end. None keeps only recent checkpoints.
      checksums: save a checksum of each array, and verify it when the array is restored. False saves that time, for very large states.
    """

    every: int = 1000
    keep: int = 2
    best: str | None = None
    checksums: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Initial weights from another run or a pretrained model. The value of `run` alone may stand for the section.

    Attributes:
      run: another run, `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP` (RUN alone is its best checkpoint if it tracks one, else its latest); or
        pretrained weights, `hf:FOLDER` or `hf:OWNER/NAME`, which also define the model if the config names none.
      skip: regular expressions, matched from the start of this model's parameter paths; matching parameters are initialised randomly.
      rename: pairs (pattern, replacement), applied in order to the parameter paths of the other run; an empty result drops the parameter.
      adapters: LoRA adapters in PEFT format for the pretrained weights, a folder or `hf:OWNER/NAME`; they initialise this run's adapters, and
        define the section `lora` if the config has none.
    """

    run: str
    skip: tuple[str, ...] = ()
    rename: tuple[tuple[str, ...], ...] = ()
    adapters: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """Logging of metrics.

    Attributes:
      every: steps between log lines; a line holds the means over these steps.
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
    """Keys of every entry of the section `callbacks`, in addition to those of its class.

    Attributes:
      on_error: when a method raises, `stop` the run or `continue` without the callback; the class decides unless given.
      processes: run on the `first` process or on `all`; the class decides unless given.
    """

    on_error: Literal["stop", "continue"] | None = None
    processes: Literal["first", "all"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    """Keys that are not in a section, and optional sections.

    Attributes:
      seed: random seed of initialisation, data order, dropout and augmentation; at least 0 and below 2**32.
      partition: `jit` compiles one program over the whole mesh; `pmap` runs one replica per device, with data parallelism only.
      compiler_options: XLA options, name -> value, that replace the built-in ones of the chip; None as a value removes an option.
      init_from: initial weights from another run or a pretrained model; a section, or its `run` alone.
      lora: adapters to train beside frozen weights; needs `init_from`. None trains the weights themselves.
      callbacks: hooks around the step: names `package.module:Class`, or sections with a `name` and the class's own keys.
    """

    seed: int = 0
    partition: Literal["jit", "pmap"] = "jit"
    compiler_options: dict[str, Any] | None = None
    init_from: InitFrom | None = None
    lora: Lora | None = None
    callbacks: tuple[Any, ...] | None = None


PLAIN = {
    "training": Training,
    "evaluation": Evaluation,
    "checkpoint": Checkpointing,
    "mesh": MeshSizes,
    "sharding": sharding.Sharding,
    "log": Logging,
}


def resolve(config: Mapping) -> dict:
    """Return the config with all sections and keys, defaults filled in and types checked.

    Args:
      config: a ConfigDict or nested dictionaries, as a config file returns.

    Raises:
      ConfigError: an unknown section or key, a wrong type, an unknown name, a missing required key.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"the config must be a dictionary of sections, as jaxmodels.load_config(FILE) returns; got {config!r}.")
    root = config_lib.fields(Root)
    top = ("seed", "model", "task", "data", "optimizer", *PLAIN, *root)
    for key in config:
        if key not in top:
            hint = config_lib.suggest(key, top) or f" There are: {', '.join(top)}."
            raise ConfigError(f"config.{key}: there is no such section.{hint}")

    def check(key: str, value: Any) -> Any:
        return config_lib.check_value(key, value, root[key][0])

    resolved = {"seed": check("seed", config.get("seed", 0))}
    config = _with_pretrained_task(_with_pretrained_model(config))
    named = {"model": _resolve_model, "task": _resolve_task, "data": _resolve_data, "optimizer": optimizer.resolve}
    for name, resolve_section in named.items():
        section = config.get(name)
        if isinstance(section, str):
            section = {"source" if name == "data" else "name": section}
        first = "source" if name == "data" else "name"
        if not isinstance(section, Mapping) or first not in section:
            raise ConfigError(f"config.{name}.{first} is required, e.g. --config.{name}.{first}=VALUE.")
        resolved[name] = resolve_section(dict(section))
    for name, section in PLAIN.items():
        resolved[name] = config_lib.check_section(name, {} if config.get(name) is None else config[name], config_lib.fields(section), f"the section {name!r}")
    resolved["partition"] = check("partition", config.get("partition", "jit"))
    resolved["compiler_options"] = check("compiler_options", config.get("compiler_options")) or {}
    resolved["init_from"] = check("init_from", config.get("init_from"))
    resolved["lora"] = check("lora", _lora(config.get("lora"), resolved))
    resolved["callbacks"] = tuple(_resolve_callback(number, entry) for number, entry in enumerate(check("callbacks", config.get("callbacks")) or ()))
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


def _with_pretrained_model(config: Mapping) -> Mapping:
    """Return the config with the model of the pretrained weights if it names no model."""
    run, model = _init_from(config), config.get("model")
    if not is_pretrained(run) or isinstance(model, str) or (model is not None and "name" in model):
        return config
    return dict(config) | {"model": {"name": run, **(model or {})}}


def _with_pretrained_task(config: Mapping) -> Mapping:
    """Return the config with the mean and deviation of the pretrained weights, if its task takes them and names neither."""
    run = _init_from(config)
    task = {"name": config["task"]} if isinstance(config.get("task"), str) else config.get("task")
    if not is_pretrained(run) or not isinstance(task, Mapping) or not isinstance(task.get("name"), str) or {"mean", "std"} & task.keys():
        return config
    if not {"mean", "std"} <= config_lib.fields(tasks.find(task["name"])).keys():
        return config
    return dict(config) | {"task": {**task, **preprocessing.normalisation(find(run))}}


def _init_from(config: Mapping) -> Any:
    """Return the run or the pretrained model of `init_from`."""
    init_from = config.get("init_from")
    return init_from.get("run") if isinstance(init_from, Mapping) else init_from


def pretrained_keys(config: Mapping) -> dict[str, str]:
    """Return the model keys that a pretrained model's config.json sets: dotted key -> reference of that model."""
    model = _with_pretrained_model(config).get("model")
    reference = model.get("name") if isinstance(model, Mapping) else model
    if not is_pretrained(reference):
        return {}
    own = config.get("model") if isinstance(config.get("model"), Mapping) else {}
    return {f"model.{key}": reference for key in pretrained.model_section(reference) if key == "name" or key not in own}


def _lora(section: Any, resolved: Mapping) -> Any:
    """Return the section `lora`; that of the pretrained adapters if the config has none."""
    init_from = resolved["init_from"]
    adapters = init_from and init_from["adapters"]
    if adapters and not is_pretrained(init_from["run"]):
        raise ConfigError(f"config.init_from.adapters={adapters!r} needs pretrained weights, init_from.run=hf:FOLDER, got {init_from['run']!r}.")
    return pretrained.lora_section(init_from["run"], resolved["model"], adapters) if adapters and section is None else section


def _resolve_model(section: dict) -> dict:
    name = config_lib.check_value("model.name", section.pop("name"), str)
    if is_pretrained(name):
        section = pretrained.model_section(name) | section
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
    return data_lib.resolve_sets(data_lib.resolve_source(section, config_lib.fields(Loading) | config_lib.fields(EvaluationSets)))


def _check_values(c: dict) -> None:
    """Raise ConfigError for a value of the right type that is out of range or contradicts another."""
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
        raise ConfigError("config.evaluation.patience needs checkpoint.best, the metric to improve.")
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
    """Raise ConfigError for a `lora` section without valid rank and targets, or without initial weights."""
    if c["lora"]["rank"] < 1 or not c["lora"]["targets"]:
        raise ConfigError(f"config.lora needs a rank of at least 1 and at least one target, got {c['lora']}.")
    for pattern in c["lora"]["targets"]:
        check_pattern("lora.targets", pattern)
    if c["init_from"] is None:
        raise ConfigError("config.lora trains adapters on the weights of another run: name it with config.init_from=RUN.")
