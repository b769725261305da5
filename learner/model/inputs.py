"""What of a micro-batch this rank feeds to its part of the model.

All of it as it is, but with context parallelism: then each rank feeds its pieces of every sequence. (Tensor
parallelism splits tokens inside the model, behind the embedding.) Padding that `learner.packing` put there
counts as part of its sequence: it stands behind all real tokens, and none of them sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from learner.model.attention import PackedSequences
from learner.model.context import gather_values, owners
from learner.packing import MicroBatch


@dataclass(frozen=True, eq=False)
class Inputs:
    """This rank's tokens, and which of the micro-batch's targets are predicted from them."""

    batch: MicroBatch
    """The tokens of this rank's context-parallel share, with their experts; predictors, targets and
    temperatures are those of the targets `chosen`, all else is that of the whole micro-batch."""
    sequences: PackedSeqParams
    """Bounds of the padded sequences, of all ranks, as the attention of the batch's device wants them."""
    chosen: torch.Tensor | None
    """int64 [n]: indices of the targets that are predicted here; None: all."""
    total: int
    """N: targets of the micro-batch."""

    @classmethod
    def of(cls, batch: MicroBatch) -> Inputs:
        """The part of `batch` that is this rank's in the world it joined."""
        sequences, context = _sequences(batch), parallel_state.get_context_parallel_world_size()
        total = len(batch.targets)
        if context == 1:
            return cls(batch, sequences, None, total)
        rank = parallel_state.get_context_parallel_rank()
        owner = owners(batch.cu_seqlens_padded, context)
        mine = torch.nonzero(owner == rank).squeeze(1)
        chosen = torch.nonzero(owner[batch.predictors] == rank).squeeze(1)
        part = replace(
            batch,
            tokens=batch.tokens[mine],
            positions=batch.positions[mine],
            routed=None if batch.routed is None else batch.routed[mine],
            predictors=torch.searchsorted(mine, batch.predictors[chosen]),
            targets=batch.targets[chosen],
            temperature=batch.temperature[chosen],
        )
        return cls(part, sequences, chosen, total)

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """[N]: the values of all targets from those [n] of this rank's, on every context-parallel rank."""
        if self.chosen is None:
            return values
        return gather_values(values, self.chosen, self.total, parallel_state.get_context_parallel_group())


def _sequences(batch: MicroBatch) -> PackedSeqParams:
    """Where the sequences of `batch`, of which this rank feeds its share, start and end."""
    if not batch.tokens.is_cuda:
        context = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        return PackedSequences.of(batch.cu_seqlens_padded, context, rank)
    from learner.model.gpu import boundaries  # needs Transformer Engine

    return boundaries(batch)
