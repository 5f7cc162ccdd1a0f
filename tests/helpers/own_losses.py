"""Losses as a user writes them, named in configs as `own_losses:NAME`."""

import jax.numpy as jnp


def hinge(logits, target):
    """Multi-class hinge loss (Weston and Watkins 1999)."""
    true = jnp.take_along_axis(logits, target[..., None], axis=-1)
    return jnp.sum(jnp.maximum(0, 1 + logits - true), axis=-1) - 1


def log_cosh(predicted, target):
    """Logarithm of the hyperbolic cosine of the error."""
    return jnp.log(jnp.cosh(predicted - target))


def pull(one, other, *, temperature, valid):
    """Squared distance of partners; no negatives."""
    return jnp.sum((one - other) ** 2, axis=-1)


def mean_error(predicted, target):
    """A mistake: the mean over examples."""
    return jnp.mean(predicted - target)
