"""SidForSequenceClassification: one score, or a few, for a whole text; with one it is a reward model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from sidlm.models.config import SidConfig
from sidlm.models.modeling import SidModel, SidPreTrainedModel


class SidForSequenceClassification(SidPreTrainedModel):
    """SidModel and a linear head on the hidden state of each row's last token.

    Loaded from a language model's checkpoint, it takes over all but the output head and starts with a fresh ``score``.
    """

    def __init__(self, config: SidConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = SidModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, num_labels), and transformers' classification loss if labels are given.

        Args:
            attention_mask: (B, T), zero at padding, on either side; without it every row ends at its last position. The
                last token is found by it and never by an id: a text may well end with the padding token.
            labels: (B,) classes; (B,) or (B, num_labels) floats for a regression.
            kwargs: the other arguments of SidModel. A row is one text: packed rows are not told apart.

        Raises:
            ValueError: an attention_mask with an empty row, or what SidModel raises.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{"use_cache": False, **kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        scores = self.score(hidden[torch.arange(len(hidden), device=hidden.device), _last(hidden, attention_mask)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=scores, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=scores, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def _last(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B,) position of each row's last token."""
    b, t = hidden.shape[:2]
    if attention_mask is None:
        return torch.full((b,), t - 1, device=hidden.device)
    kept = attention_mask != 0
    if not torch.compiler.is_compiling() and not bool(kept.any(1).all()):
        raise ValueError(f"attention_mask: row {int((~kept.any(1)).nonzero()[0])} of {b} keeps no token")
    return (kept * torch.arange(1, t + 1, device=hidden.device)).argmax(1)
