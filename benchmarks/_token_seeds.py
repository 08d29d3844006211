"""Several seeds of one run as one model: small models fill a GPU only together.

Where the weights of S models lie in one tensor (S, ...), their rows in one batch (S * B, T) and only linear layers,
norms and embeddings know of S, every kernel works for all seeds at once. Attention has no weights and sees more rows.
Each seed's loss, gradient, clipping and steps are its own: what comes out is what `sid train` computes for each of
them where no row holds two documents (tests/benchmarks/test_token_study.py), with its schedule of a constant rate and a
linear decay to zero. Nothing is compiled: runs of a minute would spend most of it on that; on CUDA a whole step is one
graph (`_token_graph.py`).

One seed alone keeps its own modules: 2:4 sparsity takes plain linear layers only.

Decays to several lengths branch off one run of the constant rate (Hagele et al. 2024, arXiv 2405.18392), so that four
lengths cost little more than the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _token_graph import Captured
from torch import Tensor, nn
from torch.nn import functional as F

from sidlm.nn.norm import RMSNorm
from sidlm.train import hardware, sparsity
from sidlm.train.config import OptimConfig, RunConfig
from sidlm.train.optim import is_matrix
from sidlm.train.schedule import learning_rate


class SeedLinear(nn.Module):
    """S bias-free linear layers: rows (S * B, ..., in) -> (S * B, ..., out)."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        seeds, out, into = self.weight.shape
        y = torch.bmm(x.reshape(seeds, -1, into), self.weight.transpose(1, 2))
        return y.view(*x.shape[:-1], out)


class SeedNorm(nn.Module):
    """S RMS norms over the last dimension."""

    def __init__(self, layers: Sequence[RMSNorm]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.eps = layers[0].eps

    def forward(self, x: Tensor) -> Tensor:
        seeds, dim = self.weight.shape
        y = F.rms_norm(x, (dim,), None, self.eps).view(seeds, -1, dim)
        return (y * self.weight[:, None].to(x.dtype)).view(x.shape)


class SeedEmbedding(nn.Module):
    """S embeddings: ids (S * B, T) -> (S * B, T, d)."""

    def __init__(self, layers: Sequence[nn.Embedding]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))

    def forward(self, ids: Tensor) -> Tensor:
        seeds, size, dim = self.weight.shape
        first = size * torch.arange(seeds, device=ids.device)
        flat = (ids.reshape(seeds, -1) + first[:, None]).view(ids.shape)
        return F.embedding(flat, self.weight.view(-1, dim))


Rows = Callable[[int], tuple[Tensor, Tensor]]
TOGETHER: dict[type, type] = {nn.Linear: SeedLinear, RMSNorm: SeedNorm, nn.Embedding: SeedEmbedding}


def together(models: Sequence[Any]) -> Any:
    """The models as one whose weights have a first dimension of seeds; the first is changed in place, or left alone."""
    if len(models) == 1:
        return models[0]
    every = [dict(model.named_modules()) for model in models]
    for name, module in list(models[0].named_modules()):
        if type(module) in TOGETHER:
            parent, _, last = name.rpartition(".")
            setattr(every[0][parent], last, TOGETHER[type(module)]([modules[name] for modules in every]))
    return models[0]


def by_seed(p: Tensor, seeds: int) -> Tensor:
    """(S, ...) of a parameter or gradient, whether it has a dimension of seeds (S > 1) or not."""
    return p if seeds > 1 else p[None]


