"""What of a micro-batch this rank feeds to its part of the model.

Alone, all of it as it is. With context parallelism every sequence is padded to a multiple of 2 * context
and dealt out; with tensor parallelism the last one is padded further, until each rank's tokens divide by it.
Padding stands behind a sequence's last token, which no real token sees, and is no target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

import torch
from megatron.core import parallel_state

from learner.model.attention import PackedSequences
from learner.model.context import gather_values, owners
from learner.packing import MicroBatch


@dataclass(frozen=True, eq=False)
class Inputs:
    """This rank's tokens, and which of the micro-batch's targets are predicted from them."""

    batch: MicroBatch
    """The tokens of this rank's context-parallel share; predictors, targets and temperatures are those of
    the targets `chosen`, all else is that of the whole micro-batch."""
    sequences: PackedSequences
    """Bounds of the padded sequences and the plan of attention."""
    chosen: torch.Tensor | None
    """int64 [n]: indices of the targets that are predicted here; None: all."""
    total: int
    """N: targets of the micro-batch."""

    @classmethod
    def of(cls, batch: MicroBatch) -> Inputs:
        """The part of `batch` that is this rank's in the world it joined."""
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        context = parallel_state.get_context_parallel_world_size()
        total = len(batch.targets)
        if tensor * context > 1:
            batch = padded(batch, tensor, context)
        if context == 1:
            return cls(batch, PackedSequences.of(batch.cu_seqlens), None, total)
        rank = parallel_state.get_context_parallel_rank()
        owner = owners(batch.cu_seqlens, context)
        mine = torch.nonzero(owner == rank).squeeze(1)
        chosen = torch.nonzero(owner[batch.predictors] == rank).squeeze(1)
        part = replace(
            batch,
            tokens=batch.tokens[mine],
            positions=batch.positions[mine],
            predictors=torch.searchsorted(mine, batch.predictors[chosen]),
            targets=batch.targets[chosen],
            temperature=batch.temperature[chosen],
        )
        return cls(part, PackedSequences.of(batch.cu_seqlens, context, rank), chosen, total)

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """[N]: the values of all targets from those [n] of this rank's, on every context-parallel rank."""
        if self.chosen is None:
            return values
        return gather_values(values, self.chosen, self.total, parallel_state.get_context_parallel_group())


def padded(batch: MicroBatch, tensor: int, context: int) -> MicroBatch:
    """`batch` with token 0 behind its sequences, see the top of this file; targets stay what they were."""
    unit = 2 * context if context > 1 else 1
    lengths = torch.diff(batch.cu_seqlens).long()
    wide = (lengths + unit - 1) // unit * unit
    wide[-1] += -int(wide.sum()) % lcm(unit, tensor * context)
    bounds = torch.nn.functional.pad(wide.cumsum(0), (1, 0))
    # Where each token goes, and which place of its sequence each place is.
    moved = torch.repeat_interleave(bounds[:-1] - batch.cu_seqlens[:-1], lengths) + torch.arange(
        len(batch.tokens)
    )
    return replace(
        batch,
        tokens=batch.tokens.new_zeros(int(bounds[-1])).index_copy(0, moved, batch.tokens),
        positions=torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], wide),
        cu_seqlens=bounds.int(),
        max_length=int(wide.max()),
        predictors=moved[batch.predictors],
    )
