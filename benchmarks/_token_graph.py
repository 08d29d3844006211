"""A training step as one CUDA graph: models so small spend more time on starting kernels than on running them."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

WARM = 4
"""Calls before the capture: kernels are compiled and loaded, and states made, in the first of them."""


class Captured:
    """A function of tensors of fixed shapes, from the fifth call on as the replay of a CUDA graph.

    function must wait for nothing on the device, and all that it changes must stay where it is in memory. Its result
    is copied, so it is not overwritten by the next call. Where the capture fails, `problem` says why, and the function
    is called as it is; forget: called then, to drop what a capture that was broken off has left behind.
    """

    def __init__(self, function: Callable[..., Tensor], forget: Callable[[], None]):
        self.function, self.forget = function, forget
        self.calls, self.graph, self.problem = 0, None, ""
        self.stream = torch.cuda.Stream()

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM:
            return self._aside(args)
        if self.graph is None and not self.problem:
            self._capture(args)
        if self.graph is None:
            return self.function(*args)
        for own, new in zip(self.inputs, args, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.result.clone()

    def _aside(self, args: tuple[Tensor, ...]) -> Tensor:
        """A call on another stream, as torch asks for before a capture."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self.function(*args)
        here.wait_stream(self.stream)
        for x in (*args, result):
            x.record_stream(self.stream if x is not result else here)
        return result

    def _capture(self, args: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in args]
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            # autograd works in a thread of its own, and other threads are free to do as they like
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.result = self.function(*self.inputs)
            torch.cuda.synchronize()
            self.graph = graph
        except Exception:
            self.problem = traceback.format_exc()
            self.forget()