class SeedMuon:
    """torch.optim.Muon (match_rms_adamw) over stacks of matrices (S, out, in), those of one shape at once."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS, EPS = 5, 1e-7

    def __init__(self, matrices: Sequence[tuple[str, Tensor]], seeds: int, cfg: OptimConfig):
        self.seeds, self.momentum, self.decay = seeds, cfg.muon_momentum, cfg.weight_decay
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for name, p in matrices:
            groups.setdefault((p.shape, cfg.down_proj_lr_scale if ".down_proj" in name else 1.0), []).append(p)
        self.groups = [(ps, scale, torch.zeros_like(self.all_of(ps))) for (_, scale), ps in groups.items()]

    def all_of(self, matrices: Sequence[Tensor]) -> Tensor:
        """(N, out, in) with the seeds of the first matrix in front."""
        return torch.cat([by_seed(m.detach(), self.seeds) for m in matrices])

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:
        """lr: () on the device."""
        for ps, scale, momentum in self.groups:
            grads = self.all_of([p.grad for p in ps if p.grad is not None])
            momentum.lerp_(grads, 1 - self.momentum)
            update = self.orthogonal(grads.lerp_(momentum, self.momentum)).to(grads.dtype)
            size = 0.2 * max(grads.shape[1:]) ** 0.5
            weights = [by_seed(p.detach(), self.seeds) for p in ps]
            torch._foreach_mul_(weights, 1 - lr * (scale * self.decay))
            torch._foreach_sub_(weights, list((update * (lr * (scale * size))).split(self.seeds)))

    def orthogonal(self, grads: Tensor) -> Tensor:
        """Newton-Schulz of every matrix of (N, out, in), in bfloat16."""
        a, b, c = self.COEFFICIENTS
        x = grads.bfloat16()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=self.EPS)
        for _ in range(self.STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

    def tensors(self) -> list[Tensor]:
        return [momentum for *_, momentum in self.groups]


class SeedOptimizer:
    """`sidlm.train.optim.make_optimizer` for stacked weights."""

    def __init__(self, model: nn.Module, seeds: int, cfg: OptimConfig):
        self.seeds = seeds
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [(name, p) for name, p in named if cfg.name == "muon" and is_matrix(name, by_seed(p, seeds)[0])]
        taken = {name for name, _ in matrices}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, p in named:
            if name not in taken:
                scale = cfg.down_proj_lr_scale if ".down_proj" in name else 1.0
                scale = cfg.embedding_lr_scale if name.endswith("embed_tokens.weight") else scale
                decay = cfg.weight_decay if by_seed(p, seeds).ndim > 2 else 0.0
                groups.setdefault((scale, decay), []).append(p)
        settings = [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (scale, decay), ps in groups.items()]
        device, betas = self.parameters[0].device, (cfg.beta1, cfg.beta2)
        self.lr = torch.tensor(cfg.lr, device=device)
        for group in settings:
            group["lr"] = torch.tensor(cfg.lr, device=device)
        self.adamw = torch.optim.AdamW(
            settings, lr=self.lr, betas=betas, eps=cfg.eps, fused=True, capturable=device.type == "cuda"
        )
        self.muon = SeedMuon(matrices, seeds, cfg)
        self.clip_norm = cfg.clip_norm

    def set_rate(self, lr: float) -> None:
        """The learning rate of the next steps; it lies on the device, where a graph reads it."""
        self.lr.fill_(lr)
        for group in self.adamw.param_groups:
            group["lr"].fill_(lr * group["lr_scale"])

    def step(self) -> None:
        """Clip each seed's gradient, step, forget the gradients."""
        grads = [by_seed(p.grad, self.seeds) for p in self.parameters if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factor = (self.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))
        self.adamw.step()
        self.muon.step(self.lr)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        states = [t for state in self.adamw.state.values() for t in state.values()]
        return [*(p.data for p in self.parameters), *states, *self.muon.tensors()]


