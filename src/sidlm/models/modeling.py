"""SidModel and SidForCausalLM: transformers classes around sidlm.nn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from sidlm import ops
from sidlm.models.cache import check_cache, readable
from sidlm.models.config import SidConfig
from sidlm.models.initial import own_distributions
from sidlm.models.loading import own_memory
from sidlm.nn.attention import Attention
from sidlm.nn.block import Block
from sidlm.nn.feed_forward import SquaredReLUFeedForward, SwiGLUFeedForward
from sidlm.nn.moe import MoEFeedForward
from sidlm.nn.norm import RMSNorm
from sidlm.nn.rotary import Rotary
from sidlm.nn.simplicial_attention import SimplicialAttention
from sidlm.ops.simplicial.api import holes


class SidDecoderLayer(Block, GradientCheckpointingLayer):
    """A Block that transformers' activation checkpointing knows; built by ``decoder_layer``."""


def mixer(config: SidConfig, layer_idx: int) -> nn.Module:
    """The attention module of one layer."""
    # SidConfig fills these in when it is built
    assert config.num_key_value_heads is not None and config.head_dim is not None and config.layer_types is not None
    sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    layer_type = config.layer_types[layer_idx]
    if layer_type == "simplicial_attention":
        return SimplicialAttention(
            *sizes,
            window=(config.simplicial_window[0], config.simplicial_window[1]),
            form=config.simplicial_form,
            position=config.simplicial_position,
            scale=config.simplicial_scale,
            qk_norm=config.simplicial_qk_norm,
            norm_eps=config.rms_norm_eps,
            k2_bias=config.simplicial_k2_bias,
            v2_bias=config.simplicial_v2_bias,
            layer_idx=layer_idx,
        )
    window = config.sliding_window if layer_type == "sliding_attention" else None
    return Attention(*sizes, window=window, layer_idx=layer_idx)


def feed_forward(config: SidConfig) -> nn.Module:
    """The feed-forward module of one layer."""
    if config.num_local_experts:
        return MoEFeedForward(
            config.hidden_size,
            config.expert_intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            kind=config.mlp_type,
            gate=config.moe_gate,
            shared_experts=config.num_shared_experts,
        )
    if config.mlp_type == "swiglu":
        return SwiGLUFeedForward(config.hidden_size, config.intermediate_size)
    return SquaredReLUFeedForward(
        config.hidden_size,
        config.intermediate_size,
        sparsity=config.mlp_sparsity,
        precision=config.mlp_precision,
        dense_features=config.mlp_dense_features,
        permute_tokens=config.mlp_permute_tokens,
        reuse_mask=config.mlp_reuse_mask,
    )


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    position_ids: Tensor
    """(B or 1, T)"""
    doc_ids: Tensor | None
    """(B, past + T), or None when every row is one document without padding"""
    masks: dict[str, Any]
    """layer type -> what ops.attention_mask gave"""
    holes: bool
    """Whether padding lies inside a document: there the kernels of 2-simplicial attention must not be used"""


class SidPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about Sid models."""

    config_class = SidConfig
    config: SidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SidDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """transformers' loader; weights that it left mapped at odd addresses of the file get memory of their own."""
        loaded = super().from_pretrained(*args, **kwargs)
        own_memory(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """See `own_distributions`; buffers are zero."""
        for name, (mean, std) in own_distributions(module, self.config).items():
            weight = getattr(module, name)
            if std:
                init.normal_(weight, mean=mean, std=std)
            else:
                init.constant_(weight, mean)
        if isinstance(module, MoEFeedForward):
            init.zeros_(module.balance_bias)
            init.zeros_(module.expert_counts)


class SidModel(SidPreTrainedModel):
    """Embedding, blocks and final norm. Parameter names are Llama's."""

    def __init__(self, config: SidConfig):
        super().__init__(config)
        # SidConfig fills these in when it is built
        assert config.head_dim is not None and config.layer_types is not None and config.rope_parameters is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SidDecoderLayer(config.hidden_size, mixer(config, i), feed_forward(config), config.rms_norm_eps)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rotates = "simplicial_attention" in config.layer_types and config.simplicial_position == "rotation"
        self.rotary = Rotary(config.head_dim, config.rope_parameters, three_chunks=rotates)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        sequence_shard: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states (B, T, hidden_size) after the final norm.

        Args:
            input_ids: (B, T) ids, or inputs_embeds: (B, T, hidden_size); exactly one of them.
            attention_mask: (B, past + T), zero at padding. Only padding: packed documents are told by the next two.
            position_ids: (B or 1, T). Default: counted from the first token that attention_mask keeps. Without
                doc_ids and with nothing cached, a position that does not grow starts a new document, whatever
                attention_mask says.
            doc_ids: (B, past + T) ints; tokens of different documents do not see each other, negative is padding. It
                must not lie inside a document where that is not looked for: without a cache, if there is no
                attention_mask or the model is compiled.
            cu_seq_lens_q, max_length_q: what doc_ids say in the way of flash attention's collators, and the faster one
                on CUDA: where documents begin in the rows one behind the other, (N + 1,) int32 with B * T at the end,
                and at least the length of the longest. Read beside doc_ids only, without padding, cache or
                sequence_shard.
            sequence_shard: for rows that are parts of longer sequences, where the mixers get what is in front of them:
                an object with ``update`` as of a cache and ``positions_before(T)``, how many positions that is, which
                doc_ids then counts as past. See :mod:`sidlm.parallel.context`.
            past_key_values: a cache to continue from, ``DynamicCache(config=model.config)``.
            use_cache: whether to return a cache; by default config.use_cache in evaluation and no in training.
            kwargs: what else collators add (cu_seq_lens_k, ...) repeats position_ids and is not read.

        Raises:
            ValueError: shapes that disagree, a 4-D attention_mask, a cache of another kind, attentions asked for, a
                sequence_shard without doc_ids and position_ids, or with a cache.
        """
        self._check_request(input_ids, inputs_embeds, output_attentions)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        device = x.device.type  # of which torch knows no autocast if it is meta
        if device != "meta" and torch.is_autocast_enabled(device):  # else the residual stream would be fp32
            x = x.to(torch.get_autocast_dtype(device))
        layer_types = self.config.layer_types
        assert layer_types is not None  # filled in by SidConfig
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and sequence_shard is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            check_cache(past_key_values, layer_types)
        if sequence_shard is not None and (past_key_values is not None or doc_ids is None or position_ids is None):
            raise ValueError("a sequence_shard needs doc_ids and position_ids, and no cache")
        # of what was given: a plan that splits the sequence between processes leaves part of it in x
        b, t = (x if input_ids is None else input_ids).shape[:2]
        past = 0 if past_key_values is None else _cached(past_key_values)
        if sequence_shard is not None:
            past = sequence_shard.positions_before(t)
        told = cu_seq_lens_q is not None and max_length_q is not None and doc_ids is not None
        offsets = (cu_seq_lens_q, max_length_q) if told and past == 0 and attention_mask is None else None
        context = self._context((b, t, past), x, attention_mask, position_ids, doc_ids, past_key_values, offsets)
        positions = self.rotary(context.position_ids, b)
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = None if past_key_values is None else readable(past_key_values, past + t)
        states = [x]
        for layer, layer_type in zip(self.layers, layer_types, strict=True):
            simplicial = layer_type == "simplicial_attention"
            x = layer(
                x,
                positions,
                past_key_values=cache,
                sequence_shard=sequence_shard,
                mask=context.masks.get(layer_type),
                doc_ids=context.doc_ids if simplicial else None,
                impl="eager" if simplicial and context.holes else None,
            )
            if collect:
                states.append(x)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            # transformers' convention: the last one is after the final norm
            hidden_states=(*states[:-1], x) if collect else None,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _check_request(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attentions: bool | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if attentions or (attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: Sid's attention never forms its weights, so it cannot return them")

    def _context(
        self, shape: tuple[int, int, int], x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
        doc_ids: Tensor | None, cache: Any, offsets: Any,
    ) -> Context:  # fmt: skip
        (b, t, past), device = shape, x.device
        padding = _padding(attention_mask, b, past + t)
        told = position_ids is not None
        if told:
            if position_ids.ndim != 2 or position_ids.shape[0] not in (1, b) or position_ids.shape[1] != t:
                raise ValueError(f"position_ids must be ({b} or 1, {t}), got {tuple(position_ids.shape)}")
        elif padding is None:
            position_ids = torch.arange(past, past + t, device=device).unsqueeze(0)
        else:
            # a left-padded row counts from its first real token, as transformers' generate does
            position_ids = ((~padding).cumsum(dim=1) - 1).clamp_min(0)[:, past:]
        given = doc_ids is not None
        if given:
            if tuple(doc_ids.shape) != (b, past + t):
                raise ValueError(
                    f"doc_ids must be ({b}, {past + t}), {past} earlier and {t} new positions, "
                    f"got {tuple(doc_ids.shape)}"
                )
        elif told and t > 1:
            doc_ids = _documents_from_positions(position_ids, padding, b, past)
        if padding is not None:
            base = doc_ids if doc_ids is not None else torch.zeros_like(padding, dtype=torch.int64)
            doc_ids = base.masked_fill(padding, -1)
        if cache is not None:
            _check_continuation(cache, doc_ids, past, given)
        masks, kind = {}, {"device": device, "dtype": x.dtype, "head_dim": self.config.head_dim}
        for layer_type in set(self.config.layer_types or ()) - {"simplicial_attention"}:
            window = self.config.sliding_window if layer_type == "sliding_attention" else None
            length = t + (past if window is None else min(past, window - 1))
            ids = None if doc_ids is None else doc_ids[:, -length:]
            masks[layer_type] = ops.attention_mask(t, length, window=window, doc_ids=ids, offsets=offsets, **kind)
        # looking waits for the device, as it did above for padding and for a cache
        look = "simplicial_attention" in (self.config.layer_types or ()) and (padding is not None or cache is not None)
        return Context(position_ids, doc_ids, masks, look and _has_holes(doc_ids, past))


class SidForCausalLM(SidPreTrainedModel, GenerationMixin):
    """Language model: SidModel and an output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    token_loss: Callable[..., Tensor] = staticmethod(ops.linear_cross_entropy)
    """(hidden (N, d), weight (V, d), labels (N,)) -> their summed NLL; a plan that splits the head puts its own here"""

    def __init__(self, config: SidConfig):
        super().__init__(config)
        self.model = SidModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        doc_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, vocab_size), and a loss if labels are given; the other arguments are those of SidModel.

        Args:
            labels: (B, T) unshifted, -100 ignored: the loss transformers' models return, with logits.
            shift_labels: (B, T), labels[:, t] is the token after position t, -100 ignored: the loss alone, with
                logits None; the (B, T, vocab_size) logits are never built. This is how Sid trains.
            num_items_in_batch: what the summed loss is divided by; default: the number of labels not ignored.
            logits_to_keep: number of last positions to give logits for (0: all), or a 1-D tensor of positions.

        Raises:
            ValueError: both labels and shift_labels, or what SidModel raises.
        """
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels (unshifted) or shift_labels (shifted), not both")
        if use_cache is None and (labels is not None or shift_labels is not None):
            use_cache = past_key_values is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            doc_ids=doc_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss, logits = None, None
        if shift_labels is not None:
            loss = self._fused_loss(hidden, shift_labels, num_items_in_batch)
        else:
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[:, logits_to_keep]
            elif logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.lm_head(hidden)
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _fused_loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"shift_labels must be {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}")
        total = self.token_loss(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
        if num_items is None:
            # a batch of ignored labels only has loss 0, not 0 / 0
            num_items = (labels >= 0).sum().clamp_min(1)
        elif isinstance(num_items, Tensor):
            num_items = num_items.to(total.device)
        return total / num_items

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The 2-D mask as it is: Sid builds its own masks from it, and takes no 4-D one."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: transformers would compile every step with a static cache on a GPU; here lengths decide shapes."""
        return False


