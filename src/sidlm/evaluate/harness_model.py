"""The harness's view of a model; imports lm_eval, which `sidlm.evaluate.harness` does only when asked."""

from __future__ import annotations

from typing import Any

from lm_eval.models import huggingface

from sidlm.errors import SidError

HFLM: Any = huggingface.HFLM  # its decorator hides its type


class HarnessModel(HFLM):
    """HFLM on a loaded model: log-probabilities in float32 whatever the weights' dtype, and long prompts cut as
    `score_task` cuts them: HFLM drops the begin-of-text token with what follows it, and tells nobody. The likelihood
    of whole texts does not count that of a begin-of-text token.

    cut: (prompt, answer) of the requests that were cut.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_len: int):
        # one position less: it counts inputs, of which the answer's last token is none
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_len - 1,
            softmax_dtype="float32",
        )  # fmt: skip
        self.bos, self.longest = tokenizer.bos_token_id, max_len
        self.cut: set[tuple[str, str]] = set()

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return super()._loglikelihood_tokens([self._fit(request) for request in requests], *args, **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # HFLM puts a begin-of-text token before the text and scores the tokenizer's own one behind it
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before

    def _fit(self, request: tuple[tuple[str, str], list[int], list[int]]) -> Any:
        texts, prompt, answer = request
        if len(answer) >= self.longest:
            raise SidError(f"an answer of {len(answer)} tokens does not fit in {self.longest}: {texts[1][:60]!r}")
        if len(prompt) + len(answer) > self.longest:
            self.cut.add(texts)
            head = prompt[:1] if prompt[0] == self.bos else []
            rest = self.longest - len(answer) - len(head)
            prompt = head + prompt[len(prompt) - rest :] if rest else head
        return texts, prompt, answer
