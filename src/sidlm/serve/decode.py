"""One row, token by token: prefill in chunks, the rules of sampling, log-probabilities, cancellation.

transformers' ``generate`` serves batches, beams and assisted decoding; this loop serves a conversation. It yields each
token when it is there, stops when it is told to, and its overhead is that of the forward pass.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM
    from sidlm.serve.grammar import Grammar

PREFILL_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises SidError naming the field that is out of range."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy: the likeliest token, whatever top_p, top_k and min_p say"""
    top_p: float = 1.0
    """only the likeliest tokens that together have this probability"""
    top_k: int = 0
    """only the k likeliest tokens; 0: all"""
    min_p: float = 0.0
    """only tokens at least this share as likely as the likeliest"""
    repetition_penalty: float = 1.0
    """divides positive logits, and multiplies negative ones, of tokens that occurred, in the prompt too"""
    presence_penalty: float = 0.0
    """taken from the logits of tokens that were generated"""
    frequency_penalty: float = 0.0
    """taken from them for every time that they were"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logits of tokens"""
    seed: int | None = None
    """of the draws; None: another one each time"""
    top_logprobs: int | None = None
    """how many of the likeliest tokens to report with every token; None: no log-probabilities at all"""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None), ("temperature", 0, None), ("top_p", 0, 1), ("top_k", 0, None), ("min_p", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise SidError(f"{name} must be {bounds}, got {value}")
        if not self.repetition_penalty > 0:
            raise SidError(f"repetition_penalty must be positive, got {self.repetition_penalty}")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token that was chosen, its log-probability under the model alone, and the likeliest ones with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    """stop: it ends the text (or the grammar is complete); length: no more were asked for; else None"""


def decode(
    model: "SidForCausalLM",
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    grammar: "Grammar | None" = None,
    vocab_size: int | None = None,
    chunk: int = PREFILL_CHUNK,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Chosen]:
    """Tokens behind the prompt until one of stop_ids, which is the last one yielded, or max_new_tokens.

    grammar: what the text must be (``sidlm.serve.grammar``); stop_ids are then possible where it may end.
    vocab_size: tokens that there are; what a larger embedding has beyond is never chosen. None: all of it.
    chunk: tokens of the prompt that go through the model at once.
    cancelled: asked before every pass through the model; true ends the iteration.
    Raises SidError for an empty prompt, ids outside of the vocabulary, or more tokens than the model has positions.
    """
    check_prompt(model, prompt, sampling.max_new_tokens)
    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)
    chooser = Chooser(sampling, prompt, device, stop_ids, grammar)
    new = torch.tensor([list(prompt)], device=device)
    for _ in range(sampling.max_new_tokens):
        logits = None
        for part in new.split(chunk, dim=1):
            if cancelled():
                return
            logits = _forward(model, part, cache)
        assert logits is not None
        chosen = chooser.choose(logits[:vocab_size])
        yield chosen
        if chosen.finish:
            return
        new = torch.tensor([[chosen.id]], device=device)


def end_ids(model: "SidForCausalLM", tokenizer: "Tokenizer") -> tuple[int, ...]:
    """What ends a text: the tokenizer's end of text, and the ends that the model's generation config names."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(dict.fromkeys((tokenizer.eos_id, *(i for i in named if 0 <= i < tokenizer.vocab_size))))


def check_prompt(model: "SidForCausalLM", prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise SidError unless the model can continue this prompt by so many tokens."""
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not len(prompt):
        raise SidError("the prompt is empty")
    if len(prompt) + max_new_tokens > limit:
        raise SidError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones exceed the model's {limit} positions"
        )
    bad = next((i for i in prompt if not 0 <= i < vocab), None)
    if bad is not None:
        raise SidError(f"token id {bad} is outside the vocabulary of {vocab}")


@torch.inference_mode()
def _forward(model: "SidForCausalLM", ids: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (vocabulary,) in float32 behind the last of the ids (1, T)."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1].float()


class Chooser:
    """Chooses one token after another from logits, by the rules of one Sampling."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], device: torch.device, stop_ids: Collection[int], grammar: Any
    ) -> None:
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.grammar = grammar
        self.left = sampling.max_new_tokens
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._seen = torch.tensor([list(prompt)], device=device)
        self._counts: dict[int, int] = {}
        self._before = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._before.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> Chosen:
        """The next token. Raises SidError if the grammar has no token to go on with."""
        logprob, top = None, ()
        logprobs = logits.log_softmax(dim=-1) if self.sampling.top_logprobs is not None else None
        token = self._draw(self._biased(logits.clone()))
        if logprobs is not None:
            logprob = float(logprobs[token])
            values, ids = logprobs.topk(min(self.sampling.top_logprobs or 0, len(logprobs)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(id=token, logprob=logprob, top=top, finish=self._finish(token))

    def _biased(self, logits: Tensor) -> Tensor:
        """The logits (1, vocabulary) after penalties, biases and the grammar."""
        logits = self._before(self._seen, logits[None])  # type: ignore[arg-type]
        for token, count in self._counts.items():
            logits[0, token] -= self.sampling.presence_penalty + count * self.sampling.frequency_penalty
        for token, bias in self.sampling.logit_bias.items():
            logits[0, token] += bias
        if self.grammar is not None:
            logits[0].masked_fill_(~self.grammar.allowed(len(logits[0]), self.stop_ids).to(logits.device), -torch.inf)
        return logits

    def _draw(self, logits: Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        if self.sampling.temperature < 0.01:  # a quotient by less could overflow
            logits = logits - logits.amax(dim=-1, keepdim=True)
        chances = self._warpers(self._seen, logits).softmax(dim=-1)  # type: ignore[arg-type]
        return int(torch.multinomial(chances, 1, generator=self.generator))

    def _finish(self, token: int) -> str | None:
        """Notes the token; why it is the last one, or None."""
        self.left -= 1
        if token in self.stop_ids:
            return "stop"
        if self.grammar is not None:
            self.grammar.consume(token)
            if self.grammar.complete:
                return "stop"
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._before:
            self._seen = torch.cat((self._seen, self._seen.new_tensor([[token]])), dim=1)
        return "length" if self.left == 0 else None