class SeedRun:
    """Runs that differ in their seed alone, together as far as the constant learning rate goes, and their branches.

    rows: step -> (inputs, labels) on the device, (S * B, T) each, one seed behind the other; rows are plain text
    without borders between documents, -100 is no label.
    graph: whether steps become a CUDA graph; with 2:4 sparsity, which is switched on by the host, they do not.
    """

    def __init__(self, models: Sequence[Any], cfg: RunConfig, rows: Rows, *, graph: bool = False):
        self.cfg, self.rows, self.seeds = cfg, rows, len(models)
        self.device = next(models[0].parameters()).device
        self.model = together(models)
        self.precision = hardware.resolve_precision(cfg.train.precision, self.device)
        self.optimizer = SeedOptimizer(self.model, self.seeds, cfg.optim)
        self.sparse = sparsity.sparse_layers(self.model)
        self.losses: list[Tensor] = []
        self.captured = Captured(self.update, self.optimizer.forget_gradients) if graph and not self.sparse else None

    def nll(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """(S * B, T): of each label in nats, 0 where there is none."""
        with hardware.autocast(self.device, self.precision):
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden)
        # the fused loss of training compiles for every shape first; these models are too short-lived for that
        shares = logits.flatten(0, 1).log_softmax(-1, dtype=torch.float32)
        return F.nll_loss(shares, labels.flatten(), reduction="none").view(labels.shape)

    def step(self, step: int, lr: float) -> None:
        """One step of every seed; its losses (S,) go to self.losses and are not waited for."""
        sparsity.switch(self.sparse, step, self.cfg.sparsity)
        self.optimizer.set_rate(lr)
        self.losses.append((self.captured or self.update)(*self.rows(step)))

    def update(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Losses (S,) of the rows, and the step that follows from them. Nothing here waits for the device."""
        nll = self.nll(inputs, labels).view(self.seeds, -1).sum(1)
        losses = nll / (labels >= 0).view(self.seeds, -1).sum(1)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def how(self) -> str:
        """Whether steps are a graph, in words."""
        if self.captured is None:
            return "no graph"
        return f"no graph: {self.captured.problem[-1200:]}" if self.captured.problem else "as a graph"

    def lengths(self, lengths: Sequence[int], decay: float, *, every: int = 32) -> Iterator[tuple[int, bool]]:
        """Train; (step, False) every `every` steps of the constant rate, (length, True) when a branch has decayed.

        lengths: steps, increasing; the last `decay` of them is the branch's own. The weights are put back when the
        caller has looked at a branch.
        """
        first = {steps - round(decay * steps): steps for steps in lengths}
        peak, schedule = self.cfg.optim.lr, self.cfg.schedule
        for step in range(max(first) + 1):
            if step in first:
                total = first[step]
                kept = None if total == lengths[-1] else [t.clone() for t in self.optimizer.tensors()]
                for at in range(step, total):
                    lr = learning_rate(at, schedule, peak=peak, total_steps=total, anneal_steps=total - step)
                    self.step(at, lr)
                yield total, True
                if kept is None:
                    return
                for t, old in zip(self.optimizer.tensors(), kept, strict=True):
                    t.copy_(old)
            self.step(step, learning_rate(step, schedule, peak=peak, total_steps=1 << 40))
            if step % every == every - 1:
                yield step + 1, False

    @torch.no_grad()
    def score(self, rows: dict[str, Any], *, batch: int) -> list[dict[str, dict[str, float]]]:
        """For each seed {group: {"nll", "tokens", "bytes", "rows"}} of token_data.py's rows, in nats."""
        tokens = torch.from_numpy(rows["tokens"].astype("int64")).to(self.device)
        place = torch.arange(tokens.shape[1] - 1, device=self.device)
        first = torch.from_numpy(rows["first"]).to(self.device)
        labels = tokens[:, 1:].clone()
        labels[(labels < 0) | (place < first[:, None] - 1)] = -100
        inputs, sums = tokens[:, :-1].clamp(min=0), []
        for at in range(0, len(tokens), batch):
            x, y = (part[at : at + batch].repeat(self.seeds, 1) for part in (inputs, labels))
            sums.append(self.nll(x, y).double().sum(1).view(self.seeds, -1))
        nll, counts = torch.cat(sums, 1).cpu().numpy(), (labels >= 0).sum(1).cpu().numpy()
        found = []
        for own in nll:
            groups = {}
            for i, name in enumerate(rows["groups"].tolist()):
                here = rows["group"] == i
                if not here.any():
                    continue
                groups[name] = {
                    "nll": float(own[here].sum()), "tokens": int(counts[here].sum()),
                    "bytes": int(rows["bytes"][here].sum()), "rows": int(here.sum()),
                }  # fmt: skip
            found.append(groups)
        return found


class TextRows:
    """Rows of a text (tokens,) on the device, each seed's in an order of its own, B a step."""

    def __init__(self, tokens: Tensor, seeds: Sequence[int], batch: int, length: int):
        self.tokens, self.batch = tokens, batch
        count = (len(tokens) - 1) // length
        orders = [torch.randperm(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.starts = length * torch.stack(orders).to(tokens.device)
        self.place = torch.arange(length + 1, device=tokens.device)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        count = self.starts.shape[1] // self.batch  # steps in an epoch
        starts = self.starts[:, (step % count) * self.batch :][:, : self.batch]
        rows = self.tokens[starts.reshape(-1, 1) + self.place].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
