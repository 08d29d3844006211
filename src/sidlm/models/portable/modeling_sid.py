"""Sid models in one file, for transformers with ``trust_remote_code=True`` where the package sidlm is not installed.

The same parameters and the same numbers as sidlm.models, in plain torch, without its kernels and without what training
at scale needs. Apache-2.0. `sid convert --portable` puts this file beside the weights; nothing of sidlm is imported.
"""

# SidConfig fills optional fields in when it is built; asserts that say so would only lengthen what is copied around
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false

from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

SIMPLICIAL = "simplicial_attention"
QUERIES = 64
"""Queries of 2-simplicial attention whose pairs are held at once."""


@strict
class SidConfig(PreTrainedConfig):
    """The fields of sidlm.models.SidConfig, which explains and checks them."""

    model_type = "sid"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 500_000.0

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float | None = None
    layer_types: list[str] | tuple[str, ...] | None = None
    sliding_window: int = 4096
    mlp_type: str = "swiglu"
    mlp_sparsity: str | None = None
    mlp_precision: str | None = None
    mlp_dense_features: float | int = 0.05
    mlp_permute_tokens: bool = True
    mlp_reuse_mask: bool = True
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    moe_gate: str = "softmax"
    moe_balance_rate: float | int = 0.001
    simplicial_window: list[int] | tuple[int, ...] = field(default_factory=lambda: [512, 32])
    simplicial_form: str = "trilinear"
    simplicial_position: str = "rope"
    simplicial_scale: float | None = None
    simplicial_qk_norm: bool = True
    simplicial_k2_bias: float | int = 1.0
    simplicial_v2_bias: float | int = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.initializer_range = self.initializer_range or self.hidden_size**-0.5
        if self.layer_types is None:
            self.layer_types = [SIMPLICIAL if i % 4 == 3 else "full_attention" for i in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention", SIMPLICIAL}
        if unknown:
            raise ValueError(f"layer_types: unknown layer type {sorted(unknown)[0]!r}")
        if self.mlp_precision is not None:
            raise ValueError(f"mlp_precision {self.mlp_precision!r} needs the package sidlm; set it to null here")

    def validate_layer_type(self):
        """transformers' own check knows no simplicial layer."""


class SimplicialCache(cache_utils.DynamicLayer):
    """The last w1 - 1 positions of k, v and w2 - 1 of k2, v2; called and answering like sidlm's."""

    is_sliding = True
    is_croppable = True

    def __init__(self, **kwargs):
        cache_utils.DynamicLayer.__init__(self)
        self.kept: list[Tensor] = []
        self.windows = (1, 1, 1, 1)
        self.length = 0
        self.record_past = False

    def activate_past_recording(self):
        self.record_past = True

    def update(self, key_states, value_states, *args, k2, v2, window, rings=False, **kwargs):
        new, old = (key_states, value_states, k2, v2), self.kept
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            old = [x[:, :, :0] for x in new]
        self.windows = (window[0], window[0], window[1], window[1])
        self.length += k2.shape[2]
        whole = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
        self.kept = whole if self.record_past else self._last(whole)
        self.keys, self.values = self.kept[:2]
        k, v, k2, v2 = self._last(whole, k2.shape[2])
        return (k, k2), (v, v2)

    def _last(self, tensors, more=0):
        counts = [w - 1 + more for w in self.windows]
        return [x[:, :, max(x.shape[2] - n, 0) :] for x, n in zip(tensors, counts, strict=True)]

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        kept = min(self.length, max(self.windows) - 1)
        return kept + query_length, self.length - kept

    def crop(self, tokens_to_remove):
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        removed = max(0, min(removed, self.length))
        left = [x[:, :, : max(x.shape[2] - removed, 0)] for x in self.kept]
        self.length -= removed
        if any(x.shape[2] < min(self.length, w - 1) for x, w in zip(left, self.windows, strict=True)):
            raise RuntimeError("crop needs positions that are gone: call activate_past_recording first")
        self.kept = self._last(left)

    def reset(self):
        self.kept, self.length, self.is_initialized = [], 0, False

    def reorder_cache(self, beam_idx):
        self.kept = [x[beam_idx.to(x.device)] for x in self.kept]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.kept = [x.repeat_interleave(repeats, dim=0) for x in self.kept]


# what DynamicCache and StaticCache build of a config; sidlm's own, if that is imported too, answer alike
if SIMPLICIAL not in getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {}):

    class _Registered(SimplicialCache):
        _layer_type = SIMPLICIAL

    class _RegisteredStatic(SimplicialCache, cache_utils.StaticLayer):
        """The windows bound it already."""

        _layer_type = SIMPLICIAL
        is_compileable = False

        def __init__(self, max_cache_len: int, **kwargs):
            SimplicialCache.__init__(self)
            self.max_cache_len = max_cache_len

        def get_max_length(self):
            return self.max_cache_len


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def frequencies(config: SidConfig, device) -> tuple[Tensor, Tensor]:
    """Of ordinary rotary embeddings (D/2,), and of rotations of chunks of three (D//3,); float32."""
    dim, rope = config.head_dim, config.rope_parameters
    plane = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    chunks = max(dim // 3, 1)
    three = 1.0 / rope["rope_theta"] ** (torch.arange(dim // 3, dtype=torch.float32, device=device) / chunks)
    if rope.get("rope_type", "default") == "llama3":
        turns = rope["original_max_position_embeddings"] * plane / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        plane = plane * (keep + (1 - keep) / rope["factor"])
    elif rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not implemented")
    return plane, three


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, T, H, D), angles (B, T, D/2): pairs (i, i + D/2)."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    a, b = x.chunk(2, dim=-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate3(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, T, H, D), angles (B, T, D//3): chunks of three about their third axis."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    n = x.shape[-1] // 3
    a, b, c = x[..., : 3 * n].unflatten(-1, (n, 3)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin, c.to(cos.dtype)), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 3 * n :]), dim=-1)


