"""The one place that chooses the modules of a layer."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from learner.model.attention import PackedAttention


def layer_spec() -> ModuleSpec:
    """Megatron-Core's local dense layer with RMS norms, query and key norms, and our attention core."""
    submodules = get_gpt_layer_local_submodules(qk_layernorm=True, normalization="RMSNorm")
    submodules.self_attention.submodules.core_attention = PackedAttention
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
