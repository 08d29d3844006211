"""A portable folder loads with trust_remote_code where sidlm is not, with the same logits and the same text."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidlm.data.tokenizer import train_tokenizer
from sidlm.errors import SidError
from sidlm.models import SidConfig, SidForCausalLM
from sidlm.models.convert.run import add_code, convert, open_checkpoint

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "mixed": {"rope_parameters": LLAMA3},
    "determinant": {},
    "no_norm": {"tie_word_embeddings": True, "mlp_type": "squared_relu", "mlp_sparsity": "2:4"},
    "full": {"num_local_experts": 4, "num_shared_experts": 1, "moe_intermediate_size": 16, "moe_gate": "sigmoid"},
    "trilinear": {"mlp_type": "squared_relu", "num_local_experts": 3, "num_experts_per_tok": 1,
                  "simplicial_window": [4, 7], "simplicial_scale": 0.4},
}  # fmt: skip

SCRIPT = """
import sys
sys.modules["sidlm"] = None  # as where it is not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
root, *names = sys.argv[1:]
out = {}
for name in names:
    x = load_file(f"{root}/{name}.inputs")
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        out[name + ".plain"] = model(x["ids"]).logits
        out[name + ".padded"] = model(x["ids"], attention_mask=x["mask"]).logits
        out[name + ".packed"] = model(x["ids"], position_ids=x["positions"], use_cache=False).logits
        options = dict(attention_mask=x["mask"], do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
        out[name + ".text"] = model.generate(x["ids"], **options)
        if name == "mixed":
            out[name + ".beams"] = model.generate(x["ids"], num_beams=2, **options)
        out[name + ".static"] = model.generate(x["ids"], cache_implementation="static", **options)
        one = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        out[name + ".lookup"] = model.generate(x["ids"][:1], prompt_lookup_num_tokens=3, **one)
    loss = model.train()(x["ids"], labels=x["ids"]).loss
    loss.backward()
    out[name + ".grad"] = model.model.layers[1].self_attn.q_proj.weight.grad
    model.save_pretrained(f"{root}/{name}-again")
text = AutoTokenizer.from_pretrained(f"{root}/mixed", trust_remote_code=True)("the house", return_tensors="pt")
out["tokens"] = text.input_ids
save_file({k: v.contiguous() for k, v in out.items()}, f"{root}/out")
"""


def test_logits_text_and_gradients_without_sidlm(tmp_path, model_of, ids):
    expected = {}
    tokenizer = train_tokenizer(["the tree and the house"] * 3, 280, num_special=11)
    for name, overrides in MODELS.items():
        model = model_of(name, **overrides)
        model.save_pretrained(tmp_path / "saved" / name)
        tokenizer.save(tmp_path / "saved" / name)
        (tmp_path / name).mkdir()
        convert(open_checkpoint(tmp_path / "saved" / name), tmp_path / name, portable=True)
        x = ids(2, 30)
        mask = torch.ones_like(x)
        mask[0, :9] = 0
        positions = torch.cat((torch.arange(11), torch.arange(19)))[None].expand(2, -1).contiguous()
        save_file({"ids": x, "mask": mask, "positions": positions}, tmp_path / f"{name}.inputs")
        with torch.no_grad():
            expected[name + ".plain"] = model(x).logits
            expected[name + ".padded"] = model(x, attention_mask=mask).logits
            expected[name + ".packed"] = model(x, position_ids=positions).logits
            options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0,
                       "eos_token_id": None}  # fmt: skip
            expected[name + ".text"] = model.generate(x, **options)
            expected[name + ".static"] = expected[name + ".text"]
            if name == "mixed":
                expected[name + ".beams"] = model.generate(x, num_beams=2, **options)
            one = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
            expected[name + ".lookup"] = model.generate(x[:1], **one)
        model.train()(x, labels=x).loss.backward()
        expected[name + ".grad"] = model.model.layers[1].self_attn.q_proj.weight.grad
    expected["tokens"] = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("the house")]])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    if "PYTHONPATH" in os.environ:  # a layered environment; sidlm itself is blocked by the script
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *MODELS]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    got = load_file(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            scale = value.abs().max().item()
            real = load_file(tmp_path / f"{name.split('.')[0]}.inputs")["mask"].bool()
            a, b = (got[name][real], value[real]) if name.endswith("padded") else (got[name], value)
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(got[name], value), name
    for name in MODELS:  # what the portable class saves is a whole portable folder, and Sid's
        assert (tmp_path / f"{name}-again" / "modeling_sid.py").is_file()
        assert SidForCausalLM.from_pretrained(tmp_path / f"{name}-again").config.layer_types


def test_a_portable_folder_is_still_sids(tmp_path, model_of, ids):
    model_of("mixed").save_pretrained(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "out", portable=True)
    model = SidForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(ids(1, 9)).logits, model_of("mixed")(ids(1, 9)).logits)
    # saved on its own it names no code that is not there
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_the_configs_have_the_same_fields():
    from dataclasses import fields

    from sidlm.models.portable import modeling_sid

    ours, theirs = ({f.name: f.default for f in fields(c)} for c in (SidConfig, modeling_sid.SidConfig))
    assert ours == theirs


def test_what_the_portable_code_cannot_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"mlp_precision": "fp8"}))
    with pytest.raises(SidError, match="no mlp_precision, the model has 'fp8'"):
        add_code(tmp_path)
