"""Context parallelism over two and four gloo processes against one process, and the arithmetic of its chunks."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sidlm.models import SidConfig
from sidlm.parallel.chunks import chunk_length, chunks_of, cut, cut_documents, halo_pieces, holder, join
from sidlm.parallel.context import ContextParallel, context_parallel
from sidlm.parallel.traffic import layer_traffic

PROGRAM = Path(__file__).with_name("context_ranks.py")
spec = importlib.util.spec_from_file_location("context_ranks", PROGRAM)
assert spec is not None and spec.loader is not None
ranks_of_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks_of_test)
batch_of, model_of, CASES, RANKS = (getattr(ranks_of_test, x) for x in ("batch_of", "model_of", "CASES", "RANKS"))
TOLERANCE = 1e-12
"""of float64, relative: sums over chunks are taken in another order"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, PROGRAM, folder], timeout=150, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def one_process(name: str, *batches: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """The model with the gradients of all batches, and the last one's loss."""
    model, loss = model_of(name), torch.zeros(())
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    return model, loss.detach()


def assert_gradients(found: dict[str, torch.Tensor], model: Any) -> None:
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, name
        assert (found[name] - parameter.grad).norm() <= TOLERANCE * parameter.grad.norm(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_loss_gradients_and_logits_are_those_of_one_process(results, case):
    name, layout, length = case
    batch = batch_of(layout, length)
    model, loss = one_process(name, batch)
    with torch.no_grad():
        whole = model(**{x: batch[x] for x in ("input_ids", "position_ids", "doc_ids")}, use_cache=False).logits
    seen = batch["doc_ids"] >= 0
    for ranks in (2, 4):
        for found in (result["parity"][*case, ranks] for result in results):
            assert (found["loss"] - loss).abs() <= TOLERANCE * loss
            assert_gradients(found["gradients"], model)
            rows = found["rows"]
            difference = (found["logits"] - whole[rows])[seen[rows]].abs().max()
            assert difference <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("how", ranks_of_test.HOW)
def test_recomputed_compiled_and_sharded_blocks_change_nothing(results, how):
    model, loss = one_process("sid", batch_of("packed", 64))
    for result in results:
        found = result["how"][how]
        assert (found["loss"] - loss).abs() <= TOLERANCE * loss
        assert_gradients(found["gradients"], model)


def test_micro_batches_may_overlap(results):
    """As in a pipeline: the first one's backward pass comes after the second one's forward pass."""
    model, _ = one_process("sid", batch_of("packed", 64), batch_of("padded", 24))
    for result in results:
        assert_gradients(result["interleaved"], model)


def test_predicted_bytes_are_those_that_were_moved(results):
    for rank, result in enumerate(results):
        assert len(result["counted"]) == 6
        for (name, length, ranks), counted in result["counted"].items():
            config = model_of(name).config
            sizes = {"batch": 2, "length": length, "rank": rank % ranks, "ranks": ranks, "itemsize": 4}
            layers = layer_traffic(config, **sizes)
            assert counted == tuple(sum(getattr(x, which) for x in layers) for which in ("forward", "backward"))


def test_halos_move_less_than_an_all_gather():
    """At 131,072 tokens over 16 ranks: (512, 32) against all keys and values."""
    config = SidConfig(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "simplicial_attention"])
    sizes = {"batch": 1, "length": 131072, "ranks": 16}
    full, sliding, simplicial = layer_traffic(config, rank=7, **sizes)
    assert full.forward == full.backward == full.gathered
    # two chunks, each with the halo that another rank gives
    assert simplicial.gathered == 2 * full.gathered
    assert simplicial.gathered / simplicial.forward == 2 * 15 * 2 * 4096 / (2 * (511 + 31))
    assert sliding.gathered / sliding.forward == 15 * 2 * 4096 / (2 * 4095)
    for layer in range(3):
        traffic = [layer_traffic(config, rank=rank, **sizes)[layer] for rank in range(16)]
        assert sum(x.forward for x in traffic) == sum(x.backward for x in traffic)


@pytest.mark.parametrize("length", [8, 24, 64, 1000])
def test_a_halo_never_moves_more_than_an_all_gather(length):
    for rank in range(4):
        for name in ("windows", "sid"):
            for layer in layer_traffic(model_of(name).config, batch=1, length=length, rank=rank, ranks=4):
                assert max(layer.forward, layer.backward) <= layer.gathered


def test_half_precision_gradients_are_added_in_float32(results):
    """Each rank's part is rounded once, and the sum once: bit for bit what that says."""
    found = [result["half"] for result in results]
    x = torch.stack([part["x"] for part in found])
    sequence = join(x, 2 * RANKS * 3)
    # every position's gradients, from each rank: its two chunks and what is in front of them
    given = {name: torch.zeros(RANKS, *sequence.shape) for name in ("gathered", "fetched")}
    for rank, part in enumerate(found):
        for row, chunk in enumerate(chunks_of(rank, RANKS)):
            end = chunk * 3
            rows = {"gathered": part["gathered_weight"][row], "fetched": part["fetched_weight"][row]}
            torch.testing.assert_close(part["before"][row, -(end + 3) :], sequence[0, : end + 3], rtol=0, atol=0)
            reach = min(7, end)
            expected = sequence[0, end - reach : end]
            assert torch.equal(part["halo"][row, part["halo"].shape[1] - reach :], expected)
            assert (part["halo"][row, : part["halo"].shape[1] - reach] == 0).all()
            given["gathered"][rank, 0, : end + 3] += rows["gathered"][-(end + 3) :].float()
            if reach:
                given["fetched"][rank, 0, end - reach : end] += rows["fetched"][-reach:].float()
    for rank, part in enumerate(found):
        mine = cut(given["gathered"].bfloat16().float().sum(dim=0), rank, RANKS)
        assert torch.equal(part["gathered_gradient"], mine.bfloat16())
        # each position's three or fewer parts come unrounded, in the order of the ranks
        fetched = cut(given["fetched"].sum(dim=0), rank, RANKS)
        torch.testing.assert_close(part["fetched_gradient"], fetched.bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 24, 25])
