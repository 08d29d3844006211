"""Sid models. Importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from sidlm.models.classification import SidForSequenceClassification
from sidlm.models.config import SidConfig
from sidlm.models.flops import forward_flops_per_token, num_parameters, train_flops_per_token
from sidlm.models.modeling import SidForCausalLM, SidModel
from sidlm.models.presets import PRESETS, preset

AutoConfig.register(SidConfig.model_type, SidConfig, exist_ok=True)
AutoModel.register(SidConfig, SidModel, exist_ok=True)
AutoModelForCausalLM.register(SidConfig, SidForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SidConfig, SidForSequenceClassification, exist_ok=True)

__all__ = [
    "PRESETS",
    "SidConfig",
    "SidForCausalLM",
    "SidForSequenceClassification",
    "SidModel",
    "forward_flops_per_token",
    "num_parameters",
    "preset",
    "train_flops_per_token",
]
