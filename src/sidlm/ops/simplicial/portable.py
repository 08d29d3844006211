"""2-simplicial attention by the portable Triton kernels: any GPU that Triton knows, and its interpreter."""

from sidlm.ops.simplicial.triton_backward import backward, plan_delta
from sidlm.ops.simplicial.triton_forward import forward

__all__ = ["backward", "forward", "plan_delta"]
