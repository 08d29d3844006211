"""Pure functions on tensors. Nothing here knows a model or a config."""

from sidlm.ops.attention.api import IMPLEMENTATIONS as _ATTENTION
from sidlm.ops.attention.api import Mask, attention, attention_mask
from sidlm.ops.loss.linear_cross_entropy import linear_cross_entropy
from sidlm.ops.norm import rms_norm
from sidlm.ops.rope import (
    apply_rope,
    apply_rope3,
    llama3_frequencies,
    rope3_frequencies,
    rope_cos_sin,
    rope_frequencies,
)
from sidlm.ops.simplicial.api import IMPLEMENTATIONS as _SIMPLICIAL
from sidlm.ops.simplicial.api import two_simplicial_attention
from sidlm.ops.simplicial.decode import IMPLEMENTATIONS as _DECODE
from sidlm.ops.simplicial.decode import two_simplicial_decode
from sidlm.ops.simplicial.varlen import (
    halo_sizes,
    two_simplicial_attention_halo,
    two_simplicial_attention_varlen,
)
from sidlm.ops.sparse24.api import IMPLEMENTATIONS as _SQUARED_RELU_FFN
from sidlm.ops.sparse24.api import squared_relu_ffn
from sidlm.ops.sparse24.select import select_2to4

IMPLEMENTATIONS = {
    "simplicial": _SIMPLICIAL,
    "simplicial_decode": _DECODE,
    "attention": _ATTENTION,
    "squared_relu_ffn": _SQUARED_RELU_FFN,
}
"""Op -> its implementations in order of preference; see :mod:`sidlm.ops.dispatch`."""

__all__ = [
    "IMPLEMENTATIONS",
    "Mask",
    "apply_rope",
    "apply_rope3",
    "attention",
    "attention_mask",
    "halo_sizes",
    "linear_cross_entropy",
    "llama3_frequencies",
    "rms_norm",
    "rope3_frequencies",
    "rope_cos_sin",
    "rope_frequencies",
    "select_2to4",
    "squared_relu_ffn",
    "two_simplicial_attention",
    "two_simplicial_attention_halo",
    "two_simplicial_attention_varlen",
    "two_simplicial_decode",
]
