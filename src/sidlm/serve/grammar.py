"""Output that must match a JSON schema, by way of llguidance (optional, in the extra "serve")."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sidlm.data.tokenizer import Tokenizer
from sidlm.errors import SidError


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Raises SidError if llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise SidError("JSON-constrained output needs llguidance: pip install 'sidlm[serve]'") from error
        self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_id)

    def json(self, schema: Mapping[str, Any]) -> "Grammar":
        """JSON of this schema, without white space between its parts: a model could go on with that for ever.

        Raises SidError for what is no schema, and for keywords that llguidance would have to ignore.
        """
        from llguidance import LLMatcher

        overrides: Any = {"whitespace_flexible": False, "lenient": False}
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=overrides)
        except (TypeError, ValueError, RecursionError) as error:
            raise SidError(f"not a JSON schema: {error}") from error
        return Grammar(LLMatcher(self._tokenizer, text, log_level=0))

    def call(self, tools: Sequence[Mapping[str, Any]]) -> "Grammar":
        """One call of one of these functions ({"name", "parameters": schema}), in the tool format "json"."""
        return self.json({"anyOf": [_call_schema(tool) for tool in tools]})


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        "type": {"const": "function"},
        "name": {"const": tool["name"]},
        "parameters": tool.get("parameters") or {"type": "object"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class Grammar:
    """How far a text has come in a grammar. Raises SidError for a grammar that cannot be, or is too large."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self, vocab_size: int, stop_ids: Collection[int]) -> Tensor:
        """(vocab_size,) bool: the tokens that may come next; stop_ids where the text may end."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        known = bits.flatten()[:vocab_size].bool()
        mask[: len(known)] = known
        mask[list(stop_ids)] = self._matcher.is_accepting()
        if not mask.any():
            raise SidError("the JSON schema cannot be followed: the vocabulary has no token to go on with")
        return mask

    def consume(self, token: int) -> None:
        """Go on by one token that was allowed."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> "Grammar":
        """The same place in the grammar, to go on from independently."""
        return Grammar(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SidError(f"the JSON schema cannot be followed: {' '.join(self._matcher.get_error().split())[:500]}")
