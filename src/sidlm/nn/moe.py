"""Mixture of experts: top-k routing without dropped tokens, balanced by a selection bias instead of a loss."""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sidlm.nn.feed_forward import FEED_FORWARDS

GATES = ("softmax", "sigmoid")


class MoEFeedForward(nn.Module):
    """Feed-forward experts, of which each token runs ``top_k`` and every shared one.

    kind: "swiglu" or "squared_relu", for each expert. intermediate_size: width of one expert.
    gate: "softmax" or "sigmoid" of the router's logits; the chosen gates are normalised to sum to one.
    shared_experts: that many experts' width runs for every token as one dense layer.

    Balance (auxiliary-loss-free, Wang et al. 2024; DeepSeek-V3, section 2.1.2): ``balance_bias`` is added to the gates
    only to choose experts, never to weigh them; ``update_balance`` moves it after an optimizer step.
    No token is dropped and no capacity exists, so a token's output does not depend on its batch.
    """

    balance_bias: Tensor
    expert_counts: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        kind: str = "swiglu",
        gate: str = "softmax",
        shared_experts: int = 0,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"num_experts_per_tok must be in 1..{num_experts} (num_local_experts), got {top_k}")
        if gate not in GATES:
            raise ValueError(f"moe_gate must be one of {GATES}, got {gate!r}")
        if kind not in FEED_FORWARDS:
            raise ValueError(f"mlp_type must be one of {tuple(FEED_FORWARDS)}, got {kind!r}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = gate
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        # stacked (E, out, in), each slice laid out as an nn.Linear weight
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.gate_proj = None
        if kind == "swiglu":
            self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.shared_expert = None
        if shared_experts:
            self.shared_expert = FEED_FORWARDS[kind](hidden_size, shared_experts * intermediate_size)
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("expert_counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, down_std: float | None = None) -> None:
        """Normal init of the stacked weights; the router and the shared expert keep their own."""
        for weight in (self.up_proj, self.gate_proj):
            if weight is not None:
                nn.init.normal_(weight, std=std)
        nn.init.normal_(self.down_proj, std=std if down_std is None else down_std)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., hidden_size) -> the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(flat)
        # sort the (token, expert) pairs by expert, so that each expert is one contiguous block of rows
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
        if self.training:
            with torch.no_grad():
                self.expert_counts += counts
        out = self.run_experts(flat[order // self.top_k], counts)
        # gather back instead of scatter-add: deterministic on every device
        out = out[order.argsort()].view(*x.shape[:-1], self.top_k, x.shape[-1])
        # a sum in the shape of x, no view of one: FSDP would warn of it
        out = (out * weights.view(*x.shape[:-1], self.top_k, 1).to(out.dtype)).sum(dim=-2)
        if self.shared_expert is not None:
            out = out + self.shared_expert(flat).view_as(x)
        return out.to(x.dtype)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(N, hidden_size) -> gates (N, top_k), at least float32 and summing to one, and expert indices (N, top_k)."""
        # a bf16 router flips near-ties between experts, so autocast stays out of it
        with torch.autocast(flat.device.type, enabled=False):
            dtype = torch.promote_types(flat.dtype, torch.float32)
            logits = F.linear(flat.to(dtype), self.router.weight.to(dtype))
        scores = logits.softmax(dim=-1) if self.gate == "softmax" else logits.sigmoid()
        experts = (scores.detach() + self.balance_bias).topk(self.top_k, dim=-1).indices
        chosen = scores.gather(-1, experts)
        return chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(1e-20), experts

    def run_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (M, hidden_size) sorted by expert, counts (E,) rows of each -> (M, hidden_size)."""
        return feed_experts(rows, counts, self.up_proj, self.down_proj, self.gate_proj)

    @torch.no_grad()
    def update_balance(self, rate: float, group: dist.ProcessGroup | None = None) -> None:
        """Move each expert's selection bias by ``rate`` against its load since the last call, then forget the load.

        Call it once after each optimizer step, on every process of ``group`` (default: all of them): the loads are
        summed over it. Activation checkpointing counts the recomputed tokens again, for every expert alike.
        """
        counts = self.expert_counts
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=group)
        load = counts.to(torch.float32)
        self.balance_bias += rate * torch.sign(load.mean() - load).to(self.balance_bias.dtype)
        counts.zero_()


def feed_experts(
    rows: Tensor, counts: Tensor, up_proj: Tensor, down_proj: Tensor, gate_proj: Tensor | None = None
) -> Tensor:
    """Rows (M, hidden_size) sorted by expert, counts (E,) rows of each, stacked weights -> (M, hidden_size)."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
    # torch's grouped GEMM wants rows of whole 16-byte words
    aligned = all(size * rows.element_size() % 16 == 0 for size in up_proj.shape[1:])
    multiply = matmul_grouped if aligned and grouped_mm_works(device, rows.dtype) else matmul_loop
    up = multiply(rows, up_proj, counts)
    if gate_proj is None:
        return multiply(F.relu(up).square(), down_proj, counts)
    return multiply(F.silu(multiply(rows, gate_proj, counts)) * up, down_proj, counts)


def matmul_loop(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (M, in) sorted by expert, weight (E, out, in), counts (E,) -> (M, out): one product for each expert."""
    blocks = rows.split(counts.tolist())
    return torch.cat([F.linear(block, w.to(rows.dtype)) for block, w in zip(blocks, weight, strict=True)])


def matmul_grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same in one call of torch's grouped GEMM."""
    ends = counts.cumsum(0).to(torch.int32)
    return _grouped_mm(rows.contiguous(), weight.to(rows.dtype).transpose(-2, -1), ends)


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows, weight, offs=ends)
    return torch._grouped_mm(rows, weight, offs=ends)


@torch.compiler.assume_constant_result
@functools.cache
def grouped_mm_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch has a grouped GEMM, forward and backward, for the device type and dtype."""
    if not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        return False
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        rows = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
        try:
            out = matmul_grouped(rows, weight, torch.tensor([16, 0], device=device))
            out.backward(torch.ones_like(out))
        except (RuntimeError, NotImplementedError):
            return False  # torch raises one or the other for a dtype or architecture it has no kernel for
    return True
