"""From hidden states to log-probabilities and entropies of targets, without ever holding all logits.

The output layer runs over `chunk` targets at a time, forward and again in the backward pass: besides
hidden states and gradients only a few tensors [chunk, V / TP] in fp32 are in memory. The vocabulary may
be split over the tensor-parallel ranks: each holds V / TP columns, and only a target's sums and maxima
travel between them.

With l the log-softmax of logits / temperature, p = exp(l), H = -sum p l, target t::

    d l_t / d logit_j = (1[j = t] - p_j) / temperature
    d H / d logit_j   = -p_j (l_j + H) / temperature
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from learner.packing import MicroBatch


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    chunk: int,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [N] of `targets` [N] and entropy [N], both at least fp32, natural logarithms.

    `hidden` [N, H] is the same on all ranks of `group`, over which the rows of `weight` [V / TP, H] are
    split in order; None: `weight` has all of them. Logits are divided by `temperature` [N]. The gradient
    of `hidden` is this rank's part of it, to be summed over `group`. The entropy carries no gradient
    unless `entropy_gradient`.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, group, chunk, entropy_gradient)


def logprobs_of(
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    batch: MicroBatch,
    *,
    chunk: int,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [N] of the batch's targets from a `GPTModel`'s last hidden states.

    `hidden_states` [T, 1, H], or this rank's part of them where sequences are parallel; `output_weight`
    is the embedding where that is the output layer.
    """
    hidden = _at_predictors(hidden_states, output_layer, batch)
    weight = output_layer.weight if output_weight is None else output_weight
    return token_logprobs(
        hidden,
        weight,
        batch.targets,
        batch.temperature,
        output_layer.tp_group,
        chunk=chunk,
        entropy_gradient=entropy_gradient,
    )


def logits_of(
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    batch: MicroBatch,
) -> torch.Tensor:
    """All logits [N, V] at the batch's predictors, before temperature, on every rank; see `logprobs_of`."""
    weight = output_layer.weight if output_weight is None else output_weight
    logits = torch.matmul(_at_predictors(hidden_states, output_layer, batch), weight.t())
    return gather_from_tensor_model_parallel_region(logits, group=output_layer.tp_group)


def _at_predictors(
    hidden_states: torch.Tensor, output_layer: ColumnParallelLinear, batch: MicroBatch
) -> torch.Tensor:
    """[N, H]: the hidden states from which the targets are predicted; their gradient is summed over TP."""
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        whole = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        whole = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    return whole.squeeze(1).index_select(0, batch.predictors)


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        group: dist.ProcessGroup | None,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = group if group is not None and group.size() > 1 else None
        parts = []
        for h, t, divisor in _chunks(chunk, hidden, targets, temperature):
            logs = _log_softmax(h, weight, divisor, group)
            index, own = _columns(t, logs.size(1), group)
            found = logs.gather(1, index).squeeze(1).where(own, 0.0)
            part = torch.stack((found, -logs.exp().mul_(logs).sum(dim=-1)))
            parts.append(_reduced(part, dist.ReduceOp.SUM, group))
        logprobs, entropy = torch.cat(parts, dim=1)
        ctx.group, ctx.chunk, ctx.entropy_gradient = group, chunk, entropy_gradient
        ctx.save_for_backward(hidden, weight, targets, temperature, entropy)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_logprobs: torch.Tensor, for_entropy: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, temperature, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=entropy.dtype, device=weight.device)
        chunks = _chunks(
            ctx.chunk, hidden, targets, temperature, entropy, for_logprobs, for_entropy, grad_hidden
        )
        for h, t, divisor, mean, upon_logprob, upon_entropy, out in chunks:
            logs = _log_softmax(h, weight, divisor, ctx.group)
            index, own = _columns(t, logs.size(1), ctx.group)
            slope = -upon_logprob[:, None]
            if ctx.entropy_gradient:
                slope = slope - upon_entropy[:, None] * (logs + mean[:, None])
            grad = logs.exp_().mul_(slope)
            grad.scatter_add_(1, index, upon_logprob.where(own, 0.0)[:, None])
            grad = grad.div_(divisor[:, None]).to(weight.dtype)
            torch.matmul(grad, weight, out=out)
            grad_weight += torch.matmul(grad.t(), h)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of at most `size` rows of all `tensors` [N, ...] at a time."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """[n, V / TP]: this rank's columns of the log-softmax of logits / `temperature` [n]."""
    logits = torch.matmul(hidden, weight.t()) / temperature[:, None]  # fp32 by the latter
    if group is None:
        return logits.log_softmax(dim=-1)
    logits -= _reduced(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX, group)
    logits -= _reduced(logits.exp().sum(dim=-1, keepdim=True), dist.ReduceOp.SUM, group).log_()
    return logits


def _columns(
    targets: torch.Tensor, width: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each target its column [n, 1] among this rank's `width`, and whether it is one of them [n]."""
    index = targets - (0 if group is None else group.rank() * width)
    own = (index >= 0) & (index < width)
    return index.where(own, 0)[:, None], own


def _reduced(values: torch.Tensor, how: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    """`values`, in place those of all ranks of `group` together."""
    if group is not None:
        dist.all_reduce(values, op=how, group=group)
    return values
