"""SidConfig: the one description of a Sid model."""

from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from sidlm.nn.feed_forward import FEED_FORWARDS, check_recipe
from sidlm.nn.moe import GATES
from sidlm.nn.rotary import inverse_frequencies
from sidlm.nn.simplicial_attention import check_position

LAYER_TYPES = ("full_attention", "sliding_attention", "simplicial_attention")
SIMPLICIAL_FORMS = ("trilinear", "determinant")


def default_layer_types(num_hidden_layers: int) -> list[str]:
    """Every fourth layer 2-simplicial, the rest full attention ("Fast and Simplex", section 7)."""
    return ["full_attention" if (i + 1) % 4 else "simplicial_attention" for i in range(num_hidden_layers)]


@strict
class SidConfig(PreTrainedConfig):
    """Configuration of SidModel; a transformers config, saved as ``config.json``.

    A Llama ``config.json`` loads as the same model: full attention everywhere, SwiGLU.
    Raises ValueError naming the field and the numbers when the fields do not fit together.
    """

    model_type = "sid"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 500_000.0
    # trl reads config.auto_map without asking whether it exists
    auto_map = {}  # noqa: RUF012

    vocab_size: int = 32768
    """number of rows of the embedding"""
    hidden_size: int = 768
    """width of the residual stream"""
    intermediate_size: int = 2048
    """width of a dense feed-forward layer"""
    num_hidden_layers: int = 12
    """number of blocks"""
    num_attention_heads: int = 12
    """query heads of every layer"""
    num_key_value_heads: int | None = None
    """key/value heads (None: as many as query heads)"""
    head_dim: int | None = None
    """size of one head (None: hidden_size / num_attention_heads)"""
    max_position_embeddings: int = 8192
    """longest context the model is meant for, in tokens"""
    rms_norm_eps: float = 1e-5
    """added to the mean square before the root"""
    rope_parameters: dict | None = None
    """transformers' rope dictionary (None: rope_type "default", rope_theta 500000)"""
    tie_word_embeddings: bool = False
    """whether the output head is the embedding"""
    initializer_range: float | None = None
    """standard deviation of the initial weights (None: 1/sqrt(hidden_size)); o_proj and down_proj get it divided by
    sqrt(2 * layers), and an embedding that is not the output head starts at 1"""
    layer_types: list[str] | tuple[str, ...] | None = None
    """mixer of each layer: full_attention, sliding_attention or simplicial_attention (None: every fourth simplicial)"""
    sliding_window: int = 4096
    """positions a query of a sliding_attention layer sees, itself included"""
    mlp_type: str = "swiglu"
    """feed-forward layer: swiglu or squared_relu"""
    mlp_sparsity: str | None = None
    """activation sparsity of dense squared_relu feed-forward layers: None, or "2:4", two of every four neighbours"""
    mlp_precision: str | None = None
    """matrix products of squared_relu feed-forward layers: None (the dtype of the input), bf16 or fp8"""
    mlp_dense_features: float | int = 0.05
    """share of the features, the densest, whose weight gradients stay dense under 2:4 sparsity"""
    mlp_permute_tokens: bool = True
    """whether 2:4 sparsity along tokens sees them in a fixed random order"""
    mlp_reuse_mask: bool = True
    """whether gradients keep only the activations that the forward pass kept under 2:4 sparsity"""
    num_local_experts: int = 0
    """experts of each feed-forward layer; 0 for a dense one"""
    num_experts_per_tok: int = 2
    """experts each token runs"""
    num_shared_experts: int = 0
    """experts that every token runs besides"""
    moe_intermediate_size: int | None = None
    """width of one expert (None: intermediate_size)"""
    moe_gate: str = "softmax"
    """router gates, normalised over the chosen experts: softmax or sigmoid"""
    moe_balance_rate: float | int = 0.001
    """step of the experts' selection bias after each optimizer step; 0 leaves the experts unbalanced"""
    simplicial_window: list[int] | tuple[int, ...] = field(default_factory=lambda: [512, 32])
    """(w1, w2): positions seen along the first and the second key of a pair, the query's own included"""
    simplicial_form: str = "trilinear"
    """logit of a pair: trilinear or determinant"""
    simplicial_position: str = "rope"
    """positions in simplicial layers: rope, none, or rotation (determinant form only)"""
    simplicial_scale: float | None = None
    """factor of the logits in simplicial layers (None: 1/sqrt(head_dim))"""
    simplicial_qk_norm: bool = True
    """RMS norm of each head of q, k and k2 in simplicial layers"""
    simplicial_k2_bias: float | int = 1.0
    """constant added to k2 (fixed)"""
    simplicial_v2_bias: float | int = 1.0
    """constant added to v2 (fixed)"""
    bos_token_id: int | None = None
    """id of the begin-of-text token"""
    eos_token_id: int | list[int] | None = None
    """id or ids of the end-of-text token"""
    pad_token_id: int | None = None
    """id of the padding token; padding is masked by attention_mask or doc_ids, never by this id"""
    use_cache: bool = True
    """whether generation keeps keys and values"""

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.initializer_range is None:
            self.initializer_range = max(self.hidden_size, 1) ** -0.5
        if self.layer_types is None:
            self.layer_types = default_layer_types(self.num_hidden_layers)
        # copies: a config must not change because the lists and dictionaries it was built from do
        self.layer_types = list(self.layer_types)
        self.simplicial_window = list(self.simplicial_window)
        self.rope_parameters = dict(self.rope_parameters) if self.rope_parameters else None
        super().__post_init__(**kwargs)
        # here and not only in a validator: transformers wraps what a validator raises in an error that is no ValueError
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming the field and the numbers, unless the fields describe a model."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "intermediate_size", "sliding_window", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        assert self.num_key_value_heads is not None and self.head_dim is not None  # __post_init__ filled them in
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.rope_parameters is not None:
            inverse_frequencies(2, self.rope_parameters, device=torch.device("meta"))
        self._check_layer_types()
        self._check_mlp()
        self._check_simplicial()

    def _check_layer_types(self) -> None:
        layer_types = self.layer_types or ()
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(layer_types)} entries, num_hidden_layers is {self.num_hidden_layers}"
            )
        for i, layer_type in enumerate(layer_types):
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"layer_types[{i}] must be one of {LAYER_TYPES}, got {layer_type!r}")

    def _check_mlp(self) -> None:
        if self.mlp_type not in FEED_FORWARDS:
            raise ValueError(f"mlp_type must be one of {tuple(FEED_FORWARDS)}, got {self.mlp_type!r}")
        check_recipe(self.intermediate_size, self.mlp_sparsity, self.mlp_precision, self.mlp_dense_features)
        for name in ("mlp_sparsity", "mlp_precision"):
            value = getattr(self, name)
            if value is not None and self.mlp_type != "squared_relu":
                raise ValueError(f"{name} {value!r} needs mlp_type 'squared_relu', got {self.mlp_type!r}")
            if value is not None and self.num_local_experts > 0:
                raise ValueError(
                    f"{name} {value!r} is for dense feed-forward layers, but num_local_experts is "
                    f"{self.num_local_experts}: experts have no such form"
                )
        if self.num_local_experts < 0 or self.num_shared_experts < 0:
            raise ValueError(
                "num_local_experts and num_shared_experts must not be negative, "
                f"got {self.num_local_experts} and {self.num_shared_experts}"
            )
        if self.num_shared_experts and not self.num_local_experts:
            raise ValueError(f"num_shared_experts is {self.num_shared_experts} but num_local_experts is 0 (dense)")
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok must be in 1..{self.num_local_experts} (num_local_experts), "
                f"got {self.num_experts_per_tok}"
            )
        if self.moe_gate not in GATES:
            raise ValueError(f"moe_gate must be one of {GATES}, got {self.moe_gate!r}")

    def _check_simplicial(self) -> None:
        if len(self.simplicial_window) != 2 or min(self.simplicial_window) < 1:
            raise ValueError(f"simplicial_window must be two positive numbers (w1, w2), got {self.simplicial_window}")
        if self.simplicial_form not in SIMPLICIAL_FORMS:
            raise ValueError(f"simplicial_form must be one of {SIMPLICIAL_FORMS}, got {self.simplicial_form!r}")
        if self.simplicial_scale is not None and self.simplicial_scale <= 0:
            raise ValueError(f"simplicial_scale must be above 0, got {self.simplicial_scale}")
        check_position(self.simplicial_position, self.simplicial_form, self.simplicial_k2_bias)

    def validate_layer_type(self) -> None:
        """Replaces transformers' check, which knows no simplicial layer."""
        self._check_layer_types()

    @property
    def expert_intermediate_size(self) -> int:
        """Width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' reader of ``config.json``, with a Llama config translated."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _from_llama(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """transformers' constructor from a dictionary, with a Llama config translated."""
        # what a portable folder says of its code is of that folder: saved elsewhere it would name a missing file
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().from_dict(_from_llama(config_dict), **kwargs)


def _from_llama(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A Llama config dictionary as a Sid one; any other comes back as it is."""
    if config_dict.get("model_type") != "llama":
        return config_dict
    from transformers import LlamaConfig

    # through LlamaConfig, because what the file leaves out has Llama's defaults, not Sid's
    llama = LlamaConfig(**{name: value for name, value in config_dict.items() if name != "model_type"})
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
    for name, only in required.items():
        value = getattr(llama, name)
        if value != only:
            raise ValueError(f"Llama config: {name} must be {only!r} to load as a Sid model, got {value!r}")
    translated = llama.to_dict()
    for name in (*required, "pretraining_tp", "architectures"):
        translated.pop(name, None)
    translated |= {
        "model_type": "sid",
        "layer_types": ["full_attention"] * llama.num_hidden_layers,
        "mlp_type": "swiglu",
    }
    return translated