def _cached(cache: Cache) -> int:
    """Positions in the cache; a static one counts them in a tensor."""
    return int(cache.get_seq_length())


def _as_dict(return_dict: bool | None, config: SidConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _padding(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, past + T) bool, True at padding; None if there is none."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 2-D (batch, past + new positions), got {attention_mask.ndim}-D "
            f"{tuple(attention_mask.shape)}; documents are told by doc_ids or position_ids"
        )
    if tuple(attention_mask.shape) != (batch, length):
        raise ValueError(f"attention_mask must be ({batch}, {length}), got {tuple(attention_mask.shape)}")
    padding = attention_mask == 0
    # looking at the values would break a compiled graph; there the general case is built
    if not torch.compiler.is_compiling() and not padding.any():
        return None
    return padding


def _has_holes(doc_ids: Tensor | None, past: int) -> bool:
    """Whether padding lies inside a document, as behind prompts that are padded on the right."""
    if doc_ids is None:
        return False
    if torch.compiler.is_compiling():  # looking would break the graph; whatever is continued may have holes
        return past > 0
    return bool(holes(doc_ids).any())


def _documents_from_positions(position_ids: Tensor, padding: Tensor | None, batch: int, past: int) -> Tensor | None:
    """(B, T) document numbers, a new one wherever positions do not grow; None if they always grow.

    Raises ValueError if that happens between new tokens behind a cache: its keys' documents are not known.
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    compiling = torch.compiler.is_compiling()
    if past:
        if padding is not None:
            real = ~padding[:, past:]
            starts = starts & real[:, 1:] & real[:, :-1]
        if not compiling and starts.any():
            raise ValueError(f"position_ids restart behind {past} cached positions: pass doc_ids for all of them")
        return None
    if not compiling and not starts.any():
        return None
    return torch.nn.functional.pad(starts.cumsum(dim=1), (1, 0)).expand(batch, -1)


def _check_continuation(cache: Any, doc_ids: Tensor | None, past: int, given: bool) -> None:
    """Refuse to continue packed rows from a cache alone: it does not know which of its keys are another document's."""
    if past and not given and getattr(cache, "sid_packed", False):
        raise ValueError("the cache holds packed documents: pass doc_ids for the cached and the new positions")
    if past == 0:
        packed = doc_ids is not None and (doc_ids.amax(dim=1) > doc_ids.masked_fill(doc_ids < 0, 1 << 62).amin(dim=1))
        cache.sid_packed = bool(packed.any()) if isinstance(packed, Tensor) else packed
