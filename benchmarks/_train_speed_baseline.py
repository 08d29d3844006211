"""The baseline of benchmarks/train_speed.py: transformers' LlamaForCausalLM in a loop tuned by hand.

SDPA (causal, on torch's best kernel), every decoder layer compiled, output head and cross-entropy compiled into one
graph that never holds logits in fp32, fused AdamW, gradients set to None, pinned batches, one wait for the device in a
step, as in sid train. "autocast": fp32 weights under bf16 autocast, as sid train has them; "bf16": weights, gradients
and optimizer state in bf16, which is faster and loses small updates.
"""

import time
from collections.abc import Iterator

import torch
from _train_speed_rows import Size
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.models import preset


def llama(size: Size, device: torch.device, kind: str) -> LlamaForCausalLM:
    config = preset(size.preset, arch="llama", vocab_size=size.vocab, num_hidden_layers=size.layers)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")  # fmt: skip
    fields = {name: getattr(config, name) for name in names}
    wanted = LlamaConfig(**fields, max_position_embeddings=size.seq_len, attn_implementation="sdpa", use_cache=False)
    with torch.device(device):
        model = LlamaForCausalLM(wanted)
    return model.to(torch.bfloat16) if kind == "bf16" else model.float()


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def steps(size: Size, device: torch.device, kind: str, rows: int) -> Iterator[float]:
    """Seconds of one step after the other, without end; rows: of a micro-batch."""
    torch.manual_seed(0)
    model, loss_of, cuda = llama(size, device, kind).train(), head_loss, device.type == "cuda"
    if cuda:
        loss_of = torch.compile(head_loss)
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, stream = size.batch_size * size.seq_len, torch.bfloat16 if cuda else torch.float32
    while True:
        batch = torch.randint(0, size.vocab, (size.batch_size, size.seq_len + 1))
        batch = batch.pin_memory() if cuda else batch
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for first in range(0, size.batch_size, rows):
            ids = batch[first : first + rows].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda and kind == "autocast"):
                # a residual stream in bf16, as in sid train: autocast alone leaves it in fp32
                embedded = model.model.embed_tokens(ids[:, :-1]).to(stream)
                hidden = model.model(inputs_embeds=embedded).last_hidden_state
                loss = loss_of(hidden, model.lm_head.weight, ids[:, 1:]) / tokens
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.stack((total.float(), norm.float())).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - started