def test_chunks_join_to_the_sequence(ranks, length):
    x = torch.arange(2 * length * 3).view(2, length, 3)
    parts = torch.stack([cut(x, rank, ranks, fill=-7) for rank in range(ranks)])
    assert parts.shape == (ranks, 4, chunk_length(length, ranks), 3)
    assert torch.equal(join(parts, length), x)
    assert (join(parts, 2 * ranks * parts.shape[2])[:, length:] == -7).all()
    assert sorted(chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks)) == list(range(2 * ranks))
    assert all(chunks_of(holder(c, ranks)[0], ranks)[holder(c, ranks)[1]] == c for c in range(2 * ranks))


@pytest.mark.parametrize("halo", [0, 1, 5, 8, 40])
def test_halo_pieces_are_the_positions_in_front(halo):
    ranks, size = 3, 4
    position = torch.arange(2 * ranks * size)[None]
    held = [cut(position, rank, ranks) for rank in range(ranks)]
    for rank in range(ranks):
        before = min(halo, chunks_of(rank, ranks)[1] * size)
        found = torch.full((2, before), -1)
        for piece in halo_pieces(rank, ranks, size, halo):
            values = held[piece.rank][piece.row, piece.start : piece.stop]
            found[piece.target, piece.at : piece.at + len(values)] = values
        assert torch.equal(found, cut_documents(position, rank, ranks, before)[:, :before])


def test_every_rank_has_as_much_to_attend_to():
    pairs = [sum((chunk * 8 + i + 1) for chunk in chunks_of(rank, 4) for i in range(8)) for rank in range(4)]
    assert len(set(pairs)) == 1


def shard_of() -> ContextParallel:
    return ContextParallel(rank=0, ranks=2, group="", windows=((4,),))


def test_a_batch_without_documents_is_one_and_positions_that_restart_begin_one():
    cp, ids = shard_of(), torch.arange(8)[None]
    plain = cp.shard({"input_ids": ids})
    assert plain["input_ids"].tolist() == plain["position_ids"].tolist() == [[0, 1], [6, 7]]
    assert plain["doc_ids"].tolist() == [[-1, -1, -1, 0, 0], [0] * 5]
    restarted = cp.shard({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])})
    assert restarted["doc_ids"].tolist() == [[-1, -1, -1, 0, 0], [0, 1, 1, 1, 1]]


def test_labels_are_counted_in_the_whole_batch():
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "shift_labels": torch.tensor([[3, -100, 3, 3, 3]])}
    local = shard_of().shard(batch)
    assert int(local["num_items_in_batch"]) == 4
    assert local["shift_labels"].tolist() == [[3, -100], [-100, -100]]  # the last chunk is padding
    assert shard_of().shard(batch | {"num_items_in_batch": 9})["num_items_in_batch"] == 9


def test_bad_input_is_named():
    cp, ids = shard_of(), torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot cut attention_mask, labels; it takes input_ids"):
        cp.shard({"input_ids": ids, "labels": ids, "attention_mask": ids})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        cp.shard({"shift_labels": ids})
    with pytest.raises(ValueError, match=r"position_ids must be \(2 or 1, 8\), got \(2, 7\)"):
        cp.shard({"input_ids": ids, "position_ids": ids[:, :7], "doc_ids": ids})
    with pytest.raises(ValueError, match=r"doc_ids must be \(2 or 1, 8\), got \(3, 8\)"):
        cp.shard({"input_ids": ids, "doc_ids": ids.new_zeros(3, 8)})
    with pytest.raises(ValueError, match=r"shift_labels must be \(2, 8\), got \(2, 9\)"):
        cp.shard({"input_ids": ids, "shift_labels": ids.new_zeros(2, 9)})
    model = model_of("windows")
    with pytest.raises(ValueError, match="a sequence_shard needs doc_ids and position_ids, and no cache"):
        model(input_ids=ids, sequence_shard=cp)
    with pytest.raises(ValueError, match=r"doc_ids must be \(2, 11\), 3 earlier and 8 new positions, got \(2, 8\)"):
        model(input_ids=ids, position_ids=ids, doc_ids=ids, sequence_shard=cp)


def test_one_dimension_of_a_mesh_is_asked_for():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        assert isinstance(mesh, DeviceMesh)
        config = model_of("windows").config
        with pytest.raises(ValueError, match=r"one dimension of a mesh, got 2: \('dp', 'cp'\)"):
            context_parallel(config, mesh)
        cp = context_parallel(config, mesh["cp"])
        assert (cp.rank, cp.ranks, cp.windows) == (1, 2, ((6,), (7, 4)))
    finally:
        torch.distributed.destroy_process_group()
