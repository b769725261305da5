"""Megatron-Core's AdamW with a learning-rate schedule and a gradient clip that needs no CUDA."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from learner.config import OptimizerConfig
from learner.model.cpu import CudaMeansCpu


def build_optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW in fp32 over the parameters of `model`; Megatron-Core exempts norms from weight decay."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        clip_grad=0.0,  # its clip insists on CUDA tensors: see clip_gradients
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
    )
    with nullcontext() if torch.cuda.is_available() else CudaMeansCpu():
        optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    # Megatron-Core leaves applying the exemption to its scheduler, which is not used here.
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = max(0.0, (config.decay_steps - step) / (config.decay_steps - config.warmup_steps))
    return config.lr * (left if config.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def clipped_update(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, lr: float, limit: float
) -> float:
    """Clip the gradients of `model` and step; the norm before clipping. One not finite changes nothing."""
    if model.ddp_config.use_distributed_optimizer:
        return _sharded_update(optimizer, lr, limit)
    norm = clip_gradients(model, limit)
    if math.isfinite(norm):
        update(optimizer, lr)
    return norm


def _sharded_update(optimizer: MegatronOptimizer, lr: float, limit: float) -> float:
    """`clipped_update` by Megatron-Core's own norm and clip, which know whose shard a gradient is."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        if limit:
            clip_grad_by_total_norm_fp32(optimizer.get_parameters(), limit, norm)
        optimizer.step_with_ready_grads()
    return norm


def update(optimizer: MegatronOptimizer, lr: float) -> None:
    """One AdamW step at learning rate `lr` from the gradients in the model's buffers."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Not `step`, which computes a gradient norm on CUDA even when nothing is clipped.
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()


@torch.no_grad()
def clip_gradients(model: DistributedDataParallel, limit: float) -> float:
    """Scale the gradients of `model` to a global norm of at most `limit` (0: never); the norm before.

    The norm is that of the whole model, computed in float64, each weight counted once whatever ranks hold
    it; it may be inf or nan, in which case nothing is scaled.
    """
    experts = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    shared = _square_sum(model.buffers, parallel_state.get_model_parallel_group())
    norm = math.sqrt(shared + _square_sum(model.expert_parallel_buffers, experts))
    if limit and math.isfinite(norm) and norm > limit:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            buffer.grad_data.mul_(limit / norm)
    return norm


def _square_sum(buffers: list[Any], holders: dist.ProcessGroup) -> float:
    """The sum of squared gradients of `buffers` over the ranks `holders` that hold one copy of them together.

    A buffer is contiguous and summed at once, unless some of its weights are counted on another rank.
    """
    total = 0.0
    for buffer in buffers:
        counted = [param for param in buffer.params if _is_counted(param)]
        whole = len(counted) == len(buffer.params)
        parts = [buffer.grad_data] if whole else [param.main_grad for param in counted]
        total += sum(float(part.double().square().sum()) for part in parts)
    if holders.size() == 1:
        return total
    summed = torch.tensor([total], dtype=torch.float64)
    dist.all_reduce(summed, group=holders)
    return float(summed)


def _is_counted(param: torch.nn.Parameter) -> bool:
    """Whether it is on this rank that `param` counts, out of those that hold the same weights."""
    expert_tensor = parallel_state.get_expert_tensor_parallel_group()
    return param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, None, expert_tensor)


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that hold the moments: one for what all ranks share, one for experts if they differ."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def updates_made(optimizer: MegatronOptimizer) -> int:
    """Updates behind the moments; steps that were skipped made none."""
    made = [0]
    for inner in torch_optimizers(optimizer):  # torch counts by parameter, Transformer Engine by group
        holders = [*inner.state.values(), *inner.param_groups]
        made += [int(holder["step"]) for holder in holders if "step" in holder]
    return max(made)


def set_updates(optimizer: MegatronOptimizer, updates: int) -> None:
    """Has the next update correct its bias as one behind `updates` others."""
    for inner in torch_optimizers(optimizer):
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state["step"] = torch.tensor(float(updates))
        else:
            for group in inner.param_groups:
                group["step"] = updates
