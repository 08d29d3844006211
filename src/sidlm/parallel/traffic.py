"""Bytes that context parallelism moves, from a config alone: halos against gathering all keys and values."""

from typing import NamedTuple

from sidlm.models.config import SidConfig
from sidlm.parallel.chunks import chunk_length, halo_pieces


class LayerTraffic(NamedTuple):
    """Bytes that one rank receives from the others in one layer; recomputed activations cost `forward` once more."""

    layer_type: str
    forward: int
    backward: int
    gathered: int
    """what an all-gather of the layer's keys and values would cost, in each of the two passes"""


def layer_traffic(
    config: SidConfig, *, batch: int, length: int, rank: int, ranks: int, itemsize: int = 2, kv_heads: int | None = None
) -> list[LayerTraffic]:
    """Of every layer, for a batch of `batch` rows of `length` tokens that `ranks` processes share.

    itemsize: bytes of an element, 2 for bfloat16; gradients travel in the same dtype. kv_heads: key/value heads on a
    rank, fewer than the config's under tensor parallelism.
    """
    assert config.layer_types is not None
    sizes = {"batch": batch, "length": length, "rank": rank, "ranks": ranks, "itemsize": itemsize, "kv_heads": kv_heads}
    kinds = {kind: kind_traffic(config, kind, **sizes) for kind in set(config.layer_types)}
    return [kinds[layer_type] for layer_type in config.layer_types]


def kind_traffic(
    config: SidConfig, layer_type: str, *, batch: int, length: int, rank: int, ranks: int, itemsize: int = 2,
    kv_heads: int | None = None,
) -> LayerTraffic:  # fmt: skip
    """Of one layer of a type; arguments as in `layer_traffic`."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    size = chunk_length(length, ranks)
    kv_heads = config.num_key_value_heads if kv_heads is None else kv_heads
    pair = 2 * kv_heads * config.head_dim * itemsize * batch  # keys and values of one position
    windows = {"sliding_attention": [config.sliding_window], "simplicial_attention": list(config.simplicial_window)}
    halos = [window - 1 for window in windows.get(layer_type, [])]
    gathered = (ranks - 1) * 2 * size * pair * max(len(halos), 1)
    if not halos:
        return LayerTraffic(layer_type, gathered, gathered, gathered)
    others = [other for other in range(ranks) if other != rank]
    forward = sum(_moved(rank, giver, ranks, size, halo) for giver in others for halo in halos)
    # what a rank gave in the forward pass comes back to it as gradients
    backward = sum(_moved(taker, rank, ranks, size, halo) for taker in others for halo in halos)
    return LayerTraffic(layer_type, forward * pair, backward * pair, gathered)


def _moved(taker: int, giver: int, ranks: int, size: int, halo: int) -> int:
    """Positions of one rank's halo that another gives."""
    return sum(piece.stop - piece.start for piece in halo_pieces(taker, ranks, size, halo) if piece.rank == giver)
