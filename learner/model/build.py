"""A Megatron-Core `GPTModel` in the shape of a Hugging Face checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from learner.config import ParallelConfig
from learner.model.cpu import stand_in_for_cuda
from learner.model.layout import check_shape, stage_layers
from learner.model.shape import DeltaNet, Experts, LatentAttention, Shape, Yarn
from learner.model.spec import block_spec
from learner.model.world import join_world, sizes


def transformer_config(shape: Shape, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron-Core's description of `shape`: fp32, no dropout, no fusion that needs CUDA."""
    latent = isinstance(shape.attention, LatentAttention)
    fields = _latent_attention(shape) if latent else _attention(shape)
    if shape.delta_net is not None:
        fields |= _delta_net(shape.delta_net, shape)
    if shape.experts is not None:
        fields |= _experts(shape.experts, shape)
    return (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=len(shape.layers),
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.dense_width,
        num_attention_heads=shape.attention.heads,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.zero_centred,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,  # a checkpoint is always loaded
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cuda_graph_modules=[],  # its default warns of being deprecated
        calculate_per_token_loss=True,  # gradients are summed over ranks: denominators are global
        **_shared(parallel),
        **fields,
    )


def build_model(shape: Shape) -> GPTModel:
    """This rank's part of the model, with uninitialised weights, on the CPU.

    It joins a world of one if none was joined. Raises `ConfigError` where the world's ranks cannot share a
    model of this shape.
    """
    if not torch.cuda.is_available():
        stand_in_for_cuda()
    join_world()
    parallel = sizes()
    check_shape(parallel, shape)
    # Its constructor warns that HybridModel will replace it; nothing a user could act upon.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    config = transformer_config(shape, parallel)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    latent = isinstance(shape.attention, LatentAttention)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(shape, config, stage_layers(shape, parallel, stage)),
        pre_process=stage == 0,
        post_process=stage == parallel.pipeline - 1,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_length,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none" if latent else "rope",  # latent attention rotates by itself
        rotary_base=shape.rope_theta,
        rotary_percent=1.0 if latent else shape.attention.rotary,
        parallel_output=True,  # learner.model.output reads vocabulary-parallel logits
    )
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.frozen_expert_bias = True  # as loaded, whatever the balance
    return model


def data_parallel(model: GPTModel) -> DistributedDataParallel:
    """Megatron-Core's data parallelism around `model`: contiguous gradient buffers, summed over ranks."""
    config = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    return DistributedDataParallel(model.config, config, model)


def _shared(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "pipeline_dtype": torch.float32,
        "variable_seq_lengths": parallel.pipeline > 1,  # micro-batches are packed, so lengths differ
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _attention(shape: Shape) -> dict[str, Any]:
    attention = shape.attention
    return {
        "num_query_groups": attention.groups,
        "kv_channels": attention.head_dim,
        "qk_layernorm": True,
        "attention_output_gate": attention.gated,
    }


def _latent_attention(shape: Shape) -> dict[str, Any]:
    attention = shape.attention
    return {
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.key_rank,
        "qk_head_dim": attention.plain_dim,
        "qk_pos_emb_head_dim": attention.rotary_dim,
        "v_head_dim": attention.value_dim,
        "rotary_base": shape.rope_theta,
        **_yarn(attention.yarn),
    }


def _yarn(yarn: Yarn | None) -> dict[str, Any]:
    if yarn is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _delta_net(delta_net: DeltaNet, shape: Shape) -> dict[str, Any]:
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(layer.delta_net) for layer in shape.layers],
        "linear_num_key_heads": delta_net.key_heads,
        "linear_num_value_heads": delta_net.value_heads,
        "linear_key_head_dim": delta_net.key_dim,
        "linear_value_head_dim": delta_net.value_dim,
        "linear_conv_kernel_dim": delta_net.kernel,
    }


def _experts(experts: Experts, shape: Shape) -> dict[str, Any]:
    grouped = experts.groups > 1
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(layer.experts) for layer in shape.layers],
        "moe_ffn_hidden_size": experts.width,
        "moe_shared_expert_intermediate_size": experts.shared_width or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_topk": experts.chosen,
        "moe_router_score_function": experts.score,
        "moe_router_dtype": "fp32",
        # Softmax over the chosen logits is softmax over all, normalised over the chosen.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalised,
        "moe_router_topk_scaling_factor": None if experts.scale == 1 else experts.scale,
        "moe_router_num_groups": experts.groups if grouped else None,
        "moe_router_group_topk": experts.chosen_groups if grouped else None,
        "moe_router_enable_expert_bias": experts.score == "sigmoid",
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "none",  # no auxiliary loss
        "moe_token_dispatcher_type": "alltoall",
    }
