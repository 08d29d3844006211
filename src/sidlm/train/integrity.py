"""Silent corruption: a process that computes, sends or keeps wrong numbers, found by comparing bits.

Three comparisons, each of sums of the 32-bit words (two tensors that differ in one bit differ in it):
- between replicas: processes along dp_replicate hold the same shards, so gradients after the reduction, parameters and
  optimizer state must be equal bit for bit;
- of a process with itself: the same rows, computed again, must give the same gradients before the reduction;
- of a process with the others and with its past: the norm of its own gradient before the reduction. Far off, it is no
  proof, but a reason to compute again.
After a reduction every process has the same wrong sum, so only the last two can see what went wrong before it.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidlm.errors import SidError
from sidlm.train.processes import Processes

if TYPE_CHECKING:
    from sidlm.parallel.pipeline import Stage

FAR = 30.0
"""Times the usual norm that a process's own gradient may have before the step is computed again"""
REMEMBERED = 32
"""Checks whose norms say what is usual"""


UNDONE = "; the step is not done and nothing of it is saved"


class Corruption(SidError):
    """Wrong numbers in the processes `ranks`; nothing of them was saved."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass
class Sums:
    """What one computation of a step's gradients came to, as sums of words and norms by name."""

    own: dict[str, int]
    """before the reduction"""
    reduced: dict[str, int]
    norm: float = field(compare=False)
    """of this process's own gradient, before the reduction"""


