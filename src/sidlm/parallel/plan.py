"""The plan of a training run on GPUs that nobody has to have: memory, traffic and time of one step on one GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sidlm.models.flops import num_parameters, train_flops_per_token
from sidlm.parallel.config import RECOMPUTE
from sidlm.parallel.hardware import Hardware
from sidlm.parallel.layout import Job, Layout, bubble, check
from sidlm.parallel.memory import Memory, memory
from sidlm.parallel.step_time import UNMODELLED, StepTime, step_time
from sidlm.parallel.volume import Traffic, step_traffic


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job in a layout on a kind of GPU, with its costs. Built by :func:`plan`."""

    job: Job
    layout: Layout
    hardware: Hardware
    memory: Memory
    unmodelled: float

    @cached_property
    def time(self) -> StepTime:
        """Seconds of a step, by what they go into."""
        return step_time(self.hardware, self.job, self.layout, self.unmodelled)

    @cached_property
    def traffic(self) -> list[Traffic]:
        """What a GPU receives in a step, of the pipeline rank that needs most memory."""
        return step_traffic(self.job, self.layout, self.memory.rank)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.hardware.memory_bytes

    @property
    def flops(self) -> float:
        """Model FLOPs of a GPU in a step; recomputation is not counted (models/flops.py)."""
        per_token = train_flops_per_token(self.job.config, self.job.seq_len)
        return per_token * self.job.tokens / self.layout.gpus

    @property
    def flops_per_second(self) -> float:
        """Of one GPU."""
        return self.flops / self.time.total

    @property
    def mfu(self) -> float:
        """Of the dense bf16 peak."""
        return self.flops_per_second / self.hardware.bf16_flops

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON: bytes, seconds, FLOPs."""
        job, layout = self.job, self.layout
        return {
            "gpus": layout.gpus,
            "mesh": layout.mesh,
            "micro_batch": layout.micro_batch,
            "micro_batches": layout.micro_batches(job),
            "virtual_stages": layout.virtual,
            "recompute": layout.recompute,
            "reshard_after_forward": layout.reshard,
            "parameters": num_parameters(job.config),
            "memory_bytes": self.memory._asdict() | {"total": self.memory.total},
            "device_bytes": self.hardware.memory_bytes,
            "fits": self.fits,
            "traffic": [found._asdict() for found in self.traffic],
            "flops_per_gpu": self.flops,
            "bubble": bubble(layout, job),
            "seconds": self.time._asdict() | {"total": self.time.total},
            "tokens_per_second": job.tokens / self.time.total,
            "flops_per_second_and_gpu": self.flops_per_second,
            "mfu": self.mfu,
        }


def plan(job: Job, layout: Layout, hardware: Hardware, unmodelled: float = UNMODELLED) -> Plan:
    """The costs of a layout.

    unmodelled: share of the modelled step that is added; 0 for the model without its calibrated constant.
    Raises SidError, naming the numbers, for a layout that cannot be run. One that does not fit into memory can be
    planned: see `Plan.fits`.
    """
    check(layout, job)
    needed = memory(job, layout, int(hardware.reserved_bytes))
    return Plan(job=job, layout=layout, hardware=hardware, memory=needed, unmodelled=unmodelled)


def recomputations(found: Plan) -> list[Plan]:
    """The same mesh with every way of recomputation."""
    layouts = [replace(found.layout, recompute=how) for how in RECOMPUTE]
    return [plan(found.job, layout, found.hardware, found.unmodelled) for layout in layouts]
