"""What models that are spread over four gloo processes say of some rows, beside one process, in float64: FOLDER.

test_reading.py starts it. FOLDER/results.json gets {case: {what: difference}}.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parity import VOCABULARY, alone, build, relative, train
from ranks import run
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sidlm.evaluate import span_nll
from sidlm.evaluate.needle import Needle, reader_of
from sidlm.evaluate.nll import Span
from sidlm.parallel import reading
from sidlm.parallel.config import ParallelConfig, PipelineConfig
from sidlm.parallel.mesh import batch_share, build_mesh
from sidlm.parallel.reading import Reader
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train.observe import next_tokens

RANKS = 4
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "fsdp4 trilinear": ("trilinear", {}, {}),
    "hsdp 2x2 tied": ("tied", {"dp_replicate": 2}, {}),
    "tp2 x fsdp2 determinant": ("determinant", {"tp": 2}, {"recompute": "blocks"}),
    "tp4 llama, whole stream, gathered head": (
        "llama",
        {"tp": 4},
        {"sequence_parallel": False, "loss_parallel": False},
    ),
    "cp2 x fsdp2 trilinear": ("trilinear", {"cp": 2}, {"reshard_after_forward": True}),
    "cp2 x tp2 determinant": ("determinant", {"cp": 2, "tp": 2}, {}),
    "pp2 x fsdp2 tied, interleaved": ("tied", {"pp": 2}, {"pipeline": PipelineConfig(virtual_stages=2)}),
    "pp2 x tp2 trilinear": ("trilinear", {"pp": 2, "tp": 2}, {}),
    "pp2 x cp2 trilinear": ("trilinear", {"pp": 2, "cp": 2}, {}),
    "pp4 determinant": ("determinant", {"pp": 4}, {}),
    "ep2 x fsdp2 experts": ("experts", {}, {"ep": 2}),
    "ep2 x pp2 routed": ("routed", {"pp": 2}, {"ep": 2}),
    "tp2 x fsdp2 llama, compiled": ("llama", {"tp": 2}, {"compile": True}),
}
STEPPED = ("fsdp4 trilinear", "pp2 x fsdp2 tied, interleaved", "ep2 x fsdp2 experts", "tp2 x fsdp2 llama, compiled")
"""A training step follows there"""


def ties(vocabulary: int) -> float:
    """Rows of a head that is split over all processes, some of which may have none; whole numbers make exact ties."""
    draw = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randint(-1, 2, (n, 4), generator=draw).double() for n in (23, vocabulary))
    labels, noise = torch.arange(23) % 3, torch.randint(0, 2, (3, vocabulary), generator=draw).double()
    split: Any = distribute_tensor(weight, init_device_mesh("cpu", (RANKS,)), [Shard(0)], src_data_rank=None)
    return max(
        float((reading.choice(hidden, split, labels, more) - reading.choice(hidden, weight, labels, more)).abs().max())
        for more in (None, noise)
    )


def spans() -> list[Span]:
    """13, whose batches of 4 are not alike and divide by no share; of all lengths, scored from a third on."""
    draw = torch.Generator().manual_seed(3)
    lengths = [2, 3, 40, 17, 9, 31, 5, 2, 23, 12, 7, 29, 19]
    return [Span(torch.randint(VOCABULARY, (n,), generator=draw).tolist(), 1 + n // 3) for n in lengths]


def needles(model: Any) -> list[Needle]:
    """Five rows whose answers are what the model says, or but for one token."""
    draw, found = torch.Generator().manual_seed(4), []
    for i, length in enumerate((9, 21, 34, 14, 27)):
        ids = torch.randint(VOCABULARY, (length,), generator=draw)
        start = length - 4
        for at in range(start, length):
            ids[at] = model(input_ids=ids[None, :at]).logits[0, -1].argmax()
        ids[start + i % 4] = (ids[start + i % 4] + i % 2) % VOCABULARY
        found.append(Needle(ids, start, 0.0))
    return found


def said(reader: Reader, found: Sequence[Needle]) -> dict[str, torch.Tensor]:
    """All that is compared; the same on every process."""
    rows = torch.randint(VOCABULARY, (3, 22), generator=torch.Generator().manual_seed(5))
    labels = torch.where(rows % 3 == 0, -100, 0)
    return {
        "nll": torch.tensor(span_nll(reader, spans(), batch_size=4), dtype=torch.float64),
        "choices": reader.tokens(reading.choice, rows, labels, torch.zeros_like(rows)),
        "needles": torch.tensor(reader_of(reader)(found), dtype=torch.float64),
        "drawn": torch.tensor(
            next_tokens(reader, [rows[i, : 9 + 4 * i].tolist() for i in range(3)], 0.7, [1, 2, 3]), dtype=torch.float64
        ),
    }


def main(rank: int, folder: Path) -> None:
    # the compiler's own code generator would take most of the time
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    errors: dict[str, dict[str, float]] = {}
    for case, (name, sizes, settings) in CASES.items():
        model = build(name).eval()
        with torch.no_grad():
            found = needles(model)
        expected = said(Reader(model), found)
        assert expected["needles"].tolist() == [1, 0, 1, 0, 1]
        model = build(name)
        mesh = build_mesh(ParallelConfig(**sizes), "cpu")
        pipeline = parallelize(model, mesh, ShardConfig(precision="fp32", **settings))
        with torch.compiler.set_stance("force_eager"):
            own = said(Reader(model, mesh, pipeline), found)
        errors[case] = {key: float((own[key] - x).abs().max()) for key, x in expected.items()}
        assert all(isinstance(p, DTensor) for p in model.parameters()), "gathered weights are still there"
        if case in STEPPED:
            model = build(name)
            pipeline = parallelize(model, mesh, ShardConfig(precision="fp32", **settings))
            with torch.compiler.set_stance("force_eager"):
                said(Reader(model.eval(), mesh, pipeline), found)
            after = train(model.train(), batch_share(mesh), mesh, pipeline)
            errors[case]["step"] = max(relative(x, after[key]) for key, x in alone(name).items() if key in after)
    errors["ties"] = {str(n): ties(n) for n in (VOCABULARY, 3)}
    everyone: list[Any] = [None] * RANKS
    distributed.all_gather_object(everyone, errors)
    if rank == 0:
        worst = {c: {k: max(e[c][k] for e in everyone) for k in keys} for c, keys in errors.items()}
        (folder / "results.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    sys.exit(run(main, RANKS, Path(sys.argv[1])))