def combine(q: Tensor, k2: Tensor, form: str) -> Tensor:
    """Virtual queries: their product with k is the logit of a pair."""
    if form == "trilinear":
        return q * k2
    q, k2 = torch.broadcast_tensors(q, k2)
    n = q.shape[-1] // 3 * 3
    cross = torch.linalg.cross(k2[..., :n].unflatten(-1, (-1, 3)), q[..., :n].unflatten(-1, (-1, 3))).flatten(-2)
    return torch.cat((cross, q[..., n:] * k2[..., n:]), dim=-1)


def two_simplicial(q, k, v, k2, v2, ids, window, form, scale=None) -> Tensor:
    """2-simplicial attention (arXiv 2507.02754). q (B, T, H, D); k, v, k2, v2 (B, S, G, D), aligned at the end.

    ids: (B, >= S) documents aligned at the end, negative at padding, which gives zeros.
    """
    (b, t, h, d), g, dtype = q.shape, k.shape[2], q.dtype
    w1, w2 = window
    q, k, v, k2, v2 = (x.float() if x.dtype != torch.float64 else x for x in (q, k, v, k2, v2))
    q = q.view(b, t, g, h // g, d) * (scale or d**-0.5)
    k2, v2 = (F.pad(x, (0, 0, 0, 0, w2 - 1, 0)) for x in (k2, v2))
    ids2 = F.pad(ids, (max(w2 - 1 + t - ids.shape[1], 0), 0), value=-1)
    out = []
    for first in range(0, t, QUERIES):
        last = min(first + QUERIES, t)
        n, back = last - first, t - last  # queries of this piece; positions behind it
        j1 = k.shape[1] - back
        j0 = max(j1 - n - w1 + 1, 0)
        m1 = k2.shape[1] - back
        seconds = slice(m1 - n - w2 + 1, m1)
        kk2, vv2 = (x[:, seconds].unfold(1, w2, 1) for x in (k2, v2))  # (B, n, G, D, w2)
        u = combine(q[:, first:last, :, :, None], kk2.permute(0, 1, 2, 4, 3)[:, :, :, None], form)
        logits = torch.einsum("bngrmd,bjgd->bgrnmj", u, k[:, j0:j1])
        own = ids[:, ids.shape[1] - back - n : ids.shape[1] - back]
        keys = ids[:, ids.shape[1] - back - (j1 - j0) : ids.shape[1] - back]
        at = torch.arange(j1 - n, j1, device=q.device)[:, None] - torch.arange(j0, j1, device=q.device)
        see1 = (at >= 0) & (at < w1) & (keys[:, None] == own[:, :, None])  # (B, n, j)
        end = ids2.shape[1] - back
        see2 = ids2[:, end - n - w2 + 1 : end].unfold(1, w2, 1) == own[:, :, None]  # (B, n, w2)
        see = see1[:, :, None] & see2[..., None] & (own >= 0)[:, :, None, None]
        logits = logits.masked_fill(~see[:, None, None], -torch.inf)
        weights = logits.flatten(-2).softmax(-1).nan_to_num().view_as(logits)
        mixed = torch.einsum("bgrnmj,bjgd->bngrmd", weights, v[:, j0:j1])
        out.append(torch.einsum("bngrmd,bngdm->bngrd", mixed, vv2))
    return torch.cat(out, dim=1).reshape(b, t, h, d).to(dtype)


class Attention(nn.Module):
    """Full, sliding or 2-simplicial attention."""

    def __init__(self, config: SidConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.kind = config, layer, config.layer_types[layer]
        d, wide, narrow = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        sizes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        if self.kind == SIMPLICIAL:
            sizes |= {"k2_proj": narrow, "v2_proj": narrow}
        for name, heads in sizes.items():
            setattr(self, name, nn.Linear(d, heads * config.head_dim, bias=False))
        self.o_proj = nn.Linear(wide * config.head_dim, d, bias=False)
        if self.kind == SIMPLICIAL and config.simplicial_qk_norm:
            for name in ("q_norm", "k_norm", "k2_norm"):
                setattr(self, name, RMSNorm(config.head_dim, config.rms_norm_eps))

    def _heads(self, name: str, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        z = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.config.head_dim))
        if name in ("v", "v2"):
            return z
        if hasattr(self, f"{name}_norm"):
            z = getattr(self, f"{name}_norm")(z)
        position = self.config.simplicial_position if self.kind == SIMPLICIAL else "rope"
        if position == "rope":
            return rotate(z, angles[0])
        return rotate3(z, angles[1]) if position == "rotation" else z

    def forward(self, x: Tensor, angles, ids: Tensor, cache) -> Tensor:
        q, k, v = (self._heads(name, x, angles) for name in ("q", "k", "v"))
        if self.kind == SIMPLICIAL:
            out = self._simplicial(q, k, v, x, angles, ids, cache)
        else:
            out = self._plain(q, k, v, ids, cache)
        return self.o_proj(out.flatten(2))

    def _simplicial(self, q, k, v, x, angles, ids, cache) -> Tensor:
        config = self.config
        k2, v2 = self._heads("k2", x, angles), self._heads("v2", x, angles)
        window = tuple(config.simplicial_window)
        if cache is not None:
            k, v, k2, v2 = (z.transpose(1, 2) for z in (k, v, k2, v2))
            (k, k2), (v, v2) = cache.update(k, v, self.layer, k2=k2, v2=v2, window=window)
            k, v, k2, v2 = (z.transpose(1, 2) for z in (k, v, k2, v2))
        k2, v2 = k2 + config.simplicial_k2_bias, v2 + config.simplicial_v2_bias
        return two_simplicial(q, k, v, k2, v2, ids, window, config.simplicial_form, config.simplicial_scale)

    def _plain(self, q, k, v, ids, cache) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if cache is not None:
            # a static cache has slots that nothing was written to yet
            k, v = (z[:, :, : ids.shape[1]] for z in cache.update(k, v, self.layer))
        s, t = k.shape[2], q.shape[2]
        own, keys = ids[:, ids.shape[1] - t :], ids[:, ids.shape[1] - s :]
        back = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
        see = (back >= 0) & (keys[:, None] == own[:, :, None]) & (own >= 0)[:, :, None]
        if self.kind == "sliding_attention":
            see = see & (back < self.config.sliding_window)
        see = (see | (back == 0)).unsqueeze(1)  # a row that sees nothing would be NaN
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).masked_fill((own < 0)[..., None, None], 0.0)


