"""Runs requests one after another in a thread of its own, and gives what they make to the server's event loop.

One model computes one request at a time: on a CPU, and with one row a step, two at once would only wait for each other.
Continuous batching will take this file's place; the rest of the server does not know how tokens are made.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sidlm.data.tokenizer import Tokenizer
from sidlm.serve.decode import Chosen, Sampling, decode
from sidlm.serve.metrics import Metrics
from sidlm.serve.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.serve.grammar import Grammar


class Busy(Exception):
    """The queue is full."""


class Closing(Exception):
    """The server is going down."""


class OutOfTime(Exception):
    """The request's time ended before its first token."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One continuation of one prompt."""

    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    """strings that end the text, and are no part of it"""
    grammar: "Grammar | None" = None
    seconds: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some more of a text: the tokens that made it, the last of them with its finish reason if it is the end."""

    text: str
    chosen: tuple[Chosen, ...]
    finish: str | None = None


class Engine:
    """The model's thread and the queue before it."""

    def __init__(self, model: "SidForCausalLM", tokenizer: Tokenizer, *, max_queue: int, metrics: Metrics) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_queue = max_queue
        self.metrics = metrics
        self.closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sid-engine")
        self._stops: set[threading.Event] = set()
        self.running = 0
        metrics.counter("sid_prompt_tokens_total", "Tokens of prompts that were computed.")
        metrics.counter("sid_generated_tokens_total", "Tokens that were generated.")
        metrics.counter("sid_cancelled_total", "Continuations that ended because nobody waited for them any more.")
        metrics.histogram("sid_queue_seconds", "Time between a request and its turn.")
        metrics.histogram("sid_first_token_seconds", "Time between a request and its first token.")
        metrics.gauge("sid_requests_waiting", "Continuations that wait for their turn.", lambda: self.waiting)
        metrics.gauge("sid_requests_running", "Continuations that are being computed.", lambda: self.running)

    @property
    def waiting(self) -> int:
        return max(len(self._stops) - self.running, 0)

    def check_room(self) -> None:
        """Raise Busy or Closing unless one more request may wait."""
        if self.closed:
            raise Closing("the server is shutting down")
        if len(self._stops) > self.max_queue:
            raise Busy(f"{self.waiting} requests wait already, {self.max_queue} may")

    async def run(self, job: Job) -> AsyncIterator[Piece]:
        """The job's text piece by piece, the last one with its finish reason.

        Whoever stops listening stops the work, too, at the next token.
        Raises Busy, Closing, OutOfTime, or what decode raises.
        """
        self.check_room()
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        stop, start = threading.Event(), time.monotonic()

        def give(item: Any) -> None:
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, item)
            except RuntimeError:  # the loop is gone
                stop.set()

        self._stops.add(stop)
        future = self._thread.submit(self._work, job, start, stop, give)

        def done(future: Future) -> None:
            self._stops.discard(stop)
            if future.cancelled():  # it never had its turn
                give(Closing("the server is shutting down"))

        future.add_done_callback(done)
        ended = False
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, BaseException):
                    ended = True
                    raise item
                ended = item.finish is not None
                yield item
                if ended:
                    return
        finally:
            stop.set()
            future.cancel()
            if not ended:
                self.metrics.add("sid_cancelled_total")

    def _work(self, job: Job, start: float, stop: threading.Event, give: Any) -> None:
        self.running += 1
        self.metrics.observe("sid_queue_seconds", time.monotonic() - start)
        try:
            self._generate(job, start, stop, give)
        except BaseException as error:
            give(error)
        finally:
            self.running -= 1

    def _generate(self, job: Job, start: float, stop: threading.Event, give: Any) -> None:
        deadline = start + job.seconds
        text, stops = Detokenizer(self.tokenizer), StopStrings(job.stop)
        late = lambda: time.monotonic() > deadline  # noqa: E731
        first = True
        steps = decode(
            self.model, job.prompt, job.sampling, stop_ids=job.stop_ids, grammar=job.grammar,
            vocab_size=self.tokenizer.vocab_size, cancelled=lambda: stop.is_set() or late(),
        )  # fmt: skip
        for chosen in steps:
            if first:
                self.metrics.add("sid_prompt_tokens_total", len(job.prompt))
                self.metrics.observe("sid_first_token_seconds", time.monotonic() - start)
                first = False
            self.metrics.add("sid_generated_tokens_total")
            shown = stops.feed(text.feed((chosen.id,)))
            if chosen.finish:
                shown += stops.feed(text.end()) + stops.end()
            finish = "stop" if stops.stopped else chosen.finish
            give(Piece(text=shown, chosen=(chosen,), finish=finish))
            if finish:
                return
        if stop.is_set():  # nobody listens, or all are told to go
            raise Closing("the server is shutting down")
        if first:
            raise OutOfTime(f"no token within {job.seconds:g} seconds")
        give(Piece(text=stops.feed(text.end()) + stops.end(), chosen=(), finish="length"))

    def close(self) -> None:
        """Take no more work and stop what runs, at its next token."""
        self.closed = True
        for stop in list(self._stops):
            stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
