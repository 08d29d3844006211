"""Claim: on a CPU, Sid's dense Llama shape trains and generates at least as fast as transformers' LlamaForCausalLM.

    python benchmarks/cpu_vs_transformers.py [--json benchmarks/results/cpu_vs_transformers.json]

Both models hold the same float32 weights, in one process; their repetitions alternate and the first of each is
discarded. A ratio is transformers' time over Sid's within one repetition, so that what slows the machine for a while
slows both; above 1 Sid is faster. Training is forward and backward with the loss: transformers with `labels`, Sid with
`shift_labels` (how it trains) and with `labels` (the loss transformers' way). Generation is greedy `generate` of both,
one row, which must give the same tokens; and, without what `generate` costs, a bare loop of argmax over a cache: of
transformers' model, of Sid's, and Sid's own decoding (`sidlm.serve.decode`, what `sid generate` and the server run).
"sid arch" is Sid's own arch (every fourth layer 2-simplicial, squared ReLU, the same number of parameters), for
information.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sidlm.models import SidForCausalLM, preset
from sidlm.serve.decode import Sampling, decode

CASES = {
    "nano": {"batch": 8, "shape": {}},
    "micro": {"batch": 8, "shape": {}},
    "28M": {
        "batch": 4,
        "shape": {
            "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
        },
    },
}  # fmt: skip
"""Preset, or a shape of its own (that of the 27.8 M model that peers were measured with); rows of a training step."""
SEQ_LEN, PROMPT, NEW = 512, 64, 128
PEER = "transformers"


def build(name: str, shape: dict) -> dict[str, torch.nn.Module]:
    """The peer, Sid with the peer's weights, and Sid's own arch."""
    base = name if name in ("nano", "micro") else "micro"
    llama, own = (preset(base, arch=arch, **shape) for arch in ("llama", "sid"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps",
             "rope_parameters")  # fmt: skip
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**{field: getattr(llama, field) for field in names}))
    sid = SidForCausalLM(llama)
    sid.load_state_dict(peer.state_dict())
    return {PEER: peer, "sid": sid, "sid arch": SidForCausalLM(own)}


def training(models: dict[str, torch.nn.Module], batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What one repetition runs: name -> forward and backward, returning the loss."""
    ids = torch.randint(models[PEER].config.vocab_size, (batch, SEQ_LEN))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def step(model: torch.nn.Module, **labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            model.zero_grad()
            loss = model(ids, **labels).loss
            loss.backward()
            return loss.detach()

        return run

    for model in models.values():
        model.train()
    runs = {PEER: step(models[PEER], labels=ids, use_cache=False), "sid": step(models["sid"], shift_labels=shifted)}
    runs |= {"sid, labels": step(models["sid"], labels=ids), "sid arch": step(models["sid arch"], shift_labels=shifted)}
    losses = [runs[name]() for name in (PEER, "sid", "sid, labels")]
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-5, atol=0.0)
    for name, ours in models["sid"].named_parameters():
        theirs = models[PEER].get_parameter(name).grad
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    return runs


def generation(models: dict[str, torch.nn.Module]) -> dict[str, Callable[[], torch.Tensor]]:
    """What one repetition runs: name -> greedy generation, returning the tokens."""
    prompt = torch.randint(models[PEER].config.vocab_size, (1, PROMPT))
    fixed = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "min_new_tokens": NEW}
    for model in models.values():
        model.eval()
    runs = {
        name: lambda model=model: model.generate(prompt, do_sample=False, **fixed) for name, model in models.items()
    }
    assert torch.equal(runs[PEER](), runs["sid"]()), "the two models generate different tokens"
    return runs


def bare_loop(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Greedy tokens (1, PROMPT + NEW) with nothing around the model but a cache and an argmax."""
    cache, tokens = DynamicCache(config=model.config), [prompt]
    with torch.inference_mode():
        for _ in range(NEW):
            logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def loops(models: dict[str, torch.nn.Module]) -> dict[str, Callable[[], torch.Tensor]]:
    """What one repetition runs: name -> greedy generation without `generate`, returning the tokens."""
    prompt = torch.randint(models[PEER].config.vocab_size, (1, PROMPT))

    def own(model: torch.nn.Module) -> torch.Tensor:
        greedy = Sampling(max_new_tokens=NEW, temperature=0)
        chosen = decode(model, prompt[0].tolist(), greedy, stop_ids=())
        return torch.tensor([[*prompt[0].tolist(), *(c.id for c in chosen)]])

    for model in models.values():
        model.eval()
    runs = {name: lambda model=model: bare_loop(model, prompt) for name, model in models.items()}
    runs["sid, decode"] = lambda: own(models["sid"])
    assert torch.equal(runs[PEER](), runs["sid"]()) and torch.equal(runs[PEER](), runs["sid, decode"]())
    return runs


def measure(runs: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition but the first, alternating between the runs."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rows(case: str, what: str, tokens: int, seconds: dict[str, list[float]]) -> list[dict]:
    """One row per run, printed on the way."""
    out = []
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[PEER], times, strict=True)]
        speed = tokens / statistics.median(times)
        out.append({"case": case, "what": what, "model": name, "seconds": spread(times), "tokens_per_second": speed})
        out[-1]["ratio"] = spread(ratios)
        s, r = out[-1]["seconds"], out[-1]["ratio"]
        print(
            f"{case:<6}{what:<10}{name:<14}{s['median']:>8.3f} s ({s['min']:.3f}-{s['max']:.3f}){speed:>8.0f} tok/s"
            f"{r['median']:>7.2f}x ({r['min']:.2f}-{r['max']:.2f})",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    facts |= {"seq_len": SEQ_LEN, "prompt": PROMPT, "new": NEW, "repeats": args.repeats}
    facts["load_average_before"] = os.getloadavg()
    results = []
    for name in args.only:
        case = CASES[name]
        models = build(name, case["shape"])
        tokens = case["batch"] * SEQ_LEN
        results += rows(name, "train", tokens, measure(training(models, case["batch"]), args.repeats))
        results += rows(name, "generate", NEW, measure(generation(models), args.repeats))
        results += rows(name, "bare loop", NEW, measure(loops(models), args.repeats))
    facts["load_average_after"] = os.getloadavg()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"facts": facts, "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
