"""A model of your own: a Flax NNX module. Its positional parameters come from the task; the others are keys of the section `model`."""

from flax import nnx


class Mlp(nnx.Module):
    """A network with one hidden layer and dropout, written as in Flax's tutorials."""

    def __init__(self, image_shape, num_classes, hidden: int = 32, rate: float = 0.1, *, rngs: nnx.Rngs):
        """
        Args:
          hidden: width of the hidden layer.
          rate: share of hidden units that dropout sets to 0.
        """
        height, width, channels = image_shape
        self.hidden = nnx.Linear(height * width * channels, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.output = nnx.Linear(hidden, num_classes, rngs=rngs)

    def __call__(self, image):
        x = nnx.relu(self.hidden(image.reshape(image.shape[0], -1)))
        return self.output(self.dropout(x))