class Tap:
    """In the place of FSDP's reduce-scatter: the same, and it looks at what goes in, one group's flat gradient."""

    def __init__(self, owner: Integrity, name: str) -> None:
        self.owner, self.name = owner, name
        self.filling: Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input, fills it, and then for the output, on the stream that will reduce."""
        given = torch.empty(*size, dtype=dtype, device=device)
        if self.filling is None:
            self.filling = given
        else:
            self.owner.see(self.name, self.filling)
            self.filling = None
        return given

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        # torch 2.13 renamed it
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


class Integrity:
    """One process's part in the checks; every process calls them alike. Each raises `Corruption` on all of them.

    every: steps between checks of gradients, parameters and optimizer state, 0 = never. recompute_every: steps between
    those that are computed twice, 0 = only on suspicion. say: takes a line for the log.
    """

    def __init__(
        self, model: nn.Module, roots: Sequence[Stage], group: Processes, *, every: int, recompute_every: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """roots: pipeline stages, which FSDP was applied to as well."""
        self.model, self.group, self.every, self.recompute_every, self.say = model, group, every, recompute_every, say
        self.exact = self.repeatable = True
        self.seen: dict[str, list[Tensor]] = {}
        self.squares: list[Tensor] = []
        self.usual: deque[float] = deque(maxlen=REMEMBERED)
        self.line: Any = None
        if group.mesh is None:
            return
        self.line = group.mesh["dp_replicate"].get_group()
        if every or recompute_every:
            self._tap(roots)

    def _tap(self, roots: Sequence[Stage]) -> None:
        from torch.distributed.fsdp import FSDPModule

        parts = {module: name for name, module in self.model.named_modules()}
        parts |= {root: f"stage {root.index}" for root in roots}
        for module, name in parts.items():
            if isinstance(module, FSDPModule):
                name = name.removeprefix("model.") or "the embedding, the last norm and the head"
                module.set_custom_reduce_scatter(Tap(self, name))  # pyright: ignore[reportArgumentType]

    def see(self, name: str, flat: Tensor) -> None:
        """What a process is about to reduce."""
        self.squares.append(torch.linalg.vector_norm(flat, dtype=torch.float32).square())
        if self.exact:
            self.seen.setdefault(name, []).append(words(flat))

    # ---- gradients ----

    def begin(self, step: int) -> None:
        """Step `step` (counted from 1) is about to be computed."""
        self.seen, self.squares = {}, []
        self.exact = due(step, self.every) or due(step, self.recompute_every)

    def gradients(self, step: int, again: Callable[[], object]) -> None:
        """Compare this step's gradients if it is due; call it after the backward pass, before they are clipped.

        again: computes them once more, in place. Afterwards they are as they were, or from `again`: the same.
        """
        if not self.exact:
            return
        first = self._sums()
        apart, far = self._apart(first.reduced), self._far(first.norm)
        doubt = bool(apart or far or due(step, self.recompute_every))
        if self.group.largest(doubt and self.repeatable):
            self._compute_again(step, first, again)
        if self.group.largest(bool(apart)):
            self._raise(step, apart, "gradient")
        for line in filter(None, self.group.everyone(far)):
            self.say(f"step {step}: {line}; the same when computed again: the data, not the machine")

    def not_finite(self, step: int, again: Callable[[], object]) -> None:
        """Loss or norm of this step is not finite, on all processes: compute it again. Is it the data, or a process
        whose numbers are finite now?"""
        if not self.every:
            return
        first = self._finite()
        self._rerun(again)
        changed = self.group.everyone(tuple(a != b for a, b in zip(first, self._finite(), strict=True)))
        for place, when in enumerate(("before", "after")):
            ranks = [rank for rank, parts in enumerate(changed) if parts[place]]
            if ranks:
                raise Corruption(
                    f"silent corruption at step {step}: {self._named(ranks)} got a gradient that is not finite "
                    f"({when} the reduction), and a finite one of the same rows in a second computation{UNDONE}",
                    ranks,
                )

    def _finite(self) -> tuple[bool, bool]:
        """Of this process's gradients before the reduction, and after it."""
        sums = self._sums()
        after = [local(p.grad).isfinite().all() for p in self.model.parameters() if p.grad is not None]
        return math.isfinite(sums.norm), bool(torch.stack(after).all()) if after else True

    def _rerun(self, again: Callable[[], object]) -> Sums:
        self.seen, self.squares = {}, []
        self.model.zero_grad(set_to_none=True)
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # experts count their tokens
        again()
        for buffer, value in kept:
            buffer.copy_(value)
        return self._sums()

    def _compute_again(self, step: int, first: Sums, again: Callable[[], object]) -> None:
        """Who differs from himself? A third computation tells a fault from kernels that are not deterministic."""
        second = self._rerun(again)
        if not self.group.largest(first != second):
            return
        runs = (first, second, self._rerun(again))
        odd = self.group.everyone((odd_ones(runs, "own"), odd_ones(runs, "reduced")))
        for place in (0, 1):
            ranks = [rank for rank, pair in enumerate(odd) if "" in pair[place]]
            if ranks:
                self.repeatable = False
                return self.say(
                    f"step {step}: the same rows give other bits each time on rank {', '.join(map(str, ranks))}: the "
                    "kernels there are not deterministic, and no step is computed twice any more"
                )
        for place, when in enumerate(("before", "after")):
            found = {rank: pair[place] for rank, pair in enumerate(odd) if pair[place]}
            if found:
                raise Corruption(
                    f"silent corruption at step {step}: {self._named(list(found))} got another gradient of "
                    f"{next(iter(found.values()))[0]} from the same rows when they were computed again ({when} the "
                    f"reduction){UNDONE}",
                    list(found),
                )

    def _sums(self) -> Sums:
        reduced = {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        if self.group.mesh is None:
            self.squares = [torch.linalg.vector_norm(t, dtype=torch.float32).square() for t in reduced.values()]
        sums = numbers([words(t) for t in reduced.values()])
        own = numbers([torch.stack(found).sum() for found in self.seen.values()])
        norm = math.sqrt(float(torch.stack(self.squares).sum())) if self.squares else 0.0
        after = dict(zip(reduced, sums, strict=True))
        return Sums(dict(zip(self.seen, own, strict=True)) if self.group.mesh is not None else after, after, norm)

    def _far(self, norm: float) -> str | None:
        """Why this process's own gradient is suspicious, if it is."""
        place = 0 if self.group.mesh is None else self.group.mesh.get_local_rank("pp")
        everyone = self.group.everyone((place, norm))
        peers = [value for stage, value in everyone if stage == place and math.isfinite(value)]
        usual = max([statistics.median(self.usual)] if len(self.usual) >= 8 else [], default=0.0)
        usual = max(usual, statistics.median(peers) if len(peers) > 2 else min(peers, default=0.0))
        far = not math.isfinite(norm) or ((len(peers) > 1 or len(self.usual) >= 8) and norm > FAR * usual)
        if not far:
            self.usual.append(norm)
            return None
        return f"the norm of rank {self.group.rank}'s own gradient is {norm:.4g}, usual is {usual:.4g}"

    # ---- state ----

    def state(self, tensors: dict[str, Tensor], step: int, *, saving: bool) -> None:
        """Compare parameters and optimizer state after `step`, if it is due or they are about to be saved."""
        if self.line is None or self.line.size() == 1 or not self.every or not (saving or due(step, self.every)):
            return
        sums = numbers([words(local(t)) for t in tensors.values()])
        apart = self._apart(dict(zip(tensors, sums, strict=True)))
        if self.group.largest(bool(apart)):
            self._raise(step, apart, "")

    def _apart(self, sums: dict[str, int]) -> dict[str, list[int]]:
        """{name: sum of each replica} of the tensors whose replicas differ; {} on most days, at the cost of one
        all-reduce."""
        if self.line is None or self.line.size() == 1 or not sums:
            return {}
        own = torch.tensor(list(sums.values()), dtype=torch.int64, device=self.group.mesh.device_type)  # pyright: ignore
        ends = torch.stack((own, -own))
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.line)
        if bool((ends[0] == -ends[1]).all()):
            return {}
        every = [torch.empty_like(own) for _ in range(self.line.size())]
        dist.all_gather(every, own, group=self.line)
        rows = torch.stack(every).T.tolist()
        return {name: row for name, row in zip(sums, rows, strict=True) if len(set(row)) > 1}

    def _raise(self, step: int, apart: dict[str, list[int]], kind: str) -> None:
        """The line that names who differs: the minority of three or more replicas, else all of them."""
        own = None
        if apart:
            name, row = min(apart.items(), key=lambda item: len(minority(item[1])))
            ranks = [dist.get_global_rank(self.line, i) for i in minority(row)]
            own = (ranks, name, len(row))
        found = [verdict for verdict in self.group.everyone(own) if verdict]
        ranks, name, replicas = min(found, key=lambda verdict: (len(verdict[0]), verdict))
        who = self._named(ranks)
        differ = "differs from the other replicas" if len(ranks) < replicas else "differ and should be equal"
        what = f"the gradient of {name}" if kind else name
        raise Corruption(
            f"silent corruption found at step {step}: {who} {differ}, in {what}; nothing of it is saved, the last "
            "checkpoint was compared and is good",
            ranks,
        )

    def _named(self, ranks: list[int]) -> str:
        """Ranks with their machines; every process calls it."""
        hosts = self.group.everyone(socket.gethostname())
        return " and ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    to_local = getattr(t, "to_local", None)
    return t.detach() if to_local is None else to_local().detach()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def words(t: Tensor) -> Tensor:
    """The sum of a tensor's words as integers, int64 () on its device: of two that differ in one bit, another."""
    return t.contiguous().view(_WORDS[t.element_size()]).sum(dtype=torch.int64)


def numbers(sums: list[Tensor]) -> list[int]:
    """Sums from the device, with one wait."""
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def odd_ones(runs: tuple[Sums, Sums, Sums], field: str) -> list[str]:
    """Names in which one of three runs differs from two that are equal, and "" for any in which all three differ."""
    a, b, c = (getattr(run, field) for run in runs)
    different = [name for name in a if not a[name] == b[name] == c[name]]
    return [name if len({a[name], b[name], c[name]}) == 2 else "" for name in different]


def minority(row: list[int]) -> list[int]:
    """Indices of what differs from the most frequent value; all where it has no majority."""
    value, count = Counter(row).most_common(1)[0]
    return [i for i, x in enumerate(row) if x != value] if 2 * count > len(row) else list(range(len(row)))
