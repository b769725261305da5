"""Mamba-2 hybrids, which are Megatron-Core's `HybridModel`. GPUs only: its kernels have no CPU twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from learner.model.gpu import config_fields
from learner.model.shape import Mamba, Shape


class PackedHybrid(HybridModel):
    """A `HybridModel` with the output hook that `GPTModel` has, so that both run alike."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedSeqParams,
        output_processor: Callable[..., Any],
        output_processor_context: Any,
    ) -> Any:
        """What `output_processor` makes of the last hidden states [T, 1, H] of packed `input_ids` [1, T]."""
        hidden = self.decoder(
            hidden_states=self.embedding(input_ids=input_ids, position_ids=position_ids),
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
        )
        tied = self.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=hidden,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            context=output_processor_context,
        )


def build_hybrid(shape: Shape, common: dict[str, Any]) -> PackedHybrid:
    """The model with uninitialised weights; `common` are the configuration's fields of every family."""
    mamba, attention = shape.hybrid.mamba, shape.attention
    fields = (
        common
        | config_fields(latent=False)
        | {
            "num_layers": len(shape.hybrid.pattern),
            "num_query_groups": attention.groups,
            "kv_channels": attention.head_dim,
            "mamba_num_heads": mamba.heads,
            "mamba_head_dim": mamba.head_dim,
            "mamba_num_groups": mamba.groups,
            "mamba_state_dim": mamba.state,
            "gated_linear_unit": False,
            "activation_func": squared_relu,
            "bias_activation_fusion": False,  # there is none for squared ReLU
            "is_hybrid_model": True,
        }
    )
    return PackedHybrid(
        config=TransformerConfig(**fields),
        hybrid_stack_spec=_stack(mamba),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_length,
        hybrid_layer_pattern=shape.hybrid.pattern,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none",
    )


def _stack(mamba: Mamba) -> ModuleSpec:
    """Megatron-Core's own modules, with the two sizes that are no fields of its configuration."""
    spec = copy.deepcopy(hybrid_stack_spec)
    mixer = spec.submodules.mamba_layer.submodules.mixer
    mixer.params = {"d_conv": mamba.kernel, "chunk_size": mamba.chunk}
    return spec
