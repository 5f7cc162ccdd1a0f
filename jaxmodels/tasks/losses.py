"""Losses by name. Each takes what a model says and what is true, and gives one value for each example or position, which
the task sums up with weights. Whatever else is a keyword.

Shapes: B batch, T time, S length of a target, C classes, D width of an embedding; `...` any.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxmodels.errors import ConfigError


def mse(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of each value, shape [...]."""
    return optax.squared_error(predicted, target)


def mae(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Absolute error of each value, shape [...]."""
    return jnp.abs(predicted - target)


def huber(predicted: jax.Array, target: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Half the squared error up to `delta`, from there on linear with slope `delta` (Huber 1964), shape [...]."""
    return optax.huber_loss(predicted, target, delta=delta)


def cross_entropy(logits: jax.Array, target: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy in nats, shape [...].

    Args:
      logits: [..., C].
      target: class numbers, int [...], or probabilities, float [..., C].
      label_smoothing: probability taken from the target and spread evenly over all classes (Szegedy et al. 2016).
    """
    if target.ndim < logits.ndim:
        exact = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    else:
        exact = optax.softmax_cross_entropy(logits, target)
    if not label_smoothing:
        return exact
    # Cross-entropy with smoothed targets, without making them.
    return (1 - label_smoothing) * exact - label_smoothing * jnp.mean(jax.nn.log_softmax(logits), axis=-1)


def focal(logits: jax.Array, target: jax.Array, *, gamma: float = 2.0, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy times (1 - p) ** gamma, p being the probability of the target's class (Lin et al. 2017), over a softmax.

    What is right already counts less; gamma 0 is cross-entropy. Of a target that is a distribution, the mean over it.

    Args:
      logits: [..., C].
      target: class numbers, int [...], or probabilities, float [..., C].
      gamma: not negative.
      label_smoothing: as in `cross_entropy`.

    Returns:
      [...].
    """
    if target.ndim < logits.ndim:
        target = jax.nn.one_hot(target, logits.shape[-1])
    if label_smoothing:
        target = optax.smooth_labels(target, label_smoothing)
    logs = jax.nn.log_softmax(logits)
    # Above 0, where a power has a gradient.
    rest = jnp.maximum(-jnp.expm1(logs), jnp.finfo(logs.dtype).tiny)
    return -jnp.sum(target * rest**gamma * logs, axis=-1)


def ctc(logits: jax.Array, target: jax.Array, *, valid: jax.Array | None = None, blank: int = 0) -> jax.Array:
    """Connectionist temporal classification (Graves et al. 2006): -log of the probability of all alignments of each target.

    Args:
      logits: [B, T, C].
      target: int [B, S]: classes other than `blank`, then -1.
      valid: bool [B, T], False for frames that are padding, at the end; all are real unless given.
      blank: the class for no label.

    Returns:
      [B]; around 1e5 where a row has fewer frames than its target needs: one for each label, and one between equal ones.
    """
    padding = jnp.zeros(logits.shape[:2]) if valid is None else 1.0 - valid
    return optax.ctc_loss(logits, padding.astype(logits.dtype), jnp.maximum(target, 0), (target < 0).astype(logits.dtype), blank_id=blank)


def info_nce(one: jax.Array, other: jax.Array, *, temperature: float, valid: jax.Array | None = None) -> jax.Array:
    """Which of the batch's others belongs to one, and which of the ones to an other: the mean of both cross-entropies over
    cosines, InfoNCE (van den Oord et al. 2018) in both directions as in CLIP (Radford et al. 2021).

    Args:
      one, other: embeddings [B, D]; row i of one and row i of other are a pair.
      temperature: that cosines are divided by.
      valid: bool [B], rows that are real: others are nobody's negative.

    Returns:
      [B].
    """
    pair = jnp.arange(len(one))
    similar = cosines(one, other) / temperature
    allowed = True if valid is None else valid[None, :] | (pair[None, :] == pair[:, None])
    ways = (jnp.where(allowed, scores, -jnp.inf) for scores in (similar, similar.T))
    return sum(cross_entropy(scores, pair) for scores in ways) / 2


def nt_xent(one: jax.Array, other: jax.Array, *, temperature: float, valid: jax.Array | None = None) -> jax.Array:
    """Which of all 2B - 1 other embeddings belongs to each: cross-entropy over cosines, as in SimCLR (Chen et al. 2020).

    Args and returns: as `info_nce`; a pair's value is the mean of its two.
    """
    both = jnp.concatenate([one, other])
    B, real = len(one), jnp.ones(len(one), bool) if valid is None else valid
    itself = jnp.eye(2 * B, dtype=bool)
    partner = jnp.roll(itself, B, axis=1)
    allowed = (jnp.tile(real, 2)[None, :] | partner) & ~itself
    similar = jnp.where(allowed, cosines(both, both) / temperature, -jnp.inf)
    return cross_entropy(similar, (jnp.arange(2 * B) + B) % (2 * B)).reshape(2, B).mean(axis=0)


def cosines(one: jax.Array, other: jax.Array) -> jax.Array:
    """Of the angles between embeddings [B, D] and [B, D]: [B, B]."""

    def normalize(x):
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))

    return normalize(one) @ normalize(other).T


CLASSIFICATION = {"cross_entropy": cross_entropy, "focal": focal}
CONTRASTIVE = {"nt_xent": nt_xent, "info_nce": info_nce}
REGRESSION = {"mse": mse, "mae": mae, "huber": huber}


def errors(predicted: jax.Array, target: jax.Array, weight: jax.Array, *, loss: str = "mse", delta: float = 1.0) -> dict:
    """Metrics of a regression, as (sum, weight): `mse`, `mae`, and the loss by its name if it is another.

    Args:
      predicted, target: [...].
      weight: of each value, broadcast to [...].
      loss: a name in REGRESSION.
      delta: of `huber`.
    """
    weight = jnp.broadcast_to(weight, predicted.shape)
    total = jnp.sum(weight)
    values = {"mse": mse(predicted, target), "mae": mae(predicted, target)}
    if loss == "huber":
        values["huber"] = huber(predicted, target, delta=delta)
    return {name: (jnp.sum(value * weight), total) for name, value in values.items()}


def classification(loss: str, gamma: float):
    """The loss of that name in CLASSIFICATION as a function (logits, target, *, label_smoothing); `gamma` is that of `focal`."""
    return functools.partial(focal, gamma=gamma) if loss == "focal" else CLASSIFICATION[loss]


def check(**options: float) -> None:
    """Raises ConfigError for an option of a loss, by the name that a task's section has for it, that makes no sense."""
    smoothing = options.get("label_smoothing", 0.0)
    if not 0 <= smoothing < 1:
        raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {smoothing}.")
    if options.get("gamma", 0.0) < 0:
        raise ConfigError(f"config.task.gamma must not be negative, got {options['gamma']}.")
    for name in ("delta", "temperature"):
        if name in options and not options[name] > 0:
            raise ConfigError(f"config.task.{name} must be above 0, got {options[name]}.")
