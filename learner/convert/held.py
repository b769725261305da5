"""What each rank holds of a model, and the whole of it on rank 0.

Megatron-Core describes the parameters of a rank as slices of the keys of a distributed checkpoint. A rule's
tensor is slices of the same keys, so the two meet whatever the layout, and no rule knows of ranks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.models.gpt import GPTModel

from learner.convert.names import rules
from learner.convert.rule import Rule
from learner.convert.shares import Share, pieces, shares
from learner.errors import ModelError
from learner.model.shape import Shape
from learner.model.world import gather_bytes

BUCKET = 1 << 24
"""Elements, about, that travel to rank 0 at once: 64 MiB in fp32."""
_ALIGNED = 8
"""Bytes at whose multiples a tensor begins in a message, so that it can be looked at in its dtype."""


class Region(msgspec.Struct, frozen=True):
    """A slice of a key."""

    key: str
    """Name in the distributed checkpoint."""
    expert: int | None
    """The expert to which it belongs, where the key holds all of a layer."""
    start: tuple[int, ...]
    """Where it begins in the key."""
    size: tuple[int, ...]
    """Its dimensions."""
    dtype: str
    """That of its elements, as torch names it."""

    def of(self, whole: torch.Tensor, share: Share) -> torch.Tensor:
        """The region's part of `whole`, which has the size of `share`: a view."""
        for dim, (begin, length) in enumerate(zip(self.start, self.size, strict=True)):
            whole = whole.narrow(dim, begin - share.start[dim], length)
        return whole


def alone() -> bool:
    """Whether this process is the only rank: names are then enough, and the quicker way."""
    return dist.get_world_size() == 1


def named_tensors(model: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers of `model` by the names of rules; writing to them writes to the model."""
    state = model.state_dict(keep_vars=True)
    return {
        rule_name(name): value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")  # FP8 scales
    }


def rule_name(name: str) -> str:
    """What a rule calls a parameter: Transformer Engine numbers the weights of grouped experts instead."""
    return re.sub(r"\.experts\.(\w+)\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)


class Held:
    """Views of this rank's parameters and saved buffers."""

    def __init__(self, model: GPTModel) -> None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = model.sharded_state_dict(metadata={"dp_cp_group": group, "non_homogeneous_layers": True})
        apply_factories(state)
        self.tensors: dict[Region, torch.Tensor] = {}
        """Tensors of their region's size; writing to one writes to the model."""
        self.main: list[Region] = []
        """The regions that this rank, of those that hold the same, hands out."""
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor):
                continue
            size = (*[1] * shard.prepend_axis_num, *shard.local_shape)
            region = Region(
                shard.key,
                shard.global_offset[0] if shard.prepend_axis_num else None,
                tuple(shard.global_offset),
                size,
                str(shard.data.dtype).removeprefix("torch."),
            )
            self.tensors[region] = shard.data.detach().view(size)
            if is_main_replica(shard.replica_id):
                self.main.append(region)


def by_share(regions: Iterable[Region]) -> dict[tuple[str, int | None], list[Region]]:
    """The regions of each key and expert, that is, of each share, in order."""
    found: dict[tuple[str, int | None], list[Region]] = {}
    for region in sorted(regions, key=lambda region: (region.key, region.start)):
        found.setdefault((region.key, region.expert), []).append(region)
    return found


def whole_tensors(model: GPTModel, shape: Shape) -> Iterator[tuple[Rule, torch.Tensor]]:
    """Each rule's tensor, put together on rank 0 from all ranks, in the order of the rules.

    A collective of all ranks; the others get nothing. Each has the dtype that it has in the model, and is a
    view of it where rank 0 is alone. Raises `ModelError` there if no rank holds a part of a tensor.
    """
    if alone():
        own = named_tensors(model)
        yield from ((rule, own[rule.mcore].detach()) for rule in rules(shape))
        return
    held, rank = Held(model), dist.get_rank()
    described = gather_bytes(msgspec.msgpack.encode(held.main), dist.group.WORLD)
    owned = [by_share(msgspec.msgpack.decode(data, type=list[Region])) for data in described]
    if rank:
        _send_all(held, owned[rank], shape)
        return

    def coming(bucket: list[Rule]) -> list[_Coming]:
        """What other ranks send of a bucket, asked for, and what is here."""
        wanted = [share for rule in bucket for share in shares(rule, shape)]
        return [
            _Coming(_pairs(regions, wanted), source, held if source == 0 else None)
            for source, regions in enumerate(owned)
        ]

    # The next bucket is on its way while this one is put together and used.
    ahead = ((bucket, coming(bucket)) for bucket in _buckets(shape))
    now = next(ahead, None)
    while now is not None:
        (bucket, parts), now = now, next(ahead, None)
        found: defaultdict[Share, list[tuple[Region, torch.Tensor]]] = defaultdict(list)
        for part in parts:
            for (region, share), tensor in part.tensors():
                found[share].append((region, tensor))
        for rule in bucket:
            yield rule, _assembled(rule, shape, found)


