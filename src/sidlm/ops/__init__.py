"""Pure functions on tensors. Nothing here knows a model or a config."""

from sidlm.ops.attention.api import IMPLEMENTATIONS as _ATTENTION
from sidlm.ops.attention.api import Mask, attention, attention_mask
from sidlm.ops.loss.linear_cross_entropy import linear_cross_entropy
from sidlm.ops.norm import rms_norm
from sidlm.ops.rope import apply_rope, apply_rope3, rope3_frequencies, rope_cos_sin, rope_frequencies
from sidlm.ops.simplicial.api import IMPLEMENTATIONS as _SIMPLICIAL
from sidlm.ops.simplicial.api import two_simplicial_attention

IMPLEMENTATIONS = {"simplicial": _SIMPLICIAL, "attention": _ATTENTION}
"""Op -> its implementations in order of preference; see :mod:`sidlm.ops.dispatch`."""

__all__ = [
    "IMPLEMENTATIONS",
    "Mask",
    "apply_rope",
    "apply_rope3",
    "attention",
    "attention_mask",
    "linear_cross_entropy",
    "rms_norm",
    "rope3_frequencies",
    "rope_cos_sin",
    "rope_frequencies",
    "two_simplicial_attention",
]
