"""Recurrent encoders, and encoder–decoders with attention.

Tokens of -1 are padding, at any position: they do not change states, and are excluded from pooling and attention.

Shapes: B batch, T time, S time of the source, E width of the embedding, H width of a layer, V vocabulary.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Embed, Linear, check_rate, check_sizes, dropout
from jaxmodels.models.rnn import Recurrent

SIZES = {
    "lstm_encoder": {"cell": "lstm"},
    "gru_encoder": {"cell": "gru"},
    "lstm_seq2seq": {"cell": "lstm"},
    "gru_seq2seq": {"cell": "gru"},
}

POOLS = ("max", "mean", "last", "attention")


class Head(nnx.Module):
    """From the outputs of an encoder to a task's output: at every token, or pooled to one for the sequence."""

    def __init__(self, kind: str, width_in: int, width_out: int, *, pool: str, rngs: nnx.Rngs):
        self.pool = pool if kind in ("class", "value") else None
        # Scores of tokens, for pooling by attention with one learned query (Yang et al. 2016, without their hidden layer).
        self.score = Linear(width_in, 1, use_bias=False, rngs=rngs) if self.pool == "attention" else None
        self.output = Linear(width_in, width_out, rngs=rngs)

    def __call__(self, x, last, valid, rate: float, rngs: nnx.Rngs | None):
        """x: [B, T, W], zero at padding; last: [B, W], the last states of the layer; valid: bool [B, T]."""
        if self.pool is not None:
            x = _pool(self.pool, x, last, valid, self.score)
        return self.output(dropout(x, rate, rngs))


def _pool(pool: str, x, last, valid, score):
    """Pool over real tokens, [B, W]. A row without tokens gives zero."""
    real = valid[:, :, None]
    if pool == "last":
        return last
    if pool == "mean":
        return jnp.sum(x, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1).astype(x.dtype)
    if pool == "max":
        lowest = jnp.finfo(x.dtype).min
        return jnp.where(real.any(axis=1), jnp.max(jnp.where(real, x, lowest), axis=1), 0)
    weights = _softmax(score(x)[:, :, 0], valid)
    return jnp.sum(x * weights[:, :, None], axis=1)


