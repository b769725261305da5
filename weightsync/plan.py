"""How a model's own tensors are made of the exported ones: the copies that its loading makes, seen once.

An engine keeps weights in a layout of its own: fused projections, stacked experts, a rank's shards. Its
`load_weights` knows how to get there from Hugging Face names, one Python call a tensor. All that this
does to the weights is copies between views, so it is watched once, and later versions repeat the copies:

    plan = watch(model, views, load)    # loads a version by names
    plan.copy(image)                    # loads another one of the same layout

What is then computed from the engine's own tensors into its buffers (a norm's gain plus one) is repeated as
well. Where loading does anything else (quantizes, makes new tensors), there is no plan, and every version
goes by names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.copies import Copy, merged

_COPY = torch.ops.aten.copy_.default
_SAME = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
"""Operators whose result is their argument somewhere else, or in another type."""
_CONSTANT = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
"""Operators that need not be repeated: what they leave does not depend on the version."""
_PADDED = ("embed_tokens", "lm_head")
"""Tensors whose rows SGLang pads; the padding is never loaded."""


@dataclass(frozen=True, eq=False)
class Derived:
    """A buffer of the engine's that is computed from its tensors, a step at a time."""

    function: Callable[..., torch.Tensor]
    """An operator that fills the buffer from live tensors, or changes it after that in place."""
    arguments: tuple[Any, ...]
    """By position, live tensors among them."""
    named: dict[str, Any]
    """Likewise by name."""

    def compute(self) -> None:
        """Fills or changes the buffer."""
        self.function(*self.arguments, **self.named)


@dataclass(eq=False)
class Plan:
    """All copies that load one layout into one model."""

    layout: str
    """Fingerprint of the image's layout."""
    addresses: dict[str, int]
    """Where each tensor of the model lay; one that has moved since makes the plan void."""
    copies: list[Copy] = field(default_factory=list)
    """From the image into the engine's tensors, even runs merged."""
    derived: list[Derived] = field(default_factory=list)
    """In the order in which they are computed, after all copies."""
    reason: str = ""
    """Why versions must go by names instead; empty if the copies are all that loading does."""

    def fits(self, layout: str, model: torch.nn.Module) -> bool:
        """Whether it is a plan for this layout and for the model as it lies in memory now."""
        return self.layout == layout and self.addresses == _addresses(model)

    def copy(self, image: torch.Tensor) -> None:
        """Fills the model from `image`, uint8 [bytes]."""
        for copy in self.copies:
            copy.target.copy_(copy.source(image))
        for derived in self.derived:
            derived.compute()

    def unequal(self, image: torch.Tensor) -> int:
        """How many copies are not equal, bit by bit, to what they should be."""
        pairs = ((_bits(copy.target), _bits(copy.source(image).to(copy.target))) for copy in self.copies)
        found = [_differ(*pair) for pair in pairs]
        return int(torch.stack(found).sum()) if found else 0


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by name; one that has several names, by the first."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def watch(
    model: torch.nn.Module,
    layout: str,
    image: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object],
) -> Plan:
    """Loads `tensors`, which are views of `image`, by `load`, and returns the plan of what that did."""
    live = live_tensors(model)
    plan = Plan(layout, _addresses(model))
    watcher = _Watcher(image, live, dict(model.named_buffers()))
    with torch.no_grad(), watcher:
        load(watcher.fed(tensors))
    plan.copies, plan.derived, plan.reason = watcher.copies, watcher.derived, watcher.reason
    if plan.addresses != _addresses(model):
        plan.reason = "loading moves the engine's tensors"
    elif not plan.reason and plan.unequal(image):
        plan.reason = "loading changes what it has copied"
    if hasattr(model, "post_load_weights"):
        plan.reason = "the model derives tensors from its weights"
    plan.copies = merged(plan.copies)
    return plan


def uncovered(plan: Plan, model: torch.nn.Module) -> list[str]:
    """Tensors of the model that loading leaves as they were, or leaves in part."""
    filled: dict[int, int] = {}
    for copy in plan.copies:
        address = copy.target.untyped_storage().data_ptr()
        filled[address] = filled.get(address, 0) + copy.target.numel()
    missing = []
    for name, tensor in live_tensors(model).items():
        count = filled.get(tensor.untyped_storage().data_ptr(), 0)
        if count == 0 or (count < tensor.numel() and not any(part in name for part in _PADDED)):
            missing.append(f"{name} ({count} of {tensor.numel()} elements filled)")
    return missing


