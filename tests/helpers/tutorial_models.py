"""Modules as the Flax tutorials write them: layers keep random streams, and calls take no `rngs`."""

import jax.numpy as jnp
from flax import nnx


class TutorialCNN(nnx.Module):
    """A convolution with batch normalization and dropout; `rngs` is positional, and `dropout` is not keyword-only."""

    def __init__(self, image_shape, num_classes, rngs: nnx.Rngs, dropout: float = 0.1):
        self.conv = nnx.Conv(image_shape[-1], 8, kernel_size=(3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.linear = nnx.Linear(8 * image_shape[0] * image_shape[1] // 4, num_classes, rngs=rngs)

    def __call__(self, image):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(image))), window_shape=(2, 2), strides=(2, 2))
        return self.linear(self.dropout(x.reshape(x.shape[0], -1)))


class TutorialLM(nnx.Module):
    """Attention and an LSTM over a sequence, with dropout inside and outside of the attention."""

    def __init__(self, vocab_size: int, *, width: int = 16, dropout: float = 0.1, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, dropout_rate=dropout, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(width, width, rngs=rngs), rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.output = nnx.Linear(width, vocab_size, rngs=rngs)

    def __call__(self, tokens):
        tokens = jnp.maximum(tokens, 0)
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.output(self.dropout(self.rnn(x)))


class StacksDropout(nnx.Module):
    """Layers stacked with `nnx.vmap`, each with its own stream."""

    def __init__(self, image_shape, num_classes, *, rngs: nnx.Rngs):
        width = image_shape[0] * image_shape[1]
        self.layers = nnx.vmap(lambda rngs: nnx.Sequential(nnx.Linear(width, width, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))(rngs.split(3))
        self.output = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, image):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.relu(layer(x))

        return self.output(forward(image.reshape(image.shape[0], -1), self.layers))


class KeepsKey(nnx.Module):
    """Keeps a random key as a plain variable, which a checkpoint cannot hold."""

    def __init__(self, image_shape, num_classes, *, rngs: nnx.Rngs):
        self.noise = nnx.Variable(rngs.noise())
        self.output = nnx.Linear(image_shape[0] * image_shape[1], num_classes, rngs=rngs)

    def __call__(self, image):
        return self.output(image.reshape(image.shape[0], -1))
