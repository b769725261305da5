"""Megatron-Core's AdamW with a learning-rate schedule and a gradient clip that needs no CUDA."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from learner.config import OptimizerConfig
from learner.model.cpu import CudaMeansCpu


def build_optimizer(model: DistributedDataParallel, config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW in fp32 over the parameters of `model`; Megatron-Core exempts norms from weight decay."""
    on_gpu = torch.cuda.is_available()
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
        use_distributed_optimizer=on_gpu,
    )
    with nullcontext() if on_gpu else CudaMeansCpu():
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

    The norm is computed over the contiguous gradient buffers, in float64; it may be inf or nan, in
    which case nothing is scaled.
    """
    buffers = [buffer.grad_data for buffer in model.buffers]
    norm = math.sqrt(sum(float(data.double().square().sum()) for data in buffers))
    if limit and math.isfinite(norm) and norm > limit:
        for data in buffers:
            data.mul_(limit / norm)
    return norm
