"""The cache of a simplicial layer: four tensors, bounded by the two windows.

Defining a class is what registers it: transformers' DynamicCache and StaticCache look ``_layer_type`` up when they
build a cache for a config with such layers. Full and sliding layers use transformers' own cache layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer


class SimplicialCacheLayer(DynamicLayer):
    """Keeps the last w1 - 1 positions of k, v and the last w2 - 1 of k2, v2, each (B, G, S, D).

    That is all a later query can see. ``keys``/``values`` hold k, v, so that what transformers does to these two by
    name (devices, memory counts) still works. While past recording is on (assisted decoding) nothing is dropped
    until ``crop``.

    A decoding step may ask for ring buffers instead: the four tensors then are rings with a few slots more, position p
    in slot p % C, and a step writes its tokens in place. Whatever needs the order puts it back first (``_tensors``).
    """

    _layer_type = "simplicial_attention"
    is_sliding = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        DynamicLayer.__init__(self)
        self.keys2: Tensor | None = None
        self.values2: Tensor | None = None
        self.window = (1, 1)
        self.cumulative_length = 0
        self.record_past = False
        self.ringed = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args,
        k2: Tensor,
        v2: Tensor,
        window: tuple[int, int],
        rings: bool = False,
        **kwargs,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """Append T positions; returns ``((k, k2), (v, v2))`` with the T new and the positions in reach before them.

        rings: the caller can take ring buffers (``ops.two_simplicial_decode``). It gets ``((k, k2, lengths), (v, v2))``
        unless the past is being recorded: rings (B, G, C, D) with the new positions written, lengths (B,).
        """
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._store([x[:, :, :0] for x in (key_states, value_states, k2, v2)])
            self.is_initialized = True
        self.window = window
        new = key_states.shape[2]
        if rings and not self.record_past:
            return self._update_rings((key_states, value_states, k2, v2), new)
        full = [
            torch.cat((old, now), dim=2) if old.shape[2] else now
            for old, now in zip(self._tensors(), (key_states, value_states, k2, v2), strict=True)
        ]
        self.cumulative_length += new
        self._store(full if self.record_past else [_last(x, w - 1) for x, w in zip(full, self._windows(), strict=True)])
        k, v, k2, v2 = (_last(x, w - 1 + new) for x, w in zip(full, self._windows(), strict=True))
        return (k, k2), (v, v2)

    def _update_rings(self, tensors: Sequence[Tensor], new: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        self._make_rings(new)
        for ring, x in zip(self._stored(), tensors, strict=True):
            at = self.cumulative_length % ring.shape[2]
            before_end = min(new, ring.shape[2] - at)
            ring[:, :, at : at + before_end] = x[:, :, :before_end]
            if before_end < new:
                ring[:, :, : new - before_end] = x[:, :, before_end:]
        self.cumulative_length += new
        k, v, k2, v2 = self._stored()
        return (k, k2, torch.full((k.shape[0],), self.cumulative_length, device=k.device)), (v, v2)

    def _make_rings(self, new: int) -> None:
        """Lay the four tensors out as rings in which `new` tokens can be written, unless they are that already."""
        fits = all(x.shape[2] >= w - 1 + new for x, w in zip(self._stored(), self._windows(), strict=True))
        # tensors made in inference mode cannot be written to outside it
        writable = torch.is_inference_mode_enabled() or not any(x.is_inference() for x in self._stored())
        if self.ringed and fits and writable:
            return
        rings = []
        for x, w in zip(self._tensors(), self._windows(), strict=True):
            ring = x.new_zeros(*x.shape[:2], w - 1 + new, x.shape[3])
            ring[:, :, self._slots(x.shape[2], ring)] = x
            rings.append(ring)
        self._store(rings)
        self.ringed = True

    def _slots(self, count: int, ring: Tensor) -> Tensor:
        """Slots of the last `count` positions, in order."""
        end = self.cumulative_length
        return torch.arange(end - count, end, device=ring.device) % ring.shape[2]

    def _windows(self) -> tuple[int, int, int, int]:
        return self.window[0], self.window[0], self.window[1], self.window[1]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, k2, v2 in order."""
        if self.ringed:
            kept = (min(self.cumulative_length, w - 1) for w in self._windows())
            self._store([x[:, :, self._slots(n, x)] for x, n in zip(self._stored(), kept, strict=True)])
            self.ringed = False
        return self._stored()

    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, k2, v2 as they are stored, in order or as rings."""
        assert self.keys is not None and self.values is not None  # all four are set as one
        assert self.keys2 is not None and self.values2 is not None
        return self.keys, self.values, self.keys2, self.values2

    def _store(self, tensors) -> None:
        self.keys, self.values, self.keys2, self.values2 = tensors

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.cumulative_length, max(self.window) - 1)
        return kept + query_length, self.cumulative_length - kept

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions, and what is out of reach of the windows.

        A positive number is the length to keep, the older convention of transformers.
        Raises RuntimeError if positions are needed again that were already dropped (record the past to keep them).
        """
        if not self.is_initialized:
            return
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.cumulative_length - tokens_to_remove
        removed = max(0, min(removed, self.cumulative_length))
        left = self.cumulative_length - removed
        kept = []
        for x, w in zip(self._tensors(), self._windows(), strict=True):
            stays = max(x.shape[2] - removed, 0)
            if stays < min(left, w - 1):
                raise RuntimeError(
                    f"crop({tokens_to_remove}) needs {min(left, w - 1)} earlier positions, {stays} are kept: "
                    "call activate_past_recording before the positions are written"
                )
            kept.append(_last(x[:, :, :stays], w - 1))
        self._store(kept)
        self.cumulative_length = left

    def reset(self) -> None:
        self.keys = self.values = self.keys2 = self.values2 = None
        self.is_initialized = self.ringed = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._store([x.repeat_interleave(repeats, dim=0) for x in self._stored()])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._store([x[indices.to(x.device)] for x in self._stored()])

    def offload(self) -> None:
        if self.is_initialized:
            self._store([x.to("cpu", non_blocking=True) for x in self._stored()])

    def prefetch(self) -> None:
        if self.is_initialized:
            self._store([x.to(self.device, non_blocking=True) for x in self._stored()])


