"""One pre-norm transformer block."""

from typing import Any

from torch import Tensor, nn

from sidlm.nn.norm import RMSNorm
from sidlm.nn.rotary import Positions


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; parameter names are those of a Llama layer.

    mixer: a module called as ``mixer(x, positions, cache=, mask=, doc_ids=, impl=)``; mlp: one called as ``mlp(x)``.
    """

    def __init__(self, hidden_size: int, mixer: nn.Module, mlp: nn.Module, norm_eps: float = 1e-5):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = mixer
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        *,
        past_key_values: Any = None,
        sequence_shard: Any = None,
        mask: Any = None,
        doc_ids: Tensor | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """x: (B, T, hidden_size) -> the same shape. The other arguments go to the mixer as they are.

        sequence_shard: what takes the cache's place where rows are parts of longer sequences. It has a name of its own
        because transformers' activation checkpointing drops past_key_values.
        """
        passed = {
            "cache": past_key_values if sequence_shard is None else sequence_shard,
            "mask": mask,
            "doc_ids": doc_ids,
            "impl": impl,
        }
        x = x + self.self_attn(self.input_layernorm(x), positions, **passed)
        return x + self.mlp(self.post_attention_layernorm(x))
