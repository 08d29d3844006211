"""Direct preference optimisation as Llama 3 does it (arXiv 2407.21783, section 4.1.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import DPOTrainer

from sidlm.post.formatting import formatting_mask


class Llama3DPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with Llama 3's two changes to the loss:

        loss = -log sigmoid(beta * (r_chosen - r_rejected)) + nll_weight * mean_i(-log p(chosen_i)),

    where r is the policy's summed log-likelihood minus the reference's, over a response's tokens without headers and
    terminations, in both responses: shared by the two, they would be pushed up and down at once, and models learnt to
    repeat tails or to stop at once. The second term is over all tokens of the chosen response, those included, which
    keeps the format alive; it is the mean over each response's tokens, then over the responses (as in the work that
    the paper follows, arXiv 2404.19733), so that a long answer counts as much as a short one.

    Everything else is DPOTrainer's: beta (0.1 in its config, as in the paper), LoRA, precomputed references, other
    losses for the first term. The term is logged as ``nll_loss``.

    Args:
        nll_weight: weight of the second term; the paper's is 0.2.
        args, kwargs: DPOTrainer's.

    Raises:
        ValueError: a negative nll_weight, or ``loss_type="sft"`` besides it: TRL's form of the same term.
    """

    def __init__(self, *args: Any, nll_weight: float = 0.2, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if nll_weight < 0:
            raise ValueError(f"nll_weight must not be negative, got {nll_weight}")
        if nll_weight and "sft" in self.loss_types:
            raise ValueError(
                f"loss_type 'sft' is the likelihood of the chosen responses, and so is nll_weight {nll_weight}: "
                "take one of them"
            )
        self.nll_weight = nll_weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss with formatting tokens out of its completion mask, plus the weighted likelihood term."""
        policy = _Policy(model, inputs["input_ids"], inputs["completion_mask"])
        result = super().compute_loss(policy, self._without_format(inputs), return_outputs, num_items_in_batch)  # pyright: ignore[reportArgumentType]
        nll = policy.nll()
        gathered: Any = self.accelerator.gather_for_metrics(nll.detach())
        self._metrics["train" if model.training else "eval"]["nll_loss"].append(gathered.mean().item())
        if return_outputs:
            return result[0] + self.nll_weight * nll, result[1]
        return result + self.nll_weight * nll

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The reference's log-likelihoods, of the same tokens as the policy's."""
        return super().compute_ref_log_probs(model, self._without_format(inputs))

    def _without_format(self, inputs: dict[str, Any]) -> dict[str, Any]:
        formatting = formatting_mask(inputs["input_ids"], self._tokenizer)
        return {**inputs, "completion_mask": inputs["completion_mask"].masked_fill(formatting, 0)}


class _Policy:
    """The policy as TRL calls it for its loss, which asks for the log-probabilities of the tokens it wants.

    It gets them, and in the same pass those of all completion tokens are computed and kept for the likelihood term.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, completion_mask: Tensor):
        self.model = model
        self.labels = input_ids.masked_fill(completion_mask == 0, -100)
        self.log_probs: Tensor | None = None

    def __call__(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:  # the logits that TRL hands to compute_metrics
            return self.model(**kwargs)
        outputs = self.model(labels=self.labels, **kwargs)
        # from the end, for a prompt-learning adapter puts positions of its own in front
        log_probs: Tensor = outputs.log_probs[:, 1 - labels.shape[1] :]
        self.log_probs = log_probs
        outputs.log_probs = log_probs.masked_fill(labels[:, 1:] == -100, 0)
        return outputs

    def nll(self) -> Tensor:
        """Mean over the chosen responses, the first half of the batch, of their mean negative log-likelihood."""
        assert self.log_probs is not None, "TRL computed its loss without a forward pass of the policy"
        chosen, _ = self.log_probs.chunk(2)
        count = (self.labels[: len(chosen), 1:] != -100).sum(1)
        return -(chosen.sum(1) / count.clamp_min(1)).mean()
