"""Micro-batches through the model: one after the other, or, with pipeline parallelism, one forward and one
backward in turn on every stage (Megatron-Core's 1F1B schedule).

`forward` runs this rank's part of the model on one micro-batch. On the last stage what it returns is the
model's output; on the others it is hidden states, which the schedule hands to the next stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from learner.diagnostics import Stopwatch
from learner.model.cpu import CudaMeansCpu
from learner.model.world import tensor_from_last_stage

_B = TypeVar("_B")


def forward_backward(
    model: DistributedDataParallel,
    batches: Sequence[_B],
    forward: Callable[[_B], Any],
    loss: Callable[[_B, Any], torch.Tensor],
    watch: Stopwatch,
) -> None:
    """Add the gradients of the losses of `batches` to the model's buffers, then sum them over the ranks.

    `loss` is called with a micro-batch and its output, on the last stage. A pipeline's time is all counted
    as `backward`.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        with watch("backward"):
            _pipeline(model, batches, forward, lambda batch, output: (loss(batch, output), None))
    else:
        for batch in batches:
            with watch("forward"):
                value = loss(batch, forward(batch))
            with watch("backward"):
                value.backward()
    with watch("backward"):
        # Over data- and context-parallel ranks all, over tensor-parallel ones those of norms and the like,
        # over first and last stage a tied embedding's.
        finalize_model_grads([model])


@torch.no_grad()
def forward_only(
    model: torch.nn.Module,
    batches: Sequence[_B],
    forward: Callable[[_B], Any],
    pick: Callable[[Any], torch.Tensor],
) -> list[torch.Tensor]:
    """What `pick` takes from the output of each of `batches`, without gradient, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return [pick(forward(batch)) for batch in batches]

    def finish(_: _B, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(()), pick(output)

    found = _pipeline(model, batches, forward, finish, backward=False) or [None] * len(batches)
    return [tensor_from_last_stage(tensor) for tensor in found]


def _pipeline(
    model: torch.nn.Module,
    batches: Sequence[_B],
    forward: Callable[[_B], Any],
    finish: Callable[[_B, Any], tuple[torch.Tensor, Any]],
    backward: bool = True,
) -> list[Any]:
    """Run Megatron-Core's schedule. `finish` makes of an output a loss, and what the last stage returns."""

    def step(remaining: Any, _: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(remaining)
        return forward(batch), partial(conclude, batch)

    def conclude(batch: _B, output: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        value, result = finish(batch, output)
        return value, torch.zeros((), dtype=torch.int), result  # denominators are ours, not the schedule's

    # The schedule counts tokens in a tensor on "cuda".
    with nullcontext() if torch.cuda.is_available() else CudaMeansCpu():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=1,  # lengths travel with the tensors
            micro_batch_size=1,
            forward_only=not backward,
        )
