"""Llama 3's DPO loss against its formula, on whole logits in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig

from sidlm.post.formatting import formatting_mask
from sidlm.post.preference import Llama3DPOTrainer

BETA, WEIGHT = 0.1, 0.2


def say(role, content):
    return {"role": role, "content": content}


# the first pair's answers hold a header inside, the others end where they end
PAIRS = [
    {
        "prompt": [say("user", "Say red cat")],
        "chosen": [say("assistant", "red"), say("user", "more"), say("assistant", "cat, red cat.")],
        "rejected": [say("assistant", "No dog!")],
    },
    {"prompt": [say("user", "Say red")], "chosen": [say("assistant", "red")], "rejected": [say("assistant", "a big")]},
    {"prompt": [say("user", "Say")], "chosen": [say("assistant", "old road")], "rejected": [say("assistant", "new")]},
]


@pytest.fixture
def trainer_of(common, tmp_path):
    def build(*, reference=True, trainer=Llama3DPOTrainer, peft_config=None, config=None, **kwargs):
        model, tokenizer = common.toy_model(0)
        ref = None
        if reference:
            ref = copy.deepcopy(model)
            torch.manual_seed(1)
            for weight in ref.parameters():
                weight.data += 0.03 * torch.randn_like(weight)
        settings = {"beta": BETA, "per_device_train_batch_size": 3, "max_steps": 1, "gradient_checkpointing": False}
        args = DPOConfig(str(tmp_path), **settings | (config or {}), **common.on_this_machine())
        data = Dataset.from_list(PAIRS)
        return trainer(
            model=model, ref_model=ref, args=args, train_dataset=data, processing_class=tokenizer,
            peft_config=peft_config, **kwargs,
        )  # fmt: skip

    return build


def batch_of(trainer):
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    return trainer.data_collator([{k: row[k] for k in columns if k in row} for row in trainer.train_dataset])


def token_log_probs(model, batch):
    """(2B, T) float64, at the position of the token itself; zero at the first."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return F.pad(log_probs, (1, 0))


def by_hand(trainer, batch, weight=WEIGHT):
    tokenizer = trainer.processing_class
    special = [tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("start_header_id", "end_header_id", "eot_id")]
    policy, reference = token_log_probs(trainer.model, batch), token_log_probs(trainer.ref_model, batch)
    ratios, nlls = [], []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        total = nll = 0.0
        count, header = 0, False
        for t, token in enumerate(ids):
            header = (header or token == special[0]) and token != special[1]
            if batch["completion_mask"][row, t]:
                nll -= policy[row, t].item()
                count += 1
                if not header and token not in special:
                    total += (policy[row, t] - reference[row, t]).item()
        ratios.append(total)
        nlls.append(nll / count)
    half = len(ratios) // 2
    margins = [chosen - rejected for chosen, rejected in zip(ratios[:half], ratios[half:], strict=True)]
    preference = sum(math.log1p(math.exp(-BETA * margin)) for margin in margins) / half
    return preference + weight * sum(nlls[:half]) / half, sum(nlls[:half]) / half


def test_the_loss_is_the_formulas(trainer_of):
    trainer = trainer_of()
    batch = batch_of(trainer)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    want, nll = by_hand(trainer, batch)
    assert loss.item() == pytest.approx(want, rel=2e-6)
    assert trainer._metrics["train"]["nll_loss"] == [pytest.approx(nll, rel=2e-6)]
    # the mask and the mean over responses matter on these pairs
    trls = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, WEIGHT]}
    other = trainer_of(trainer=Llama3DPOTrainer.__base__, config=trls)
    with torch.no_grad():
        assert abs(other.compute_loss(other.model, batch).item() - want) > 1e-3


def test_references_computed_beforehand_are_of_the_same_tokens(trainer_of):
    trainer = trainer_of(config={"precompute_ref_log_probs": True})
    trainer.get_train_dataloader()
    batch = batch_of(trainer)
    assert "ref_chosen_logps" in batch
    want, _ = by_hand(trainer_of(), batch)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(want, rel=2e-6)


def hidden_gradients(trainer, batch):
    """(2B, T), largest gradient of the last hidden state at each position: zero iff that of its logits is zero."""
    seen = []

    def keep(module, args, output):
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    handle = trainer.model.model.register_forward_hook(keep)
    trainer.compute_loss(trainer.model, batch).backward()
    handle.remove()
    (hidden,) = seen
    return hidden.grad.abs().amax(-1)


def test_formatting_tokens_get_no_gradient_from_the_preference(trainer_of):
    trainer = trainer_of(nll_weight=0.0)
    batch = batch_of(trainer)
    formatting = formatting_mask(batch["input_ids"], trainer.processing_class)
    completion = batch["completion_mask"].bool()
    masked, kept = (F.pad(mask[:, 1:], (0, 1)) for mask in (completion & formatting, completion & ~formatting))
    assert masked.sum() >= 6 + 6  # an eot in each answer, a header and its role in one, twice an eot there
    gradient = hidden_gradients(trainer, batch)
    assert gradient[masked].max() == 0 and gradient[kept].min() > 0
    assert gradient[~masked & ~kept].max() == 0  # prompts and padding


def test_the_likelihood_term_keeps_the_format_of_chosen_answers(trainer_of):
    trainer = trainer_of()
    batch = batch_of(trainer)
    formatting = formatting_mask(batch["input_ids"], trainer.processing_class)
    masked = F.pad((batch["completion_mask"].bool() & formatting)[:, 1:], (0, 1))
    gradient = hidden_gradients(trainer, batch)
    assert gradient[:3][masked[:3]].min() > 0 and gradient[3:][masked[3:]].max() == 0


def test_adapters_start_at_their_own_reference(trainer_of):
    trainer = trainer_of(reference=False, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    (nll,) = trainer._metrics["train"]["nll_loss"]
    assert loss == pytest.approx(math.log(2) + WEIGHT * nll, rel=1e-6)
    trainer.train()


def test_evaluation_logs_its_own_likelihood(trainer_of):
    trainer = trainer_of()
    found = trainer.evaluate(trainer.train_dataset)
    want, nll = by_hand(trainer, batch_of(trainer))
    assert found["eval_nll_loss"] == pytest.approx(nll, rel=2e-6)
    assert found["eval_loss"] == pytest.approx(want, rel=2e-6)


def test_settings_that_do_not_fit(trainer_of):
    with pytest.raises(ValueError, match="nll_weight must not be negative, got -1"):
        trainer_of(nll_weight=-1)
    with pytest.raises(ValueError, match="take one of them"):
        trainer_of(config={"loss_type": ["sigmoid", "sft"]})


def test_formatting_mask(common):
    _, tokenizer = common.toy_model(0)
    chat = [say("user", "red"), say("assistant", "cat")]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    left = tokenizer.decode(ids[0][~formatting_mask(ids, tokenizer)[0]])
    assert left == "\n\nred\n\ncat"
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    start, end, eot = tokenizer.convert_tokens_to_ids(names)
    rows = torch.tensor([[5, start, 6, 7], [5, end, 6, eot], [start, 6, end, 7], [start, 6, start, end]])
    want = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(formatting_mask(rows, tokenizer), want)
