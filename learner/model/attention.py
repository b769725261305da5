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
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from learner.model.context import owners, places, positions


@dataclass
class Kind:
    """Sequences of about the same length, and the tokens of each, padded to the longest of them."""

    queries: torch.Tensor
    """int64 [n, Lq]: indices of tokens on this rank; places after a sequence's end repeat its last."""
    keys: torch.Tensor
    """int64 [n, L]: indices of tokens of all context-parallel ranks, rank after rank; padded the same way."""
    mask: torch.Tensor | None
    """bool [n, 1, Lq, L]: which keys a query attends to; None: those up to its own index."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Packed sequences with the plan by which attention pads them, made once a micro-batch.

    Sequences are padded only to the longest of their own class of lengths (a power of two), so
    that one long sequence does not make all short ones pay its length squared.
    """

    kinds: list[Kind] = field(default_factory=list)
    """The classes."""
    inverse: torch.Tensor = None
    """int64 [T]: where each packed token lies in the concatenation of the classes' flattened queries."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, context: int = 1, rank: int = 0) -> PackedSequences:
        """The plan for sequences bounded by `cu_seqlens` (int32 [S + 1]), of which this rank, of `context`,
        holds its share; lengths are then multiples of 2 * context."""
        bounds = cu_seqlens.numpy().astype(np.int64)
        lengths = np.diff(bounds)
        owner = owners(cu_seqlens, context) if context > 1 else None
        kinds, inverse, offset = [], np.empty(bounds[-1] // context, np.int64), 0
        classes = np.ceil(np.log2(lengths)).astype(np.int64)
        for kind in np.unique(classes):
            members = np.flatnonzero(classes == kind)
            indices, inside = _padded_indices(bounds[members] // context, lengths[members] // context)
            inverse[indices[inside]] = offset + np.flatnonzero(inside)
            offset += indices.size
            queries = torch.from_numpy(indices)
            if owner is None:
                kinds.append(Kind(queries, queries, None))
                continue
            keys = torch.from_numpy(_padded_indices(bounds[members], lengths[members])[0])
            steps = positions(cu_seqlens)[owner == rank][queries]
            mask = steps[:, None, :, None] >= torch.arange(keys.size(1))
            kinds.append(Kind(queries, places(owner, context)[keys], mask))
        longest = int(lengths.max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            kinds=kinds,
            inverse=torch.from_numpy(inverse),
        )

    def plan(self, context: ProcessGroup, device: torch.device) -> None:
        """Add the classes to what has bounds alone, as on a GPU, where few models need them."""
        made = PackedSequences.of(self.cu_seqlens_q.cpu(), context.size(), context.rank())
        self.kinds = [
            Kind(
                kind.queries.to(device),
                kind.keys.to(device),
                None if kind.mask is None else kind.mask.to(device),
            )
            for kind in made.kinds
        ]
        self.inverse = made.inverse.to(device)


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
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """The arguments with which Megatron-Core's attention modules build their core."""
        super().__init__(config=config)
        self.scale = softmax_scale
        self.context = pg_collection.cp

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
        """Attend: `query` [T, heads, D], `key` and `value` [T, groups, D or Dv]; returns [T, heads * Dv].

        With context parallelism T counts this rank's tokens; keys and values are gathered from all ranks.
        """
        if not packed_seq_params.kinds:
            packed_seq_params.plan(self.context, query.device)
        if self.context.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.context) for x in (key, value))
        repeats = query.size(1) // key.size(1)
        outputs = []
        for kind in packed_seq_params.kinds:
            q, k, v = _padded(query, kind.queries), _padded(key, kind.keys), _padded(value, kind.keys)
            if repeats > 1:
                k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
            attended = F.scaled_dot_product_attention(
                q, k, v, kind.mask, is_causal=kind.mask is None, scale=self.scale
            )
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed_seq_params.inverse)


def _padded_indices(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n, longest]: indices of n sequences' tokens, the last repeated; and which are not repeats."""
    steps = np.arange(lengths.max())
    return starts[:, None] + np.minimum(steps, lengths[:, None] - 1), steps < lengths[:, None]


def _padded(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] gathered to [n, heads, L, D]; padding is never attended to by a real token."""
    gathered = tensor.index_select(0, indices.flatten())
    return gathered.unflatten(0, indices.shape).transpose(1, 2)
