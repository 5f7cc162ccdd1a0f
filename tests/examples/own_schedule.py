"""A schedule of your own: a function of the peak learning rate and the length of the run. Its other parameters are keys of `optimizer.schedule`."""

import optax


def triangle(learning_rate, steps, start: float = 0.1):
    """Rise linearly to the peak in the middle of the run, and fall back.

    Args:
      start: share of the peak at both ends.
    """
    low, half = learning_rate * start, steps // 2
    return optax.join_schedules([optax.linear_schedule(low, learning_rate, half), optax.linear_schedule(learning_rate, low, steps - half)], [half])