class _Watcher(TorchDispatchMode):
    """Notes copies from the image into the model, and anything else that loading computes."""

    def __init__(
        self, image: torch.Tensor, live: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.derived: list[Derived] = []
        self.reason = ""
        self._first, self._end = image.data_ptr(), image.data_ptr() + image.numel()
        self._device = image.device
        self._live = {tensor.untyped_storage().data_ptr() for tensor in live.values()}
        self._buffers = {tensor.untyped_storage().data_ptr() for tensor in buffers.values()} - self._live
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Copies of the present tensor on other devices or of other types: storage -> (it, the tensor)."""
        self._filled: set[int] = set()
        """Storages of buffers that are computed from live tensors alone."""

    def fed(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors one after another; copies made of one on the way are forgotten with it."""
        for item in tensors.items():
            self._moved.clear()
            yield item

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = function(*args, **named)
        if self._derives(function, args, named):
            self.derived.append(Derived(function, args, named))
            return result
        ours = [value for value in args if isinstance(value, torch.Tensor) and self._is_ours(value)]
        if not ours:
            return result
        if function is _COPY:
            self._note(args[0], args[1])
        elif function in _SAME and self._whole(args[0], result):
            self._moved[result.untyped_storage().data_ptr()] = (result, args[0])
        elif isinstance(result, torch.Tensor) and not any(_shares(result, value) for value in ours):
            self.reason = self.reason or f"loading computes {function}"
        elif function._schema.is_mutable and function not in _CONSTANT:
            self.reason = self.reason or f"loading changes weights by {function}"
        return result

    def _note(self, target: torch.Tensor, source: torch.Tensor) -> None:
        view, dtype, offset = source.expand(target.shape), source.dtype, source.data_ptr() - self._first
        if moved := self._moved.get(source.untyped_storage().data_ptr()):
            copied, original = moved
            # Both are contiguous: an element of the copy is where it is in the original.
            place = (source.data_ptr() - copied.data_ptr()) // copied.element_size()
            dtype = original.dtype
            offset = original.data_ptr() - self._first + place * original.element_size()
        elif not self._in_image(source):
            self.reason = self.reason or "loading copies weights from somewhere else"
        if not self._is_live(target):
            self.reason = self.reason or "loading copies weights to somewhere else"
        self.copies.append(Copy(target.detach(), offset, tuple(view.shape), view.stride(), dtype))

    def _derives(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Whether an operator fills a buffer of the engine's from live tensors, or changes one so filled."""
        if not function._schema.is_mutable:
            return False
        target, *others = [named["out"], *args] if "out" in named else args
        storage = target.untyped_storage()
        if storage.data_ptr() not in self._buffers:
            return False
        sources = [value for value in others if isinstance(value, torch.Tensor)]
        live = all(map(self._is_live, sources))
        if live and sources and ("out" in named or function is _COPY) and _is_whole(target):
            self._filled.add(storage.data_ptr())
        elif not live and storage.data_ptr() in self._filled:
            self.reason = self.reason or f"loading changes what it has computed by {function}"
        return live and storage.data_ptr() in self._filled

    def _is_ours(self, value: torch.Tensor) -> bool:
        return self._in_image(value) or self._is_live(value)

    def _whole(self, value: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether `result` is `value`, which is of the image, element by element in the same order."""
        return self._in_image(value) and value.is_contiguous() and result.is_contiguous()

    def _is_live(self, value: torch.Tensor) -> bool:
        return value.untyped_storage().data_ptr() in self._live

    def _in_image(self, value: torch.Tensor) -> bool:
        return value.device == self._device and self._first <= value.data_ptr() < self._end


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.data_ptr() for name, tensor in tensors}


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it is all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _differ(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool []; a GPU is not waited for."""
    return (one != other).any() if one.is_cuda else torch.tensor(not torch.equal(one, other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, in which a NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
