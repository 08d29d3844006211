"""AdamW over a model's parameters, Muon for its matrices, and their state as plain named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sidlm.train.config import OptimConfig

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from sidlm.parallel.pipeline import Pipeline


class Together:
    """Several optimizers, each over parameters of its own, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


Optimizer = torch.optim.Optimizer | Together


def make_optimizer(model: nn.Module, cfg: OptimConfig, mesh: DeviceMesh | None = None) -> Optimizer:
    """The optimizer of a config. mesh: of `build_mesh`, over which `parallelize` has split the model; every process
    makes it then."""
    if cfg.name == "adamw":
        return make_adamw(model.named_parameters(), cfg)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = {name: p for name, p in trained if is_matrix(name, p)}
    rest = make_adamw([(name, p) for name, p in trained if name not in matrices], cfg)
    line = None
    if mesh is not None:
        from sidlm.parallel.mesh import stage_mesh

        line = stage_mesh(mesh).get_group()
    # a pipeline stage may be the embedding alone
    return Together([make_muon(matrices.items(), cfg, line), rest]) if matrices else rest


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix of a block that is no router."""
    return p.ndim == 2 and ".layers." in name and ".router." not in name


def make_muon(
    matrices: Iterable[tuple[str, Tensor]], cfg: OptimConfig, line: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) with the step size of AdamW (arXiv 2502.16982), its state created: torch's or, of
    matrices that are split over the processes of `line`, `ShardedMuon`."""
    groups: dict[bool, list[Tensor]] = {}
    for name, p in matrices:
        groups.setdefault(".down_proj" in name, []).append(p)
    settings = [{"params": ps, "lr_scale": cfg.down_proj_lr_scale if down else 1.0} for down, ps in groups.items()]
    if line is not None:
        from sidlm.train.muon import ShardedMuon

        return ShardedMuon(settings, line, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.muon_momentum)
    muon = torch.optim.Muon(
        settings, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for group in muon.param_groups:
        for p in group["params"]:
            muon.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}
    return muon


def make_adamw(named: Iterable[tuple[str, Tensor]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decay on the weights of >= 2 dimensions only, fused where torch has the fused kernel.

    The `lr_scale` of a group is `cfg.down_proj_lr_scale` for the feed-forward layers' last matrices,
    `cfg.embedding_lr_scale` for the embedding, 1 elsewhere.

    The state of every parameter is created here, at step 0, instead of on first use: a checkpoint then always holds
    the same names, also for experts that got no token yet.
    """
    groups: dict[tuple[bool, float, Any], list[Tensor]] = {}
    for name, p in named:
        if p.requires_grad:
            scale = cfg.down_proj_lr_scale if ".down_proj" in name else 1.0
            scale = cfg.embedding_lr_scale if name.endswith("embed_tokens.weight") else scale
            # a kernel over many tensors takes those of one mesh
            groups.setdefault((p.ndim >= 2, scale, getattr(p, "device_mesh", None)), []).append(p)
    trained = [p for group in groups.values() for p in group]
    fused = all(p.device.type in ("cpu", "cuda", "xpu") and p.is_floating_point() for p in trained)
    settings = [
        {
            "params": parameters,
            "weight_decay": cfg.weight_decay if matrix else 0.0,
            "lr_scale": scale,
        }
        for (matrix, scale, _), parameters in groups.items()
    ]
    optimizer = torch.optim.AdamW(settings, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused)
    for p in trained:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's own state tensors (not copies), named "<parameter>.<exp_avg|exp_avg_sq|step|momentum_buffer>"."""
    states = optimizer.state
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        if p.requires_grad
        for key, value in states[p].items()
    }


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Use `lr` from the next step on, times its `lr_scale` for a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, pipeline: Pipeline | None = None) -> Tensor:
    """Scale gradients in place to at most `max_norm` (0: leave them) and return their global L2 norm before, fp32.

    pipeline: of a model in stages, whose other parameters other processes have.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(getattr(p, "device_mesh", None), []).append(p)
    copies = set() if pipeline is None else pipeline.copies()
    norms = [_norm([p.grad for p in part if p.grad is not None and p not in copies]) for part in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)
    norm = norm if pipeline is None else pipeline.norm_of_all(norm)
    if max_norm > 0:
        for part in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    # of sharded gradients it is a DTensor, whose parts are to be added once
    full_tensor = getattr(norm, "full_tensor", None)
    if full_tensor is None:
        return norm
    whole, mesh = full_tensor(), norm.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    if "dp_replicate" in (mesh.mesh_dim_names or ()):
        # other processes added it up for each replica: what a replica scales by must not hang on their rounding
        whole = whole.nan_to_num(torch.inf)
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MAX, group=mesh.get_group("dp_replicate"))
    return whole
