"""Modules over sidlm.ops. Nothing here knows transformers or a config class: any fits another training stack."""

from sidlm.nn.attention import Attention
from sidlm.nn.block import Block
from sidlm.nn.convert import convert_squared_relu
from sidlm.nn.feed_forward import SquaredReLUFeedForward, SwiGLUFeedForward
from sidlm.nn.moe import MoEFeedForward
from sidlm.nn.norm import RMSNorm
from sidlm.nn.rotary import Positions, Rotary
from sidlm.nn.simplicial_attention import SimplicialAttention

__all__ = [
    "Attention",
    "Block",
    "MoEFeedForward",
    "Positions",
    "RMSNorm",
    "Rotary",
    "SimplicialAttention",
    "SquaredReLUFeedForward",
    "SwiGLUFeedForward",
    "convert_squared_relu",
]
