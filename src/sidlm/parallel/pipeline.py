"""Pipeline parallelism: each process of a mesh's pp holds some of the layers, and activations travel between them.

A stage is the model itself, in which what lies on other stages hands its input on: it takes the same tokens, positions
and documents as the whole model, so packed rows, context and tensor parallelism work in it as they do without stages.
Every process of pp has the same rows; only activations (B, T, hidden_size) and their gradients are sent.
`torch.distributed.pipelining` sends them and gathers FSDP's weights, in the order that schedule.py works out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor

from sidlm.parallel.chunks import chunk_length
from sidlm.parallel.config import PipelineConfig
from sidlm.parallel.schedule import make_schedule, stage_layers

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM

Module = TypeVar("Module", bound=nn.Module)


class Stage(nn.Module):
    """Neighbouring layers of a model, with the embedding in front of the first ones, norm and loss behind the last."""

    def __init__(self, model: SidForCausalLM, index: int, count: int, layers: range):
        super().__init__()
        self.index, self.layers = index, layers
        self.last = index == count - 1
        self.num_items: int | Tensor = 1
        """labelled tokens of the batch, all that the loss is divided by"""
        self.part = part = _twin(model)
        part.model = _twin(model.model)
        held = [layer if i in layers else _HandedOn() for i, layer in enumerate(model.model.layers)]
        part.model.layers = nn.ModuleList(held)
        self.received = None if index == 0 else _Received()
        if self.received is not None:
            part.model.embed_tokens = self.received  # pyright: ignore[reportAttributeAccessIssue]
        if not self.last:
            part.model.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
            part.lm_head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor, **tokens: Any) -> Tensor:
        """x: what the stage before gave, not read by the first one; tokens: as the model takes them, with labels.

        Returns activations of the same shape, or the loss of the last stage.
        """
        if self.received is not None:
            self.received.x = x
        if self.last:
            return self.part(**tokens, num_items_in_batch=self.num_items, use_cache=False).loss
        del tokens["shift_labels"]  # without labels there are logits: the head hands the activations on
        return self.part(**tokens, use_cache=False).logits


class _HandedOn(nn.Module):
    """A layer of another stage."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Received(nn.Module):
    """In the place of the embedding: what the stage before sent."""

    x: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x, self.x = self.x, None
        assert x is not None
        return x


class _Absent(nn.Module):
    """In a process's model: a part that other processes hold."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("this process holds only some stages of the model: run them with Pipeline.step")


def _twin(module: Module) -> Module:
    """The same parameters, modules and hooks in another module, in which they can be exchanged."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


class _Shape(NamedTuple):
    """What the buffers of a schedule depend on."""

    rows: int
    length: int
    micro_batches: int


