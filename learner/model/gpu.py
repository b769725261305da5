"""Megatron-Core on a GPU: every choice that differs from the CPU, in one place.

Linear layers, norms, softmax attention and experts are Transformer Engine's, the products of a layer's
experts are grouped, gated DeltaNet runs on flash-linear-attention (Megatron-Core calls it by itself).
Keys and tensors of a checkpoint are those of the CPU's modules, so either reads what the other wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TELayerNormColumnParallelLinear,
    TELinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from torch.nn.attention import SDPBackend, sdpa_kernel

from learner.model.attention import PackedAttention, PackedSequences
from learner.model.cpu import rotate_packed
from learner.model.norm import LATENT_NORM_EPS
from learner.packing import MicroBatch

_RIGHT_CUDNN = (9, 19, 0)
_TORCH_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class LatentNormLinear(TELayerNormColumnParallelLinear):
    """A norm and the linear layer behind it inside latent attention, with that norm's own epsilon."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The arguments of Megatron-Core's `TELayerNormColumnParallelLinear`."""
        super().__init__(*args, **kwargs)
        self.eps = LATENT_NORM_EPS


class WideAttention(PackedAttention):
    """Softmax attention of heads wider than 128, by torch's kernels other than cuDNN's.

    Of packed sequences with heads of width 192 and 256 cuDNN 9.14, which Transformer Engine takes on Hopper,
    gave gradients that were a third off; of grouped ones, now and then, nan. Those of 9.19 are right.
    """

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """As `PackedAttention.forward`."""
        with sdpa_kernel(_TORCH_KERNELS):
            return super().forward(*arguments, **named)


class GpuBackend(TESpecProvider):
    """Transformer Engine's modules, as Megatron-Core chooses them, and two for latent attention."""

    def __init__(self, head_dim: int) -> None:
        """`head_dim`: width of the heads of softmax attention."""
        from transformer_engine.pytorch.utils import get_cudnn_version  # no CPU has it

        self._wide = head_dim > 128 and get_cudnn_version() < _RIGHT_CUDNN

    def core_attention(self) -> type:
        """Softmax attention over packed sequences."""
        return WideAttention if self._wide else super().core_attention()

    def latent_norm_linear(self) -> type:
        """The norm and linear layer that lead out of a bottleneck."""
        return LatentNormLinear

    def down_linear(self) -> type:
        """The linear layer that leads into a bottleneck."""
        return TELinear


def config_fields(latent: bool) -> dict[str, Any]:
    """Fields of Megatron-Core's configuration that a GPU wants.

    Not fused: the router, which is to stay in fp32, and rotary embeddings of latent attention, whose
    kernel knows YaRN alone.
    """
    return {
        "transformer_impl": "transformer_engine",
        "use_cpu_initialization": False,
        "apply_rope_fusion": not latent,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
    }


def prepare() -> None:
    """What has to be so before a model is built; calling it again changes nothing."""
    # Megatron-Core's modules ask for its random state even where nothing is initialised or dropped.
    model_parallel_cuda_manual_seed(0)
    # Transformer Engine's product for the router takes one dtype only, and rounds fp32 to TF32.
    moe_utils.te_general_gemm = None
    # Megatron-Core's unfused rotary embedding runs a few kernels for every sequence.
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed


def boundaries(batch: MicroBatch) -> PackedSequences:
    """Where sequences of `batch` start and end, for attention, gated DeltaNet and Mamba-2."""
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens_padded,  # no token behind a sequence is read
        cu_seqlens_kv=batch.cu_seqlens_padded,
        max_seqlen_q=batch.max_length,
        max_seqlen_kv=batch.max_length,
        total_tokens=len(batch.tokens),
        pad_between_seqs=False,
    )
