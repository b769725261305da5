"""A Megatron-Core `GPTModel` in the shape of a Hugging Face checkpoint."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from learner.model.cpu import stand_in_for_cuda
from learner.model.hf_config import Qwen3Shape
from learner.model.spec import layer_spec
from learner.model.world import join_world


def transformer_config(shape: Qwen3Shape) -> TransformerConfig:
    """Megatron-Core's description of `shape`: fp32, no dropout, no fusion that needs CUDA."""
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,  # a checkpoint is always loaded
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cuda_graph_modules=[],  # its default warns of being deprecated
        calculate_per_token_loss=True,  # gradients are summed over ranks: denominators are global
    )


def build_model(shape: Qwen3Shape) -> GPTModel:
    """The model with uninitialised weights, on the CPU, in a world that is joined if it was not."""
    if not torch.cuda.is_available():
        stand_in_for_cuda()
    join_world()
    # Its constructor warns that HybridModel will replace it; nothing a user could act upon.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    return GPTModel(
        config=transformer_config(shape),
        transformer_layer_spec=layer_spec(),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        parallel_output=False,
    )


def data_parallel(model: GPTModel) -> DistributedDataParallel:
    """Megatron-Core's data parallelism around `model`: one contiguous gradient buffer, summed over ranks."""
    config = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    return DistributedDataParallel(model.config, config, model)
