"""Text from a language model."""

import jax
import jax.numpy as jnp


def sample(model, prompt: jax.Array, length: int, key: jax.Array, *, temperature: float = 1.0, window: int | None = None) -> jax.Array:
    """Draws `length` tokens after each prompt, one at a time, each from the model's distribution.

    The model reads the last `window` tokens anew for each one, so any model that maps tokens to logits will do.
    Traceable: shapes depend on the arguments' shapes, `length` and `window` alone.

    Args:
      model: maps int [B, T] to logits [B, T, V], those at t seeing tokens 0..t.
      prompt: int [B, P], P at least 1.
      length: tokens to draw.
      key: of the drawing.
      temperature: divides the logits; 0 takes the likeliest token.
      window: tokens that the model reads at most; its `context` if it has one, up to 256, else 128, unless given.

    Returns:
      int32 [B, length].
    """
    window = window or min(getattr(model, "context", 128), 256)
    batch, given = prompt.shape
    tokens = jnp.zeros((batch, given + length), jnp.int32).at[:, :given].set(prompt)
    window = min(window, tokens.shape[1])

    def step(position, tokens):
        # The window holds tokens up to position - 1; before it is full it starts at 0 and ends in tokens not drawn yet.
        start = jnp.maximum(position - window, 0)
        seen = jax.lax.dynamic_slice_in_dim(tokens, start, window, axis=1)
        logits = jnp.take(model(seen), position - 1 - start, axis=1).astype(jnp.float32)
        if temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(tokens, drawn[:, None].astype(jnp.int32), position, axis=1)

    return jax.lax.fori_loop(given, given + length, step, tokens)[:, given:]
