"""A Megatron-Core `GPTModel` in the shape of a Hugging Face checkpoint."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from learner.config import ParallelConfig, Recompute
from learner.errors import ModelError
from learner.model.cpu import stand_in_for_cuda
from learner.model.layout import check_shape, stage_layers
from learner.model.routing import order_choices
from learner.model.shape import DeltaNet, Experts, LatentAttention, Shape, Yarn
from learner.model.spec import block_spec
from learner.model.world import join_world, sizes

if TYPE_CHECKING:
    from learner.model.hybrid import PackedHybrid

CPU_FIELDS = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}
"""Fields of Megatron-Core's configuration without a GPU; with one: `learner.model.gpu.config_fields`."""


def transformer_config(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    parallel: ParallelConfig | None = None,
) -> TransformerConfig:
    """Megatron-Core's description of `shape`: parameters of `dtype`, no dropout; `parallel` None is alone."""
    latent = isinstance(shape.attention, LatentAttention)
    fields = _latent_attention(shape) if latent else _attention(shape)
    if shape.delta_net is not None:
        fields |= _delta_net(shape.delta_net, shape)
    if shape.experts is not None:
        fields |= _experts(shape.experts, shape)
    fields |= _gpu().config_fields(latent) if torch.cuda.is_available() else CPU_FIELDS
    return (MLATransformerConfig if latent else TransformerConfig)(
        **_common(shape, dtype)
        | _shared(parallel or ParallelConfig(), dtype)
        | _recompute(shape, recompute)
        | fields
    )


def _common(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """What holds for every family, unless it says otherwise."""
    return {
        "num_layers": len(shape.layers),
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.dense_width,
        "num_attention_heads": shape.attention.heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "layernorm_zero_centered_gamma": shape.zero_centred,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,  # a checkpoint is always loaded
        "cuda_graph_modules": [],  # its default warns of being deprecated
        "calculate_per_token_loss": True,  # gradients are summed over ranks: denominators are global
    }


def build_model(
    shape: Shape, dtype: torch.dtype = torch.float32, recompute: Recompute = "none"
) -> GPTModel | PackedHybrid:
    """This rank's part of the model, with uninitialised weights, on the GPU if there is one.

    It joins a world of one if none was joined. Its parameters are of `dtype`, but see `keep_gates`. Raises
    `ModelError` where a part is missing, `ConfigError` where ranks cannot share a model of this shape so.
    """
    if shape.hybrid is not None and not torch.cuda.is_available():
        raise ModelError(
            f"model_type {shape.family}: got a host without a GPU, expected one with mamba-ssm and "
            "causal-conv1d; the kernels of its Mamba-2 layers run nowhere else"
        )
    if not torch.cuda.is_available():
        stand_in_for_cuda()
    join_world()
    check_shape(sizes(), shape)
    if torch.cuda.is_available():
        _gpu().prepare()
    build = _gpt if shape.hybrid is None else _hybrid
    model = build(shape, dtype, recompute)
    keep_gates(model)
    order_choices(model)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.frozen_expert_bias = True  # as loaded, whatever the balance
    return model


def _gpt(shape: Shape, dtype: torch.dtype, recompute: Recompute) -> GPTModel:
    # Its constructor warns that HybridModel will replace it; nothing a user could act upon.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    parallel, stage = sizes(), parallel_state.get_pipeline_model_parallel_rank()
    config = transformer_config(shape, dtype, recompute, parallel)
    latent = isinstance(shape.attention, LatentAttention)
    return GPTModel(
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


def _hybrid(shape: Shape, dtype: torch.dtype, recompute: Recompute) -> PackedHybrid:
    if dtype != torch.bfloat16:
        raise ModelError(
            f"model.dtype: got float32 for {shape.family}, expected bfloat16: mamba-ssm's kernels were off "
            "in fp32 (docs/gpu.md)"
        )
    from learner.model.hybrid import build_hybrid  # needs Transformer Engine

    return build_hybrid(shape, _common(shape, dtype) | _recompute(shape, recompute))


def _recompute(shape: Shape, recompute: Recompute) -> dict[str, Any]:
    """What the backward pass computes again, in Megatron-Core's terms."""
    if recompute == "none":
        return {}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = ["mlp"]
    if not torch.cuda.is_available():  # a GPU's attention kernel does so by itself
        modules.append("core_attn")
    if shape.experts is not None:
        modules.append("moe")
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def keep_gates(model: torch.nn.Module) -> None:
    """Put back into fp32 what decides by small differences: routers, and the decay of recurrent layers."""
    for name, parameter in model.named_parameters():
        if name.endswith(("router.weight", "A_log", "dt_bias")):
            parameter.data = parameter.data.float()


def data_parallel(model: GPTModel, sharded: bool | None = None) -> DistributedDataParallel:
    """Megatron-Core's data parallelism around `model`: contiguous gradient buffers, summed over ranks.

    `sharded`: each rank keeps the optimizer's state of a part of them. None: on a GPU, where alone
    Megatron-Core takes the norm of such gradients.
    """
    config = DistributedDataParallelConfig(
        overlap_grad_reduce=False,
        use_distributed_optimizer=torch.cuda.is_available() if sharded is None else sharded,
        grad_reduce_in_fp32=True,
    )
    return DistributedDataParallel(model.config, config, model)


def _shared(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """How ranks share the model."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "pipeline_dtype": dtype,
        "variable_seq_lengths": parallel.pipeline > 1,  # micro-batches are packed, so lengths differ
        "moe_token_dispatcher_type": "alltoall",  # the one for such lengths, checked without experts, too
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _gpu() -> ModuleType:
    """What a GPU changes."""
    if not HAVE_TE:
        raise ModelError(
            "got a GPU without Transformer Engine, expected both; install the extra [gpu] (docs/gpu.md), "
            "or hide the GPU: CUDA_VISIBLE_DEVICES=''"
        )
    from learner.model import gpu

    return gpu


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
    }
