"""The baseline of benchmarks/train_speed.py: transformers' LlamaForCausalLM in a loop tuned by hand.

SDPA, torch.compile over the whole model, fused AdamW, gradients set to None, pinned batches, one wait for the device in
a step, as in sid train. "autocast": fp32 weights under bf16 autocast, as sid train has them; "bf16": weights, gradients
and optimizer state in bf16, which is faster and loses small updates.
"""

import time
from collections.abc import Iterator

import torch
from _train_speed_rows import Size
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


def steps(size: Size, device: torch.device, kind: str, rows: int) -> Iterator[float]:
    """Seconds of one step after the other, without end; rows: of a micro-batch."""
    torch.manual_seed(0)
    model = llama(size, device, kind).train()
    compiled = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    cuda = device.type == "cuda"
    while True:
        batch = torch.randint(0, size.vocab, (size.batch_size, size.seq_len))
        batch = batch.pin_memory() if cuda else batch
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for first in range(0, size.batch_size, rows):
            ids = batch[first : first + rows].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda and kind == "autocast"):
                loss = compiled(input_ids=ids, labels=ids).loss * (rows / size.batch_size)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.stack((total.float(), norm.float())).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - started