class SimplicialStaticCacheLayer(SimplicialCacheLayer, StaticLayer):
    """The same layer in a StaticCache: the windows bound it already.

    It is not compiled as a whole: how much lies in it decides shapes.
    """

    _layer_type = "simplicial_attention"
    is_compileable = False

    def __init__(self, max_cache_len: int, **kwargs):
        SimplicialCacheLayer.__init__(self)
        self.max_cache_len = max_cache_len

    def get_max_length(self) -> int:
        return self.max_cache_len


class Filled:
    """A cache with static layers as the model's layers read it: without the slots that nothing was written to yet."""

    def __init__(self, cache: Cache, length: int):
        """length: positions in the cache once the new ones are written. Raises ValueError if it cannot hold them."""
        self._cache = cache
        self._length = length
        for layer in cache.layers:
            room = layer.get_max_length() if isinstance(layer, StaticLayer) and not layer.is_sliding else -1
            if 0 <= room < length:
                raise ValueError(f"the static cache holds {room} positions, but {length} are to be cached")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        keys, values = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(self._cache.layers[layer_idx], SimplicialStaticCacheLayer):
            return keys, values
        return keys[:, :, : self._length], values[:, :, : self._length]


def readable(cache: Cache, length: int) -> Cache | Filled:
    """The cache as the model's layers read it, when it comes to hold ``length`` positions."""
    static = any(isinstance(layer, StaticLayer) for layer in cache.layers)
    return Filled(cache, length) if static else cache


def check_cache(cache: Cache, layer_types: Sequence[str]) -> None:
    """Raise ValueError unless every layer of the cache can serve its layer of the model."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    for i, layer_type in enumerate(layer_types):
        if layer_type != "simplicial_attention":
            continue
        if i >= len(layers) or not isinstance(layers[i], SimplicialCacheLayer):
            found = type(layers[i]).__name__ if i < len(layers) else "no layer yet"
            raise ValueError(
                f"past_key_values: layer {i} is 2-simplicial and needs a SimplicialCacheLayer, found {found}; "
                "build the cache with DynamicCache(config=model.config)"
            )


def _last(x: Tensor, count: int) -> Tensor:
    """The last ``count`` positions of (B, G, S, D); none for 0, all if there are fewer."""
    return x[:, :, max(x.shape[2] - count, 0) :]
