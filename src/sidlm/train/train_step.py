"""One optimizer step: forward and backward passes of a global batch in micro-batches, checks, the update."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sidlm.nn.moe import MoEFeedForward
from sidlm.train import hardware
from sidlm.train.config import RunConfig
from sidlm.train.integrity import Integrity
from sidlm.train.layers import LayerStatistics
from sidlm.train.optim import Optimizer, clip_gradients
from sidlm.train.processes import Processes
from sidlm.train.recipe import micro_batch_rows
from sidlm.train.spikes import SpikeGuard
from sidlm.train.stragglers import Pace

if TYPE_CHECKING:
    from sidlm.data.loader import Batch
    from sidlm.parallel.pipeline import Pipeline


class Watch(NamedTuple):
    """What looks at a step from inside."""

    integrity: Integrity
    layers: LayerStatistics
    pace: Pace


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    cfg: RunConfig,
    device: torch.device,
    precision: str,
    group: Processes,
    pipeline: Pipeline | None,
    guard: SpikeGuard,
    watch: Watch,
    step: int,
) -> tuple[float, float, str | None]:
    """One optimizer step on a global batch, of which this process has some rows; (loss in nats per token, gradient
    norm before clipping, why the guard left the step out if it did), the same on all processes.

    The loss is the sum over all tokens that have a label, divided by their number in the WHOLE batch: it does not
    depend on how the batch is cut into micro-batches. Where loss or norm is not finite, the weights stay as they are.
    """
    watch.pace.pause()
    labelled = group.sum_rows(int((batch.labels != -100).sum()))
    again = functools.partial(gradients, model, batch, labelled, cfg, device, precision, group, pipeline)
    loss = group.sum_tokens(again())
    watch.integrity.gradients(step + 1, again)
    watch.layers.gradients()
    norm = clip_gradients(model.parameters(), cfg.optim.clip_norm, pipeline)
    # the one wait for the device in a step: the optimizer's work and the next step are queued behind it
    loss_value, norm_value = torch.stack((loss, norm.to(loss.dtype))).tolist()
    watch.pace.resume()
    ok = math.isfinite(loss_value) and math.isfinite(norm_value)
    if not ok:
        watch.pace.pause()
        watch.integrity.not_finite(step + 1, again)
    spike = guard.judge(loss_value, norm_value) if ok else None
    ok = ok and spike is None
    if ok:
        optimizer.step()
    watch.pace.pause()
    update_balance(model, ok, group)
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm_value, spike


def gradients(
    model: nn.Module,
    batch: Batch,
    labelled: int | torch.Tensor,
    cfg: RunConfig,
    device: torch.device,
    precision: str,
    group: Processes,
    pipeline: Pipeline | None,
) -> torch.Tensor:
    """Forward and backward pass of a process's rows; their loss, a tensor ()."""
    rows = micro_batch_rows(cfg, batch.tokens.shape[1])
    if pipeline is not None:
        return pipeline.step(arguments(batch, device), num_items=labelled, micro_batch_size=rows or 1)
    rows = rows or len(batch)
    # a sharded model casts its weights itself, once for each time that it gathers them
    autocast = "fp32" if group.mesh is not None else precision
    loss = torch.zeros((), device=device)
    for first in range(0, len(batch), rows):
        part = arguments(batch[first : first + rows], device, offsets=device.type == "cuda" and cfg.parallel.cp == 1)
        with hardware.autocast(device, autocast):
            micro_loss = model(**part, num_items_in_batch=labelled, use_cache=False).loss
        micro_loss.backward()
        loss += micro_loss.detach()
    return loss


def arguments(rows: Batch, device: torch.device, *, offsets: bool = False) -> dict[str, Any]:
    """Rows of a batch on the host as the model takes them on a device.

    What is looked at here needs no wait for the device: rows of one document each are told by nothing, which is plain
    causal attention. offsets: whether documents in packed rows are told by where they begin, too.
    """
    placed = rows.to(device, non_blocking=True)
    found: dict[str, Any] = {"input_ids": placed.tokens, "shift_labels": placed.labels}
    if rows.packed:
        found |= {"position_ids": placed.positions, "doc_ids": placed.doc_ids}
        if offsets:
            starts, longest = rows.offsets()
            found |= {"cu_seq_lens_q": starts.to(device, non_blocking=True), "max_length_q": longest}
            # how many documents there are changes from batch to batch
            torch._dynamo.maybe_mark_dynamic(found["cu_seq_lens_q"], 0)
    return found


def update_balance(model: Any, ok: bool, group: Processes) -> None:
    """Balance the experts after a step; after a skipped one (rate 0) they only forget what it routed."""
    rate = model.config.moe_balance_rate if ok else 0.0
    for module in model.modules():
        if isinstance(module, MoEFeedForward):
            module.update_balance(rate, group.tokens)
