"""Weights at odd places of their file get aligned memory, once, and the same bits."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.models import SidForCausalLM, loading


def save_odd(folder, **sizes) -> LlamaForCausalLM:
    """A Llama whose tensors lie at 8 bytes past a multiple of 64 in their file."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | sizes
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (-(8 + len(header)) % 64 + 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return model


@pytest.mark.parametrize("way", ["file", "no maps", "file is gone", "file is short"])
def test_aligned_and_bit_equal(tmp_path, monkeypatch, way):
    saved = save_odd(tmp_path)
    mappings, used = loading._file_mappings, []

    def replaced():
        found = [] if way == "no maps" else mappings()
        used.extend(found)
        if way == "file is gone":
            found = [m._replace(path=str(tmp_path / "elsewhere")) for m in found]
        if way == "file is short":
            (tmp_path / "short").write_bytes(b"")
            found = [m._replace(path=str(tmp_path / "short")) for m in found]
        return found

    monkeypatch.setattr(loading, "_file_mappings", replaced)
    model = SidForCausalLM.from_pretrained(tmp_path)
    expected = saved.state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() % 64 == 0 and torch.equal(parameter, expected[name]), name
    if sys.platform == "linux" and way != "no maps":
        assert used, "nothing was read from the file: it was not mapped at odd addresses"


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights(tmp_path):
    save_odd(tmp_path, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=8192)
    weights = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "small").mkdir()
    save_odd(tmp_path / "small")
    SidForCausalLM.from_pretrained(tmp_path / "small")  # imports what it needs
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before = status("VmRSS")
    model = SidForCausalLM.from_pretrained(tmp_path)
    assert weights > 150e6 and sum(p.numel() for p in model.parameters()) * 4 > 0.99 * weights
    # the first byte of a mapped tensor, where the reader looks, brings up to one large page of the file with it
    looked_at = len(list(model.parameters())) * (2 << 20)
    assert status("VmHWM") - before < 1.1 * weights + looked_at < 1.4 * weights
