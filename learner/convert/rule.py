"""One Megatron-Core tensor and the Hugging Face tensors it is made of.

A rule says it once, as an order of rows; loading and exporting are that order and its inverse, so
the two cannot disagree. Worked example::

    rule = Rule("mlp.linear_fc1.weight", (Part("gate", (2, 8)), Part("up", (2, 8))))
    merged = rule.merge([gate, up])     # [4, 8]: gate above up
    rule.split(merged)                  # [gate, up]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Its dimensions; rows are the first."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Rule:
    """How one Megatron-Core tensor is made of Hugging Face tensors, and they of it."""

    mcore: str
    """Name of the parameter or buffer in `GPTModel`."""
    parts: tuple[Part, ...]
    """What it is made of, stacked in this order before rows are moved."""
    order: torch.Tensor | None = None
    """int64 [rows]: which row of the stack each row of the Megatron-Core tensor is; None: as stacked."""
    shift: float = 0.0
    """Added on the way to Megatron-Core: -1 for a gain that it keeps zero-centred.

    In fp32 the way there and back is exact for gains in [0.5, 2] and for every gain that bf16 holds
    down to 2**-16; in bf16 it is not, so what is shifted is exported and digested in fp32."""
    sections: tuple[tuple[str, int], ...] = ()
    """Names and rows of the pieces in which a distributed checkpoint stores it; empty: whole."""
    stored: str = ""
    """Name in a distributed checkpoint; empty: that of the parameter."""
    expert: int | None = None
    """Number of the expert it belongs to; a distributed checkpoint stacks experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the Megatron-Core tensor."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def keys(self) -> dict[str, tuple[int, ...]]:
        """Keys in a distributed checkpoint, with the shape of this tensor's share of each.

        They do not depend on tensor, pipeline or expert parallelism: sections have keys of their
        own, and an expert is one slice of a key that holds all of its layer. The checkpoint must be
        saved with `non_homogeneous_layers`, without which layers that are all alike share keys.
        """
        if self.expert is not None:
            return {self.mcore.replace(f"local_experts.{self.expert}.", "experts."): self.shape}
        name = self.stored or self.mcore
        if not self.sections:
            return {name: self.shape}
        return {f"{name}.{section}": (rows, *self.shape[1:]) for section, rows in self.sections}

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The Megatron-Core tensor from the Hugging Face ones, given in the order of `parts`."""
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.order is not None:
            stacked = stacked.index_select(0, self.order)
        return stacked + self.shift if self.shift else stacked

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors, in the order of `parts`, from the Megatron-Core one; views or copies."""
        stacked = merged - self.shift if self.shift else merged
        if self.order is not None:
            stacked = torch.empty_like(stacked).index_copy_(0, self.order.to(stacked.device), stacked)
        return list(stacked.split([part.shape[0] for part in self.parts]))
