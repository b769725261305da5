"""Routing replay: routers that send tokens where the engine sent them, instead of choosing again.

Megatron-Core's `RouterReplay` takes the place of top-k in each router; scores stay the model's own, so that
gradients flow through them. What a backward pass computes again (`model.recompute`) has to choose the same:
each router remembers its choices in the order of forward passes, which is that of backward passes, with a
pipeline's schedule too.

    replay_routing(model)                            # once
    with routed(model, batch.routed):                # choices of this rank's tokens
        model(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from learner.errors import ConfigError
from learner.model.shape import Shape


class _Choice(RouterReplay):
    """Top-k in the same order with gradients and without.

    Megatron-Core sorts only where gradients are wanted, and so not in what a backward pass will compute
    again. The sum of scores in another order has another last bit, which bf16 makes much of.
    """

    def get_replay_topk(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `RouterReplay.get_replay_topk`."""
        with torch.enable_grad():
            return super().get_replay_topk(*arguments, **named)


def order_choices(model: torch.nn.Module) -> None:
    """Makes the routers of a model choose in one order."""
    for router in _routers(model):
        router.router_replay = _Choice()
    # The list is Megatron-Core's handle on all routers of a process; ours are found in their model.
    RouterReplay.clear_global_router_replay_instances()


def replay_routing(model: torch.nn.Module, shape: Shape) -> None:
    """Lets routers be told where to send tokens. Raises `ConfigError` for a model that has none to replay."""
    if shape.experts is None or shape.hybrid is not None:
        raise ConfigError(
            f"objective.routing_replay: got true for a model of type {shape.family}, expected one with "
            "experts in transformer layers; set it to false"
        )
    assert not model.config.moe_router_fusion, "a fused router chooses by itself"
    model.config.moe_enable_routing_replay = True


@contextmanager
def routed(model: torch.nn.Module, choices: torch.Tensor | None) -> Iterator[None]:
    """Within it a forward pass sends tokens to `choices`; None: wherever they score highest.

    `choices`: integer [T, L, k], of the tokens that this rank feeds, before they are split for sequence
    parallelism, and of all layers of the model; k different experts each (`learner.routed`).
    """
    routers = _routers(model) if model.config.moe_enable_routing_replay else []
    if choices is None:
        for router in routers:
            router.router_replay.clear_router_replay_action()
        yield
        return
    mine = _share(choices)
    for router in routers:
        router.router_replay.set_target_indices(mine[:, router.layer_number - 1].long() & 0xFFFF)
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    yield
    for router in routers:
        if not _computed_again(router):
            router.router_replay.replay_backward_list.clear()
        router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)


def _routers(model: torch.nn.Module) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def _share(choices: torch.Tensor) -> torch.Tensor:
    """Those of this rank's tokens, which sequence parallelism splits behind the embedding."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return choices.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]


def _computed_again(router: TopKRouter) -> bool:
    config = router.config
    if not torch.is_grad_enabled():
        return False
    return config.recompute_granularity == "full" or "moe" in (config.recompute_modules or ())
