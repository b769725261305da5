"""The attention core of the learner: causal attention over packed sequences.

Megatron-Core's own local core refuses packed sequences and asks for the CUDA random state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class PackedSequences(PackedSeqParams):
    """Packed sequences with the plan by which attention pads them, made once a micro-batch.

    Sequences are padded only to the longest of their own class of lengths (a power of two), so
    that one long sequence does not make all short ones pay its length squared.
    """

    classes: list[torch.Tensor] = field(default_factory=list)
    """Of each class int64 [n, L]: indices of packed tokens; places after a sequence's end repeat its last."""
    inverse: torch.Tensor = None
    """int64 [T]: where each packed token lies in the concatenation of the flattened classes."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> PackedSequences:
        """The plan for sequences bounded by `cu_seqlens` (int32 [S + 1])."""
        bounds = cu_seqlens.numpy().astype(np.int64)
        lengths = np.diff(bounds)
        classes, inverse, offset = [], np.empty(bounds[-1], np.int64), 0
        kinds = np.ceil(np.log2(lengths)).astype(np.int64)
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            steps = np.arange(lengths[members].max())
            inside = steps < lengths[members, None]
            indices = bounds[members, None] + np.minimum(steps, lengths[members, None] - 1)
            inverse[indices[inside]] = offset + np.flatnonzero(inside)
            classes.append(torch.from_numpy(indices))
            offset += indices.size
        longest = int(lengths.max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            classes=classes,
            inverse=torch.from_numpy(inverse),
        )


class PackedAttention(MegatronModule):
    """Scaled dot-product attention, causal within each packed sequence and blind to all others."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """The arguments with which Megatron-Core's attention modules build their core."""
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Attend: `query` [T, heads, D], `key` and `value` [T, groups, D or Dv]; returns [T, heads * Dv]."""
        repeats = query.size(1) // key.size(1)
        outputs = []
        for indices in packed_seq_params.classes:
            q, k, v = (_padded(tensor, indices) for tensor in (query, key, value))
            if repeats > 1:
                k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed_seq_params.inverse)


def _padded(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] gathered to [n, heads, L, D]; padding is never attended to by a real token."""
    gathered = tensor.index_select(0, indices.flatten())
    return gathered.unflatten(0, indices.shape).transpose(1, 2)