class Pipeline:
    """One process's stages and the way of a batch through all of them.

    Made by `sidlm.parallel.shard.parallelize`. The model given keeps what this process holds, under the names it had.
    """

    def __init__(
        self,
        model: SidForCausalLM,
        mesh: DeviceMesh,
        config: PipelineConfig,
        *,
        dtype: torch.dtype,
        sequence_parts: int,
    ):
        """mesh: with the dimensions of `build_mesh`. dtype: of activations. sequence_parts: in how many parts tensor
        parallelism splits their positions. Raises SidError for more stages than layers."""
        self.config, self.mesh = config, mesh["pp"]
        self.processes, self.rank = self.mesh.size(), self.mesh.get_local_rank()
        self.count = self.processes * config.virtual_stages
        layers = stage_layers(len(model.model.layers), self.count, config.end_layers)
        self.stages = [
            Stage(model, index, self.count, layers[index]) for index in range(self.rank, self.count, self.processes)
        ]
        self.hidden_size, self.dtype = model.config.hidden_size, dtype
        self.context_parts, self.sequence_parts = mesh["cp"].size(), sequence_parts
        self.loss_dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._schedules: dict[_Shape, _PipelineScheduleRuntime] = {}
        self.tied: nn.Embedding | nn.Linear | None = None
        """What has the weight that the first and the last process both hold: the embedding, the head"""
        if model.lm_head.weight is model.model.embed_tokens.weight and self.rank in (0, self.processes - 1):
            self.tied = model.lm_head if self.rank else model.model.embed_tokens
        _keep(model, self.stages, tied=self.tied is not None)

    def step(self, rows: Mapping[str, Tensor], *, num_items: int | Tensor, micro_batch_size: int) -> Tensor:
        """The loss of some rows, the same on every process of pp; gradients are added up as by `backward`.

        rows: input_ids, position_ids, doc_ids and shift_labels, each (B, T), the same on every process of pp, cp and
        tp. num_items: labelled tokens of the whole batch. micro_batch_size: divides B. Loss and gradients are those of
        this process's tokens, as after `parallelize`.
        """
        ids = rows["input_ids"]
        if len(ids) % micro_batch_size:
            raise ValueError(f"{len(ids)} rows do not divide into micro-batches of {micro_batch_size}")
        shape = _Shape(micro_batch_size, ids.shape[1], len(ids) // micro_batch_size)
        if shape not in self._schedules:
            self._schedules = {shape: self._schedule(shape, ids.device)}  # one at a time: each has buffers
        for stage in self.stages:
            stage.num_items = num_items
        losses: list[Tensor] = []
        self._schedules[shape].step(
            *([ids] if self.rank == 0 else []), target=rows["shift_labels"], losses=losses, return_outputs=False,
            **dict[str, Any](rows),
        )  # fmt: skip
        self._add_tied_gradients()
        loss = torch.zeros((), dtype=self.loss_dtype, device=ids.device)
        for micro_loss in losses:
            loss += micro_loss.detach()
        dist.all_reduce(loss, group=self.mesh.get_group())  # the last stage alone has any
        return loss

    @property
    def head(self) -> nn.Module | None:
        """What computes the loss of the last stage, if this process holds that."""
        return self.stages[-1].part if self.stages[-1].last else None

    @torch.no_grad()
    def forward(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        """Forward passes alone, of one row after the other: what the last stage's loss is, of each row one behind the
        other along its first dimension; None on processes that do not hold that stage.

        rows: as of `step`; here too all processes of pp give the same. Processes work at once on as many rows as there
        are stages, but with virtual stages each row goes round alone.
        """
        count, length = rows["input_ids"].shape
        device, sent, found = rows["input_ids"].device, None, []
        group = self.mesh.get_group()
        before, after = (dist.get_global_rank(group, (self.rank + way) % self.processes) for way in (-1, 1))
        for row in range(count):
            part = {name: x[row : row + 1] for name, x in rows.items()}
            for stage in self.stages:
                stage.num_items = 1
                x = part["input_ids"]
                if stage.index:
                    x = torch.empty(self._activations(1, length), dtype=self.dtype, device=device)
                    dist.recv(x, before, group=group)
                x = stage(x, **part)
                if stage.last:
                    found.append(x)
                    continue
                if sent is not None:
                    sent.wait()
                on_its_way = x.contiguous()
                sent = dist.isend(on_its_way, after, group=group)
        if sent is not None:
            sent.wait()
        return torch.cat(found) if found else None

    def _activations(self, rows: int, length: int) -> tuple[int, int, int]:
        """Shape of what travels between stages for rows of whole sequences."""
        if self.context_parts > 1:
            rows, length = 2 * rows, chunk_length(length, self.context_parts)
        return rows, length // self.sequence_parts, self.hidden_size

    def _schedule(self, shape: _Shape, device: torch.device) -> _PipelineScheduleRuntime:
        plan = make_schedule(
            self.processes, self.config.virtual_stages, shape.micro_batches,
            contiguous=self.config.contiguous, forwards_first=self.config.schedule == "gpipe",
        )  # fmt: skip
        found = _PipelineScheduleRuntime(
            [self._torch_stage(stage, shape, device) for stage in self.stages],
            shape.micro_batches,
            loss_fn=lambda loss, labels: loss,
            scale_grads=False,
        )
        kinds = {False: _ComputationType.FORWARD, True: _ComputationType.FULL_BACKWARD}
        orders = {
            rank: [_Action(action.stage, kinds[action.backward], action.micro_batch) for action in order]
            for rank, order in enumerate(plan.orders)
        }
        found._prepare_schedule_with_comms(orders)  # pyright: ignore[reportArgumentType]
        return found

    def _torch_stage(self, stage: Stage, shape: _Shape, device: torch.device) -> PipelineStage:
        with torch.device("meta"):
            ids = torch.empty(shape.rows, shape.length, dtype=torch.int64)
            activations = torch.empty(self._activations(shape.rows, shape.length), dtype=self.dtype, requires_grad=True)
            loss = torch.empty((), dtype=self.loss_dtype, requires_grad=True)
        # told beforehand: else torch runs the first micro-batch twice to find out
        return PipelineStage(
            stage, stage.index, self.count, device,
            input_args=activations if stage.index else ids, output_args=loss if stage.last else activations,
            group=self.mesh.get_group(),
        )  # fmt: skip

    @torch.no_grad()
    def _add_tied_gradients(self) -> None:
        """Embedding and head are one weight: both processes that hold it get the sum of its two gradients."""
        if self.tied is None:
            return
        grad = self.tied.weight.grad
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        assert own is not None
        other, group = torch.empty_like(own), self.mesh.get_group()
        peer = dist.get_global_rank(group, self.processes - 1 - self.rank)
        messages = [dist.P2POp(dist.isend, own.clone(), peer, group), dist.P2POp(dist.irecv, other, peer, group)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        own += other

    def copies(self) -> set[Tensor]:
        """Parameters of this process that count for another one: the tied weight, on the last stage."""
        return {self.tied.weight} if self.tied is not None and self.rank else set()

    @torch.no_grad()
    def norm_of_all(self, norm: Tensor) -> Tensor:
        """The L2 norm over all stages, from that of this process's gradients without `copies`."""
        squared = norm.to(self.mesh.device_type).square()
        dist.all_reduce(squared, group=self.mesh.get_group())
        return squared.sqrt()


def _keep(model: SidForCausalLM, stages: list[Stage], *, tied: bool) -> None:
    """Take what is in none of the stages out of a model; the last stage keeps both names of a tied weight."""
    held = {i for stage in stages for i in stage.layers}
    for i in range(len(model.model.layers)):
        if i not in held:
            model.model.layers[i] = _Absent()
    if stages[0].index and not (stages[-1].last and tied):
        model.model.embed_tokens = _Absent()  # pyright: ignore[reportAttributeAccessIssue]
    if not stages[-1].last:
        model.model.norm = _Absent()  # pyright: ignore[reportAttributeAccessIssue]
        model.lm_head = _Absent()  # pyright: ignore[reportAttributeAccessIssue]