def _pairs(
    regions: dict[tuple[str, int | None], list[Region]], wanted: list[Share]
) -> list[tuple[Region, Share]]:
    """Those of `regions` that lie in one of the shares `wanted`, with it, in the order of shares."""
    return [(region, share) for share in wanted for region in regions.get((share.key, share.expert), ())]


def _assembled(
    rule: Rule, shape: Shape, found: dict[Share, list[tuple[Region, torch.Tensor]]]
) -> torch.Tensor:
    """A rule's tensor from the regions of its shares."""
    parts = [part for share in shares(rule, shape) for part in found[share]]
    if sum(tensor.numel() for _, tensor in parts) != prod(rule.shape):
        raise ModelError(f"{rule.mcore}: the ranks hold {[region for region, _ in parts]} of {rule.shape}")
    if len(parts) == 1:
        return parts[0][1].view(rule.shape)
    merged = torch.empty(rule.shape, dtype=parts[0][1].dtype)
    for share, piece in pieces(rule, shape, merged):
        for region, tensor in found[share]:
            region.of(piece, share).copy_(tensor)
    return merged


def _buckets(shape: Shape) -> Iterator[list[Rule]]:
    """The rules in order, in runs of about `BUCKET` elements."""
    bucket: list[Rule] = []
    elements = 0
    for rule in rules(shape):
        bucket.append(rule)
        elements += prod(rule.shape)
        if elements >= BUCKET:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def _send_all(held: Held, own: dict[tuple[str, int | None], list[Region]], shape: Shape) -> None:
    """To rank 0, one message a bucket; the next one is put together while one is on its way."""
    sending: dist.Work | None = None
    for bucket in _buckets(shape):
        wanted = [share for rule in bucket for share in shares(rule, shape)]
        regions = [region for region, _ in _pairs(own, wanted)]
        if not regions:
            continue
        message, rooms = _message(regions)
        for region, room in zip(regions, rooms, strict=True):
            room.copy_(held.tensors[region])
        if sending is not None:
            sending.wait()
        sending, sent = dist.isend(message, 0), message  # which must live until it has arrived
    if sending is not None:
        sending.wait()
        del sent


def _message(regions: list[Region]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Room for `regions` in one piece of CPU memory, uint8, and that of each, of its size and dtype."""
    kinds = [getattr(torch, region.dtype) for region in regions]
    nbytes = [prod(region.size) * kind.itemsize for region, kind in zip(regions, kinds, strict=True)]
    padded = [-(-count // _ALIGNED) * _ALIGNED for count in nbytes]
    message = torch.empty(sum(padded), dtype=torch.uint8)
    rooms = [
        piece[:count].view(kind).view(region.size)
        for piece, count, kind, region in zip(message.split(padded), nbytes, kinds, regions, strict=True)
    ]
    return message, rooms


class _Coming:
    """What one rank has of a bucket, at rank 0."""

    def __init__(self, pairs: list[tuple[Region, Share]], source: int, held: Held | None) -> None:
        """Asks rank `source` for its message; `held` is what rank 0 has itself."""
        self._pairs, self._held = pairs, held
        self._work: dist.Work | None = None
        if pairs and held is None:
            message, self._rooms = _message([region for region, _ in pairs])
            self._work = dist.irecv(message, source)

    def tensors(self) -> Iterator[tuple[tuple[Region, Share], torch.Tensor]]:
        """The regions with their tensors, once they are here."""
        if self._held is not None:
            parts = [self._held.tensors[region].cpu() for region, _ in self._pairs]
        elif self._work is not None:
            self._work.wait()
            parts = self._rooms
        else:
            parts = []
        yield from zip(self._pairs, parts, strict=True)
