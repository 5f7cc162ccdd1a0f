"""An optimizer of your own: a function that takes the schedule as `learning_rate`. Its other parameters are keys of the section `optimizer`."""

import optax


def signed_momentum(learning_rate, momentum: float = 0.9):
    """The sign of the averaged gradient (Bernstein et al. 2018).

    Args:
      momentum: decay of the average.
    """
    return optax.chain(optax.trace(momentum), optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate))
