"""Logits of a checkpoint computed layer by layer, so that the check needs no more memory than the conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlm import ops
from sidlm.models.config import SidConfig
from sidlm.models.convert.source import Checkpoint
from sidlm.nn.rotary import Positions, Rotary, inverse_frequencies

TOLERANCE = 1e-4
"""Largest difference of logits that counts as rounding, in multiples of the largest logit; all is computed in fp32."""
ROWS = 16_384
"""Rows of the output head in memory at once, as fp32."""


@dataclass(frozen=True, kw_only=True)
class LogitsCheck:
    """How far the logits of two checkpoints are apart on one prompt."""

    tokens: int
    difference: float
    """largest absolute difference"""
    largest: float
    """largest absolute logit of the source"""
    same_top: float
    """share of positions with the same likeliest token"""

    @property
    def ok(self) -> bool:
        """Whether the difference is rounding. NaN is none."""
        return self.difference <= TOLERANCE * max(self.largest, 1.0)

    def __str__(self) -> str:
        return (
            f"logits on {self.tokens} random tokens: largest difference {self.difference:.2e} "
            f"(largest logit {self.largest:.2f}), same likeliest token at {self.same_top:.0%}"
        )


def compare(source: Tensor, target: Tensor) -> LogitsCheck:
    """Logits (T, vocabulary) of the same tokens."""
    return LogitsCheck(
        tokens=len(source),
        difference=float((source - target).abs().max()),
        largest=float(source.abs().max()),
        same_top=float((source.argmax(-1) == target.argmax(-1)).float().mean()),
    )


def random_prompt(vocab_size: int, length: int, seed: int = 0) -> Tensor:
    """(1, length) token ids."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


class Layers:
    """A checkpoint's forward pass in fp32, one block in memory at a time.

    ids: (B, T), each row a document without padding. `hidden` (B, T, hidden_size) is what goes into the next block.
    """

    def __init__(self, checkpoint: Checkpoint, ids: Tensor) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.positions, self.masks = context(self.config, *ids.shape)
        self.hidden = checkpoint.read("model.embed_tokens.weight")[ids].float()

    def block(self, index: int) -> nn.Module:
        """A block with its weights as fp32."""
        return build_block(self.checkpoint, index)

    def through(self, block: nn.Module, index: int) -> Tensor:
        """What a block makes of `hidden`."""
        assert self.config.layer_types is not None
        return block(self.hidden, self.positions, mask=self.masks.get(self.config.layer_types[index]))

    def logits(self) -> Tensor:
        """(B, T, vocabulary) of the rest of the way through the final norm and the head."""
        norm = self.checkpoint.read("model.norm.weight").float()
        return head_logits(self.checkpoint, ops.rms_norm(self.hidden, norm, self.config.rms_norm_eps))


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits (T, vocabulary) in fp32 of one row of ids (1, T)."""
    layers = Layers(checkpoint, ids)
    for index in range(layers.config.num_hidden_layers):
        layers.hidden = layers.through(layers.block(index), index)
    return layers.logits()[0]


@torch.no_grad()
def text_loss(checkpoint: Checkpoint, ids: Tensor) -> float:
    """Mean loss in nats per token of rows of ids (B, T), of each row's tokens given those before."""
    layers = Layers(checkpoint, ids)
    for index in range(layers.config.num_hidden_layers):
        layers.hidden = layers.through(layers.block(index), index)
    total = 0.0
    for row, hidden in zip(ids, layers.hidden, strict=True):  # one row's logits at a time
        layers.hidden = hidden[None]
        total += float(F.cross_entropy(layers.logits()[0, :-1], row[1:]))
    return total / len(ids)


def context(config: SidConfig, rows: int, length: int) -> tuple[Positions, dict[str, ops.Mask]]:
    """Positions, and masks by layer type, of rows that are one document of this length each."""
    assert config.head_dim is not None and config.rope_parameters is not None and config.layer_types is not None
    rotates = config.simplicial_position == "rotation" and "simplicial_attention" in config.layer_types
    rotary = Rotary(config.head_dim, config.rope_parameters, three_chunks=rotates)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    masks = {kind: ops.attention_mask(length, length, window=window) for kind, window in windows.items()}
    return rotary(torch.arange(length)[None], rows), masks


def build_block(checkpoint: Checkpoint, index: int) -> nn.Module:
    """Block `index` of the model with the checkpoint's weights as fp32."""
    from sidlm.models.modeling import SidDecoderLayer, feed_forward, mixer

    config = checkpoint.config
    with torch.device("meta"):
        block = SidDecoderLayer(config.hidden_size, mixer(config, index), feed_forward(config), config.rms_norm_eps)
    prefix = f"model.layers.{index}."
    state = {name: checkpoint.read(prefix + name) for name in block.state_dict()}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    block.load_state_dict(state, assign=True)
    return block.eval()


def head_logits(checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
    """hidden (B, T, hidden_size) after the final norm -> (B, T, vocabulary)."""
    tied = checkpoint.config.tie_word_embeddings
    head = checkpoint.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    return torch.cat([F.linear(hidden, rows.float()) for rows in head.split(ROWS)], dim=-1)


@torch.no_grad()
def neighbour_logits(read: Callable[[str], Tensor], config: SidConfig, ids: Tensor) -> Tensor:
    """Logits (T, vocabulary) in fp32 of a plain Llama in Meta's own convention: the other end of a permutation.

    read: a tensor by Meta's name, rotary pairs neighbouring in wq and wk; key/value heads may be repeated there.
    """
    assert config.head_dim is not None and config.rope_parameters is not None
    dim = config.head_dim
    angles = torch.arange(ids.shape[1])[:, None].float() * inverse_frequencies(dim, config.rope_parameters)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)

    def heads(x: Tensor, name: str) -> Tensor:
        return F.linear(x, read(name).float()).unflatten(-1, (-1, dim))  # (T, heads, D)

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def normed(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * read(name).float()

    x = read("tok_embeddings.weight")[ids[0]].float()
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        y = normed(x, at + "attention_norm.weight")
        q, k = (rotated(heads(y, f"{at}attention.{w}.weight")) for w in ("wq", "wk"))
        v = heads(y, at + "attention.wv.weight")
        q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))  # (1, heads, T, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
        x = x + F.linear(out, read(at + "attention.wo.weight").float())
        y = normed(x, at + "ffn_norm.weight")
        gate, up = (F.linear(y, read(f"{at}feed_forward.{w}.weight").float()) for w in ("w1", "w3"))
        x = x + F.linear(F.silu(gate) * up, read(at + "feed_forward.w2.weight").float())
    head = read("tok_embeddings.weight" if config.tie_word_embeddings else "output.weight")
    y = normed(x, "norm.weight")
    return torch.cat([F.linear(y, rows.float()) for rows in head.split(ROWS)], dim=-1)
