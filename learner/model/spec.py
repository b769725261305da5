"""The one place that chooses the modules of a layer."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_gated_delta_net_module_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from learner.model.attention import PackedAttention
from learner.model.norm import LATENT_NORM_EPS, DuplicatedLinear, NormColumnParallelLinear, RMSNorm
from learner.model.shape import LatentAttention, Layer, Shape


class CpuBackend(LocalSpecProvider):
    """Megatron-Core's own modules, with our norms and attention core for those that need a GPU."""

    def fuse_layernorm_and_linear(self) -> bool:
        """A norm and the linear layer behind it are one module, as with Transformer Engine."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """That module."""
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """A norm by itself."""
        return RMSNorm

    def core_attention(self) -> type:
        """Softmax attention over packed sequences."""
        return PackedAttention

    def latent_norm_linear(self) -> ModuleSpec:
        """The norm and linear layer that lead out of latent attention's bottleneck."""
        return ModuleSpec(NormColumnParallelLinear, params={"eps": LATENT_NORM_EPS})

    def down_linear(self) -> type:
        """The linear layer that leads into it."""
        return DuplicatedLinear


def _backend(config: TransformerConfig) -> BackendSpecProvider:
    if config.transformer_impl == "local":
        return CpuBackend()
    from learner.model.gpu import GpuBackend  # needs Transformer Engine

    if config.multi_latent_attention:
        return GpuBackend(config.qk_head_dim + config.qk_pos_emb_head_dim)
    return GpuBackend(config.kv_channels)


def block_spec(shape: Shape, config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    """The modules of `layers`, which are those of one pipeline stage, and of the norm behind the last."""
    backend = _backend(config)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(shape, shape.layers[number], config, backend) for number in layers],
        layer_norm=backend.layer_norm(),
    )


def _layer(shape: Shape, layer: Layer, config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    latent = isinstance(shape.attention, LatentAttention)
    if layer.delta_net:
        mixer = get_gated_delta_net_module_spec(config, backend)
    else:
        mixer = _latent_attention(backend) if latent else _attention(backend)
    experts = config.num_moe_experts if layer.experts else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            # Where the first linear layer of a block has no norm of its own, one stands before it.
            input_layernorm=backend.layer_norm() if latent else IdentityOp,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm() if layer.experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(
                backend, num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention(backend: BackendSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=backend.layer_norm(),
            k_layernorm=backend.layer_norm(),
        ),
    )


def _latent_attention(backend: BackendSpecProvider) -> ModuleSpec:
    normed, down = backend.latent_norm_linear(), backend.down_linear()
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=down,
            linear_q_up_proj=normed,
            linear_kv_down_proj=down,
            linear_kv_up_proj=normed,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )
