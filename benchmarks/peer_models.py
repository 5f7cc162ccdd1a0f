"""The models of `peers.py` in PyTorch, as its users write them, and the copy of a jaxmodels model's weights into them.

Modules have the names of ours, so one rule copies most weights. Shapes: B batch, T time, D width.
"""

import torch
from torch import nn
from torch.nn import functional as F


class CNN(nn.Module):
    """`models/cnn.py` for images of 28×28×1, given as [B, 1, 28, 28]."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)])
        self.hidden = nn.Linear(7 * 7 * 64, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x):
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))

    @staticmethod
    def convert(tensors):
        weight = tensors["hidden.weight"].unflatten(1, (7, 7, 64))  # our images are [H, W, C], those of PyTorch [C, H, W]
        tensors["hidden.weight"] = weight.permute(0, 3, 1, 2).flatten(1)


class ConvNorm(nn.Module):
    """A convolution without bias, and batch normalization."""

    def __init__(self, channels, features, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x):
        return self.norm(self.conv(x))


class Basic(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, channels, features, stride):
        super().__init__()
        self.first = ConvNorm(channels, features, 3, stride)
        self.second = ConvNorm(features, features, 3)
        self.shortcut = ConvNorm(channels, features, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = self.second(F.relu(self.first(x), inplace=True))
        return F.relu(y.add_(x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ResNet18(nn.Module):
    """`models/resnet.py` with the stem for small images, [B, 3, 32, 32]."""

    def __init__(self):
        super().__init__()
        self.first = ConvNorm(3, 64, 3)
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.ModuleList([Basic(before, after, 1 if before == after else 2) for before, after in zip(widths, widths[1:], strict=False)])
        self.output = nn.Linear(512, 10)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        for block in self.blocks:
            x = block(x)
        return self.output(x.mean((2, 3)))


class LSTM(nn.Module):
    """`models/rnn.py`: two layers of width 256, a vocabulary of 65."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(65, 256)
        self.lstm = nn.LSTM(256, 256, num_layers=2, batch_first=True)
        self.output = nn.Linear(256, 65)

    def forward(self, tokens):
        return self.output(self.lstm(self.embed(tokens))[0])

    @staticmethod
    def convert(tensors):
        """Both have the gates in the order input, forget, cell, output. PyTorch adds a second bias; see `load`."""
        for i in range(2):
            tensors[f"lstm.weight_ih_l{i}"] = tensors.pop(f"layers.{i}.input.weight")
            tensors[f"lstm.bias_ih_l{i}"] = tensors.pop(f"layers.{i}.input.bias")
            tensors[f"lstm.weight_hh_l{i}"] = tensors.pop(f"layers.{i}.recurrent").T


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, and the fused kernel."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x_BTD):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A Transformer block: GPT-2's (`causal`, GELU by tanh), ViT's, or BERT's (`post_norm`)."""

    def __init__(self, width, heads, *, causal=False, post_norm=False, epsilon):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
        self.gelu, self.post_norm = "tanh" if causal else "none", post_norm

    def forward(self, x_BTD):
        if self.post_norm:
            x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD))
            return self.mlp_norm(x_BTD + self.feed_forward(x_BTD))
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.feed_forward(self.mlp_norm(x_BTD))

    def feed_forward(self, x_BTD):
        return self.mlp["down"](F.gelu(self.mlp["up"](x_BTD), approximate=self.gelu))


def blocks(layers, width, heads, **options):
    """Return a sequence of blocks."""
    return nn.Sequential(*[Block(width, heads, **options) for _ in range(layers)])


class GPT(nn.Module):
    """`models/transformer.py` with its defaults, those of GPT-2; a vocabulary of 65."""

    def __init__(self, layers, heads, width, context):
        super().__init__()
        self.embed, self.positions = nn.Embedding(65, width), nn.Embedding(context, width)
        self.blocks = blocks(layers, width, heads, causal=True, epsilon=1e-5)
        self.final_norm = nn.LayerNorm(width, 1e-5)

    def forward(self, tokens):
        x_BTD = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return F.linear(self.final_norm(self.blocks(x_BTD)), self.embed.weight)


class ViT(nn.Module):
    """`models/vit.py` as ViT-Ti/16, for images of 64×64×3, given as [B, 3, 64, 64]."""

    def __init__(self, layers=12, heads=3, width=192):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(17, width))
        self.blocks = blocks(layers, width, heads, epsilon=1e-6)
        self.norm, self.output = nn.LayerNorm(width, 1e-6), nn.Linear(width, 10)

    def forward(self, x):
        x_BTD = self.patches(x).flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.token.expand(len(x_BTD), -1, -1), x_BTD], dim=1) + self.positions
        return self.output(self.norm(self.blocks(x_BTD))[:, 0])

    @staticmethod
    def convert(tensors):
        tensors["patches.weight"] = tensors["patches.weight"].unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)


class BERT(nn.Module):
    """`models/encoder.py` as BERT-base with a head for two classes."""

    def __init__(self, layers=12, heads=12, width=768):
        super().__init__()
        self.embed, self.positions, self.types = nn.Embedding(30522, width), nn.Embedding(512, width), nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, 1e-12)
        self.blocks = blocks(layers, width, heads, post_norm=True, epsilon=1e-12)
        self.head = nn.ModuleDict({"dense": nn.Linear(width, width), "output": nn.Linear(width, 2)})

    def forward(self, tokens):
        x_BTD = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1])) + self.types(torch.zeros_like(tokens))
        x_BTD = self.blocks(self.embedding_norm(x_BTD))
        return self.head["output"](torch.tanh(self.head["dense"](x_BTD[:, 0])))


MODELS = {
    "cnn": CNN,
    "cnn_256": CNN,
    "lstm": LSTM,
    "nanogpt": lambda: GPT(4, 4, 128, 64),
    "gpt": lambda: GPT(6, 6, 384, 256),
    "resnet18": ResNet18,
    "vit_ti": ViT,
    "bert": BERT,
}


def load(model: nn.Module, arrays) -> None:
    """Copy the parameters of a jaxmodels model.

    Args:
      model: of `MODELS`.
      arrays: path, such as `blocks/0/mlp/up/kernel` -> float32 array; every parameter of the model.

    Raises:
      KeyError, RuntimeError: the parameters or their shapes differ.
    """
    tensors = {}
    for path in arrays:
        *module, kind = path.split("/")
        tensor = torch.from_numpy(arrays[path])
        if kind == "kernel":  # ours are [in, out] and [height, width, in, out]
            tensor = tensor.T if tensor.ndim == 2 else tensor.permute(3, 2, 0, 1)
        tensors[".".join([*module, "weight" if kind in ("kernel", "scale", "embedding") else kind])] = tensor
    for name in [name for name in tensors if ".attention.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "qkv")] = torch.cat(parts)
    if hasattr(model, "convert"):
        model.convert(tensors)
    # The second biases of an LSTM are not trained. With two, the optimizer would move their sum twice as far as our one.
    second = {name: parameter for name, parameter in model.named_parameters() if ".bias_hh_" in name}
    for name, parameter in second.items():
        parameter.requires_grad_(False)
        tensors[name] = torch.zeros_like(parameter)
    wrong = set(tensors) ^ {name for name, _ in model.named_parameters()}
    if wrong:
        raise KeyError(f"only one of the two models has {', '.join(sorted(wrong))}")
    model.load_state_dict(tensors, strict=False)  # buffers, the running statistics, keep their initial values
