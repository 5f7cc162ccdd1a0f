"""Losses by name. Each returns one value for each example or position; the task sums them with weights.

A config's `task.loss` is a name in CLASSIFICATION, CONTRASTIVE or REGRESSION, whichever the task takes, or your own function,
`package.module:function`, with the signature of that kind:

- classification: `(logits, target) -> values`, logits float32 [..., C], target int [...] or, under mixup and cutmix, probabilities
  float [..., C], values float [...]. `task.label_smoothing` needs a keyword `label_smoothing`.
- regression: `(predicted, target) -> values`, each float [...].
- contrastive: `(one, other, *, temperature, valid) -> values`, embeddings float32 [B, D], valid bool [B], values float [B].

Shapes: B batch, T time, S length of a target, C classes, D width of an embedding; `...` any.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError


def mse(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error, [...]."""
    return optax.squared_error(predicted, target)


def mae(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Absolute error, [...]."""
    return jnp.abs(predicted - target)


def huber(predicted: jax.Array, target: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Huber loss (Huber 1964), [...]: half the squared error up to `delta`, linear with slope `delta` above."""
    return optax.huber_loss(predicted, target, delta=delta)


def cross_entropy(logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy in nats, [...].

    Args:
      logits: [..., C].
      target: class ids, int [...], or probabilities, float [..., C].
      label_smoothing: probability taken from the target and spread evenly over all classes (Szegedy et al. 2016).
    """
    if target.ndim < logits.ndim:
        exact = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    else:
        exact = optax.softmax_cross_entropy(logits, target)
    if not label_smoothing:
        return exact
    # Equal to the cross-entropy with smoothed targets, without allocating those.
    return (1 - label_smoothing) * exact - label_smoothing * jnp.mean(jax.nn.log_softmax(logits), axis=-1)


def focal(logits: jax.Array, target: jax.Array, *, gamma: float = 2.0, label_smoothing: float = 0.0) -> jax.Array:
    """Focal loss over a softmax (Lin et al. 2017), [...]: cross-entropy times (1 - p) ** gamma, p the probability of the target class.

    For a target that is a distribution, the mean over it.

    Args:
      logits: [..., C].
      target: class ids, int [...], or probabilities, float [..., C].
      gamma: focusing parameter γ, not negative; larger values down-weight well-classified examples more, 0 gives cross-entropy.
      label_smoothing: as for `cross_entropy`.
    """
    if target.ndim < logits.ndim:
        target = jax.nn.one_hot(target, logits.shape[-1])
    if label_smoothing:
        target = optax.smooth_labels(target, label_smoothing)
    logs = jax.nn.log_softmax(logits)
    # At 0 a power with an exponent below 1 has no finite gradient.
    rest = jnp.maximum(-jnp.expm1(logs), jnp.finfo(logs.dtype).tiny)
    return -jnp.sum(target * rest**gamma * logs, axis=-1)


def ctc(logits: jax.Array, target: jax.Array, *, valid: jax.Array | None = None, blank: int = 0) -> jax.Array:
    """Connectionist temporal classification (Graves et al. 2006): the negative log-probability of all alignments of a target, [B].

    About 1e5 where a row has fewer frames than its target needs: one for each label, and one between equal neighbours.

    Args:
      logits: [B, T, C].
      target: int [B, S]: classes other than `blank`, then -1.
      valid: bool [B, T], False for padding frames, which come last. None if there are none.
      blank: the class that stands for no label.
    """
    padding = jnp.zeros(logits.shape[:2]) if valid is None else 1.0 - valid
    return optax.ctc_loss(logits, padding.astype(logits.dtype), jnp.maximum(target, 0), (target < 0).astype(logits.dtype), blank_id=blank)


def info_nce(one: jax.Array, other: jax.Array, *, temperature: float, valid: jax.Array | None = None) -> jax.Array:
    """Symmetric InfoNCE (van den Oord et al. 2018) over cosine similarities, as in CLIP (Radford et al. 2021), [B].

    Args:
      one, other: embeddings [B, D]; row i of one and row i of the other are a pair.
      temperature: divides the similarities.
      valid: bool [B]; rows where it is False are no negatives. None if all rows are valid.
    """
    pair = jnp.arange(len(one))
    similar = cosines(one, other) / temperature
    allowed = True if valid is None else valid[None, :] | (pair[None, :] == pair[:, None])
    ways = (jnp.where(allowed, scores, -jnp.inf) for scores in (similar, similar.T))
    return sum(cross_entropy(scores, pair) for scores in ways) / 2


def nt_xent(one: jax.Array, other: jax.Array, *, temperature: float, valid: jax.Array | None = None) -> jax.Array:
    """NT-Xent of SimCLR (Chen et al. 2020), [B]: cross-entropy over the cosine similarities to all 2B - 1 other embeddings.

    A pair's value is the mean of its two. Arguments as for `info_nce`.
    """
    both = jnp.concatenate([one, other])
    B, real = len(one), jnp.ones(len(one), bool) if valid is None else valid
    itself = jnp.eye(2 * B, dtype=bool)
    partner = jnp.roll(itself, B, axis=1)
    allowed = (jnp.tile(real, 2)[None, :] | partner) & ~itself
    similar = jnp.where(allowed, cosines(both, both) / temperature, -jnp.inf)
    return cross_entropy(similar, (jnp.arange(2 * B) + B) % (2 * B)).reshape(2, B).mean(axis=0)


def cosines(one: jax.Array, other: jax.Array) -> jax.Array:
    """Cosine similarities of embeddings [B, D] and [B, D], [B, B]."""

    def normalize(x):
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))

    return normalize(one) @ normalize(other).T


CLASSIFICATION = {"cross_entropy": cross_entropy, "focal": focal}
CONTRASTIVE = {"nt_xent": nt_xent, "info_nce": info_nce}
REGRESSION = {"mse": mse, "mae": mae, "huber": huber}


def errors(predicted: jax.Array, target: jax.Array, weight: jax.Array, *, loss: tuple[str, Callable]) -> dict:
    """Return the metrics of a regression as (sum, weight): `mse`, `mae` and the loss by its name.

    Args:
      predicted, target: [...].
      weight: of each value, broadcast to [...].
      loss: as `regression` returns.
    """
    weight = jnp.broadcast_to(weight, predicted.shape)
    total = jnp.sum(weight)
    functions = {"mse": mse, "mae": mae} | dict([loss])
    return {name: (jnp.sum(function(predicted, target) * weight), total) for name, function in functions.items()}


def check_class_weights(weights: Sequence[float] | None, info: Mapping, key: str = "class_weights") -> tuple[float, ...] | None:
    """Return the weights of classes; ConfigError unless there is one of each class, none negative, and not all 0."""
    if weights is None:
        return None
    names = info.get("labels") or range(info["num_classes"])
    if len(weights) != info["num_classes"] or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        shown = ", ".join(map(str, names))
        raise ConfigError(f"config.task.{key}={tuple(weights)}: give a number of at least 0 for each of the {info['num_classes']} classes, {shown}.")
    return tuple(weights)


def with_class_weights(weight: jax.Array, target: jax.Array, weights: tuple[float, ...] | None) -> jax.Array:
    """Return the weights of examples [B], times those of their classes.

    Args:
      weight: [B].
      target: class ids, int [B], or probabilities, float [B, C].
      weights: of the classes; None for 1.
    """
    if weights is None:
        return weight
    of_class = jnp.asarray(weights, weight.dtype)
    return weight * (of_class[target] if target.ndim == 1 else target @ of_class)


def classification(loss: str, *, classes: int, gamma: float, label_smoothing: float = 0.0, mixed: bool = False) -> Callable:
    """Return the loss of a name: (logits, target, *, label_smoothing=0.0) -> values.

    Args:
      loss: a name in CLASSIFICATION, or `package.module:function`.
      classes: number of classes.
      gamma: of `focal`.
      label_smoothing: what it will be called with.
      mixed: whether targets are probabilities.

    Raises:
      ConfigError: there is no such loss; it does not have the signature of a classification loss.
    """
    function = _find(loss, CLASSIFICATION)
    if loss in CLASSIFICATION:
        return functools.partial(focal, gamma=gamma) if loss == "focal" else function
    logits, target = _float(2, classes), _float(2, classes) if mixed else jax.ShapeDtypeStruct((2,), jnp.int32)
    signature = f"(logits [..., C], target {'[..., C]' if mixed else 'int [...]'})"
    _check_function(loss, function, signature, logits, target)
    if "label_smoothing" in inspect.signature(function).parameters:
        return function
    if label_smoothing:
        raise ConfigError(f"config.task.label_smoothing={label_smoothing}: the loss {loss!r} has no argument label_smoothing.")
    return lambda logits, target, label_smoothing=0.0: function(logits, target)


def regression(loss: str, delta: float) -> tuple[str, Callable]:
    """Return the metric and the function (predicted, target) -> values of a loss. The metric of one's own function is `loss`.

    Args:
      loss: a name in REGRESSION, or `package.module:function`.
      delta: of `huber`.

    Raises:
      ConfigError: there is no such loss; it does not have the signature of a regression loss.
    """
    function = _find(loss, REGRESSION)
    if loss in REGRESSION:
        return loss, functools.partial(huber, delta=delta) if loss == "huber" else function
    _check_function(loss, function, "(predicted [...], target [...])", _float(2), _float(2))
    return "loss", function


def contrastive(loss: str) -> Callable:
    """Return the loss of a name: (one, other, *, temperature, valid) -> values.

    Args:
      loss: a name in CONTRASTIVE, or `package.module:function`.

    Raises:
      ConfigError: there is no such loss; it does not have the signature of a contrastive loss.
    """
    function = _find(loss, CONTRASTIVE)
    if loss not in CONTRASTIVE:
        called = functools.partial(function, temperature=0.1)
        signature = "(one [B, D], other [B, D], *, temperature, valid)"
        _check_function(loss, called, signature, _float(2, 4), _float(2, 4), valid=jax.ShapeDtypeStruct((2,), bool))
    return function


def _find(name: str, table: dict[str, Callable]) -> Callable:
    if name in table:
        return table[name]
    if ":" not in name:
        raise ConfigError(
            f"config.task.loss: there is no loss {name!r}.{config_lib.suggest(name, table)} There are: {', '.join(table)}; "
            "or give your own as 'package.module:function'."
        )
    return config_lib.find("task.loss", {}, name)


def _check_function(name: str, function: Callable, signature: str, *args, **kwargs) -> None:
    """Raise ConfigError unless the function returns one float for each of two examples."""
    try:
        result = jax.eval_shape(function, *args, **kwargs)
        fault = None if getattr(result, "shape", None) == (2,) and jnp.issubdtype(result.dtype, jnp.floating) else f"it returned {result}"
    except Exception as error:  # noqa: BLE001  whatever one's own function raises
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault is not None:
        raise ConfigError(f"config.task.loss: {name!r} must be a function {signature} that returns one float value for each example; {fault}.")


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def check(**options: float) -> None:
    """Raise ConfigError for an option of a loss that is out of range, named as in the `task` section."""
    smoothing = options.get("label_smoothing", 0.0)
    if not 0 <= smoothing < 1:
        raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {smoothing}.")
    if options.get("gamma", 0.0) < 0:
        raise ConfigError(f"config.task.gamma must not be negative, got {options['gamma']}.")
    for name in ("delta", "temperature"):
        if name in options and not options[name] > 0:
            raise ConfigError(f"config.task.{name} must be above 0, got {options[name]}.")
