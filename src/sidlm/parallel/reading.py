"""Looking at a model where it lies, whole in one process or spread over many: what it says of the tokens of some rows.

Nothing is gathered but what a forward pass gathers: a block's weights, which are freed behind it, one after the other.
Every process of a mesh calls everything here alike; those of one share of the rows (pp, cp and tp) give the same rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidlm import ops
from sidlm.ops.loss.linear_cross_entropy import chunks, compute_dtype
from sidlm.parallel.chunks import chunk_length

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sidlm.models.modeling import SidForCausalLM
    from sidlm.parallel.pipeline import Pipeline

Look = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, d), weight of the head (V, d), labels (N,)) -> a number for each token, (N,); with tensor parallelism the
weight is a DTensor split by rows, and hidden the same on every process"""


def nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats."""
    if is_split(weight):
        from sidlm.parallel.loss import vocab_parallel_nll

        return vocab_parallel_nll(hidden, weight, labels)
    return ops.linear_cross_entropy(hidden, weight, labels, reduction="none")


def choice(hidden: Tensor, weight: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
    """The token of the largest logit at each position, what greedy decoding writes; of equal ones the first.

    noise: (R, V), of which row `label` is added to the logits; else labels are not looked at.
    """
    if is_split(weight):
        from sidlm.parallel.loss import vocab_parallel_choice

        return vocab_parallel_choice(hidden, weight, labels, noise)
    dtype, found = compute_dtype(hidden), []
    steps = chunks(len(hidden), len(weight), None, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in steps:
            part = slice(start, start + steps.step)
            logits = hidden[part].to(dtype) @ weight.to(dtype).T
            found.append((logits if noise is None else logits + noise.to(logits.device)[labels[part]]).argmax(-1))
    return torch.cat(found) if found else labels


def sample(temperature: float, vocabulary: int, seeds: Sequence[int]) -> Look:
    """What draws a token from the distribution at this temperature, at a position of label r with the r-th seed.

    Gumbel noise makes the largest logit such a draw. It comes from a CPU: the same seed draws the same on any mesh.
    """
    if temperature == 0:
        return choice
    draws = [torch.rand(vocabulary, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    noise = -temperature * torch.stack(draws).clamp_min(1e-30).log().neg().log()
    return functools.partial(choice, noise=noise.float())


def is_split(x: Any) -> bool:
    """Whether it is a DTensor; without their module, which a single process need not load."""
    return hasattr(x, "to_local")


class Reader:
    """A model, and how it is spread; nothing is kept between calls but that."""

    def __init__(self, model: SidForCausalLM, mesh: DeviceMesh | None = None, pipeline: Pipeline | None = None) -> None:
        """pipeline: what `parallelize` gave."""
        self.model, self.mesh, self.pipeline = model, mesh, pipeline
        self.share, self.context, self.pieces = (0, 1), None, 1
        if mesh is None:
            return
        from sidlm.parallel.context import context_parallel
        from sidlm.parallel.mesh import batch_share

        self.share, self.pieces = batch_share(mesh), mesh["tp"].size()
        if mesh["cp"].size() > 1:
            self.context = context_parallel(model.config, mesh["cp"])
            self.pieces *= 2 * mesh["cp"].size()

    def turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """Which of `count` pieces of work this process takes part in, one after the other, and whether their results
        count: all shares have equally many, so some repeat the last piece."""
        index, shares = self.share
        for turn in range(-(-count // shares)):
            own = turn * shares + index
            yield min(own, count - 1), own < count

    def total(self, numbers: list[float]) -> list[float]:
        """The sums over all shares."""
        if self.mesh is None:
            return numbers
        from sidlm.parallel.mesh import sum_over_rows

        return sum_over_rows(torch.tensor(numbers, dtype=torch.float64, device=self.device), self.mesh).tolist()

    @torch.no_grad()
    def tokens(self, look: Look, inputs: Tensor, labels: Tensor, doc_ids: Tensor) -> Tensor:
        """What `look` finds at the positions with a label, 0 elsewhere: (B, T) float64 on the CPU.

        inputs, labels (-100: not looked at) and doc_ids (-1: padding): (B, T) int64.
        """
        rows, length = inputs.shape
        missing = -length % self.pieces
        padded = [
            torch.nn.functional.pad(x, (0, missing), value=fill).to(self.device)
            for x, fill in ((inputs, 0), (labels, -100), (doc_ids, -1))
        ]
        positions = torch.arange(length + missing, device=self.device).expand(rows, -1)
        batch = dict(zip(("input_ids", "shift_labels", "doc_ids"), padded, strict=True)) | {"position_ids": positions}
        with self._looking(look), self._freeing():
            if self.pipeline is None:
                found = self.model(**batch, num_items_in_batch=1, use_cache=False).loss
            else:
                found = self._through_stages(batch)
        if self.context is not None:
            found = self.context.join(found.view(2 * rows, -1), length)
        return found.view(rows, -1)[:, :length].cpu()

    def _through_stages(self, batch: dict[str, Tensor]) -> Tensor:
        assert self.pipeline is not None and self.mesh is not None
        from sidlm.parallel.mesh import largest_of_rows

        rows, length = batch["input_ids"].shape
        # each row is a pass, for which FSDP gathers weights: other shares must do as many
        missing = largest_of_rows(rows, self.mesh) - rows
        found = self.pipeline.forward({key: torch.cat((x, x[-1:].expand(missing, -1))) for key, x in batch.items()})
        if self.context is not None:
            rows, length = 2 * rows, chunk_length(length, self.context.ranks)
        if found is None:
            found = torch.zeros(rows * length, dtype=torch.float64, device=self.device)
        found = found[: rows * length]
        dist.all_reduce(found, group=self.mesh["pp"].get_group())  # the last stage alone has any
        return found

    @contextlib.contextmanager
    def _looking(self, look: Look) -> Iterator[None]:
        """`look` in the place of the loss, at scored positions alone."""

        def see(hidden: Any, weight: Tensor, labels: Tensor) -> Tensor:
            scored = labels >= 0
            hidden = hidden.to_local() if is_split(hidden) else hidden
            found = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
            found[scored] = look(hidden[scored], weight, labels[scored]).double()
            return found

        head: Any = self.model if self.pipeline is None else self.pipeline.head
        if head is None:  # it lies on other processes
            yield
            return
        former = vars(head).pop("token_loss", None)
        head.token_loss = see
        try:
            yield
        finally:
            del head.token_loss
            if former is not None:
                head.token_loss = former

    @contextlib.contextmanager
    def _freeing(self) -> Iterator[None]:
        """FSDP frees the weights that it gathers behind each forward pass in the body, however the plan has it.

        Else they would stay until a backward pass: the whole model in each process, and old weights once they change.
        """
        hooks: list[Any] = []
        if self.mesh is not None:
            from torch.distributed.fsdp import FSDPModule

            roots: Sequence[nn.Module] = [self.model] if self.pipeline is None else self.pipeline.stages
            modules = {module for root in roots for module in root.modules()}
            hooks += [m.register_forward_hook(_free) for m in modules if isinstance(m, FSDPModule)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def _free(module: Any, *_: Any) -> None:
    module.reshard()