def activate(up: Tensor, gate: Tensor | None, sparsity: str | None = None) -> Tensor:
    """silu(gate) * up, or relu(up)^2, of which 2:4 sparsity keeps the two largest of every four neighbours."""
    if gate is not None:
        return F.silu(gate) * up
    act = F.relu(up).square()
    if sparsity is None:
        return act
    groups = up.unflatten(-1, (-1, 4))
    keep = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, keep, True)
    return act.masked_fill(~mask.flatten(-2), 0.0)


class FeedForward(nn.Module):
    def __init__(self, config: SidConfig, width: int):
        super().__init__()
        self.sparsity = config.mlp_sparsity
        if config.mlp_type == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x) if hasattr(self, "gate_proj") else None
        return self.down_proj(activate(self.up_proj(x), gate, self.sparsity))


class Experts(nn.Module):
    def __init__(self, config: SidConfig):
        super().__init__()
        self.config = config
        e, d, width = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
        width = width or config.intermediate_size
        self.router = nn.Linear(d, e, bias=False)
        self.up_proj = nn.Parameter(torch.zeros(e, width, d))
        self.down_proj = nn.Parameter(torch.zeros(e, d, width))
        self.gate_proj = nn.Parameter(torch.zeros(e, width, d)) if config.mlp_type == "swiglu" else None
        shared = config.num_shared_experts
        self.shared_expert = FeedForward(config, shared * width) if shared else None
        self.register_buffer("balance_bias", torch.zeros(e))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = F.linear(flat.float(), self.router.weight.float())
        scores = logits.softmax(-1) if self.config.moe_gate == "softmax" else logits.sigmoid()
        chosen = (scores + self.balance_bias).topk(self.config.num_experts_per_tok, dim=-1).indices
        gates = scores.gather(-1, chosen)
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
        out = torch.zeros_like(flat)
        for e in range(self.config.num_local_experts):
            rows, slot = (chosen == e).nonzero(as_tuple=True)
            gate = F.linear(flat[rows], self.gate_proj[e]) if self.gate_proj is not None else None
            result = F.linear(activate(F.linear(flat[rows], self.up_proj[e]), gate), self.down_proj[e])
            out = out.index_add(0, rows, (result * gates[rows, slot, None]).to(out.dtype))
        if self.shared_expert is not None:
            out = out + self.shared_expert(flat)
        return out.view_as(x)


class SidDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SidConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_local_experts else FeedForward(config, config.intermediate_size)

    def forward(self, x: Tensor, angles, ids: Tensor, past_key_values=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, ids, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class SidPreTrainedModel(PreTrainedModel):
    config_class = SidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SidDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class SidModel(SidPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: SidConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SidDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        doc_ids=None, use_cache=None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Documents are told by doc_ids (B, past + T), or by positions that start again where nothing is cached."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, t = x.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        real = torch.ones(b, past + t, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            real = attention_mask.bool()
        ids = torch.zeros(b, past + t, dtype=torch.long, device=x.device) if doc_ids is None else doc_ids
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp_min(0)[:, past:]
        elif doc_ids is None and past == 0 and t > 1:
            starts = (position_ids[:, 1:] <= position_ids[:, :-1]).cumsum(1)
            ids = F.pad(starts, (1, 0)).expand(b, -1)
        ids = ids.masked_fill(~real, -1)
        angles = tuple(position_ids[..., None].float() * f for f in frequencies(self.config, x.device))
        for layer in self.layers:
            x = layer(x, angles, ids, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class SidForCausalLM(SidPreTrainedModel, GenerationMixin):
    """SidModel and an output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SidConfig):
        super().__init__(config)
        self.model = SidModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids=None, labels=None, logits_to_keep: int = 0, num_items_in_batch=None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        outputs = self.model(input_ids=input_ids, **kwargs)
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs: Any):
        """The 2-D mask as it is: the model builds its own."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Never: lengths decide shapes."""
        return False