def _softmax(scores, valid):
    """Return the softmax over the last axis in float32, restricted to valid positions. Others are zero, as are rows without a valid position."""
    scores = jnp.where(valid, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return (jax.nn.softmax(scores, axis=-1) * valid).astype(jnp.float32)


class RecurrentEncoder(nnx.Module):
    """An embedding, LSTM or GRU layers in both directions, and a head: classifies, scores or tags a sequence.

    Heads: ("class", C) and ("value", 1) pool the sequence; ("tags", K) and ("tokens", V) return logits at every token.
    """

    def __init__(
        self,
        vocab_size: int,
        head: tuple[str, int],
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        layers: int = 1,
        width: int = 128,
        embedding: int | None = None,
        bidirectional: bool = True,
        pool: Literal["max", "mean", "last", "attention"] = "max",
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        kernel: Literal["xla", "cudnn"] = "xla",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding.
          head: kind and size of the output; see above.
          cell: `lstm` or `gru`.
          layers: number of layers.
          width: H, of each direction.
          embedding: E. The default is `width`.
          bidirectional: whether layers have a backward direction.
          pool: how a sequence becomes one vector: the largest or the mean value over tokens, the last states (of both
            directions), or a mean weighted by attention. For heads of one output.
          dropout: rate on the embedding, between layers, and before the head.
          word_dropout: rate at which the embeddings of whole tokens are set to zero.
          kernel: `xla`, or `cudnn`, NVIDIA's fused one, for LSTMs in float32 on a GPU with padding at the ends of rows;
            the parameters are the same.
          unroll: time steps per iteration of the compiled loop; more steps compile slower, and run slower on CPUs.
          rngs: draws the initial parameters from its `params` stream.
        """
        kind, width_out = head
        if kind not in ("class", "value", "tags", "tokens"):
            raise ValueError(f"a head must be one of class, value, tags, tokens; got {kind!r}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}")
        check_rate(word_dropout)
        embedding = width if embedding is None else embedding
        check_sizes(embedding=embedding)
        self.embed = Embed(vocab_size, embedding, init=nnx.initializers.normal(0.1), rngs=rngs)
        self.encoder = Recurrent(
            embedding,
            width,
            cell=cell,
            layers=layers,
            bidirectional=bidirectional,
            dropout=dropout,
            kernel=kernel,
            unroll=unroll,
            rngs=rngs,
        )
        self.head = Head(kind, self.encoder.width_out, width_out, pool=pool, rngs=rngs)
        self.dropout, self.word_dropout = dropout, word_dropout

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """tokens: int [B, T], -1 is padding. Return the output of the head: [B, C], [B, 1], [B, T, K] or [B, T, V]."""
        valid = tokens >= 0
        x = dropout(_embed(self.embed, tokens, self.word_dropout, rngs), self.dropout, rngs)
        x, states = self.encoder(x, valid=valid, rngs=rngs)
        return self.head(x, _hidden(states[-1]), valid, self.dropout, rngs)


def _embed(embed: Embed, tokens, word_dropout: float, rngs):
    """Return embeddings [B, T, E], with whole tokens dropped in training."""
    x = embed(tokens)
    if rngs is None or word_dropout == 0.0:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1.0 - word_dropout, tokens.shape)
    return jnp.where(keep[:, :, None], x, 0)


def _hidden(states):
    """Return the hidden states of a layer's directions, concatenated, [B, H or 2H]; an LSTM's state is (hidden, cell)."""
    return jnp.concatenate([state[0] if isinstance(state, tuple) else state for state in states], axis=-1)


class RecurrentSeq2Seq(nnx.Module):
    """An encoder in both directions and a decoder with attention to it (Luong et al. 2015, "global", "general").

    The decoder's layers run over the target first. Then each position attends to the source with its output h and weights
    softmax(h W s) over the source's outputs s, and the logits are computed from tanh(W [context; h]). Without Luong's input feeding all
    positions attend at once. Each layer of the decoder starts from the last states of the encoder's layer, with both directions mapped to
    one.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        layers: int = 1,
        width: int = 128,
        embedding: int | None = None,
        dropout: float = 0.0,
        kernel: Literal["xla", "cudnn"] = "xla",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, of source and target.
          cell: `lstm` or `gru`.
          layers: of the encoder, and of the decoder.
          width: H, of the decoder, and of each direction of the encoder.
          embedding: E, of one table for source and target. The default is `width`.
          dropout: rate on embeddings, between layers, and before the logits.
          kernel: `xla`, or `cudnn`, NVIDIA's fused one, for LSTMs in float32 on a GPU with padding at the ends of rows.
          unroll: time steps per iteration of the compiled loop; more steps compile slower, and run slower on CPUs.
          rngs: draws the initial parameters from its `params` stream.
        """
        embedding = width if embedding is None else embedding
        check_sizes(embedding=embedding)
        options = {"cell": cell, "layers": layers, "dropout": dropout, "kernel": kernel, "unroll": unroll, "rngs": rngs}
        # Unit variance: with embeddings of deviation 0.1 the same training takes several times as long.
        self.embed = Embed(vocab_size, embedding, init=nnx.initializers.normal(1.0), rngs=rngs)
        self.encoder = Recurrent(embedding, width, bidirectional=True, **options)
        self.decoder = Recurrent(embedding, width, **options)
        parts = 2 if cell == "lstm" else 1  # hidden and cell
        self.bridges = nnx.List([Linear(2 * width, width, rngs=rngs) for _ in range(layers * parts)])
        self.score = Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.combine = Linear(3 * width, width, rngs=rngs)
        self.output = Linear(width, vocab_size, rngs=rngs)
        self.dropout = dropout

    def __call__(self, source: jax.Array, target: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """source: int [B, S]; target: int [B, T]; -1 is padding. Return logits [B, T, V]; those at t see target 0..t."""
        return self.decode(target, self.encode(source, rngs=rngs), rngs=rngs)

    def encode(self, source: jax.Array, rngs: nnx.Rngs | None = None) -> dict:
        """Return the decoder's memory of a source, int [B, S]: arrays with B rows."""
        valid = source >= 0
        x = dropout(self.embed(source), self.dropout, rngs)
        outputs, states = self.encoder(x, valid=valid, rngs=rngs)
        flat = []
        for forward, backward in states:
            pairs = zip(forward, backward, strict=True) if isinstance(forward, tuple) else [(forward, backward)]
            flat += [jnp.concatenate(pair, axis=-1) for pair in pairs]
        states = tuple(jnp.tanh(bridge(x)) for bridge, x in zip(self.bridges, flat, strict=True))
        return {"outputs": outputs, "valid": valid, "states": states}

    def decode(self, target: jax.Array, memory: dict, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return logits [B, T, V] after each token of target, int [B, T], given the memory of `encode`."""
        logits, _ = self.decode_from(target, memory, memory["states"], rngs=rngs)
        return logits

    def make_cache(self, source: jax.Array, length: int) -> dict:
        """Return the initial cache of the decoder for a source, int [B, S]; see `models.cache`."""
        memory = self.encode(source)
        states = memory.pop("states")
        return {"memory": memory, "states": states}

    def extend(self, tokens: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """Read one more token of each target, int [B], with -1 for rows that have ended. Return the next logits [B, V] and the cache."""
        logits, states = self.decode_from(tokens[:, None], cache["memory"], cache["states"])
        return logits[:, 0], cache | {"states": states}

    def decode_from(self, target: jax.Array, memory: dict, states: tuple, rngs: nnx.Rngs | None = None):
        """Continue `decode` from the decoder's states (flat, as in the memory). Return logits and the new states."""
        parts = len(self.bridges) // len(self.decoder.forward)
        layers = [states[i : i + parts] for i in range(0, len(states), parts)]
        x = dropout(self.embed(target), self.dropout, rngs)
        h_BTH, after = self.decoder(x, tuple((s if parts == 2 else s[0],) for s in layers), valid=target >= 0, rngs=rngs)
        scores_BTS = jnp.einsum("btw,bsw->bts", self.score(h_BTH), memory["outputs"])
        weights_BTS = _softmax(scores_BTS, memory["valid"][:, None, :]).astype(h_BTH.dtype)
        context_BTW = jnp.einsum("bts,bsw->btw", weights_BTS, memory["outputs"])
        attended = jnp.tanh(self.combine(jnp.concatenate([context_BTW, h_BTH], axis=-1)))
        return self.output(dropout(attended, self.dropout, rngs)), tuple(jax.tree.leaves(after))
