"""Scores of whole texts: the last token's, wherever padding lies."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sidlm.models import SidForSequenceClassification


def scorer(config, seed=0):
    torch.manual_seed(seed)
    return SidForSequenceClassification(config).eval().double()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_scores_as_it_does_alone(config_of, kind, ids, side):
    model = scorer(config_of(kind, num_labels=1))
    long, short = ids(1, 11), ids(1, 6, seed=1)
    short[0, -1] = 0  # the padding id as the last real token
    pads = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.ones(2, 11, dtype=torch.long)
    if side == "left":
        rows, mask[1, :5] = torch.cat((pads, short), 1), 0
    else:
        rows, mask[1, 6:] = torch.cat((short, pads), 1), 0
    together = model(torch.cat((long, rows)), attention_mask=mask).logits
    alone = torch.cat((model(long).logits, model(short).logits))
    assert together.shape == (2, 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs() > 1e-3


def test_the_score_is_the_head_on_the_last_hidden_state(config_of, ids):
    model, tokens = scorer(config_of("mixed", num_labels=3)), ids(2, 9)
    hidden = model.model(tokens).last_hidden_state
    torch.testing.assert_close(model(tokens).logits, hidden[:, -1] @ model.score.weight.T)
    labels = torch.tensor([2, 0])
    want = torch.nn.functional.cross_entropy(model(tokens).logits, labels)
    torch.testing.assert_close(model(tokens, labels=labels).loss, want)
    assert torch.equal(model(tokens, return_dict=False)[0], model(tokens).logits)


def test_a_language_model_becomes_a_reward_model(model_of, ids, tmp_path):
    language, tokens = model_of("mixed"), ids(2, 9)
    language.save_pretrained(tmp_path / "language")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language", num_labels=1)
    assert isinstance(reward, SidForSequenceClassification)
    assert torch.equal(reward.model(tokens).last_hidden_state, language.model(tokens).last_hidden_state)
    reward.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert torch.equal(again(tokens).logits, reward(tokens).logits)


def test_a_row_of_padding_is_refused(config_of, ids):
    mask = torch.tensor([[1] * 6, [0] * 6])
    with pytest.raises(ValueError, match="row 1 of 2 keeps no token"):
        scorer(config_of("mixed", num_labels=1))(ids(2, 6), attention_mask=mask)
