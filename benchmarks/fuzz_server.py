"""Claim: whatever clients send, the server answers without a fault of its own and does not fall.

    pip install schemathesis
    python benchmarks/fuzz_server.py [--examples 300] [--json benchmarks/results/fuzz_server.json]

A model of random weights is served by `sid serve` in a process of its own. schemathesis reads the server's OpenAPI
document and sends what it allows and what it forbids, to every path and method, and checks each answer against the
document: status, content type, body, headers, refusal of invalid data. Its check that valid data is accepted is left
out: a document cannot say that one field needs another. Statuses are counted by the server's own metrics.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import torch

from sidlm.data.tokenizer import train_tokenizer
from sidlm.models import SidConfig, SidForCausalLM

TEXT = 'user assistant system the cat sees a small old red house; naïve café 数学 🎉 {"name": "f"} 12 34\n'
SAMPLE = re.compile(r'sid_http_requests_total\{method="(\w+)",path="([^"]+)",status="(\d+)"\} (\d+)')


def save_model(folder: Path) -> None:
    """All three kinds of layers, a context of 1,024 tokens."""
    tokenizer = train_tokenizer([TEXT * 5], 330, num_special=16)
    torch.manual_seed(0)
    config = SidConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6, simplicial_window=[7, 4],
        layer_types=["full_attention", "simplicial_attention", "sliding_attention"], max_position_embeddings=1024,
        initializer_range=0.2, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    SidForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)


def statuses(base: str) -> dict[str, int]:
    """Requests by status, asked of the server; asking shows that it is up."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=60) as answer:
        counted: dict[str, int] = {}
        for _, _, status, count in SAMPLE.findall(answer.read().decode()):
            counted[status] = counted.get(status, 0) + int(count)
    return counted


def fuzz(base: str, args: argparse.Namespace) -> dict:
    """Run schemathesis; what it said, and what the server counted."""
    command = [
        "schemathesis", "run", f"{base}/openapi.json", "--checks", "all", "--exclude-checks",
        "positive_data_acceptance", "--max-examples", str(args.examples), "--seed", str(args.seed),
        "--continue-on-failure", "--workers", "2", "--request-timeout", "120", "--no-color",
    ]  # fmt: skip
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[done.stdout.find("=== SUMMARY") :])
    cases = re.search(r"(\d+) generated", done.stdout)
    failed = sum(map(int, re.findall(r"❌ ST\d+.*?: (\d+)", done.stdout)))
    if done.returncode and not args.keep_going:
        print(done.stdout[:20_000])
    return {
        "schemathesis_status": done.returncode,
        "cases": int(cases[1]) if cases else None,
        "failures": failed,
        "seconds": round(time.time() - start, 1),
        "statuses": statuses(base),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--keep-going", action="store_true", help="do not print what failed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        server = subprocess.Popen(
            [sys.executable, "-m", "sidlm.cli.main", "serve", folder, "--port", "0", "--max-new-tokens", "16"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            base = server.stdout.readline().split()[-1].removesuffix("/v1")
            result = fuzz(base, args)
            server.send_signal(signal.SIGTERM)
            _, log = server.communicate(timeout=60)
        finally:
            server.kill()
    result |= {"server_status": server.returncode, "tracebacks": log.count("Traceback")}
    faults = sum(count for status, count in result["statuses"].items() if status.startswith("5"))
    result |= {"requests": sum(result["statuses"].values()), "faults_5xx": faults}
    facts = {name: version(name) for name in ("schemathesis", "fastapi", "uvicorn", "pydantic", "torch")}
    facts |= {"python": platform.python_version(), "cores": os.cpu_count(), "examples": args.examples}
    facts["seed"] = args.seed
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps({"facts": facts, "result": result}, indent=1) + "\n")
    if result["tracebacks"]:
        print(log[-5000:])
    sys.exit(bool(faults or result["tracebacks"] or result["failures"] or result["server_status"]))


if __name__ == "__main__":
    main()
